"""Rows as the learning code reads them: batches of tensors by position, and half-open windows of positions.

Shapes: N rows, T positions, E windows, K objectives, D adapter features.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tasks.data.columns import Rows
from tasks.data.lists import NOTHING, spans
from tasks.learning.history import histories
from tasks.learning.networks import Ranker

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
HISTORY_NUMBERS = 1 << 24
"""About how many numbers of histories, as they attend, rows have beside them at a time where no gradient is wanted."""
PADDED_ROWS = 131_072
"""Most padded rows of segments handled in one batch when no gradient is wanted."""
FEW_ROWS = 1_024
"""Padded rows that are one batch whatever their lengths: a second batch would take longer than the padding."""
Scorer = Callable[[I64], tuple[Tensor, Tensor]]
"""Positions [T] to logits [T, K] and adapter features [T, D]: a network, or a baseline that plays its part."""


@dataclass(frozen=True)
class Windows:
    """Half-open ranges of positions, each [E].

    >>> Windows(np.array([3, 7]), np.array([5, 7])).flat()
    (array([3, 4]), array([0, 0]))
    """

    start: I64
    stop: I64

    def __len__(self) -> int:
        return len(self.start)

    @property
    def lengths(self) -> I64:
        """Rows of each window [E]."""
        return self.stop - self.start

    def flat(self) -> tuple[I64, I64]:
        """Every position of every window in order, and the number of its window: [T], [T]."""
        lengths = self.lengths
        window = np.repeat(np.arange(len(self), dtype=np.int64), lengths)
        before = np.cumsum(lengths) - lengths
        return np.arange(len(window), dtype=np.int64) - before[window] + self.start[window], window

    def take(self, chosen: I64) -> "Windows":
        """Some of the windows, by number."""
        return Windows(self.start[chosen], self.stop[chosen])


@dataclass(frozen=True)
class Visits:
    """A user's rows of one night, for every user and night; rows are sorted by (user, time).

    Attributes:
        rows: positions of the visit's rows [V].
        first: the user's first position of any night [V].
        night: the night's ordinal [V].
    """

    rows: Windows
    first: I64
    night: I64

    def __len__(self) -> int:
        return len(self.first)

    def take(self, chosen: I64) -> "Visits":
        """Some of the visits, by number."""
        return Visits(self.rows.take(chosen), self.first[chosen], self.night[chosen])

    def of_nights(self, first: int, last: int) -> "Visits":
        """The visits of nights `first` to `last` (ordinals, both included)."""
        return self.take(np.flatnonzero((self.night >= first) & (self.night <= last)))

    def split(self, after: I64) -> tuple[I64, Windows]:
        """Where support ends, and the later rows, when `after` [V] rows of the visit are support."""
        border = np.minimum(self.rows.start + after, self.rows.stop)
        return border, Windows(border, self.rows.stop)


def visits_of(rows: Rows) -> Visits:
    """All visits of a row table, in its order."""
    user, night = np.asarray(rows.user), np.asarray(rows.night)
    if len(user) == 0:
        nothing = np.zeros(0, np.int64)
        return Visits(Windows(nothing, nothing), nothing, nothing)
    new_user = np.r_[True, user[1:] != user[:-1]]
    start = np.flatnonzero(new_user | np.r_[True, night[1:] != night[:-1]])
    users = np.flatnonzero(new_user)
    first = users[np.searchsorted(users, start, side="right") - 1]
    return Visits(Windows(start, np.r_[start[1:], len(user)]), first, night[start].astype(np.int64))


@dataclass(frozen=True)
class Dialect:
    """What the ids of the rows' vocabularies are in another base's: one table [V + 1] per column, 0 where unknown.

    Attributes:
        request: of categorical request columns.
        candidate: of the item and the categorical candidate columns.
        request_values: of `multi` request columns.
        candidate_values: of `multi` candidate columns.
        request_places: places of each `multi` request column.
        candidate_places: of each candidate column.
    """

    request: tuple[I64, ...]
    candidate: tuple[I64, ...]
    request_values: tuple[I64, ...] = ()
    candidate_values: tuple[I64, ...] = ()
    request_places: tuple[int, ...] = ()
    candidate_places: tuple[int, ...] = ()


def _translated(ids: Tensor, tables: tuple[I64, ...]) -> Tensor:
    columns = [torch.from_numpy(table).to(ids.device)[ids[..., at]] for at, table in enumerate(tables)]
    return torch.stack(columns, dim=-1) if columns else ids


def _translated_values(ids: Tensor, tables: tuple[I64, ...], places: tuple[int, ...]) -> Tensor:
    found = ids.clone()
    for place, table in zip(spans(places), tables, strict=True):
        own = ids[..., place]
        known = torch.from_numpy(table).to(ids.device)[own.clamp_min(0)]
        found[..., place] = torch.where(own < 0, own, known)
    return found


class Material:
    """Reads batches of rows to a device.

    Args:
        rows: the table; memory-mapped arrays are read batch by batch.
        device: where the tensors go.
        dialect: ids of another base's vocabularies, where that base is to read these rows.
    """

    def __init__(self, rows: Rows, device: str = "cpu", dialect: "Dialect | None" = None) -> None:
        self.rows, self.device, self.dialect = rows, device, dialect

    @property
    def width(self) -> int:
        """Numbers of a row's inputs."""
        rows = self.rows
        plain = (rows.request_ids, rows.candidate_ids, rows.request_numbers, rows.candidate_numbers, rows.statistics)
        lists = (rows.request_values, rows.candidate_values, rows.request_vectors, rows.candidate_vectors)
        return sum(table.shape[1] for table in (*plain, *lists) if table is not None)

    def _tensor(self, table: npt.NDArray[np.generic], at: I64) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(table[at])).to(self.device)

    def inputs(self, at: I64, history: int = 0) -> tuple[Tensor, ...]:
        """What `Ranker.forward` takes, for positions [T]: of lists nothing where the rows have none at all.

        Args:
            at: the positions.
            history: entries of the user's history that the network reads.
        """
        return self.pairs(at, at, self.rows.statistics[at], history)

    def pairs(self, requests: I64, candidates: I64, statistics: F32, history: int = 0) -> tuple[Tensor, ...]:
        """What `Ranker.forward` takes for a request of one row and a candidate of another.

        Args:
            requests: positions of the rows that have the requests [T].
            candidates: positions of the rows that have the candidates [T].
            statistics: of the pairs, in model units [T, S].
            history: entries of the history of the rows that have the requests.
        """
        rows, dialect = self.rows, self.dialect
        request_ids, candidate_ids = (
            self._tensor(rows.request_ids, requests),
            self._tensor(rows.candidate_ids, candidates),
        )
        if dialect is not None:
            request_ids = _translated(request_ids, dialect.request)
            candidate_ids = _translated(candidate_ids, dialect.candidate)
        numbers = self._tensor(rows.request_numbers, requests), self._tensor(rows.candidate_numbers, candidates)
        told = torch.from_numpy(np.ascontiguousarray(statistics)).to(self.device)
        plain = (request_ids, candidate_ids, *numbers, told)
        lists = (rows.request_values, rows.candidate_values, rows.request_vectors, rows.candidate_vectors)
        if all(table is None for table in lists) and not history:
            return plain
        # Tensors for all of them: functions that are mapped over batches take no None.
        given = [
            numbers[0].new_zeros(len(at), 0) if table is None else self._tensor(table, at)
            for table, at in zip(lists, (requests, candidates, requests, candidates), strict=True)
        ]
        values = [ids.long() for ids in given[:2]]
        if dialect is not None:
            values = [
                _translated_values(values[0], dialect.request_values, dialect.request_places),
                _translated_values(values[1], dialect.candidate_values, dialect.candidate_places),
            ]
        return (*plain, *values, *given[2:], *(self.recent(requests, history) if history else ()))

    def recent(self, at: I64, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The users' recent rows before the visits that rows at positions [T] are of.

        Returns:
            Ids ``[G, H, Cc]``, labels of the first objective and gaps ``[G, H]``, and which of the G each position has
            ``[T]``, as `Ranker.forward` takes them.
        """
        found = histories(self.rows, self._visits.rows.start, self._visits.first, at, length)
        ids = self._tensor(self.rows.candidate_ids, found.at)
        if self.dialect is not None:
            ids = _translated(ids, self.dialect.candidate)
        labels = self._tensor(self.rows.labels[:, 0], found.at)
        gaps, row = (torch.from_numpy(part).to(self.device) for part in (found.gaps, found.row))
        absent = torch.from_numpy(found.at < 0).to(self.device)
        return ids.masked_fill(absent[..., None], NOTHING), labels.masked_fill(absent, float("nan")), gaps, row

    @cached_property
    def _visits(self) -> Visits:
        return visits_of(self.rows)

    def statistics(self, at: I64) -> Tensor:
        """As-of statistics [T, S]."""
        return self._tensor(self.rows.statistics, at)

    def labels(self, at: I64) -> Tensor:
        """Labels [T, K], NaN where missing."""
        return self._tensor(self.rows.labels, at)

    def weights(self, at: I64) -> Tensor:
        """Row weights [T]."""
        return self._tensor(self.rows.weights, at)

    def scorer(self, network: Ranker) -> Scorer:
        """The network as a function of positions; of many with histories, part by part where no gradient is wanted."""
        config, history = network.config, network.config.history
        tokens = history + 1
        most = max(1, HISTORY_NUMBERS // (tokens * (config.hidden + config.heads * tokens)))

        def score(at: I64) -> tuple[Tensor, Tensor]:
            if not history or len(at) <= most or torch.is_grad_enabled():
                return network(*self.inputs(at, history))  # type: ignore[no-any-return]
            answers = [network(*self.inputs(part, history)) for part in np.split(at, range(most, len(at), most))]
            logits, features = (torch.cat(parts) for parts in zip(*answers, strict=True))
            return logits, features

        return score


def remembered(scorer: Scorer, count: int, part: int = 65_536) -> Scorer:
    """A scorer that has asked another one for all positions below `count` already, and looks its answers up."""
    asked = [scorer(at.astype(np.int64)) for at in np.array_split(np.arange(count), max(1, -(-count // part)))]
    logits, features = (torch.cat(answers) for answers in zip(*asked, strict=True))

    def look_up(at: I64) -> tuple[Tensor, Tensor]:
        here = torch.from_numpy(at).to(logits.device)
        return logits[here], features[here]

    return look_up


def newest_of_each(item: I64, time: I64, tie: I64) -> I64:
    """Numbers of the rows that are the newest of their item, ascending by item; of equal times the greatest tie.

    Args:
        item: ids, not negative [N].
        time: of each row [N].
        tie: what decides between rows of one moment [N].

    >>> newest_of_each(np.array([7, 2, 7, 7]), np.array([5, 9, 8, 8]), np.array([0, 0, 4, 3])).tolist()
    [1, 2]
    """
    newest = np.full(int(item.max(initial=-1)) + 1, np.iinfo(np.int64).min)
    np.maximum.at(newest, item, time)
    last = np.flatnonzero(time == newest[item])
    last = last[np.lexsort((tie[last], item[last]))]
    found: I64 = last[np.searchsorted(item[last], np.unique(item[last]), side="right") - 1]
    return found


def batches(segments: I64, lengths: I64, unknowns: int, row: int = 1) -> list[I64]:
    """Cut segments, ascending by length, so that padded rows and systems of equations are bounded.

    Args:
        segments: their numbers.
        lengths: their support rows.
        unknowns: numbers solved per segment, K x D; a segment's system has D of them in each of its rows.
        row: what a padded row counts.
    """
    longest = int(lengths.max(initial=0))
    if 0 < len(segments) * max(row * longest, unknowns) <= min(FEW_ROWS, PADDED_ROWS):
        return [segments]
    # A batch that ends with a segment of length n holds at most PADDED_ROWS // n segments; cutting by the class of the
    # length (its power of two) keeps the loop over classes, and batches, never over segments.
    classes = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    cut: list[I64] = []
    for size in np.unique(classes):
        members = segments[classes == size]
        most = max(1, PADDED_ROWS // max(row << int(size), unknowns))
        cut += np.split(members, range(most, len(members), most))
    return cut


def reads(batches: Sequence[I64], lengths: I64) -> Iterator[list[I64]]:
    """Neighbouring batches whose rows are scored together, as long as there are few of them.

    Args:
        batches: numbers of segments.
        lengths: support rows of every segment.
    """
    together: list[I64] = []
    rows = 0
    for batch in batches:
        more = int(lengths[batch].sum())
        if together and rows + more > PADDED_ROWS:
            yield together
            together, rows = [], 0
        together.append(batch)
        rows += more
    if together:
        yield together
