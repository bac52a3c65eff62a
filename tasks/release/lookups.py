"""The look-up graph: raw columns in, ids out; and the same look-up in numpy, which is its oracle.

Everything that needs strings or keys happens here and stays on the CPU. Names inside the graph hold a slash, which no
column name can, so that a lake may call its columns anything.

Shapes: R requests, M candidates per request, Cr/Cc categorical request/candidate columns, Fr/Fc numeric ones, V places
of a list.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
import pyarrow as pa
from onnx import TensorProto, helper

from tasks.data.contract import LISTS, ColumnConfig, DataConfig, ObjectiveConfig
from tasks.data.lists import NOTHING
from tasks.data.segments import mixed_radix
from tasks.data.vocabulary import MISSING
from tasks.release.external import ExternalFiles
from tasks.release.feedback_inputs import feedback_labels, feedback_specs, joined_nodes, labels_of, together
from tasks.release.histories import encode_history, history_nodes, history_specs
from tasks.release.interface import Example, InputSpec, Objective, Personal
from tasks.release.nodes import COHORT, CONTRIBUTED, ENCODER_KEYS, SEGMENTS, Graph
from tasks.release.tables import ServingTables

I64 = npt.NDArray[np.int64]
Request = Mapping[str, npt.NDArray[np.generic]]
"""Column name to raw values: int64, float32 or strings (object); [R] per request, [R, M] per candidate; of list columns
[R, V] and [R, M, V]."""

OPSETS = {"": 20, "ai.onnx.ml": 4}
IR_VERSION = 10
_TYPES = {"int64": TensorProto.INT64, "string": TensorProto.STRING, "float32": TensorProto.FLOAT}


@dataclass(frozen=True)
class Wires:
    """Names of the tensors between `lookup.onnx` and `score.onnx`, and of the output.

    None where a release has nothing to put there. A name that a column of the lake already bears gets an underscore.
    """

    candidate_ids: str
    slot: str
    user_row: str
    request_ids: str | None
    request_numbers: str | None
    candidate_numbers: str | None
    cohort_item_row: str | None
    scores: str
    request_values: str | None = None
    candidate_values: str | None = None
    request_vectors: str | None = None
    candidate_vectors: str | None = None
    history_ids: str | None = None
    history_labels: str | None = None
    history_gaps: str | None = None
    parent_slot: str | None = None
    feedback_labels: str | None = None

    def between(self, feedback: bool = False) -> dict[str, str]:
        """Role to name of every tensor that `lookup.onnx` gives and `score.onnx` takes.

        Args:
            feedback: of `lookup_feedback.onnx` and `score_feedback.onnx` instead.
        """
        left_out = ("scores",) if feedback else ("scores", *FEEDBACK)
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in left_out}
        return {role: name for role, name in named.items() if name is not None}


def wires(data: DataConfig, tables: ServingTables) -> Wires:
    """The tensor names of a release."""
    taken = {spec.name for spec in input_specs(data, history=tables.history, feedback=tables.feedback)}

    def free(name: str) -> str:
        while name in taken:
            name += "_"
        return name

    return Wires(
        candidate_ids=free("candidate_ids"),
        slot=free("slot"),
        user_row=free("user_row"),
        request_ids=free("request_ids") if data.named("request", "categorical") else None,
        request_numbers=free("request_numbers") if data.named("request", "numeric") else None,
        candidate_numbers=free("candidate_numbers") if data.named("candidate", "numeric") else None,
        cohort_item_row=free("cohort_item_row") if tables.statistics.cohort_columns else None,
        scores=free("scores"),
        **{role: free(role) for role, _ in _beside(data)},
        **{role: free(role) for role in (HISTORY if tables.history else ())},
        **{role: free(role) for role in (FEEDBACK if tables.feedback else ())},
    )


FEEDBACK = ("parent_slot", "feedback_labels")
"""Roles of the tensors that only graphs with feedback have."""
HISTORY = ("history_ids", "history_labels", "history_gaps")
"""Roles of the tensors that hold histories."""


def _beside(data: DataConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Role and columns of every tensor that holds lists side by side."""
    sides: tuple[tuple[Literal["request", "candidate"], Literal["multi", "dense"], str], ...] = (
        *(("request", "multi", "request_values"), ("candidate", "multi", "candidate_values")),
        *(("request", "dense", "request_vectors"), ("candidate", "dense", "candidate_vectors")),
    )
    for side, kind, role in sides:
        if names := data.named(side, kind):
            yield role, names


def input_specs(
    data: DataConfig, examples: Mapping[str, Example] | None = None, history: int = 0, feedback: int = 0
) -> tuple[InputSpec, ...]:
    """What a ranking request holds: user, request columns, item, candidate columns, then the user's past.

    Args:
        data: the contract.
        examples: a value per column, for readers of the manifest.
        history: entries that the network reads of a user's history.
        feedback: most rows of feedback.
    """
    examples = examples or {}
    specs: list[InputSpec] = []
    for name in (data.user, *data.named("request"), data.item, *data.named("candidate")):
        column = data.column(name)
        dtype = "float32" if column.kind in ("numeric", "dense") else column.dtype
        if column.role in ("user", "item"):
            meaning = f"{column.role} key; an unknown one is served by what is known besides"
        elif column.kind == "categorical":
            meaning = f"{column.role} category; an unknown one counts as missing"
        elif column.kind == "multi":
            meaning = (
                f"list of up to {column.width} categories of the {column.role}, in any order, filled up behind its end "
                f"with what stands for a missing value; one may be unknown; a missing list is an empty one"
            )
        elif column.kind == "dense":
            meaning = f"vector of {column.width} numbers of the {column.role}; a missing one is NaN throughout"
        else:
            meaning = f"{column.role} number, as it stands in the lake"
        specs.append(
            InputSpec(
                name=name,
                per="request" if column.role in ("user", "request") else "candidate",
                dtype=dtype,  # type: ignore[arg-type]  # the contract allows int64 and string for what is looked up
                meaning=meaning,
                missing=None if dtype == "float32" else MISSING[dtype],
                example=examples.get(name),
                values=column.width if column.kind in LISTS else None,
            )
        )
    candidates = {spec.name: spec for spec in specs if spec.per == "candidate"}
    past = (*history_specs(data, history, examples), *feedback_specs(data, candidates, feedback, examples))
    return tuple(_hashed(data, spec) for spec in (*specs, *past))


def _hashed(data: DataConfig, spec: InputSpec) -> InputSpec:
    """The input, marked where it holds values of a personal column, of the request or of the user's history."""
    how = data.column(spec.of or spec.name).personal
    return spec if how is None else replace(spec, personal=Personal(how.key_id))


def objectives(data: DataConfig) -> tuple[Objective, ...]:
    """The last axis of the scores; ratings with the bounds that the contract sets to their labels."""
    return tuple(_objective(one, data.column(one.column)) for one in data.objectives)


def _objective(objective: ObjectiveConfig, label: ColumnConfig) -> Objective:
    if objective.kind == "binary":
        return Objective(objective.name, objective.kind)
    return Objective(objective.name, objective.kind, _finite(label.minimum), _finite(label.maximum))


def _finite(bound: float | None) -> float | None:
    """The bound; None for infinity, which bounds nothing and is no JSON."""
    return bound if bound is not None and math.isfinite(bound) else None


def encode(data: DataConfig, tables: ServingTables, request: Request) -> dict[str, npt.NDArray[np.generic]]:
    """The look-up in numpy: role (a field of `Wires`) to array. Absent roles are absent here, too.

    A request that holds feedback is looked up as `lookup_feedback.onnx` does: a user who is refused weights of his own
    has no labels.
    """
    brings = tables.feedback > 0 and feedback_labels(data)[0] in request
    labels = labels_of(data, request) if brings else None
    request = together(data, request) if brings else request
    ids = {name: tables.ids(name, request[name]) for name in data.vocabularies}
    user, item = ids[data.user], ids[data.item]
    encoded: dict[str, npt.NDArray[np.generic]] = {
        "candidate_ids": np.stack([item, *(ids[n] for n in data.named("candidate", "categorical"))], axis=-1),
        "user_row": user,
    }
    if names := data.named("request", "categorical"):
        encoded["request_ids"] = np.stack([ids[name] for name in names], axis=-1)
    for role in ("request", "candidate"):
        if names := data.named("request" if role == "request" else "candidate", "numeric"):
            encoded[f"{role}_numbers"] = np.stack([request[name] for name in names], axis=-1).astype(np.float32)
    for role, names in _beside(data):
        parts = [_listed(tables, name, ids.get(name), request[name]) for name in names]
        encoded[role] = np.concatenate(parts, axis=-1)
    slot = parent = np.zeros_like(user)
    for level in reversed(tables.levels):
        key = mixed_radix([ids[name] for name in level.columns], level.radices, "segments")
        own = _find(level.keys, level.slots, key, -1)
        parent, slot = slot, np.where(own >= 0, own, slot)
    encoded["slot"] = slot
    if labels is not None:
        held = np.isin(key, tables.refused)[:, None, None]
        encoded |= {"parent_slot": parent, "feedback_labels": np.where(held, np.float32(np.nan), labels)}
    statistics = tables.statistics
    if statistics.cohort_columns:
        cohort = [np.broadcast_to(ids[name][:, None], item.shape) for name in statistics.cohort_columns]
        key = mixed_radix([*cohort, item], statistics.cohort_radices, "cohort x item")
        rows = np.arange(1, len(statistics.cohort_item_keys) + 1)
        encoded["cohort_item_row"] = _find(statistics.cohort_item_keys, rows, key, 0)
    return encoded | (encode_history(data, tables, request) if tables.history else {})


def _listed(
    tables: ServingTables, name: str, ids: I64 | None, values: npt.NDArray[np.generic]
) -> npt.NDArray[np.generic]:
    """What the network reads of a list column: ids with nothing behind a list's end, or the vector."""
    if ids is None:
        return values.astype(np.float32)
    dtype = "string" if pa.types.is_string(tables.vocabularies[name].keys.type) else "int64"
    return np.where(values == MISSING[dtype], NOTHING, ids)


def _find(keys: I64, values: I64, wanted: I64, default: int) -> I64:
    if len(keys) == 0:
        return np.full_like(wanted, default)
    order = np.argsort(keys)
    at = np.minimum(np.searchsorted(keys[order], wanted), len(keys) - 1)
    return np.where(keys[order][at] == wanted, values[order][at], default)


def lookup_graph(
    data: DataConfig,
    tables: ServingTables,
    names: Wires,
    files: ExternalFiles | None = None,
    encoder_keys: int = ENCODER_KEYS,
    feedback: bool = False,
) -> onnx.ModelProto:
    """Build `lookup.onnx`, or `lookup_feedback.onnx`.

    Args:
        data: the contract: the inputs.
        tables: vocabularies, cohort keys, slots and refused users; few keys become attributes of LabelEncoder nodes.
        names: what the outputs are called.
        files: get tables of many keys, cut by how often they change; None keeps all in the graph.
        encoder_keys: many are more than these.
        feedback: whether requests bring feedback; its rows then stand before the candidates.
    """
    graph = Graph(files, encoder_keys)
    specs = input_specs(data, history=tables.history, feedback=tables.feedback if feedback else 0)
    read = joined_nodes(data, graph) if feedback else {}
    ids = {
        name: graph.keys_of(
            tables, name, read.get(name, name), f"lookup/ids/{name}", listed=data.column(name).kind == "multi"
        )
        for name in data.vocabularies
        if not tables.history or name not in (data.item, *data.named("candidate", "categorical"))
    }
    if tables.history:
        ids |= history_nodes(data, tables, graph, [names.between()[role] for role in HISTORY])
    user, item = ids[data.user], ids[data.item]
    graph.node("Identity", [user], names.user_row)
    graph.stack([item, *(ids[n] for n in data.named("candidate", "categorical"))], names.candidate_ids)
    if names.request_ids:
        graph.stack([ids[name] for name in data.named("request", "categorical")], names.request_ids)
    if names.request_numbers:
        graph.stack(data.named("request", "numeric"), names.request_numbers)
    if names.candidate_numbers:
        graph.stack([read.get(name, name) for name in data.named("candidate", "numeric")], names.candidate_numbers)
    for role, columns in _beside(data):
        parts = [ids.get(name, read.get(name, name)) for name in columns]
        graph.node("Concat", parts, names.between()[role], axis=-1)
    slot = parent = graph.node("Mul", [user, graph.number(0)], "lookup/base")
    for position, level in reversed(list(enumerate(tables.levels))):
        key = graph.mixed_radix([ids[name] for name in level.columns], level.radices, f"lookup/level{position}")
        own = graph.look_up(key, f"lookup/own{position}", level.keys, level.slots, -1, SEGMENTS, f"level{position}")
        has = graph.node("GreaterOrEqual", [own, graph.number(0)], f"lookup/has{position}")
        parent, slot = slot, graph.node("Where", [has, own, slot], f"lookup/slot{position}")
    graph.node("Identity", [slot], names.slot)
    between = names.between(feedback)
    if feedback:
        graph.node("Identity", [parent], between["parent_slot"])
        given = "lookup/labels" if len(tables.refused) else between["feedback_labels"]
        graph.stack(feedback_labels(data), given)
        if len(tables.refused):
            one = np.ones(len(tables.refused), np.int64)
            refused = graph.look_up(key, "lookup/refused", tables.refused, one, 0, SEGMENTS, "refused")
            graph.without(given, refused, between["feedback_labels"])
    statistics = tables.statistics
    if names.cohort_item_row:
        cohort = graph.mixed_radix(
            [ids[n] for n in statistics.cohort_columns], statistics.cohort_radices[:-1], "lookup/cohort"
        )
        column = graph.node("Unsqueeze", [cohort, graph.number(-1, axis=True)], "lookup/cohort/column")
        scaled = graph.node("Mul", [column, graph.number(statistics.cohort_radices[-1])], "lookup/cohort/scaled")
        key = graph.node("Add", [scaled, item], "lookup/cohort/key")
        rows = np.arange(1, len(statistics.cohort_item_keys) + 1)
        graph.look_up(key, names.cohort_item_row, statistics.cohort_item_keys, rows, 0, COHORT, "cohort_item")
    shapes: dict[str, tuple[int, list[str | int]]] = {
        "candidate_ids": (
            TensorProto.INT64,
            ["requests", "candidates", 1 + len(data.named("candidate", "categorical"))],
        ),
        "slot": (TensorProto.INT64, ["requests"]),
        "user_row": (TensorProto.INT64, ["requests"]),
        "request_ids": (TensorProto.INT64, ["requests", len(data.named("request", "categorical"))]),
        "request_numbers": (TensorProto.FLOAT, ["requests", len(data.named("request", "numeric"))]),
        "candidate_numbers": (TensorProto.FLOAT, ["requests", "candidates", len(data.named("candidate", "numeric"))]),
        "cohort_item_row": (TensorProto.INT64, ["requests", "candidates"]),
    }
    for role, columns in _beside(data):
        axes: list[str | int] = ["requests"] if role.startswith("request") else ["requests", "candidates"]
        dtype = TensorProto.INT64 if role.endswith("values") else TensorProto.FLOAT
        shapes[role] = dtype, [*axes, sum(data.column(name).width for name in columns)]
    entries: list[str | int] = ["requests", tables.history]
    shapes["history_ids"] = TensorProto.INT64, [*entries, 1 + len(data.named("candidate", "categorical"))]
    shapes["history_labels"], shapes["history_gaps"] = (TensorProto.FLOAT, entries), (TensorProto.INT64, entries)
    shapes["parent_slot"] = TensorProto.INT64, ["requests"]
    shapes["feedback_labels"] = TensorProto.FLOAT, ["requests", "feedback", len(data.objectives)]
    if feedback:
        for role, (kind, axes) in shapes.items():
            shapes[role] = kind, ["rows" if axis == "candidates" else axis for axis in axes]
    inputs = [helper.make_tensor_value_info(spec.name, _TYPES[spec.dtype], list(spec.shape)) for spec in specs]
    outputs = [helper.make_tensor_value_info(name, *shapes[role]) for role, name in between.items()]
    return as_model(helper.make_graph(graph.nodes, "lookup", inputs, outputs, list(graph.constants.values())))


def as_model(graph: onnx.GraphProto) -> onnx.ModelProto:
    """Wrap a graph with the versions that every file of a release states."""
    used = {node.domain for node in graph.node}
    versions = OPSETS | ({CONTRIBUTED: 1} if CONTRIBUTED in used else {})
    opsets = [helper.make_opsetid(domain, version) for domain, version in versions.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="nightrank")
