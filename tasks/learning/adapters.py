"""Adaptation: the one pure function that finds the few numbers of a segment, for many segments at once.

Training, nightly adaptation, both exams and the baselines all call `adapt`; nothing else in the project adapts. Its
two ways are a closed form (`solve`) and steps down the gradient (`descend`), with the same inputs and answers.

Shapes: B segments, S support rows (padded), K objectives, D adapter features.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tasks.data.contract import Section
from tasks.errors import InvalidConfig
from tasks.learning.solvers import ObjectiveKind, descend, solve

SMALLEST_PRECISION = 1e-2
"""Floor of a learned precision, so that every system of equations is well posed."""


class AdapterConfig(Section):
    """How a segment bends the shared network."""

    kind: Literal["none", "bias", "ridge", "gradient"] = "ridge"
    """`none`: the base serves everybody. `bias`: one number per segment and objective. `ridge`: a linear head on the
    ranker's adapter features, solved in closed form on the residuals of its parent's scores; the first choice.
    `gradient`: the same head, reached by a few gradient steps with learned rates; to train as first-order MAML or
    Reptile do, or where features are so many that a closed form, cubic in them, is too slow."""
    precision: Annotated[float, Field(gt=0)] = 4.0
    """Precision that factors are solved with, and the least that the history may put on a segment's constant and on its
    weights on factors; the stop nights scale all of them. In rows: the evidence at which a weight moves half-way. For
    `gradient` a rate is one over it: how far a single row moves a weight."""
    coarse_precision: Annotated[float, Field(gt=0)] = 150.0
    """Precision that the coarser levels start from; the stop nights scale it. They stand for people they have never
    seen, so it is larger."""
    steps: Annotated[int, Field(ge=1, le=10)] = 2
    """Steps of an adaptation. Of a closed form, Newton steps: one is the classical ridge on residuals, and a rating
    needs no more; where clicks are nearly certain from a segment's taste, a second one matters. Of `gradient`, gradient
    steps: two lie near the ridge, one is cheapest, ten are the ridge."""

    def width(self, features: int) -> int:
        """How many of the ranker's ``features`` are used (the constant 1 is the first)."""
        return {"none": 0, "bias": 1, "ridge": features, "gradient": features}[self.kind]

    @property
    def in_closed_form(self) -> "AdapterConfig":
        """The closed form that weighs the same features: itself, or the ridge in place of gradient steps."""
        return self.model_copy(update={"kind": "ridge", "steps": 2}) if self.kind == "gradient" else self


class Precisions(nn.Module):
    """Learned precision of every weight at every level of the ladder, finest level first: ``[L, K, D]``.

    To gradient steps they are rates, one over the precision; Meta-SGD (Li et al., 2017) learns one per weight likewise.
    """

    def __init__(self, levels: int, objectives: int, width: int, config: AdapterConfig) -> None:
        super().__init__()
        start = torch.full((levels, objectives, width), config.coarse_precision)
        start[0] = config.precision
        self.logarithm = nn.Parameter(start.log())

    def forward(self) -> Tensor:
        """Precisions ``[L, K, D]``, positive."""
        return self.logarithm.exp().clamp_min(SMALLEST_PRECISION)


def adapt(
    features: Tensor,
    offsets: Tensor,
    labels: Tensor,
    weights: Tensor,
    precision: Tensor,
    kinds: Sequence[ObjectiveKind],
    config: AdapterConfig,
    first_order: bool = False,
) -> Tensor:
    """Weights ``[B, K, D]`` that bend each segment's scores towards its support rows, as the config says.

    Args:
        features: ``[B, S, D]``; this and the next five as for `solve`.
        offsets: ``[B, S, K]``.
        labels: ``[B, S, K]``.
        weights: ``[B, S]``.
        precision: ``[K, D]``.
        kinds: of the objectives.
        config: closed form or gradient steps, and how many.
        first_order: see `descend`; closed forms have no such reading, and training refuses to ask for it.
    """
    rows = (features, offsets, labels, weights, precision, kinds, config.steps)
    return descend(*rows, first_order) if config.kind == "gradient" else solve(*rows)


def apply(logits: Tensor, features: Tensor, solution: Tensor) -> Tensor:
    """Scores of rows under their segments' weights.

    Args:
        logits: ``[..., K]``.
        features: ``[..., D]``.
        solution: each row's weights ``[..., K, D]``.

    Returns:
        Adapted scores ``[..., K]``, before the sigmoid.
    """
    return logits + torch.einsum("...d,...kd->...k", features, solution)


def check_width(config: AdapterConfig, features: int) -> None:
    """Refuse a linear head that has no features but the constant.

    Raises:
        InvalidConfig: `ridge` or `gradient` over a ranker without adapter features.
    """
    if config.kind in ("ridge", "gradient") and features < 2:
        raise InvalidConfig(
            f"adapter.kind is {config.kind!r}, but the ranker has no adapter features (no factors, no numbers of "
            "candidates): there is nothing to bend but the constant; set ranker.factors to 1 or more, or adapter.kind "
            "to 'bias'"
        )
