"""What a search may try: settings of ranker, adapter and training by name, each with the values that it may take.

A setting that belongs to one value of another one (`BELONGS`: `adapter.rank` to `adapter.kind: lora`) is drawn in the
trials that have that value, and is at its default in the others; one that nobody reads beside some value of another
(`UNREAD`) is not drawn there.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from typing import Literal, Self

from pydantic import ValidationError, model_validator

from tasks.data.contract import DataConfig, Section
from tasks.errors import InvalidConfig
from tasks.learning.adapters import AdapterConfig, unheard
from tasks.learning.outer import misfit
from tasks.learning.ranker_config import RankerConfig
from tasks.learning.training_config import TrainingConfig

Value = bool | int | float | str | None
Settings = dict[str, Value]
"""Values by name, such as `training.learning_rate`."""

BALANCE = "it serves small lakes and markets at the cost of large ones, and a search counts rows as they come"
FIXED = {
    "training.seed": "a seed that was chosen by its luck says nothing about other nights",
    "training.threads": "it changes no quality",
    "training.checkpoint_seconds": "it changes no quality",
    "training.tensorboard": "it changes no quality",
    "training.even": BALANCE,
    "training.evenness": BALANCE,
}
"""Settings that are not searched, and why."""
BELONGS: dict[str, tuple[str, Collection[Value]]] = {
    "ranker.cross_layers": ("ranker.kind", ("dcn",)),
    "ranker.history": ("ranker.kind", ("transformer",)),
    "ranker.heads": ("ranker.kind", ("transformer",)),
    "ranker.blocks": ("ranker.kind", ("transformer",)),
    "ranker.prior": ("adapter.kind", ("ridge", "gradient")),
    "ranker.warm_up": ("adapter.kind", ("ridge", "gradient", "matching")),
    "adapter.rank": ("adapter.kind", ("lora",)),
    "adapter.bends": ("adapter.kind", ("gradient",)),
    "adapter.prototypes": ("adapter.kind", ("matching",)),
    "training.swa_after": ("training.averaging", ("swa",)),
    "training.distill": ("training.members", range(2, 17)),
}
"""Settings that a config refuses unless another has one of some values."""
_NO_FEATURES: dict[str, Collection[Value]] = {
    "adapter.kind": ("none", "bias", "film", "lora"),
    "adapter.bends": ("dense",),
}
UNREAD: dict[str, dict[str, Collection[Value]]] = {
    "ranker.factors": _NO_FEATURES,
    "ranker.category_factors": _NO_FEATURES,
    "ranker.warm_up": {"adapter.bends": ("dense",)},
    "ranker.prior": {"adapter.bends": ("dense",)},
    "ranker.direct": _NO_FEATURES,
    "ranker.features": _NO_FEATURES,
    "adapter.precision": {"adapter.kind": ("none",)},
    "adapter.coarse_precision": {"adapter.kind": ("none",)},
    "adapter.steps": {"adapter.kind": ("none", "matching")},
}
"""Settings that are not read where another has one of some values."""
Kind = Literal["numeric", "categorical", "multi"]
COLUMNS: frozenset[Kind] = frozenset(("numeric", "categorical", "multi"))
"""Kinds of candidate columns that tell whether settings are read."""
NEEDS: dict[str, tuple[Kind, ...]] = {
    "ranker.direct": ("numeric",),
    "ranker.category_factors": ("categorical", "multi"),
}
"""Settings that are not read unless there are candidate columns of one of some kinds."""
_TOLD = (
    *("adapter.kind", "adapter.bends", "training.outer"),
    *(f"ranker.{name}" for name in ("factors", "category_factors", "direct", "features", "warm_up", "prior")),
)
"""Settings that a config takes or refuses together: an outer loop, its adapter, and what the ranker tells this."""


class Parameter(Section):
    """The values that one setting may take."""

    type: Literal["float", "int", "choice"]
    """`float` and `int` lie between `low` and `high`, both included; `choice` is one of `choices`."""
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    """Whether factors count instead of differences: for rates and precisions."""
    choices: tuple[Value, ...] = ()

    @model_validator(mode="after")
    def _says_what_its_type_needs(self) -> Self:
        if self.type == "choice":
            if len(set(self.choices)) < 2 or self.low is not None or self.high is not None or self.log:
                raise ValueError("a choice needs choices, at least two different ones, and no low, high or log")
            return self
        if self.choices or self.low is None or self.high is None:
            raise ValueError(f"type {self.type} needs low and high, and no choices")
        if not self.low < self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        if self.log and not self.low > 0:
            raise ValueError(f"log needs a low above 0, found {self.low}")
        if self.type == "int" and not (isinstance(self.low, int) and isinstance(self.high, int)):
            raise ValueError(f"type int needs whole numbers, found {self.low} and {self.high}")
        return self

    @property
    def extremes(self) -> tuple[Value, ...]:
        """Values that the config has to allow, for all to be allowed: of fractions, one that is no whole number too."""
        if self.low is None or self.high is None:
            return self.choices
        ends = (self.low, self.high)
        return ends if self.type == "int" else (*ends, self.low + (self.high - self.low) / math.pi)


Space = dict[str, Parameter]


def _between(low: float, high: float, log: bool = False) -> Parameter:
    whole = isinstance(low, int) and isinstance(high, int)
    return Parameter(type="int" if whole else "float", low=low, high=high, log=log)


DEFAULT: Space = {
    "training.learning_rate": _between(1e-4, 3e-3, log=True),
    "training.epochs": _between(1, 12),
    "training.weight_decay": _between(1.0, 100.0, log=True),
    "training.embedding_decay": _between(0.3, 30.0, log=True),
    "ranker.factors": _between(1, 16, log=True),
    "ranker.category_factors": _between(1, 16, log=True),
    "ranker.dropout": _between(0.0, 0.7),
    "adapter.precision": _between(1.0, 16.0, log=True),
    "adapter.coarse_precision": _between(20.0, 600.0, log=True),
}
"""What is searched where no space is given, as far as the config's adapter reads it (`default_space`)."""


@dataclass(frozen=True)
class Sections:
    """The sections of a config that a search may change."""

    ranker: RankerConfig
    adapter: AdapterConfig
    training: TrainingConfig
    columns: frozenset[Kind] = COLUMNS
    """Kinds of candidate columns that the data have (`candidate_kinds`)."""

    @property
    def named(self) -> dict[str, Section]:
        """Each section by its name."""
        return {"ranker": self.ranker, "adapter": self.adapter, "training": self.training}

    def value(self, name: str) -> Value:
        """What a setting is now."""
        section, field = name.split(".")
        found: Value = getattr(getattr(self, section), field)
        return found

    def applies(self, name: str, settings: Settings) -> bool:
        """Whether a setting belongs to, and is read beside, what a trial has drawn of the others."""
        if name in NEEDS and not self.columns.intersection(NEEDS[name]):
            return False
        found = {switch: self._now(switch, settings) for switch in _switches(name)}
        if name in BELONGS and found[BELONGS[name][0]] not in BELONGS[name][1]:
            return False
        return not any(found[switch] in values for switch, values in UNREAD.get(name, {}).items())

    def changed(self, settings: Settings) -> "Sections":
        """The sections with some settings replaced; what belongs to other values than theirs is at its default.

        Raises:
            InvalidConfig: they do not fit together.
        """
        made: dict[str, Section] = {}
        for name in self.named:
            try:
                made[name] = self.section(name, settings)
            except ValidationError as error:
                raise InvalidConfig("; ".join(_said(fault["msg"]) for fault in error.errors())) from error
        sections = Sections(**made, columns=self.columns)  # type: ignore[arg-type]
        fault = misfit(sections.training.outer, sections.adapter)
        numeric, categorical, listed = (kind in self.columns for kind in ("numeric", "categorical", "multi"))
        for why in (*filter(None, [fault]), *unheard(sections.ranker, sections.adapter, numeric, categorical, listed)):
            raise InvalidConfig(why)
        return sections

    def section(self, name: str, settings: Settings) -> Section:
        """One section with some settings replaced.

        Raises:
            ValidationError: it does not fit together.
        """
        whole: Section = getattr(self, name)
        told = {f"{name}.{field}": value for field, value in whole.model_dump().items()}
        kept = {key: value for key, value in told.items() if key not in BELONGS or self.applies(key, settings)}
        mine = {key: value for key, value in settings.items() if key.startswith(f"{name}.")}
        fields = {key.split(".")[1]: value for key, value in (kept | mine).items()}
        return type(whole).model_validate(fields, strict=True)

    def _now(self, name: str, settings: Settings) -> Value:
        """What a setting is in a trial."""
        if name in settings:
            return settings[name]
        if self.applies(name, settings):
            return self.value(name)
        section, field = name.split(".")
        found: Value = type(getattr(self, section)).model_fields[field].default
        return found


def candidate_kinds(data: DataConfig) -> frozenset[Kind]:
    """The kinds of candidate columns, of those that tell whether settings are read."""
    return frozenset(kind for kind in COLUMNS if data.named("candidate", kind))


def default_space(now: Sections) -> Space:
    """What is searched where no space is given."""
    return {name: one for name, one in DEFAULT.items() if now.applies(name, {})}


def in_order(space: Space) -> list[str]:
    """The settings of a space, those that others depend on first."""

    def depth(name: str) -> int:
        return max((1 + depth(switch) for switch in _switches(name) if switch in space), default=0)

    return sorted(space, key=depth)


def read_space(tree: Mapping[str, object], now: Sections, source: str) -> Space:
    """A space from its file's content, checked against the config.

    A setting that belongs to values of another (`BELONGS`), or is not read beside some (`UNREAD`), may stand beside
    that other one: it is drawn in the trials that it applies to. One that applies to no trial is a fault, and so is a
    value that no trial could use, whatever else it draws.

    Args:
        tree: name of each setting to `type`, `low`, `high`, `log`, `choices`.
        now: the config's own sections.
        source: what to call the file in a message.

    Raises:
        InvalidConfig: one line per fault names the setting, the value and what is allowed.
    """
    space: Space = {}
    faults: list[str] = []
    for name, told in tree.items():
        try:
            space[name] = Parameter.model_validate(told)
        except ValidationError as error:
            for fault in error.errors(include_url=False):
                where = ".".join(str(part) for part in (name, *fault["loc"]))
                faults.append(f"{where}: {_said(fault['msg'])}")
    for name in space:
        faults += _misfits(name, space, now)
    if not faults:
        faults += _unusable(space, now)
    if not tree:
        faults.append("it names no setting")
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults)
        raise InvalidConfig(f"{source} has {len(faults)} fault{'s' if len(faults) > 1 else ''}:{listed}")
    return space


def _said(message: str) -> str:
    """A fault without pydantic's prefix."""
    return message.removeprefix("Value error, ")


def _switches(name: str) -> set[str]:
    """The settings that tell whether another applies."""
    return {*UNREAD.get(name, ()), *((BELONGS[name][0],) if name in BELONGS else ())}


def _misfits(name: str, space: Space, now: Sections) -> Iterator[str]:
    known = [f"{part}.{field}" for part, whole in now.named.items() for field in type(whole).model_fields]
    if name not in known:
        close = get_close_matches(name, known, n=1)
        yield f"{name}: is no setting of {', '.join(now.named)}" + (f" (did you mean {close[0]!r}?)" if close else "")
        return
    if name in FIXED:
        yield f"{name}: is not searched: {FIXED[name]}; remove it"
        return
    if name in NEEDS and not now.columns.intersection(NEEDS[name]):
        yield f"{name}: is not read without a {' or '.join(NEEDS[name])} candidate column; remove it"
        return
    switches = sorted(switch for switch in _switches(name) if switch in space)
    drawn = (dict(zip(switches, told, strict=True)) for told in product(*(space[one].extremes for one in switches)))
    beside: Settings | None = next((settings for settings in drawn if now.applies(name, settings)), None)
    if beside is None and name in UNREAD:
        where = " and ".join(f"{one} {now.value(one)!r}" for one in sorted(_switches(name)) if one not in space)
        yield f"{name}: is not read with {where or 'any of what is tried beside it'}; remove it"
        return
    beside = beside or {}
    for value in space[name].extremes:
        # A kind may need what belongs to it, as a transformer its history: all that is drawn with it.
        drawn_with = {
            one: space[one].extremes[0] for one in BELONGS if one in space and now.applies(one, {**beside, name: value})
        }
        try:
            now.section(name.split(".")[0], {**beside, **drawn_with, name: value})
        except ValidationError as error:
            yield f"{name}: {value!r} is not allowed: {_said(error.errors()[0]['msg'])}"
            return


def _unusable(space: Space, now: Sections) -> Iterator[str]:
    """The first value of each setting whose trials would all be refused, whatever else they draw."""
    names = [name for name in in_order(space) if name in _TOLD]
    usable: set[tuple[str, Value]] = set()
    refused: dict[tuple[str, Value], str] = {}
    for told in product(*(space[name].extremes for name in names)):
        drawn: Settings = {}
        for name, value in zip(names, told, strict=True):
            if now.applies(name, drawn):
                drawn[name] = value
        try:
            now.changed(drawn)
        except InvalidConfig as error:
            refused |= dict.fromkeys(drawn.items(), str(error))
        else:
            usable |= drawn.items()
    faults = {
        name: f"{value!r} is not allowed: {why}"
        for (name, value), why in reversed(refused.items())
        if (name, value) not in usable
    }
    yield from (f"{name}: {faults[name]}" for name in space if name in faults)
