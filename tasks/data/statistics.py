"""As-of statistics: smoothed rates and counts per item, per user and per cohort x item, from earlier nights only.

The features of a night are those of the merged states (`tasks.data.states`) of the nights before it, so no row ever
sees a label of its own night. The same sums, looked up by id, are what a release carries.

With ``s`` the sum and ``n`` the number of labels of an objective under a key, and ``a`` the strength:

    global      g    = (s + a * 0.5) / (n + a)     (a window may begin with a single row, which must not say 0 or 1)
                g    = s / n                       (of a rating; without labels the middle of its range)
    item        r_i  = (s_i + a * g) / (n_i + a)
    user        r_u  = (s_u + a * g) / (n_u + a)
    cohort item r_ci = (s_ci + a * r_i) / (n_ci + a)

The feature of a binary rate is ``logit(clip(r, 1e-4, 1 - 1e-4))``, of a rating ``r`` itself, of a count
``log(1 + rows)``. Row weights do not enter. A cohort with a missing value has no cohort x item statistic of its own.

Shapes: N rows, K objectives, P cohort x item pairs, S = 2 (K + 1) or, with a cohort, 3 (K + 1) features.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tasks.data.contract import DataConfig, StatisticsConfig
from tasks.data.segments import mixed_radix
from tasks.data.states import check_cohort, load_state
from tasks.data.vocabulary import Vocabularies

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
SMALLEST_RATE = 1e-4


def statistics_names(data: DataConfig, config: StatisticsConfig) -> tuple[str, ...]:
    """Names of the S features, in the order of the statistics vector: item, user, then cohort x item."""
    groups = ("item", "user", "cohort_item") if config.cohort else ("item", "user")
    rates = [objective.name for objective in data.objectives]
    return tuple(name for group in groups for name in (*(f"{group}_rate:{rate}" for rate in rates), f"{group}_count"))


@dataclass(frozen=True)
class StatisticsTables:
    """The statistics at the end of a night, as look-up tables by vocabulary id: what a release carries.

    Attributes:
        names: names of the S features.
        base: global rate of each objective in model units, float32 [K].
        item: features of each item, float32 [items + 1, K+1]; row 0 is what an unknown item gets.
        user: features of each user, float32 [users + 1, K+1]; row 0 is what an unknown user gets.
        cohort_columns: columns of the cohort; empty without cohort statistics.
        cohort_radices: vocabulary rows of the cohort columns, then of the item.
        cohort_item_keys: mixed-radix keys (cohort columns, then item), ascending, int64 [P].
        cohort_item: features of each pair, float32 [P + 1, K+1]. Pair ``p`` is in row ``p + 1``; row 0 is zeros and
            stands for a pair that was never seen: its count is 0 and its rates are those of the item's row.
    """

    names: tuple[str, ...]
    base: F32
    item: F32
    user: F32
    cohort_columns: tuple[str, ...]
    cohort_radices: tuple[int, ...]
    cohort_item_keys: I64
    cohort_item: F32

    def features(self, user: I64, item: I64, cohort: Sequence[I64] = ()) -> F32:
        """Statistics vectors [N, S] of user, item and cohort ids, each [N]: the oracle of the exported look-up."""
        parts = [self.item[item], self.user[user]]
        if self.cohort_columns:
            keys = mixed_radix([*cohort, item], self.cohort_radices, "statistics.cohort x item")
            pairs = _rows_of(keys, self.cohort_item_keys) + 1
            pair = self.cohort_item[pairs]
            pair[pairs == 0, :-1] = self.item[item[pairs == 0], :-1]
            parts.append(pair)
        return np.concatenate(parts, axis=1)


def _rows_of(keys: I64, known: I64) -> I64:
    """Positions of keys in the ascending `known`, -1 where absent."""
    if len(known) == 0:
        return np.full(len(keys), -1, np.int64)
    at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[at] == keys, at, -1).astype(np.int64, copy=False)


class RunningStatistics:
    """Sums per vocabulary id over the nights added so far; asks for features between two nights.

    Memory is proportional to the keys, not to rows or nights.
    """

    def __init__(self, data: DataConfig, config: StatisticsConfig, vocabularies: Vocabularies) -> None:
        """Start without any night.

        Raises:
            InvalidConfig: the cohort is not made of categorical request columns, or cohort x item keys overflow.
        """
        check_cohort(data, config)
        self._data, self._config, self._vocabularies = data, config, vocabularies
        self._width = 1 + 2 * len(data.objectives)  # rows, then labels per objective, then sums per objective
        self._global = np.zeros((1, self._width))
        self._item = np.zeros((vocabularies[data.item].rows, self._width))
        self._user = np.zeros((vocabularies[data.user].rows, self._width))
        self._pair_keys = np.zeros(0, np.int64)
        self._pair = np.zeros((0, self._width))
        self._radices = tuple(vocabularies[name].rows for name in (*config.cohort, data.item))
        if config.cohort:
            mixed_radix([np.zeros(0, np.int64)] * len(self._radices), self._radices, "statistics.cohort x item")

    def add(self, state: pa.Table) -> None:
        """Add one night's state (or a merged one).

        Raises:
            ValueError: the vocabularies lack a key of the state.
        """
        part, values = self._sums(state, "global")
        self._global += values
        # Keys are distinct within a state, so no addition is lost.
        part, values = self._sums(state, "item")
        self._item[self._ids(part, self._data.item)] += values
        part, values = self._sums(state, "user")
        self._user[self._ids(part, self._data.user)] += values
        if self._config.cohort:
            part, values = self._sums(state, "cohort_item")
            keys = self._pair_of([self._ids(part, name) for name in (*self._config.cohort, self._data.item)])
            fresh = np.sort(keys[_rows_of(keys, self._pair_keys) < 0])
            at = np.searchsorted(self._pair_keys, fresh)
            self._pair_keys = np.insert(self._pair_keys, at, fresh)
            self._pair = np.insert(self._pair, at, 0.0, axis=0)
            self._pair[_rows_of(keys, self._pair_keys)] += values

    def features(self, user: I64, item: I64, cohort: Sequence[I64] = ()) -> F32:
        """As-of statistics of rows from the nights added so far.

        Args:
            user: user ids [N].
            item: item ids [N].
            cohort: ids [N] of each cohort column, in the config's order.

        Returns:
            Features in model units, float32 [N, S].
        """
        item_rate = self._item_rates(item)
        user_sums = self._user[user]
        user_rate = _smoothed(user_sums, self._base(), self._config.user_strength)
        parts = [self._units(item_rate, self._item[item]), self._units(user_rate, user_sums)]
        if self._config.cohort:
            pairs = _rows_of(self._pair_of([*cohort, item]), self._pair_keys)
            found = np.flatnonzero(pairs >= 0)
            sums = np.zeros((len(item), self._width))
            sums[found] = self._pair[pairs[found]]
            rates = _smoothed(sums, item_rate, self._config.cohort_item_strength)
            parts.append(self._units(rates, sums))
        return np.concatenate(parts, axis=1)

    def tables(self) -> StatisticsTables:
        """The same numbers as look-up tables over all ids."""
        items = np.arange(len(self._item), dtype=np.int64)
        item_rate = self._item_rates(items)
        user_rate = _smoothed(self._user, self._base(), self._config.user_strength)
        cohort = np.zeros((0, len(self._data.objectives) + 1), np.float32)
        if self._config.cohort:
            pair_rate = _smoothed(
                self._pair, item_rate[self._pair_keys % self._radices[-1]], self._config.cohort_item_strength
            )
            missing = np.zeros((1, cohort.shape[1]), np.float32)
            cohort = np.concatenate([missing, self._units(pair_rate, self._pair)])
        return StatisticsTables(
            names=statistics_names(self._data, self._config),
            base=self._units(self._base(), self._global)[0, :-1],
            item=self._units(item_rate, self._item),
            user=self._units(user_rate, self._user),
            cohort_columns=self._config.cohort,
            cohort_radices=self._radices if self._config.cohort else (),
            cohort_item_keys=self._pair_keys,
            cohort_item=cohort,
        )

    def _sums(self, state: pa.Table, table: str) -> tuple[pa.Table, F64]:
        """One table's rows of a state and their sums [n, width]."""
        names = [objective.name for objective in self._data.objectives]
        columns = ["rows", *(f"labels:{name}" for name in names), *(f"sum:{name}" for name in names)]
        part = state.filter(pc.equal(state["table"], table))
        return part, np.stack([part[name].to_numpy().astype(np.float64) for name in columns], axis=1)

    def _ids(self, part: pa.Table, name: str) -> I64:
        ids = self._vocabularies[name].encode(part[f"key:{name}"])
        if lacking := int(np.count_nonzero(ids == 0)):
            raise ValueError(f"the vocabulary of {name!r} lacks {lacking} of the state's {len(ids)} keys: extend it")
        return ids

    def _pair_of(self, ids: Sequence[I64]) -> I64:
        return mixed_radix(ids, self._radices, "statistics.cohort x item")

    def _base(self) -> F64:
        """Global rates [1, K]."""
        count = len(self._data.objectives)
        labels, sums = self._global[:, 1 : 1 + count], self._global[:, 1 + count :]
        nothing = np.array([[_rate_without_history(self._data, position) for position in range(count)]])
        binary = np.array([objective.kind == "binary" for objective in self._data.objectives])
        strength = np.where(binary, self._config.item_strength, 0.0)
        return np.where(labels > 0, (sums + strength * nothing) / np.maximum(labels + strength, 1.0), nothing)

    def _item_rates(self, item: I64) -> F64:
        return _smoothed(self._item[item], self._base(), self._config.item_strength)

    def _units(self, rates: F64, sums: F64) -> F32:
        """Rates [N, K] and sums [N, width] to features [N, K+1] in model units."""
        features = np.empty((len(rates), rates.shape[1] + 1), np.float32)
        binary = np.array([objective.kind == "binary" for objective in self._data.objectives])
        clipped = np.clip(rates, SMALLEST_RATE, 1.0 - SMALLEST_RATE)
        features[:, :-1] = np.where(binary, np.log(clipped) - np.log1p(-clipped), rates)
        features[:, -1] = np.log1p(sums[:, 0])
        return features


def _smoothed(sums: F64, prior: F64, strength: float) -> F64:
    count = (sums.shape[1] - 1) // 2
    return (sums[:, 1 + count :] + strength * prior) / (sums[:, 1 : 1 + count] + strength)


def _rate_without_history(data: DataConfig, position: int) -> float:
    objective = data.objectives[position]
    column = data.column(objective.column)
    if objective.kind == "binary":
        return 0.5
    return 0.0 if column.minimum is None or column.maximum is None else (column.minimum + column.maximum) / 2


def serving_tables(
    data: DataConfig, config: StatisticsConfig, vocabularies: Vocabularies, states: Iterable[tuple[date, Path]]
) -> StatisticsTables:
    """The look-up tables after the given nights: what the features of rows on the night after them would be.

    Args:
        data: the contract.
        config: cohort and strengths.
        vocabularies: must know every key of the states.
        states: nights with their state files, in any order; read one at a time.

    Raises:
        ValueError: the vocabularies lack a key of a state.
        InvalidConfig: cohort x item keys overflow.
    """
    running = RunningStatistics(data, config, vocabularies)
    for _, path in sorted(states):
        running.add(load_state(path))
    return running.tables()
