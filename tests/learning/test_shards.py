"""Shards of a bank against one segment at a time in plain Python, one another, and what a bank may hold at once."""

import tracemalloc

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from tasks.learning import material, shards
from tasks.learning.adapters import Adaptation, AdapterConfig
from tasks.learning.bank import fill_bank
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material
from tasks.learning.shards import Shards, shard_size
from tests.learning.slow_ladder import CROSSED, KINDS, THREE, SlowLadder, precisions_of, world
from tests.learning.small_rows import FIRST, ladder_of, table, told

LIMITS = [{}, {"min_support": 4}, {"max_support": 3}, {"max_leaves": 3}, {"max_leaves": 5, "min_support": 2}]
SIZES = [1, 2, 5, 1000]


def filled(rows, segments, night, kind="ridge", harmful=None):
    config = AdapterConfig(kind=kind)
    precisions = precisions_of(len(segments.levels), rows.labels.shape[1], config.width(3))
    ladder, how = Ladder(rows, segments, "shopper"), Adaptation(KINDS[: rows.labels.shape[1]], config)
    return fill_bank(ladder, Material(rows), told(rows), precisions, how, FIRST + night, harmful)


def many(count):
    """So many users with three rows each, in one market of two."""
    user = np.repeat(np.arange(1, count + 1), 3)
    return table(user, np.zeros(len(user), int), market=user % 2 + 1)


@pytest.mark.parametrize("levels", [THREE, CROSSED])
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("seed", range(3))
def test_shards_of_any_size_are_the_segments_that_have_rows_before_the_night(seed, limits, levels):
    rows, segments, night = world(seed, levels), ladder_of(levels, **limits), FIRST + 3
    oracle = SlowLadder(rows, segments, [], [], [], KINDS)
    for at, level in enumerate(rows.levels):
        expected = {}
        for row in range(len(rows)):
            everybody = [r for r in range(len(rows)) if oracle.ids[at][r] == oracle.ids[at][row]]
            support, known = oracle.earlier(at, row, night), min(oracle.ids[at][row]) > 0
            count = sum(rows.night[r] < night for r in everybody)
            own = known and len(support) >= segments.min_support
            if support and (own or at > 0):
                parent = rows.levels[at + 1].segment[support[-1]] if at + 1 < len(rows.levels) else -1
                expected[int(level.segment[row])] = (support if own else [], parent, count)
        if at == 0:
            best = sorted(expected, key=lambda one: (-expected[one][2], one))[: segments.max_leaves]
            expected = {one: expected[one] for one in sorted(best)}
        for size in SIZES:
            plan = Shards(rows, at, segments, night, size)
            found = {}
            for shard in plan:
                assert len(shard.segment) <= size
                for place, segment in enumerate(shard.segment.tolist()):
                    window = slice(shard.windows.start[place], shard.windows.stop[place])
                    found[segment] = (level.order[window].tolist(), shard.parent[place])
            assert found == {one: what[:2] for one, what in sorted(expected.items())}
            assert list(found) == sorted(expected)
            assert plan.own == sum(bool(support) for support, _ in found.values())


@pytest.mark.parametrize("kind", ["none", "bias", "ridge", "gradient", "matching"])
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("refused", [False, True])
def test_a_bank_of_many_shards_is_the_bank_of_one(monkeypatch, kind, limits, refused):
    rows, segments = world(1, CROSSED, 200), ladder_of(CROSSED, **limits)
    harmful = (lambda level, keys, support: keys % 3 == 0) if refused else None
    whole = filled(rows, segments, 4, kind, harmful)
    for size in (1, 2, 3):
        monkeypatch.setattr(shards, "SHARD_SEGMENTS", size)
        cut = filled(rows, segments, 4, kind, harmful)
        np.testing.assert_allclose(cut.weights, whole.weights, atol=1e-6, rtol=0)
        for mine, theirs in zip(cut.levels, whole.levels, strict=True):
            for name, values in vars(theirs).items():
                np.testing.assert_array_equal(getattr(mine, name), values)


class Largest(TorchFunctionMode):
    """Remembers how many numbers the largest tensor has that torch was asked for, those of `bank` left out."""

    def __init__(self, bank):
        super().__init__()
        self.bank, self.numbers = bank, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(one, torch.Tensor) and one.numel() != self.bank:
                self.numbers = max(self.numbers, one.numel())
        return made


def test_no_tensor_grows_with_the_segments_but_the_bank(monkeypatch):
    """And no call of the solver sees more segments, or padded rows, than a shard and a batch have."""
    monkeypatch.setattr(shards, "SHARD_SEGMENTS", 32)
    monkeypatch.setattr(material, "PADDED_ROWS", 64)
    seen = []

    def spy(self, features, *rows):
        seen.append(features.shape[:2])
        return solve(self, features, *rows)

    solve = Adaptation.solve
    monkeypatch.setattr(Adaptation, "solve", spy)
    largest = []
    for count in (100, 400):
        rows = many(count)
        with Largest(bank=(count + 3) * 3) as mode:  # two markets, and the base
            bank = filled(rows, ladder_of(max_support=8), 1)
        assert bank.weights.shape == (count + 3, 1, 3)
        largest.append(mode.numbers)
    assert largest[0] == largest[1]
    assert sum(segments for segments, _ in seen) == 500 + 2 * 2
    assert max(segments for segments, _ in seen) <= 32
    assert max(segments * longest for segments, longest in seen) <= 64


def test_what_is_planned_at_a_time_does_not_grow_with_the_segments(monkeypatch):
    """By the most bytes of arrays that there are at once: the bank's four numbers a segment, and little else."""
    monkeypatch.setattr(shards, "SHARD_SEGMENTS", 64)
    monkeypatch.setattr(material, "PADDED_ROWS", 256)
    peaks = []
    for count in (500, 5000):
        rows = many(count)
        base = told(rows), precisions_of(2, 1), Adaptation(("binary",), AdapterConfig()), FIRST + 1
        ladder = Ladder(rows, ladder_of(), "shopper")
        fill_bank(ladder, Material(rows), *base)  # what is loaded or kept on first use
        tracemalloc.start()
        try:
            bank = fill_bank(ladder, Material(rows), *base)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert len(bank.levels[0].keys) == count
    assert (peaks[1] - peaks[0]) / 4500 < 4 * 8 + 8


def test_shards_are_bounded_by_segments_and_by_their_numbers(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_SEGMENTS", 10)
    monkeypatch.setattr(shards, "SHARD_NUMBERS", 60)
    assert [shard_size(numbers) for numbers in (0, 1, 6, 7, 60, 61)] == [10, 10, 10, 8, 1, 1]
