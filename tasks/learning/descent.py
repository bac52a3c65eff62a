"""The mechanics of gradient descent: steady and mixed arithmetic, the optimiser and the pull towards an anchor."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tasks.learning.adapters import Precisions
from tasks.learning.material import I64, Scorer
from tasks.learning.networks import Ranker

PRECISION_SPEED = 5.0
"""Learning rate of the log-precisions over that of the network."""
BENT = 1 / 30
"""Share of the layers' decay where adapters bend them: pairs of units that cancel out are no weights to be small."""


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


def in_mixed_precision(scorer: Scorer, device: str) -> Scorer:
    """The same scorer with its layers in bfloat16, and its answers in float32 for the solves and losses behind it.

    Weights, their gradients and the optimiser's moments stay float32, and bfloat16 has the exponents of float32: no
    loss has to be scaled. Source: Kalamkar et al., A Study of BFLOAT16 for Deep Learning Training, 2019.

    TensorFloat-32 is left off: torch has one switch of it for the whole process, the solves included.

    Args:
        scorer: a network as a function of positions.
        device: what it computes on.
    """

    def score(at: I64) -> tuple[Tensor, Tensor]:
        with torch.autocast(device, dtype=torch.bfloat16):
            logits, features = scorer(at)
        return logits.float(), features.float()

    return score


def optimiser_of(
    network: Ranker, precisions: Precisions, rate: float, weight_decay: float, embedding_decay: float
) -> torch.optim.Optimizer:
    """AdamW with its own decay for embeddings; factors and precisions are held by the solve, not by decay.

    Nor are prototypes: smaller ones would tell rows apart less and less; nor what attention adds or scales by.
    Parameters that want no gradient are left out: decay would move what is frozen. Every group names the highest
    learning rate that it may have as `peak`.
    """
    if network.bent is not None:
        weight_decay *= BENT
    # Norms, biases, and the tables of places and gaps.
    undecayed = {
        name
        for name, one in network.named_parameters()
        if name.startswith("attention.") and (one.ndim == 1 or name.endswith(("_bias", "_table")))
    }
    groups: dict[str, list[nn.Parameter]] = {"embeddings": [], "factors": [], "layers": []}
    for name, parameter in network.named_parameters():
        kind = (
            "factors"
            if name.startswith(("factor_tables", "warm_up", "matching")) or name in undecayed
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
