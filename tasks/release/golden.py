"""Golden requests: what a release must answer, and the proof that its graphs say what the network says.

Drawn from real rows, then made difficult: unknown keys, missing values, mixed segments, several shapes. A reader asks
them before it serves a release.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import pyarrow as pa
import torch
from torch import Tensor

from tasks.data.columns import microseconds
from tasks.data.contract import DataConfig
from tasks.data.lists import padded, values_of
from tasks.data.vocabulary import MISSING
from tasks.errors import ParityBroken
from tasks.learning.networks import Ranker
from tasks.learning.solvers import solve
from tasks.release.feedback_inputs import feedback_labels
from tasks.release.histories import history_specs
from tasks.release.interface import Example, InputSpec, Scalar
from tasks.release.lookups import Request, encode, input_specs, wires
from tasks.release.scorer import Scorer, Solving
from tasks.release.strict_json import SCHEMA_VERSION, canonical
from tasks.release.tables import ServingTables

TEN_DAYS = 10 * 86_400_000_000
"""Microseconds; how long after the newest entry of a history a golden request is asked at most."""
F32 = npt.NDArray[np.float32]
TOLERANCE = 1e-5
"""Largest difference between the network's scores and a graph's, absolute for probabilities, relative to 1 + the
network's value for ratings."""
FEEDBACK_TOLERANCE = 1e-4
"""The same of requests with feedback, whose scores come out of a solve, against one in double precision."""
SHAPES = ((1, 1), (1, 20), (2, 1), (7, 5), (16, 9))
"""Requests x candidates of the golden requests; each comes as drawn, and once with difficulties."""
FEEDBACK_SHAPES = ((1, 5), (4, 3))
"""The same of golden requests with feedback."""
NEVER_SEEN = {"int64": -(2**63) + 1, "string": "\x02never seen\x03"}
"""Keys that no lake holds."""


@dataclass(frozen=True)
class Golden:
    """One golden request and the scores that the network gives to it.

    Attributes:
        inputs: raw columns.
        scores: expected scores, float32 [R, M, K].
    """

    inputs: Request
    scores: F32


@dataclass(frozen=True)
class Parity:
    """How closely the graphs agree with the network.

    Attributes:
        requests: golden requests asked.
        scores: numbers compared per graph.
        model: largest difference of `model.onnx`.
        split: largest difference of `lookup.onnx` followed by `score.onnx`.
        tolerance: the limit that both kept.
        feedback: largest difference of the graphs with feedback, of both kinds; None where there are none.
        variants: largest difference of each variant of the score graph; None where an answer is not finite.
    """

    requests: int
    scores: int
    model: float
    split: float
    tolerance: float = TOLERANCE
    feedback: float | None = None
    variants: Mapping[str, float | None] = field(default_factory=dict)


def draw_requests(
    data: DataConfig, rows: pa.Table, seed: int = 0, history: int = 0, feedback: int = 0
) -> tuple[dict[str, npt.NDArray[np.generic]], ...]:
    """Draw requests from real rows.

    Args:
        data: the contract.
        rows: clean interactions with at least one row; request columns and candidate columns are drawn apart.
        seed: seed of the draw.
        history: entries of a user's history; they are rows drawn apart, from none to all of them.
        feedback: most rows of feedback; they are drawn likewise.

    Returns:
        For each of `SHAPES`, and after them of `FEEDBACK_SHAPES` where there is feedback, one request as drawn, and one
        in which about a third of the keys are unknown and about a third of the other values are missing; so are lists
        and vectors, and of the lists' values some are unknown.

    Raises:
        ValueError: there are no rows.
    """
    if rows.num_rows == 0:
        raise ValueError("golden requests need at least one row")
    random = np.random.default_rng(seed)
    specs = input_specs(data)
    past = history_specs(data, history, {})
    given = input_specs(data, feedback=feedback)[len(specs) :]
    drawn = []
    for requests, candidates, brings in (
        *((*shape, False) for shape in SHAPES),
        *((*shape, True) for shape in FEEDBACK_SHAPES if feedback),
    ):
        of_request = pa.array(random.integers(rows.num_rows, size=requests))
        of_candidate = pa.array(random.integers(rows.num_rows, size=requests * candidates))
        request = {}
        for spec in specs:
            values = rows[spec.name].take(of_request if spec.per == "request" else of_candidate)
            shape = (requests,) if spec.per == "request" else (requests, candidates)
            raw = _raw(values, spec)
            request[spec.name] = raw.reshape(*shape, *raw.shape[1:])
        if past:
            request |= _past(rows, past, requests, random)
        if brings:
            request |= _feedback(rows, given, requests, random)
        asked = [spec for spec in (*specs, *past, *given) if spec.name in request]
        drawn += [request, {spec.name: _difficult(request[spec.name], spec, data, random) for spec in asked}]
    return tuple(drawn)


def _feedback(rows: pa.Table, specs: Sequence[InputSpec], requests: int, random: np.random.Generator) -> Request:
    """Feedback of random rows, the first request's as long as it may be, and of several the last without any."""
    most = specs[0].rows or 0
    at = random.integers(rows.num_rows, size=(requests, most))
    lengths = np.r_[most, random.integers(1, most + 1, size=requests - 1)]
    lengths[-1] = 0 if requests > 1 else most
    found: dict[str, npt.NDArray[np.generic]] = {}
    for spec in specs:
        assert spec.of is not None
        raw = _raw(rows[spec.of].take(pa.array(at.ravel())), spec)
        found[spec.name] = _without(raw.reshape(requests, most, *raw.shape[1:]), spec, lengths)
    return found


def _without(
    values: npt.NDArray[np.generic], spec: InputSpec, lengths: npt.NDArray[np.int64]
) -> npt.NDArray[np.generic]:
    """Rows of feedback [R, F] or [R, F, V], and what is missing in place of those behind each request's last."""
    there = np.arange(values.shape[1]) < lengths[:, None]
    fill = np.nan if spec.missing is None else spec.missing
    return np.where(there if values.ndim == 2 else there[..., None], values, np.array(fill, values.dtype))


def _past(rows: pa.Table, specs: Sequence[InputSpec], requests: int, random: np.random.Generator) -> Request:
    """Histories of random rows, newest first, the first as long as it may be and the last empty; asked a little later.

    Args:
        rows: clean interactions.
        specs: of the history; the first is when it is asked, the last the entries' times.
        requests: how many.
        random: draws.
    """
    asked, *entries = specs
    length = entries[0].values or 0
    at = random.integers(rows.num_rows, size=(requests, length))
    lengths = np.r_[length, random.integers(length + 1, size=requests - 1)]
    lengths[-1] = 0 if requests > 1 else length
    time = microseconds(rows[asked.name])
    at = np.take_along_axis(at, np.argsort(-time[at], axis=1, kind="stable"), axis=1)
    past: dict[str, npt.NDArray[np.generic]] = {
        asked.name: time[at].max(axis=1) + random.integers(TEN_DAYS, size=requests)
    }
    for spec in entries:
        assert spec.of is not None
        fill = np.nan if spec.missing is None else spec.missing
        raw = time if spec.of == asked.name else _single(rows[spec.of], spec)
        past[spec.name] = np.where(np.arange(length) < lengths[:, None], raw[at], np.array(fill, raw.dtype))
    return past


def _raw(values: pa.ChunkedArray, spec: InputSpec) -> npt.NDArray[np.generic]:
    if spec.values is not None:
        inside, lengths = values_of(values)
        return padded(_single(inside, spec), lengths, spec.values, np.nan if spec.missing is None else spec.missing)
    return _single(values, spec)


def _single(values: pa.Array | pa.ChunkedArray, spec: InputSpec) -> npt.NDArray[np.generic]:
    if spec.dtype == "float32":
        return np.asarray(values.cast(pa.float64()).to_numpy(), np.float64).astype(np.float32)
    if spec.dtype == "int64":
        return np.asarray(values.cast(pa.int64()).fill_null(MISSING["int64"]).to_numpy(), np.int64)
    return np.array(values.cast(pa.string()).fill_null(MISSING["string"]).to_pylist(), object)


def _difficult(
    values: npt.NDArray[np.generic], spec: InputSpec, data: DataConfig, random: np.random.Generator
) -> npt.NDArray[np.generic]:
    if spec.values is not None and not spec.recalls:
        hit = np.broadcast_to(random.random((*values.shape[:-1], 1)) < 1 / 3, values.shape)
    else:
        hit = random.random(values.shape) < 1 / 3
    if spec.dtype == "float32":
        return np.where(hit, np.float32(np.nan), values)
    if data.time in (spec.name, spec.of):  # no look-up: a time is missing, or it is one
        return np.where(hit, np.array(spec.missing, values.dtype), values)
    is_key = spec.name in (data.user, data.item) or (spec.per == "feedback" and spec.of == data.item)
    unknown = hit if is_key else random.random(values.shape) < 1 / 6
    never, missing = np.array(NEVER_SEEN[spec.dtype], values.dtype), np.array(MISSING[spec.dtype], values.dtype)
    if spec.values is not None:
        hit = hit & (spec.of != data.item)  # an entry without its item would be none
        return np.where(hit | (values == missing), missing, np.where(unknown, never, values))
    return np.where(unknown, never, np.where(hit, missing, values))


class _Exact(Scorer):
    """A scorer that solves feedback as a bank is solved, by factors, and in double precision."""

    def solved(self, logits: Tensor, features: Tensor, labels: Tensor, parent: Tensor, own: Tensor) -> Tensor:
        """Weights that serve each request, as of a scorer."""
        assert self.solving is not None
        rows = (features, logits + features @ parent.mT, labels, torch.ones_like(logits[..., 0]), self.precision)
        double = [part.double() for part in rows]
        exact = solve(double[0], double[1], double[2], double[3], double[4], self.shape.kinds, self.solving.steps)
        return torch.where((~labels.isnan()).any(dim=(1, 2))[:, None, None], parent + exact.float(), own)


def brings_feedback(data: DataConfig, request: Request) -> bool:
    """Whether a request is one for the graphs with feedback."""
    return feedback_labels(data)[0] in request


def reference_scores(
    network: Ranker,
    bank: F32,
    tables: ServingTables,
    data: DataConfig,
    request: Request,
    solving: Solving | None = None,
) -> F32:
    """Scores [R, M, K] of the network itself, with the look-up done in numpy, and feedback solved in double."""
    scorer = _Exact(network, bank, tables.statistics, solving if brings_feedback(data, request) else None)
    was_training = network.training
    scorer.eval()
    encoded = {role: torch.from_numpy(np.array(values)) for role, values in encode(data, tables, request).items()}
    with torch.no_grad():
        scores: F32 = scorer(**encoded).numpy()
    network.train(was_training)
    return scores


def make_golden(
    network: Ranker,
    bank: F32,
    tables: ServingTables,
    data: DataConfig,
    requests: Sequence[Request],
    solving: Solving | None = None,
) -> tuple[Golden, ...]:
    """Golden requests with the network's answers.

    Raises:
        ParityBroken: the network itself gives scores that are not finite.
    """
    golden = tuple(Golden(one, reference_scores(network, bank, tables, data, one, solving)) for one in requests)
    for position, one in enumerate(golden):
        if not np.isfinite(one.scores).all():
            raise ParityBroken(
                f"the network gives {int((~np.isfinite(one.scores)).sum())} scores that are not finite to golden "
                f"request {position}; look at the training curve and at the inputs' ranges"
            )
    return golden


def write_golden(data: DataConfig, golden: Sequence[Golden], folder: Path, history: int = 0) -> None:
    """Write `golden.json`: per request its columns and scores as lists, flat, in row-major order; NaN is null.

    A request with feedback says how many rows of it there are.
    """
    written = []
    for one in golden:
        brings = brings_feedback(data, one.inputs)
        rows = one.inputs[feedback_labels(data)[0]].shape[1] if brings else 0
        specs = input_specs(data, history=history, feedback=rows)
        written.append(
            {
                "inputs": {spec.name: _listed(one.inputs[spec.name], spec) for spec in specs},
                "shape": list(one.scores.shape),
                "scores": one.scores.ravel().astype(float).tolist(),
                **({"feedback": rows} if brings else {}),
            }
        )
    (folder / "golden.json").write_bytes(canonical({"schema_version": SCHEMA_VERSION, "requests": written}))


def _listed(values: npt.NDArray[np.generic], spec: InputSpec) -> list[object]:
    listed = values.ravel().tolist()
    if spec.dtype != "float32":
        return listed
    return [None if value != value else value for value in listed]


def check_parity(data: DataConfig, tables: ServingTables, golden: Sequence[Golden], folder: Path) -> Parity:
    """Ask the exported graphs the golden requests, on the CPU.

    Raises:
        ParityBroken: `model.onnx`, or `lookup.onnx` and `score.onnx`, differ from the network by more than `TOLERANCE`,
            or those with feedback by more than `FEEDBACK_TOLERANCE`.
    """
    plain = [one for one in golden if not brings_feedback(data, one.inputs)]
    model, split = _checked(data, tables, plain, folder, "", TOLERANCE)
    with_feedback = [one for one in golden if brings_feedback(data, one.inputs)]
    feedback = max(_checked(data, tables, with_feedback, folder, "_feedback", FEEDBACK_TOLERANCE), default=None)
    total = sum(one.scores.size for one in golden)
    return Parity(len(golden), total, model, split, feedback=feedback)


def _checked(
    data: DataConfig, tables: ServingTables, golden: Sequence[Golden], folder: Path, suffix: str, tolerance: float
) -> tuple[float, ...]:
    """How far the graph in one and its two halves are from the network at most; nothing where nobody asks."""
    if not golden:
        return ()
    names = wires(data, tables)
    model, lookup, score = (cpu_session(folder / f"{name}{suffix}.onnx") for name in ("model", "lookup", "score"))
    between = list(names.between(bool(suffix)).values())
    worst = {f"model{suffix}.onnx": 0.0, f"lookup{suffix}.onnx + score{suffix}.onnx": 0.0}
    for position, one in enumerate(golden):
        found = dict(zip(between, lookup.run(between, one.inputs), strict=True))
        answers = (model.run([names.scores], one.inputs)[0], score.run([names.scores], found)[0])
        for graph, answer in zip(worst, answers, strict=True):
            apart = difference(data, one.scores, np.asarray(answer, np.float32))
            worst[graph] = max(worst[graph], apart)
            if not apart <= tolerance:
                raise ParityBroken(
                    f"{graph} differs from the network by {apart:.3g} on golden request {position} "
                    f"of {len(golden)} (shape {list(one.scores.shape)}), limit {tolerance:g}; nothing was published"
                )
    return tuple(worst.values())


def variant_parity(
    data: DataConfig, tables: ServingTables, golden: Sequence[Golden], folder: Path, graph: str
) -> float | None:
    """Largest difference of a variant's answers to the golden requests, on the CPU; None where one is not finite.

    Those with feedback are answered by graphs of their own, in fp32.
    """
    names = wires(data, tables)
    lookup, score = cpu_session(folder / "lookup.onnx"), cpu_session(folder / graph)
    between = list(names.between().values())
    worst = 0.0
    for one in golden:
        if brings_feedback(data, one.inputs):
            continue
        found = dict(zip(between, lookup.run(between, one.inputs), strict=True))
        worst = max(worst, difference(data, one.scores, np.asarray(score.run([names.scores], found)[0], np.float32)))
    return worst if np.isfinite(worst) else None


def difference(data: DataConfig, expected: F32, answer: F32) -> float:
    """Largest difference, of a rating relative to 1 + its value; infinite where a shape or a number is wrong."""
    if expected.shape != answer.shape or not np.isfinite(answer).all():
        return float("inf")
    rating = np.array([objective.kind == "rating" for objective in data.objectives])
    scale = np.where(rating, 1.0 + np.abs(expected), 1.0)
    return float(np.max(np.abs(expected - answer) / scale, initial=0.0))


def cpu_session(path: Path) -> onnxruntime.InferenceSession:
    """A graph on the CPU, as where it is served."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def examples(data: DataConfig, golden: Golden, history: int = 0, feedback: int = 0) -> Mapping[str, Example]:
    """The first value of every column of a golden request, for the manifest; of a list column its first list."""
    found: dict[str, Example] = {}
    for spec in input_specs(data, history=history, feedback=feedback):
        values = golden.inputs[spec.name]
        if spec.values is None:
            found[spec.name] = _plain(values.ravel()[0])
            continue
        listed = [_plain(one) for one in values.reshape(-1, spec.values)[0]]
        given = listed if spec.recalls else [one for one in listed if one != spec.missing]
        found[spec.name] = tuple(given) if given or spec.missing is not None else None
    return found


def _plain(value: object) -> Scalar:
    """A value as JSON can say it."""
    plain: Scalar = value.item() if isinstance(value, np.generic) else value  # type: ignore[assignment]
    return None if plain != plain else plain
