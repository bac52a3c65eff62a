"""What goes into a release and what comes out, as a manifest states it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from typing import Literal

from tasks.release.strict_json import Reader, canonical

Json = Mapping[str, object]
Scalar = str | int | float | None
Example = Scalar | tuple[Scalar, ...]
"""A value of an input, or a list's values."""
Axis = Literal["request", "candidate", "feedback"]
_AXES = {"candidate": "candidates", "feedback": "feedback"}
_RARE = ("values", "of", "optional", "personal", "rows")
"""What an interface tells of those inputs only that have it."""
_KEY_ID = re.compile(r"[A-Za-z0-9_]{1,64}")


@dataclass(frozen=True)
class Personal:
    """A column that holds keyed digests: a ranker hashes what a caller gives it.

    Attributes:
        key_id: names the key; the environment variable `NIGHTRANK_HASH_KEY_<key_id>` holds it.
        method: lower-case hexadecimal HMAC-SHA256 of the raw value's UTF-8 bytes.
    """

    key_id: str
    method: Literal["hmac-sha256"] = "hmac-sha256"


@dataclass(frozen=True)
class InputSpec:
    """One raw column of a request.

    Attributes:
        name: the column's name in the lake and in `model.onnx`.
        per: whether there is one value per request, one per candidate, or one per row of feedback.
        dtype: element type of the tensor.
        meaning: for people.
        missing: what stands for a missing value; None means NaN. A list of categories is filled up with it behind its
            end, and a missing one is an empty one; a missing vector is NaN throughout.
        example: a value as it may stand in a request.
        values: of a list column the length of the tensor's last axis: a list of categories (`int64`, `string`) has at
            most so many values, a vector (`float32`) just so many. None where there is one value.
        of: of a user's history and of feedback the column whose values of earlier rows the input holds, newest first:
            of a history at most `values` of them, more are cut off. None for every other input.
        optional: whether a request may leave it out.
        personal: how its raw values are hashed before they go in; None where they go in as they are.
        rows: of feedback the most rows that a request holds; more are cut off.
    """

    name: str
    per: Axis
    dtype: Literal["int64", "string", "float32"]
    meaning: str
    missing: str | int | None
    example: Example = None
    values: int | None = None
    of: str | None = None
    optional: bool = False
    personal: Personal | None = None
    rows: int | None = None

    @property
    def recalls(self) -> bool:
        """Whether it is of a user's history, which the network reads."""
        return self.of is not None and self.per == "request"

    @property
    def shape(self) -> tuple[str | int, ...]:
        """Shape of the tensor, symbolic but for the places of a list."""
        axes: tuple[str | int, ...] = ("requests",) if self.per == "request" else ("requests", _AXES[self.per])
        return axes if self.values is None else (*axes, self.values)

    def as_json(self) -> Json:
        """The input as an interface tells it: what only some inputs have is left out of the others."""
        told = {**asdict(self), "shape": list(self.shape)}
        return {name: value for name, value in told.items() if name not in _RARE or value not in (None, False)}


@dataclass(frozen=True)
class Objective:
    """One position of the scores' last axis: a probability (binary) or an expected value (rating).

    Attributes:
        name: of the objective.
        kind: of the outcome.
        minimum: the smallest label of a rating that the contract allows; None where it names none.
        maximum: the largest.
    """

    name: str
    kind: Literal["binary", "rating"]
    minimum: float | None = None
    maximum: float | None = None

    @property
    def bounded(self) -> bool:
        """Whether it names a bound."""
        return self.minimum is not None or self.maximum is not None

    def as_json(self) -> Json:
        """The objective as an interface tells it: a bound that is not named is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class LevelSpec:
    """One level of the segment ladder: its columns, and how many of its segments the release knows."""

    columns: tuple[str, ...]
    segments: int


@dataclass(frozen=True)
class Interface:
    """What goes into a release and what comes out, bound to its id through `interface.json`.

    Attributes:
        night: the newest night that the release has learned from.
        inputs: raw columns of `model.onnx` and `lookup.onnx`.
        output: name of the scores, float32 [requests, candidates, objectives].
        objectives: the last axis of the scores.
        wires: role to name of the tensors between `lookup.onnx` and `score.onnx`.
        levels: the segment ladder, finest first; the base stands below the last.
    """

    night: date
    inputs: tuple[InputSpec, ...]
    output: str
    objectives: tuple[Objective, ...]
    wires: Mapping[str, str]
    levels: tuple[LevelSpec, ...]

    def serialise(self) -> bytes:
        """The bytes of `interface.json`."""
        return canonical(self.as_json())

    def as_json(self) -> Json:
        """The content of `interface.json`, which the manifest repeats."""
        inputs = [spec.as_json() for spec in self.inputs]
        levels = [{"columns": list(level.columns), "segments": level.segments} for level in self.levels]
        return {
            "night": self.night.isoformat(),
            "inputs": inputs,
            "output": {"name": self.output, "dtype": "float32", "shape": ["requests", "candidates", "objectives"]},
            "objectives": [objective.as_json() for objective in self.objectives],
            "wires": dict(self.wires),
            "levels": levels,
        }


def read_interface(read: Reader, value: object) -> Interface:
    """Read an interface, and trust nothing in it.

    Raises:
        ReleaseRefused: anything is odd.
    """
    names = ("night", "inputs", "output", "objectives", "wires", "levels")
    values = read.fields(value, "interface", names, versioned=False)
    inputs = tuple(_input(read, one) for one in read.sequence(values["inputs"], "inputs"))
    if len({spec.name for spec in inputs}) != len(inputs) or not {spec.per for spec in inputs} >= {
        "request",
        "candidate",
    }:
        read.refuse("its inputs are doubled, or lack the user or the item")
    output = read.fields(values["output"], "output", ("name", "dtype", "shape"), versioned=False)
    objectives = [_objective(read, one) for one in read.sequence(values["objectives"], "objectives")]
    if not objectives:
        read.refuse("it has no objective")
    _feedback_fits(read, inputs, objectives)
    levels = []
    for one in read.sequence(values["levels"], "levels"):
        said = read.fields(one, "level", ("columns", "segments"), versioned=False)
        columns = tuple(read.name(name) for name in read.sequence(said["columns"], "columns"))
        levels.append(LevelSpec(columns, read.count(said["segments"], "segments")))
    wires = {read.name(role): read.name(name) for role, name in read.mapping(values["wires"], "wires").items()}
    night, name = read.night(values["night"]), read.name(output["name"])
    interface = Interface(night, inputs, name, tuple(objectives), wires, tuple(levels))
    if canonical(interface.as_json()) != canonical(value):
        read.refuse("its interface does not follow from its parts")
    return interface


def _objective(read: Reader, value: object) -> Objective:
    bounds = [name for name in ("minimum", "maximum") if isinstance(value, Mapping) and name in value]
    said = read.fields(value, "objective", ("name", "kind", *bounds), versioned=False)
    kind: Literal["binary", "rating"] = "binary" if said["kind"] == "binary" else "rating"
    if said["kind"] != kind:
        read.refuse(f"objective kind {said['kind']!r} is unknown")
    name = read.name(said["name"])
    if bounds and kind == "binary":
        read.refuse(f"objective {name!r} is binary and has a {bounds[0]}: its labels are 0 and 1")
    low, high = (read.number(said[one], f"{one} of {name}") if one in said else None for one in ("minimum", "maximum"))
    if low is not None and high is not None and low > high:
        read.refuse(f"objective {name!r} has minimum {low:g}, which is above maximum {high:g}")
    return Objective(name, kind, low, high)


def _input(read: Reader, value: object) -> InputSpec:
    names = ["name", "per", "dtype", "meaning", "missing", "example", "shape"]
    names += [name for name in _RARE if isinstance(value, Mapping) and name in value]
    values = read.fields(value, "input", names, versioned=False)
    name = read.name(values["name"])
    pers: dict[object, Axis] = {"request": "request", "candidate": "candidate", "feedback": "feedback"}
    dtypes: dict[object, Literal["int64", "string", "float32"]] = {
        "int64": "int64",
        "string": "string",
        "float32": "float32",
    }
    known = isinstance(values["per"], str) and values["per"] in pers
    if not known or not isinstance(values["dtype"], str) or values["dtype"] not in dtypes:
        read.refuse(f"input {name!r} is per {values['per']!r} and of dtype {values['dtype']!r}, which is unknown")
    per, missing, example = pers[values["per"]], values["missing"], values["example"]
    dtype = dtypes[values["dtype"]]
    expected = {"int64": int, "string": str, "float32": type(None)}[dtype]
    width = read.count(values["values"], "values") if "values" in values else None
    listed = tuple(example) if width is not None and isinstance(example, list) else (example,)
    if type(missing) is not expected:
        read.refuse(f"input {name!r} of dtype {dtype} marks missing values by {missing!r}")
    if width == 0:
        read.refuse(f"input {name!r} has lists of 0 values")
    if not all(isinstance(one, str | int | float | None) for one in listed):
        read.refuse(f"input {name!r} has {example!r} as an example, which is no value")
    assert isinstance(missing, str | int | None)
    shown: Example = listed if isinstance(example, list) else listed[0]
    of = read.name(values["of"]) if "of" in values else None
    if of is not None and (width is None or per != "request") and per != "feedback":
        read.refuse(f"input {name!r} is of a history, and does not say how long it is")
    optional = values.get("optional", False)
    if not isinstance(optional, bool):
        read.refuse(f"input {name!r} is optional {optional!r:.80}, which is neither true nor false")
    personal = _personal(read, values["personal"], name, dtype) if "personal" in values else None
    rows = read.count(values["rows"], "rows") if "rows" in values else None
    meaning = read.text(values["meaning"], "meaning")
    return InputSpec(name, per, dtype, meaning, missing, shown, width, of, optional, personal, rows)


def _feedback_fits(read: Reader, inputs: Sequence[InputSpec], objectives: Sequence[Objective]) -> None:
    """Refuse feedback that does not hold a candidate's inputs and then a label for each objective."""
    if any(spec.rows is not None for spec in inputs if spec.per != "feedback"):
        read.refuse("an input that is no feedback says how many rows of it there are")

    def holds(name: str | None, spec: InputSpec) -> tuple[object, ...]:
        return name, spec.dtype, spec.values, spec.missing, spec.personal

    said = [holds(spec.of, spec) for spec in inputs if spec.per == "feedback"]
    if not said:
        return
    candidates = [holds(spec.name, spec) for spec in inputs if spec.per == "candidate"]
    labels = said[len(candidates) :]
    plain = all(one[1:] == ("float32", None, None, None) for one in labels) and len(labels) == len(objectives)
    rows = {(spec.rows, spec.optional) for spec in inputs if spec.per == "feedback"}
    least = next(iter(rows))[0]
    if said[: len(candidates)] != candidates or not plain or len(rows) != 1 or not least or (least, True) not in rows:
        read.refuse("its feedback does not hold what a candidate does, and a label for each objective")


def _personal(read: Reader, value: object, name: str, dtype: str) -> Personal:
    values = read.fields(value, f"personal of {name}", ("key_id", "method"), versioned=False)
    key_id = read.text(values["key_id"], "key_id", 64)
    if not _KEY_ID.fullmatch(key_id):
        read.refuse(f"input {name!r} is hashed with key {key_id!r}, which is no name of letters, digits and _")
    read.choice(values["method"], "method", ("hmac-sha256",))
    if dtype != "string":
        read.refuse(f"input {name!r} is hashed, and of dtype {dtype}: hashed values are strings")
    return Personal(key_id)
