"""A replay: the same exams as nights that are published, nothing published, and no night examined twice."""

import json
import shutil
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from flows.config import RetrainConfig
from flows.nightly import NightResult
from flows.replay import ReplayedNight, ReplayResult, replay_told_to
from tasks.adapt import cost_of
from tasks.clients.object_store import ObjectStore
from tasks.data import vocabulary
from tasks.data.contract import ObjectiveConfig
from tasks.errors import DataRejected, InvalidConfig
from tasks.evaluate import exam_table
from tasks.ingest import released_before
from tasks.joint import with_joint
from tasks.learning import training as learning
from tasks.learning.bank import fill_bank
from tasks.learning.base import shape_of
from tasks.learning.exams import Night
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material
from tasks.learning.setting import Setting
from tasks.meta_train import rows_of
from tasks.recommend import as_of
from tasks.release import cost, earned, lift, variety
from tasks.release.slices import ADAPTED, POOLED, SLICES, Line, load
from tasks.steps import open_workspace, recalled, record_of, watched_by
from tests.benchmarks.replay import by_seed, markdown
from tests.faults.victims import Nursery, Outcome, Trap
from tests.finished import DONE, Finished
from tests.steps.plain import plain_night, plain_replay
from tests.world import ITEMS, World, write_world

FIRST, LAST = DONE[0], DONE[1] + 1
"""The nights that are replayed, counted from 0: two that were released, and one that was not."""
DEATH = Trap("before", "^tiny/work/evaluate/.*/record.json$", 2)
"""A replay that dies just before its second exam is on record."""


@dataclass
class Seen:
    """A replay with what was told on the way."""

    config: RetrainConfig
    result: ReplayResult
    told: list[tuple[int, int, ReplayedNight]] = field(default_factory=list)
    worked: Counter[str] = field(default_factory=Counter)
    """Steps that were not reused."""

    @property
    def exams(self) -> dict[date, str]:
        """The key of each examined night's exam."""
        return {one.night: one.exam.key for one in self.result.nights if one.exam is not None}


class _Worked:
    def __init__(self) -> None:
        self.steps: Counter[str] = Counter()

    def started(self, step: str, why: str) -> None:
        self.steps[step] += 1

    def progressed(self, step: str, done: float, total: float | None, unit: str) -> None:
        pass

    def finished(self, step: str, reused: bool, seconds: float) -> None:
        pass


def replayed(config: RetrainConfig, start: date, end: date, out: Path, **options: Any) -> Seen:
    told: list[tuple[int, int, ReplayedNight]] = []
    watcher = _Worked()
    with watched_by(watcher), replay_told_to(lambda *event: told.append(event)):
        result = plain_replay(config, start, end, out=str(out), **options)
    return Seen(config, result, told, watcher.steps)


def outside(store: ObjectStore) -> dict[str, bytes]:
    """Everything in the store but step records and the lease."""
    keys = [key for key in store.list("tiny/") if not key.startswith("tiny/work/") and key != "tiny/lease"]
    return {key: store.get(key).data for key in keys}


def exam_of(result: NightResult) -> str:
    return next(step.key for step in result.steps if step.step == "evaluate")


@pytest.fixture(scope="module")
def world(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two released nights, and the store of a production pipeline."""
    return finished.copy(tmp_path_factory.mktemp("beside"))


@pytest.fixture(scope="module")
def beside(world: Finished, tmp_path_factory: pytest.TempPathFactory) -> tuple[Seen, dict[str, bytes]]:
    """A replay over both and a third night, in production's own store; and the store before it."""
    before = outside(world.store)
    nights = world.world.nights
    return replayed(world.config, nights[FIRST], nights[LAST], tmp_path_factory.mktemp("out")), before


@pytest.fixture(scope="module")
def alone(world: Finished, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> tuple[Seen, Outcome]:
    """A replay of the released nights in an empty store, killed and run again; and how the first run ended."""
    copied = world.copy(tmp_path_factory.mktemp("alone"))
    for name in ("store", "scratch"):
        shutil.rmtree(copied.world.config[name])
    out = tmp_path_factory.mktemp("out")
    start, end = copied.world.nights[FIRST], copied.world.nights[LAST - 1]
    died = nursery.run(copied.world.config, start, DEATH, replayed=(end, out))
    return replayed(copied.config, start, end, out), died


def test_nothing_outside_the_step_records_is_touched(
    world: Finished, beside: tuple[Seen, dict[str, bytes]], alone: tuple[Seen, Outcome]
) -> None:
    seen, before = beside
    assert [one.state for one in seen.result.nights] == ["examined"] * 3
    assert outside(world.store) == before
    assert outside(Finished(replace(world.world, config=alone[0].config.model_dump(mode="json")), ()).store) == {}


def test_the_exams_are_those_of_published_nights(
    world: Finished, beside: tuple[Seen, dict[str, bytes]], alone: tuple[Seen, Outcome]
) -> None:
    """The released chain is the replayed one here: the gate let every night through, and the first one started cold."""
    assert released_before(world.config.place(), world.config.gate, world.next_night)[0] is not None
    published = {result.night: exam_of(result) for result in world.results}
    for seen in (beside[0], alone[0]):
        assert {night: seen.exams[night] for night in published} == published
    for key in published.values():
        ours, theirs = (recalled(place, "evaluate", key) for place in (alone[0].config.place(), world.config.place()))
        assert ours.content["files"] == theirs.content["files"]
        assert ours.digest == theirs.digest


def test_what_was_examined_is_not_examined_again(beside: tuple[Seen, dict[str, bytes]]) -> None:
    """Only the night that had not been released is worked on, up to the exam and its lists."""
    assert beside[0].worked == Counter(
        ["ingest", "validate", "history", "prepare", "meta-train", "adapt-exam", "evaluate", "recommend", "compare"]
    )
    assert ["as examined before" in outcome.why for _, _, outcome in beside[0].told] == [True, True, False]
    assert [(place, of) for place, of, _ in beside[0].told] == [(1, 3), (2, 3), (3, 3)]


def test_a_killed_replay_goes_on_where_it_died(alone: tuple[Seen, Outcome]) -> None:
    seen, died = alone
    assert died.killed
    assert seen.worked == Counter(["evaluate", "recommend", "compare"])
    assert [one.lists is not None and one.lists.reused for one in seen.result.nights] == [True, False]
    assert [one.exam is not None and one.exam.reused for one in seen.result.nights] == [True, False]


def test_a_warm_replay_starts_from_the_newest_release(
    world: Finished, beside: tuple[Seen, dict[str, bytes]], tmp_path: Path
) -> None:
    night = world.next_night
    warm = replayed(world.config, night, night, tmp_path, warm=True)
    assert warm.exams == {night: beside[0].exams[night]}
    release = world.results[-1].published.release
    assert f"started from release {release[:12]}" in Path(warm.result.written.page).read_text()
    assert "the first one started cold" in Path(beside[0].result.written.page).read_text()


def test_another_start_is_another_exam(world: Finished, beside: tuple[Seen, dict[str, bytes]], tmp_path: Path) -> None:
    night = world.next_night
    cold = replayed(world.config, night, night, tmp_path)
    assert cold.exams[night] != beside[0].exams[night]
    assert cold.worked["meta-train"] == cold.worked["evaluate"] == 1


def test_the_table_holds_every_method_night_and_slice(beside: tuple[Seen, dict[str, bytes]]) -> None:
    seen = beside[0]
    lines = load(Path(seen.result.written.table))
    table = exam_table(seen.config.place(), seen.exams[seen.result.nights[0].night])
    methods = {name.split("/")[1] for name in table.column_names if name.count("/") == 2}
    methods = methods - {"candidate", "parent"} | {ADAPTED}
    assert {line.method for line in lines} == methods
    assert {line.night for line in lines} == {night.isoformat() for night in seen.exams} | {POOLED}
    # Nobody has more than 16 rows in a night of this world.
    assert {line.exam for line in lines} == {"nightly", "contact 0", "contact 5"}
    assert {line.slice for line in lines} <= set(SLICES)
    own = {line.night: line for line in lines if (line.exam, line.slice, line.method) == ("nightly", "all", ADAPTED)}
    assert own[POOLED].rows == sum(line.rows for night, line in own.items() if night != POOLED)
    steps = earned.load(Path(seen.result.written.earned))
    served = {level: sum(step.rows for step in steps if step.level == level) for level in ("user_id", "market")}
    assert 0 < served["user_id"] < own[POOLED].rows
    assert 0 < sum(served.values()) <= own[POOLED].rows
    gained = lift.load(Path(seen.result.written.lift))
    users = gained.filter(pc.equal(gained["level"], "user_id"))
    assert sum(users["rows"].to_pylist()) == served["user_id"]
    page = Path(seen.result.written.page).read_text()
    (told,) = (one for one in lift.summaries(gained) if one.level == "user_id")
    assert f"user_id: {told.in_words()}" in page
    for method in methods:
        assert f">{method}<" in page
    assert "http" not in page.replace("http-equiv", "")
    assert not any(word in page for word in ("url(", "@import", "<script", "<link", "<img", "src="))


def test_what_levels_cost_is_told_with_what_they_gain(beside: tuple[Seen, dict[str, bytes]]) -> None:
    seen = beside[0]
    place, written = seen.config.place(), seen.result.written
    banks = [record_of(place, one.bank) for one in seen.result.nights if one.bank is not None]
    gained = lift.load(Path(written.lift))
    page = Path(written.page).read_text()
    assert len(banks) == 3
    found = cost.load(Path(written.cost))
    assert [one.level for one in found] == ["user_id", "market"]
    for at, one in enumerate(found):
        assert one.nights == 3
        assert one.adapters == sum(bank.content["levels"][at] for bank in banks)
        assert one.milliseconds == pytest.approx(sum(bank.notes["cost"]["milliseconds"][at] for bank in banks))
        assert one.milliseconds is not None
        assert one.milliseconds > 0
        assert one.device == banks[0].notes["cost"]["device"]
        assert escape(f"{one.level}: {one.in_words()}") in page
    mine = gained.filter(pc.equal(gained["level"], "user_id"))
    saved = sum(row["rows"] * -row["shrunk"] for row in mine.to_pylist())
    assert found[0].gain == pytest.approx(saved)
    assert found[0].pays
    assert found[0].bytes_per_gain == pytest.approx(sum(bank.notes["cost"]["bytes"][0] for bank in banks) / saved)


def test_a_bank_that_was_solved_before_costs_were_noted_is_not_solved_again(
    beside: tuple[Seen, dict[str, bytes]],
) -> None:
    seen = beside[0]
    (bank, *_) = (one.bank for one in seen.result.nights if one.bank is not None)
    record = record_of(seen.config.place(), bank)
    assert not json.dumps(record.content).count("milliseconds")
    old = replace(record, notes={name: note for name, note in record.notes.items() if name != "cost"})
    told = [(one.level, one.adapters, one.bytes, one.milliseconds, one.device) for one in cost_of(old)]
    assert told == [
        (name, adapters, None, None, None)
        for name, adapters in zip(record.content["names"], record.content["levels"], strict=True)
    ]
    assert sum(one.bytes or 0 for one in cost_of(record)) > 0


def test_what_each_method_shows_is_told_by_night(
    world: Finished, beside: tuple[Seen, dict[str, bytes]], alone: tuple[Seen, Outcome]
) -> None:
    seen, night = beside[0], world.next_night
    found = variety.load(Path(seen.result.written.variety))
    assert {one.night for one in found} == {night.isoformat() for night in seen.exams} | {POOLED}
    by_method = {one.method: one for one in found if one.night == night.isoformat()}
    assert list(by_method) == [ADAPTED, "zero steps", "popularity", "matrix factorisation"]
    came = set(exam_table(seen.config.place(), seen.exams[night])["user"].to_pylist())
    assert {(one.users, one.candidates, one.length) for one in by_method.values()} == {(len(came), ITEMS, 10)}
    same = by_method["popularity"]
    assert (same.coverage, same.personalisation, same.gini) == (10 / ITEMS, 0.0, pytest.approx(1 - 10 / ITEMS))
    own = by_method[ADAPTED]
    assert own.personalisation is not None
    assert own.personalisation > 0.1  # half of the users have the opposite taste
    assert own.coverage > same.coverage
    assert own.diversity is not None
    page = Path(seen.result.written.page).read_text()
    for one in found:
        if one.night == POOLED:
            assert f'<td class="number">{one.coverage:.4f}</td>' in page
    first = [one for one in found if one.night == min(seen.exams).isoformat()]
    again = variety.load(Path(alone[0].result.written.variety))
    assert [one for one in again if one.night == first[0].night] == first


def test_lists_are_asked_with_the_statistics_of_the_exam(
    world: Finished, beside: tuple[Seen, dict[str, bytes]]
) -> None:
    """As the rows of the night have them, which see no label of their own night."""
    config = beside[0].config
    place, prepared = config.place(), beside[0].result.nights[-1].prepared
    assert prepared is not None
    layout = record_of(place, prepared)
    rows = rows_of(place, layout)
    words = vocabulary.load(config.data, open_workspace(place).file(layout, "vocabulary.parquet"))
    known = as_of(place, config.data, config.statistics, prepared, words)
    at = np.flatnonzero(np.asarray(rows.night) == world.next_night.toordinal())
    names = config.data.named("request", "categorical")
    cohort = [np.asarray(rows.request_ids)[at, names.index(name)] for name in known.cohort_columns]
    found = known.features(np.asarray(rows.user)[at], np.asarray(rows.item)[at], cohort)
    np.testing.assert_array_equal(found, rows.statistics[at])


def test_the_item_history_counts_the_items_rows_on_earlier_nights(
    world: Finished, beside: tuple[Seen, dict[str, bytes]]
) -> None:
    night = world.next_night
    table = exam_table(world.config.place(), beside[0].exams[night])
    rows = pa.concat_tables(
        part.append_column("night", pa.array([day] * part.num_rows))
        for day in world.world.nights
        if day <= night
        for part in (pq.read_table(path, partitioning=None) for path in world.files_of(day))
    ).to_pylist()
    clean = [row for row in rows if row["at"].date() == row["night"]]
    before = Counter(row["item_id"] for row in clean if row["night"] < night)
    tonight = sorted((row["user_id"], row["at"], before[row["item_id"]]) for row in clean if row["night"] == night)
    found = sorted(
        zip(table["user"].to_pylist(), table["at"].to_pylist(), table["item_history"].to_pylist(), strict=True)
    )
    assert [(user, seen) for user, _, seen in found] == [(user, seen) for user, _, seen in tonight]


def test_a_refused_night_is_named_and_is_nobodys_parent(damageable: Finished, tmp_path: Path) -> None:
    nights = damageable.world.nights
    path = damageable.files_of(nights[FIRST + 1])[0]
    path.write_bytes(path.read_bytes()[:-100])
    seen = replayed(damageable.config, nights[FIRST], nights[LAST], tmp_path)
    assert [one.state for one in seen.result.nights] == ["examined", "rejected", "examined"]
    assert seen.result.nights[1].why.startswith("CorruptFile: ")
    prepared = seen.result.nights[2].prepared
    assert prepared is not None
    assert nights[FIRST + 1].isoformat() in prepared.left_out
    assert "CorruptFile" in Path(seen.result.written.page).read_text()


def test_a_small_night_is_left_out_and_a_range_without_nights_is_refused(damageable: Finished, tmp_path: Path) -> None:
    nights, config = damageable.world.nights, damageable.config
    with pytest.raises(DataRejected, match=r"no night could be examined:\n.* rows, fewer than 1,000,000"):
        replayed(config, nights[FIRST], nights[FIRST], tmp_path, min_rows=1_000_000)
    with pytest.raises(DataRejected, match="the first night that can run"):
        replayed(config, nights[0], nights[0], tmp_path)
    with pytest.raises(InvalidConfig, match="start lies after end"):
        replayed(config, nights[1], nights[0], tmp_path)
    with pytest.raises(InvalidConfig, match="has no night of this range"):
        replayed(config, nights[-1] + timedelta(days=1), nights[-1] + timedelta(days=2), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["world"]


def test_joint_training_is_a_method_with_a_chain_of_its_own(
    world: Finished, beside: tuple[Seen, dict[str, bytes]], tmp_path: Path
) -> None:
    """Each night's answers are those of the same network, trained jointly from what joint training left before."""
    config, nights = world.config, world.world.nights
    seen = replayed(config, nights[FIRST], nights[LAST - 1], tmp_path, joint=True)
    assert seen.exams == {night: beside[0].exams[night] for night in seen.exams}
    assert seen.worked["meta-train"] == 2
    assert seen.worked["evaluate"] == 0
    place, data, parent = config.place(), config.data, None
    workspace = open_workspace(place)
    for one in seen.result.nights:
        assert one.prepared is not None
        assert one.exam is not None
        history = recalled(place, "history", one.prepared.history)
        past, rows = rows_of(place, history), rows_of(place, record_of(place, one.prepared))
        words = vocabulary.load(data, workspace.file(history, "vocabulary.parquet"))
        training = config.training.model_copy(update={"outer": "joint"})
        setting = Setting(
            *(data, config.segments, config.ranker, config.adapter, training, past),
            *(shape_of(data, past, words), one.night, "cpu"),
        )
        parent = learning.meta_train(setting, parent=parent).base
        ladder, material = Ladder(past, config.segments, data.user), Material(past)
        scorer, asked = material.scorer(parent.network), (parent.table(), parent.adaptation)
        bank = fill_bank(ladder, material, scorer, *asked, one.night.toordinal())
        sitting = Night.among(
            data, Ladder(rows, config.segments, data.user), Material(rows), one.night.toordinal()
        )  # fmt: skip
        exam = exam_table(place, one.exam.key)
        told = with_joint(place, exam, one.joint)
        with torch.no_grad():
            at = sitting.at
            logits, features = sitting.material.scorer(parent.network)(at)
            weights = torch.from_numpy(bank.weights[bank.slots_of(sitting.ladder.rows, at)])
            expected = torch.sigmoid(logits + torch.einsum("td,tkd->tk", features, weights))[:, 0]
        np.testing.assert_allclose(told["nightly/joint training/clicked"].to_numpy(), expected.numpy(), rtol=1e-5)
        assert told.column_names[: exam.num_columns] == exam.column_names
        assert with_joint(place, exam, None) is exam
    lines = load(Path(seen.result.written.table))
    others = {line.method for line in load(Path(beside[0].result.written.table))}
    assert {line.method for line in lines} == others | {"joint training"}
    assert {line.exam for line in lines if line.method == "joint training"} == {"nightly", "contact 0", "contact 5"}
    assert ">joint training<" in Path(seen.result.written.page).read_text()


def test_a_night_that_was_replayed_is_released_without_a_second_exam(
    world: Finished, beside: tuple[Seen, dict[str, bytes]]
) -> None:
    """Runs last: it publishes."""
    made = plain_night(world.config, world.next_night)
    reused = {step.step for step in made.steps if step.reused}
    assert {"prepare", "meta-train", "adapt-exam", "evaluate"} <= reused
    assert exam_of(made) == beside[0].exams[world.next_night]
    assert world.pointer.release == made.published.release


def test_both_kinds_of_objective_are_told(tmp_path: Path) -> None:
    world: World = write_world(tmp_path, nights=4, users=24, objectives=2)
    config = RetrainConfig.model_validate(world.config)
    seen = replayed(config, world.nights[3], world.nights[3], tmp_path / "out")
    lines = load(Path(seen.result.written.table))
    assert {(line.objective, line.log_loss is None, line.rmse is None) for line in lines} == {
        ("clicked", False, True), ("stars", True, False),
    }  # fmt: skip
    assert all(np.isfinite(line.loss) for line in lines)
    page = Path(seen.result.written.page).read_text()
    assert "Exams: stars" in page
    assert {(one.objective, one.unit) for one in cost.load(Path(seen.result.written.cost))} == {
        ("clicked", "log-loss"), ("stars", "squared error"),
    }  # fmt: skip
    assert {one.objective for one in variety.load(Path(seen.result.written.variety))} == {"clicked", "stars"}
    assert "squared error" in page


def said_of(labels: list[float], **said: list[float]) -> pa.Table:
    """An exam table of one user by hand: what each method said of each row."""
    count = len(labels)
    columns = {"user": ["ann"] * count, "at": [0] * count, "tie": list(range(count)), "label/liked": labels}
    return pa.table(
        columns | {f"nightly/{method.replace('_', ' ')}/liked": numbers for method, numbers in said.items()}
    )


def test_each_seed_is_held_against_its_own_best_baseline_over_all_its_nights() -> None:
    """Of seed 9: -ln 0.8 once and -ln 0.5 three times, against -ln 0.6. The parent is no baseline."""
    tables = {
        "2026-03-05 10": said_of([1], candidate=[0.9], popularity=[0.6], item_mean=[0.7]),
        "2026-03-05 9": said_of([1], candidate=[0.8], popularity=[0.6], item_mean=[0.4], parent=[0.99]),
        "2026-03-06 10": said_of([1, 1], candidate=[0.9, 0.9], popularity=[0.6, 0.6], item_mean=[0.7, 0.7]),
        "2026-03-06 9": said_of([1, 1, 1], candidate=[0.5] * 3, popularity=[0.6] * 3, item_mean=[0.4] * 3),
    }
    liked = ObjectiveConfig(name="liked", column="liked")
    assert by_seed(tables, "nightly", liked).splitlines()[2:] == [
        "| 9 | 0.5756 | popularity | 0.5108 | +0.0648 |",
        "| 10 | 0.1054 | item mean | 0.3567 | -0.2513 |",
    ]
    stars = ObjectiveConfig(name="liked", column="liked", kind="rating")
    rated = {"2026-03-05 0": said_of([3, 1], candidate=[3.5, 0.5], popularity=[5, 1])}
    # Root of (0.25 + 0.25) / 2, and of (4 + 0) / 2.
    assert by_seed(rated, "nightly", stars).splitlines()[2:] == ["| 0 | 0.5000 | popularity | 1.4142 | -0.9142 |"]


def test_the_table_of_the_readme_has_the_candidate_on_top_and_each_difference_beside_its_figure() -> None:
    counted = ("liked", POOLED, 1234, 56, 60)
    lines = [
        Line("nightly", "all", "a", *counted, 0.6, None, 0.7, 0.8, 0.01, -0.01, -0.02, 0.03,
             0.005, -0.001, 0.0125, -0.25, None, None),
        Line("nightly", "all", ADAPTED, *counted, 0.625, None, 0.71, 0.8, 0.02, *(None,) * 9),
    ]  # fmt: skip
    assert markdown(lines).splitlines()[0] == "**nightly**: 1,234 rows, 60 users' nights"
    heads, _, own, other = (line.split(" | ") for line in markdown(lines).splitlines()[2:])
    assert [head for head in heads if "minus" not in head] == [
        "| method", "log-loss", "per-user AUC", "NDCG@10", "calibration |",
    ]  # fmt: skip
    assert own == ["| adapted", "0.6250", "", "0.7100", "", "0.8000", "", "0.0200 |"]
    assert other == [
        "| a", "0.6000", "-0.0100 [-0.0200, +0.0300]", "0.7000", "+0.0050 [-0.0010, +0.0125]", "0.8000",
        "-0.2500 (too few users)", "0.0100 |",
    ]  # fmt: skip
