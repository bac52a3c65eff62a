"""The gradient of a training step, in double precision: finite differences of the loss that its outer loop minimises.

Every step is `Descent._step` itself: episodes drawn, losses, flows, and what the optimiser is left with.
"""

import copy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from tasks.learning.adapters import Adaptation, AdapterConfig
from tasks.learning.checkpoint import NoCheckpoint
from tasks.learning.episodes import draw, score_visits
from tasks.learning.epochs import Descent
from tasks.learning.initialisation import FITTED, Initialisation
from tasks.learning.ladder import climb
from tasks.learning.losses import Losses
from tasks.learning.scalars import NoScalars
from tasks.learning.setting import Setting
from tasks.learning.training_config import TrainingConfig
from tests.learning.reptile_loop import Precise, slow_reptile, stirred
from tests.learning.small_rows import contract, ladder_of, opposed, shape, with_labels
from tests.learning.test_outer import ADAPTERS, KINDS, PAIRS, STILL
from tests.learning.test_training import day

LENGTH = 1e-6
SEED = 3
WEIGHTS = torch.tensor([1.0, 0.3], dtype=torch.float64)


@cache
def rows():
    """Two objectives, some labels missing, rows of unequal weight."""
    random, some = np.random.default_rng(0), opposed(nights=3, users=8, each=5)
    labels = np.where(random.random(some.labels.shape) < 0.2, np.nan, some.labels)
    return replace(with_labels(some, labels), weights=random.uniform(0.2, 2, len(some)).astype(np.float32))


class Case:
    """A base whose layers all say something, the episodes of its next step, and what that step hands the optimiser."""

    def __init__(self, adapter, outer, freeze="nothing"):
        config = TrainingConfig(outer=outer, freeze=freeze, visits_per_step=6, base_weight=0.5)
        data = contract(*KINDS)
        heavy, light = data.objectives
        data = data.model_copy(update={"objectives": (heavy, light.model_copy(update={"weight": 0.3}))})
        some = rows()
        setting = Setting(data, ladder_of(), STILL, AdapterConfig(**adapter), config, some, shape(some, *KINDS), day(3))
        setting.__dict__["material"] = Precise(some)
        setting.__dict__["objectives"] = WEIGHTS
        self.setting, self.losses = setting, Losses(setting)
        torch.manual_seed(0)
        initialisation = Initialisation(setting, self.losses)
        self.network, self.precisions = (part.double() for part in initialisation.fresh())
        stirred(self.network.train())
        stirred(self.precisions)
        self.visits, self.after = draw(setting.visits, 6, np.random.default_rng(SEED))
        network, precisions = copy.deepcopy(self.network), copy.deepcopy(self.precisions)
        optimiser = initialisation.optimiser(network, precisions)
        descent = Descent(setting, initialisation, self.losses, lambda *_: None, NoCheckpoint(), NoScalars())
        random = np.random.default_rng(SEED)
        self.told, norm = descent._step(network, precisions, optimiser, setting.visits, None, random)
        # The step has cut the gradient to length 1.
        longer = max(1.0, norm + 1e-6)
        self.slopes = {name: part.grad * longer for name, part in network.named_parameters() if part.grad is not None}
        self.rates = None if precisions.logarithm.grad is None else precisions.logarithm.grad * longer
        self.trained = [name for name, part in network.named_parameters() if part.requires_grad]

    def moved(self, ways, length):
        """A copy of the network, its parameters moved a length along their ways."""
        network = copy.deepcopy(self.network)
        with torch.no_grad():
            for name, way in ways.items():
                network.get_parameter(name).add_(length * way)
        return network

    def ways(self, names):
        random = torch.Generator().manual_seed(1)
        return {
            name: torch.randn(self.network.get_parameter(name).shape, generator=random, dtype=torch.float64)
            for name in names
        }


def slope(loss):
    """Of a function of a length, by central differences."""
    with torch.no_grad():
        return (float(loss(LENGTH)) - float(loss(-LENGTH))) / (2 * LENGTH)


def mean_loss(scores, some, at):
    """Cross-entropy of the clicks plus 0.3 times half the squared error of the stars, each a weighted mean."""
    label, mass = some.labels[at].astype(np.float64), some.weights[at].astype(np.float64)
    click, stars = scores[:, 0], scores[:, 1]
    chance = 1 / (1 + np.exp(-click))
    each = (
        -np.log(np.where(label[:, 0] == 1, chance, 1 - chance)),
        0.5 * (stars - label[:, 1]) ** 2,
    )
    total = 0.0
    for loss, given, weight in zip(each, ~np.isnan(label.T), (1.0, 0.3), strict=True):
        total += weight * (loss * mass)[given].sum() / mass[given].sum()
    return total


@pytest.mark.parametrize("kind", ["ridge", "matching", "dense", "lora"])
def test_a_joint_step_follows_the_mean_loss_of_all_rows_of_its_visits_before_adaptation(kind):
    """Tensor by tensor; the loss is written out in numpy. Nothing that is the adapter's has any part in it: networks of
    other adapters are as one of these."""
    case = Case(ADAPTERS[kind], "joint")
    at = np.concatenate([np.arange(a, b) for a, b in zip(case.visits.rows.start, case.visits.rows.stop, strict=True)])
    inputs = case.setting.material.inputs(at)

    def loss(ways, length):
        return mean_loss(case.moved(ways, length)(*inputs)[0].numpy(), rows(), at)

    with torch.no_grad():
        assert case.told == pytest.approx(loss({}, 0.0), rel=1e-12)
    assert case.rates is None
    found = {}
    for name, way in case.ways(case.trained).items():
        found[name] = slope(lambda length, name=name, way=way: loss({name: way}, length))
        said = (case.slopes[name] * way).sum().item() if name in case.slopes else 0.0
        assert said == pytest.approx(found[name], rel=1e-6, abs=1e-8), name
    assert sum(abs(value) > 1e-3 for value in found.values()) > 10


@pytest.mark.parametrize(
    ("kind", "freeze"),
    [*((kind, "nothing") for kind in ADAPTERS), *((kind, "all_but_head") for kind in ("ridge", "gradient", "lora"))],
)
def test_a_second_order_step_follows_the_query_loss_after_adaptation(kind, freeze):
    """MAML through closed forms, prototypes and layers, ANIL on the head, and Meta-SGD's rates: all of it at once, and
    the rates by themselves."""
    case = Case(ADAPTERS[kind], "second_order", freeze)
    ways = case.ways(case.trained)

    def loss(length, rate=0.0):
        precisions = copy.deepcopy(case.precisions)
        precisions.logarithm.add_(rate * along)
        return case.losses.of_step(case.moved(ways, length), precisions, case.visits, case.after)[1]

    along = rate_way(case)
    setting = case.setting
    with torch.no_grad():
        scores = score_visits(
            *(setting.ladder, case.visits, case.after, setting.material.scorer(case.network), setting.material),
            *(case.precisions(), Adaptation.of(case.network, setting.adapter)),
        )
        adapted, base = (mean_loss(said.numpy(), rows(), scores.rows) for said in (scores.adapted, scores.base))
        assert case.told == pytest.approx(adapted, rel=1e-12)
        assert loss(0.0).item() == pytest.approx(adapted + 0.5 * base, rel=1e-12)
    said = sum((value * ways[name]).sum().item() for name, value in case.slopes.items())
    assert said == pytest.approx(slope(loss), rel=1e-6, abs=1e-8)
    assert abs(said) > 1e-3
    if along.numel():
        of_rates = (case.rates * along).sum().item()
        assert of_rates == pytest.approx(slope(lambda rate: loss(0.0, rate)), rel=1e-6, abs=1e-9)
        assert abs(of_rates) > 1e-6


def rate_way(case):
    """A way for every learned rate; those of solved factors are not learned, and their flow is set to nothing."""
    along = torch.randn(case.precisions.logarithm.shape, dtype=torch.float64)
    for part in FITTED.intersection(case.network.parts):
        along[:, :, case.network.parts[part]] = 0.0
        if case.rates is not None and along.numel():
            assert not case.rates[:, :, case.network.parts[part]].any()
    return along


STEPPING = [kind for kind, outer in PAIRS if outer == "first_order"]


@pytest.mark.parametrize("kind", STEPPING)
def test_a_first_order_step_follows_the_query_loss_with_the_adapted_weights_as_constants(kind):
    """First-order MAML: the gradient at the adapted point, what serves each visit written in as numbers."""
    case = Case(ADAPTERS[kind], "first_order")
    setting, material, ways = case.setting, case.setting.material, case.ways(case.trained)
    adaptation = Adaptation.of(case.network, setting.adapter)
    with torch.no_grad():
        stages = setting.ladder.plan(case.visits, case.after)
        served = climb(stages, material.scorer(case.network), material, case.precisions(), adaptation)[-1]
    at, visit = case.visits.split(case.after)[1].flat()

    def loss(length):
        network = case.moved(ways, length)
        logits, features = material.scorer(network)(at)
        adapted = Adaptation.of(network, setting.adapter).scores(logits, features, served, visit)
        return mean_loss(adapted.numpy(), rows(), at) + 0.5 * mean_loss(logits.numpy(), rows(), at)

    said = sum((value * ways[name]).sum().item() for name, value in case.slopes.items())
    assert said == pytest.approx(slope(loss), rel=1e-6, abs=1e-8)
    whole = Case(ADAPTERS[kind], "second_order")
    assert whole.told == pytest.approx(case.told, rel=1e-12)
    through = sum((value * ways[name]).sum().item() for name, value in whole.slopes.items())
    assert abs(through - said) > 1e-4  # what flows through the support is not nothing


@pytest.mark.parametrize("kind", STEPPING)
def test_a_reptile_step_is_the_mean_way_of_plain_sgd_on_copies(kind):
    """Reptile's answer is no gradient of a loss: its oracle is a loop over visits, inner slopes by differences.

    Three steps: the adapter's second is the first to go through layers that have moved, and the third to show it.
    """
    case = Case(ADAPTERS[kind] | {"steps": 3}, "reptile")
    setting = case.setting
    loss, moved = slow_reptile(
        *(setting.ladder, case.visits, case.network, setting.material, case.precisions().detach()),
        *(setting.adapter, WEIGHTS, 0.5),
    )
    assert case.told == pytest.approx(loss, rel=1e-9)
    assert case.rates is None
    assert case.slopes.keys() == moved.keys()
    for name, value in moved.items():
        torch.testing.assert_close(case.slopes[name], value, rtol=1e-9, atol=1e-11, msg=name)
    assert max(value.abs().max() for value in moved.values()) > 1e-2
