"""What smaller score graphs take beside fp32: bytes, memory, time to load and to answer; nothing here asserts a time.

    python -m pytest tests/benchmarks/test_variants.py -q

100,000 items and 50,000 segments of the default ranker with random weights, on one CPU thread. Graphs answer in turn,
round by round, so that other work on the machine hits all of them; a ratio is the median of the rounds' ratios. Memory
is the growth of a process of its own from before it loads the score graph until it has answered.
"""

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import pyarrow as pa
import pytest

from tasks.data.statistics import StatisticsTables
from tasks.data.vocabulary import Vocabulary
from tasks.learning.networks import Ranker
from tasks.learning.ranker_config import RankerConfig
from tasks.learning.ranker_shape import RankerShape
from tasks.release.graphs import export
from tasks.release.scorer import trace
from tasks.release.tables import LevelTable, ServingTables
from tasks.release.variants import build, files_of
from tests.benchmarks.conftest import Row
from tests.releases import contract

ITEMS, SEGMENTS, ROUNDS = 100_000, 50_000, 60
GRAPHS = {"fp32": ("score.onnx", "base.bin", "bank.bin"), "fp16": files_of("fp16"), "int8": files_of("int8")}
LOADED = """
import sys, time, numpy, onnxruntime
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
inputs = dict(numpy.load(sys.argv[2]))
before, begun = resident(), time.perf_counter()
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
loaded = time.perf_counter() - begun
session.run(None, inputs)
print(resident() - before, loaded)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A large release's graphs."""
    folder, random, data = tmp_path_factory.mktemp("large"), np.random.default_rng(0), contract("lean")
    table = random.normal(size=(ITEMS, 2)).astype(np.float32)
    statistics = StatisticsTables(
        names=("item_rate", "item_count", "user_rate", "user_count"),
        base=np.zeros(1, np.float32),
        item=table,
        user=table[: SEGMENTS + 1],
        cohort_columns=(),
        cohort_radices=(),
        cohort_item_keys=np.zeros(0, np.int64),
        cohort_item=table[:0],
    )
    shape = RankerShape(
        request_vocabularies=(), candidate_vocabularies=(ITEMS,), request_numbers=0, candidate_numbers=0,
        request_statistics=(2, 3), candidate_statistics=(0, 1), joint_statistics=(), offsets=(0,), kinds=("binary",),
    )  # fmt: skip
    network = Ranker(shape, RankerConfig()).eval()
    bank = random.normal(size=(SEGMENTS + 1, 1, network.width)).astype(np.float32) / 8
    vocabularies = {
        "user": Vocabulary("user", pa.array(np.arange(SEGMENTS))),
        "item": Vocabulary("item", pa.array([f"item {number}" for number in range(ITEMS - 1)])),
    }
    own = np.arange(1, SEGMENTS + 1)
    tables = ServingTables(vocabularies, statistics, (LevelTable(("user",), (SEGMENTS + 1,), own, own),))
    export(network, bank, tables, data, folder, trace)
    for name in ("fp16", "int8"):
        build(name, folder, 1)  # type: ignore[arg-type]
    return folder


def request_of(requests: int, candidates: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "candidate_ids": random.integers(ITEMS, size=(requests, candidates, 1)),
        "slot": random.integers(SEGMENTS, size=requests),
        "user_row": random.integers(SEGMENTS, size=requests),
    }


@pytest.mark.parametrize(("requests", "candidates"), [(1, 100), (1, 1000), (16, 200)])
def test_answering(folder: Path, requests: int, candidates: int, row: Row) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = {name: onnxruntime.InferenceSession(folder / files[0], options, providers=["CPUExecutionProvider"])
                for name, files in GRAPHS.items()}  # fmt: skip
    took: dict[str, list[float]] = {name: [] for name in sessions}
    for number in range(ROUNDS):
        inputs = request_of(requests, candidates, number)
        for name, session in sessions.items():
            session.run(None, inputs)
            begun = time.perf_counter()
            session.run(None, inputs)
            took[name].append(time.perf_counter() - begun)
    plain = took.pop("fp32")
    for name, times in took.items():
        ratio = median(one / other for one, other in zip(times, plain, strict=True))
        cells = (f"{1e6 * median(times):.0f} us", f"fp32 {1e6 * median(plain):.0f} us", f"{ratio:.2f} times")
        row(f"{name}, {requests} x {candidates} scores", "cpu", *cells)


def test_bytes_memory_and_loading(folder: Path, tmp_path: Path, row: Row) -> None:
    np.savez(tmp_path / "inputs.npz", **request_of(1, 100))  # type: ignore[arg-type]
    for name, files in GRAPHS.items():
        size = sum((folder / file).stat().st_size for file in files)
        found = []
        for _ in range(3):
            command = [sys.executable, "-c", LOADED, str(folder / files[0]), str(tmp_path / "inputs.npz")]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            found.append((int(said[0]), float(said[1])))
        memory, seconds = (median(one[at] for one in found) for at in (0, 1))
        row(
            f"{name}: its files, and memory of a session",
            *("cpu", f"{size / 1e6:.1f} MB", f"resident {memory / 1e6:.1f} MB", f"loads in {seconds:.2f} s"),
        )
