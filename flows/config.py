"""The one config of a pipeline: it nests the sections that their owners define, and checks what only the whole can."""

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from hashlib import sha256
from math import isfinite
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from tasks.data.contract import DataConfig, Section, SegmentsConfig, StatisticsConfig
from tasks.errors import InvalidConfig
from tasks.learning.adapters import AdapterConfig, unheard
from tasks.learning.baselines import BaselinesConfig
from tasks.learning.outer import misfit
from tasks.learning.ranker_config import RankerConfig
from tasks.learning.training_config import BESIDE, TrainingConfig
from tasks.references import Device, Place
from tasks.release.export_config import ExportConfig, unsolvable
from tasks.release.gate import GateConfig


class RetrainConfig(Section):
    """Everything that a pipeline's nights obey."""

    version: Literal[1]
    """The format of this file."""
    pipeline: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    """The pipeline's name: lower-case letters, digits and hyphens; the first part of every key in the store."""
    store: Annotated[str, Field(min_length=1)]
    """Directory or `s3://bucket/prefix` that releases and step records go to; credentials come from the environment."""
    scratch: Annotated[str, Field(min_length=1)] = "var/scratch"
    """Local directory for temporary files; relative paths start at the working directory."""
    device: Device = "auto"
    """Where networks run: `auto` takes CUDA where a device is, `cuda` demands one."""
    night_lag_days: Annotated[int, Field(ge=0, le=365)] = 1
    """Days between a scheduled run's local date and the night it works on."""
    data: DataConfig
    """Where the interactions lie and what they must look like."""
    segments: SegmentsConfig
    """The ladder that adapters are solved for."""
    statistics: StatisticsConfig = StatisticsConfig()
    """As-of statistics."""
    ranker: RankerConfig = RankerConfig()
    """The shared network."""
    training: TrainingConfig = TrainingConfig()
    """Meta-training."""
    adapter: AdapterConfig = AdapterConfig()
    """What is solved per segment."""
    baselines: BaselinesConfig = BaselinesConfig()
    """What every adaptation is compared with."""
    gate: GateConfig = GateConfig()
    """What a candidate must show before the pointer moves."""
    export: Annotated[ExportConfig, Field(exclude_if=lambda export: export == ExportConfig())] = ExportConfig()
    """What a release holds beside its fp32 graphs."""

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Self:
        if faults := list(self._misfits()):
            raise ValueError("\n".join(faults))
        return self

    def _misfits(self) -> Iterator[str]:
        data = self.data
        inputs = (data.user, *data.named("request", "categorical"))
        for level, columns in enumerate(self.segments.levels):
            where = f"segments.levels[{level}]"
            for column in columns:
                if column not in inputs:
                    yield _misfit(where, column, inputs, "the user or a categorical request column")
            if len(set(columns)) < len(columns):
                yield f"{where}: {list(columns)!r} names a column twice; remove one"
        for position, column in enumerate(self.statistics.cohort):
            if column not in inputs[1:]:
                yield _misfit(f"statistics.cohort[{position}]", column, inputs[1:], "a categorical request column")
        if (even := self.training.even) is not None and even not in inputs[1:]:
            yield _misfit("training.even", even, inputs[1:], "a categorical request column")
        objectives = [objective.name for objective in data.objectives]
        if self.gate.objective is not None and self.gate.objective not in objectives:
            yield _misfit("gate.objective", self.gate.objective, objectives, "an objective of data.objectives")
        if data.min_history_nights > data.window_nights:
            yield (
                f"data.min_history_nights: {data.min_history_nights} nights are more than the window holds; "
                f"allowed: at most data.window_nights = {data.window_nights}"
            )
        if (fault := misfit(self.training.outer, self.adapter)) is not None:
            yield fault
        numeric, categorical = data.named("candidate", "numeric"), data.named("candidate", "categorical")
        listed = data.named("candidate", "multi")
        yield from unsolvable(self.export.feedback, self.adapter.kind, self.segments.levels[0], data.user, self.ranker)
        yield from unheard(self.ranker, self.adapter, bool(numeric), bool(categorical), bool(listed))
        try:
            ZoneInfo(data.time_zone)
        except (ZoneInfoNotFoundError, ValueError):
            yield f"data.time_zone: {data.time_zone!r} is no time zone; allowed: an IANA name such as 'Europe/Berlin'"

    def place(self) -> Place:
        """Where this pipeline's steps work."""
        return Place(store=self.store, pipeline=self.pipeline, scratch=self.scratch, device=self.device)

    def digest(self) -> str:
        """SHA-256 of what the nights obey; where they run (store, scratch, device) and what they tell is no part."""
        where: dict[str, Any] = dict.fromkeys(("store", "scratch", "device", "night_lag_days"), True)
        content = self.model_dump(mode="json", exclude={**where, "training": set(BESIDE)})
        return sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def load_config(path: str | Path) -> RetrainConfig:
    """Read a config file.

    Args:
        path: a YAML file.

    Raises:
        InvalidConfig: the file is absent, is not YAML or does not fit; one line per fault names the field, what
            stands there and what is allowed.
    """
    tree = read_tree(path, "config")
    try:
        return RetrainConfig.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        faults = [line for fault in error.errors(include_url=False) for line in _explain(fault)]
        listed = "".join(f"\n  {fault}" for fault in faults)
        raise InvalidConfig(f"config {path} has {len(faults)} fault{'s' if len(faults) > 1 else ''}:{listed}") from None


def read_tree(path: str | Path, what: str) -> dict[Any, Any]:
    """The mapping in a YAML file.

    Args:
        path: the file.
        what: what to call it in a message.

    Raises:
        InvalidConfig: the file is absent, is not YAML, or holds no mapping, a key twice or a number that is not finite.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InvalidConfig(f"{what} {path} does not exist (working directory: {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{what} {path} cannot be read: {error}") from error
    try:
        tree = yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        raise InvalidConfig(f"{what} {path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise InvalidConfig(f"{what} {path} must hold a mapping of fields, found {type(tree).__name__}")
    if endless := [where for where, value in _leaves(tree, "") if isinstance(value, float) and not isfinite(value)]:
        raise InvalidConfig(f"{what} {path}: {', '.join(endless)}: numbers must be finite")
    return tree


def as_yaml(settings: Mapping[str, object]) -> str:
    """Settings by name as sections of a config file.

    >>> print(as_yaml({"training.epochs": 3, "training.learning_rate": 0.0005, "ranker.kind": "mlp"}), end="")
    training:
      epochs: 3
      learning_rate: 0.0005
    ranker:
      kind: mlp
    """
    tree: dict[str, dict[str, object]] = {}
    for name, value in settings.items():
        section, field = name.split(".")
        tree.setdefault(section, {})[field] = value
    return yaml.safe_dump(tree, sort_keys=False)


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses a key written twice, where YAML's would keep the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                problem = f"the key {key!r} is written twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _leaves(tree: object, where: str) -> Iterator[tuple[str, object]]:
    if isinstance(tree, dict):
        for name, branch in tree.items():
            yield from _leaves(branch, f"{where}.{name}" if where else str(name))
    elif isinstance(tree, list):
        for position, branch in enumerate(tree):
            yield from _leaves(branch, f"{where}[{position}]")
    else:
        yield where, tree


def _misfit(where: str, value: str, allowed: tuple[str, ...] | list[str], what: str) -> str:
    return f"{where}: {value!r} is not {what}; allowed: {', '.join(allowed) or 'none'}{_guess(value, allowed)}"


def _guess(value: object, allowed: tuple[str, ...] | list[str]) -> str:
    close = get_close_matches(str(value), allowed, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _explain(fault: ErrorDetails) -> list[str]:
    """Lines for one of pydantic's findings: field, value, what is allowed."""
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"]).lstrip(".")
    message, value = fault["msg"], fault["input"]
    if fault["type"] == "extra_forbidden":
        fields = _fields_at(RetrainConfig, fault["loc"][:-1])
        return [f"{where}: unknown field; allowed: {', '.join(fields)}{_guess(fault['loc'][-1], fields)}"]
    if fault["type"] == "missing":
        return [f"{where}: is missing"]
    if fault["type"] == "value_error":
        lines = str(fault["ctx"]["error"]).splitlines()
        return [f"{where}: {line}" for line in lines] if where else lines
    if fault["type"] == "literal_error":
        options = [option.strip("'") for option in fault["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        return [f"{where}: {value!r} is unknown; allowed: {', '.join(options)}{_guess(value, options)}"]
    shown = f"a mapping with {len(value)} fields" if isinstance(value, dict) else repr(value)
    return [f"{where}: {shown[:200]} does not fit; {message[0].lower()}{message[1:]}"]


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Names of the fields that the model at ``loc`` has."""
    for part in loc:
        if isinstance(part, str) and part in model.model_fields:
            model = next(_models_in(model.model_fields[part].annotation), model)
    return list(model.model_fields)


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and not get_origin(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (tuple, list, Union, UnionType, Annotated):
        for argument in get_args(annotation):
            yield from _models_in(argument)
