"""The mechanics of gradient descent: steady arithmetic, the optimiser and the moving average of the weights."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tasks.learning.adapters import Precisions
from tasks.learning.networks import Ranker

PRECISION_SPEED = 5.0
"""Learning rate of the log-precisions over that of the network."""


@contextmanager
def steady(seed: int, threads: int | None) -> Iterator[None]:
    """Deterministic arithmetic inside the block; global settings are put back afterwards.

    Args:
        seed: of torch's global generators.
        threads: of the arithmetic on the CPU; None leaves them.
    """
    before = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # The same switch as torch.use_deterministic_algorithms, which loads the compiler as well.
        torch.set_deterministic_debug_mode("error")
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before[0])
            torch.set_deterministic_debug_mode(before[1])


class _AdamW(torch.optim.AdamW):
    """AdamW as it is, without what tells torch's compiler to leave it alone.

    Nothing is compiled here, and to tell the compiler so the wrappers load it: two seconds a process.
    """

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def optimiser_of(
    network: Ranker, precisions: Precisions, rate: float, weight_decay: float, embedding_decay: float
) -> torch.optim.Optimizer:
    """AdamW with its own decay for embeddings; factors and precisions are held by the solve, not by decay.

    Parameters that want no gradient are left out: decay would move what is frozen. Every group names the highest
    learning rate that it may have as `peak`.
    """
    groups: dict[str, list[nn.Parameter]] = {"embeddings": [], "factors": [], "layers": []}
    for name, parameter in network.named_parameters():
        kind = (
            "factors"
            if name.startswith(("factor_tables", "warm_up"))
            else "embeddings"
            if "_tables." in name
            else "layers"
        )
        if parameter.requires_grad:
            groups[kind].append(parameter)
    return _AdamW(
        [
            {"params": groups["embeddings"], "weight_decay": embedding_decay, "peak": rate},
            {"params": groups["layers"], "weight_decay": weight_decay, "peak": rate},
            {"params": groups["factors"], "weight_decay": 0.0, "peak": rate},
            {"params": list(precisions.parameters()), "weight_decay": 0.0, "peak": rate * PRECISION_SPEED},
        ],
        lr=rate,
    )


def pull_back(network: nn.Module, anchor: nn.Module, share: float, free: tuple[str, ...] = ()) -> None:
    """Take every trained parameter a share of the way back to where an anchor of the same shape has it.

    Args:
        network: is changed; what is frozen stays.
        anchor: stays.
        share: of the way, from 0 to 1.
        free: how the names of parameters begin that are left alone.
    """
    with torch.no_grad():
        for (name, moved), home in zip(network.named_parameters(), anchor.parameters(), strict=True):
            if moved.requires_grad and not name.startswith(free):
                moved.lerp_(home, share)


def blend(average: nn.Module, module: nn.Module, keep: float) -> None:
    """Move the average towards a module of the same shape; `keep` is the share of the average that stays."""
    with torch.no_grad():
        for kept, new in zip(average.parameters(), module.parameters(), strict=True):
            kept.lerp_(new, 1.0 - keep)
