"""First contact through requests with feedback, against the exam that adapts on the same rows."""

from dataclasses import replace

import numpy as np
import torch

from tasks.data.statistics import StatisticsTables
from tasks.learning.adapters import AdapterConfig, Precisions
from tasks.learning.bank import fill_bank
from tasks.learning.base import Base
from tasks.learning.exams import CANDIDATE, SUPPORTS, Night, contact, sit_contact, sit_nightly
from tasks.learning.feedback_exam import FEEDBACK, NIGHTLY_BANK, sit_feedback
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material
from tasks.learning.networks import Ranker
from tests.learning.reptile_loop import stirred
from tests.learning.small_rows import FIRST, LADDER, contract, ladder_of, opposed, shape
from tests.learning.test_baselines import KINDS
from tests.learning.test_exams import NIGHT, query, said
from tests.learning.test_outer import STILL
from tests.learning.test_training import day


def test_it_is_the_exam_of_the_same_rows_where_all_else_is_equal():
    """Statistics that are the items' alone, so that those of the night are those of any other."""
    rows = opposed(nights=NIGHT + 1, users=20, each=8)
    width = rows.statistics.shape[1]
    of_items = np.random.default_rng(0).normal(size=(int(rows.item.max()) + 1, width)).astype(np.float32)
    rows = replace(rows, statistics=of_items[rows.item])
    nobody = np.zeros((int(rows.user.max()) + 1, 0), np.float32)
    keys = np.zeros(0, np.int64)
    statistics = StatisticsTables(rows.statistics_names, of_items[0], of_items, nobody, (), (), keys, nobody)
    adapter = AdapterConfig(precision=2.0, coarse_precision=9.0)
    torch.manual_seed(0)
    network = stirred(Ranker(shape(rows, *KINDS), STILL)).eval()
    base = Base(network, Precisions(2, 2, network.width, adapter), LADDER, adapter, day(NIGHT - 1))
    ladder, material = Ladder(rows, ladder_of(), "shopper"), Material(rows)
    night = Night.among(contract(*KINDS), ladder, material, FIRST + NIGHT)
    with torch.no_grad():
        bank = fill_bank(ladder, material, material.scorer(network), base.table(), base.adaptation, night.ordinal)
    told = sit_feedback(night, base, bank, statistics, ladder.segments.max_support)
    few = sit_feedback(night, base, bank, statistics, 2)
    expected = sit_contact(night, base, CANDIDATE) | sit_nightly(night, base, bank, CANDIDATE)
    for support in SUPPORTS[:2]:
        asked, condition = query(night, support), contact(support)
        found, nightly = said(told, condition, FEEDBACK), said(told, condition, NIGHTLY_BANK)
        assert np.isnan(found[~asked]).all()
        assert np.isnan(nightly[~asked]).all()
        np.testing.assert_allclose(found[asked], said(expected, condition, CANDIDATE)[asked], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(nightly[asked], said(expected, "nightly", CANDIDATE)[asked], rtol=1e-5, atol=1e-6)
        assert np.abs(said(few, condition, FEEDBACK) - found)[asked].max() > 0.01
    assert np.abs(said(told, contact(5), FEEDBACK) - said(told, contact(5), NIGHTLY_BANK))[query(night, 5)].max() > 0.01
