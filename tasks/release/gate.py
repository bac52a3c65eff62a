"""Whether a night's release goes out: it must be shown not to be worse, on evidence pooled over nightly exams."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from tasks.data.contract import ColumnName, Section
from tasks.errors import InvalidConfig
from tasks.learning.intervals import Interval

WhenUnsure = Literal["promote_if_not_worse", "hold", "promote"]
DecidedBy = Literal["proven", "proven_worse", "promote_if_not_worse", "hold", "promote", "operator"]

OVERRIDE = "to release it all the same, run the night again with --override REASON"
"""What an operator can do about a release that is held."""


class GoldenConfig(Section):
    """Which earlier nights tell whether a chain of bases forgets, and when that is an alarm."""

    nights: tuple[date, ...] | None = None
    """The golden nights by name; an empty list compares none. None takes the first clean night of each block of `every`
    calendar days that begins within the window, and keeps to it, so that the same nights are compared for as long
    as they are in it. Only nights that the parent's training has read count: nobody forgets what he never knew."""
    every: Annotated[int, Field(ge=1, le=3660)] = 28
    """Calendar days of a block, where no nights are named; at most half of `data.window_nights` is used, so that a
    short window has golden nights too."""
    rows: Annotated[int, Field(ge=1)] = 1000
    """Rows of a golden night that are compared: users are drawn, with all of their night, until they have so many."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the drawing. The same seed draws the same users of a night each time."""
    margin: Annotated[float, Field(ge=0)] = 0.005
    """The alarm `forgetting` sounds where the lower 95 % bound of the loss beyond the parent's, per row, is above
    this."""

    def within(self, window_nights: int) -> "GoldenConfig":
        """The same with blocks of which a window has at least one from its beginning.

        >>> [GoldenConfig().within(nights).every for nights in (120, 21, 1)]
        [28, 10, 1]
        """
        return self.model_copy(update={"every": min(self.every, max(1, window_nights // 2))})


class GateConfig(Section):
    """When a release goes out by itself."""

    objective: ColumnName | None = None
    """The objective that decides; none means the first."""
    margin: Annotated[float, Field(ge=0)] = 0.005
    """Go when the upper 95 % bound of the log-loss difference, per row, is at most this."""
    when_unsure: WhenUnsure = "promote_if_not_worse"
    """What to do when the bound is above the margin: `promote_if_not_worse` goes if no point estimate is above zero,
    `hold` keeps the champion, `promote` goes unless a lower bound is above the margin."""
    pool_nights: Annotated[int, Field(ge=1, le=365)] = 7
    """How many nightly exams, tonight's included, are pooled."""
    min_exam_rows: Annotated[int, Field(ge=2)] = 100
    """Pooled exam rows from which a segment is judged by itself, and a level's segment is missed when it vanishes."""
    false_discovery: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Largest expected share of wrongly convicted adapters among those that fall back."""
    golden: Annotated[GoldenConfig, Field(exclude_if=lambda golden: golden == GoldenConfig())] = GoldenConfig()
    """Earlier nights on which a base is compared with its parent's. They can raise an alarm; the gate does not ask."""


@dataclass(frozen=True)
class ReleaseVerdict:
    """Whether the pointer may move, and why."""

    go: bool
    """Whether the release is promoted."""
    decided_by: DecidedBy
    """`proven`: both bounds are within the margin. `proven_worse`: a lower bound is above it. `operator`: overridden.
    Else the setting of `when_unsure` that decided."""
    reasons: tuple[str, ...]
    """One sentence per comparison, then one for the decision."""


def decide_release(
    config: GateConfig, candidate_vs: Mapping[str, Interval], champion: str | None = None
) -> ReleaseVerdict:
    """The release's verdict.

    The candidate must hold against the champion and against the best baseline: the one that it gains least on. All are
    paired over the same rows, so that has the lowest pooled log-loss; only one that earlier exams did not have yet is
    paired over fewer nights.

    Args:
        config: the gate's section.
        candidate_vs: by method, loss of the candidate minus loss of the method, per row, pooled over nights. Every
            method but the champion is a baseline.
        champion: the champion's name in `candidate_vs`, None if there is no champion yet. A champion that could not
            be examined is named and left out of `candidate_vs`: it is not comparable, which is never a win.

    Returns:
        The verdict, its reasons readable by an operator.

    >>> verdict = decide_release(GateConfig(), {"popularity": Interval(-0.03, -0.05, -0.01, 80, 900)})
    >>> verdict.go, verdict.decided_by
    (True, 'proven')
    >>> print(verdict.reasons[1])
    against popularity: -0.0300 [-0.0500, -0.0100] over 80 users and 900 rows, upper bound within the margin 0.005
    """
    baselines = {name: interval for name, interval in candidate_vs.items() if name != champion}
    rivals = [] if champion is None else [champion]
    measured = {name: interval.estimate for name, interval in baselines.items() if not np.isnan(interval.estimate)}
    if measured:
        rivals.append(max(measured, key=lambda name: measured[name]))
    comparisons = [candidate_vs.get(name) for name in rivals]
    reasons = [_compared(name, vs, config.margin) for name, vs in zip(rivals, comparisons, strict=True)]
    if champion is None:
        reasons.insert(0, "there is no champion yet: only baselines are compared")
    if not measured:
        reasons.append("no baseline could be compared: the pooled exams have no rows")
    known = [vs for vs in comparisons if vs is not None and not np.isnan(vs.estimate)]
    complete = bool(measured) and len(known) == len(rivals)
    go, decided_by, why = _decide(config, known, complete)
    return ReleaseVerdict(go, decided_by, (*reasons, f"{'go' if go else 'hold'}: {why}"))


def override(verdict: ReleaseVerdict, go: bool, operator: str, reason: str) -> ReleaseVerdict:
    """An operator's decision in place of the gate's; the gate's reasons stay on record behind it.

    Raises:
        InvalidConfig: if the reason is blank.

    >>> override(ReleaseVerdict(False, "hold", ("hold: unsure",)), True, "ann", "market launch").reasons
    ('go: decided by ann, because: market launch', 'before that, hold: unsure')
    """
    if not reason.strip():
        raise InvalidConfig("an override needs a reason that says why the gate is wrong tonight, found a blank one")
    decision = f"{'go' if go else 'hold'}: decided by {operator}, because: {reason.strip()}"
    return ReleaseVerdict(go, "operator", (decision, *(f"before that, {line}" for line in verdict.reasons)))


def _decide(config: GateConfig, known: list[Interval], complete: bool) -> tuple[bool, DecidedBy, str]:
    if any(vs.low > config.margin for vs in known):
        return False, "proven_worse", f"shown to be worse by more than the margin {config.margin:g}"
    if complete and all(vs.high <= config.margin for vs in known):
        return True, "proven", "shown to be no worse than what it replaces"
    if config.when_unsure == "hold":
        return False, "hold", f"unsure, and gate.when_unsure says hold; {OVERRIDE}"
    if config.when_unsure == "promote":
        return True, "promote", "unsure, and gate.when_unsure says promote"
    if not complete:
        return False, "promote_if_not_worse", f"a comparison is missing; {OVERRIDE}"
    if all(vs.estimate <= 0 for vs in known):
        return True, "promote_if_not_worse", "unsure, but no point estimate is above zero"
    return False, "promote_if_not_worse", "unsure, and a point estimate is above zero"


def _compared(name: str, vs: Interval | None, margin: float) -> str:
    if vs is None or np.isnan(vs.estimate):
        return f"against {name}: not comparable, which is never a win"
    fit = "within" if vs.high <= margin else "above"
    return (
        f"against {name}: {vs.estimate:+.4f} [{vs.low:+.4f}, {vs.high:+.4f}] over {vs.users:,} users and "
        f"{vs.rows:,} rows, upper bound {fit} the margin {margin:g}"
    )
