"""Layers that torch does not have: numbers as a network reads them, and products of all that it has read.

Shapes: ``...`` any leading axes, F numbers, W width.
"""

import torch
from torch import Tensor, nn

SMALLEST_SCALE = 1e-6
"""A column that spreads less has no scale of its own."""


class Normaliser(nn.Module):
    """Centres and scales numbers; a missing one becomes 0 and raises its indicator."""

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def fit(self, mean: Tensor, deviation: Tensor) -> None:
        """Take over means and standard deviations ``[F]``; what hardly varies is centred and left alone."""
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(deviation > SMALLEST_SCALE, deviation, torch.ones_like(deviation)))

    def forward(self, numbers: Tensor) -> Tensor:
        """Numbers ``[..., F]`` (NaN = missing) to ``[..., 2F]``: normalised values, clipped to ±5, then indicators."""
        if not numbers.shape[-1]:
            return numbers
        missing = torch.isnan(numbers)
        values = ((torch.where(missing, self.mean, numbers) - self.mean) / self.scale).clamp(-5.0, 5.0)
        return torch.cat([values, missing.to(values.dtype)], dim=-1)


class Cross(nn.Module):
    r"""Cross layers of DCN-V2: each multiplies what it is given by the input of the first once more.

        x_(l+1) = x_0 * (W_l x_l + b_l) + x_l

    After L of them an output is a polynomial of degree L + 1 in the inputs, and the inputs themselves are still there.
    Source: Wang et al., DCN V2, 2021, equation 1.

    One layer with W = 2, b = 1 turns 3 into 3 * (2 * 3 + 1) + 3.

    >>> cross = Cross(1, 1)
    >>> _ = nn.init.constant_(cross.layers[0].weight, 2.0), nn.init.constant_(cross.layers[0].bias, 1.0)
    >>> cross(torch.tensor([3.0])).item()
    24.0
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, values: Tensor) -> Tensor:
        """Values ``[..., W]`` to as many."""
        crossed = values
        for layer in self.layers:
            crossed = values * layer(crossed) + crossed
        return crossed
