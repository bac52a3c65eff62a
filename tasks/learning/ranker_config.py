"""The settings of the ranker."""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tasks.data.contract import Section

CROSS_LAYERS = 2
"""Of `dcn`, where the config says nothing."""
HEADS, BLOCKS = 2, 1
"""Of `transformer`, where the config says nothing."""
MOST_HISTORY = 200
"""Rows of a user that a `transformer` may read."""


class RankerConfig(Section):
    """The shared network."""

    kind: Literal["mlp", "dcn", "transformer"] = "mlp"
    """What reads the request's and the candidate's tower together, beside a calibrated item rate. `mlp`: a multi-layer
    perceptron over both and their product. `dcn`: cross layers, and a perceptron on what comes out of them (DCN-V2,
    stacked); every unit of one tower then meets every unit of the other and the joint statistics. `transformer`: `mlp`,
    whose perceptron also reads what the candidate finds in the user's recent rows (`history`)."""
    cross_layers: Annotated[int, Field(ge=1, le=8, exclude_if=lambda layers: layers == CROSS_LAYERS)] = CROSS_LAYERS
    """Cross layers of `dcn`: how many inputs one product can have, less one. A dump leaves the default out."""
    history: Annotated[int, Field(ge=0, le=MOST_HISTORY, exclude_if=lambda rows: rows == 0)] = 0
    """How many of the user's newest rows of nights before the request's a `transformer` reads: of each the item, the
    categorical candidate columns, the label of the first objective, and how long ago it was. Every request carries
    them. A dump leaves the default out, as for the next two."""
    heads: Annotated[int, Field(ge=1, le=16, exclude_if=lambda heads: heads == HEADS)] = HEADS
    """Heads of a `transformer`'s attention, which share its `hidden` units: a divisor of them."""
    blocks: Annotated[int, Field(ge=1, le=4, exclude_if=lambda blocks: blocks == BLOCKS)] = BLOCKS
    """Blocks of a `transformer`: each is attention and two dense layers."""
    embedding: Annotated[int, Field(ge=1, le=512)] = 16
    """Width of an embedding."""
    hidden: Annotated[int, Field(ge=1, le=4096)] = 32
    """Width of the hidden layers and of the towers' outputs."""
    factors: Annotated[int, Field(ge=0, le=256)] = 4
    """Adapter features that are free factors of the item, started in closed form from the history."""
    warm_up: Annotated[bool, Field(exclude_if=lambda warm: not warm)] = False
    """Whether an item's factors are held to what its numbers and categories say of them: a new item begins there, and
    its own rows take over as they come. Without it factors are held to 0, and a new item has none. For catalogues whose
    items are mostly new; a dump leaves the default out."""
    category_factors: Annotated[int, Field(ge=0, le=256)] = 4
    """Adapter features that are free factors of a category, for each categorical candidate column, started likewise;
    of a `multi` column the mean of its values' factors."""
    direct: bool = True
    """Whether the candidate's numbers, normalised, are adapter features as they stand: what a segment likes about a
    column is then learned from its own rows, whether or not the towers have found the column useful."""
    features: Annotated[int, Field(ge=0, le=256)] = 0
    """Adapter features that the candidate tower computes: tastes that are no straight line in a number, at the price
    of weights that every segment has to learn. All these and the constant 1 are what a linear adapter's weights
    multiply; one that bends the dense layers takes what they are given instead, and the network has none of these."""
    prior: Annotated[bool, Field(exclude_if=lambda told: not told)] = False
    """Whether the coarsest segments start from weights that the request's columns predict, in place of 0: what people
    of an age or a country tend to like is then known of those who have no rows yet. A map from the request tower to the
    weights of `direct` and `features`, learned by the outer loop; what a segment's rows say is held to it. For many
    users whose columns tell their tastes: of few users it learns who they are. A dump leaves the default out."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Dropout of hidden units in training."""
    request_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.8
    """Share of rows whose request tower is silenced in training: a log has far fewer users than rows, and the tower
    would learn them by heart."""
    id_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of ids, those of lists' values and of histories among them, replaced by `unknown` in training, so that the
    unknown embedding serves new items."""
    user_statistics: bool = False
    """Whether the network reads the user's as-of rate and count. A personal adapter reads the very rows that they sum
    up, and both together count the same evidence twice; turn it on where the ladder has no user level."""

    @model_validator(mode="after")
    def _only_what_is_built(self) -> Self:
        if faults := list(self._misfits()):
            raise ValueError("\n".join(faults))
        return self

    def _misfits(self) -> Iterator[str]:
        if self.kind != "dcn" and self.cross_layers != CROSS_LAYERS:
            yield (
                f"ranker.cross_layers = {self.cross_layers} belongs to ranker.kind 'dcn', and the kind is "
                f"{self.kind!r}; remove it, or set ranker.kind to 'dcn'"
            )
        if self.kind == "transformer":
            if self.history == 0:
                yield (
                    "ranker.kind 'transformer' reads the user's recent rows, and ranker.history is 0; set "
                    "ranker.history to how many it is to read, such as 20, or ranker.kind to 'mlp'"
                )
            if self.hidden % self.heads:
                yield (
                    f"ranker.heads = {self.heads} does not divide ranker.hidden = {self.hidden}, which heads share; "
                    "change one of them"
                )
            return
        for name, default in (("history", 0), ("heads", HEADS), ("blocks", BLOCKS)):
            if (value := getattr(self, name)) != default:
                yield (
                    f"ranker.{name} = {value} belongs to ranker.kind 'transformer', and the kind is {self.kind!r}; "
                    "remove it, or set ranker.kind to 'transformer'"
                )
