"""The base: everything that segments share, as one value that is trained, stored, grown and loaded.

Shapes: L levels, K objectives, D numbers of an adapter.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tasks.data.columns import Rows
from tasks.data.contract import DataConfig
from tasks.data.vocabulary import Vocabularies
from tasks.errors import FormatUnknown, ObjectCorrupt
from tasks.learning.adapters import Adaptation, AdapterConfig, Precisions
from tasks.learning.networks import Ranker
from tasks.learning.ranker_config import RankerConfig
from tasks.learning.ranker_shape import RankerShape
from tasks.learning.solvers import ObjectiveKind

FORMATS = {"plain": 2, "cross layers": 3, "later parts": 4, "newest parts": 5}
"""What a base has, to the number of its format: an older version of nightrank must not take what it does not know for
a damaged base. 2: tables of factors for every categorical candidate column, and numbers of candidates as adapter
features. 3: cross layers. 4: list columns, what columns say of an item's factors, or adapters that bend the layers. 5:
attention over a user's history, adapters that match rows with prototypes, or weights that the request predicts."""
WEIGHTS, DESCRIPTION = "base.safetensors", "base.json"


@dataclass(frozen=True)
class Base:
    """A trained ranker with the precisions of its adapters.

    Attributes:
        network: the ranker, in evaluation mode.
        precisions: of every level, objective and number of an adapter.
        levels: columns of the levels that have precisions, finest first.
        adapter: how adapters are solved on it.
        trained_through: last night that its training or its stopping has read.
        begun_on: nights of the history that its chain of nights began on, where they were few; None where enough.
    """

    network: Ranker
    precisions: Precisions
    levels: tuple[tuple[str, ...], ...]
    adapter: AdapterConfig
    trained_through: date
    begun_on: int | None = None

    @property
    def kinds(self) -> tuple[ObjectiveKind, ...]:
        """Kind of each objective."""
        return self.network.shape.kinds

    @property
    def adaptation(self) -> Adaptation:
        """How segments are adapted on it."""
        return Adaptation.of(self.network, self.adapter)

    def table(self) -> Tensor:
        """Precisions ``[L, K, D]`` without their gradient."""
        table: Tensor = self.precisions()
        return table.detach()

    def to(self, device: str) -> "Base":
        """The same base on a device."""
        return replace(self, network=self.network.to(device), precisions=self.precisions.to(device))

    def parameters(self) -> int:
        """Number of trained numbers."""
        return sum(p.numel() for module in (self.network, self.precisions) for p in module.parameters())


def shape_of(data: DataConfig, rows: Rows, vocabularies: Vocabularies) -> RankerShape:
    """Sizes of a ranker for a contract, with tables for every key that the vocabularies know."""
    names = rows.statistics_names
    count = len(data.objectives)
    return RankerShape(
        request_vocabularies=tuple(vocabularies[name].rows for name in data.named("request", "categorical")),
        candidate_vocabularies=tuple(
            vocabularies[name].rows for name in (data.item, *data.named("candidate", "categorical"))
        ),
        request_numbers=len(data.named("request", "numeric")),
        candidate_numbers=len(data.named("candidate", "numeric")),
        request_statistics=tuple(at for at, name in enumerate(names) if name.startswith("user_")),
        candidate_statistics=tuple(at for at, name in enumerate(names) if name.startswith("item_")),
        joint_statistics=tuple(at for at, name in enumerate(names) if name.startswith("cohort_item_")),
        offsets=tuple(range(count)),
        kinds=tuple(objective.kind for objective in data.objectives),
        names=(
            *(*data.named("request", "categorical"), data.item, *data.named("candidate", "categorical")),
            *(*data.named("request", "numeric"), *data.named("candidate", "numeric"), *names),
            *(f"{objective.name}:{objective.column}" for objective in data.objectives),
            *(*data.named("request", "multi"), *data.named("candidate", "multi")),
            *(*data.named("request", "dense"), *data.named("candidate", "dense")),
        ),
        request_value_vocabularies=tuple(vocabularies[name].rows for name in data.named("request", "multi")),
        candidate_value_vocabularies=tuple(vocabularies[name].rows for name in data.named("candidate", "multi")),
        request_values=data.widths("request", "multi"),
        candidate_values=data.widths("candidate", "multi"),
        request_vectors=data.widths("request", "dense"),
        candidate_vectors=data.widths("candidate", "dense"),
    )


def save_base(base: Base, folder: Path) -> dict[str, Path]:
    """Write a base as `base.safetensors` and `base.json`; equal bases give equal bytes.

    Returns:
        The files by name.
    """
    tensors = {f"network.{name}": value for name, value in base.network.state_dict().items()}
    tensors |= {f"precisions.{name}": value for name, value in base.precisions.state_dict().items()}
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, folder / WEIGHTS)
    description = {
        "format": FORMATS[_newest_part(base.network)],
        "shape": base.network.shape.model_dump(mode="json"),
        "ranker": base.network.config.model_dump(mode="json"),
        "adapter": base.adapter.model_dump(mode="json"),
        "levels": base.levels,
        "trained_through": base.trained_through.isoformat(),
        **({} if base.begun_on is None else {"begun_on": base.begun_on}),
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, sort_keys=True, indent=1) + "\n")
    return {WEIGHTS: folder / WEIGHTS, DESCRIPTION: folder / DESCRIPTION}


def _newest_part(network: Ranker) -> str:
    if any(part is not None for part in (network.attention, network.matching, network.prior)):
        return "newest parts"
    later = (network.bent, network.warm_up, network.request_lists, network.candidate_lists)
    if any(part is not None for part in later):
        return "later parts"
    return "plain" if network.cross is None else "cross layers"


def load_base(files: Mapping[str, Path]) -> Base:
    """Read what `save_base` wrote.

    Args:
        files: paths of `base.safetensors` and `base.json`, by these names.

    Raises:
        FormatUnknown: the files were written by a version of nightrank whose bases are others.
        ObjectCorrupt: the files do not fit each other.
    """
    try:
        description = json.loads(files[DESCRIPTION].read_text())
        if description["format"] not in FORMATS.values():
            raise FormatUnknown(
                f"{files[DESCRIPTION]} has format {description['format']}, and this version of nightrank reads "
                f"{', '.join(map(str, FORMATS.values()))}"
            )
        shape, config = RankerShape(**description["shape"]), RankerConfig(**description["ranker"])
        adapter = AdapterConfig(**description["adapter"])
        levels = tuple(tuple(level) for level in description["levels"])
        tensors = load_file(files[WEIGHTS])
        weights, held = (
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            for prefix in ("network.", "precisions.")
        )
        network = Ranker.restore(shape, config, weights, adapter.bent, adapter.matching)
        precisions = Precisions(len(levels), len(shape.kinds), adapter.width(network.width), adapter)
        precisions.load_state_dict(held)
        through = date.fromisoformat(description["trained_through"])
        begun_on = None if description.get("begun_on") is None else int(description["begun_on"])
    except (KeyError, TypeError, ValueError, RuntimeError, ValidationError, SafetensorError) as error:
        raise ObjectCorrupt(f"{files[WEIGHTS]} and {files[DESCRIPTION]} do not make a base: {error}") from error
    return Base(network, precisions, levels, adapter, through, begun_on)


def grow(base: Base, shape: RankerShape) -> Base | None:
    """The base with rows for new vocabulary keys, each a copy of the unknown row, so that no score changes.

    The places of a `multi` column are no weights: they may change as well.

    Returns:
        None if the shapes differ in more than the number of rows, or a table would shrink: it cannot be a start.
    """
    old = base.network.shape
    tables = (
        *("request_vocabularies", "candidate_vocabularies"),
        *("request_value_vocabularies", "candidate_value_vocabularies"),
    )
    same = dict.fromkeys((*tables, "request_values", "candidate_values"), ())
    if old.model_copy(update=same) != shape.model_copy(update=same):
        return None
    for was, now in ((getattr(old, name), getattr(shape, name)) for name in tables):
        if len(was) != len(now) or any(rows < known for known, rows in zip(was, now, strict=True)):
            return None
    network = Ranker(shape, base.network.config, base.network.bent, base.network.prototypes)
    state = base.network.state_dict()
    wanted = network.state_dict()
    for name, value in state.items():
        if value.shape != wanted[name].shape:
            new_rows = value[:1].expand(wanted[name].shape[0] - value.shape[0], -1)
            state[name] = torch.cat([value, new_rows])
    network.load_state_dict(state)
    return replace(base, network=network.eval())
