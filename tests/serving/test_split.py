"""Champion and challenger: who gets whom, and that a bad challenger costs nobody an answer."""

import logging
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from tasks.clients.object_store import ObjectStore
from tasks.errors import ReleaseRefused, RequestRejected
from tasks.release.manifest import Personal, manifest_key
from tasks.release.pointer import move, promote
from tasks.release.publishing import publish_release
from tasks.serving.answering import Contest
from tasks.serving.events import Events
from tasks.serving.metrics import Metrics
from tasks.serving.ranker import Ranker
from tasks.serving.runners import Whole
from tasks.serving.split import challenged, place
from tests.releases import PIPELINE, Made, make_release, shared_graph

ROOT = Path(__file__).parents[2]
SALT = "c0ffee"


def challenge(store: ObjectStore, release: str | None, share: int) -> None:
    move(store, PIPELINE, lambda now: replace(now, challenger=release, share=share), "a try", "challenger")


@pytest.fixture
def contest(store: ObjectStore, tomorrow: Made) -> ObjectStore:
    """Tonight's release is the champion, tomorrow's its challenger for half of the users."""
    publish_release(store, PIPELINE, tomorrow.folder, tomorrow.manifest, {})
    challenge(store, tomorrow.manifest.release, 5_000)
    return store


def theirs(made: Made, challenger: Made, share: int = 5_000) -> np.ndarray:
    users = made.golden[-2].inputs["user"].tolist()
    return challenged(users, "", challenger.manifest.release, share)


def expected(tonight: Made, tomorrow: Made, share: int = 5_000) -> np.ndarray:
    which = theirs(tonight, tomorrow, share)
    return np.where(which[:, None, None], tomorrow.golden[-2].scores, tonight.golden[-2].scores)


def another(inputs: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """The same requests of other users, the candidates in another order."""
    turned = {name: np.roll(one, number, axis=1) for name, one in inputs.items() if one.ndim == 2}
    return {**inputs, **turned, "user": np.array([f"{number} {one}" for one in range(len(inputs["user"]))], object)}


def test_shares_are_what_they_say_and_grow_by_those_who_join():
    users = [f"user {one}" for one in range(20_000)]
    small, large = (challenged(users, "", SALT, share) for share in (1_000, 3_000))
    for found, share in ((small, 0.1), (large, 0.3)):
        assert abs(found.mean() - share) < 4 * np.sqrt(share * (1 - share) / len(users))
    assert not (small & ~large).any()
    assert not challenged(users, "", SALT, 0).any()
    assert challenged(users, "", SALT, 10_000).all()


def test_another_salt_deals_anew():
    users = list(range(20_000))
    first, second = (challenged(users, -1, salt, 5_000) for salt in ("a", "b"))
    assert abs((first & second).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / len(users))


def test_a_user_has_his_place_in_every_process_and_strings_are_not_numbers():
    code = f"from tasks.serving.split import place; print([place(one, {SALT!r}) for one in ('ann', 'é', 7, '7', -1)])"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told.strip() == str([place(one, SALT) for one in ("ann", "é", 7, "7", -1)])
    assert place(7, SALT) != place("7", SALT)


def test_requests_without_a_user_are_the_champions():
    assert challenged(["", "ann"], "", SALT, 10_000).tolist() == [False, True]


def test_each_request_of_a_call_is_scored_by_its_users_release(contest: ObjectStore, tonight: Made, tomorrow: Made):
    golden = tonight.golden[-2]
    which = theirs(tonight, tomorrow)
    assert 0 < which.sum() < len(which)
    ids = [tomorrow.manifest.release if one else tonight.manifest.release for one in which]
    for batching in (False, True):
        with Ranker(contest, PIPELINE, batching=batching) as ranker:
            assert (ranker.release, ranker.challenger) == (tonight.manifest.release, tomorrow.manifest.release)
            answer = ranker.answer(golden.inputs)
            np.testing.assert_allclose(answer.scores, expected(tonight, tomorrow), rtol=1e-5, atol=1e-5)
            assert answer.releases == tuple(ids)
            alone = {name: values[:1] for name, values in golden.inputs.items()}
            assert ranker.answer(alone).releases == (ids[0],)
            assert ranker.warnings == ()


def test_the_share_follows_the_pointer_without_loading_anything_again(
    contest: ObjectStore, tonight: Made, tomorrow: Made
):
    registry, inputs = CollectorRegistry(), tonight.golden[-2].inputs
    with Ranker(contest, PIPELINE, events=Metrics(registry, PIPELINE)) as ranker:
        before = ranker._follower.serving()
        assert isinstance(before, Contest)
        for share in (10_000, 2_000, 0):
            challenge(contest, tomorrow.manifest.release, share)
            assert not ranker.refresh()  # the champion is the same
            np.testing.assert_allclose(
                ranker.score(inputs), expected(tonight, tomorrow, share), rtol=1e-5, atol=1e-5, err_msg=str(share)
            )
            now = ranker._follower.serving()
            assert now.release is before.release
            assert not isinstance(now, Contest) or now.challenger is before.challenger
        assert ranker.challenger is None
        challenge(contest, None, 0)
        assert not ranker.refresh()
        loaded = {"pipeline": PIPELINE, "role": "champion"}
        assert registry.get_sample_value("nightrank_swaps_total", loaded) == 1


def test_a_challenger_that_wins_is_promoted_and_serves_everybody(contest: ObjectStore, tonight: Made, tomorrow: Made):
    with Ranker(contest, PIPELINE) as ranker:
        promote(contest, PIPELINE, tomorrow.manifest.release, tomorrow.manifest.night, token=1)
        assert ranker.refresh()
        assert (ranker.release, ranker.challenger) == (tomorrow.manifest.release, None)
        np.testing.assert_allclose(
            ranker.score(tonight.golden[-2].inputs), tomorrow.golden[-2].scores, rtol=1e-5, atol=1e-5
        )


def test_a_challenger_that_is_refused_leaves_its_users_to_the_champion_and_says_so(
    contest: ObjectStore, tonight: Made, tomorrow: Made, caplog: pytest.LogCaptureFixture
):
    key, golden = manifest_key(PIPELINE, tomorrow.manifest.release), tonight.golden[-2]
    data = contest.get(key).data
    contest.delete(key)
    registry = CollectorRegistry()
    with Ranker(contest, PIPELINE, events=Metrics(registry, PIPELINE)) as ranker:
        np.testing.assert_allclose(ranker.score(golden.inputs), golden.scores, rtol=1e-5, atol=1e-5)
        assert (ranker.challenger, ranker.refusal) == (None, None)
        (warning,) = ranker.warnings
        assert "challenger" in warning
        assert "has no manifest" in warning
        assert warning in caplog.text
        assert registry.get_sample_value("nightrank_challenger_fallbacks_total", {"pipeline": PIPELINE}) == 1
        contest.put_if_absent(key, data)
        assert not ranker.refresh()
        assert (ranker.challenger, ranker.warnings) == (tomorrow.manifest.release, ())


def test_a_challenger_of_another_contract_is_refused(
    store: ObjectStore, tonight: Made, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
):
    lean = make_release(tmp_path / "lean", shared_graph(tmp_path_factory, "lean"), "lean")
    publish_release(store, PIPELINE, lean.folder, lean.manifest, {})
    challenge(store, lean.manifest.release, 5_000)
    with Ranker(store, PIPELINE) as ranker:
        assert "takes other inputs or has other objectives" in ranker.warnings[0]
        champion = ranker._follower.serving().release
        for change in (
            {"personal": Personal("other")},
            {"rows": 7},
        ):
            user, *others = champion.manifest.interface.inputs
            interface = replace(champion.manifest.interface, inputs=(replace(user, **change), *others))
            rival = replace(champion, manifest=replace(champion.manifest, interface=interface))
            with pytest.raises(ReleaseRefused, match="takes other inputs"):
                Contest(champion, rival, 5_000, Events(), None)
        golden = tonight.golden[-2]
        np.testing.assert_allclose(ranker.score(golden.inputs), golden.scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["no numbers", "raises", "constant"])
def test_a_challenger_that_goes_bad_has_lost_until_the_pointer_moves(
    contest: ObjectStore, tonight: Made, tomorrow: Made, monkeypatch: pytest.MonkeyPatch, how: str, caplog
):
    golden, registry = tonight.golden[-2], CollectorRegistry()
    run = Whole.run
    with Ranker(contest, PIPELINE, events=Metrics(registry, PIPELINE)) as ranker:
        state = ranker._follower.serving()
        assert isinstance(state, Contest)

        def bad(self: Whole, inputs):
            if self is not state.challenger.runner:
                return run(self, inputs)
            if how == "raises":
                raise RuntimeError("out of memory")
            return np.full_like(run(self, inputs), np.nan if how == "no numbers" else 0.5)

        monkeypatch.setattr(Whole, "run", bad)
        calls, counted = 0, [0]
        while ranker.challenger is not None:
            inputs = another(golden.inputs, calls)
            its = challenged(inputs["user"].tolist(), "", tomorrow.manifest.release, 5_000)
            counted.append(counted[-1] + int(its.sum()))
            calls += 1
            assert np.isfinite(ranker.score(inputs)).all()
            assert calls < 100
        if how == "constant":
            assert counted[-2] < 200 <= counted[-1]
        else:
            assert calls == 1  # of several of its users
        np.testing.assert_allclose(ranker.score(golden.inputs), golden.scores, rtol=1e-5, atol=1e-5)
        (warning,) = ranker.warnings
        assert "the champion answers the challenger's users" in warning
        assert {"no numbers": "gives nan", "raises": "out of memory", "constant": "the same score in 100%"}[
            how
        ] in warning
        assert not ranker.refresh()
        assert ranker.challenger is None  # the pointer has not moved
        monkeypatch.setattr(Whole, "run", run)
        challenge(contest, tomorrow.manifest.release, 5_001)
        ranker.refresh()
        assert (ranker.challenger, ranker.warnings) == (tomorrow.manifest.release, ())
    assert registry.get_sample_value("nightrank_challenger_fallbacks_total", {"pipeline": PIPELINE}) == 1


def test_one_user_loses_no_challenger_and_two_do(
    contest: ObjectStore, tonight: Made, tomorrow: Made, monkeypatch: pytest.MonkeyPatch
):
    golden, run, harmed = tonight.golden[-2], Whole.run, set()
    first, second = [at for at, one in enumerate(theirs(tonight, tomorrow)) if one][:2]
    users = golden.inputs["user"].tolist()
    assert users[first] != users[second]
    one = {name: values[first : first + 1] for name, values in golden.inputs.items()}
    with Ranker(contest, PIPELINE) as ranker:
        state = ranker._follower.serving()
        assert isinstance(state, Contest)

        def bad(self: Whole, inputs):
            if self is state.challenger.runner and harmed & set(inputs["user"].tolist()):
                raise RuntimeError("out of memory")
            return run(self, inputs)

        monkeypatch.setattr(Whole, "run", bad)
        harmed.add(users[first])
        for _ in range(5):
            answer = ranker.answer(one)
            assert answer.releases == (tonight.manifest.release,)
            np.testing.assert_allclose(answer.scores, golden.scores[first : first + 1], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(ranker.score(golden.inputs), golden.scores, rtol=1e-5, atol=1e-5)
        assert (ranker.challenger, ranker.warnings) == (tomorrow.manifest.release, ())
        harmed.add(users[second])
        np.testing.assert_allclose(ranker.score(golden.inputs), golden.scores, rtol=1e-5, atol=1e-5)
        assert ranker.challenger is None
        assert "out of memory" in ranker.warnings[0]


def test_whom_a_challenger_failed_in_a_large_call_is_found_by_halves(
    contest: ObjectStore, tonight: Made, tomorrow: Made, monkeypatch: pytest.MonkeyPatch
):
    """Of 64 users one is failed: the call, both halves of what fails, and no more of him."""
    challenge(contest, tomorrow.manifest.release, 10_000)
    users = np.array([f"user {one}" for one in range(64)], object)
    inputs = {name: np.repeat(one[:1], 64, axis=0) for name, one in tonight.golden[-2].inputs.items()} | {"user": users}
    run, runs = Whole.run, []
    with Ranker(contest, PIPELINE) as ranker:
        state = ranker._follower.serving()
        assert isinstance(state, Contest)

        def bad(self: Whole, given):
            if self is state.challenger.runner:
                runs.append(len(given["user"]))
                if "user 41" in given["user"]:
                    raise RuntimeError("out of memory")
            return run(self, given)

        monkeypatch.setattr(Whole, "run", bad)
        assert np.isfinite(ranker.score(inputs)).all()
        assert sorted(runs) == [1, 1, 2, 2, 4, 4, 8, 8, 16, 16, 32, 32, 64]
        assert state._failed_for == {"user 41"}
        assert np.isfinite(ranker.score(inputs)).all()
        assert runs[13:] == [64, 63]
        assert ranker.challenger == tomorrow.manifest.release


def test_requests_that_nobody_could_rank_end_no_challenger(contest: ObjectStore, tonight: Made, tomorrow: Made):
    """The same candidate twice, and items that neither release knows."""
    base = {"job": [None], "zone": [None], "age": [None], "member": [None], "year": [[None, None]]}
    challenge(contest, tomorrow.manifest.release, 10_000)
    with Ranker(contest, PIPELINE, device="cpu") as ranker:
        for number in range(250):
            call = base | {"user": [f"x{number}"], "genre": [["genre 1 é"] * 2]}
            ranker.score(call | {"item": [[1_000_003, 1_000_003]]})
            assert np.ptp(ranker.score(call | {"item": [[-1 - number, -2000 - number]]})[..., 0]) == 0
        assert (ranker.challenger, ranker.warnings) == (tomorrow.manifest.release, ())


def test_a_challenger_with_other_bounds_of_its_labels_may_serve(contest: ObjectStore):
    with Ranker(contest, PIPELINE) as ranker:
        champion = ranker._follower.serving().release
        interface = champion.manifest.interface
        bounded = replace(interface.objectives[1], minimum=1.0, maximum=5.0)
        newer = replace(interface, objectives=(interface.objectives[0], bounded))
        rival = replace(champion, manifest=replace(champion.manifest, interface=newer))
        assert Contest(champion, rival, 5_000, Events(), None).challenger is rival
        unlike = replace(interface, objectives=(interface.objectives[0], replace(bounded, name="minutes")))
        other = replace(champion, manifest=replace(champion.manifest, interface=unlike))
        with pytest.raises(ReleaseRefused, match="has other objectives"):
            Contest(champion, other, 5_000, Events(), None)


def test_a_champion_that_ranks_nothing_is_told_and_serves_on(
    store: ObjectStore, tonight: Made, monkeypatch: pytest.MonkeyPatch
):
    golden, run = tonight.golden[-2], Whole.run
    with Ranker(store, PIPELINE) as ranker:
        monkeypatch.setattr(Whole, "run", lambda self, inputs: np.full_like(run(self, inputs), 0.5))
        for call in range(13):
            ranker.score(another(golden.inputs, call))
        assert "gave all candidates the same score in 100% of its last answers" in ranker.warnings[0]
        monkeypatch.setattr(Whole, "run", lambda self, inputs: np.full_like(run(self, inputs), np.nan))
        with pytest.raises(ReleaseRefused, match="gives nan"):
            ranker.score(golden.inputs)


def test_threads_see_one_state_or_the_other_while_shares_move(
    contest: ObjectStore, tonight: Made, tomorrow: Made, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.ERROR)
    inputs, shares = tonight.golden[-2].inputs, (5_000, 10_000, 1_000)
    allowed = [expected(tonight, tomorrow, share) for share in shares]
    stop, wrong, count = threading.Event(), [], [0]

    def ask(ranker: Ranker) -> None:
        while not stop.is_set():
            scores = ranker.score(inputs)
            count[0] += 1
            if min(float(np.abs(scores - one).max()) for one in allowed) > 1e-5:
                wrong.append(scores)

    with Ranker(contest, PIPELINE) as ranker:
        threads = [threading.Thread(target=ask, args=(ranker,)) for _ in range(2)]
        [thread.start() for thread in threads]
        for turn in range(12):
            challenge(contest, tomorrow.manifest.release, shares[turn % 3])
            ranker.refresh()
        stop.set()
        [thread.join() for thread in threads]
    assert not wrong
    assert count[0] > 0


def test_a_user_that_is_no_text_is_rejected_and_the_challenger_keeps_its_share(
    contest: ObjectStore, tonight: Made, tomorrow: Made
):
    with Ranker(contest, PIPELINE) as ranker:
        inputs = tonight.golden[-2].inputs
        for name in ("user", "job"):
            with pytest.raises(RequestRejected, match=f"'{name}' holds a string with half of a surrogate pair"):
                ranker.score({**inputs, name: ["\ud800"] * 16})
        np.testing.assert_allclose(ranker.score(inputs), expected(tonight, tomorrow), rtol=1e-5, atol=1e-5)
        assert ranker.warnings == ()
