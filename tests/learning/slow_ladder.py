"""The ladder, one visit at a time in plain Python: which rows support what, and the weights that follow."""

import numpy as np
import torch

from tasks.data.columns import Rows
from tasks.data.contract import SegmentsConfig
from tests.learning.small_rows import table

KINDS = ("binary", "rating")
THREE = (("shopper",), ("market", "region"), ("market",))
CROSSED = (("shopper",), ("region",), ("market",))
"""A region lies in several markets, so that its parent is a question."""


def world(seed, levels=THREE, count=90):
    """Random rows: users change market, some ids are unknown, some labels are missing, weights differ."""
    random = np.random.default_rng(seed)
    labels = np.stack([random.random(count) < 0.5, random.normal(size=count)], axis=1).astype(np.float32)
    labels[random.random((count, 2)) < 0.1] = np.nan
    return table(
        random.integers(1, 8, count), random.integers(0, 5, count), labels=labels, levels=levels,
        market=random.integers(0, 3, count), region=random.integers(0, 4, count),
        weights=random.uniform(0.5, 2.0, count),
    )  # fmt: skip


def precisions_of(levels, kinds=2, width=3, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).uniform(0.5, 4.0, (levels, kinds, width)))


class SlowLadder:
    """Recomputes everything from the columns of the rows.

    Args:
        rows: the table.
        segments: the ladder.
        logits: offsets [N, K] before adaptation.
        features: adapter features [N, D].
        precisions: [L, K, D], finest level first, the user's own in front.
        kinds: of the objectives.
        refused: (level, raw ids) of segments that may not leave their parent.
        steps: Newton steps of a solve.
    """

    def __init__(self, rows: Rows, segments: SegmentsConfig, logits, features, precisions, kinds, refused=(),
                 steps=2):  # fmt: skip
        self.rows, self.segments, self.kinds, self.refused, self.steps = rows, segments, kinds, set(refused), steps
        self.logits, self.features, self.precisions = (np.asarray(a) for a in (logits, features, precisions))
        columns = {"shopper": rows.user, "market": rows.request_ids[:, 0], "region": rows.request_ids[:, 1]}
        self.ids = [
            [tuple(int(columns[name][at]) for name in level) for at in range(len(rows))] for level in segments.levels
        ]

    def earlier(self, level: int, row: int, night: int) -> list[int]:
        """Newest rows of a row's segment before a night, oldest first."""
        mine = [r for r in range(len(self.rows)) if self.ids[level][r] == self.ids[level][row]]
        mine = [r for r in mine if self.rows.night[r] < night]
        return sorted(mine, key=lambda r: (self.rows.time[r], self.rows.tie[r]))[-self.segments.max_support :]

    def ridge(self, support: list[int], inherited, level: int):
        """What the Newton steps add to the inherited weights [K, D]."""
        phi, weight = self.features[support], self.rows.weights[support].astype(np.float64)
        own = np.zeros_like(inherited)
        for k, kind in [pair for pair in enumerate(self.kinds) for _ in range(self.steps)]:
            score = self.logits[support, k] + phi @ (inherited[k] + own[k])
            label = self.rows.labels[support, k].astype(np.float64)
            chance = 1 / (1 + np.exp(-score))
            residual, curve = (label - chance, chance * (1 - chance)) if kind == "binary" else (label - score, 1.0)
            known = weight * ~np.isnan(label)
            hessian = phi.T @ (phi * (known * curve)[:, None]) + np.diag(self.precisions[level, k])
            slope = phi.T @ np.nan_to_num(known * residual) - self.precisions[level, k] * own[k]
            own[k] += np.linalg.solve(hessian, slope)
        return own

    def coarse(self, level: int, row: int, night: int, used: set[int]):
        """Weights of a row's segment at a level of the config; adds the rows that they come from to `used`."""
        if level == len(self.segments.levels):
            return np.zeros(self.precisions.shape[1:])
        support = self.earlier(level, row, night)
        weights = self.coarse(level + 1, support[-1] if support else row, night, used)
        key = self.ids[level][row]
        if min(key) > 0 and len(support) >= self.segments.min_support and (level, key) not in self.refused:
            used |= set(support)
            weights = weights + self.ridge(support, weights, level)
        return weights

    def visit(self, first: int, start: int, border: int, night: int):
        """Weights that serve a visit, and the rows that they come from.

        Args:
            first: the user's first row.
            start: the visit's first row.
            border: where its query begins.
            night: its night.
        """
        own = list(range(first, border))[-self.segments.max_support :]
        thin = len(own) < self.segments.min_support
        used: set[int] = set()
        weights = self.coarse(1, start if thin else border - 1, night, used)
        if not thin:
            used |= set(own)
            weights = weights + self.ridge(own, weights, 0)
        return weights, used

    def serving(self, row: int, night: int):
        """Weights that a bank of before a night has for a row."""
        support = self.earlier(0, row, night)
        own = min(self.ids[0][row]) > 0 and len(support) >= self.segments.min_support
        if own and (0, self.ids[0][row]) not in self.refused:
            weights = self.coarse(1, support[-1], night, set())
            return weights + self.ridge(support, weights, 0)
        return self.coarse(1, row, night, set())
