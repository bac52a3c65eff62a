"""How an adapter bends the joint perceptron: what its numbers do to the dense layers, and to the scores behind them.

The perceptron is ``last . relu(first x + shift)``. An adapter's numbers are deviations from these, so that nothing but
zeros is exactly the shared network; what is computed is the change of the scores, never two scores to subtract.

Shapes: ``...`` leading axes, S rows that share an adapter, X inputs, H hidden units, K objectives, P numbers of an
adapter per objective, r rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

BentKind = Literal["film", "lora", "dense"]


class Perceptron(NamedTuple):
    """The layers that are bent; each has leading axes of its own, or none."""

    first: Tensor
    """``[..., H, X]``."""
    shift: Tensor
    """``[..., H]``."""
    last: Tensor
    """``[..., K, H]``."""
    down: Tensor | None = None
    """What `lora` reads of the inputs, ``[..., r, X]``."""

    def detach(self) -> "Perceptron":
        """The same numbers, of which no gradient is wanted."""
        return Perceptron(*(None if layer is None else layer.detach() for layer in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Bent:
    """What of the perceptron adapters bend; objectives have deviations of their own throughout.

    Attributes:
        kind: `film` scales and shifts every hidden unit (Perez et al., FiLM, 2018). `lora` adds ``B A`` to the first
            layer (Hu et al., LoRA, 2021): A, what is read of the inputs, is shared and learned by the outer loop, and
            an adapter is B alone. Updates in one shared subspace add up along the ladder and keep their rank, which
            pairs (A, B) would not; and A would learn nothing from a first step, as B is 0 there. `dense` moves every
            weight of both layers. All of them have the constant, which most of little support is about.
        rank: of `lora`.
    """

    kind: BentKind
    rank: int = 0

    def parts(self, inputs: int, hidden: int) -> dict[str, slice]:
        """What the P numbers are, in their order: name to positions."""
        sizes = {
            "film": {"scales": hidden, "shifts": hidden},
            "lora": {"updates": hidden * self.rank},
            "dense": {"last weights": hidden, "shifts": hidden, "first weights": hidden * inputs},
        }[self.kind]
        sizes = {"constant": 1, **sizes}
        return {
            name: slice(end - sizes[name], end) for name, end in zip(sizes, accumulate(sizes.values()), strict=True)
        }

    def change(self, layers: Perceptron, inputs: Tensor, weights: Tensor) -> Tensor:
        """What adapters add to the scores of rows.

        Args:
            layers: the shared perceptron.
            inputs: what it is given ``[..., S, X]``.
            weights: deviations ``[..., K, P]``.

        Returns:
            Changes ``[..., S, K]``; exactly 0 where the weights are.

        One unit that says 2 x, for x = 3, scaled by 1.5, shifted by 1 and with 0.5 on top: 10 + 0.5 - 6.

        >>> layers = Perceptron(torch.tensor([[2.0]]), torch.zeros(1), torch.ones(1, 1))
        >>> Bent("film").change(layers, torch.tensor([[3.0]]), torch.tensor([[0.5, 0.5, 1.0]]))
        tensor([[4.5000]])
        """
        return self.changes(layers, inputs)(weights)

    def changes(self, layers: Perceptron, inputs: Tensor) -> Callable[[Tensor], Tensor]:
        """`change` of rows as a function of the deviations ``[..., K, P]``: what they have no part in is done once."""
        hidden, width = layers.first.shape[-2], inputs.shape[-1]
        plain = inputs @ layers.first.mT + layers.shift[..., None, :]
        read = inputs if layers.down is None else inputs @ layers.down.mT
        parts = self.parts(width, hidden).items()

        def change(weights: Tensor) -> Tensor:
            changes = []
            # One objective after another: onnxruntime neither sums nor broadcasts batches of four axes that are empty.
            for objective in range(weights.shape[-2]):
                own = {name: weights[..., objective, part].unsqueeze(-2) for name, part in parts}
                if self.kind == "film":
                    moved = plain * (1 + own["scales"]) + own["shifts"]
                elif self.kind == "lora":
                    moved = plain + read @ own["updates"].reshape(*weights.shape[:-2], hidden, self.rank).mT
                else:
                    moved = plain + inputs @ own["first weights"].reshape(*weights.shape[:-2], hidden, width).mT
                    moved = moved + own["shifts"]
                after = torch.relu(moved)
                score = (after - torch.relu(plain)) @ layers.last[..., objective, :].unsqueeze(-1)
                if self.kind == "dense":
                    score = score + after @ own["last weights"].mT
                changes.append(score + own["constant"])
            return torch.cat(changes, dim=-1)

        return change

    def fan_in(self, inputs: int, hidden: int) -> Tensor:
        """How many numbers of a kind meet in one hidden unit, or in the score ``[P]``.

        Where precisions start, that many share one: however wide the layer, all of them together move a score about as
        far as one weight of a linear head does.
        """
        shared = {"updates": self.rank, "first weights": inputs, "last weights": hidden}
        return torch.cat(
            [
                torch.full((part.stop - part.start,), float(shared.get(name, 1)))
                for name, part in self.parts(inputs, hidden).items()
            ]
        )


def mirror(first: nn.Linear, last: nn.Linear) -> None:
    """Start a perceptron that says exactly 0 and can be bent all the same.

    Its units come in pairs that are equal before the last layer, whose weights on them are opposite. With a last layer
    of zeros the scores would not feel what adapters do to the hidden units, and neither would any gradient. Source: the
    symmetric start of Chizat et al., On Lazy Training in Differentiable Programming, 2019. An odd unit begins unheard.
    """
    half = first.out_features // 2
    with torch.no_grad():
        nn.init.normal_(last.weight, std=first.out_features**-0.5)
        nn.init.zeros_(last.bias)
        for kept in (first.weight, first.bias):
            kept[half : 2 * half] = kept[:half]
        last.weight[:, half : 2 * half] = -last.weight[:, :half]
        last.weight[:, 2 * half :] = 0.0
