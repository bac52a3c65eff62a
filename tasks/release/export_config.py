"""What there is to say about a release's files: the section `export` of the config."""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tasks.data.contract import Section
from tasks.learning.ranker_config import RankerConfig

MOST_FEEDBACK = 200
"""Rows; each is one more unrolled pivot of a graph, up to the width of an adapter."""

SOLVED = ("ridge", "bias")
"""Kinds of adapters that a graph solves from feedback."""
VariantName = Literal["fp16", "int8"]
MAX_AUC_LOSS, MAX_LOG_LOSS_RISE = 0.001, 0.001


class ExportConfig(Section):
    """What a release holds beside its fp32 graphs.

    A dump leaves out what has its default: digests of configs and keys of steps stay.
    """

    variants: tuple[VariantName, ...] = Field((), exclude_if=lambda names: not names)
    """Smaller forms of `score.onnx` that are built beside it, from the same weights. `fp16`: tables, layers and bank in
    half precision, for CUDA. `int8`: tables, layers and bank as bytes with a scale per row, for the CPU. Rankers take
    the one for their device where it has passed on rows that the weights have not seen, else fp32."""
    max_auc_loss: Annotated[float, Field(ge=0, le=0.1)] = Field(
        MAX_AUC_LOSS, exclude_if=lambda most: most == MAX_AUC_LOSS
    )
    """Most per-user AUC that a variant may lose on the held-out night; with more it ships, and no ranker takes it."""
    max_log_loss_rise: Annotated[float, Field(ge=0, le=0.1)] = Field(
        MAX_LOG_LOSS_RISE, exclude_if=lambda most: most == MAX_LOG_LOSS_RISE
    )
    """Most log-loss per row that a variant may add on the held-out night; of a rating, squared error in units of its
    labels' variance."""

    feedback: Annotated[int, Field(ge=0, le=MOST_FEEDBACK)] = Field(0, exclude_if=lambda rows: rows == 0)
    """Most rows of feedback that a ranking request may bring: what its user has just done. The release then holds a
    second set of graphs that solve his adapter on the spot, as a night would; 0 builds none. Give as many as
    `segments.max_support` where a request is to bring all that a user's weights would be solved from: his feedback is
    taken for the whole of it. Systems have the smaller of this and the adapter's width. With adapter.kind `ridge` or
    `bias`, `segments.levels` that begin with the user, and a ranker without a history."""

    @model_validator(mode="after")
    def _variants_are_named_once(self) -> Self:
        if len(set(self.variants)) < len(self.variants):
            raise ValueError(f"variants: {list(self.variants)!r} names one twice; remove one")
        return self


def unsolvable(feedback: int, kind: str, finest: tuple[str, ...], user: str, ranker: RankerConfig) -> Iterator[str]:
    """Why feedback cannot be solved in a graph, each with its remedy.

    Args:
        feedback: rows that requests may bring.
        kind: of the adapters.
        finest: columns of the finest level.
        user: the user column.
        ranker: the network.
    """
    if not feedback:
        return
    off = "or set export.feedback to 0"
    if kind not in SOLVED:
        yield (
            f"export.feedback: {feedback} rows are solved in the graph in closed form, and adapter.kind is {kind!r}; "
            f"set it to {' or '.join(map(repr, SOLVED))}, {off}"
        )
    if finest != (user,):
        yield (
            f"export.feedback: feedback adapts a user, and the finest of segments.levels is {list(finest)!r}; put "
            f"[{user}] first, {off}"
        )
    if ranker.history:
        yield (
            f"export.feedback: ranker.history = {ranker.history} reads the user's recent rows already, and they would "
            f"not hold what he has just left; set ranker.kind to 'mlp' or 'dcn', {off}"
        )
