"""Who says what in both exams: zero steps and jointly trained bases by the network alone and by the slow ladder."""

import numpy as np
import pytest
import torch

from tasks.learning.adapters import AdapterConfig, Precisions
from tasks.learning.bank import fill_bank
from tasks.learning.base import Base
from tasks.learning.baselines import Baselines, BaselinesConfig
from tasks.learning.exams import (
    CANDIDATE,
    JOINT,
    SUPPORTS,
    ZERO_STEPS,
    Night,
    column,
    contact,
    sit,
    sit_contact,
    sit_nightly,
)
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material
from tasks.learning.networks import Ranker
from tests.learning.reptile_loop import stirred
from tests.learning.slow_ladder import SlowLadder
from tests.learning.small_rows import FIRST, LADDER, contract, ladder_of, opposed, shape
from tests.learning.test_baselines import KINDS
from tests.learning.test_outer import STILL
from tests.learning.test_training import day

NIGHT = 3


@pytest.fixture(scope="module")
def examined():
    """A night, a base whose layers all say something, its bank, and what everybody says of the night."""
    rows, adapter = opposed(nights=NIGHT + 1, users=20, each=8), AdapterConfig(precision=2.0, coarse_precision=9.0)
    torch.manual_seed(0)
    network = stirred(Ranker(shape(rows, *KINDS), STILL)).eval()
    base = Base(network, Precisions(2, 2, network.width, adapter), LADDER, adapter, day(NIGHT - 1))
    ladder, material = Ladder(rows, ladder_of(), "shopper"), Material(rows)
    night = Night.among(contract(*KINDS), ladder, material, FIRST + NIGHT)
    scorer = material.scorer(network)
    with torch.no_grad():
        bank = fill_bank(ladder, material, scorer, base.table(), base.adaptation, FIRST + NIGHT)
        logits, features = (part.numpy() for part in scorer(np.arange(len(rows))))
    rivals = Baselines(BaselinesConfig(), ladder, material, KINDS, FIRST + NIGHT)
    slow = SlowLadder(rows, ladder_of(), logits, features, base.table().numpy(), KINDS)
    return night, base, bank, sit(night, base, bank, rivals), slow


def said(predictions, condition, method):
    return np.stack([predictions[column(condition, method, name)] for name in ("aim0", "aim1")], axis=1)


def answers(scores):
    return np.stack([1 / (1 + np.exp(-scores[:, 0])), scores[:, 1]], axis=1)


def query(night, support):
    """Which of the night's rows are query behind so many rows of each visit."""
    lengths = night.visits.rows.lengths
    return np.concatenate([np.arange(length) for length in lengths]) >= support


def test_zero_steps_are_the_network_alone_in_both_exams(examined):
    night, _, _, predictions, slow = examined
    expected = answers(slow.logits[night.at])
    np.testing.assert_allclose(said(predictions, "nightly", ZERO_STEPS), expected, rtol=1e-6)
    for support in SUPPORTS[:2]:
        told, asked = said(predictions, contact(support), ZERO_STEPS), query(night, support)
        np.testing.assert_allclose(told[asked], expected[asked], rtol=1e-6)
        assert np.isnan(told[~asked]).all()
    assert np.abs(said(predictions, "nightly", CANDIDATE) - expected).max() > 0.05


def test_a_jointly_trained_base_is_asked_with_its_adapters_solved_afterwards(examined):
    """Both exams as `tasks.joint` sits them, against one visit at a time."""
    night, base, bank, _, slow = examined
    told = sit_nightly(night, base, bank, JOINT) | sit_contact(night, base, JOINT)
    rows = night.ladder.rows
    nightly, asked = np.zeros((len(night.at), 2)), query(night, 5)
    behind = np.full((len(night.at), 2), np.nan)
    for place, row in enumerate(night.at):
        nightly[place] = slow.logits[row] + slow.serving(row, FIRST + NIGHT) @ slow.features[row]
    visits = night.visits
    for number, start in enumerate(visits.rows.start):
        border = min(start + 5, visits.rows.stop[number])
        weights, _ = slow.visit(visits.first[number], start, border, FIRST + NIGHT)
        for row in range(border, visits.rows.stop[number]):
            behind[np.flatnonzero(night.at == row)[0]] = slow.logits[row] + weights @ slow.features[row]
    np.testing.assert_allclose(said(told, "nightly", JOINT), answers(nightly), atol=2e-5)
    np.testing.assert_allclose(said(told, contact(5), JOINT)[asked], answers(behind)[asked], atol=2e-5)
    assert len(np.unique(rows.user[night.at])) > 5


def test_every_baseline_is_asked_about_the_rows_of_each_exam(examined):
    night, _, _, predictions, _ = examined
    rivals = Baselines(BaselinesConfig(), night.ladder, night.material, KINDS, FIRST + NIGHT)
    for condition, support in (("nightly", 0), (contact(0), 0), (contact(5), 5)):
        for name, (at, values) in rivals.score(night.visits, np.full(len(night.visits), support)).items():
            told = said(predictions, condition, name)
            assert np.isfinite(told).all(axis=1).tolist() == np.isin(night.at, at).tolist()
            np.testing.assert_array_equal(told[np.isin(night.at, at)], values.numpy())
