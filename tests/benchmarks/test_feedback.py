"""What feedback in a request costs, and its solver beside others that a graph could hold; nothing here asserts a time.

    OMP_NUM_THREADS=1 python -m pytest tests/benchmarks/test_feedback.py -q

Tracing takes minutes. Both sides of a ratio run in turn, round by round, in one process on one thread; a ratio is that
of the medians, with the quartiles of the rounds' ratios in brackets.
"""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from tasks.learning import feedback
from tasks.learning.positive import inverse
from tasks.learning.ranker_config import RankerConfig
from tasks.learning.solvers import ObjectiveKind, bent_by, by_rows, newton, solve
from tasks.release.feedback_inputs import feedback_columns, feedback_labels
from tasks.release.golden import FEEDBACK_TOLERANCE, check_parity, draw_requests, make_golden
from tasks.release.graphs import export
from tasks.release.lookups import Request, input_specs
from tasks.release.scorer import Solving, trace
from tests.benchmarks.conftest import Row
from tests.benchmarks.served import served_parts
from tests.benchmarks.test_serving import in_turn, ratio

MOST, STEPS, CANDIDATES = 128, 2, 200
CONFIG = RankerConfig(features=22)
"""With it an adapter has 32 numbers per objective, as the demonstration's."""
Solver = Callable[[Tensor, Tensor], Tensor]
"""Systems ``[..., N, N]`` and right sides ``[..., N]`` to solutions."""


@dataclass(frozen=True)
class Fed:
    """Sessions of the two graphs over one set of weights, and a request."""

    plain: onnxruntime.InferenceSession
    solving: onnxruntime.InferenceSession
    request: Request
    """Of one user, with as many rows of feedback as there may be."""
    asked: tuple[str, ...]
    """Inputs of the plain graph."""
    given: tuple[str, ...]
    """Inputs that hold feedback."""
    told: str
    """Sizes, and seconds of tracing and loading."""

    def bringing(self, rows: int) -> Request:
        """The request with its first rows of feedback."""
        return {name: one[:, :rows] if name in self.given else one for name, one in self.request.items()}


def session(graph: Path | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def fed(tmp_path_factory: pytest.TempPathFactory) -> Fed:
    """A release of 1,000 users with weights of their own, among 2,000, and 3,000 items; its graphs proved right."""
    folder = tmp_path_factory.mktemp("fed")
    data, network, bank, tables, rows = served_parts(config=CONFIG)
    assert network.width == 32
    tables = replace(tables, feedback=MOST)
    solving = Solving(MOST, STEPS, np.full((len(data.objectives), network.width), 4.0, np.float32))
    began = time.perf_counter()
    export(network, bank, tables, data, folder, trace, solving=solving)
    told = [f"traced in {time.perf_counter() - began:.0f} s"]
    golden = make_golden(network, bank, tables, data, draw_requests(data, rows, feedback=MOST), solving)
    parity = check_parity(data, tables, golden, folder)
    assert parity.feedback is not None
    assert parity.feedback < FEEDBACK_TOLERANCE
    sessions = []
    for name in ("model.onnx", "model_feedback.onnx"):
        began = time.perf_counter()
        sessions.append(session(folder / name))
        size = (folder / name).stat().st_size / 1e3
        told.append(f"{name} {size:.0f} kB, loaded in {time.perf_counter() - began:.2f} s")
    request = dict(next(one.inputs for one in golden if feedback_labels(data)[0] in one.inputs))
    for spec in input_specs(data):
        if spec.per == "candidate":
            request[spec.name] = np.resize(request[spec.name], (1, CANDIDATES))
    for name in feedback_labels(data):
        request[name] = np.nan_to_num(request[name], nan=1.0)
    given = (*feedback_columns(data).values(), *feedback_labels(data))
    asked = tuple(spec.name for spec in input_specs(data))
    return Fed(*sessions, request, asked, given, f"{'; '.join(told)}; parity {parity.feedback:.0e}")


def test_one_request_with_feedback_beside_one_without(benchmark, fed: Fed, row: Row):
    """All in turn: the graph without feedback, and the one with it by the number of rows."""
    counts = (0, 5, 20, 50, MOST)
    bare = {name: fed.request[name] for name in fed.asked}
    brought = [fed.bringing(count) for count in counts]
    plain = fed.plain.run(None, bare)[0]
    np.testing.assert_allclose(fed.solving.run(None, brought[0])[0], plain, atol=1e-5, rtol=1e-5)
    assert all(np.abs(fed.solving.run(None, one)[0] - plain).max() > 1e-2 for one in brought[1:])
    works = [lambda: fed.plain.run(None, bare)]
    works += [lambda one=one: fed.solving.run(None, one) for one in brought]
    found: list[np.ndarray] = []
    benchmark.group = "feedback"
    benchmark.pedantic(lambda: found.append(in_turn(works, 400)), rounds=1)
    without, *others = found[0]

    def shown(times: np.ndarray) -> str:
        return f"{np.median(times) * 1e3:.2f} ms (fastest tenth {np.percentile(times, 10) * 1e3:.2f})"

    for count, times in zip(counts, others, strict=True):
        what = f"1 request x {CANDIDATES} candidates, {count} rows of feedback: beside the graph without"
        row(what, "cpu", shown(times), shown(without), f"{ratio(without, times)} as long")
    row(f"the two graphs, N = {MOST}, 32 adapter numbers, {STEPS} steps", "cpu", "", "", fed.told)


def conjugate(turns: float) -> Solver:
    """Conjugate gradients with Jacobi's scaling, after a multiple of N turns."""

    def solved(systems: Tensor, right: Tensor) -> Tensor:
        diagonal = systems.diagonal(dim1=-2, dim2=-1)
        solution, left = torch.zeros_like(right), right
        way = scaled = left / diagonal
        gain = (left * scaled).sum(-1, keepdim=True)
        for _ in range(round(turns * systems.shape[-1])):
            bent = (systems @ way[..., None])[..., 0]
            length = gain / (way * bent).sum(-1, keepdim=True).clamp_min(1e-30)
            solution, left = solution + length * way, left - length * bent
            scaled = left / diagonal
            before, gain = gain, (left * scaled).sum(-1, keepdim=True)
            way = scaled + gain / before.clamp_min(1e-30) * way
        return solution

    return solved


def schulz(systems: Tensor) -> Tensor:
    """Newton's and Schulz's inverse after 22 turns of two products, from a start that is certain to converge."""
    scale = systems.diagonal(dim1=-2, dim2=-1).rsqrt()
    scaled = scale[..., :, None] * systems * scale[..., None, :]
    unit = torch.eye(systems.shape[-1], dtype=systems.dtype)
    back = unit / scaled.abs().sum(-1).amax(-1)[..., None, None]
    for _ in range(22):
        back = back @ (2 * unit - scaled @ back)
    return scale[..., :, None] * back * scale[..., None, :]


def steps_by(solver: Solver) -> Callable[..., Tensor]:
    """Newton steps of the bank's form whose systems another solver solves, without a correction."""

    def solved(
        features: Tensor, offsets: Tensor, labels: Tensor, precision: Tensor, kinds: Sequence[ObjectiveKind], steps: int
    ) -> Tensor:
        rows = (features, offsets, labels, torch.ones_like(offsets[..., 0]), precision, kinds)
        solution = torch.zeros_like(precision).expand(features.shape[0], *precision.shape)
        for _ in range(steps):
            bent = bent_by(features, solution)
            if features.shape[1] < features.shape[2]:
                root, target, spread, system = by_rows(*rows, bent)
                solution = torch.einsum("bks,bksd->bkd", root * solver(system, target), spread)
            else:
                slope, hessian = newton(*rows, solution, bent)
                solution = solution + solver(hessian, slope)
        return solution

    return solved


def corrected_schulz(*rows: object) -> Tensor:
    """The product's steps, correction and all, with another inverse."""
    with patch.object(feedback, "inverse", schulz):
        return feedback._solved(*rows)  # type: ignore[arg-type]


SOLVERS: dict[str, Callable[..., Tensor]] = {
    "elimination": feedback._solved,
    "elimination once": steps_by(lambda systems, right: (inverse(systems) @ right[..., None])[..., 0]),
    "Schulz": corrected_schulz,
    "CG n": steps_by(conjugate(1)),
    "CG 1.5 n": steps_by(conjugate(1.5)),
    "CG 2 n": steps_by(conjugate(2)),
}
"""Elimination is the product's own: each step is corrected once. So is Schulz's; the others take their first answer."""


def drawn(alike: str, count: int, width: int, random: torch.Generator) -> Tensor:
    """Rows of 64 segments ``[64, count, width]``: unlike each other, near one row, or along six directions."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    if alike == "near one row":
        return normal(64, 1, width) + 0.1 * normal(64, count, width)
    if alike == "along six directions":
        return normal(64, count, 6) @ normal(64, 6, width) + 0.03 * normal(64, count, width)
    return normal(64, count, width)


@pytest.mark.parametrize(("count", "width", "held"), [(50, 32, 0.01), (20, 32, 0.01), (50, 64, 0.01), (50, 64, 4.0)])
@pytest.mark.parametrize("alike", ["unlike", "near one row", "along six directions"])
def test_how_far_solvers_are_from_double(alike: str, count: int, width: int, held: float, row: Row):
    """Largest error of a probability of 100 further rows, over 64 random segments."""
    random = torch.Generator().manual_seed(0)
    features, further = drawn(alike, count + 100, width, random).split([count, 100], dim=1)
    labels = torch.bernoulli(torch.full((64, count, 1), 0.5), generator=random)
    offsets, ones = 2 * torch.randn(labels.shape, generator=random), torch.ones(64, count)
    precision, kinds = torch.full((1, width), held), ["binary"]

    def chances(weights: Tensor) -> Tensor:
        return torch.sigmoid(bent_by(further.double(), weights.double()))

    double = [part.double() for part in (features, offsets, labels, ones, precision)]
    truth = chances(solve(*double, kinds, STEPS))  # type: ignore[arg-type, misc]
    found = {name: by(features, offsets, labels, precision, kinds, STEPS) for name, by in SOLVERS.items()}
    found["Cholesky"] = solve(features, offsets, labels, ones, precision, kinds, STEPS)
    apart = {name: (chances(weights) - truth).abs().max().item() for name, weights in found.items()}
    own = apart.pop("elimination")
    row(
        f"{count} rows x {width} features, {alike}, precision {held}: largest error of a probability",
        *("cpu", f"{own:.0e}", "; ".join(f"{name} {error:.0e}" for name, error in apart.items()), ""),
    )


class Alone(nn.Module):
    """A solver as a graph of its own."""

    def __init__(self, by: Callable[..., Tensor]) -> None:
        super().__init__()
        self.by = by

    def forward(self, features: Tensor, offsets: Tensor, labels: Tensor, precision: Tensor) -> Tensor:
        """Weights of one segment."""
        return self.by(features, offsets, labels, precision, ["binary"], STEPS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("requests", "unknowns"), [(1, 32), (1, 64), (16, 32)])
def test_elimination_beside_other_solvers_in_a_graph(benchmark, row: Row, requests: int, unknowns: int):
    """128 rows, two Newton steps, all in turn in onnxruntime."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(requests, MOST, unknowns, generator=random)
    labels = torch.bernoulli(torch.full((requests, MOST, 1), 0.5), generator=random)
    inputs = (features, torch.zeros_like(labels), labels, torch.full((1, unknowns), 4.0))
    given = dict(zip(("features", "offsets", "labels", "precision"), (one.numpy() for one in inputs), strict=True))
    expected = solve(*inputs[:3], torch.ones(requests, MOST), inputs[3], ["binary"], STEPS).numpy()
    graphs, sizes = {}, {}
    for name in ("elimination", "elimination once", "Schulz", "CG n", "CG 1.5 n"):
        kept = io.BytesIO()
        program = torch.onnx.export(Alone(SOLVERS[name]).eval(), inputs, dynamo=True, opset_version=20, verbose=False)
        program.save(kept)
        graphs[name], sizes[name] = session(kept.getvalue()), len(program.model_proto.graph.node)
        np.testing.assert_allclose(graphs[name].run(None, given)[0], expected, atol=1e-4, rtol=1e-3)
    works = [lambda one=one: one.run(None, given) for one in graphs.values()]
    found: list[np.ndarray] = []
    benchmark.group = "feedback"
    benchmark.pedantic(lambda: found.append(in_turn(works, 400)), rounds=1)
    own, *others = found[0]
    for (name, size), times in zip(list(sizes.items())[1:], others, strict=True):
        row(
            f"{requests} requests, {STEPS} Newton steps of {unknowns} unknowns in a graph: elimination beside {name}",
            *("cpu", f"{np.median(own) * 1e3:.2f} ms, {sizes['elimination']} nodes"),
            *(f"{np.median(times) * 1e3:.2f} ms, {size} nodes", ratio(own, times)),
        )
