"""Parts of a manifest that say what a release needs, whom it serves, which variants it has, and what its graphs open.

Pure standard library. Each part is written by `as_json` and read back, field by field, without trust.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, cast

from tasks.release.interface import Json
from tasks.release.strict_json import Reader

VERDICTS = ("passed", "failed")
LARGEST_DIFFERENCE = 0.05
"""A variant whose answer to a golden request is further off than this is no form of the same graph, whatever its loss;
absolute for probabilities, relative to 1 + the score for ratings. No tolerance may be larger."""
GRAPH_SUFFIX = ".onnx"
"""How the names of graphs end."""
_VERSION = re.compile(r"\d+\.\d+")
_VARIANT = re.compile(r"[a-z][a-z0-9]{0,31}")
_DOMAIN = re.compile(r"[a-z0-9.]{0,64}")


@dataclass(frozen=True)
class Requires:
    """What a host must have to load the graphs.

    Attributes:
        onnxruntime: its least version, as `1.31`: the one that the graphs were proved on.
        opsets: operator sets by domain; the standard one's domain is empty.
        ir_version: of the ONNX files.
        producer: who wrote them, with its version.
    """

    onnxruntime: str
    opsets: Mapping[str, int]
    ir_version: int
    producer: str

    def as_json(self) -> Json:
        """As a manifest tells it."""
        return asdict(self)

    def met_by(self, onnxruntime: str) -> bool:
        """Whether a version of onnxruntime will do.

        >>> [Requires("1.31", {}, 10, "nightrank").met_by(one) for one in ("1.9.0", "1.31.1", "2.0.0")]
        [False, True, True]
        """
        parts = [[int(part) for part in re.findall(r"\d+", one)[:2]] for one in (self.onnxruntime, onnxruntime)]
        return parts[0] <= parts[1]


@dataclass(frozen=True)
class Support:
    """Rows that the weights of a level's segments were solved from."""

    median: float
    p90: float
    sum: int


@dataclass(frozen=True)
class Lift:
    """What own weights change in a level: loss per row minus the parent's, below zero is better.

    Attributes:
        mean: mean over the segments, each drawn towards the level's by how unsure it is.
        low: least of a 95 % interval of that mean.
        high: its greatest.
        exams: nightly exams that it is pooled over.
    """

    mean: float
    low: float
    high: float
    exams: int


@dataclass(frozen=True)
class LevelSegments:
    """Who is served by what at one level of the ladder.

    Attributes:
        columns: the level's.
        kind: of its adapters.
        segments: segments that were seen.
        own: those with weights of their own.
        parent: those that the next level's serve, for want of rows.
        rolled_back: those that the next level's serve because their own are proven to do harm, or by
            an operator's word.
        support: of those with weights of their own; None where there is none.
        lift: of the first objective; None where too few exams or segments say anything.
    """

    columns: tuple[str, ...]
    kind: str
    segments: int
    own: int
    parent: int
    rolled_back: int
    support: Support | None
    lift: Lift | None

    def as_json(self) -> Json:
        """As a manifest tells it."""
        return {**asdict(self), "columns": list(self.columns)}


@dataclass(frozen=True)
class Variant:
    """Graphs of the same release in another arithmetic, and how they were judged.

    Attributes:
        files: names of the content files that only it has.
        provider: the execution provider it is made for.
        parity: differences to the network on the golden requests, by name; `tolerance` is a reader's.
        agreement: changes on rows that the weights have not seen, by name.
        verdict: readers load only one that passed.
        why: one sentence.
    """

    files: tuple[str, ...]
    provider: str
    parity: Mapping[str, float]
    agreement: Json = field(default_factory=dict)
    verdict: Literal["passed", "failed"] = "failed"
    why: str = ""

    def as_json(self) -> Json:
        """As a manifest tells it."""
        return {**asdict(self), "files": list(self.files)}


def read_requires(read: Reader, value: object) -> Requires:
    """What a release requires.

    Raises:
        ReleaseRefused: it is malformed.
    """
    values = read.fields(value, "requires", ("onnxruntime", "opsets", "ir_version", "producer"), versioned=False)
    least = read.text(values["onnxruntime"], "onnxruntime", 32)
    if not _VERSION.fullmatch(least):
        read.refuse(f"it requires onnxruntime {least!r}, which is no version")
    opsets = read.mapping(values["opsets"], "opsets")
    if odd := [domain for domain in opsets if not _DOMAIN.fullmatch(domain)]:
        read.refuse(f"it requires operators of {odd[0]!r:.80}, which is no domain")
    known = {domain: read.count(version, "opset") for domain, version in opsets.items()}
    return Requires(
        least, known, read.count(values["ir_version"], "ir_version"), read.text(values["producer"], "producer", 200)
    )


def read_segments(read: Reader, value: object, levels: Sequence[Sequence[str]]) -> tuple[LevelSegments, ...]:
    """The segments of each level of the ladder, or none at all.

    Raises:
        ReleaseRefused: they are malformed, do not add up, or are of another ladder.
    """
    found = tuple(_level(read, one) for one in read.sequence(value, "segments"))
    if found and [list(one.columns) for one in found] != [list(one) for one in levels]:
        read.refuse("its segments are of another ladder than its interface's")
    return found


def _level(read: Reader, value: object) -> LevelSegments:
    counts = ("segments", "own", "parent", "rolled_back")
    values = read.fields(value, "segments", ("columns", "kind", *counts, "support", "lift"), versioned=False)
    columns = tuple(read.name(name) for name in read.sequence(values["columns"], "columns"))
    seen, own, parent, back = (read.count(values[name], name) for name in counts)
    if own + parent + back != seen:
        read.refuse(f"{' x '.join(columns)} has {own} + {parent} + {back} segments, and says {seen}")
    return LevelSegments(
        *(columns, read.text(values["kind"], "kind", 32), seen, own, parent, back),
        support=None if values["support"] is None else _support(read, values["support"]),
        lift=None if values["lift"] is None else _lift(read, values["lift"]),
    )


def _support(read: Reader, value: object) -> Support:
    values = read.fields(value, "support", ("median", "p90", "sum"), versioned=False)
    return Support(
        read.number(values["median"], "median"), read.number(values["p90"], "p90"), read.count(values["sum"], "sum")
    )


def _lift(read: Reader, value: object) -> Lift:
    values = read.fields(value, "lift", ("mean", "low", "high", "exams"), versioned=False)
    mean, low, high = (read.number(values[name], name) for name in ("mean", "low", "high"))
    return Lift(mean, low, high, read.count(values["exams"], "exams"))


def read_variants(read: Reader, value: object, files: Sequence[str]) -> dict[str, Variant]:
    """The variants of a release.

    Raises:
        ReleaseRefused: they are malformed, or name files that the release does not have.
    """
    found: dict[str, Variant] = {}
    for name, told in read.mapping(value, "variants").items():
        if not _VARIANT.fullmatch(name):
            read.refuse(f"variant {name!r:.80} has no plain name")
        said = read.fields(
            told, f"variant {name}", ("files", "provider", "parity", "agreement", "verdict", "why"), versioned=False
        )
        own = tuple(read.text(one, "file name") for one in read.sequence(said["files"], "files"))
        if absent := sorted(set(own) - set(files)):
            read.refuse(f"variant {name} names {absent[0]!r:.80}, which the release does not have")
        verdict = cast(Literal["passed", "failed"], read.choice(said["verdict"], "verdict", VERDICTS))
        parity = {one: read.number(said, one) for one, said in read.mapping(said["parity"], "parity").items()}
        found[name] = Variant(
            *(own, read.text(said["provider"], "provider", 64), parity, read.mapping(said["agreement"], "agreement")),
            *(verdict, read.text(said["why"], "why", 2000)),
        )
    return found


def read_graphs(read: Reader, value: object, files: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Which files each graph of a release opens.

    Raises:
        ReleaseRefused: they are malformed, leave a graph out, or name files that the release does not have.
    """
    told = read.mapping(value, "graphs")
    if odd := sorted(set(told) ^ {name for name in files if name.endswith(GRAPH_SUFFIX)}):
        read.refuse(f"it must say for its graphs, and for nothing else, which files they open: {odd[0]!r:.80}")
    found: dict[str, tuple[str, ...]] = {}
    for graph, listed in told.items():
        names = tuple(read.text(one, "file name") for one in read.sequence(listed, graph))
        if absent := sorted(set(names) - set(files)):
            read.refuse(f"{graph} opens {absent[0]!r:.80}, which the release does not have")
        if list(names) != sorted(set(names)):
            read.refuse(f"the files that {graph} opens are doubled or out of order")
        found[graph] = names
    return found
