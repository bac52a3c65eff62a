"""Adaptation: the one pure function that finds the few numbers of a segment, for many segments at once.

Training, nightly adaptation, both exams and the baselines all call `Adaptation.solve`; nothing else in the project
adapts. Its ways are closed forms (`solve`, `match`) and steps down the gradient, of linear features (`descend`) or
through the dense layers (`descend_through`), with the same inputs and answers.

Shapes: B segments, S support rows (padded), T rows, K objectives, D adapter features. Where the dense layers are bent
(`AdapterConfig.bent`), features are the X inputs of the joint perceptron, and D weights are the P deviations of `Bent`;
where they match (`AdapterConfig.matching`), features are a row's shares in D prototypes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tasks.data.contract import Section
from tasks.errors import InvalidConfig
from tasks.learning.bending import Bent, Perceptron
from tasks.learning.material import I64, Windows, batches
from tasks.learning.networks import Ranker
from tasks.learning.ranker_config import RankerConfig
from tasks.learning.solvers import ObjectiveKind, descend, descend_through, match, solve

SMALLEST_PRECISION = 1e-2
"""Floor of a learned precision, so that every system of equations is well posed."""
RANK = 4
"""Of `lora`, where the config says nothing."""
PROTOTYPES = 8
"""Of `matching`, where the config says nothing."""
STEPS = 2
"""Of an adaptation, where the config says nothing."""
USUAL_HIDDEN = 32
"""Hidden units that a row is counted as one for in a batch; wider layers make smaller batches."""
NUMBERS = 16
"""How many more numbers a batch of bent segments may have than one of systems of equations."""


class AdapterConfig(Section):
    """How a segment bends the shared network."""

    kind: Literal["none", "bias", "ridge", "gradient", "film", "lora", "matching"] = "ridge"
    """`none`: the base serves everybody. `bias`: one number per segment and objective. `ridge`: a linear head on the
    ranker's adapter features, solved in closed form on the residuals of its parent's scores; the first choice.
    `gradient`: the same head, reached by a few gradient steps with learned rates; to train as first-order MAML or
    Reptile do, or where features are so many that a closed form, cubic in them, is too slow; or the joint layers, see
    `bends`. `film`: a scale and a shift for every hidden unit of the joint perceptron, twice `ranker.hidden` numbers;
    where segments have tens of rows and weigh what the towers have found differently, in ways that are no sum of the
    adapter features. `lora`: an update of low rank to the perceptron's first layer, `rank` times `ranker.hidden`
    numbers; where segments have hundreds of rows, such as markets and cohorts, and combine the towers differently.
    Both take gradient steps and keep the constant of `bias` beside their own numbers. `matching`: attention over the
    segment's support; a row hears the rows that share its prototypes, which are kinds of rows by their adapter
    features. It has a number for each of `prototypes`, and no system to solve; where segments like what is near to what
    they liked, in ways that are no sum of the adapter features."""
    bends: Literal["head", "dense"] = Field("head", exclude_if=lambda what: what == "head")
    """What `gradient` steps move. `head`: the weights on the adapter features. `dense`: every weight of the joint
    perceptron, as MAML does with all layers, but not the towers, cross layers and attention below it; for few segments
    with thousands of rows each, as each has `ranker.hidden` times the perceptron's inputs numbers (3,000 and more with
    the default ranker, millions with hundreds of hidden units), and the bank has them for every segment. A dump leaves
    the default out."""
    rank: Annotated[int, Field(ge=1, le=64)] = Field(RANK, exclude_if=lambda rank: rank == RANK)
    """Of `lora`: in how many directions of the perceptron's inputs segments differ. A dump leaves the default out."""
    prototypes: Annotated[int, Field(ge=1, le=256)] = Field(PROTOTYPES, exclude_if=lambda count: count == PROTOTYPES)
    """Of `matching`: how many kinds of rows are told apart, by what is typical of each. Every row has a share in every
    one of them; with one it is `bias` with one step. A dump leaves the default out."""
    precision: Annotated[float, Field(gt=0)] = 4.0
    """Precision that factors are solved with, and the least that the history may put on a segment's constant and on its
    weights on factors; the stop nights scale all of them. In rows: the evidence at which a weight moves half-way. For
    gradient steps a rate is one over it: how far a single row moves a weight; of weights that meet in one hidden unit,
    all of them together."""
    coarse_precision: Annotated[float, Field(gt=0)] = 150.0
    """Precision that the coarser levels start from; the stop nights scale it. They stand for people they have never
    seen, so it is larger."""
    steps: Annotated[int, Field(ge=1, le=10)] = STEPS
    """Steps of an adaptation. Of a closed form, Newton steps: one is the classical ridge on residuals, and a rating
    needs no more; where clicks are nearly certain from a segment's taste, a second one matters. Of the others, gradient
    steps: on the head two lie near the ridge, one is cheapest, ten are the ridge. `matching` takes none."""

    @model_validator(mode="after")
    def _options_of_the_kind(self) -> Self:
        if self.bends != "head" and self.kind != "gradient":
            raise ValueError(
                f"adapter.bends = {self.bends!r} belongs to adapter.kind 'gradient', and the kind is {self.kind!r}; "
                "remove it, or set adapter.kind to 'gradient'"
            )
        if self.rank != RANK and self.kind != "lora":
            raise ValueError(
                f"adapter.rank = {self.rank} belongs to adapter.kind 'lora', and the kind is {self.kind!r}; remove it, "
                "or set adapter.kind to 'lora'"
            )
        if self.prototypes != PROTOTYPES and self.kind != "matching":
            raise ValueError(
                f"adapter.prototypes = {self.prototypes} belongs to adapter.kind 'matching', and the kind is "
                f"{self.kind!r}; remove it, or set adapter.kind to 'matching'"
            )
        if self.steps != STEPS and self.kind == "matching":
            raise ValueError(
                f"adapter.steps = {self.steps} does nothing for adapter.kind 'matching', which reads the support once; "
                "remove it, or set adapter.kind to 'ridge'"
            )
        return self

    @property
    def takes_steps(self) -> bool:
        """Whether it is found by gradient steps."""
        return self.kind in ("gradient", "film", "lora")

    @property
    def bent(self) -> Bent | None:
        """What of the dense layers it bends; None if it is linear."""
        if self.kind == "film":
            return Bent("film")
        if self.kind == "lora":
            return Bent("lora", self.rank)
        return Bent("dense") if self.bends == "dense" else None

    @property
    def matching(self) -> int:
        """How many prototypes rows have shares in; 0 for other kinds."""
        return self.prototypes if self.kind == "matching" else 0

    def width(self, width: int) -> int:
        """How many of a ranker's ``width`` numbers per objective are used (the constant's is the first)."""
        return {"none": 0, "bias": 1}.get(self.kind, width)

    def reads_learned(self, features: int) -> bool:
        """Whether any of its weights is on what training learns for it, in a ranker with so many `features`."""
        linear = self.kind in ("ridge", "gradient") and features > 0
        return linear or self.bent is not None or self.matching > 0

    @property
    def in_closed_form(self) -> "AdapterConfig":
        """The closed form that weighs the same features: itself, or the ridge in place of gradient steps."""
        linear = self.kind == "gradient" and self.bent is None
        return self.model_copy(update={"kind": "ridge", "steps": STEPS}) if linear else self


class Precisions(nn.Module):
    """Learned precision of every weight at every level of the ladder, finest level first: ``[L, K, D]``.

    To gradient steps they are rates, one over the precision; Meta-SGD (Li et al., 2017) learns one per weight likewise.
    """

    def __init__(
        self, levels: int, objectives: int, width: int, config: AdapterConfig, fan_in: Tensor | None = None
    ) -> None:
        """Start from the config's.

        Args:
            levels: L.
            objectives: K.
            width: D.
            config: the precisions of the finest level and of the others.
            fan_in: how many weights share one of these, ``[D]``; None for 1.
        """
        super().__init__()
        start = torch.full((levels, objectives, width), config.coarse_precision)
        start[0] = config.precision
        if fan_in is not None:
            start = start * fan_in
        self.logarithm = nn.Parameter(start.log())

    def forward(self) -> Tensor:
        """Precisions ``[L, K, D]``, positive."""
        return self.logarithm.exp().clamp_min(SMALLEST_PRECISION)


@dataclass(frozen=True)
class Adaptation:
    """How segments are adapted on a base: what travels from a config and a network to wherever one is.

    Attributes:
        kinds: of the objectives.
        config: which way, and how many steps.
        perceptron: the layers that are bent; None where adapters are linear.
        first_order: what the support says is constant to whoever differentiates a solution, see `descend`; closed forms
            have no such reading, and training refuses to ask for it.
    """

    kinds: tuple[ObjectiveKind, ...]
    config: AdapterConfig
    perceptron: Perceptron | None = None
    first_order: bool = False

    @classmethod
    def of(cls, network: Ranker, config: AdapterConfig, first_order: bool = False) -> "Adaptation":
        """Of a network; where the dense layers are bent, its parameters are held, not copied."""
        return cls(network.shape.kinds, config, network.perceptron(), first_order)

    @property
    def in_closed_form(self) -> "Adaptation":
        """The same with the closed form in place of gradient steps on linear features."""
        return replace(self, config=self.config.in_closed_form, first_order=False)

    def solve(
        self, features: Tensor, offsets: Tensor, labels: Tensor, weights: Tensor, precision: Tensor, origin: Tensor
    ) -> Tensor:
        """What segments add to the weights that they inherit, to bend their scores towards their support rows.

        Args:
            features: ``[B, S, D]``; this and the next four as for `solvers.solve`.
            offsets: scores under the inherited weights ``[B, S, K]``.
            labels: ``[B, S, K]``; NaN where missing.
            weights: ``[B, S]``; 0 for padding.
            precision: ``[K, D]``: how strongly each weight is held at the inherited one.
            origin: the inherited weights ``[B, K, D]``. Linear scores do not depend on where a deviation begins.

        Returns:
            Deviations ``[B, K, D]``; exactly 0 for a segment without support.
        """
        bent, layers = self.config.bent, self.perceptron
        rows = (offsets, labels, weights, precision, self.kinds, self.config.steps)
        if bent is None or layers is None:
            if self.config.kind == "gradient":
                return descend(features, *rows, self.first_order)
            if self.config.kind == "matching":
                return match(features, offsets, labels, weights, precision, self.kinds)
            return solve(features, *rows)
        if self.first_order:
            features, layers, origin = features.detach(), layers.detach(), origin.detach()
        change = bent.changes(layers, features)
        before = change(origin)
        return descend_through(lambda own: change(origin + own) - before, *rows, self.first_order)

    def apply(self, logits: Tensor, features: Tensor, weights: Tensor) -> Tensor:
        """Scores ``[S, K]`` of rows that share the weights ``[K, D]``, from their logits and features ``[S, D]``."""
        bent, layers = self.config.bent, self.perceptron
        if bent is None or layers is None:
            return apply(logits, self.used(features, weights), weights)
        return logits + bent.change(layers, features, weights)

    def scores(self, logits: Tensor, features: Tensor, table: Tensor, which: I64) -> Tensor:
        """Scores of rows under the weights of their segments.

        Args:
            logits: ``[T, K]``, before adaptation.
            features: ``[T, D]``; the first of them where the table is narrower.
            table: weights ``[E, K, D]``.
            which: each row's place in the table [T].

        Returns:
            Adapted scores ``[T, K]``, before the sigmoid.
        """
        bent, layers = self.config.bent, self.perceptron
        if bent is None or layers is None:
            weights = table[torch.from_numpy(which).to(table.device)]
            return apply(logits, self.used(features, table), weights)
        # Weights are many here: rows of a segment are brought together, so that each has them once and not every row.
        order = np.argsort(which, kind="stable")
        segments, first, lengths = np.unique(which[order], return_index=True, return_counts=True)
        by_length = np.argsort(lengths, kind="stable")
        changes, places = [logits[:0]], [order[:0]]
        for batch in batches(by_length, lengths[by_length], *self.size(table)):
            windows = Windows(first[batch], first[batch] + lengths[batch])
            at, window = windows.flat()
            padded = np.zeros((len(batch), int(windows.lengths.max())), np.int64)
            cell = (window, at - windows.start[window])
            padded[cell] = order[at]
            inputs = features[torch.from_numpy(padded).to(features.device)]
            weights = table[torch.from_numpy(segments[batch]).to(table.device)]
            change = bent.change(layers, inputs, weights)
            changes.append(change[tuple(torch.from_numpy(part).to(change.device) for part in cell)])
            places.append(order[at])
        back = torch.from_numpy(np.argsort(np.concatenate(places))).to(logits.device)
        return logits + torch.cat(changes)[back]

    def used(self, features: Tensor, weights: Tensor) -> Tensor:
        """Of the ranker's features, those that weights ``[..., K, D]`` work on: where they are linear, the first D."""
        return features[..., : weights.shape[-1]] if self.perceptron is None else features

    def size(self, table: Tensor) -> tuple[int, int]:
        """What a segment and a row of it count in `batches`, for weights ``[..., K, D]``."""
        numbers = table.shape[-2] * table.shape[-1]
        if self.perceptron is None:
            return numbers, 1
        units = len(self.kinds) * self.perceptron.first.shape[-2]
        return max(1, numbers // NUMBERS), max(1, units // USUAL_HIDDEN)


def apply(logits: Tensor, features: Tensor, solution: Tensor) -> Tensor:
    """Scores of rows under linear weights.

    Args:
        logits: ``[..., K]``.
        features: ``[..., D]``.
        solution: each row's weights ``[..., K, D]``.

    Returns:
        Adapted scores ``[..., K]``, before the sigmoid.
    """
    return logits + torch.einsum("...d,...kd->...k", features, solution)


def unheard(
    ranker: RankerConfig,
    adapter: AdapterConfig,
    numeric: bool = True,
    categorical: bool = True,
    listed: bool = True,
) -> Iterator[str]:
    """What a ranker is to tell its adapters and these do not hear, or adapters would weigh and nobody tells.

    Each comes with its remedy.

    Args:
        ranker: the network.
        adapter: its adapters.
        numeric: whether there are numeric candidate columns.
        categorical: whether there are categorical ones.
        listed: whether there are lists of categories.
    """
    linear = adapter.kind in ("ridge", "gradient") and adapter.bent is None
    weighs = linear or adapter.kind == "matching"
    grouped = ranker.category_factors and (categorical or listed)
    if weighs and not (ranker.factors or ranker.features or grouped or (ranker.direct and numeric)):
        yield _untold(adapter)
    if ranker.warm_up and not (ranker.factors and weighs and (numeric or categorical)):
        yield (
            "ranker.warm_up: it tells an adapter the factors of items without rows, and needs adapter.kind 'ridge', "
            "'matching', or 'gradient' on the head, ranker.factors above 0, and a numeric or categorical candidate "
            "column (lists and vectors do not tell them); remove it, or change what is missing"
        )
    if ranker.prior and not (linear and (ranker.features or (ranker.direct and numeric))):
        yield (
            "ranker.prior: it predicts an adapter's weights of candidates' numbers and tower features, and needs "
            "adapter.kind 'ridge' or 'gradient' on the head, and ranker.features above 0 or ranker.direct with a "
            "numeric candidate column; remove it, or change what is missing"
        )


def _untold(config: AdapterConfig) -> str:
    return (
        f"adapter.kind: {config.kind!r} weighs adapter features, and the ranker has none but the constant; set "
        "ranker.factors to 1 or more, or adapter.kind to 'bias'"
    )


def check_width(config: AdapterConfig, features: int) -> None:
    """Refuse a linear head, or matching, that has no features but the constant.

    Args:
        config: of the adapters.
        features: what a row is described by to them, the constant first.

    Raises:
        InvalidConfig: `ridge`, `gradient` or `matching` over a ranker without adapter features.
    """
    if config.kind in ("ridge", "gradient", "matching") and features < 2:
        raise InvalidConfig(_untold(config))
