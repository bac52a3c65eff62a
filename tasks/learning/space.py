"""What a search may try: settings of ranker, adapter and training by name, each with the values that it may take."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, Self

from pydantic import ValidationError, model_validator

from tasks.data.contract import Section
from tasks.errors import InvalidConfig
from tasks.learning.adapters import AdapterConfig
from tasks.learning.networks import RankerConfig
from tasks.learning.outer import misfit
from tasks.learning.training_config import TrainingConfig

Value = bool | int | float | str | None
Settings = dict[str, Value]
"""Values by name, such as `training.learning_rate`."""

FIXED = {
    "training.seed": "a seed that was chosen by its luck says nothing about other nights",
    "training.threads": "it changes no quality",
    "training.checkpoint_seconds": "it changes no quality",
    "training.tensorboard": "it changes no quality",
}
"""Settings that are not searched, and why."""


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
    "training.weight_decay": _between(0.1, 10.0, log=True),
    "training.embedding_decay": _between(0.3, 30.0, log=True),
    "ranker.factors": _between(1, 16, log=True),
    "ranker.category_factors": _between(1, 16, log=True),
    "ranker.dropout": _between(0.0, 0.7),
    "adapter.precision": _between(1.0, 16.0, log=True),
    "adapter.coarse_precision": _between(20.0, 600.0, log=True),
}
"""What is searched where no space is given."""


@dataclass(frozen=True)
class Sections:
    """The sections of a config that a search may change."""

    ranker: RankerConfig
    adapter: AdapterConfig
    training: TrainingConfig

    def value(self, name: str) -> Value:
        """What a setting is now."""
        section, field = name.split(".")
        found: Value = getattr(getattr(self, section), field)
        return found

    def changed(self, settings: Settings) -> "Sections":
        """The sections with some settings replaced.

        Raises:
            InvalidConfig: they do not fit together.
        """
        made: dict[str, Section] = {}
        for name, whole in vars(self).items():
            mine = {key.split(".")[1]: value for key, value in settings.items() if key.startswith(f"{name}.")}
            try:
                made[name] = type(whole).model_validate({**whole.model_dump(), **mine}, strict=True)
            except ValidationError as error:
                raise InvalidConfig("; ".join(fault["msg"] for fault in error.errors())) from error
        sections = Sections(**made)  # type: ignore[arg-type]
        if (fault := misfit(sections.training.outer, sections.adapter)) is not None:
            raise InvalidConfig(fault)
        return sections


def read_space(tree: Mapping[str, object], now: Sections, source: str) -> Space:
    """A space from its file's content, checked against the config.

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
                faults.append(f"{where}: {fault['msg'].removeprefix('Value error, ')}")
            continue
        faults += _misfits(name, space[name], now)
    if not tree:
        faults.append("it names no setting")
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults)
        raise InvalidConfig(f"{source} has {len(faults)} fault{'s' if len(faults) > 1 else ''}:{listed}")
    return space


def _misfits(name: str, parameter: Parameter, now: Sections) -> Iterator[str]:
    known = [f"{part}.{field}" for part, whole in vars(now).items() for field in type(whole).model_fields]
    if name not in known:
        close = get_close_matches(name, known, n=1)
        yield f"{name}: is no setting of {', '.join(vars(now))}" + (f" (did you mean {close[0]!r}?)" if close else "")
        return
    if name in FIXED:
        yield f"{name}: is not searched: {FIXED[name]}; remove it"
        return
    section, field = name.split(".")
    whole: Section = getattr(now, section)
    for value in parameter.extremes:
        try:
            type(whole).model_validate({**whole.model_dump(), field: value}, strict=True)
        except ValidationError as error:
            found = error.errors()[0]
            yield f"{name}: {value!r} is not allowed: {found['msg'].removeprefix('Value error, ')}"
            return
