"""What look-ups cost by the number of keys: time to load, memory, and time to answer. Nothing here asserts a time.

    python -m pytest tests/benchmarks/test_lookups.py -q

Every figure of a session is that of a process of its own; both sides of a row are measured in turn.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from onnx import TensorProto, helper

from tasks.data.statistics import StatisticsTables
from tasks.data.vocabulary import Vocabulary
from tasks.learning.networks import Ranker, RankerConfig
from tasks.release.external import ExternalFiles
from tasks.release.graphs import export
from tasks.release.key_tables import build_table
from tasks.release.lookups import as_model
from tasks.release.nodes import Graph
from tasks.release.scorer import trace
from tasks.release.tables import LevelTable, ServingTables
from tests.benchmarks.conftest import Row
from tests.releases import make_parts

ROOT = Path(__file__).parents[2]
EVERY_KEY = {"nodes": 2**62, "tables": 0}
MEGABYTE = 1e6


@dataclass(frozen=True)
class Told:
    """What a process said of its session; times in seconds, memory in bytes."""

    load: float
    kept: float
    grown: float
    median: float


def ask(graph: Path, inputs: dict[str, np.ndarray], rounds: int = 3) -> Told:
    """Medians of some processes that answer all of these requests once."""
    requests = graph.with_suffix(".npz")
    np.savez(requests, **inputs)
    command = [sys.executable, "-m", "tests.benchmarks.asked_sessions", str(graph), str(requests)]
    told = [
        json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout) for _ in range(rounds)
    ]
    return Told(**{name: median(one[name] for one in told) for name in told[0]})


def names(numbers: np.ndarray) -> np.ndarray:
    return np.char.add("user_", numbers.astype("U"))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".onnx", ".bin"))


@pytest.mark.parametrize("keys", [1_000, 10_000, 100_000, 1_000_000])
@pytest.mark.parametrize("kind", ["strings", "integers"])
def test_a_look_up_of_200_by_the_number_of_keys(kind: str, keys: int, tmp_path: Path, row: Row):
    random, told, sizes = np.random.default_rng(0), {}, {}
    numbers = random.permutation(10 * keys)[:keys]
    listed = pa.array(names(numbers)) if kind == "strings" else numbers
    asked = random.choice(numbers, (2_000, 1, 200))
    for where, most in EVERY_KEY.items():
        folder = tmp_path / where
        folder.mkdir()
        graph = Graph(ExternalFiles(folder), most)
        graph.look_up("key", "id", listed, np.arange(1, keys + 1), 0, "table.bin", "keys")
        ends = [("key", TensorProto.STRING if kind == "strings" else TensorProto.INT64), ("id", TensorProto.INT64)]
        given, found = (helper.make_tensor_value_info(name, dtype, ["r", "m"]) for name, dtype in ends)
        model = as_model(helper.make_graph(graph.nodes, "one", [given], [found], list(graph.constants.values())))
        (folder / "one.onnx").write_bytes(model.SerializeToString())
        sizes[where] = size_of(folder)
        told[where] = ask(folder / "one.onnx", {"key": names(asked) if kind == "strings" else asked})
    tables, nodes = told["tables"], told["nodes"]
    row(
        f"{keys:,} {kind}: load; in memory loaded and asked 400,000; on disk; 200 look-ups",
        "cpu",
        *(
            f"{one.load * 1e3:.1f} ms; {one.kept / MEGABYTE:.1f} and {one.grown / MEGABYTE:.1f} MB; "
            f"{sizes[where] / MEGABYTE:.1f} MB; {one.median * 1e6:.0f} µs"
            for where, one in (("tables", tables), ("nodes", nodes))
        ),
        f"load {nodes.load / tables.load:.1f} ×, look-up {tables.median / nodes.median:.1f} × as long",
    )


def release_of(users: int, folder: Path, most: int) -> Path:
    """A release in which every user is a segment, with the default network; gives the one graph."""
    data, small, _, tables, _ = make_parts("full")
    network = Ranker(
        small.shape.model_copy(update={"request_vocabularies": small.shape.request_vocabularies}), RankerConfig()
    )
    random = np.random.default_rng(0)
    known = tables.vocabularies | {data.user: Vocabulary(data.user, pa.array(names(np.arange(users))))}
    own = LevelTable((data.user,), (users + 1,), np.arange(1, users + 1), np.arange(1, users + 1))
    width = tables.statistics.user.shape[1]
    statistics = StatisticsTables(
        **vars(tables.statistics) | {"user": random.normal(size=(users + 1, width)).astype("f4")}
    )
    bank = random.normal(size=(users + 1, len(small.shape.kinds), network.width)).astype(np.float32)
    folder.mkdir()
    export(network.eval(), bank, ServingTables(known, statistics, (own,)), data, folder, trace, most)
    for name in ("lookup.onnx", "score.onnx"):  # a ranker on the CPU loads the one graph
        (folder / name).unlink()
    return folder / "model.onnx"


def requests_of(graph: Path, users: int, count: int) -> dict[str, np.ndarray]:
    """Requests of 64 users each with 4 candidates, the users in another order; all of them where they suffice."""
    random = np.random.default_rng(1)
    order = np.resize(random.permutation(users), (count, 64))
    per = {spec.name: spec for spec in onnx.load(graph, load_external_data=False).graph.input}
    found = {}
    for name, spec in per.items():
        tensor = spec.type.tensor_type
        shape = (count, 64) if len(tensor.shape.dim) == 1 else (count, 64, 4)
        if tensor.elem_type == TensorProto.STRING:
            found[name] = names(order) if name == "user" else np.full(shape, "unknown")
        else:
            found[name] = np.ones(shape, np.int64 if tensor.elem_type == TensorProto.INT64 else np.float32)
    return found


@pytest.mark.parametrize("where", ["tables", "nodes"])
def test_memory_from_1000_to_100000_segments(where: str, tmp_path: Path, row: Row):
    told, sizes = [], []
    for users in (1_000, 100_000):
        graph = release_of(users, tmp_path / str(users), EVERY_KEY[where])
        sizes.append(size_of(graph.parent))
        told.append(ask(graph, requests_of(graph, users, -(-100_000 // 64))))
    file = sizes[1] - sizes[0]
    row(
        f"keys in {where}, 1,000 to 100,000 users with adapters: growth in memory, loaded and when all were asked",
        "cpu",
        f"{(told[1].kept - told[0].kept) / MEGABYTE:.1f} and {(told[1].grown - told[0].grown) / MEGABYTE:.1f} MB",
        f"files grow by {file / MEGABYTE:.1f} MB",
        f"{(told[1].kept - told[0].kept) / file:.2f} and {(told[1].grown - told[0].grown) / file:.2f} ×; "
        f"load {told[0].load * 1e3:.0f} and {told[1].load * 1e3:.0f} ms",
    )


@pytest.mark.parametrize("keys", [1_000_000])
def test_unknown_keys_that_are_taken_for_known_ones(keys: int, row: Row):
    known = pc.binary_join_element_wise("user_", pa.array(np.arange(keys)).cast(pa.string()), "")
    table, wrong, asked = build_table(known, np.arange(1, keys + 1), 0), 0, 20
    for part in range(1, asked + 1):
        unknown = pa.array(np.arange(part * keys, (part + 1) * keys)).cast(pa.string())
        wrong += int((table.find(pc.binary_join_element_wise("user_", unknown, "")) > 0).sum())
    row(
        f"{asked * keys:,} unknown strings among {keys:,} known ones",
        "cpu",
        f"{wrong} taken for a known one",
        f"{asked * keys * keys / 2**64:.0e} by chance",
        f"seeds {', '.join(map(str, table.seeds))}; {table.probes} places compared",
    )
