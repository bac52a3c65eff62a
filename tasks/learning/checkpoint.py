"""Where training stands after an epoch, as bytes: a run that died goes on from there and ends at the same weights."""

import copy
import hashlib
import json
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from tasks.learning.adapters import Precisions
from tasks.learning.networks import Ranker

FORMAT = 3
_DIGEST = 64
"""Hexadecimal digits of the SHA-256 that goes before the tensors."""
_STATE, _RANDOM, _SILENCED = "state", "generator", "silenced"

Weights = tuple[Ranker, Precisions]
Point = tuple[int, float | None, float]


class Checkpoint(Protocol):
    """Where a training keeps its checkpoint, the newest one only."""

    def load(self) -> bytes | None:
        """What was last saved, if anything."""

    def save(self, data: bytes) -> None:
        """Replace what was saved before, wholly or not at all."""

    def part(self, name: str) -> "Checkpoint":
        """The checkpoint of a part of the training, such as one member of an ensemble."""


class NoCheckpoint:
    """Keeps nothing."""

    def load(self) -> bytes | None:
        """Nothing."""
        return None

    def save(self, data: bytes) -> None:
        """Forget it."""

    def part(self, name: str) -> "NoCheckpoint":
        """Nothing either."""
        return self


@dataclass
class TrainingState:
    """Everything that the next epoch depends on, beside the rows and the config.

    Attributes:
        weights: what is trained.
        average: its moving average, which is what is scored.
        best: what was scored with the lowest stop loss so far.
        optimiser: of the weights.
        random: draws the episodes.
        curve: per epoch: number, mean training loss, stop loss.
        how: what there is to say about the start.
        setbacks: how often it had to go back to the best, because an epoch left the finite numbers.
        silenced: log-precisions at the start of weights that training holds less, NaN for others ``[L, K, D]``; None
            where there are none, see `Initialisation.loosen`.
    """

    weights: Weights
    average: Weights
    best: Weights
    optimiser: torch.optim.Optimizer
    random: np.random.Generator
    curve: list[Point]
    how: str
    setbacks: int = 0
    silenced: Tensor | None = None

    @property
    def epoch(self) -> int:
        """The last epoch that was finished; 0 is the closed-form start."""
        return self.curve[-1][0]

    @property
    def kept(self) -> int:
        """The first epoch with the lowest stop loss, -1 for the parent's base."""
        return min(self.curve, key=lambda point: point[2])[0]

    def keep_best(self, scored: Weights) -> None:
        """Copy what was scored after the last epoch if that did best."""
        if self.kept == self.epoch:
            self.best = copy.deepcopy(scored)

    def set_back(self, optimiser: torch.optim.Optimizer) -> None:
        """Go back to the best, with an optimiser that remembers nothing of what came after."""
        for later in (self.weights, self.average):
            for module, good in zip(later, self.best, strict=True):
                module.load_state_dict(good.state_dict())
        self.optimiser = optimiser
        self.setbacks += 1

    def dump(self) -> bytes:
        """The state as bytes, equal for equal states."""
        tensors = {
            f"{name}.{which}.{entry}": value
            for name, pair in self._pairs().items()
            for which, module in enumerate(pair)
            for entry, value in module.state_dict().items()
        }
        for number, entries in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{entry}": value for entry, value in entries.items()}
        if self.silenced is not None:
            tensors[_SILENCED] = self.silenced
        device = next(self.weights[0].parameters()).device
        tensors[f"{_RANDOM}.cpu"] = torch.get_rng_state()
        if device.type == "cuda":
            tensors[f"{_RANDOM}.cuda"] = torch.cuda.get_rng_state(device)
        state = {
            "format": FORMAT,
            "curve": self.curve,
            "how": self.how,
            "setbacks": self.setbacks,
            "random": self.random.bit_generator.state,
        }
        flat = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        data: bytes = save(flat, {_STATE: json.dumps(state, sort_keys=True)})
        return hashlib.sha256(data).hexdigest().encode() + data

    def restore(self, data: bytes) -> None:
        """Become what was dumped.

        Raises:
            ValueError: the bytes are damaged, or of a training with other layers; nothing can be said of the state
                then, and another one has to be made.
        """
        digest, data = data[:_DIGEST], data[_DIGEST:]
        if hashlib.sha256(data).hexdigest().encode() != digest:
            raise ValueError("its digest does not fit")
        try:
            tensors, state = load(data), json.loads(_metadata(data)[_STATE])
            if state["format"] != FORMAT:
                raise ValueError(f"it has format {state['format']}, and this version reads {FORMAT}")
            for name, pair in self._pairs().items():
                for which, module in enumerate(pair):
                    module.load_state_dict(_below(tensors, f"{name}.{which}."))
            groups = self.optimiser.state_dict()
            numbers = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("optimiser.")})
            groups["state"] = {number: _below(tensors, f"optimiser.{number}.") for number in numbers}
            self.optimiser.load_state_dict(groups)
            self.curve = [(int(epoch), trained, stop) for epoch, trained, stop in state["curve"]]
            self.how, self.setbacks = state["how"], int(state["setbacks"])
            self.silenced = tensors[_SILENCED].to(self.weights[1].logarithm.device) if _SILENCED in tensors else None
            self.random.bit_generator.state = state["random"]
            torch.set_rng_state(tensors[f"{_RANDOM}.cpu"])
            if f"{_RANDOM}.cuda" in tensors:
                device = next(self.weights[0].parameters()).device
                torch.cuda.set_rng_state(tensors[f"{_RANDOM}.cuda"], device)
        except (RuntimeError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"it does not fit: {' '.join(str(error).split())[:200]}") from error

    def _pairs(self) -> dict[str, tuple[nn.Module, nn.Module]]:
        return {"weights": self.weights, "average": self.average, "best": self.best}


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _metadata(data: bytes) -> dict[str, str]:
    """The header's own entries: eight bytes say how long it is, and JSON follows."""
    length = int.from_bytes(data[:8], "little")
    found: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return found
