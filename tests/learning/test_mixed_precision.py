"""Mixed precision: the layers in bfloat16, everything behind them in float32."""

import copy

import numpy as np
import pytest
import torch

from tasks.learning.adapters import Adaptation, AdapterConfig
from tasks.learning.descent import steady
from tasks.learning.initialisation import Initialisation
from tasks.learning.losses import Losses
from tasks.learning.setting import Setting
from tests.learning.small_rows import before, contract, ladder_of, one_aim, opposed, shape
from tests.learning.test_training import NIGHTS, SHORT, SMALL, day, train

STILL = SMALL.model_copy(update={"dropout": 0.0, "request_dropout": 0.0, "id_dropout": 0.0})


@pytest.fixture(scope="module")
def history():
    return before(one_aim(opposed(nights=NIGHTS, users=15)), NIGHTS)


def losses_of(rows, adapter=None, **changed):
    config = SHORT.model_copy(update=changed)
    parts = (contract(), ladder_of(), STILL, adapter or AdapterConfig(), config, rows, shape(rows), day(NIGHTS), "cpu")
    return Losses(Setting(*parts))


@pytest.fixture(scope="module")
def begun(history):
    """A network in closed form whose layers are not zero, its precisions, and visits to learn from."""
    losses = losses_of(history, stop_nights=1)
    with steady(0, 1):
        made = Initialisation(losses.setting, losses)
        network, precisions = made.begun(made.plan(None), np.random.default_rng(0)).weights
        torch.nn.init.normal_(network.joint[-1].weight, std=0.3)
    return network.train(), precisions, losses.setting.visits


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("kind", "outer"), [("ridge", "second_order"), ("gradient", "first_order")])
def test_layers_compute_in_bfloat16_and_solves_and_losses_in_float32(monkeypatch, history, begun, mixed, kind, outer):
    network, precisions, visits = begun
    network = copy.deepcopy(network)
    layers, solved = [], []
    for layer in network.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda _layer, _given, said: layers.append(said.dtype))
    solve = Adaptation.solve

    def spy(self, *given):
        solved.extend(part.dtype for part in given)
        return solve(self, *given)

    monkeypatch.setattr(Adaptation, "solve", spy)
    losses = losses_of(history, AdapterConfig(kind=kind), mixed_precision=mixed, outer=outer)
    adapted, loss = losses.of_step(network, precisions, visits, np.minimum(3, visits.rows.lengths - 1))
    loss.backward()
    assert set(layers) == {torch.bfloat16 if mixed else torch.float32}
    # Seven layers, for all rows at once; in first order for query and support apart.
    assert len(layers) >= (14 if outer == "first_order" else 7)
    assert set(solved) == {torch.float32}
    assert (adapted.dtype, loss.dtype) == (torch.float32, torch.float32)
    assert all(part.grad.dtype == torch.float32 for part in network.parameters() if part.grad is not None)
    layers.clear()
    losses.of_stop(network, precisions, visits)
    assert set(layers) == {torch.float32}


def test_loss_and_gradient_are_near_those_of_float32(history, begun):
    network, precisions, visits = begun
    after = np.minimum(3, visits.rows.lengths - 1)
    told, slopes = {}, {}
    for mixed in (False, True):
        own = copy.deepcopy(network)
        losses = losses_of(history, mixed_precision=mixed)
        told[mixed], loss = losses.of_step(own, precisions, visits, after)
        loss.backward()
        slopes[mixed] = torch.cat([part.grad.flatten() for part in own.parameters() if part.grad is not None])
    assert told[True] != told[False]
    assert told[True].item() == pytest.approx(told[False].item(), rel=5e-3)
    assert torch.cosine_similarity(slopes[True], slopes[False], dim=0) > 0.998


def test_a_training_in_mixed_precision_starts_and_ends_in_float32(history):
    plain, mixed = (
        train(history, config=SHORT.model_copy(update={"epochs": 1, "steps_per_epoch": 2, "mixed_precision": mixed}))
        for mixed in (False, True)
    )
    assert mixed.curve[0] == plain.curve[0]
    assert mixed.curve[1] != plain.curve[1]
    assert mixed.curve[1][1:] == pytest.approx(plain.curve[1][1:], rel=0.02)
    assert {part.dtype for part in mixed.base.network.parameters()} == {torch.float32}
