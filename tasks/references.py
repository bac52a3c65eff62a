"""What travels between steps: a place to work in, and small references to what each step left in the store.

Tables and tensors never travel; a reference names the step record that holds them, by key and digest, and carries
the few numbers that a person wants to see go by.
"""

from datetime import date, datetime
from typing import Literal

from tasks.data.contract import Section
from tasks.release.holds import HeldSegment

Device = Literal["auto", "cpu", "cuda"]


class Place(Section):
    """Where a pipeline lives, and where this host may put temporary files."""

    store: str
    """Directory or `s3://bucket/prefix` of the object store."""
    pipeline: str
    """The pipeline's name: the first part of every key."""
    scratch: str
    """Local directory for temporary files; it can be emptied whenever nothing runs."""
    device: Device = "auto"
    """Where networks run: `auto` takes CUDA where a device is."""


class StepRef(Section):
    """A finished step: which record it left, and what it took to make."""

    step: str
    """The step's name, the folder of its records in the store."""
    key: str
    """Digest of everything that the step was made from."""
    digest: str
    """Digest of the record's content; the keys of later steps are made from it."""
    reused: bool
    """Whether the record was already there."""
    seconds: float
    """Wall time of the run that made the record."""
    peak_mib: float
    """Peak resident memory of that run, in MiB."""


class ParentRef(Section):
    """What a night starts from: the base and the vocabulary that an earlier night left.

    A release holds both. A night that was only replayed has no release, and left them in two step records.
    """

    digest: str
    """Digest over the files that are read; the keys of the steps that read them are made from it."""
    release: str | None = None
    """The release that holds them."""
    base: str | None = None
    """Else: key of the `meta-train` record."""
    layout: str | None = None
    """And key of the `prepare` record."""

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return f"release {self.release[:12]}" if self.release else f"replayed base {(self.base or '')[:12]}"


class IngestRef(StepRef):
    """A frozen night, and what it will be compared with."""

    night: date
    rows: int
    files: int
    bytes: int
    frozen: str
    """Digest over the night's files."""
    parent: ParentRef | None
    """What the night starts from."""
    champion: str | None
    """Release to be examined beside the candidate: the pointer's if its night is earlier, else the parent."""
    champion_night: date | None
    generation: int
    """Generation of the pointer when this was resolved; 0 where there is none."""
    exams: tuple[str, ...]
    """Keys of the earlier exams that the gate pools, newest first."""
    verdicts: tuple[str, ...]
    """Keys of the verdicts on the same nights, which hold their champions' answers; none where a night is replayed."""
    held: tuple[HeldSegment, ...] = ()
    """Segments that an operator holds at their parent's weights."""
    replayed: bool = False
    """Whether the night is replayed: it leaves step records, and not a word where production looks."""


class ValidateRef(StepRef):
    """A validated night."""

    rows: int
    clean: int
    bad: int
    reasons: dict[str, int]
    """Rows in quarantine by reason code."""
    docs: str
    """Key of the step record that holds the Data Docs; empty where a night is replayed, which has no report."""


class PrepareRef(StepRef):
    """Columns, statistics and vocabularies of the window and the night."""

    history: str
    """Key of the record of the history alone: what training and the exam bank are given."""
    nights: tuple[date, ...]
    """Nights of history that are read."""
    left_out: dict[str, str]
    """Nights of the window that are not, with the reason."""
    rows: int
    users: int
    items: int
    segments: int


class HistoryRef(StepRef):
    """Columns of the nights before one that is not run."""

    nights: tuple[date, ...]
    """Nights that are read."""
    left_out: dict[str, str]
    """Nights of the window that are not, with the reason."""


class BaseRef(StepRef):
    """A meta-trained base."""

    epochs: int
    stop_loss: float | None
    """Query loss on the nights that training was stopped on; None where the parent's base was kept unseen."""
    parameters: int


class BankRef(StepRef):
    """Adapters of all segments."""

    bank: Literal["exam", "ship"]
    segments: int
    """Segments looked at."""
    adapted: int
    """Segments that have an adapter of their own."""


class ExamRef(StepRef):
    """Both exams of candidate and baselines."""

    rows: int
    users: int


class ListsRef(StepRef):
    """What each method would have shown to some of the night's users."""

    users: int
    """Users that were asked."""
    candidates: int
    """Items that were ranked for each of them."""


class JointRef(StepRef):
    """What the same network says of a night, trained without adaptation in its loss."""


class FeedbackRef(StepRef):
    """What first contact comes to where requests bring feedback."""


class RetentionRef(StepRef):
    """What the base still knows of golden nights, beside its parent's."""

    compared: bool
    told: str
    """One line: the differences, or why nothing was compared."""


class ScoreRow(Section):
    """One line of the table that a person reads: a method in an exam, for the lead objective."""

    exam: str
    """`nightly`, or `first contact, 5 rows`."""
    method: str
    """`adapted`, or a baseline's name."""
    rows: int
    log_loss: float
    calibration: float | None = None
    """Expected calibration error."""
    auc: float | None = None
    """Mean of the per-user areas under the curve."""
    ndcg: float | None = None
    """Mean of the per-user NDCG@10."""


class VerdictRef(StepRef):
    """What the gate said."""

    go: bool
    decided_by: str
    reasons: tuple[str, ...]
    alarms: tuple[str, ...]
    scores: tuple[ScoreRow, ...]


class ExportRef(StepRef):
    """An exported release, not yet published."""

    release: str
    """Its id: the digest of its content."""
    bytes: int
    parity: float
    """Largest difference between the graph and the network over the golden requests."""


class VariantsRef(StepRef):
    """What smaller forms of the score graph say of the night, beside fp32."""

    names: tuple[str, ...]
    rows: int
    """Rows of the night that were asked."""


class FinishedSteps(Section):
    """What every step of a night left, up to the release that is to be published."""

    ingested: IngestRef
    validated: ValidateRef
    prepared: PrepareRef
    base: BaseRef
    bank: BankRef
    """The bank that was examined."""
    exam: ExamRef
    lists: ListsRef
    retention: RetentionRef
    verdict: VerdictRef
    variants: VariantsRef | None = None
    """Smaller forms of the score graph, tried on the night; None where none is configured."""
    ship: BankRef
    """The bank that ships."""
    exported: ExportRef

    @property
    def in_order(self) -> tuple[StepRef, ...]:
        """The steps in the order in which they ran."""
        before = (self.ingested, self.validated, self.prepared, self.base, self.bank)
        tried = () if self.variants is None else (self.variants,)
        return (*before, self.exam, self.lists, self.retention, self.verdict, *tried, self.ship, self.exported)


class PublishRef(StepRef):
    """A published release."""

    release: str
    night: date
    promoted: bool
    """Whether the pointer names this release now."""
    why: str
    """One sentence: why it was promoted, or why it was not."""
    report: str
    """Where the report is: a path for a directory store, a URL otherwise."""
    signed_by: str | None = None
    """Id of the key that signed it, None where nobody did."""


class ReleaseRow(Section):
    """One release of a pipeline, as `nightrank releases list` shows it."""

    release: str
    night: date | None
    """Its night; None where nothing that can be read says so."""
    created: datetime | None
    """When it was made; None where its `run.json` is gone or damaged."""
    go: bool | None
    """Whether the gate let it through; None where nothing that can be read says so."""
    roles: tuple[str, ...]
    """What the pointer names it as: `champion`, `previous`, `challenger`."""
    parent: str | None
    config: str | None
    """Digest of the config that made it, without the places it ran in; None where nothing that can be read says so."""
    report: str
    damaged: tuple[str, ...] = ()
    """What could not be read of this, one sentence each."""

    @property
    def champion(self) -> bool:
        """Whether the pointer names it now."""
        return "champion" in self.roles
