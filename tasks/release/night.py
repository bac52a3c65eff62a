"""What a night has to tell: plain facts, gathered by the verbs, that the report shows and `run.json` keeps.

Everything is JSON through `dataclasses.asdict`; a figure that is undefined is None, never NaN.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tasks.learning.intervals import Interval
from tasks.release.cost import Cost
from tasks.release.earned import Step
from tasks.release.lift import Summary
from tasks.release.variety import Variety

Figures = Mapping[str, float | None]
"""Metrics of one method by name."""


@dataclass(frozen=True)
class InputFile:
    """A file of the night as it was frozen."""

    path: str
    bytes: int
    rows: int
    sha256: str


@dataclass(frozen=True)
class Expectation:
    """One expectation's outcome."""

    name: str
    """Its type and what it is about, such as `expect_column_values_to_not_be_null(movie_id)`."""
    success: bool
    observed: str
    """What was found, in words or figures."""


@dataclass(frozen=True)
class Intake:
    """What came in, and what was rejected and why."""

    files: tuple[InputFile, ...]
    rows: int
    clean: int
    bad: int
    limit: float
    """Largest share of bad rows allowed."""
    reasons: Mapping[str, int]
    """Rows by reason code; a row may have several."""
    examples: tuple[Mapping[str, object], ...]
    """A few rejected rows."""
    expectations: tuple[Expectation, ...]
    data_docs: str | None = None
    """Path of the Data Docs beside the report, if they were built."""


@dataclass(frozen=True)
class HistoryNight:
    """A night of the window."""

    night: str
    rows: int | None
    left_out: str | None = None
    """Why the night was not used; None if it was."""


@dataclass(frozen=True)
class Epoch:
    """One point of the learning curve."""

    epoch: int
    train_loss: float | None
    stop_loss: float | None


@dataclass(frozen=True)
class Comparison:
    """The candidate against one method in one exam."""

    exam: str
    """`nightly` or `first_contact`."""
    method: str
    estimate: float | None
    """Loss of the candidate minus the method's, per row: below zero is better."""
    low: float | None
    high: float | None
    users: int
    rows: int
    k: int | None = None
    """Rows of the night that first contact adapts on."""
    common_rows: bool = False
    """Whether only rows after the 20th are compared, the same for every k."""
    nights: int = 1
    """Exams pooled."""

    @classmethod
    def of(
        cls,
        exam: str,
        method: str,
        interval: Interval,
        k: int | None = None,
        common_rows: bool = False,
        nights: int = 1,
    ) -> "Comparison":
        """A comparison from its interval; NaN and infinities become None."""
        bounds = interval.as_json()
        return cls(
            exam,
            method,
            bounds["estimate"],
            bounds["low"],
            bounds["high"],
            interval.users,
            interval.rows,
            k,
            common_rows,
            nights,
        )


@dataclass(frozen=True)
class ObjectiveExams:
    """Both exams of one objective."""

    objective: str
    loss: str
    """What the comparisons compare, such as `log-loss`."""
    nightly: Mapping[str, Figures]
    """By method; `candidate` is tonight's."""
    first_contact: Mapping[int, Mapping[str, Figures]]
    """By k, then by method."""
    comparisons: tuple[Comparison, ...]
    margin: float | None = None
    """The gate's margin, if this objective decides."""


@dataclass(frozen=True)
class Retention:
    """What the base still knows of golden nights, beside the base that it started from."""

    told: str
    """One line: the differences, or why nothing was compared."""
    comparisons: tuple[Comparison, ...] = ()
    """Against parent and zero steps after k rows, all golden nights together."""
    nights: tuple[tuple[str, Comparison], ...] = ()
    """Each golden night, and the comparison with the parent on it without any of its rows."""
    margin: float | None = None
    """The alarm's margin."""


@dataclass(frozen=True)
class LadderLevel:
    """Who got which adapter on one level of the ladder."""

    name: str
    segments: int
    adapted: int
    """Segments with an adapter of their own."""
    fallen_back: int
    """Segments with the rows for an adapter that got none, for it is proven to do harm."""
    rows: int | None
    """Tonight's rows served by this level's adapters."""
    bytes: int | None = None
    """Bytes of the bank that ships; None where they were not counted."""
    milliseconds: float | None = None
    """Wall time of solving them; None where it was not measured."""


@dataclass(frozen=True)
class Adapters:
    """Who got which adapter."""

    levels: tuple[LadderLevel, ...]
    support: tuple[tuple[str, int], ...]
    """Histogram: adapters by support size."""
    tested: tuple[Mapping[str, object], ...] = ()
    """The gate's table of tested segments and steps (`SegmentVerdicts.table`)."""


@dataclass(frozen=True)
class Worth:
    """What own weights are worth and cost, pooled over the exams that the gate pools, and what each method shows."""

    nights: int
    """Exams pooled, tonight's included."""
    steps: tuple[Step, ...]
    """The support curve of every objective and level."""
    lifts: tuple[Summary, ...]
    """What own weights are worth to the segments of every objective and level; users are not named."""
    costs: tuple[Cost, ...]
    """What the banks cost for that."""
    varieties: tuple[Variety, ...]
    """What each method's lists of tonight are like."""


@dataclass(frozen=True)
class PublishedFile:
    """A file of the release."""

    name: str
    bytes: int
    sha256: str
    reused: bool
    """Whether the blob was already in the store."""


@dataclass(frozen=True)
class TimedStep:
    """What a step took."""

    name: str
    seconds: float
    peak_mib: float
    reused: bool


@dataclass(frozen=True)
class NightReport:
    """A whole night."""

    pipeline: str
    night: str
    release: str | None
    """The release's id, None if nothing was exported."""
    parent: str | None
    champion: str | None
    """The pointer's release before this night."""
    go: bool
    decided_by: str
    reasons: tuple[str, ...]
    intake: Intake
    history: tuple[HistoryNight, ...]
    curve: tuple[Epoch, ...]
    best_epoch: int | None
    objectives: tuple[ObjectiveExams, ...]
    adapters: Adapters
    published: tuple[PublishedFile, ...]
    steps: tuple[TimedStep, ...]
    alarms: tuple[tuple[str, str], ...] = ()
    """Name and message."""
    retention: Retention | None = None
    """What is retained of earlier nights."""
    worth: Worth | None = None
    """What own weights are worth to whom."""
    signed_by: str | None = None
    """Id of the key that signs the release, None if nobody does."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """Commit, versions, device, seed."""
