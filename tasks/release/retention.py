"""What a base still knows of nights that its parent knew: golden nights, which stay the same along a chain of nights.

A base is trained on from its parent's, night after night. Such a chain can forget: it gets better on the newest nights
and worse on what it once knew (French, 1999, *Catastrophic forgetting in connectionist networks*). So both bases, each
adapted on the same support, are compared row by row on a few earlier nights. Both may have trained on those rows: the
figures say what is retained, never how good a base is, and the gate does not read them: a base that has learned old
rows by heart would win.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from math import isnan
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.data.contract import ObjectiveConfig
from tasks.learning.exams import PARENT, SUPPORTS, contact
from tasks.learning.intervals import Interval
from tasks.learning.material import I64, Visits
from tasks.release.evidence import compare
from tasks.release.gate import GoldenConfig

NIGHT = "night"
"""Column of the table of golden rows: the ordinal of a row's night."""


@dataclass(frozen=True)
class Chosen:
    """Golden nights to be compared, and those that were named and cannot be, with the reason."""

    nights: tuple[date, ...]
    left_out: Mapping[date, str]


def golden_nights(
    config: GoldenConfig, window: date, clean: Collection[date], through: date, before: Collection[date] = ()
) -> Chosen:
    """The golden nights of a window.

    Args:
        config: which.
        window: first day of the window.
        clean: clean nights of the history, all before the night that is trained for.
        through: last night that the parent's training has read.
        before: nights that were golden before; where none is named, a block keeps the one that it had, and a night that
            comes late does not take its place, nor another one that of a night that is gone.

    >>> nights = [date(2026, 3, day) for day in range(1, 29)]
    >>> [night.day for night in golden_nights(GoldenConfig(every=7), nights[0], nights, nights[20]).nights]
    [1, 8, 15]
    """
    if config.nights is None:
        first: dict[int, date] = {}
        for night in (*sorted(before), *sorted(clean)):
            block = night.toordinal() // config.every
            # A block that began before the window may have lost its first night: another one would take its place.
            if block * config.every >= window.toordinal():
                first.setdefault(block, night)
        asked = sorted(night for night in first.values() if night <= through)
        lost = {
            night: "it was compared before, and is no clean night any more" for night in asked if night not in clean
        }
        return Chosen(tuple(night for night in asked if night not in lost), lost)
    left_out: dict[date, str] = {}
    for night in sorted(set(config.nights)):
        if night not in clean:
            left_out[night] = "no clean night of the window"
        elif night > through:
            left_out[night] = f"the parent's training has read nights through {through} only"
    return Chosen(tuple(night for night in sorted(set(config.nights)) if night not in left_out), left_out)


def drawn(visits: Visits, tie: I64, rows: int, seed: int) -> Visits:
    """Of each night, visits in an order that only their rows and the seed decide, until they have so many rows.

    Args:
        visits: of any nights [V].
        tie: digest of each row of the table, which knows neither ids nor labels [N].
        rows: of each night; the last visit that is taken may go beyond it.
        seed: of the order.
    """
    lot = _mixed(tie[visits.rows.start], seed)
    order = np.lexsort((lot, visits.night))
    night, length = visits.night[order], visits.rows.lengths[order]
    before = np.cumsum(length) - length
    before -= before[np.searchsorted(night, night)]
    return visits.take(np.sort(order[before < rows]))


def _mixed(keys: I64, seed: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Keys [V] as random numbers (SplitMix64: Steele, Lea and Flood, 2014)."""
    shift = np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    mixed = keys.astype(np.uint64) + shift
    for right, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(right))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def retained(table: pa.Table, objective: ObjectiveConfig) -> dict[str, Any]:
    """Figures of golden rows, as JSON.

    Args:
        table: per row `user`, `at`, `night`, `label/<objective>`, and what candidate, parent and zero steps predicted
            in first contact, as columns of an exam table.
        objective: which.

    Returns:
        `pooled`: by support and method, the candidate's loss minus the method's, per row, over all golden nights.
        `nights`: of each, its rows, its users, and the same against the parent without any row of the night.
    """
    pooled = [
        {"k": k, "method": method, "interval": interval.as_json()}
        for k in SUPPORTS
        for method, (interval, _) in compare([table], contact(k), objective, seed=0).items()
    ]
    nights = []
    for ordinal in np.unique(table[NIGHT].to_numpy()).tolist():
        vs = compare([table.filter(pc.equal(table[NIGHT], ordinal))], contact(0), objective, seed=0)[PARENT][0]
        nights.append({"night": date.fromordinal(ordinal).isoformat(), "interval": vs.as_json()})
    return {"pooled": pooled, "nights": nights}


def against_parent(figures: Mapping[str, Any]) -> dict[int, Interval]:
    """By support, the candidate's loss minus its parent's, from what `retained` found; supports without rows are out.

    >>> one = {"k": 5, "method": "parent", "interval": Interval(0.1, 0.0, 0.2, 7, 70).as_json()}
    >>> against_parent({"pooled": [one, {**one, "method": "zero steps"}]})
    {5: Interval(estimate=0.1, low=0.0, high=0.2, users=7, rows=70)}
    """
    found = {one["k"]: Interval.from_json(one["interval"]) for one in figures["pooled"] if one["method"] == PARENT}
    return {k: interval for k, interval in found.items() if not isnan(interval.estimate)}


def in_words(figures: Mapping[str, Any], left_out: Sequence[tuple[str, str]]) -> str:
    """One line for a screen.

    >>> one = {"k": 5, "method": "parent", "interval": Interval(0.1, 0.0, 0.2, 7, 70).as_json()}
    >>> told = {"pooled": [one], "nights": [{"night": "2026-03-01"}]}
    >>> print(in_words(told, [("2026-03-02", "gone")]))
    after 5 rows +0.1000 [+0.0000, +0.2000] against the parent, on 1 golden night; left out: 2026-03-02 (gone)
    """
    parts = [
        f"after {k} rows {vs.estimate:+.4f} [{vs.low:+.4f}, {vs.high:+.4f}]"
        for k, vs in against_parent(figures).items()
    ]
    count = len(figures["nights"])
    told = f"{', '.join(parts)} against the parent, on {count} golden {'night' if count == 1 else 'nights'}"
    return told + gone(left_out)


def gone(left_out: Sequence[tuple[str, str]]) -> str:
    """The end of a line that names golden nights that are not compared."""
    listed = ", ".join(f"{night} ({why})" for night, why in left_out)
    return f"; left out: {listed}" if listed else ""
