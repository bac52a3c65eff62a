"""Averages of the weights along the steps of a training: what is scored after each epoch, and kept.

An average is kept with one number per step: the share of it that stays when the step's weights are blended in. Nothing
else has to be remembered, so a training that goes on from a checkpoint averages on as if it had never stopped.
"""

import torch
from torch import nn

from tasks.learning.training_config import TrainingConfig


def share_kept(config: TrainingConfig, step: int) -> float:
    """The share of the average that stays when the weights of a step are blended in.

    `ema`: the exponential moving average with decay ``config.average``; the first steps, which have little behind them,
    keep less. `swa`: after the first ``config.swa_after`` epochs every step counts alike, the n-th keeps (n - 1) / n;
    until then nothing stays, and the average is the weights themselves (stochastic weight averaging: Izmailov et al.,
    Averaging Weights Leads to Wider Optima and Better Generalization, 2018).

    Args:
        config: which average, and its numbers.
        step: of the whole training, counted from 0.

    >>> swa = TrainingConfig(averaging="swa", swa_after=1, steps_per_epoch=2)
    >>> [share_kept(swa, step) for step in range(6)]
    [0.0, 0.0, 0.0, 0.5, 0.6666666666666666, 0.75]
    >>> [share_kept(TrainingConfig(average=0.25), step) for step in range(3)]
    [0.1, 0.18181818181818182, 0.25]
    """
    if config.averaging == "swa":
        averaged = max(0, step - config.swa_after * config.steps_per_epoch)
        return averaged / (averaged + 1)
    return min(config.average, (step + 1) / (step + 10))


def blend(average: nn.Module, module: nn.Module, keep: float) -> None:
    """Move the average towards a module of the same shape; `keep` is the share of the average that stays."""
    with torch.no_grad():
        for kept, new in zip(average.parameters(), module.parameters(), strict=True):
            kept.lerp_(new, 1.0 - keep)
