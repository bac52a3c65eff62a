"""Guards: releases whose answers are no numbers, or the same for everything."""

import copy
import shutil
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


def test_a_release_counts_as_broken_when_most_of_many_answers_are_constant():
    flat, varied = np.full((50, 3, 1), 0.5, np.float32), np.arange(150, dtype=np.float32).reshape(50, 3, 1)
    watch = ConstantWatch()
    assert (watch.share, watch.broken) == (0.0, False)
    for _ in range(3):
        watch.add(flat)
    assert (watch.share, watch.broken) == (1.0, False)  # of 150 nobody can tell
    watch.add(flat)
    assert watch.broken
    for _ in range(4):
        watch.add(varied)
    assert (watch.share, watch.broken) == (0.5, False)
    watch.add(flat)
    assert watch.broken
    for _ in range(20):
        watch.add(varied)  # the window has moved on
    assert (watch.share, watch.broken) == (0.0, False)
