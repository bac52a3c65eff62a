"""Layers that torch does not have: numbers as a network reads them, their products, matching, factors of new items.

Shapes: ``...`` any leading axes, F numbers, W width, C categorical columns, D adapter features, M prototypes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

SMALLEST_SCALE = 1e-6
"""A column that spreads less has no scale of its own."""


def at_positions(values: Tensor, positions: tuple[int, ...]) -> Tensor:
    """Values ``[..., F]`` at some positions; neighbours as a view, which an exported graph says in one node."""
    if not positions:
        return values[..., :0]
    if positions == tuple(range(positions[0], positions[0] + len(positions))):
        return values[..., positions[0] : positions[0] + len(positions)]
    return values[..., list(positions)]


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
        missing = torch.isnan(numbers).to(numbers.dtype)
        return torch.cat([normalised(numbers, self.mean, self.scale), missing], dim=-1)


def normalised(numbers: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Numbers ``[..., F]`` less their means in units of their scales, clipped to ±5; 0 where missing (NaN).

    A column whose scale is infinite is left out: it becomes 0.

    >>> normalised(torch.tensor([3.0, float("nan"), 7.0]), torch.ones(3), torch.tensor([4.0, 1.0, torch.inf])).tolist()
    [0.5, 0.0, 0.0]
    """
    known = torch.where(torch.isnan(numbers), mean, numbers)
    return nn.functional.hardtanh((known - mean) / scale, -5.0, 5.0)


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


class Matching(nn.Module):
    """Each row's shares in learned prototypes: the softmax of how well it fits them.

    What a prototype says of the features' constant is its bias.
    """

    def __init__(self, width: int, prototypes: int) -> None:
        """Start from random prototypes: equal ones would get equal gradients, and stay equal.

        Args:
            width: D.
            prototypes: M.
        """
        super().__init__()
        self.width = width
        self.prototypes = nn.Parameter(torch.randn(prototypes, width) * width**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        """Shares ``[..., M]`` of rows ``[..., D]``: positive, 1 in all."""
        return torch.softmax(nn.functional.linear(features, self.prototypes), dim=-1)


class WarmUp(nn.Module):
    """Factors that an item has by its columns alone: what its own rows are held to, and all there is before them.

    A line in its numbers plus one row of a table for each of its categories. It begins at 0 and is solved with the
    items' own factors (``closed_form.factorise``). Sources: attribute-to-feature mappings (Gantner et al., 2010), as
    the mean of the factors' prior (Agarwal and Chen, regression-based latent factor models, 2009).
    """

    def __init__(self, numbers: int, categories: Sequence[int], width: int) -> None:
        """Begin at 0.

        Args:
            numbers: of an item, its indicators of missing ones included: F.
            categories: rows of each categorical column's table, the unknown row 0 included: C of them.
            width: factors: W.
        """
        super().__init__()
        self.constant = nn.Parameter(torch.empty(width))
        self.line = nn.Linear(numbers, width, bias=False) if numbers else None
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for rows in categories)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, numbers: Tensor, categories: Sequence[Tensor]) -> Tensor:
        """Factors ``[..., W]``.

        Args:
            numbers: normalised, ``[..., F]``.
            categories: ids that the tables have, one ``[...]`` per column.
        """
        factors: Tensor = self.constant if self.line is None else self.constant + self.line(numbers)
        for table, ids in zip(self.tables, categories, strict=True):
            factors = factors + table(ids)
        return factors
