"""A fallback that is killed, anywhere, changes nothing that serves, and is finished by doing it again."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest

from tasks.fallback import FellBack
from tasks.release.holds import held_segments
from tasks.release.published import check_whole, folders, resolve, stored_manifest
from tasks.serving.ranker import Ranker
from tests.faults.victims import Nursery, Trap
from tests.finished import Finished
from tests.steps.test_fallback import WHO, fell, request_of, spoiled

USERS = ["user-003", "user-004", "nobody"]
SHORT = (
    Trap("after", "^tiny/blobs/", 3),
    Trap("after", "^tiny/releases/.*/manifest.json$"),
    Trap("before", "^tiny/current.json$"),
    Trap("after", "^tiny/current.json$"),
)
LONG = (
    Trap("before", "^tiny/state/holds.json$"),
    Trap("after", "^tiny/state/holds.json$"),
    Trap("before", "^tiny/blobs/"),
    Trap("after", "^tiny/releases/.*/run.json$"),
    Trap("before", "^tiny/releases/.*/manifest.json$"),
    Trap("before", "^tiny/state/released/"),
    Trap("after", "^tiny/state/released/"),
    Trap("after", "^tiny/ledger/"),
)


@dataclass(frozen=True)
class Undisturbed:
    """What a fallback comes to that nobody kills."""

    done: FellBack
    scores: np.ndarray


def read(world: Finished, key: str) -> bytes:
    return world.store.get(key).data


def said(world: Finished) -> np.ndarray:
    with Ranker(world.config.store, "tiny", "cpu") as ranker:
        return ranker.score(request_of(USERS))


@pytest.fixture(scope="module")
def undisturbed(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    world = finished.copy(tmp_path_factory.mktemp("undisturbed") / "world")
    return Undisturbed(fell(world), said(world))


def killed_then_finished(world: Finished, nursery: Nursery, undisturbed: Undisturbed, trap: Trap) -> None:
    """The store as it was but for what no reader sees; then the pointer moved once, and the ledger told once."""
    store, before, pointer, scores = world.store, world.published(), world.pointer, said(world)
    dead = nursery.run(world.world.config, pointer.night, trap, fallback=(WHO, None))
    assert dead.killed, f"{trap}: nothing was caught; {dead.told[-2:]}"
    after = world.published()
    moved = ("current" in trap.key and trap.when == "after") or "ledger" in trap.key
    mine = {"tiny/current.json"} if moved else set()
    assert {key: after[key] for key in before.keys() - mine} == {key: before[key] for key in before.keys() - mine}
    assert ("ledger" in trap.key) == bool({key for key in after.keys() - before.keys() if "/ledger/" in key})
    for release in folders(store, "tiny").visible:
        check_whole(store, stored_manifest(store, "tiny", release))
    assert np.array_equal(said(world), undisturbed.scores if moved else scores)

    done = fell(world)
    now = world.pointer
    assert now == done.pointer
    assert (now.release, now.generation) == (undisturbed.done.pointer.release, pointer.generation + 1)
    assert (now.previous, now.reason) == (pointer.release, undisturbed.done.pointer.reason)
    assert done.new == (not moved)
    assert np.array_equal(said(world), undisturbed.scores)
    assert resolve(store, "tiny", now.night.isoformat()) == now.release
    assert [one.told for one in held_segments(store, "tiny")] == ["user_id=user-003"]
    for release in folders(store, "tiny").visible:
        check_whole(store, stored_manifest(store, "tiny", release))
    last = world.published()
    (entry,) = {key for key in last.keys() - before.keys() if "/ledger/" in key}
    assert b'"what":"fallback"' in last[entry]
    assert now.release.encode() in last[entry]
    assert (fell(world).new, world.published()) == (False, last)


@pytest.mark.parametrize("trap", SHORT, ids=str)
def test_a_fallback_that_is_killed_is_finished_by_the_next_call(
    damageable: Finished, nursery: Nursery, undisturbed: Undisturbed, trap: Trap
) -> None:
    killed_then_finished(damageable, nursery, undisturbed, trap)


@pytest.mark.soak
@pytest.mark.parametrize("trap", LONG, ids=str)
def test_every_other_write_of_a_fallback_may_be_the_last(
    damageable: Finished, nursery: Nursery, undisturbed: Undisturbed, trap: Trap
) -> None:
    killed_then_finished(damageable, nursery, undisturbed, trap)


@pytest.mark.parametrize("when", ["before", "after"])
def test_one_that_gives_weights_back_keeps_the_hold_while_it_is_killed_and_ends_it_by_the_next_call(
    damageable: Finished, nursery: Nursery, when: Literal["before", "after"]
) -> None:
    """The hold is the last that is written: whoever dies around the pointer's swap leaves the segment held."""
    world, good, scores = damageable, damageable.pointer.release, said(damageable)
    held = fell(world).pointer
    trap = Trap(when, "^tiny/current.json$")
    assert nursery.run(world.world.config, held.night, trap, fallback=(WHO, good)).killed
    assert [one.told for one in held_segments(world.store, "tiny")] == ["user_id=user-003"]
    assert (world.pointer == held) == (when == "before")
    done = fell(world, to=good)
    assert (done.new, done.ended is not None) == (when == "before", True)
    assert (world.pointer.release, world.pointer.generation) == (good, held.generation + 1)
    assert held_segments(world.store, "tiny") == ()
    assert np.array_equal(said(world), scores)
    (entry,) = (key for key in world.store.list("tiny/ledger/") if done.pointer.moved_at.encode() in read(world, key))
    assert b'"what":"fallback"' in read(world, entry)
    last = world.published()
    assert (fell(world, to=good).ended, world.published()) == (None, last)


def test_one_to_earlier_weights_that_is_killed_behind_the_swap_is_told_in_the_ledger_by_the_next_call(
    damageable: Finished, nursery: Nursery
) -> None:
    world, good = damageable, damageable.pointer.release
    bad = spoiled(world)
    before = set(world.store.list("tiny/ledger/"))
    trap = Trap("after", "^tiny/current.json$")
    assert nursery.run(world.world.config, bad.night, trap, fallback=(WHO, good)).killed
    moved = world.pointer
    assert (moved.release, moved.generation) == (good, bad.generation + 1)
    assert set(world.store.list("tiny/ledger/")) == before
    for _ in range(2):
        assert fell(world, to=good).pointer == moved
        (entry,) = set(world.store.list("tiny/ledger/")) - before
    assert b'"what":"fallback"' in world.store.get(entry).data
