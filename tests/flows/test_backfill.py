"""Backfill: the plan, the order, what is skipped, what is refused, and when the pointer moves."""

from dataclasses import replace
from datetime import date

import pytest

from flows import backfill as flow
from flows.backfill import BackfillResult, NightOutcome, PlannedNight, backfill, plan, told_to
from tasks.errors import DataRejected, InvalidConfig, StoreUnavailable
from tasks.releases import releases
from tests.finished import Finished
from tests.steps.plain import plain_night

Told = list[tuple[PlannedNight, ...] | NightOutcome]
REFUSED = 6
"""The night whose files are cut short, counted from 0."""


def backfilled(world: Finished, start: int, end: int, **options: bool) -> tuple[BackfillResult | DataRejected, Told]:
    """What a backfill from one night to another came to, and what it told on the way."""
    told: Told = []
    with told_to(told.append):
        try:
            return backfill(world.config, world.world.nights[start], world.world.nights[end], **options), told
        except DataRejected as refused:
            return refused, told


@pytest.fixture(scope="module")
def world(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Nights 4 and 5 are finished under this config, 6 is broken, 7 is to do."""
    copied = finished.copy(tmp_path_factory.mktemp("backfill"))
    results = tuple(plain_night(copied.config, copied.world.nights[number]) for number in (4, 5))
    path = copied.files_of(copied.world.nights[REFUSED])[0]
    path.write_bytes(path.read_bytes()[:-100])
    return replace(copied, results=results)


@pytest.fixture(scope="module")
def dry(world: Finished, prefect: None) -> tuple[BackfillResult | DataRejected, bool]:
    """A dry run before anything else, and whether it changed the store."""
    before = {key: world.store.get(key).data for key in world.store.list("tiny/")}
    found, _ = backfilled(world, 2, 7, dry_run=True)
    return found, before != {key: world.store.get(key).data for key in world.store.list("tiny/")}


@pytest.fixture(scope="module")
def first(
    world: Finished, dry: tuple[BackfillResult | DataRejected, bool], prefect: None
) -> tuple[BackfillResult | DataRejected, Told, int]:
    """A backfill over nights 2 to 7, the pointer left alone; and the pointer's generation before it."""
    generation = world.pointer.generation
    return *backfilled(world, 2, 7), generation


@pytest.fixture(scope="module")
def second(
    world: Finished, first: tuple[BackfillResult | DataRejected, Told, int], prefect: None
) -> tuple[BackfillResult | DataRejected, Told, int]:
    """The same again, and now the pointer may move; and its generation before that."""
    generation = world.pointer.generation
    return *backfilled(world, 7, 7, promote=True), generation


def test_a_dry_run_tells_the_plan_and_changes_nothing(dry: tuple[BackfillResult, bool], world: Finished) -> None:
    found, changed = dry
    assert not changed
    assert found.outcomes == ()
    assert [entry.night for entry in found.plan] == list(world.world.nights[2:8])
    assert [entry.runs for entry in found.plan] == [True, True, False, False, True, True]
    assert found.plan[2].why == f"finished: release {world.results[0].published.release[:12]}"


def test_the_plan_is_told_first_and_then_each_night_in_order(first: tuple[object, Told, int], world: Finished) -> None:
    told = first[1]
    assert isinstance(told[0], tuple)
    outcomes = [event for event in told[1:] if isinstance(event, NightOutcome)]
    assert [(outcome.night, outcome.state) for outcome in outcomes] == list(
        zip(world.world.nights[2:8], ["skipped", "released", "skipped", "skipped", "rejected", "released"], strict=True)
    )
    assert f"the first night that can run is {world.world.nights[3]}" in outcomes[0].why


def test_a_refused_night_is_named_at_the_end_and_later_ones_were_done(
    first: tuple[DataRejected, Told, int], world: Finished
) -> None:
    error, told, _ = first
    assert isinstance(error, DataRejected)
    assert str(error).startswith("1 of 6 nights were refused; the others are done:\n")
    assert f"{world.world.nights[REFUSED]}: CorruptFile: " in str(error)
    last = told[-1]
    assert isinstance(last, NightOutcome)
    assert last.result is not None
    assert list(last.result.prepared.left_out) == [world.world.nights[REFUSED].isoformat()]


def test_each_night_starts_from_the_newest_release_before_it(second: tuple[object, Told, int], world: Finished) -> None:
    made = {row.night: row for row in releases(world.config.place())}
    nights = world.world.nights
    assert sorted(made) == [nights[number] for number in (3, 4, 5, 7)]
    assert made[nights[7]].parent == made[nights[5]].release
    assert made[nights[5]].parent == made[nights[4]].release
    # Night 4 was there before night 3 was filled in: it stays as it was made.
    assert made[nights[4]].parent is made[nights[3]].parent is None


def test_the_pointer_stays_unless_told(first: tuple[object, Told, int], world: Finished) -> None:
    last = first[1][-1]
    assert isinstance(last, NightOutcome)
    assert last.why == "promotion was not asked for (--promote)"


def test_a_finished_night_is_promoted_when_asked_for_without_being_made_again(
    second: tuple[BackfillResult, Told, int], world: Finished
) -> None:
    result, _, generation = second
    assert "finished, but not promoted" in result.plan[0].why
    made = result.outcomes[0].result
    assert made is not None
    assert [step.step for step in made.steps if not step.reused] == ["publish"]
    assert (world.pointer.release, world.pointer.generation) == (made.published.release, generation + 1)


def test_afterwards_there_is_nothing_left_to_do(second: tuple[object, Told, int], world: Finished) -> None:
    nights = world.world.nights
    assert not any(entry.runs for entry in plan(world.config, nights[7], nights[7], promote=True))
    assert not any(entry.runs for entry in plan(world.config, nights[3], nights[5], promote=True))


def test_a_night_that_the_lake_lacks_is_skipped_and_another_config_runs_again(world: Finished) -> None:
    beyond = date.fromordinal(world.world.nights[-1].toordinal() + 1)
    assert plan(world.config, beyond, beyond, promote=False)[0].why == "the lake has no such night"
    gate = world.config.gate.model_copy(update={"margin": 0.001})
    other = world.config.model_copy(update={"gate": gate})
    assert plan(other, world.world.nights[4], world.world.nights[4], promote=False)[0].runs


def test_a_range_that_ends_before_it_starts_is_refused(finished: Finished) -> None:
    nights = finished.world.nights
    with pytest.raises(InvalidConfig, match="start lies after end"):
        plan(finished.config, nights[1], nights[0], promote=False)


@pytest.mark.usefixtures("prefect")
def test_what_is_not_about_data_stops_it_at_once(damageable: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[date] = []

    def fail(config: object, night: date, promote: bool) -> None:
        asked.append(night)
        raise StoreUnavailable("no answer")

    monkeypatch.setattr(flow, "nightly_retrain", fail)
    with pytest.raises(StoreUnavailable):
        backfilled(damageable, 4, 7)
    assert asked == [damageable.world.nights[4]]
