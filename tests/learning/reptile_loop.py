"""Reptile, one visit at a time: a network of its own for each, plain SGD, and slopes that differences agree with."""

import copy

import numpy as np
import pytest
import torch

from tasks.learning.adapters import Adaptation
from tasks.learning.episodes import row_loss
from tasks.learning.ladder import climb
from tasks.learning.material import Material
from tasks.learning.outer import PATH_RATE


class Precise(Material):
    """Rows in double precision."""

    def inputs(self, at, history=0):
        return tuple(part.double() if part.is_floating_point() else part for part in super().inputs(at, history))

    def labels(self, at):
        return super().labels(at).double()

    def weights(self, at):
        return super().weights(at).double()


def stirred(module):
    """Layers that begin at zero would hide what they multiply."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def slow_reptile(ladder, visits, network, material, precisions, config, objectives, base_weight, most=512):
    """Mean adapted loss at the last step, and (shared - mean end) / (rate x steps) of every trained parameter.

    Every slope that a copy steps along is held against central differences of its visit's loss.
    """
    kinds, one_step = network.shape.kinds, config.model_copy(update={"steps": 1})
    with torch.no_grad():
        stages = ladder.plan(visits, np.zeros(len(visits), np.int64))
        begin = climb(stages, material.scorer(network), material, precisions, Adaptation.of(network, config))[-1]
    losses, random = [], torch.Generator().manual_seed(0)
    ends = {name: torch.zeros_like(value) for name, value in network.named_parameters() if value.requires_grad}
    for number in range(len(visits)):
        own, weights = copy.deepcopy(network), begin[number]
        trained = [part for part in own.parameters() if part.requires_grad]
        optimiser = torch.optim.SGD(trained, lr=PATH_RATE)
        at = np.arange(visits.rows.start[number], visits.rows.stop[number])[:most]
        inputs, labels, mass = material.inputs(at, network.config.history), material.labels(at), material.weights(at)

        def loss(weights, own=own, inputs=inputs, labels=labels, mass=mass):
            logits, features = own(*inputs)
            scores = Adaptation.of(own, config).apply(logits, features, weights)
            adapted, base = (row_loss(said, labels, kinds, objectives, mass) for said in (scores, logits))
            return adapted + base_weight * base, adapted, scores, features

        for _ in range(config.steps):
            whole, adapted, scores, features = loss(weights)
            optimiser.zero_grad()
            whole.backward()
            _by_differences(trained, lambda weights=weights, loss=loss: float(loss(weights)[0]), random)
            adaptation = Adaptation.of(copy.deepcopy(own), one_step)
            used = adaptation.used(features, weights)
            rows = (part.detach()[None] for part in (used, scores, labels, mass))
            weights = weights + adaptation.solve(*rows, precisions[0], weights[None]).detach()[0]
            optimiser.step()
        losses.append(adapted.item())
        for name in ends:
            ends[name] += own.get_parameter(name).detach() / len(visits)
    scale = PATH_RATE * config.steps
    moved = {name: (network.get_parameter(name).detach() - end) / scale for name, end in ends.items()}
    return float(np.mean(losses)), moved


def _by_differences(trained, loss, random):
    """The gradients that stand in parameters are those of a loss, along one way through all of them."""
    ways = [torch.randn(part.shape, generator=random, dtype=part.dtype) for part in trained]
    said = sum((part.grad * way).sum().item() for part, way in zip(trained, ways, strict=True) if part.grad is not None)
    with torch.no_grad():
        ends = []
        for length in (1e-6, -2e-6, 1e-6):
            for part, way in zip(trained, ways, strict=True):
                part.add_(length * way)
            ends.append(loss())
    assert said == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6, abs=1e-8)
