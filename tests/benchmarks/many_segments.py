"""As many segments as wanted, the plain loops that adaptation is compared with, and the cost of a bank in a process.

    python -m tests.benchmarks.many_segments 10000

fills a bank of 10,000 segments in a process of its own and prints one JSON object: seconds, bytes, rows. Linux only.

Shapes: E segments, N rows, D adapter features; one objective, a click.
"""

import copy
import ctypes
import gc
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tasks.data.columns import Rows
from tasks.data.contract import SegmentsConfig
from tasks.learning.adapters import Adaptation, AdapterConfig
from tasks.learning.bank import Bank, fill_bank
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material
from tasks.learning.networks import Ranker, RankerConfig
from tasks.learning.solvers import SMALLEST_CURVATURE
from tests.learning.small_rows import FIRST, ladder_of, shape, table

NUMBERS = 20
"""Numeric columns of a candidate."""
ITEMS = 1000
USERS_ONLY = (("shopper",),)
CLICK = ("binary",)
ADAPTER = AdapterConfig()
ADAPTATION = Adaptation(CLICK, ADAPTER)


def default_ranker(rows: Rows, config: AdapterConfig = ADAPTER) -> Ranker:
    """The default ranker over a row table, none of whose adapter features is 0 everywhere."""
    network = Ranker(shape(rows, *CLICK, more=1), RankerConfig(), config.bent, config.matching)
    for part in (*network.factor_tables, network.joint[-1], network.wide):
        nn.init.normal_(part.weight, std=0.3)
    return network


def ranker_alone(config: AdapterConfig = ADAPTER) -> Ranker:
    """The default ranker without a world; of linear adapters D is 1, its factors, those of one column, and numbers."""
    torch.manual_seed(0)
    return default_ranker(table([1], [0], price=np.ones((1, NUMBERS))), config).eval()


@dataclass(frozen=True)
class Segments:
    """Users with rows of one night, and features and logits of every row, as a base that is held fixed gives them.

    Attributes:
        rows: the table, by user.
        bounds: first row of each segment, and behind them the number of rows [E + 1].
        catalogue: of every item what adapters read: features [I, D], the first of which is 1, shares in prototypes,
            or inputs of the joint perceptron [I, X].
        logits: of every item [I, 1].
        device: where the tensors are.
        adaptation: how they are adapted.
        held: precision of every number of an adapter ``[D or P]``.
    """

    rows: Rows
    bounds: np.ndarray
    catalogue: Tensor
    logits: Tensor
    device: str
    adaptation: Adaptation
    held: Tensor

    def score(self, at: np.ndarray) -> tuple[Tensor, Tensor]:
        """A scorer that looks both up."""
        item = torch.from_numpy(np.asarray(self.rows.item)[at]).to(self.device)
        return self.logits[item], self.catalogue[item]

    def precisions(self) -> Tensor:
        """One level's: ``[1, 1, D or P]``."""
        return self.held[None, None].to(self.device)

    def limits(self) -> SegmentsConfig:
        """Users only, so that a plain loop has no parents to solve first."""
        return ladder_of(USERS_ONLY, max_leaves=len(self.bounds) - 1)

    def fill(self, ladder: Ladder) -> Bank:
        """The bank of all segments, as a night fills it."""
        material = Material(self.rows, self.device)
        return fill_bank(ladder, material, self.score, self.precisions(), self.adaptation, FIRST + 1)


def mixed_sizes(count: int, random: np.random.Generator) -> np.ndarray:
    """Support sizes from 1 to 128, log-normal, 20 in the mean."""
    return np.clip(np.exp(random.normal(2.62, 0.9, count)), 1, 128).astype(np.int64)


def segments(
    count: int, device: str = "cpu", sizes: np.ndarray | None = None, seed: int = 0, config: AdapterConfig = ADAPTER
) -> Segments:
    """Random segments of mixed size (or of given sizes) whose clicks follow tastes of their own."""
    network = ranker_alone(config).requires_grad_(False).to(device)
    random = np.random.default_rng(seed)
    sizes = mixed_sizes(count, random) if sizes is None else sizes
    bounds = np.r_[0, np.cumsum(sizes)]
    width = network.width if network.bent is None else network.joint_inputs
    catalogue = random.normal(0, 0.5, (ITEMS + 1, width)).astype(np.float32)
    catalogue[:, 0] = 1.0
    if config.matching:
        catalogue = np.exp(2 * catalogue) / np.exp(2 * catalogue).sum(axis=1, keepdims=True)
    logits = random.normal(0, 0.5, (ITEMS + 1, 1)).astype(np.float32)
    item = random.integers(1, ITEMS + 1, bounds[-1])
    user = np.repeat(np.arange(1, count + 1), sizes)
    pull = logits[item, 0] + catalogue[item, 1] * np.where(user % 2 == 0, 2.0, -2.0)
    click = random.random(len(item)) < 1 / (1 + np.exp(-pull))
    rows = table(user, np.zeros(len(user), int), item=item, labels=click[:, None].astype(np.float32), levels=USERS_ONLY)
    told = (torch.from_numpy(part).to(device) for part in (catalogue, logits))
    return Segments(rows, bounds, *told, device, Adaptation.of(network, config), config.precision * network.fan_in)


def looped_descent(
    features: Tensor, offsets: Tensor, labels: Tensor, bounds: np.ndarray, steps: int = 3, rate: float = 0.5
) -> Tensor:
    """What libraries of gradient-based adaptation do: per segment, copy the head and take some steps of SGD.

    ``features[N, D]``, ``offsets[N]``, ``labels[N]``, ordered by segment, to heads ``[E, D]``.
    """
    head = nn.Linear(features.shape[1], 1, bias=False, device=features.device)
    nn.init.zeros_(head.weight)
    heads = []
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        inputs, offset, label = features[start:stop], offsets[start:stop], labels[start:stop]
        own = copy.deepcopy(head)
        optimiser = torch.optim.SGD(own.parameters(), lr=rate)
        for _ in range(steps):
            optimiser.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(offset + own(inputs)[:, 0], label)
            loss.backward()
            optimiser.step()
        heads.append(own.weight.detach()[0])
    return torch.stack(heads)


def looped_copies(
    network: Ranker, inputs: tuple[Tensor, ...], labels: Tensor, bounds: np.ndarray, steps: int = 3, rate: float = 0.05
) -> list[nn.Module]:
    """Plain fine-tuning: per segment, copy the whole ranker and take some steps of SGD on all of it.

    Args:
        network: is not changed.
        inputs: what it takes, for all rows, ordered by segment.
        labels: ``[N]``.
        bounds: first row of each segment, and behind them the number of rows [E + 1].
        steps: of SGD.
        rate: of SGD.

    Returns:
        A ranker for each segment.
    """
    found: list[nn.Module] = []
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        rows, label, own = [part[start:stop] for part in inputs], labels[start:stop], copy.deepcopy(network)
        optimiser = torch.optim.SGD(own.parameters(), lr=rate)
        for _ in range(steps):
            optimiser.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(own(*rows)[0][:, 0], label).backward()
            optimiser.step()
        found.append(own)
    return found


def looped_ridge(
    features: np.ndarray, offsets: np.ndarray, labels: np.ndarray, bounds: np.ndarray, precision: np.ndarray, steps: int
) -> np.ndarray:
    """The product's ridge, one segment after the other in numpy: the leanest plain loop there is.

    ``features[N, D]``, ``offsets[N]``, ``labels[N]``, ``precision[D]`` to weights ``[E, D]``.
    """
    held = np.diag(precision)
    found = np.zeros((len(bounds) - 1, features.shape[1]), features.dtype)
    for at, (start, stop) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        inputs, offset, label = features[start:stop], offsets[start:stop], labels[start:stop]
        weights = found[at]
        for _ in range(steps):
            chance = 1 / (1 + np.exp(-(offset + inputs @ weights)))
            curvature = np.maximum(chance * (1 - chance), SMALLEST_CURVATURE)
            gradient = inputs.T @ (label - chance) - precision * weights
            weights += np.linalg.solve((inputs.T * curvature) @ inputs + held, gradient)
    return found


def looped_loss(
    network: Ranker,
    inputs: tuple[Tensor, ...],
    labels: Tensor,
    episodes: list[tuple[int, int, int]],
    precision: Tensor,
    steps: int,
) -> Tensor:
    """The loss of `row_loss` over adapted scores, built episode by episode: adapt on some rows, score those behind.

    Args:
        network: the base.
        inputs: what it takes, for all rows.
        labels: ``[N]``.
        episodes: first support row, first query row, end of the query.
        precision: ``[D]``.
        steps: Newton steps.
    """
    losses = []
    for start, border, stop in episodes:
        logits, features = network(*(part[start:stop] for part in inputs))
        logits, label, many = logits[:, 0], labels[start:stop], border - start
        rows, weights = features[:many], torch.zeros_like(precision)
        for _ in range(steps if many else 0):
            chance = torch.sigmoid(logits[:many] + rows @ weights)
            curvature = (chance * (1 - chance)).clamp_min(SMALLEST_CURVATURE)
            gradient = rows.T @ (label[:many] - chance) - precision * weights
            weights = weights + torch.linalg.solve((rows.T * curvature) @ rows + torch.diag(precision), gradient)
        scores = logits[many:] + features[many:] @ weights
        losses.append(nn.functional.binary_cross_entropy_with_logits(scores, label[many:], reduction="sum"))
    return torch.stack(losses).sum() / sum(stop - border for _, border, stop in episodes)


def _memory(what: str) -> int:
    """A line of this process's status, in bytes."""
    found = re.search(rf"^{what}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def cost_of_a_bank(count: int, most: int | None = None) -> dict[str, float]:
    """Seconds and bytes that filling a bank takes in this process; `most` bounds the rows of a segment."""
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    sizes = None if most is None else random.integers(1, most + 1, count)
    few, many = segments(100), segments(count, sizes=sizes)
    few.fill(Ladder(few.rows, few.limits(), "shopper"))
    ladder = Ladder(many.rows, many.limits(), "shopper")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of the inputs until now: it begins anew
    before, began = _memory("VmRSS"), time.perf_counter()
    bank = many.fill(ladder)
    seconds, peak = time.perf_counter() - began, _memory("VmHWM")
    assert bank.weights.shape[0] == count + 1
    kept = bank.weights.nbytes + sum(part.nbytes for level in bank.levels for part in vars(level).values())
    return {"seconds": seconds, "working": peak - before, "bank": kept, "rows": len(many.rows)}


if __name__ == "__main__":
    print(json.dumps(cost_of_a_bank(*(int(word) for word in sys.argv[1:]))))
