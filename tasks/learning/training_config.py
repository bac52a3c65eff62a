"""What there is to say about training: its section of the config."""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tasks.data.contract import ColumnName, Section
from tasks.learning.outer import Freeze, OuterLoop

CHECKPOINT_SECONDS = 60.0
SWA_AFTER, DISTILL = 1, 0.5
EVENNESS = 0.5
BESIDE = frozenset({"checkpoint_seconds", "tensorboard"})
"""Fields that say what is told and kept of a training beside its base: no step's key depends on them."""


class TrainingConfig(Section):
    """How the base is trained.

    What was added later is left out of a dump where it has its default: digests of configs and keys of steps stay.
    """

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of initial weights, dropout and episodes; combined with the night."""
    threads: Annotated[int, Field(ge=1, le=256)] | None = None
    """CPU threads of the arithmetic; None leaves it to torch. Equal digests need equal threads."""
    outer: OuterLoop = "second_order"
    """What the base is trained for. `second_order`: the loss of later rows after adaptation flows back through the
    whole of it, closed form or steps (MAML and ANIL, of which the closed forms are the exact limit); the first choice,
    and without an adapter plain training on later rows. `first_order`: the gradients that the adapter's steps took are
    constants, so the loss flows into the later rows' scores and features and into the rates, never through the
    support (first-order MAML: Finn et al., 2017, 5.2; Nichol et al., 2018); for supports too long to flow through.
    `reptile`: towards where gradient steps on whole visits would lead, adapter and network together (Nichol et al.,
    2018); no support is split from later rows, and rates stay as the history and the stop nights set them. `joint`: no
    adaptation in the loss, adapters are found afterwards; the ablation that says what the others earn. `first_order`
    and `reptile` need an adapter that takes gradient steps: `adapter.kind` `gradient`, `film` or `lora`. What `lora`
    reads of the inputs, and the prototypes of `matching`, are learned by all of them that fit but `joint`, which leaves
    them as the history has them."""
    freeze: Freeze = "nothing"
    """What of the network the outer loop leaves as it is, to the bit. `nothing`: all is trained. `embeddings`: tables
    with a row per key stay, where few rows per key would be learned by heart, or where copies of tables are too dear
    (`reptile`). `all_but_head`: only the layers that end in scores or adapter features, what `lora` reads and
    prototypes are trained, for a start that is trusted. How strongly adapters are held does not count as network, and
    closed forms are solved in any case."""
    epochs: Annotated[int, Field(ge=0, le=1000)] = 6
    """Most epochs; after each the stop nights are scored. 0 keeps the closed-form start."""
    steps_per_epoch: Annotated[int, Field(ge=1)] = 20
    """Gradient steps of an epoch."""
    visits_per_step: Annotated[int, Field(ge=1)] = 64
    """Episodes of a step."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    """Step size of AdamW."""
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = 30.0
    """Weight decay of the layers: the share of them that a step takes off, in units of 0.0005, at any `learning_rate`
    (decoupled from it: Loshchilov and Hutter, 2019; the first epoch's ramp and the slower pace after a setback lower
    both). At the default learning rate no weight stays above one over it for long, whatever the rows ask. A chain of
    nights trains on nearly the same rows every night: what holds a layer in one training is too weak over sixty, in
    which it learns the window by heart. It is that of up to 100,000 rows of history, and beyond them less in
    proportion, as a prior is that weighs as much as so many rows. Where adapters bend the layers, and so live by what
    these start from, a thirtieth of it."""
    embedding_decay: Annotated[float, Field(ge=0)] = 3.0
    """Weight decay of the embeddings, in units of the learning rate; it does not fade with the history's rows."""
    base_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the loss before adaptation, so that the base stands by itself."""
    average: Annotated[float, Field(ge=0, lt=1)] = 0.98
    """Decay of the moving average of the weights, which is what is scored and kept."""
    averaging: Annotated[Literal["ema", "swa"], Field(exclude_if=lambda kind: kind == "ema")] = "ema"
    """Which average of the weights is scored and kept. `ema`: the exponential moving average with decay `average`.
    `swa`: the plain mean over every step after the first `swa_after` epochs (stochastic weight averaging: Izmailov et
    al., 2018); for longer trainings at a steady learning rate, where no step is worth more than another."""
    swa_after: Annotated[int, Field(ge=0, exclude_if=lambda epochs: epochs == SWA_AFTER)] = SWA_AFTER
    """Epochs before `swa` begins; until then the weights themselves are scored. The first epoch warms up."""
    mixed_precision: Annotated[bool, Field(exclude_if=lambda mixed: not mixed)] = False
    """Whether the network's layers compute in bfloat16 in training episodes, on a GPU with tensor cores much the
    faster. Weights, solves, losses and everything that is scored or published stay float32. Not with `reptile`."""
    members: Annotated[int, Field(ge=1, le=16, exclude_if=lambda members: members == 1)] = 1
    """Bases that are trained with seeds of their own, one after the other. With more than one, a student of the same
    shape is then trained towards their mean adapted predictions, and of it and the best member that with the lower stop
    loss is the night's base: a release is as large as ever, and the night trains `members` + 1 times as long. All of
    them are held in memory, and until the student is done `scratch` holds where each ended, five times the size of the
    network. With `second_order` and `first_order` only, which have predictions after adaptation."""
    distill: Annotated[float, Field(gt=0, le=1, exclude_if=lambda share: share == DISTILL)] = DISTILL
    """Share of the student's loss that is measured against the members' mean prediction; the rest is against the labels
    (Hinton et al., 2015)."""
    tensorboard: Annotated[str, Field(min_length=1)] | None = Field(None, exclude_if=lambda folder: folder is None)
    """Local directory that losses, learning rate, gradient norm and seconds of every epoch, and each night's exams, are
    written to for TensorBoard, a run for each pipeline and night; needs the extra `tensorboard`. Relative paths start
    at the working directory."""
    half_life_nights: Annotated[float, Field(ge=1)] | None = Field(None, exclude_if=lambda nights: nights is None)
    """Nights after which a night counts half: in how often its visits are episodes, and in the weight of its rows where
    closed forms are solved. For a window that is longer than tastes last; None counts all nights alike."""
    pull: Annotated[float, Field(ge=0, lt=1, exclude_if=lambda share: share == 0)] = 0.0
    """Share of the way back to the parent's weights that follows every gradient step: theta <- theta - pull (theta -
    parent), for all of the network that closed forms do not solve. For long chains of small nights, where each night's
    noise would add up; nothing where a chain begins."""
    even: ColumnName | None = Field(None, exclude_if=lambda name: name is None)
    """A categorical request column, such as `data.lake_column` or the market, by whose values episodes are drawn more
    evenly than visits come: without it a small lake beside a large one is hardly ever practised on. The stop nights
    count as they come."""
    evenness: Annotated[float, Field(gt=0, le=1, exclude_if=lambda power: power == EVENNESS)] = EVENNESS
    """How evenly: of a value with n visits each is drawn with a chance in proportion to n to the power of minus this. 1
    draws from every value alike (Conneau and Lample, 2019, whose exponent is one minus this)."""
    checkpoint_seconds: Annotated[float, Field(ge=0, exclude_if=lambda seconds: seconds == CHECKPOINT_SECONDS)] = (
        CHECKPOINT_SECONDS
    )
    """After the first epoch that ends this long after the last checkpoint, where training stands is written to
    `scratch`, five times the size of the network. A night that died goes on from there when it is run again, and ends
    at the same weights."""
    patience: Annotated[int, Field(ge=1)] = 2
    """Epochs without a better stop loss before training ends; three times as many until the first better one, where
    what adapters read has still to be learned and told nothing at the start."""
    stop_nights: Annotated[int, Field(ge=1)] = 7
    """Newest nights that training is stopped on and does not train on, when there is no parent. Of a short history, in
    which they would have more than a quarter of the rows, it stops on as many as have no more than that, at least one;
    how strongly adapters are held is then chosen on the visits of all of these nights in folds."""
    min_stop_rows: Annotated[int, Field(ge=1)] = 200
    """Fewest rows of new stop nights with which a parent's base is trained on; with fewer it is kept as it is."""
    start_rows: Annotated[int, Field(ge=1)] = 2_000_000
    """Most rows, the newest, that the closed-form start reads."""

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        if faults := list(self._misfits()):
            raise ValueError("\n".join(faults))
        return self

    def _misfits(self) -> Iterator[str]:
        if self.averaging == "ema" and self.swa_after != SWA_AFTER:
            yield (
                f"swa_after = {self.swa_after} belongs to training.averaging 'swa', and it is 'ema'; remove it, or set "
                "training.averaging to 'swa'"
            )
        if self.averaging == "swa" and 0 < self.epochs <= self.swa_after:
            yield (
                f"swa_after = {self.swa_after} leaves none of training.epochs = {self.epochs} to average; lower it, or "
                "raise training.epochs"
            )
        if self.mixed_precision and self.outer == "reptile":
            yield (
                "mixed_precision does not go with training.outer 'reptile', whose visits step on copies of the "
                "network that have no float32 original; set training.outer to another, or remove mixed_precision"
            )
        if self.members > 1 and self.outer in ("reptile", "joint"):
            yield (
                f"members = {self.members}: a student is trained towards predictions after adaptation, and "
                f"training.outer {self.outer!r} has none; set training.outer to 'second_order' or 'first_order', or "
                "training.members to 1"
            )
        if self.members == 1 and self.distill != DISTILL:
            yield (
                f"distill = {self.distill} belongs to training.members above 1, and there is 1; remove it, or raise "
                "training.members"
            )
        if self.even is None and self.evenness != EVENNESS:
            yield f"evenness = {self.evenness} is that of training.even, which names no column; remove it, or name one"
        if self.tensorboard is not None and "://" in self.tensorboard:
            yield f"tensorboard = {self.tensorboard!r} is no local directory; name one"
