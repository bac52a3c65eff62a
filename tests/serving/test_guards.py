"""Guards: releases whose answers are no numbers, or the same for everything."""

import copy
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.clients.object_store import ObjectStore
from tasks.errors import ReleaseRefused
from tasks.release.golden import check_parity, make_golden, write_golden
from tasks.release.graphs import export
from tasks.release.pointer import promote
from tasks.release.publishing import publish_release
from tasks.serving.guards import ConstantWatch, constant, require_finite, require_variety
from tasks.serving.ranker import Ranker
from tests.releases import PIPELINE, Made, described_anew


def constant_release(made: Made, folder: Path) -> Made:
    """The release of a network that says the same of everything, exported for real: parity and digests fit."""
    shutil.copytree(made.folder, folder)
    network, tables = copy.deepcopy(made.network), copy.deepcopy(made.tables)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    for name in ("item", "user", "cohort_item"):
        getattr(tables.statistics, name)[:] = 0.0
    bank = np.zeros_like(made.bank)
    export(network, bank, tables, made.data, folder, lambda *_: made.graph)
    golden = make_golden(network, bank, tables, made.data, [one.inputs for one in made.golden])
    write_golden(made.data, golden, folder)
    check_parity(made.data, tables, golden, folder)
    return replace(made, golden=golden, folder=folder, manifest=described_anew(made, folder))


def test_a_release_that_scores_everything_alike_is_refused_though_it_is_what_was_built(
    store: ObjectStore, tonight: Made, tomorrow: Made, tmp_path: Path
):
    bad = constant_release(tomorrow, tmp_path / "constant")
    assert np.ptp(bad.golden[-1].scores[..., 0]) == 0
    with Ranker(store, PIPELINE) as ranker:
        publish_release(store, PIPELINE, bad.folder, bad.manifest, {})
        promote(store, PIPELINE, bad.manifest.release, bad.manifest.night, token=1)
        assert not ranker.refresh()
        assert "its scores are constant" in (ranker.refusal or "")
        assert ranker.release == tonight.manifest.release


def judge(made: Made, inputs: dict[str, np.ndarray], scores: np.ndarray) -> None:
    require_variety(made.manifest, [(inputs, scores.shape[:2], scores)], [scores])


def test_candidates_that_are_the_same_may_score_the_same(tonight: Made):
    golden = tonight.golden[-1]
    flat = np.full_like(golden.scores, 0.3)
    with pytest.raises(ReleaseRefused, match="constant"):
        judge(tonight, dict(golden.inputs), flat)
    specs = tonight.manifest.interface.inputs
    twins = {
        spec.name: np.repeat(one[:, :1], one.shape[1], axis=1) if spec.per == "candidate" else one
        for spec in specs
        for one in [golden.inputs[spec.name]]
    }
    judge(tonight, twins, flat)
    one_differs = flat.copy()
    one_differs[3, 2, 0] = 0.4
    judge(tonight, dict(golden.inputs), one_differs)


def test_missing_numbers_on_both_sides_are_no_difference(tonight: Made):
    inputs = {spec.name: np.zeros((1, 2)) for spec in tonight.manifest.interface.inputs if spec.per == "candidate"}
    flat = np.full((1, 2, 1), 0.3, np.float32)
    judge(tonight, {**inputs, "year": np.array([[np.nan, np.nan]])}, flat)
    with pytest.raises(ReleaseRefused, match="1 golden requests have candidates that differ"):
        judge(tonight, {**inputs, "year": np.array([[np.nan, 3.0]])}, flat)


def test_constant_means_the_same_first_score_for_two_or_more():
    scores = np.array([[[0.5, 1], [0.5, 2]], [[0.5, 1], [0.5 + 1e-5, 1]], [[4e6, 1], [4e6 + 0.25, 1]]], np.float32)
    assert constant(scores).tolist() == [True, False, True]
    assert constant(scores[:, :1]).tolist() == []
    assert constant(scores[:0]).tolist() == []


def test_the_first_number_that_is_none_is_named(tonight: Made):
    scores = np.zeros((2, 3, 2), np.float32)
    require_finite(tonight.manifest, scores)
    scores[1, 2, 0] = np.inf
    with pytest.raises(ReleaseRefused, match="gives inf for request 1, candidate 2, objective 0"):
        require_finite(tonight.manifest, scores)


def asked(made: Made, users: Sequence[int], items: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Requests of users for candidates, everything else missing."""
    inputs, shape = {}, (len(users), len(items[0]))
    for spec in made.manifest.interface.inputs:
        axes = shape if spec.per == "candidate" else shape[:1]
        inputs[spec.name] = np.full(
            axes, np.nan if spec.missing is None else spec.missing, spec.dtype[:7].replace("string", "object")
        )
    return inputs | {"user": np.array([f"user {one}" for one in users], object), "item": np.array(items)}


def fill(watch: ConstantWatch, made: Made, numbers: range, *, flat: bool) -> None:
    """Answers to different users and lists, constant ones or not."""
    varied = np.arange(len(numbers) * 3, dtype=np.float32).reshape(-1, 3, 1)
    inputs = asked(made, numbers, [[one, one + 1, one + 2] for one in numbers])
    watch.add(made.manifest, inputs, np.full_like(varied, 0.5) if flat else varied)


def test_a_release_counts_as_broken_when_most_of_many_answers_are_constant(tonight: Made):
    watch = ConstantWatch()
    assert (watch.share, watch.broken) == (0.0, False)
    fill(watch, tonight, range(150), flat=True)
    assert (watch.share, watch.broken) == (1.0, False)  # of 150 nobody can tell
    fill(watch, tonight, range(150, 200), flat=True)
    assert watch.broken
    fill(watch, tonight, range(200), flat=False)
    assert (watch.share, watch.broken) == (0.5, False)
    fill(watch, tonight, range(200, 250), flat=True)
    assert watch.broken
    fill(watch, tonight, range(1000), flat=False)  # the window has moved on
    assert (watch.share, watch.broken) == (0.0, False)
    fill(watch, tonight, range(1000), flat=True)  # and what left it counts anew
    assert (watch.share, watch.broken) == (1.0, True)


def test_candidates_that_are_the_same_and_calls_that_come_again_are_no_proof(tonight: Made):
    flat = np.full((100, 2, 1), 0.5, np.float32)
    watch = ConstantWatch()
    watch.add(tonight.manifest, asked(tonight, range(100), [[7, 7]] * 100), flat)
    assert watch.share == 0.0
    for _ in range(3):
        watch.add(tonight.manifest, asked(tonight, [1] * 100, [[7, 8]] * 100), flat)
    fill(watch, tonight, range(1), flat=False)
    assert watch.share == 0.5  # once, of two


@pytest.mark.parametrize(("users", "lists"), [(9, 400), (400, 9)])
def test_constant_answers_to_few_users_or_about_few_lists_are_no_proof(tonight: Made, users: int, lists: int):
    watch = ConstantWatch()
    flat = np.full((400, 2, 1), 0.5, np.float32)
    numbers = range(400)
    watch.add(
        tonight.manifest, asked(tonight, [one % users for one in numbers], [[one % lists, -1] for one in numbers]), flat
    )
    assert (watch.share, watch.broken) == (1.0, False)
    one_more = asked(tonight, [1000], [[1000, -1]])
    watch.add(tonight.manifest, one_more, flat[:1])
    assert watch.broken


def test_without_a_key_the_rest_of_what_is_known_is_the_user(tonight: Made):
    flat = np.full((200, 2, 1), 0.5, np.float32)
    inputs = asked(tonight, range(200), [[one, -1] for one in range(200)])
    inputs["user"][:] = ""
    nobody, ages = ConstantWatch(), ConstantWatch()
    nobody.add(tonight.manifest, inputs, flat)
    assert not nobody.broken
    ages.add(tonight.manifest, inputs | {"age": np.arange(200, dtype=np.float32)}, flat)
    assert ages.broken


def test_what_another_release_does_not_tell_apart_either_does_not_count(tonight: Made):
    inputs = asked(tonight, range(4), [[one, one + 1] for one in range(4)])
    scores = np.array([[[0.5], [0.5]], [[0.5], [0.6]], [[0.5], [0.5]], [[0.5], [0.5]]], np.float32)
    watch, questions = ConstantWatch(), []

    def told_apart(which: np.ndarray) -> np.ndarray:
        questions.append(which.tolist())
        return np.array([True, False, False])[: which.sum()]

    watch.add(tonight.manifest, inputs, scores, told_apart)
    assert questions == [[True, False, True, True]]
    assert watch.share == 0.5
    watch.add(tonight.manifest, inputs, scores, told_apart)
    assert questions[1] == [False, False, True, True]  # what counts already is not asked again


def test_threads_may_add_at_the_same_time(tonight: Made):
    watch = ConstantWatch()
    parts = [range(start, start + 100) for start in range(0, 4000, 100)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda part: fill(watch, tonight, part, flat=True), parts))
    assert (watch.share, len(watch._recent), sum(watch._users.values())) == (1.0, 1000, 1000)


def test_probes_with_unknown_items_and_the_same_candidate_twice_raise_no_alarm(store: ObjectStore):
    probe = {"job": [None], "zone": [None], "age": [None], "member": [None], "genre": [["zz", "zz"]]}
    with Ranker(store, PIPELINE, device="cpu") as ranker:
        for number in range(250):
            call = probe | {"user": [f"p{number}"], "year": [[None, None]]}
            assert np.ptp(ranker.score(call | {"item": [[-1, -2]]})[..., 0]) == 0  # which is right of an unknown item
            ranker.score(call | {"item": [[1_000_003, 1_000_003]]})
        assert ranker.warnings == ()
