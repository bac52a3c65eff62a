"""A segment whose own weights are not to serve: at once, tomorrow, and with the weights of an earlier release."""

import base64
import hmac
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from flows.config import RetrainConfig
from tasks.clients.lease import Lease
from tasks.errors import InvalidConfig, LeaseHeld, NoRelease, ObjectCorrupt, ObjectMissing, PointerMoved, ReleaseRefused
from tasks.export import write_release
from tasks.fallback import FellBack, fall_back, let_go
from tasks.learning.base import DESCRIPTION, WEIGHTS, load_base
from tasks.parents import release_file
from tasks.release.about import about
from tasks.release.golden_read import read_requests
from tasks.release.holds import HeldSegment, change_holds, held_segments, holds_key
from tasks.release.manifest import Pointer, blob_key, content_digest, describe, pointer_key
from tasks.release.moves import hold as hold_pointer
from tasks.release.moves import promote, rollback
from tasks.release.published import check_whole, night_key, stored_manifest
from tasks.release.publishing import publish_release
from tasks.release.tables import read_tables
from tasks.releases import releases
from tasks.serving.ranker import Ranker
from tasks.steps import hold
from tests.finished import Finished
from tests.steps.plain import plain_night

WHO = {"user_id": "user-003"}


def fell(world: Finished, named: dict[str, str] = WHO, **more: str) -> FellBack:
    config = world.config
    return fall_back(config.place(), config.data, config.segments.levels, named, "complaints", **more)


def request_of(users: list[str]) -> dict[str, object]:
    return {
        "user_id": users, "market": ["north"] * len(users), "age": [40] * len(users),
        "item_id": [[100, 102, 999]] * len(users), "genre": [["comedy"] * 3] * len(users),
        "length": [["long", "short", "long"]] * len(users), "price": [[5.0, 5.0, 1.0]] * len(users),
    }  # fmt: skip


def scores(world: Finished, users: list[str]) -> np.ndarray:
    with Ranker(world.config.store, world.config.pipeline) as ranker:
        return ranker.score(request_of(users))


def slots(world: Finished, release: str) -> dict[int, set[int]]:
    """Level to the keys that have a slot of the bank."""
    table = pq.read_table(release_file(world.config.place(), release, "segments.parquet"))
    level, key, slot = (table[name].to_numpy() for name in ("level", "key", "slot"))
    return {at: set(key[(level == at) & (slot >= 0)].tolist()) for at in (0, 1)}


def test_a_user_falls_back_at_once_and_the_night_made_anew_with_the_hold_is_the_same_release(
    damageable: Finished,
) -> None:
    """Two ways to the same bytes: the champion's files without him, and the bank solved without him."""
    world, before = damageable, damageable.pointer
    then = scores(world, ["user-003", "user-004", "nobody"])
    done = fell(world)
    assert (done.new, done.held, done.segment) == (True, True, "user_id=user-003")
    now = world.pointer
    assert now == done.pointer
    assert (now.generation, now.previous, now.night) == (before.generation + 1, before.release, before.night)
    assert (now.fencing_token, now.reason) == (before.fencing_token, "user_id=user-003 by its parent: complaints")
    after = scores(world, ["user-003", "user-004", "nobody"])
    assert np.array_equal(then[1:], after[1:])
    assert np.abs(then[0] - after[0]).max() > 1e-3
    gone = slots(world, before.release)[0] - slots(world, now.release)[0]
    assert len(gone) == 1
    assert slots(world, before.release)[1] == slots(world, now.release)[1]
    manifest = stored_manifest(world.store, "tiny", now.release)
    check_whole(world.store, manifest)
    told = stored_manifest(world.store, "tiny", before.release).segments[0]
    assert manifest.segments[0].own == told.own - 1
    assert manifest.segments[0].rolled_back == told.rolled_back + 1
    assert "user_id=user-003 by its parent, decided by " in str(manifest.provenance["fallback"])
    run = json.loads(world.store.get(f"tiny/releases/{now.release}/run.json").data)
    assert (run["decided_by"], run["fallback"]) == ("operator", "user_id=user-003 by its parent")
    report = world.store.get(f"tiny/releases/{now.release}/report.html").data.decode()
    assert f"Release {now.release}: user_id=user-003 by its parent." in report
    made = plain_night(world.config, before.night)
    assert made.published.release == now.release
    assert made.published.promoted
    assert world.pointer == now


@pytest.mark.soak
def test_the_next_night_keeps_it_until_it_is_let_go(damageable: Finished) -> None:
    world = damageable
    fell(world)
    place = world.config.place()
    made = plain_night(world.config, world.next_night)
    shipped = next(step for step in made.steps if step.step == "adapt-ship")
    content = json.loads(world.store.get(f"tiny/work/adapt-ship/{shipped.key}/record.json").data)["content"]
    assert content["refused"] == [1, 0]
    assert made.published.promoted
    levels = world.config.segments.levels
    found, left = let_go(place, world.config.data, levels, WHO)
    assert (found.told, found.reason, left) == ("user_id=user-003", "complaints", ())
    with pytest.raises(ObjectMissing, match="user_id=user-003 is not held; held: none"):
        let_go(place, world.config.data, levels, WHO)


def test_a_fallback_that_is_done_is_done(damageable: Finished) -> None:
    first = fell(damageable)
    again = fell(damageable)
    assert (again.new, again.held) == (False, True)
    assert again.pointer == first.pointer
    assert len(held_segments(damageable.store, "tiny")) == 1


def test_a_market_falls_back_to_the_base(damageable: Finished) -> None:
    then = scores(damageable, ["user-003", "nobody"])
    before = damageable.pointer.release
    done = fell(damageable, {"market": "north"})
    after = scores(damageable, ["user-003", "nobody"])
    assert np.array_equal(then[0], after[0])  # he has weights of his own, which stay until they are solved anew
    assert np.abs(then[1] - after[1]).max() > 1e-4
    assert len(slots(damageable, before)[1] - slots(damageable, done.pointer.release)[1]) == 1


def spoiled(world: Finished) -> Pointer:
    """A champion that is the old one but for one user's weights."""
    config, store, before = world.config, world.store, world.pointer
    place, folder = config.place(), Path(config.scratch) / "spoiled"
    folder.mkdir(parents=True)
    manifest = stored_manifest(store, "tiny", before.release)
    known = folder / "known"
    known.mkdir()
    for file in manifest.files:
        (known / file.name).symlink_to(release_file(place, before.release, file.name).resolve())
    tables, base = read_tables(config.data, known), load_base({one: known / one for one in (WEIGHTS, DESCRIPTION)})
    weights = np.fromfile(known / "bank.bin", "<f4").reshape(-1, len(config.data.objectives), base.network.width).copy()
    key = tables.ids("user_id", np.array(["user-003"], object))[0]
    weights[tables.levels[0].slots[tables.levels[0].keys == key]] *= -3
    requests = read_requests(config.data, (known / "golden.json").read_bytes(), tables.history)
    with hold(place):
        made, parity = write_release(
            place, config.data, base, weights, tables, requests, before.night, folder, lambda *_: None
        )
    files = describe(made)
    bad = replace(manifest, release=content_digest(files), files=files, parity=vars(parity), beside=())
    publish_release(store, "tiny", made, bad, {"run.json": b"{}", "report.html": b"<main>"})
    return promote(store, "tiny", bad.release, "spoiled")


def test_weights_of_an_earlier_release_of_the_same_base_give_its_very_bytes_back(damageable: Finished) -> None:
    good = damageable.pointer
    then = scores(damageable, ["user-003", "user-004"])
    bad = spoiled(damageable)
    assert bad.release != good.release
    assert not np.array_equal(then, scores(damageable, ["user-003", "user-004"]))
    done = fell(damageable, to=good.release)
    assert (done.pointer.release, done.held) == (good.release, False)
    assert held_segments(damageable.store, "tiny") == ()
    assert np.array_equal(then, scores(damageable, ["user-003", "user-004"]))


def test_who_fell_back_gets_his_weights_back_and_is_held_no_longer(damageable: Finished) -> None:
    """The release between is the champion's without the other one; the last is the very one that was there first."""
    world, who, first = damageable, ["user-003", "user-004", "nobody"], damageable.pointer.release
    then = scores(world, who)
    fell(world)
    one_less = fell(world, {"user_id": "user-004"}).pointer.release
    neither = scores(world, who)
    done = fell(world, to=first)
    assert (done.new, done.held) == (True, False)
    assert done.ended is not None
    assert (done.ended.told, done.ended.reason) == ("user_id=user-003", "complaints")
    assert [one.told for one in held_segments(world.store, "tiny")] == ["user_id=user-004"]
    assert done.pointer.release not in (first, one_less)
    assert np.array_equal(scores(world, who), np.stack([then[0], neither[1], then[2]]))
    assert np.abs(then - neither).max(axis=(1, 2))[:2].min() > 1e-3
    made, was = (stored_manifest(world.store, "tiny", one).segments for one in (done.pointer.release, first))
    assert (made[0].own, made[0].rolled_back) == (was[0].own - 1, was[0].rolled_back + 1)
    assert made[0].segments == was[0].segments
    assert made[1] == was[1]
    back = fell(world, {"user_id": "user-004"}, to=first)
    assert back.pointer.release == first
    assert held_segments(world.store, "tiny") == ()
    assert np.array_equal(scores(world, who), then)


def test_a_market_that_fell_back_gets_its_weights_back_and_no_user_notices(damageable: Finished) -> None:
    """Slots of users come behind those of markets, so all of theirs move, there and back."""
    first, who = damageable.pointer.release, ["user-003", "user-004", "nobody"]
    then = scores(damageable, who)
    fell(damageable, {"market": "north"})
    assert fell(damageable, {"market": "north"}, to=first).pointer.release == first
    assert np.array_equal(scores(damageable, who), then)


def test_weights_that_the_champion_has_already_make_no_release_and_end_a_hold(damageable: Finished) -> None:
    world, before, published = damageable, damageable.pointer, damageable.published()
    done = fell(world, to=before.release)
    assert (done.new, done.held, done.ended, done.pointer) == (False, False, None, before)
    held = HeldSegment(columns=("user_id",), name="user-003", reason="r", by="b", since="s")
    change_holds(world.store, "tiny", lambda _: [held])
    assert fell(world, to=before.release).ended == held
    assert held_segments(world.store, "tiny") == ()
    assert world.published() == published


def test_a_fallback_of_a_night_that_the_gate_held_is_let_through_by_an_operator_wherever_it_is_told(
    damageable: Finished,
) -> None:
    world, place, key = damageable, damageable.config.place(), night_key("tiny", damageable.pointer.night)
    noted = world.store.get(key)
    gates = json.loads(noted.data) | {"go": False}
    world.store.swap(key, json.dumps(gates).encode(), noted.etag)

    def told(release: str) -> tuple[bool, bool, str, str | None]:
        found = about(world.store, "tiny", release)
        (row,) = (one for one in releases(place) if one.release == release)
        return row.go, found.go, found.decided_by, found.override

    through = (True, True, "operator", "complaints")
    first = fell(world).pointer.release
    run = json.loads(world.store.get(f"tiny/releases/{first}/run.json").data)
    state = json.loads(world.store.get(key).data)
    assert state == gates | {"release": first, "go": True, "override": "complaints"}
    assert (run["go"], run["decided_by"], run["override"]) == (True, "operator", "complaints")
    assert told(first) == through
    second = fell(world, {"user_id": "user-004"}).pointer.release
    assert (told(first), told(second)) == (through, through)


def test_weights_of_another_base_are_refused_by_name(damageable: Finished) -> None:
    earlier = damageable.results[0].published.release
    before = damageable.published()
    with pytest.raises(ReleaseRefused, match="has another base than the champion") as refused:
        fell(damageable, to=earlier)
    assert f"{WEIGHTS}, {DESCRIPTION} differ" in str(refused.value)
    assert damageable.published() == before


@pytest.mark.parametrize(
    ("named", "error", "said"),
    [
        ({"user_id": "nobody"}, ObjectMissing, "segment user_id=nobody has no weights of its own in release"),
        ({"country": "north"}, InvalidConfig, "country names no level of the ladder; allowed: user_id=...; market=..."),
        ({"user_id": "user-003", "market": "north"}, InvalidConfig, "names no level of the ladder"),
    ],
)
def test_a_segment_that_is_not_there_is_told_before_anything_changes(
    damageable: Finished, named: dict[str, str], error: type[Exception], said: str
) -> None:
    before = damageable.published()
    with pytest.raises(error, match=said):
        fell(damageable, named)
    assert damageable.published() == before
    assert not damageable.store.exists(holds_key("tiny"))


def test_a_ladder_that_the_champion_does_not_have_is_told_before_anything_changes(damageable: Finished) -> None:
    before, config = damageable.published(), damageable.config
    with pytest.raises(InvalidConfig, match="has no level age, its ladder is user_id; market"):
        fall_back(config.place(), config.data, (("user_id",), ("age",)), {"age": "40"}, "complaints")
    assert damageable.published() == before


def test_a_fallback_waits_for_no_night_and_overtakes_no_operator(
    damageable: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, before = damageable, damageable.pointer
    with hold(world.config.place()), monkeypatch.context() as patch:
        patch.setattr("tasks.steps.Lease", partial(Lease, wait=False))
        with pytest.raises(LeaseHeld):
            fell(world)
    assert world.pointer == before

    def meanwhile(*args: object, **more: object) -> object:
        rollback(world.store, "tiny", None, "by another operator")
        return publish_release(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("tasks.fallback.publish_release", meanwhile)
    with pytest.raises(PointerMoved, match="was moved while release"):
        fell(world)
    assert world.pointer.release == before.previous


def test_without_a_champion_nothing_falls_back(damageable: Finished) -> None:
    damageable.store.delete(pointer_key("tiny"))
    with pytest.raises(NoRelease):
        fell(damageable)


def test_a_champion_whose_bank_is_damaged_is_no_start(damageable: Finished) -> None:
    manifest = stored_manifest(damageable.store, "tiny", damageable.pointer.release)
    bank = next(file for file in manifest.files if file.name == "bank.bin")
    key = blob_key("tiny", bank.sha256)
    data = damageable.store.get(key).data
    damageable.store.delete(key)
    damageable.store.put_if_absent(key, bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(ObjectCorrupt, match=r"bank\.bin of release"):
        fell(damageable)


@pytest.mark.parametrize("name", ["run.json", "report.html", "lift.parquet"])
def test_what_was_changed_beside_the_champion_gets_into_no_new_release(damageable: Finished, name: str) -> None:
    key = f"tiny/releases/{damageable.pointer.release}/{name}"
    data = damageable.store.get(key).data
    damageable.store.delete(key)
    damageable.store.put_if_absent(key, data.replace(b"e", b"a", 1))
    before = damageable.published()
    with pytest.raises(ObjectCorrupt, match=rf"{name} has {len(data)} bytes with SHA-256 .* promote another release"):
        fell(damageable)
    assert damageable.published() == before
    assert not damageable.store.exists(holds_key("tiny"))


def test_a_held_pointer_stays_held_when_an_operator_moves_it(damageable: Finished) -> None:
    hold_pointer(damageable.store, "tiny", "an incident")
    assert fell(damageable).pointer.hold == "an incident"


def test_holds_that_were_changed_by_hand_are_told(damageable: Finished) -> None:
    damageable.store.put_if_absent(holds_key("tiny"), b'[{"columns": ["user_id"]}]')
    with pytest.raises(ObjectCorrupt, match="delete it and hold the segments anew"):
        plain_night(RetrainConfig.model_validate(damageable.world.config), damageable.next_night)


def personal(world: Finished) -> RetrainConfig:
    """The config of a lake whose users are hashed."""
    tree = world.config.model_dump(mode="json")
    for column in tree["data"]["columns"]:
        if column["name"] == "user_id":
            column["personal"] = {"key_id": "k1"}
    return RetrainConfig.model_validate(tree)


def test_a_personal_segment_is_named_by_its_raw_value_and_told_by_its_digest(
    damageable: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the standard library's HMAC: what is asked for, held and let go is the digest, given raw or hashed."""
    key, config = bytes(range(32)), personal(damageable)
    place, levels = config.place(), config.segments.levels
    monkeypatch.setenv("NIGHTRANK_HASH_KEY_k1", base64.b64encode(key).decode())
    digest = hmac.new(key, b"user-003", "sha256").hexdigest()
    with pytest.raises(ObjectMissing) as missing:
        fall_back(place, config.data, levels, WHO, "complaints")
    assert f"segment user_id={digest[:12]} has no weights of its own" in str(missing.value)
    held = HeldSegment(columns=("user_id",), name=digest, reason="r", by="b", since="s")
    for given in ("user-003", digest):
        change_holds(damageable.store, "tiny", lambda _: [held])
        assert let_go(place, config.data, levels, {"user_id": given}) == (held, ())
    assert held.told == f"user_id={digest[:12]}"
    with pytest.raises(ObjectMissing, match=f"segment user_id={digest[:12]} is not held; held: none") as none:
        let_go(place, config.data, levels, WHO)
    monkeypatch.delenv("NIGHTRANK_HASH_KEY_k1")
    with pytest.raises(InvalidConfig, match="NIGHTRANK_HASH_KEY_k1 is not set") as unset:
        fall_back(place, config.data, levels, WHO, "complaints")
    assert not any("user-003" in str(one.value) for one in (missing, none, unset))


def test_a_held_segment_is_told_as_it_is_typed() -> None:
    held = HeldSegment(columns=("market", "device"), name="north | tv", reason="r", by="b", since="s")
    assert held.told == "market=north device=tv"
