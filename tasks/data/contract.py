"""What a lake of interactions must look like: columns with roles, objectives, and the order of the inputs."""

from collections.abc import Iterator
from datetime import date
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Role = Literal["user", "item", "time", "label", "request", "candidate", "weight", "ignored"]
DType = Literal["int64", "float64", "string", "bool", "timestamp"]
Kind = Literal["categorical", "numeric", "multi", "dense"]
LISTS: tuple[Kind, ...] = ("multi", "dense")
"""Kinds whose columns hold a list per row."""
MOST_VALUES = 16
"""Values in a list of a `multi` column, where the config says nothing."""
PARTITION = "night={night}"
"""Folder of a night, where the config says nothing."""
ColumnName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,62}$")]


class Section(BaseModel):
    """A frozen config section that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PersonalConfig(Section):
    """How a column of personal values was hashed before it came into the lake."""

    key_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,64}$")]
    """Names the key: rankers find it in the environment variable `NIGHTRANK_HASH_KEY_<key_id>`. Another key makes other
    values of all, so it is another pipeline."""


class ColumnConfig(Section):
    """One column of the lake."""

    name: ColumnName
    """The column's name in the Parquet files."""
    role: Role
    """`user`, `item`, `time`: the keys of an interaction. `label`: an outcome, never an input. `request`: an input
    known per request (user and context columns). `candidate`: an input known per candidate (item columns).
    `weight`: a non-negative row weight. `ignored`: must be present, is never read; of one that holds lists `kind`
    says so, as if it were an input."""
    dtype: DType
    """The Arrow type family that the files must have: int64 (any integer width), float64 (any float), string, bool,
    timestamp (any unit; without zone it is UTC). Of a `multi` or `dense` column, the family of the values in its
    lists, which may be lists of any offset width or of a fixed size; lists that are ignored may hold any family."""
    kind: Kind | None = None
    """How an input is read. Inputs must say. `categorical`: looked up in a vocabulary. `numeric`: normalised. `multi`:
    a list of categories (tags, genres), each looked up, their embeddings averaged; the order says nothing, and a value
    that comes twice counts twice. `dense`: a vector of a fixed length (a text or image embedding), each of its numbers
    normalised; kept as float32."""
    nullable: bool = False
    """Whether a missing value is allowed. Inputs that may be missing get their own rule inside the release. A list of
    `multi` may always be empty, and a missing one is read as an empty one; values inside a list are never missing."""
    max_values: Annotated[int, Field(ge=1, le=1024)] | None = Field(None, exclude_if=lambda most: most is None)
    """Most values in a list of a `multi` column; 16 where nothing is said. A row with a longer list goes to quarantine
    and a request with one is refused, so that a ranker is served what it was trained on; cut them upstream if you can
    say which values matter. Every row and every candidate takes room for so many."""
    length: Annotated[int, Field(ge=1, le=8192)] | None = Field(None, exclude_if=lambda length: length is None)
    """How many numbers a vector of a `dense` column has; vectors of another length go to quarantine. Of ignored lists
    this, or `max_values`, is only what memory is reckoned with."""
    minimum: float | None = None
    """Smallest value allowed; smaller ones go to quarantine."""
    maximum: float | None = None
    """Largest value allowed; larger ones go to quarantine."""
    allowed: tuple[str | int | float, ...] | None = None
    """The closed set of values allowed; others go to quarantine."""
    personal: PersonalConfig | None = Field(None, exclude_if=lambda personal: personal is None)
    """Says that the lake holds the lower-case hexadecimal HMAC-SHA256 of the raw values' UTF-8 bytes, of a string user,
    request or candidate column. Values that are not 64 such digits go to quarantine. A ranker hashes what callers give
    it; no error shows a value."""

    @model_validator(mode="after")
    def _inputs_say_their_kind(self) -> Self:
        if self.role in ("request", "candidate"):
            if self.kind is None:
                raise ValueError(
                    f"column {self.name!r} has role {self.role!r} and must set kind: categorical, numeric, multi or "
                    f"dense"
                )
            if self.kind in ("categorical", "multi") and self.dtype not in ("int64", "string"):
                raise ValueError(f"column {self.name!r} is {self.kind} and must be int64 or string, not {self.dtype}")
            if self.kind == "dense" and self.dtype != "float64":
                raise ValueError(f"column {self.name!r} is dense and must be float64, not {self.dtype}")
            if self.kind == "numeric" and self.dtype not in ("int64", "float64", "bool"):
                raise ValueError(
                    f"column {self.name!r} is numeric and must be int64, float64 or bool, not {self.dtype}"
                )
        elif self.kind is not None and not (self.role == "ignored" and self.kind in LISTS):
            raise ValueError(f"column {self.name!r} has role {self.role!r}, which is no input: remove kind")
        if self.role in ("user", "item") and self.dtype not in ("int64", "string"):
            raise ValueError(f"column {self.name!r} is a key and must be int64 or string, not {self.dtype}")
        if self.role in ("user", "item", "time") and self.nullable:
            raise ValueError(f"column {self.name!r} is a key and cannot be nullable")
        if self.role == "time" and self.dtype != "timestamp":
            raise ValueError(f"column {self.name!r} is the time and must be a timestamp, not {self.dtype}")
        if self.role == "label" and self.dtype not in ("int64", "float64", "bool"):
            raise ValueError(f"column {self.name!r} is a label and must be int64, float64 or bool, not {self.dtype}")
        if self.role == "weight" and self.dtype not in ("int64", "float64"):
            raise ValueError(f"column {self.name!r} is a weight and must be int64 or float64, not {self.dtype}")
        return self

    @model_validator(mode="after")
    def _lists_say_their_width(self) -> Self:
        if self.kind == "dense" and self.length is None:
            raise ValueError(f"column {self.name!r} is dense and must say the length of its vectors")
        for field, value, kind in (("length", self.length, "dense"), ("max_values", self.max_values, "multi")):
            if value is not None and self.kind != kind:
                raise ValueError(f"column {self.name!r} is not {kind}: remove {field}, or set kind to {kind}")
        limits = {"minimum": self.minimum, "maximum": self.maximum, "allowed": self.allowed}
        if self.kind in LISTS and (said := [name for name, limit in limits.items() if limit is not None]):
            raise ValueError(
                f"column {self.name!r} holds lists, and {', '.join(said)} speaks of single values: remove it"
            )
        return self

    @model_validator(mode="after")
    def _personal_values_are_hashed_strings(self) -> Self:
        if self.personal is not None:
            if self.dtype != "string" or self.role not in ("user", "request", "candidate"):
                raise ValueError(
                    f"column {self.name!r} is personal and must be a string user, request or candidate column, not "
                    f"{self.dtype} {self.role}"
                )
            if self.allowed is not None:
                raise ValueError(f"column {self.name!r} is personal, and allowed speaks of raw values: remove it")
        return self

    @property
    def width(self) -> int:
        """Places that a row of this column takes in a table: of a list column as many as it has at most, else 1."""
        if self.kind == "multi":
            return self.max_values or MOST_VALUES
        return self.length or 1


class ObjectiveConfig(Section):
    """One outcome to predict."""

    name: ColumnName
    """The objective's name in metrics, manifest and output."""
    column: ColumnName
    """The label column it reads."""
    kind: Literal["binary", "rating"] = "binary"
    """`binary`: a probability, labels 0 and 1. `rating`: an expected value on the label's own scale."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Its weight in the training loss, and, relative to the largest, where factors are solved."""


class ExpectationConfig(Section):
    """One expectation of the user's own, on top of those that the contract generates."""

    type: Annotated[str, Field(pattern=r"^expect_[a-z_]+$")]
    """A Great Expectations expectation type, such as `expect_column_mean_to_be_between`."""
    kwargs: dict[str, object] = {}
    """Its arguments."""


class LakeConfig(Section):
    """One of several lakes that are learned from together: a domain, a market, a shop."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")]
    """What `data.lake_column` says in its rows."""
    source: Annotated[str, Field(pattern=r"\S")]
    """Directory or `s3://bucket/prefix` that holds the partitions."""
    partition: str = PARTITION
    """Folder of one night below `source`; `{night}` is the ISO date."""
    first_night: date | None = None
    """Nights before it are without this lake; None for a lake that is as old as the others."""
    optional: bool = False
    """Whether a night may be without it. A night that lacks another lake is not there: half of what there is to learn
    is another lesson."""

    @model_validator(mode="after")
    def _partition_names_the_night(self) -> Self:
        _check_partition(self.partition)
        return self


def _check_partition(partition: str) -> None:
    if partition.count("{night}") != 1:
        raise ValueError(f"partition {partition!r} must hold {{night}} exactly once")


class DataConfig(Section):
    """Where the interactions lie and what they must look like."""

    source: str = ""
    """Directory or `s3://bucket/prefix` that holds the partitions; left out where there are `lakes`."""
    partition: str = PARTITION
    """Folder of one night below `source`; `{night}` is the ISO date."""
    lakes: tuple[LakeConfig, ...] = Field((), exclude_if=lambda lakes: not lakes)
    """Several lakes of the same columns in place of `source`. A night is all of theirs, and one base is meta-trained on
    episodes from all of them."""
    lake_column: ColumnName | None = Field(None, exclude_if=lambda name: name is None)
    """The categorical request column of strings that says which lake a row is from. The lakes' files do not have it;
    requests do. Name it in `segments.levels` for adapters per lake, and in `training.even` for even episodes."""
    own_keys: tuple[ColumnName, ...] = Field((), exclude_if=lambda names: not names)
    """String columns whose values mean something else in each lake: users, items or categories that are not shared.
    `17` of the lake `books` is read as `books/17`, and has to be called so in requests; an empty one stays empty. Where
    users, items and times are shared, rows that agree in all three are conflicting duplicates, whatever their lakes."""
    time_zone: str = "UTC"
    """The zone whose calendar days are the nights (IANA name)."""
    columns: Annotated[tuple[ColumnConfig, ...], Field(min_length=4)]
    """Every column that the files have, no more and no less, and `lake_column`."""
    objectives: Annotated[tuple[ObjectiveConfig, ...], Field(min_length=1)]
    """What is predicted; the first is the one that the exams lead with."""
    window_nights: Annotated[int, Field(ge=2, le=3650)] = 90
    """How many calendar nights before a night are its history."""
    min_history_nights: Annotated[int, Field(ge=2)] = 3
    """Fewest clean nights of history with which a night can run."""
    min_rows: Annotated[int, Field(ge=1)] = 1
    """Fewest rows a night must have."""
    max_rows: Annotated[int, Field(ge=1)] = 1_000_000_000
    """Most rows a night may have."""
    max_bad_rows: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Largest share of a night's rows that may go to quarantine before the night stops."""
    expectations: tuple[ExpectationConfig, ...] = ()
    """The user's own expectations; one that fails stops the night."""

    @model_validator(mode="after")
    def _columns_and_objectives_fit(self) -> Self:
        names = [column.name for column in self.columns]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"columns are named twice: {', '.join(doubled)}")
        for role in ("user", "item", "time"):
            if (count := len(self.named(role))) != 1:
                raise ValueError(f"exactly one column must have role {role!r}, found {count}")
        if len(self.named("weight")) > 1:
            raise ValueError("at most one column may have role 'weight'")
        labels = self.named("label")
        for objective in self.objectives:
            if objective.column not in labels:
                raise ValueError(
                    f"objective {objective.name!r} reads column {objective.column!r}, which has no role 'label' "
                    f"(labels: {', '.join(labels) or 'none'})"
                )
        objectives = [objective.name for objective in self.objectives]
        if len(set(objectives)) != len(objectives):
            raise ValueError("objectives must have different names")
        _check_partition(self.partition)
        if faults := list(self._misfits_of_lakes()):
            raise ValueError("\n".join(faults))
        return self

    def _misfits_of_lakes(self) -> Iterator[str]:
        if not self.lakes:
            if not self.source:
                yield "source is missing: name the lake's directory or s3:// prefix, or several under lakes"
            if self.lake_column is not None or self.own_keys:
                yield "lake_column and own_keys tell several lakes apart, and there are no lakes: remove them"
            return
        if self.source or self.partition != PARTITION:
            yield "source and partition speak of a single lake: remove them, every one of lakes has its own"
        names = [lake.name for lake in self.lakes]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            yield f"lakes are named twice: {', '.join(doubled)}"
        places = [(lake.source.strip().rstrip("/"), lake.partition.strip("/")) for lake in self.lakes]
        if doubled := sorted({source for source, partition in places if places.count((source, partition)) > 1}):
            yield f"lakes have the same source and partition, and each row would be there twice: {', '.join(doubled)}"
        if len(set(self.own_keys)) < len(self.own_keys):
            yield f"own_keys: {list(self.own_keys)!r} names a column twice; remove one"
        if self.lake_column is None:
            yield "lakes need lake_column: the request column that says which of them a row is from"
        for field, told in (("lake_column", (self.lake_column,)), ("own_keys", self.own_keys)):
            for name in filter(None, told):
                column = next((column for column in self.columns if column.name == name), None)
                fits = column is not None and column.dtype == "string" and column.kind in (None, "categorical")
                roles = ("request",) if field == "lake_column" else ("user", "item", "request", "candidate")
                if column is None or not fits or column.role not in roles:
                    yield f"{field}: {name!r} is no string column of the roles {', '.join(roles)} that is categorical"
                elif column.allowed is not None and field == "own_keys":
                    yield f"own_keys: {name!r} has allowed values, which cannot differ by lake: remove them"
                elif field == "lake_column" and (strange := sorted(set(names) - set(column.allowed or names))):
                    yield f"lakes: {', '.join(strange)} is not among the allowed values of {name!r}: add it there"
        personal = {column.name for column in self.columns if column.personal is not None}
        for hashed in sorted(personal & {self.lake_column, *self.own_keys}):
            yield f"{hashed!r} is personal, and lake_column and own_keys are about raw values: remove personal"
        if self.lake_column in self.own_keys:
            yield f"own_keys: {self.lake_column!r} is the lake itself: remove it"

    def named(self, role: Role, kind: Kind | None = None) -> tuple[str, ...]:
        """Names of the columns with a role (and kind), in the config's order."""
        return tuple(c.name for c in self.columns if c.role == role and (kind is None or c.kind == kind))

    def column(self, name: str) -> ColumnConfig:
        """The column of this name.

        Raises:
            KeyError: if the contract has no such column.
        """
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(name)

    @property
    def every_lake(self) -> tuple[LakeConfig, ...]:
        """The lakes; of a single one only the `name` means nothing."""
        return self.lakes or (LakeConfig(name="lake", source=self.source, partition=self.partition),)

    @property
    def delivered(self) -> tuple[ColumnConfig, ...]:
        """The columns that files have: all but that which says the lake."""
        return tuple(column for column in self.columns if column.name != self.lake_column)

    @property
    def user(self) -> str:
        """The user column."""
        return self.named("user")[0]

    @property
    def item(self) -> str:
        """The item column."""
        return self.named("item")[0]

    @property
    def time(self) -> str:
        """The time column."""
        return self.named("time")[0]

    @property
    def weight(self) -> str | None:
        """The row-weight column, if there is one."""
        return next(iter(self.named("weight")), None)

    @property
    def vocabularies(self) -> tuple[str, ...]:
        """Columns that have a vocabulary: user, item, the categorical inputs, request before candidate, the `multi`."""
        inputs = self.named("request", "categorical") + self.named("candidate", "categorical")
        return (self.user, self.item, *inputs, *self.named("request", "multi"), *self.named("candidate", "multi"))

    def widths(self, role: Role, kind: Kind) -> tuple[int, ...]:
        """Places of each column with a role and kind, in the order of `named`: they lie side by side in one table."""
        return tuple(self.column(name).width for name in self.named(role, kind))


class SegmentsConfig(Section):
    """The ladder: which columns make a segment, finest first; the base stands below the last."""

    levels: Annotated[tuple[Annotated[tuple[ColumnName, ...], Field(min_length=1)], ...], Field(min_length=1)]
    """Columns of each level, finest first, such as `[[user_id], [occupation, age_band]]`: the user column or
    categorical request columns."""
    min_support: Annotated[int, Field(ge=1)] = 1
    """Fewest support rows with which a segment gets an adapter of its own; below, its parent serves."""
    max_support: Annotated[int, Field(ge=1, le=4096)] = 128
    """Most support rows read per segment, the newest first."""
    max_leaves: Annotated[int, Field(ge=1)] = 200_000
    """Most segments of the finest level in a bank, by support; the rest use their parent."""

    @model_validator(mode="after")
    def _support_is_possible(self) -> Self:
        if self.min_support > self.max_support:
            raise ValueError(
                f"min_support {self.min_support} is more than max_support {self.max_support}: no segment could ever be "
                f"adapted; lower min_support"
            )
        return self


class StatisticsConfig(Section):
    """As-of statistics: smoothed rates and counts from nights before the row's own."""

    cohort: tuple[ColumnName, ...] = ()
    """Categorical request columns that make the cohort of the cohort × item statistic; empty: no such statistic."""
    item_strength: Annotated[float, Field(gt=0)] = 10.0
    """Pseudo-rows of the global rate that an item's rate starts from."""
    user_strength: Annotated[float, Field(gt=0)] = 10.0
    """Pseudo-rows of the global rate that a user's rate starts from."""
    cohort_item_strength: Annotated[float, Field(gt=0)] = 20.0
    """Pseudo-rows of the item's rate that a cohort × item rate starts from."""
