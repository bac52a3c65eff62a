"""The mechanics of descent: what is put back, what is decayed, what is pulled."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tasks.learning.adapters import AdapterConfig, Precisions
from tasks.learning.descent import optimiser_of, pull_back, steady
from tasks.learning.networks import Ranker, RankerConfig
from tests.learning.small_rows import opposed, shape


def test_steady_arithmetic_is_seeded_and_the_outside_is_left_as_it_was():
    threads = torch.get_num_threads()
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with steady(5, threads + 1):
        assert torch.get_num_threads() == threads + 1
        assert torch.are_deterministic_algorithms_enabled()
        first = torch.rand(3)
    with steady(5, None):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.rand(2), expected)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_error_inside_does_not_leave_torch_changed():
    threads = torch.get_num_threads()

    def fail():
        with steady(0, threads + 1):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


def test_factors_and_precisions_are_not_decayed_and_every_parameter_is_optimised_once():
    network = Ranker(
        shape(opposed(nights=1, users=6)), RankerConfig(embedding=4, hidden=8, factors=2, features=3, warm_up=True)
    )
    precisions = Precisions(2, 1, network.width, AdapterConfig())
    groups = optimiser_of(network, precisions, 0.1, 0.2, 0.3).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = [*network.named_parameters(), *precisions.named_parameters()]
    assert sum(len(group["params"]) for group in groups) == len(decay) == len(named)
    for name, parameter in named:
        expected = (
            0.0 if name.startswith(("factor_tables", "warm_up", "logarithm")) else 0.3 if "_tables." in name else 0.2
        )
        assert decay[id(parameter)] == expected


@pytest.mark.parametrize("kind", ["film", "lora"])
def test_layers_that_adapters_bend_decay_by_a_thirtieth(kind):
    adapter = AdapterConfig(kind=kind)
    network = Ranker(shape(opposed(nights=1, users=6)), RankerConfig(embedding=4, hidden=8), adapter.bent)
    groups = optimiser_of(network, Precisions(2, 1, network.width, adapter, network.fan_in), 0.1, 6.0, 0.3).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name in ("joint.0.weight", "joint.3.weight", "candidate_tower.0.weight"):
        assert decay[id(network.get_parameter(name))] == pytest.approx(0.2)
    assert {decay[id(table.weight)] for table in network.candidate_tables} == {0.3}


def losses_of(optimiser, weight, steps=4):
    """Squared distances to 1 on the way down."""
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = ((weight - 1) ** 2).sum()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_steps_are_those_of_adamw():
    network = Ranker(shape(opposed(nights=1, users=6)), RankerConfig(embedding=4, hidden=8))
    ours = optimiser_of(network, Precisions(2, 1, network.width, AdapterConfig()), 0.1, 0.2, 0.3)
    weight = network.wide.weight
    twin = torch.nn.Parameter(weight.detach().clone())
    reference = torch.optim.AdamW([twin], lr=0.1, weight_decay=0.2)
    found = losses_of(ours, weight)
    assert found == losses_of(reference, twin)
    assert found[-1] < found[0]
    assert torch.equal(weight, twin)


def test_training_does_not_load_the_compiler():
    code = """
import sys, torch
from tests.learning.test_descent import *
network = Ranker(shape(opposed(nights=1, users=6)), RankerConfig(embedding=4, hidden=8))
with steady(0, 1):
    optimiser = optimiser_of(network, Precisions(2, 1, network.width, AdapterConfig()), 0.1, 0.2, 0.3)
    losses_of(optimiser, network.wide.weight)
print([name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules])
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_wants_no_gradient_is_not_optimised():
    network = Ranker(shape(opposed(nights=1, users=6)), RankerConfig(embedding=4, hidden=8))
    network.wide.requires_grad_(False)
    groups = optimiser_of(network, Precisions(2, 1, network.width, AdapterConfig()), 0.1, 0.2, 0.3).param_groups
    chosen = {id(parameter) for group in groups for parameter in group["params"]}
    left = {name for name, parameter in network.named_parameters() if id(parameter) not in chosen}
    assert left == {"wide.weight", "wide.bias"}


def test_what_is_trained_goes_its_share_of_the_way_back_and_what_is_frozen_stays():
    moved, home = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for module, value in ((moved, 3.0), (home, 1.0)):
        torch.nn.init.constant_(module.weight, value)
        torch.nn.init.constant_(module.bias, value)
    moved.bias.requires_grad_(False)
    pull_back(moved, home, 0.25, free=("nothing",))
    assert (moved.weight.item(), moved.bias.item()) == (2.5, 3.0)
    assert (home.weight.item(), home.bias.item()) == (1.0, 1.0)
    pull_back(moved, home, 0.25, free=("weight",))
    assert moved.weight.item() == 2.5
