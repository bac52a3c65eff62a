"""What adaptation costs beside plain loops over segments; nothing here asserts a time.

    python -m pytest tests/benchmarks/test_adaptation.py -q

Both sides of a ratio run in turn, round by round, in one process on one thread, so that other work on the machine hits
both. A ratio is the median of the rounds' ratios, with the least and the greatest in brackets; times are medians, and
rates those of the fastest round.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from torch import Tensor

from tasks.learning.adapters import Adaptation, AdapterConfig, Precisions
from tasks.learning.bank import Bank, fill_bank
from tasks.learning.episodes import draw, row_loss, score_visits
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material, Visits, visits_of
from tasks.learning.networks import Ranker
from tasks.learning.solvers import solve
from tests.benchmarks.conftest import Row
from tests.benchmarks.many_segments import (
    ADAPTATION,
    ADAPTER,
    CLICK,
    ITEMS,
    NUMBERS,
    USERS_ONLY,
    default_ranker,
    looped_copies,
    looped_descent,
    looped_loss,
    looped_ridge,
    mixed_sizes,
    ranker_alone,
    segments,
)
from tests.benchmarks.plain_loops import (
    Own,
    begin_of,
    form_of,
    head,
    looped_maml,
    looped_match,
    looped_meta_loss,
    looped_steps,
)
from tests.learning.small_rows import FIRST, ladder_of, table

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")),
]
ROOT = Path(__file__).parents[2]
SEGMENTS, EPISODES = 4096, 256
STEPPING = {
    "gradient": AdapterConfig(kind="gradient"),
    "film": AdapterConfig(kind="film"),
    "lora": AdapterConfig(kind="lora"),
    "dense": AdapterConfig(kind="gradient", bends="dense"),
}
MATCHING = AdapterConfig(kind="matching")


def seconds_of(work: Callable[[], object], device: str) -> float:
    """How long some work takes; a CUDA device has finished it, and nothing before it is still running there."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


class Beside:
    """Times of some work and of what it is compared with, run in turn.

    Before it is timed the work has just been done once: a loop's turns find in the processor's caches what the turn
    before them left there, and a night's steps and shards follow one another as well.
    """

    def __init__(self, benchmark, work, others, device: str, rounds: int) -> None:
        self.own: list[float] = []
        self.others: list[list[float]] = [[] for _ in others]

        def before() -> None:
            for times, other in zip(self.others, others, strict=True):
                times.append(seconds_of(other, device))
            work()

        benchmark.group = "adaptation"
        benchmark.pedantic(lambda: self.own.append(seconds_of(work, device)), setup=before, rounds=rounds)

    @property
    def seconds(self) -> float:
        """Of the work itself."""
        return median(self.own)

    def row(self, row: Row, what: str, device: str, other: int = 0) -> None:
        """Add the ratio to one of the others to the table."""
        ratios = [theirs / own for own, theirs in zip(self.own, self.others[other], strict=True)]
        figures = f"{median(ratios):.1f} × [{min(ratios):.1f}, {max(ratios):.1f}]"
        row(what, device, f"{self.seconds:.3f} s", f"{median(self.others[other]):.2f} s", figures)


@pytest.mark.parametrize("device", DEVICES)
def test_segments_adapted_together_beside_segments_adapted_in_a_loop(benchmark, row, device):
    """A bank filled as on a night, its supports gathered, sorted and padded, against loops that find theirs sliced."""
    world = segments(SEGMENTS, device)
    ladder = Ladder(world.rows, world.limits(), "shopper")
    logits, features = world.score(np.arange(len(world.rows)))
    offsets, labels = logits[:, 0], torch.from_numpy(world.rows.labels[:, 0]).to(device)
    arrays = [part.cpu().numpy() for part in (features, offsets, labels)]
    precision = world.precisions()[0, 0].cpu().numpy()

    bank = world.fill(ladder)
    np.testing.assert_array_equal(bank.levels[0].slots, 1 + np.arange(SEGMENTS))
    looped = looped_ridge(*arrays, world.bounds, precision, ADAPTER.steps)
    assert np.abs(looped).max() > 0.1
    np.testing.assert_allclose(bank.weights[1:, 0], looped, atol=1e-4, rtol=0)
    looped_descent(features, offsets, labels, world.bounds[:20])

    beside = Beside(
        *(benchmark, lambda: world.fill(ladder)),
        [
            lambda: looped_descent(features, offsets, labels, world.bounds),
            lambda: looped_ridge(*arrays, world.bounds, precision, ADAPTER.steps),
        ],
        *(device, 5),
    )
    what = f"{SEGMENTS:,} segments, {len(world.rows) / SEGMENTS:.0f} rows each, D = {features.shape[1]}: beside "
    beside.row(row, what + "a loop of 3 SGD steps on a copied head", device)
    beside.row(row, what + f"a loop of the same ridge ({ADAPTER.steps} Newton steps) in numpy", device, 1)


@pytest.mark.parametrize("device", DEVICES)
def test_segments_adapted_from_their_rows_beside_copies_of_the_whole_ranker(benchmark, row, device):
    """Both sides begin with rows and a trained ranker, so both pay for its forward pass; the loop keeps no copy."""
    random, sizes = np.random.default_rng(3), mixed_sizes(SEGMENTS, np.random.default_rng(0))
    user, bounds = np.repeat(np.arange(1, SEGMENTS + 1), sizes), np.r_[0, np.cumsum(sizes)]
    price = random.normal(size=(len(user), NUMBERS))
    liked = random.random(len(user)) < 1 / (1 + np.exp(-2 * price[:, 0] * np.where(user % 2 == 0, 1, -1)))
    item, genre = random.integers(1, ITEMS + 1, len(user)), random.integers(1, 20, len(user))
    clicked = liked[:, None].astype(np.float32)
    rows = table(user, np.zeros(len(user), int), item=item, genre=genre, labels=clicked, price=price, levels=USERS_ONLY)
    torch.manual_seed(0)
    network = default_ranker(rows).to(device).eval()
    material, precisions = Material(rows, device), Precisions(1, 1, network.width, ADAPTER, network.fan_in).to(device)
    ladder = Ladder(rows, ladder_of(USERS_ONLY, max_leaves=SEGMENTS), "shopper")
    inputs, labels = material.inputs(np.arange(len(rows))), material.labels(np.arange(len(rows)))[:, 0]

    def together() -> Bank:
        with torch.no_grad():
            return fill_bank(ladder, material, material.scorer(network), precisions(), ADAPTATION, FIRST + 1)

    # Both sides adapt: the support of the first segments is told better than before.
    few, clicks = bounds[:51], torch.nn.functional.binary_cross_entropy_with_logits
    bank, copies, at = together(), looped_copies(network, inputs, labels, few), np.arange(few[-1])
    with torch.no_grad():
        logits, features = material.scorer(network)(at)
        ours = ADAPTATION.scores(logits, features, torch.from_numpy(bank.weights[1:]).to(device), user[at] - 1)
        theirs = [own(*(part[slice(*few[n : n + 2])] for part in inputs))[0] for n, own in enumerate(copies)]
        before = float(clicks(logits[:, 0], labels[at]))
        assert max(float(clicks(scores[:, 0], labels[at])) for scores in (ours, torch.cat(theirs))) < before - 0.01

    def looped() -> None:
        for first in range(0, SEGMENTS, 64):  # what was copied goes again
            looped_copies(network, inputs, labels, bounds[first : first + 65])

    beside = Beside(benchmark, together, [looped], device, 3)
    what = (
        f"{SEGMENTS:,} segments from their rows, {len(rows) / SEGMENTS:.0f} each, D = {network.width}: beside a loop "
    )
    beside.row(row, what + "of 3 SGD steps on a copy of the whole ranker", device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [*STEPPING, "matching"])
def test_other_adapters_beside_a_loop_of_gradient_steps_on_copies(benchmark, row, device, name):
    """As above. The loop copies what a segment has of its own, and takes as many steps; matching is a head to it."""
    config = STEPPING.get(name, MATCHING)
    world = segments(SEGMENTS, device, config=config)
    ladder, adaptation = Ladder(world.rows, world.limits(), "shopper"), world.adaptation
    logits, features = world.score(np.arange(len(world.rows)))
    labels, layers = torch.from_numpy(world.rows.labels[:, 0]).to(device), adaptation.perceptron
    own = Own(begin_of(config, features.shape[1], layers), head if name == "matching" else form_of(config)).to(device)
    with torch.no_grad():
        offsets = logits[:, 0] - own(features, layers)

    def looped(bounds: np.ndarray) -> list[Own]:
        return looped_steps(own, layers, features, offsets, labels, bounds, config.steps)

    # Both sides adapt: the support of the first segments is told better than before.
    few, clicks = world.bounds[:51], torch.nn.functional.binary_cross_entropy_with_logits
    at, whose = np.arange(few[-1]), np.repeat(np.arange(50), np.diff(few))
    bank, found = world.fill(ladder), looped(few)
    with torch.no_grad():
        weights = torch.from_numpy(bank.weights[1:]).to(device)
        ours = adaptation.scores(logits[at], features[at], weights, whose)[:, 0]
        parts = [one(features[slice(*few[n : n + 2])], layers) for n, one in enumerate(found)]
        theirs = offsets[at] + torch.cat(parts)
        before = float(clicks(logits[at, 0], labels[at]))
        assert max(float(clicks(scores, labels[at])) for scores in (ours, theirs)) < before - 0.001
    others = [lambda: looped(world.bounds)]
    if name == "matching":
        arrays = [part.cpu().numpy() for part in (features, offsets, labels)]
        held = world.held.numpy()
        same = looped_match(*arrays, world.bounds, held)
        np.testing.assert_allclose(bank.weights[1:, 0], same, atol=1e-4, rtol=0)
        others.append(lambda: looped_match(*arrays, world.bounds, held))

    beside = Beside(benchmark, lambda: world.fill(ladder), others, device, 3)
    what = f"{name}, {SEGMENTS:,} segments, {len(world.rows) / SEGMENTS:.0f} rows each, {len(world.held):,} numbers: "
    beside.row(row, what + f"beside a loop of {config.steps} SGD steps on copies", device)
    if name == "matching":
        beside.row(row, what + "beside a loop of the same in numpy", device, 1)


def _meta_world(device: str, config: AdapterConfig = ADAPTER) -> tuple[Material, Ranker, Precisions, Ladder]:
    """Users who come on three nights with about ten rows each, and a base without dropout for them."""
    random = np.random.default_rng(1)
    user = np.repeat(np.arange(1, 401), random.integers(6, 60, 400))
    night = np.sort(random.integers(0, 3, len(user)))
    night = night[random.permutation(len(user))]
    rows = table(
        *(user, night),
        item=random.integers(1, ITEMS + 1, len(user)),
        genre=random.integers(1, 20, len(user)),
        labels=(random.random((len(user), 1)) < 0.5).astype(np.float32),
        price=random.normal(size=(len(user), NUMBERS)),
        levels=USERS_ONLY,
    )
    torch.manual_seed(0)
    network = default_ranker(rows, config).to(device).eval()
    precisions = Precisions(1, 1, network.width, config, network.fan_in).to(device)
    return Material(rows, device), network, precisions, Ladder(rows, ladder_of(USERS_ONLY), "shopper")


def _drawn(
    material: Material, ladder: Ladder
) -> tuple[tuple[Tensor, ...], Tensor, Visits, np.ndarray, list[tuple[int, int, int]]]:
    """Inputs and labels of all rows, and episodes: as visits with their support rows, and as the loops take them."""
    everything = np.arange(len(material.rows))
    late = visits_of(material.rows).of_nights(FIRST + 1, FIRST + 2)
    visits, after = draw(late.take(np.flatnonzero(late.rows.lengths > 1)), EPISODES, np.random.default_rng(2))
    assert len(visits) == EPISODES
    border = visits.rows.start + after
    start = np.maximum(visits.first, border - ladder.segments.max_support)
    episodes = list(zip(start.tolist(), border.tolist(), visits.rows.stop.tolist(), strict=True))
    return material.inputs(everything), material.labels(everything)[:, 0], visits, after, episodes


def _size(episodes: list[tuple[int, int, int]]) -> str:
    start, border, stop = np.array(episodes).T
    return (
        f"{EPISODES} episodes, {np.mean(border - start):.0f} support and {np.mean(stop - border):.0f} query rows each"
    )


def backward(loss: Callable[[], Tensor], parameters: list[Tensor]) -> tuple[float, list[Tensor]]:
    """A loss and its gradients, 0 where nothing flows."""
    for parameter in parameters:
        parameter.grad = None
    value = loss()
    value.backward()
    return value.item(), [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_through_the_adaptation_of_many_episodes_beside_a_loop_over_the_episodes(benchmark, row, device):
    """Forward, the loss behind the adaptation, backward into network and precisions; the optimiser is left out."""
    material, network, precisions, ladder = _meta_world(device)
    inputs, labels, visits, after, episodes = _drawn(material, ladder)
    parameters = [*network.parameters(), *precisions.parameters()]
    ones = torch.ones(1, device=device)

    def together() -> Tensor:
        scores = score_visits(ladder, visits, after, material.scorer(network), material, precisions(), ADAPTATION)
        return row_loss(scores.adapted, material.labels(scores.rows), CLICK, ones)

    def looped() -> Tensor:
        return looped_loss(network, inputs, labels, episodes, precisions()[0, 0], ADAPTER.steps)

    (ours, gradients), (theirs, same) = backward(together, parameters), backward(looped, parameters)
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert max(float(gradient.abs().max()) for gradient in gradients) > 1e-3
    for gradient, other in zip(gradients, same, strict=True):
        scale = float(other.abs().max())
        torch.testing.assert_close(gradient, other, atol=1e-4 * min(1.0, scale), rtol=1e-4)
    beside = Beside(
        benchmark, lambda: backward(together, parameters), [lambda: backward(looped, parameters)], device, 5
    )
    beside.row(row, f"step through {_size(episodes)}: beside a loop over the episodes", device)


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_through_the_adaptation_of_many_episodes_beside_maml_of_the_whole_ranker(benchmark, row, device):
    """As the libraries have it: in every episode all parameters take steps that the outer loss flows back through."""
    material, network, precisions, ladder = _meta_world(device)
    inputs, labels, visits, after, episodes = _drawn(material, ladder)
    parameters, ones = [*network.parameters(), *precisions.parameters()], torch.ones(1, device=device)

    def together() -> Tensor:
        scores = score_visits(ladder, visits, after, material.scorer(network), material, precisions(), ADAPTATION)
        return row_loss(scores.adapted, material.labels(scores.rows), CLICK, ones)

    def looped() -> Tensor:
        return looped_maml(network, inputs, labels, episodes, ADAPTER.steps)

    unadapted = looped_maml(network, inputs, labels, [(border, border, stop) for _, border, stop in episodes], 0)
    for loss in (together, looped):
        value, gradients = backward(loss, parameters)
        assert value != pytest.approx(unadapted.item(), abs=1e-4)
        assert max(float(one.abs().max()) for one in gradients) > 1e-3
    beside = Beside(
        benchmark, lambda: backward(together, parameters), [lambda: backward(looped, parameters)], device, 5
    )
    what = (
        f"step through {_size(episodes)}: beside MAML of the whole ranker ({ADAPTER.steps} steps), episode by episode"
    )
    beside.row(row, what, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [*STEPPING, "matching"])
def test_a_second_order_step_through_other_adapters_beside_a_loop_over_the_episodes(benchmark, row, device, name):
    """The loop is MAML with learned rates; of matching it is the same, answers and gradients included."""
    config = STEPPING.get(name, MATCHING)
    material, network, precisions, ladder = _meta_world(device, config)
    inputs, labels, visits, after, episodes = _drawn(material, ladder)
    parameters, ones = [*network.parameters(), *precisions.parameters()], torch.ones(1, device=device)

    def together() -> Tensor:
        how = Adaptation.of(network, config)
        scores = score_visits(ladder, visits, after, material.scorer(network), material, precisions(), how)
        return row_loss(scores.adapted, material.labels(scores.rows), CLICK, ones)

    def looped() -> Tensor:
        return looped_meta_loss(network, inputs, labels, episodes, precisions()[0, 0], config)

    (ours, gradients), (theirs, same) = backward(together, parameters), backward(looped, parameters)
    for slopes in (gradients, same):
        assert float(slopes[-1].abs().max()) > 1e-6  # through the solve into the rates
        assert all(torch.isfinite(slope).all() for slope in slopes)
    if name == "matching":
        assert ours == pytest.approx(theirs, abs=1e-5)
        for gradient, other in zip(gradients, same, strict=True):
            torch.testing.assert_close(gradient, other, atol=1e-4 * min(1.0, float(other.abs().max())), rtol=1e-4)

    beside = Beside(
        benchmark, lambda: backward(together, parameters), [lambda: backward(looped, parameters)], device, 5
    )
    beside.row(row, f"{name}, second-order step through {_size(episodes)}: beside a loop over the episodes", device)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read from Linux' /proc")
@pytest.mark.parametrize(
    ("count", "most"), [(1_000, None), (10_000, None), (100_000, None), (400_000, None), (100_000, 1), (400_000, 1)]
)
def test_time_and_memory_of_a_bank_by_its_number_of_segments(benchmark, row, count, most):
    """One process per size: the most memory above the inputs, and the seconds; `most` rows make thin segments."""
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.many_segments",
        str(count),
        *([] if most is None else [str(most)]),
    ]
    costs = []

    def fill() -> None:
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        costs.append(json.loads(done.stdout))

    benchmark.group = "processes that fill a bank"
    benchmark.pedantic(fill, rounds=1 if count > 10_000 else 3)
    cost = min(costs, key=lambda one: one["seconds"])
    benchmark.extra_info.update(cost)
    row(
        f"bank of {count:,} segments, {cost['rows'] / count:.1f} rows each",
        "cpu",
        f"{cost['seconds'] / count * 1e6:.0f} µs a segment",
        f"{cost['working'] / 2**20:.0f} MiB peak",
        f"{(cost['working'] - cost['bank']) / 2**20:.0f} MiB beside the bank of {cost['bank'] / 2**20:.1f}",
    )


def operations(count: int, rows: int, objectives: int, width: int, steps: int) -> int:
    """Floating-point operations of one solve of B segments, S rows, K objectives, D features.

    Per step and objective of a segment, a multiply-add being two operations:

    - scores and gradient: 2 · 2 S D
    - rows scaled by their curvature: S D
    - Hessian: 2 S D² (S D² multiply-adds, both halves, as a matrix product computes it)
    - factorisation: D³ / 3
    - two triangular solves: 2 D²

    Sigmoids and masks, of the order of S, are left out.
    """
    one = 5 * rows * width + 2 * rows * width**2 + width**3 // 3 + 2 * width**2
    return count * objectives * steps * one


def traffic(count: int, rows: int, objectives: int, width: int, steps: int) -> int:
    """Bytes that one solve in single precision reads and writes, if every tensor it makes goes through memory once.

    Per step of a segment: features are read by scores, gradient, scaling and Hessian (4 S D); per objective the scaled
    features are written and read (2 S D), the Hessian is written, read and written with the precisions on it, read by
    the factorisation, its factor written, and read by both solves (7 D²). Tensors without D are left out.
    """
    one = 4 * rows * width + objectives * (2 * rows * width + 7 * width**2)
    return 4 * count * steps * one


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [20, 128])
def test_operations_a_second_of_one_solve_beside_a_matrix_product(benchmark, row, device, rows):
    """Against the roofline: the rate of a large product, or what the traffic allows at the rate of a large copy."""
    size, big = (8192, 2**28) if device == "cuda" else (1024, 2**25)
    width, count = ranker_alone().width, 2048
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, rows, width, generator=generator).to(device)
    offsets = torch.randn(count, rows, 1, generator=generator).to(device)
    labels = (torch.rand(count, rows, 1, generator=generator) < 0.5).float().to(device)
    weights = torch.ones(count, rows, device=device)
    precision = torch.full((1, width), ADAPTER.precision, device=device)
    square = torch.randn(size, size, generator=generator).to(device)
    source, target = torch.zeros(big, device=device), torch.ones(big, device=device)

    @torch.no_grad()
    def one() -> Tensor:
        return solve(features, offsets, labels, weights, precision, CLICK, ADAPTER.steps)

    assert torch.isfinite(one()).all()
    beside = Beside(benchmark, one, [lambda: square @ square, lambda: target.copy_(source)], device, 11)
    product, copied = (min(times) for times in beside.others)
    sizes = (count, rows, 1, width, ADAPTER.steps)
    peak, bandwidth = 2 * size**3 / product, 2 * 4 * big / copied
    intensity = operations(*sizes) / traffic(*sizes)
    rate, roof = operations(*sizes) / min(beside.own), min(peak, intensity * bandwidth)
    row(
        f"solve of B = {count:,}, S = {rows}, K = 1, D = {width}, {ADAPTER.steps} steps: "
        f"{operations(*sizes) / 1e9:.2f} Gflop, {traffic(*sizes) / 2**20:.0f} MiB",
        device,
        f"{rate / 1e9:.1f} Gflop/s",
        f"product {peak / 1e9:.0f} Gflop/s, copy {bandwidth / 1e9:.1f} GB/s",
        f"{rate / peak:.0%} of the product's rate; {intensity:.1f} flop a byte: {rate / roof:.0%} of the roofline",
    )
