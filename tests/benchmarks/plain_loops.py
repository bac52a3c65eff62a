"""Adapters found the way libraries of gradient-based adaptation do: one segment after the other, by SGD on a copy.

Every kind is written for a single segment, as short as it can be: an own part, and a form that says what it adds to the
scores of rows. No form has the product's bounds on a step.

Shapes: E segments, N rows, S rows of one segment, D adapter features, X inputs of the joint perceptron, H hidden units,
r rank; one objective, a click.
"""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tasks.learning.adapters import AdapterConfig
from tasks.learning.bending import Perceptron
from tasks.learning.networks import Ranker

Form = Callable[[list[Tensor], Tensor, Perceptron | None], Tensor]
"""An own part, rows ``[S, D or X]`` and the shared layers, to what is added to the rows' scores ``[S]``."""
Episode = tuple[int, int, int]
"""First support row, first query row, end of the query."""
clicks = nn.functional.binary_cross_entropy_with_logits


def head(own: list[Tensor], rows: Tensor, layers: Perceptron | None) -> Tensor:
    return rows @ own[0]


def film(own: list[Tensor], rows: Tensor, layers: Perceptron) -> Tensor:
    units = (rows @ layers.first.T + layers.shift) * (1 + own[1]) + own[2]
    return torch.relu(units) @ layers.last[0] + own[0]


def lora(own: list[Tensor], rows: Tensor, layers: Perceptron) -> Tensor:
    units = rows @ layers.first.T + layers.shift + (rows @ layers.down.T) @ own[1].T
    return torch.relu(units) @ layers.last[0] + own[0]


def dense(own: list[Tensor], rows: Tensor, layers: Perceptron) -> Tensor:
    return torch.relu(rows @ own[3].T + own[2]) @ own[1] + own[0]


def form_of(config: AdapterConfig) -> Form:
    """What one of the kinds that take steps adds to scores."""
    if config.bends == "dense":
        return dense
    return {"gradient": head, "film": film, "lora": lora}[config.kind]


def begin_of(config: AdapterConfig, width: int, layers: Perceptron | None) -> list[Tensor]:
    """Where the own part of every segment begins, in the order of the product's numbers (`Bent.parts`)."""
    if layers is None:
        return [torch.zeros(width)]
    hidden, constant = len(layers.shift), layers.shift.new_zeros(1)
    if config.kind == "film":
        return [constant, torch.zeros_like(layers.shift), torch.zeros_like(layers.shift)]
    if config.kind == "lora":
        return [constant, layers.shift.new_zeros(hidden, config.rank)]
    return [constant, layers.last[0], layers.shift, layers.first]


class Own(nn.Module):
    """The part that every segment has a copy of."""

    def __init__(self, begin: list[Tensor], form: Form) -> None:
        super().__init__()
        self.parts, self.form = nn.ParameterList(part.detach().clone() for part in begin), form

    def forward(self, rows: Tensor, layers: Perceptron | None) -> Tensor:
        return self.form(list(self.parts), rows, layers)


def looped_steps(
    own: Own,
    layers: Perceptron | None,
    features: Tensor,
    offsets: Tensor,
    labels: Tensor,
    bounds: np.ndarray,
    steps: int,
    rate: float = 0.5,
) -> list[Own]:
    """Per segment, copy the own part and take some steps of SGD.

    Args:
        own: what is copied.
        layers: shared, and held still.
        features: of the rows, by segment, ``[N, D or X]``.
        offsets: scores without the own part ``[N]``.
        labels: ``[N]``.
        bounds: first row of each segment, and behind them the number of rows [E + 1].
        steps: of SGD.
        rate: of SGD.
    """
    found = []
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        rows, offset, label = features[start:stop], offsets[start:stop], labels[start:stop]
        mine = copy.deepcopy(own)
        optimiser = torch.optim.SGD(mine.parameters(), lr=rate)
        for _ in range(steps):
            optimiser.zero_grad()
            clicks(offset + mine(rows, layers), label).backward()
            optimiser.step()
        found.append(mine)
    return found


def looped_match(
    shares: np.ndarray, offsets: np.ndarray, labels: np.ndarray, bounds: np.ndarray, precision: np.ndarray
) -> np.ndarray:
    """The product's matching, one segment after the other in numpy: ``shares[N, D]`` to memories ``[E, D]``."""
    found = np.zeros((len(bounds) - 1, shares.shape[1]), shares.dtype)
    for at, (start, stop) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        rows, chance = shares[start:stop], 1 / (1 + np.exp(-offsets[start:stop]))
        found[at] = ((labels[start:stop] - chance) @ rows) / ((chance * (1 - chance)) @ rows + precision)
    return found


def looped_maml(
    network: Ranker, inputs: tuple[Tensor, ...], labels: Tensor, episodes: list[Episode], steps: int, rate: float = 0.05
) -> Tensor:
    """Second-order MAML of the whole ranker, episode by episode: every parameter takes steps on the support.

    Args:
        network: where every episode begins.
        inputs: what it takes, for all rows.
        labels: ``[N]``.
        episodes: of the rows.
        steps: of SGD.
        rate: of SGD.
    """
    losses = []
    for start, border, stop in episodes:
        support, query = (tuple(part[one] for part in inputs) for one in (slice(start, border), slice(border, stop)))
        own = dict(network.named_parameters())
        for _ in range(steps if border > start else 0):
            loss = clicks(functional_call(network, own, support)[0][:, 0], labels[start:border])
            slopes = torch.autograd.grad(loss, list(own.values()), create_graph=True, allow_unused=True)
            own = {
                name: part if slope is None else part - rate * slope
                for (name, part), slope in zip(own.items(), slopes, strict=True)
            }
        losses.append(clicks(functional_call(network, own, query)[0][:, 0], labels[border:stop], reduction="sum"))
    return torch.stack(losses).sum() / sum(stop - border for _, border, stop in episodes)


def looped_meta_loss(
    network: Ranker,
    inputs: tuple[Tensor, ...],
    labels: Tensor,
    episodes: list[Episode],
    precision: Tensor,
    config: AdapterConfig,
) -> Tensor:
    """Second-order MAML with a learned rate per weight, episode by episode: adapt on some rows, score those behind.

    Args:
        network: the base.
        inputs: what it takes, for all rows.
        labels: ``[N]``.
        episodes: of the rows.
        precision: one over the rates ``[P]``.
        config: of an adapter that takes steps, or of matching.
    """
    losses, layers = [], network.perceptron()
    form, begin = head, begin_of(config, network.width, layers)
    if config.kind != "matching":
        form = form_of(config)
    held = [part.view(one.shape) for part, one in zip(precision.split([p.numel() for p in begin]), begin, strict=True)]
    for start, border, stop in episodes:
        logits, rows = network(*(part[start:stop] for part in inputs))
        logits, label, many = logits[:, 0], labels[start:stop], border - start
        if layers is not None:
            logits = logits - network.joint(rows)[:, 0] + network.joint[-1].bias  # which the forms leave alone
        own = begin
        if config.kind == "matching":
            chance = torch.sigmoid(logits[:many])
            said = (label[:many] - chance) @ rows[:many]
            own = [said / ((chance * (1 - chance)) @ rows[:many] + precision)]
        else:
            own = [part if part.requires_grad else part.requires_grad_() for part in own]
            for _ in range(config.steps if many else 0):
                loss = clicks(logits[:many] + form(own, rows[:many], layers), label[:many], reduction="sum")
                slopes = torch.autograd.grad(loss, own, create_graph=True)
                own = [part - slope / hold for part, slope, hold in zip(own, slopes, held, strict=True)]
        losses.append(clicks(logits[many:] + form(own, rows[many:], layers), label[many:], reduction="sum"))
    return torch.stack(losses).sum() / sum(stop - border for _, border, stop in episodes)
