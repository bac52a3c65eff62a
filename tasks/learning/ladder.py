"""The ladder at work: which rows support which segment, and the weights of every segment, coarsest level first.

A segment's solve starts from its parent's weights and the scores that they give, so thin support leaves it near its
parent. Solutions are cumulative: a segment's weights are its parent's and what it adds to them.

Shapes: E segments of a level, V visits, K objectives, D adapter features.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tasks.data.columns import Rows
from tasks.data.contract import SegmentsConfig
from tasks.data.segments import Level, split_keys
from tasks.learning.adapters import Adaptation
from tasks.learning.material import I64, Material, Scorer, Visits, Windows, batches, reads

STRIDE = np.int64(1) << np.int64(32)
"""Makes one ascending key of (segment, night): nights are ordinals below it."""


@dataclass(frozen=True)
class Stage:
    """The segments of one level that are to be solved.

    Attributes:
        level: the level's number in the table of precisions, 0 the finest.
        support: positions [T] that the windows index, or None for the table's own order.
        windows: each segment's support rows.
        parent: number of each segment's parent in the stage before, -1 for the base [E].
    """

    level: int
    support: I64 | None
    windows: Windows
    parent: I64

    @property
    def rows(self) -> I64:
        """Positions of all support rows, window by window."""
        return self.read(self.windows.flat()[0])

    def read(self, at: I64) -> I64:
        """Positions of support rows that windows name as `at`."""
        return at if self.support is None else self.support[at]


def learned_levels(segments: SegmentsConfig, user: str) -> tuple[tuple[str, ...], ...]:
    """Levels that have precisions: the config's, below the user's own, which the exam of first contact adapts."""
    return segments.levels if segments.levels[0] == (user,) else ((user,), *segments.levels)


class Ladder:
    """Plans supports over a row table.

    Args:
        rows: the table; every level's rows are looked at through its own order.
        segments: levels and their limits.
        user: name of the user column.
    """

    def __init__(self, rows: Rows, segments: SegmentsConfig, user: str) -> None:
        self.rows, self.segments = rows, segments
        self.personal = segments.levels[0] == (user,)
        self.coarse = rows.levels[1:] if self.personal else rows.levels

    @cached_property
    def _keys(self) -> list[I64]:
        """Of every coarse level, what its rows are found by: (segment, night), in its own order."""
        return [self._searchable(level) for level in self.coarse]

    @cached_property
    def _whole(self) -> list[npt.NDArray[np.bool_]]:
        """Which coarse segments have a known value in every column: the unknown share an id, but no taste."""
        return [
            np.asarray((split_keys(np.asarray(level.keys), level.radices) > 0).all(axis=1)) for level in self.coarse
        ]

    def _searchable(self, level: Level) -> I64:
        order = np.asarray(level.order)
        keys: I64 = np.asarray(level.segment)[order] * STRIDE + np.asarray(self.rows.night)[order]
        return keys

    def _before(self, at: int, segment: I64, night: I64) -> Windows:
        """Newest rows of coarse segments before nights; `at` counts coarse levels from the finest."""
        stop = np.searchsorted(self._keys[at], segment * STRIDE + night, side="left")
        start = np.maximum(np.asarray(self.coarse[at].offsets)[segment], stop - self.segments.max_support)
        return Windows(start, stop.astype(np.int64))

    def plan(self, visits: Visits, support_rows: I64) -> list[Stage]:
        """What serves each visit after its first `support_rows` rows: the user's weights over those of his segments.

        Coarser segments are supported by rows of earlier nights only, so that no user's night reaches another's. A
        visit's coarser segments are those of the user's newest support row, or of the visit's first row where the user
        has no weights of his own.

        Args:
            visits: whose rows are to be scored [V].
            support_rows: rows of the visit itself that are support [V].

        Returns:
            Stages from the coarsest level to the user's own, whose segments are the visits.
        """
        own = self.own_support(visits, support_rows)
        newest = np.where(own.lengths > 0, own.stop - 1, visits.rows.start)
        stages, serving = self._coarse_stages(newest, visits.night)
        return [*stages, Stage(0, None, own, serving)]

    def own_support(self, visits: Visits, support_rows: I64) -> Windows:
        """Rows that serve each visit's user after its first `support_rows` [V]; none where they are too few."""
        border, _ = visits.split(support_rows)
        start = np.maximum(visits.first, border - self.segments.max_support)
        thin = border - start < self.segments.min_support
        return Windows(np.where(thin, border, start), border)

    def _coarse_stages(self, row: I64, night: I64) -> tuple[list[Stage], I64]:
        """Stages of the coarser levels for the segments of given rows as of given nights, and who serves each."""
        passed: list[tuple[I64, Windows]] = []
        for at, level in enumerate(self.coarse):
            segment = np.asarray(level.segment)[row]
            windows = self._before(at, segment, night)
            passed.append((segment, windows))
            # The parent is that of the newest support row; without support, of the row itself.
            supported = windows.lengths > 0
            row = np.where(supported, np.asarray(level.order)[np.where(supported, windows.stop - 1, 0)], row)
        stages: list[Stage] = []
        serving = np.full(len(row), -1, np.int64)
        for at in reversed(range(len(self.coarse))):
            segment, windows = passed[at]
            _, pair = np.unique(segment * STRIDE + night, return_inverse=True)
            # Visits share a segment where they share all that stands behind it.
            _, one, serving_now = np.unique(
                pair * np.int64(len(row) + 1) + serving, return_index=True, return_inverse=True
            )
            whole = self._whole[at][segment[one]]
            mine = windows.take(one)
            usable = whole & (mine.lengths >= self.segments.min_support)
            support = Windows(np.where(usable, mine.start, mine.stop), mine.stop)
            stages.append(Stage(at + 1, np.asarray(self.coarse[at].order), support, serving[one]))
            serving = serving_now.astype(np.int64)
        return stages, serving


def climb(
    stages: Sequence[Stage],
    scorer: Scorer,
    material: Material,
    precisions: Tensor,
    adaptation: Adaptation,
) -> list[Tensor]:
    """Cumulative weights of every stage's segments.

    Args:
        stages: coarsest level first.
        scorer: logits and features of positions, before adaptation.
        material: labels and weights of positions.
        precisions: ``[L, K, D]``.
        adaptation: how to solve.

    Returns:
        One tensor ``[E, K, D]`` per stage. A segment without support has exactly its parent's weights.
    """
    solutions: list[Tensor] = []
    for stage in stages:
        inherited = inherit(stage, solutions, precisions)
        own = solved(stage, inherited, scorer, material, precisions[stage.level], adaptation)
        solutions.append(inherited + own)
    return solutions


@dataclass(frozen=True)
class Support:
    """Support rows of some segments of a stage, padded to the longest.

    Attributes:
        segments: numbers of the segments in their stage [B].
        features: ``[B, S, D]``.
        offsets: scores under the weights that the segments inherit ``[B, S, K]``.
        labels: ``[B, S, K]``, NaN where missing.
        weights: row weights ``[B, S]``, 0 for padding.
    """

    segments: I64
    features: Tensor
    offsets: Tensor
    labels: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Read:
    """Support rows of a few batches of a stage's segments: what they are under any weights.

    Attributes:
        batches: numbers of the segments in their stage, batch by batch.
        segment: number of each row's segment in the stage [T].
        cell: number of each row's segment among those of the batches, and its own in the segment: [T], [T].
        ends: where the rows of each of the segments end.
        longest: rows of the longest segment of each batch.
        logits: before adaptation ``[T, K]``.
        features: ``[T, D]``.
        labels: ``[T, K]``, NaN where missing.
        weights: row weights ``[T]``.
    """

    batches: list[I64]
    segment: I64
    cell: tuple[I64, I64]
    ends: I64
    longest: list[int]
    logits: Tensor
    features: Tensor
    labels: Tensor
    weights: Tensor

    def padded(self, inherited: Tensor, adaptation: Adaptation) -> Iterator[Support]:
        """The batches, with the scores under the weights ``[E, K, D]`` that the stage's segments start from."""
        offsets = adaptation.scores(self.logits, self.features, inherited, self.segment)
        parts = (adaptation.used(self.features, inherited), offsets, self.labels, self.weights)
        first = 0
        for batch, longest in zip(self.batches, self.longest, strict=True):
            here = slice(int(self.ends[first - 1]) if first else 0, int(self.ends[first + len(batch) - 1]))
            number, slot = (part[here] for part in self.cell)
            where = tuple(torch.from_numpy(part).to(offsets.device) for part in (number - first, slot))
            shape = (len(batch), longest)
            yield Support(
                batch, *(part.new_zeros(*shape, *part.shape[1:]).index_put(where, part[here]) for part in parts)
            )
            first += len(batch)


def read(stage: Stage, scorer: Scorer, material: Material, size: tuple[int, int]) -> Iterator[Read]:
    """The support of a stage's segments, a few batches at a time; segments without any are left out.

    Args:
        stage: the segments.
        scorer: logits and features of positions, before adaptation.
        material: labels and weights of positions.
        size: what a segment and a row of it count, from `Adaptation.size`.
    """
    lengths = stage.windows.lengths
    supported = np.flatnonzero(lengths > 0)
    # Segments of like size share a batch, so that little of it is padding.
    supported = supported[np.argsort(lengths[supported], kind="stable")]
    for together in reads(batches(supported, lengths[supported], *size), lengths):
        chosen = np.concatenate(together)
        windows = stage.windows.take(chosen)
        at, window = windows.flat()
        rows = stage.read(at)
        logits, features = scorer(rows)
        yield Read(
            *(together, chosen[window], (window, at - windows.start[window]), np.cumsum(windows.lengths)),
            *([int(lengths[batch[-1]]) for batch in together], logits, features),
            *(material.labels(rows), material.weights(rows)),
        )


def supports(
    stage: Stage, inherited: Tensor, scorer: Scorer, material: Material, adaptation: Adaptation
) -> Iterator[Support]:
    """The support of a stage's segments, batch by batch; segments without any are left out.

    Args:
        stage: the segments.
        inherited: weights that each starts from ``[E, K, D]``.
        scorer: logits and features of positions, before adaptation.
        material: labels and weights of positions.
        adaptation: what the weights mean.
    """
    for part in read(stage, scorer, material, adaptation.size(inherited)):
        yield from part.padded(inherited, adaptation)


def inherit(stage: Stage, above: Sequence[Tensor], precisions: Tensor) -> Tensor:
    """Weights ``[E, K, D]`` that a stage's segments start from: their parents', given the stages' before (`climb`)."""
    if not above:
        return precisions.new_zeros(len(stage.parent), *precisions.shape[1:])
    parent = torch.from_numpy(stage.parent).to(precisions.device)
    inherited: Tensor = above[-1][parent.clamp_min(0)] * (parent >= 0)[:, None, None]
    return inherited


def solved(
    stage: Stage,
    inherited: Tensor,
    scorer: Scorer,
    material: Material,
    precision: Tensor,
    adaptation: Adaptation,
) -> Tensor:
    """What a stage's segments add to the weights ``[E, K, D]`` that they inherit; arguments as for `climb`."""
    if inherited.numel() == 0:
        return torch.zeros_like(inherited)
    return own_weights(supports(stage, inherited, scorer, material, adaptation), inherited, precision, adaptation)


def own_weights(given: Iterable[Support], inherited: Tensor, precision: Tensor, adaptation: Adaptation) -> Tensor:
    """What segments add to the weights ``[E, K, D]`` that they inherit, from their support: 0 without any.

    Args:
        given: the support, under the inherited weights.
        inherited: ``[E, K, D]``.
        precision: ``[K, D]``.
        adaptation: how to solve.
    """
    own = torch.zeros_like(inherited)
    segments: list[I64] = []
    solutions: list[Tensor] = []
    for part in given:
        segments.append(part.segments)
        origin = inherited[torch.from_numpy(part.segments).to(own.device)]
        rows = (part.features, part.offsets, part.labels, part.weights)
        solutions.append(adaptation.solve(*rows, precision, origin))
    if not segments:
        return own
    return own.index_put((torch.from_numpy(np.concatenate(segments)).to(own.device),), torch.cat(solutions))
