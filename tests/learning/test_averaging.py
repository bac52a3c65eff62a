"""What is averaged along a training: exponentially, or every step alike."""

import numpy as np
import pytest
import torch

from tasks.learning.adapters import AdapterConfig
from tasks.learning.averaging import blend
from tasks.learning.epochs import Descent
from tasks.learning.losses import Losses
from tests.learning.small_rows import before, one_aim, opposed
from tests.learning.test_training import NIGHTS, SHORT, train


def test_the_moving_average_keeps_its_share():
    average, module = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    torch.nn.init.constant_(average.weight, 1.0)
    torch.nn.init.constant_(module.weight, 3.0)
    blend(average, module, 0.75)
    assert average.weight.item() == pytest.approx(1.5)


@pytest.mark.parametrize("averaging", ["ema", "swa"])
def test_what_is_scored_is_the_average_of_the_weights_of_its_steps(monkeypatch, averaging):
    """Three epochs of two steps: `swa` scores the first epoch's last weights, then means of 2 and of 4 steps; `ema`
    what the recurrence gives in double precision."""
    weights, scored = [], []
    step, losses = Descent._step, iter(range(9, 0, -1))

    def flat(network, precisions):
        parts = [*network.parameters(), *precisions.parameters()]
        return torch.cat([part.detach().flatten() for part in parts]).double().numpy()

    def stepping(self, network, precisions, *rest):
        if not weights:
            weights.append(flat(network, precisions))
        told = step(self, network, precisions, *rest)
        weights.append(flat(network, precisions))
        return told

    def scoring(_losses, network, precisions, _stop):
        scored.append(flat(network, precisions))
        return float(next(losses))

    monkeypatch.setattr(Descent, "_step", stepping)
    monkeypatch.setattr(Losses, "of_stop", scoring)
    config = {"averaging": averaging, "epochs": 3, "steps_per_epoch": 2, "average": 0.6, "pull": 0.0}
    rows = before(one_aim(opposed(nights=NIGHTS, users=15)), NIGHTS)
    train(rows, config=SHORT.model_copy(update=config), adapter=AdapterConfig(kind="bias"))
    start, *taken = weights
    _, *scored = scored
    assert len(taken) == 6
    assert len({part.tobytes() for part in taken}) == 6
    if averaging == "swa":
        expected = [taken[1], np.mean(taken[2:4], axis=0), np.mean(taken[2:6], axis=0)]
    else:
        expected, moving = [], start
        for number, one in enumerate(taken):
            keep = min(0.6, (number + 1) / (number + 10))
            moving = keep * moving + (1 - keep) * one
            expected += [moving] if number % 2 else []
    for ours, theirs in zip(scored, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6, rtol=1e-6)
