"""The outer loop: which loops fit which adapters, which parameters they train, and the gradient of Reptile.

Shapes: V visits, S rows of a visit (padded), K objectives, D adapter features.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from tasks.errors import InvalidConfig
from tasks.learning.adapters import Adaptation, AdapterConfig
from tasks.learning.episodes import QUERY_ROWS, row_loss
from tasks.learning.ladder import Ladder, climb
from tasks.learning.material import I64, Material, Visits, Windows
from tasks.learning.networks import Ranker

OuterLoop = Literal["second_order", "first_order", "reptile", "joint"]
Freeze = Literal["nothing", "embeddings", "all_but_head"]
STEPPING = ("first_order", "reptile")
"""Outer loops that are made of the adapter's gradient steps."""
PATH_RATE = 0.05
"""Rate of the network's own steps along a visit in Reptile. The optimiser sees their mean gradient, so this says how
far apart the visits' networks drift, not how far the shared one moves."""
PATH_NUMBERS = 32_000_000
"""Most parameters of visits' own networks held at once in Reptile."""
HEAD = ("wide.", "joint.3.", "head.", "low_rank", "prior", "matching.", "warm_up.constant", "warm_up.line.")
"""The layers that end in scores or in what adapters multiply."""


def misfit(outer: OuterLoop, adapter: AdapterConfig) -> str | None:
    """Why an outer loop cannot train for an adapter, and what to do; None if it can."""
    if outer in STEPPING and not adapter.takes_steps:
        return (
            f"training.outer: {outer!r} is made of the gradient steps of an adapter, and adapter.kind {adapter.kind!r} "
            "takes none; set adapter.kind to 'gradient' ('film' and 'lora' take some too), or training.outer to "
            "'second_order' or 'joint'"
        )
    return None


def check_outer(outer: OuterLoop, adapter: AdapterConfig) -> None:
    """Refuse an outer loop that cannot train for the adapter.

    Raises:
        InvalidConfig: with the remedy.
    """
    if (fault := misfit(outer, adapter)) is not None:
        raise InvalidConfig(fault)


def thaw(network: Ranker, freeze: Freeze) -> None:
    """Mark the parameters that the outer loop trains, and no others, as those that want a gradient."""
    for name, parameter in network.named_parameters():
        table = "tables." in name
        parameter.requires_grad_(
            {"nothing": True, "embeddings": not table, "all_but_head": name.startswith(HEAD)}[freeze]
        )


def reptile(
    ladder: Ladder,
    visits: Visits,
    network: Ranker,
    material: Material,
    precisions: Tensor,
    config: AdapterConfig,
    objectives: Tensor,
    base_weight: float,
) -> tuple[float, dict[str, Tensor]]:
    """How Reptile moves the shared parameters, as a gradient for any optimiser.

    Every visit takes the shared parameters and the adapter weights that serve it at its start, and goes
    ``config.steps`` gradient steps on the mean loss of all its rows: the network with `PATH_RATE`, the adapter with its
    own rates (`Adaptation.solve`), both from the same point each time. The answer, over all visits,

        mean of (shared - where the visit ended) / (PATH_RATE steps)

    is the mean gradient along the ways; following it moves the shared parameters towards where the visits' own
    networks ended. Rates have no part in it, they stay as they are. Source: Nichol et al., On First-Order
    Meta-Learning Algorithms, 2018, their batched version, where the difference is handed to Adam as a gradient.

    All visits step at once, each with its own copy of what is trained; frozen parameters are not copied. Large
    embedding tables make copies dear: parts of the visits are then taken in turn (`PATH_NUMBERS`); or freeze them.

    Args:
        ladder: the segments.
        visits: the episodes [V]; of each, the first `QUERY_ROWS` rows are read.
        network: the shared network; its parameters that want a gradient are those that move.
        material: the rows.
        precisions: ``[L, K, D]``.
        config: gradient steps.
        objectives: weight of each ``[K]``.
        base_weight: weight of the loss before adaptation.

    Returns:
        Mean adapted loss where the visits took their last step, and the gradient of every trained parameter by name.
    """
    shared = {name: value.detach() for name, value in network.named_parameters() if value.requires_grad}
    fixed = {name: value.detach() for name, value in network.named_parameters() if not value.requires_grad}
    kinds = network.shape.kinds
    precisions, adaptation = precisions.detach(), Adaptation.of(network, config)
    one_step = replace(adaptation, config=config.model_copy(update={"steps": 1}))
    with torch.no_grad():
        stages = ladder.plan(visits, np.zeros(len(visits), np.int64))
        begin = climb(stages, material.scorer(network), material, precisions, adaptation)[-1]

    def loss(
        own: dict[str, Tensor], weights: Tensor, inputs: tuple[Tensor, ...], labels: Tensor, mass: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        logits, features = functional_call(network, fixed | own, inputs)
        scores = replace(adaptation, perceptron=network.perceptron(fixed | own)).apply(logits, features, weights)
        adapted = row_loss(scores, labels, kinds, objectives, mass)
        whole = adapted + base_weight * row_loss(logits, labels, kinds, objectives, mass)
        return whole, (adapted, scores, features)

    # Every visit drops its own units and ids.
    downhill = vmap(grad(loss, has_aux=True), randomness="different")
    total, moved = 0.0, {name: torch.zeros_like(value) for name, value in shared.items()}
    most = max(1, PATH_NUMBERS // max(1, sum(value.numel() for value in shared.values())))
    for chosen, inputs, labels, mass in _padded(visits, material, most, network.config.history):
        own = {name: value.expand(len(chosen), *value.shape) for name, value in shared.items()}
        weights = begin[torch.from_numpy(chosen).to(begin.device)]
        for _ in range(config.steps):
            slopes, (adapted, scores, features) = downhill(own, weights, inputs, labels, mass)
            step = replace(one_step, perceptron=network.perceptron(fixed | own))
            rows = (step.used(features, weights), scores, labels, mass)
            weights = weights + step.solve(*rows, precisions[0], weights)
            own = {name: value - PATH_RATE * slopes[name] for name, value in own.items()}
        total += float(adapted.sum())
        for name, value in shared.items():
            moved[name] += (value - own[name]).sum(dim=0)
    scale = 1.0 / (len(visits) * PATH_RATE * config.steps)
    return total / len(visits), {name: value * scale for name, value in moved.items()}


def _padded(
    visits: Visits, material: Material, most: int, history: int
) -> Iterator[tuple[I64, tuple[Tensor, ...], Tensor, Tensor]]:
    """Visits' numbers, inputs ``[V, S, ...]``, labels and row weights, padded to the longest; so many at once.

    The rows of a visit have one history ``[V, H, ...]``.
    """
    for chosen in np.array_split(np.arange(len(visits)), -(-len(visits) // most)):
        rows = visits.rows.take(chosen)
        windows = Windows(rows.start, np.minimum(rows.stop, rows.start + QUERY_ROWS))
        at, window = windows.flat()
        longest = int(windows.lengths.max())
        where = tuple(torch.from_numpy(place).to(material.device) for place in (window, at - windows.start[window]))
        own = material.inputs(at, history)
        shared: tuple[Tensor, ...] = ()
        if history:
            recent, visit = own[-4:-1], own[-1][torch.from_numpy(np.cumsum(windows.lengths) - 1).to(material.device)]
            own, shared = own[:-4], tuple(part[visit] for part in recent)
        tables = (*own, material.labels(at), material.weights(at))
        *inputs, labels, mass = (
            part.new_zeros(len(chosen), longest, *part.shape[1:]).index_put(where, part) for part in tables
        )
        yield chosen, (*inputs, *shared), labels, mass
