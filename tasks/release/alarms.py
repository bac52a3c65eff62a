"""What an operator must hear by name: adaptation that does nothing or hurts, a base that forgets, lost segments, leaks.

An alarm stops nothing by itself; it stands in the night's last lines, in `run.json` and on top of the report.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tasks.learning.intervals import Interval
from tasks.learning.metrics import auc
from tasks.release.segment_gate import LevelHarm, benjamini_hochberg

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]

INERT_BELOW = 1e-6
"""Adapted predictions that differ from zero steps by no more than this on every row have not adapted."""
LEAKS_ABOVE = 0.95
"""No honest single input separates tonight's labels this well (AUC)."""
LEAK_CLASS_ROWS = 20
"""Rows of each class from which an AUC above `LEAKS_ABOVE` is no accident (about five standard deviations)."""
LEAK_VECTOR_ROWS = 20_000
"""Most rows of a night whose vectors are searched for a leak."""
NAMED = 5
"""How many segments a message names."""
FEW_ROWS = 0.01
"""Share of a level's exam rows up to which users whose own weights are proven to do harm are no alarm."""


@dataclass(frozen=True)
class Alarm:
    """One thing that somebody should look at."""

    name: Literal["inert", "harmful", "forgetting", "vanished", "leaking"]
    """What kind of thing."""
    message: str
    """The object, the value observed, the limit and the remedy."""


def inert(adapted: FloatArray, without: FloatArray, level: str | None = None, of: str = "") -> Alarm | None:
    """Adaptation that changes nothing.

    Args:
        adapted: [...] predictions with adapters.
        without: [...] predictions of the same rows by zero steps; for a level's own weights, by its parent's.
        level: whose weights they are; None for all adaptation.
        of: the objective, where there are several.

    >>> inert(np.array([0.5, 0.25]), np.array([0.5, 0.25])).name
    'inert'
    """
    if not adapted.size or (change := float(np.abs(adapted - without).max())) > INERT_BELOW:
        return None
    who, remedy = "adaptation", "look at segments.min_support and at the support sizes in the report"
    if level is not None:
        who = f"level {level}"
        remedy = "its weights cost memory for nothing: take it out of segments.levels, or look at its precision"
    return Alarm(
        "inert",
        f"{who} changes no prediction{_of(of)}: largest change {change:.1e} over {adapted.size:,} predictions, "
        f"expected above {INERT_BELOW:.0e}; {remedy}",
    )


def harmful(against_zero_steps: Mapping[str, Interval], rate: float) -> Sequence[Alarm]:
    """Adaptation that is shown to raise the loss of an objective.

    Args:
        against_zero_steps: by objective, loss adapted minus loss of zero steps.
        rate: of false discoveries, over all objectives (Benjamini and Hochberg).

    >>> [alarm.name for alarm in harmful({"liked": Interval(0.02, 0.01, 0.03, 50, 700)}, 0.1)]
    ['harmful']
    """
    shown = [vs.low > 0 for vs in against_zero_steps.values()]
    p = np.array([_chance(vs) for vs in against_zero_steps.values()])
    found = np.array(shown, bool) & benjamini_hochberg(p, rate)
    several = len(against_zero_steps) > 1
    return tuple(
        Alarm(
            "harmful",
            f"adaptation raises the loss{_of(name if several else '')}: {vs.estimate:+.4f} [{vs.low:+.4f}, "
            f"{vs.high:+.4f}] per row against zero steps over {vs.users:,} users, expected below zero; compare the "
            "nights in the report, and shrink the adapters harder",
        )
        for (name, vs), guilty in zip(against_zero_steps.items(), found, strict=True)
        if guilty
    )


def convicted(
    level: str, harm: LevelHarm, tested: Sequence[Mapping[str, Any]], rate: float, share: float | None = None
) -> Alarm | None:
    """Segments whose own weights are proven to do harm, and fall back to their parent's.

    Args:
        level: the ladder level's name.
        harm: what is proven about it.
        tested: rows of this level in `SegmentVerdicts.table`, the most suspect segments first.
        rate: of false discoveries that was allowed.
        share: of a level of single users, the share of its rows that the convicted ones have: among many users some
            are convicted on any night, so up to `FEW_ROWS` are no alarm. None for a level of markets or cohorts.

    >>> one = {"tested": "de", "harmful": True, "estimate": 0.04, "rows": 120}
    >>> print(convicted("market", LevelHarm(convicted=("de",)), [one], 0.1).message.split(";")[0])
    own weights of level market are proven to do harm: to 1 segment by itself, de (+0.0400 per row over 120 rows)
    """
    if not (harm.steps or (harm.convicted and (share is None or share > FEW_ROWS))):
        return None
    listed = [
        f"{one['tested']} ({one['estimate']:+.4f} per row over {one['rows']:,} rows)"
        for one in tested
        if one["harmful"]
    ]
    count, steps = len(harm.convicted), len(harm.steps)
    together, alone = listed[:steps], listed[steps : steps + NAMED]
    parts = [f"to all with {', '.join(together)}"] if together else []
    if count:
        parts.append(f"to {count:,} {'segment by itself' if count == 1 else 'by themselves'}, {', '.join(alone)}")
    return Alarm(
        "harmful",
        f"own weights of level {level} are proven to do harm: {' and '.join(parts)}; they fall back to their parent's, "
        f"for every objective (false discoveries are held to {rate:.0%} by gate.false_discovery); see what was "
        "tested in the report, and shrink the adapters harder if it stays so",
    )


def _chance(vs: Interval) -> float:
    """One-sided p value of a difference that is not above zero, from its interval by the normal distribution."""
    if not (np.isfinite(vs.low) and np.isfinite(vs.high)):
        return 1.0
    deviation = (vs.high - vs.low) / (2 * NormalDist().inv_cdf(0.975))
    return NormalDist().cdf(-vs.estimate / deviation) if deviation > 0 else float(vs.estimate <= 0)


def _of(objective: str) -> str:
    return f" of objective {objective}" if objective else ""


def forgetting(against_parent: Mapping[int, Interval], margin: float) -> Alarm | None:
    """A base that is shown to know less of golden nights than the one that it started from.

    Args:
        against_parent: by rows of support from the golden night itself, the base's loss minus its parent's.
        margin: how much more loss per row is let pass.

    >>> forgetting({0: Interval(0.02, 0.01, 0.03, 50, 700)}, 0.005).name
    'forgetting'
    """
    shown = {k: vs for k, vs in against_parent.items() if vs.low > margin}
    if not shown:
        return None
    k, vs = max(shown.items(), key=lambda one: one[1].low)
    return Alarm(
        "forgetting",
        f"the base knows less of golden nights than its parent's: {vs.estimate:+.4f} [{vs.low:+.4f}, {vs.high:+.4f}] "
        f"per row after {k} rows of support, over {vs.users:,} users and {vs.rows:,} rows, expected a lower bound of "
        f"at most {margin:g}; look at the report's golden nights, hold the chain with training.pull, lower "
        "training.learning_rate, or widen data.window_nights",
    )


def vanished(
    level: str, before: NDArray[Any], rows_before: NDArray[np.int64], tonight: NDArray[Any], min_rows: int
) -> Alarm | None:
    """Segments that had many rows in the previous exam and none tonight.

    Meant for markets, devices and cohorts; single users come and go, so their level is not asked about.

    Args:
        level: the ladder level's name.
        before: [P] distinct keys of the previous exam's segments, readable ones.
        rows_before: [P] their exam rows.
        tonight: [T] keys of tonight's segments.
        min_rows: rows from which a segment is missed.

    >>> vanished("market", np.array(["de", "fr"]), np.array([900, 3]), np.array(["it"]), 100).message[:61]
    'of 1 market segments with 100 rows or more in the previous ex'
    """
    large = rows_before >= min_rows
    lost = large & ~np.isin(before, tonight)
    if not lost.any():
        return None
    order = np.argsort(-rows_before[lost], kind="stable")[:NAMED]
    named = ", ".join(
        f"{key} ({rows:,} rows)"
        for key, rows in zip(before[lost][order].tolist(), rows_before[lost][order].tolist(), strict=True)
    )
    return Alarm(
        "vanished",
        f"of {int(large.sum()):,} {level} segments with {min_rows:,} rows or more in the previous exam, "
        f"{int(lost.sum()):,} have none tonight: {named}; ask upstream whether their logs are missing",
    )


def rates_by_category(labels: FloatArray, categories: NDArray[np.integer[Any]]) -> FloatArray:
    """What each row's category says about its label, learned from the other half of the rows.

    A category's mean label over every other row, and one row of the mean besides; so that a row never tells of itself,
    and a category that hardly comes twice says nothing.

    Args:
        labels: [N] 0 or 1, NaN where missing.
        categories: [N] ids from 0; unknown and missing values are a category too.

    >>> rates_by_category(np.array([1.0] * 50 + [0.0] * 50), np.repeat([7, 2], 50)).round(1)[[0, 99]].tolist()
    [1.0, 0.0]
    """
    # Drawn, for rows come in an order that may go with the labels: say, each positive with a negative behind it.
    known, half = ~np.isnan(labels), np.random.default_rng(0).permutation(len(labels)) % 2
    rates = np.full(len(labels), np.nan)
    for mine in (0, 1):
        fit, asked = known & (half != mine), half == mine
        if fit.any():
            counts = np.bincount(categories[fit], minlength=int(categories.max()) + 1)
            sums = np.bincount(categories[fit], weights=labels[fit], minlength=len(counts))
            rates[asked] = ((sums + labels[fit].mean()) / (counts + 1))[categories[asked]]
    return rates


def rates_by_values(labels: FloatArray, values: IntArray) -> FloatArray:
    """What the values of a row's list say about its label, [N]: the sum of their rates' log-odds over the mean's.

    Rates are taken as by `rates_by_category`; having no values is a value too. A sum, since one value that gives the
    outcome away must not drown among ten that do not.

    Args:
        labels: [N] 0 or 1, NaN where missing.
        values: [N, V] ids from 0, -1 behind a list's end.

    >>> tags = np.where(np.arange(100)[:, None] < 50, [[1, 2, -1]], [[2, 1, 3]])
    >>> told = rates_by_values(np.repeat([0.0, 1.0], 50), tags)
    >>> bool(told[:50].max() < told[50:].min())
    True
    """
    known, half = ~np.isnan(labels), np.random.default_rng(0).permutation(len(labels)) % 2
    told = np.full(len(labels), np.nan)
    nothing = np.where((values >= 0).any(axis=1), -1, values.max(initial=-1) + 1)
    values = np.concatenate([values, nothing[:, None]], axis=1)
    given, ids = values >= 0, np.maximum(values, 0)
    for mine in (0, 1):
        fit, asked = known & (half != mine), half == mine
        if fit.any():
            row, place = np.nonzero(given & fit[:, None])
            counts = np.bincount(ids[row, place], minlength=int(ids.max(initial=0)) + 1)
            sums = np.bincount(ids[row, place], weights=labels[row], minlength=len(counts))
            mean = labels[fit].mean()
            if 0 < mean < 1:
                rates = (sums + mean) / (counts + 1)
                odds = np.log(rates) - np.log1p(-rates) - np.log(mean) + np.log1p(-mean)
                told[asked] = np.where(given[asked], odds[ids[asked]], 0.0).sum(axis=1)
    return told


def rates_by_vector(labels: FloatArray, vectors: FloatArray) -> FloatArray:
    """How far a row's vector points to where labels are high, [N]: a ridge of one row's weight, NaN without a vector.

    Numbers are centred and scaled; each half of the rows is told by the other, as by `rates_by_category`.

    Args:
        labels: [N] 0 or 1, NaN where missing.
        vectors: [N, L], NaN where missing.

    >>> labels = np.repeat([0.0, 1.0], 50)
    >>> told = rates_by_vector(labels, np.stack([np.arange(100) % 7, 3 - labels], axis=1))
    >>> bool(told[:50].max() < told[50:].min())
    True
    """
    told, half = np.full(len(labels), np.nan), np.random.default_rng(0).permutation(len(labels)) % 2
    given = ~np.isnan(vectors).any(axis=1)
    for mine in (0, 1):
        fit, asked = given & ~np.isnan(labels) & (half != mine), given & (half == mine)
        if fit.any() and asked.any():
            inputs, mean = vectors[fit].astype(np.float64), vectors[fit].mean(axis=0, dtype=np.float64)
            inputs = (inputs - mean) / (scale := np.maximum(inputs.std(axis=0), 1e-6))
            slopes = inputs.T @ (labels[fit] - labels[fit].mean())
            weights = np.linalg.solve(inputs.T @ inputs + np.eye(len(mean)), slopes)
            told[asked] = (vectors[asked] - mean) / scale @ weights
    return told


def halves(labels: FloatArray) -> FloatArray:
    """Labels of a rating as 0 and 1: above their mean or not, [N]; NaN where missing.

    >>> halves(np.array([1.0, 2.0, 6.0, np.nan]))
    array([ 0.,  0.,  1., nan])
    """
    known = ~np.isnan(labels)
    if not known.any():
        return labels
    return np.where(known, labels > labels[known].mean(), np.nan)


def leaking(labels: FloatArray, inputs: Mapping[str, FloatArray], of: str = "") -> Sequence[Alarm]:
    """Inputs that by themselves tell tonight's labels.

    A high or a low AUC is a leak alike; a missing value ranks lowest, for being missing may be the leak.

    Args:
        labels: [N] 0 or 1, NaN where missing.
        inputs: by name, [N] a statistic, a numeric input or what `rates_by_category`, `rates_by_values` and
            `rates_by_vector` make of the others, NaN where missing.
        of: the objective, where there are several.

    >>> labels = np.repeat([0.0, 1.0], 50)
    >>> [alarm.message[:32] for alarm in leaking(labels, {"honest": np.tile([1.0, 2.0], 50), "copy": -labels})]
    ["input 'copy' alone tells tonight"]
    """
    known = ~np.isnan(labels)
    positives = int((labels[known] > 0).sum())
    if min(positives, int(known.sum()) - positives) < LEAK_CLASS_ROWS:
        return ()
    lowest = np.finfo(np.float64).min
    told = {name: auc(labels, np.nan_to_num(values.astype(np.float64), nan=lowest)) for name, values in inputs.items()}
    return tuple(
        Alarm(
            "leaking",
            f"input {name!r} alone tells tonight's labels{_of(of)} apart with AUC {area:.3f} over "
            f"{int(known.sum()):,} rows, expected between {1 - LEAKS_ABOVE:.2f} and {LEAKS_ABOVE:.2f}; "
            "check that it is known before the outcome",
        )
        for name, area in told.items()
        if not 1 - LEAKS_ABOVE <= area <= LEAKS_ABOVE
    )
