"""What there is to say about a release's files: the section `export` of the config."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tasks.data.contract import Section

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

    @model_validator(mode="after")
    def _variants_are_named_once(self) -> Self:
        if len(set(self.variants)) < len(self.variants):
            raise ValueError(f"variants: {list(self.variants)!r} names one twice; remove one")
        return self
