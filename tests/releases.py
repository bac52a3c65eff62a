"""Small releases with random weights, exported for real: what tests of `release/` and `serving/` are about."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch

from tasks.clients.object_store import ObjectStore
from tasks.data.contract import LISTS, ColumnConfig, DataConfig
from tasks.data.lists import is_list, values_of
from tasks.data.statistics import StatisticsTables
from tasks.data.vocabulary import Vocabulary
from tasks.learning.adapters import AdapterConfig, Precisions
from tasks.learning.base import Base, save_base
from tasks.learning.bending import Bent
from tasks.learning.networks import Ranker
from tasks.learning.ranker_config import RankerConfig
from tasks.learning.ranker_shape import RankerShape
from tasks.release.export_config import VariantName
from tasks.release.external import opened_by
from tasks.release.golden import Golden, Parity, check_parity, draw_requests, examples, make_golden, write_golden
from tasks.release.graphs import export
from tasks.release.interface import Interface, Json, LevelSpec
from tasks.release.lookups import input_specs, objectives, wires
from tasks.release.manifest import Manifest, Variant, blob_key, content_digest, manifest_key
from tasks.release.manifest import describe as describe_files
from tasks.release.nodes import ENCODER_KEYS
from tasks.release.pointer import promote
from tasks.release.published import night_key
from tasks.release.publishing import publish_release
from tasks.release.requirements import requirements
from tasks.release.scorer import Solving, trace
from tasks.release.tables import LevelTable, ServingTables, write_tables
from tasks.release.variants import PROVIDERS, build, files_of
from tests.shared import made_once

PIPELINE = "shop"
NIGHT = date(2026, 3, 1)
HISTORY = 4
"""Entries that the release with histories reads."""
FEEDBACK = 5
"""Rows of feedback that releases with feedback take."""


def _column(name: str, role: str, dtype: str, kind: str | None = None) -> dict[str, Any]:
    return {"name": name, "role": role, "dtype": dtype} | ({} if kind is None else {"kind": kind, "nullable": True})


COLUMNS = {
    # Everything at once: string users, both kinds of inputs on both sides, two objectives, a cohort, a ladder of two.
    "full": [
        _column("user", "user", "string"),
        _column("item", "item", "int64"),
        _column("at", "time", "timestamp"),
        _column("liked", "label", "int64"),
        _column("stars", "label", "float64"),
        _column("job", "request", "string", "categorical"),
        _column("zone", "request", "int64", "categorical"),
        _column("age", "request", "float64", "numeric"),
        _column("member", "request", "bool", "numeric"),
        _column("genre", "candidate", "string", "categorical"),
        _column("year", "candidate", "int64", "numeric"),
    ],
    # As little as possible: keys and one label.
    "lean": [
        _column("user", "user", "int64"),
        _column("item", "item", "string"),
        _column("at", "time", "timestamp"),
        _column("liked", "label", "int64"),
    ],
    # Lists of strings and integers and vectors, on both sides; one is called like a tensor of ours.
    "lists": [
        _column("user", "user", "string"),
        _column("item", "item", "int64"),
        _column("at", "time", "timestamp"),
        _column("liked", "label", "int64"),
        _column("codes", "request", "int64", "multi") | {"max_values": 2},
        _column("mood", "request", "float64", "dense") | {"length": 2},
        _column("request_values", "request", "string", "multi") | {"max_values": 3},
        _column("tags", "candidate", "string", "multi") | {"max_values": 3},
        _column("look", "candidate", "float64", "dense") | {"length": 2},
        _column("voice", "candidate", "float64", "dense") | {"length": 1},
    ],
    # A transformer's: recent rows of the user, with a column that is called like one of them.
    "past": [
        _column("user", "user", "string"),
        _column("item", "item", "int64"),
        _column("at", "time", "timestamp"),
        _column("stars", "label", "float64") | {"nullable": True},
        _column("liked", "label", "int64"),
        _column("history_item", "request", "float64", "numeric"),
        _column("genre", "candidate", "string", "categorical"),
    ],
    # Columns that are called like tensors of ours, one rating, and cross layers.
    "clashing": [
        _column("slot", "user", "int64"),
        _column("candidate_ids", "item", "int64"),
        _column("at", "time", "timestamp"),
        _column("stars", "label", "float64"),
        _column("scores", "request", "float64", "numeric"),
        _column("linear", "candidate", "string", "categorical"),
        _column("bank", "candidate", "float64", "numeric"),
    ],
}


@dataclass(frozen=True)
class Made:
    """A release and everything it was made from."""

    data: DataConfig
    network: Ranker
    bank: npt.NDArray[np.float32]
    tables: ServingTables
    rows: pa.Table
    golden: tuple[Golden, ...]
    folder: Path
    manifest: Manifest
    parity: Parity
    graph: bytes
    """As it was traced, without numbers."""
    solving: Solving | None = None


def contract(kind: str) -> DataConfig:
    """The contract of one of the kinds of release."""
    labels = [column["name"] for column in COLUMNS[kind] if column["role"] == "label"]
    outcomes = [{"name": n, "column": n, "kind": "binary" if n == "liked" else "rating"} for n in labels]
    return DataConfig.model_validate({"source": "lake", "columns": COLUMNS[kind], "objectives": outcomes})


def make_rows(data: DataConfig, count: int = 60, seed: int = 0) -> pa.Table:
    """Random rows; about every eighth value of an input is missing."""
    random = np.random.default_rng(seed)
    arrays = {}
    for column in data.columns:
        if column.dtype == "timestamp":
            hours = np.arange(count, dtype=np.int64) * 7_200_000_000  # two of them
            arrays[column.name] = pa.array(1_772_000_000_000_000 + hours, pa.timestamp("us", "UTC"))
            continue
        if column.kind in LISTS:
            arrays[column.name] = _lists(column, random, count)
            continue
        drawn = random.integers(12, size=count)
        absent = (random.random(count) < 1 / 8) & column.nullable
        if column.dtype == "string":
            arrays[column.name] = pa.array([f"{column.name} {one} é" for one in drawn], pa.string(), mask=absent)
        elif column.role == "label" and column.dtype == "int64":
            arrays[column.name] = pa.array(drawn % 2)
        elif column.dtype == "int64":
            arrays[column.name] = pa.array(drawn * 1_000_003, pa.int64(), mask=absent)
        elif column.dtype == "bool":
            arrays[column.name] = pa.array(drawn % 2 == 0, pa.bool_(), mask=absent)
        else:
            arrays[column.name] = pa.array(drawn / 7, pa.float64(), mask=absent)
    return pa.table(arrays)


def _lists(column: ColumnConfig, random: np.random.Generator, count: int) -> pa.Array:
    """Lists of up to as many values as there may be, some twice, or vectors; about every eighth is missing."""
    absent = random.random(count) < 1 / 8
    if column.kind == "dense":
        drawn = random.normal(size=(count, column.width))
        return pa.array([None if gone else one for gone, one in zip(absent, drawn.tolist(), strict=True)])
    lengths = np.where(absent, 0, random.integers(column.width + 1, size=count))
    drawn = random.integers(8, size=int(lengths.sum()))
    values = pa.array([f"{column.name} {one} é" for one in drawn] if column.dtype == "string" else drawn * 1_000_003)
    offsets = pa.array(np.r_[0, np.cumsum(lengths)], pa.int32(), mask=np.r_[absent, False])
    return pa.ListArray.from_arrays(offsets, values)


def make_parts(
    kind: str,
    seed: int = 0,
    bent: Bent | None = None,
    prototypes: int = 0,
    rows: pa.Table | None = None,
    config: RankerConfig | None = None,
) -> tuple[DataConfig, Ranker, npt.NDArray[np.float32], ServingTables, pa.Table]:
    """Contract, network, bank, tables and rows of a kind of release; nothing exported yet.

    Given rows and a config of the network make it as large as they are.
    """
    data, random = contract(kind), np.random.default_rng(seed)
    rows = make_rows(data, seed=seed) if rows is None else rows
    vocabularies = {}
    for name in data.vocabularies:
        given = rows[name].combine_chunks()
        keys = (values_of(given)[0] if is_list(given.type) else given).drop_null().unique()
        vocabularies[name] = Vocabulary(name, keys[: len(keys) - 2])  # two keys of the rows are unknown
    kinds = tuple(objective.kind for objective in data.objectives)
    width = len(kinds) + 1
    categorical = data.named("request", "categorical")
    cohort = categorical[:1]
    groups = ("item", "user", "cohort_item") if cohort else ("item", "user")

    def table(count: int) -> npt.NDArray[np.float32]:
        return random.normal(size=(count, width)).astype(np.float32)

    users, items = vocabularies[data.user].rows, vocabularies[data.item].rows
    radices = tuple(vocabularies[name].rows for name in (*cohort, data.item)) if cohort else ()
    pairs = np.sort(random.choice(int(np.prod(radices)), 20, replace=False)) if cohort else np.zeros(0, np.int64)
    statistics = StatisticsTables(
        names=tuple(f"{group}_{one}" for group in groups for one in range(width)),
        base=table(1)[0, :-1],
        item=table(items),
        user=table(users),
        cohort_columns=cohort,
        cohort_radices=radices,
        cohort_item_keys=pairs.astype(np.int64),
        cohort_item=np.concatenate([np.zeros((1, width), np.float32), table(len(pairs))]) if cohort else table(0),
    )
    own = np.arange(1, users, 2)  # every other user has an adapter of his own
    levels = [LevelTable((data.user,), (users,), own, np.arange(1, len(own) + 1))]
    slots = 1 + len(own)
    if categorical:
        sizes = tuple(vocabularies[name].rows for name in categorical)
        keys = np.sort(random.choice(int(np.prod(sizes)), int(np.prod(sizes)) // 2, replace=False)).astype(np.int64)
        levels.append(LevelTable(categorical, sizes, keys, np.arange(slots, slots + len(keys))))
        slots += len(keys)
    positions = np.arange(len(groups) * width)
    shape = RankerShape(
        request_vocabularies=tuple(vocabularies[name].rows - 1 for name in categorical),  # the exam knew one key less
        candidate_vocabularies=tuple(
            vocabularies[name].rows - 1 for name in (data.item, *data.named("candidate", "categorical"))
        ),
        request_numbers=len(data.named("request", "numeric")),
        candidate_numbers=len(data.named("candidate", "numeric")),
        request_statistics=tuple(positions[width : 2 * width].tolist()),
        candidate_statistics=tuple(positions[:width].tolist()),
        joint_statistics=tuple(positions[2 * width :].tolist()),
        offsets=tuple(range(len(kinds))),
        kinds=kinds,
        **_lists_of(data, vocabularies),
    )
    torch.manual_seed(seed)
    config = config or RankerConfig(
        **{"clashing": {"kind": "dcn"}, "past": {"kind": "transformer", "history": HISTORY, "blocks": 2}}.get(kind, {}),
        **{"embedding": 4, "hidden": 8, "factors": 2, "features": 2, "warm_up": True, "prior": True},
    )
    network = Ranker(shape, config, bent, prototypes).eval()
    with torch.no_grad():  # untrained layers that begin at zero would hide what they multiply
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
        for table in network.factor_tables[:1]:
            table.weight[::3] = 0.0  # items without rows
    bank = random.normal(size=(slots, len(kinds), network.width)).astype(np.float32)
    bank[0] = 0.0
    return data, network, bank, ServingTables(vocabularies, statistics, tuple(levels), config.history), rows


def _lists_of(data: DataConfig, vocabularies: Mapping[str, Vocabulary]) -> dict[str, tuple[int, ...]]:
    """What the layers of list columns are sized by; of each vocabulary the exam knew one key less."""
    sizes: dict[str, tuple[int, ...]] = {}
    for side in ("request", "candidate"):
        multi, dense = data.named(side, "multi"), data.named(side, "dense")  # type: ignore[arg-type]
        sizes[f"{side}_value_vocabularies"] = tuple(vocabularies[name].rows - 1 for name in multi)
        sizes[f"{side}_values"] = tuple(data.column(name).width for name in multi)
        sizes[f"{side}_vectors"] = tuple(data.column(name).width for name in dense)
    return sizes


def describe(data: DataConfig, tables: ServingTables, golden: tuple[Golden, ...], night: date = NIGHT) -> Interface:
    """The interface of a release."""
    names = wires(data, tables)
    return Interface(
        night=night,
        inputs=input_specs(data, examples(data, golden[0], tables.history), tables.history, tables.feedback),
        output=names.scores,
        objectives=objectives(data),
        wires=names.between(),
        levels=tuple(LevelSpec(level.columns, len(level.keys)) for level in tables.levels),
    )


def make_graph(kind: str, bent: Bent | None = None) -> bytes:
    """The traced graph of a kind of release, which takes longer than the rest of it."""
    data, network, _, tables, _ = make_parts(kind, bent=bent)
    return trace(network.shape, network.config, wires(data, tables), bent)


def solving_of(data: DataConfig, network: Ranker) -> Solving:
    """How releases with feedback solve it."""
    precision = np.linspace(0.5, 4.0, len(data.objectives) * network.width, dtype=np.float32)
    return Solving(FEEDBACK, 2, precision.reshape(len(data.objectives), network.width))


def shared_feedback_graph(factory: pytest.TempPathFactory, kind: str) -> bytes:
    """The traced graph of a kind of release with feedback, made once per test session."""

    def make(folder: Path) -> None:
        folder.mkdir()
        data, network, _, tables, _ = make_parts(kind)
        names = wires(data, replace(tables, feedback=FEEDBACK))
        traced = trace(network.shape, network.config, names, solving=solving_of(data, network))
        (folder / "score.onnx").write_bytes(traced)

    return (made_once(factory, f"graph-feedback-{kind}", make) / "score.onnx").read_bytes()


def shared_graph(factory: pytest.TempPathFactory, kind: str) -> bytes:
    """The same, made once per test session."""

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "score.onnx").write_bytes(make_graph(kind))

    return (made_once(factory, f"graph-{kind}", make) / "score.onnx").read_bytes()


def make_release(
    folder: Path,
    graph: bytes,
    kind: str = "full",
    seed: int = 0,
    night: date = NIGHT,
    encoder_keys: int = ENCODER_KEYS,
    with_feedback: bytes | None = None,
) -> Made:
    """Export a release into a new folder; one with feedback where there is a traced graph for it."""
    folder.mkdir(parents=True)
    data, network, bank, tables, rows = make_parts(kind, seed)
    solving = None if with_feedback is None else solving_of(data, network)
    tables = tables if solving is None else replace(tables, feedback=solving.rows)
    graphs = {False: graph, True: with_feedback or b""}
    export(network, bank, tables, data, folder, lambda *layers: graphs[layers[-1] is not None], encoder_keys, solving)
    requests = draw_requests(data, rows, history=tables.history, feedback=tables.feedback)
    golden = make_golden(network, bank, tables, data, requests, solving)
    write_golden(data, golden, folder, tables.history)
    parity = check_parity(data, tables, golden, folder)
    adapter, columns = AdapterConfig(), tuple(level.columns for level in tables.levels)
    precisions = Precisions(len(columns), len(data.objectives), adapter.width(network.width), adapter)
    save_base(Base(network, precisions, columns, adapter, night), folder)
    write_tables(tables, folder)
    interface = describe(data, tables, golden, night)
    manifest = manifest_of(folder, interface, {"largest": parity.model}, {"log_loss": 0.5}, {"seed": seed})
    return Made(data, network, bank, tables, rows, golden, folder, manifest, parity, graph, solving)


def next_night(made: Made, folder: Path, night: date, seed: int = 1) -> Made:
    """The same release with another bank, one night later; as export would write it, without the wait."""
    shutil.copytree(made.folder, folder)
    bank = made.bank.copy()
    bank[1:] = np.random.default_rng(seed).normal(size=bank[1:].shape)
    (folder / "bank.bin").write_bytes(bank.tobytes())
    golden = make_golden(made.network, bank, made.tables, made.data, [one.inputs for one in made.golden], made.solving)
    write_golden(made.data, golden, folder, made.tables.history)
    parity = check_parity(made.data, made.tables, golden, folder)
    interface = describe(made.data, made.tables, golden, night)
    manifest = manifest_of(folder, interface)
    return replace(made, bank=bank, golden=golden, folder=folder, manifest=manifest, parity=parity)


def deliver(store: ObjectStore, nights: Sequence[Made]) -> None:
    """Publish and promote releases of successive nights in turn, and leave what nights leave of themselves."""
    for number, made in enumerate(nights):
        night, pipeline = made.manifest.night, made.manifest.pipeline
        parent = nights[number - 1].manifest.release if number else None
        run = {"parent": parent, "created": f"{night}T06:00:00+00:00", "night": f"{night}", "go": True, "config": "c"}
        publish_release(store, pipeline, made.folder, made.manifest, {"run.json": json.dumps(run).encode()})
        promote(store, pipeline, made.manifest.release, night, token=number + 1)
        note_night(store, pipeline, night, made.manifest.release)


def note_night(store: ObjectStore, pipeline: str, night: date, release: str, go: bool = True) -> None:
    """What publish notes of a night."""
    said = {"release": release, "go": go, "config": "c", "exam": "e", "verdict": "v", "override": None}
    store.swap(night_key(pipeline, night), json.dumps(said).encode(), None)


def manifest_of(folder: Path, interface: Interface, *told: Json) -> Manifest:
    """The manifest of a folder that is finished but for its `interface.json`."""
    (folder / "interface.json").write_bytes(interface.serialise())
    files = describe_files(folder)
    wanted = requirements(sorted(folder.glob("*.onnx")))
    graphs = opened_by(sorted(folder.glob("*.onnx")))
    return replace(Manifest(PIPELINE, content_digest(files), files, interface, *told), requires=wanted, graphs=graphs)


def with_variants(
    made: Made, folder: Path, names: Sequence[VariantName] = ("int8",), spoilt: Sequence[VariantName] = ()
) -> Made:
    """A release beside its smaller graphs, which passed; of those that are spoilt the bank is other bytes."""
    shutil.copytree(made.folder, folder)
    bank = made.bank * np.float32(0.1)  # an untrained bank is too large for bytes
    (folder / "bank.bin").write_bytes(bank.tobytes())
    golden = make_golden(made.network, bank, made.tables, made.data, [one.inputs for one in made.golden], made.solving)
    write_golden(made.data, golden, folder, made.tables.history)
    variants = {}
    for name in names:
        build(name, folder, len(made.data.objectives))
        variants[name] = Variant(files_of(name), PROVIDERS[name], {"tolerance": 0.05}, {}, "passed", "close")
    for name in spoilt:
        file = folder / f"bank_{name}.bin"
        file.write_bytes(np.random.default_rng(0).integers(-20, 20, file.stat().st_size, np.int8).tobytes())
    manifest = replace(described_anew(made, folder), variants=variants)
    return replace(made, bank=bank, golden=golden, folder=folder, manifest=manifest)


def bounded(made: Made, folder: Path, minimum: float, maximum: float) -> Made:
    """The release as it is of a contract that bounds its ratings."""
    shutil.copytree(made.folder, folder)
    objectives = tuple(
        one if one.kind == "binary" else replace(one, minimum=minimum, maximum=maximum)
        for one in made.manifest.interface.objectives
    )
    return replace(
        made, folder=folder, manifest=manifest_of(folder, replace(made.manifest.interface, objectives=objectives))
    )


UNSOLVABLE = {
    "user": ["x1"], "job": [None], "zone": [None], "age": [1.0], "member": [1.0],
    "item": [[1000003, 2000006]], "genre": [["genre 1 é", "genre 2 é"]], "year": [[1.0, 2.0]],
    "feedback_item": [[1000003] * 5], "feedback_genre": [["genre 1 é"] * 5], "feedback_year": [[1.0] * 5],
    "feedback_liked": [[1] * 5], "feedback_stars": [[3.4e38, -3.4e38, 3.4e38, -3.4e38, 3.4e38]],
}  # fmt: skip
"""A request whose feedback has no solution in float32; of the release `full`."""


def described_anew(made: Made, folder: Path) -> Manifest:
    """The manifest of a folder that somebody changed, with digests that fit: what an attacker would write."""
    files = describe_files(folder)
    more = opened_by(path for path in sorted(folder.glob("*.onnx")) if path.name not in made.manifest.graphs)
    graphs = {**made.manifest.graphs, **more}
    return replace(made.manifest, release=content_digest(files), files=files, graphs=graphs)


def smuggle(store: ObjectStore, folder: Path, manifest: Manifest) -> None:
    """Lay a release into a store as somebody would who may write there, past all that our publisher looks at."""
    for file in manifest.files:
        store.put_file_if_absent(blob_key(manifest.pipeline, file.sha256), folder / file.name)
    store.put_if_absent(manifest_key(manifest.pipeline, manifest.release), manifest.serialise())


def record_answers(network: Ranker, requests: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Where logits [R, M, K] and features [R, M, D] before adaptation will stand, one pair per call of the network."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    answer = network.answer

    def recorded(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits, features = answer(*given)
        seen.append((logits.unflatten(0, (requests, -1)), features.unflatten(0, (requests, -1))))
        return logits, features

    network.answer = recorded  # type: ignore[method-assign]
    return seen
