"""Visits asked again and again under other precisions, against asking once for each."""

import numpy as np
import pytest
import torch

from tasks.learning import rehearsal
from tasks.learning.adapters import Adaptation, AdapterConfig
from tasks.learning.episodes import score_visits
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material, visits_of
from tasks.learning.rehearsal import Rehearsal
from tests.learning.slow_ladder import KINDS, THREE, precisions_of, world
from tests.learning.small_rows import ladder_of, told


def changes():
    """One choice of precisions after the other: a finer level, a coarser one, all, none, and the first again."""
    first = precisions_of(3)
    finer, coarser = first.clone(), first.clone()
    finer[0, :, 1] *= 4
    coarser[2] /= 4
    return [first, finer, coarser, coarser, precisions_of(3, seed=1), first]


@pytest.mark.parametrize("remembered", [rehearsal.REMEMBERED, 0])
@pytest.mark.parametrize("kind", ["ridge", "gradient", "bias"])
def test_every_answer_is_that_of_a_climb_of_its_own(monkeypatch, kind, remembered):
    monkeypatch.setattr(rehearsal, "REMEMBERED", remembered)
    rows = world(0)
    visits, adaptation = visits_of(rows), Adaptation(KINDS, AdapterConfig(kind=kind))
    after = np.random.default_rng(1).integers(0, visits.rows.lengths)
    ladder, scorer, material = Ladder(rows, ladder_of(THREE), "shopper"), told(rows), Material(rows)
    width = adaptation.config.width(3)
    asked = Rehearsal(ladder, visits, after, scorer, material, precisions_of(3)[..., :width], adaptation)
    for precisions in changes():
        chosen = precisions[..., :width]
        one = score_visits(ladder, visits, after, scorer, material, chosen, adaptation)
        again = asked.scores(chosen)
        assert np.array_equal(again.rows, one.rows)
        assert torch.equal(again.base, one.base)
        assert torch.equal(again.adapted, one.adapted)
        assert not torch.equal(one.adapted, one.base)


def test_a_level_is_solved_again_only_where_it_or_a_coarser_one_is_held_otherwise(monkeypatch):
    solved = []
    real = rehearsal.own_weights
    monkeypatch.setattr(
        rehearsal, "own_weights", lambda *asked: (solved.append(len(asked[1])) or real(*asked))
    )  # fmt: skip
    rows = world(2)
    visits, adaptation = visits_of(rows), Adaptation(KINDS, AdapterConfig())
    after = np.zeros(len(visits), np.int64)
    ladder = Ladder(rows, ladder_of(THREE), "shopper")
    asked = Rehearsal(ladder, visits, after, told(rows), Material(rows), precisions_of(3), adaptation)
    counts = []
    for precisions in changes():
        asked.scores(precisions)
        counts.append(len(solved))
        solved.clear()
    assert counts == [3, 1, 3, 0, 3, 3]
