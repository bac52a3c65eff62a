"""What a reader's answers cost beside the same network written by hand in numpy; nothing here asserts a time.

    OMP_NUM_THREADS=1 python -m pytest tests/benchmarks/test_serving.py -q

Both sides of a ratio run in turn, round by round, in one process on one thread, so that other work on the machine hits
both. A ratio is that of the medians, with the quartiles of the rounds' ratios in brackets.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.clients.object_store import open_store
from tasks.release.manifest import blob_key
from tasks.release.scorer import Scorer
from tasks.serving.batcher import Batcher
from tasks.serving.cache import ReleaseCache
from tasks.serving.events import Events
from tasks.serving.loaded import LoadedRelease, load
from tasks.serving.requests import read_request
from tasks.serving.sessions import Engine
from tasks.serving.variants import everything
from tests.benchmarks.conftest import Row
from tests.benchmarks.served import ByHand, Served, encoded, make_served
from tests.releases import PIPELINE, manifest_of

ONE = Engine(threads=1)
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A release of 1,000 users with weights of their own, among 2,000, and 3,000 items."""
    return make_served(tmp_path_factory.mktemp("served") / "release")


@pytest.fixture(scope="module")
def release(served: Served) -> LoadedRelease:
    """It, loaded on one thread."""
    return load(served.folder, served.manifest, "cpu", ONE)


def in_turn(works: list[Callable[[], object]], rounds: int) -> np.ndarray:
    """Seconds [works, rounds] of each; all are done once before."""
    [work() for work in works]
    times = np.zeros((len(works), rounds))
    for at in range(rounds):
        for place, work in enumerate(works):
            began = time.perf_counter()
            work()
            times[place, at] = time.perf_counter() - began
    return times


def ratio(own: np.ndarray, other: np.ndarray) -> str:
    """How many times as fast the first is."""
    low, high = np.percentile(other / own, [25, 75])
    return f"{np.median(other) / np.median(own):.2f} × [{low:.2f}, {high:.2f}]"


def scored(served: Served, release: LoadedRelease, request: dict) -> np.ndarray:
    """What `Ranker.score` does with a request."""
    return release.run(*read_request(served.manifest.interface.inputs, request))


@pytest.mark.parametrize("candidates", [20, 200, 1000])
def test_one_request_beside_numpy_by_hand(served: Served, release: LoadedRelease, row: Row, candidates: int):
    request, hand = served.request(1, candidates), ByHand(served)
    given = hand.read(request)
    oracle = encoded(served, request)
    for name, values in given.items():
        np.testing.assert_array_equal(values, oracle[name][0], err_msg=name)
    np.testing.assert_allclose(scored(served, release, request)[0], hand(given), rtol=1e-4, atol=1e-5)
    works = [lambda: scored(served, release, request), lambda: hand(given), lambda: hand(hand.read(request))]
    own, forward, whole = in_turn(works, 600)
    for what, other in (("its layers alone, ids given", forward), ("with its look-ups in dictionaries", whole)):
        row(
            f"1 request x {candidates} candidates of raw columns: beside the network in numpy by hand, {what}",
            *("cpu", f"{np.median(own) * 1e6:.0f} µs", f"{np.median(other) * 1e6:.0f} µs", ratio(own, other)),
        )


@pytest.mark.parametrize("candidates", [1, 10, 50, 200])
def test_many_requests_in_one_call_beside_as_many_calls(
    served: Served, release: LoadedRelease, row: Row, candidates: int
):
    many = served.request(64, candidates)
    apart = [{name: values[at : at + 1] for name, values in many.items()} for at in range(64)]
    together = scored(served, release, many)
    np.testing.assert_allclose(
        together, np.concatenate([scored(served, release, one) for one in apart]), rtol=1e-5, atol=1e-5
    )
    own, other = in_turn(
        [lambda: scored(served, release, many), lambda: [scored(served, release, one) for one in apart]], 40
    )
    row(
        f"64 requests of as many users x {candidates} candidates in one call: beside 64 calls",
        *("cpu", f"{np.median(own) * 1e3:.1f} ms", f"{np.median(other) * 1e3:.1f} ms", ratio(own, other)),
    )


@pytest.mark.parametrize("candidates", [10, 50])
def test_batches_of_many_threads_beside_each_by_itself(
    served: Served, release: LoadedRelease, row: Row, candidates: int
):
    many = served.request(64, candidates)
    asked = [
        read_request(served.manifest.interface.inputs, {name: values[at : at + 1] for name, values in many.items()})
        for at in range(64)
    ]
    batcher = Batcher(Events())

    def calls(run: Callable[..., object]) -> Callable[[], object]:
        barrier = threading.Barrier(16)

        def caller(which: int) -> None:
            barrier.wait()
            for at in range(which, 640, 16):
                run(*asked[at % 64])

        return lambda: list(pool.map(caller, range(16)))

    with ThreadPoolExecutor(16) as pool:
        works = [calls(lambda *one: batcher.run(release, *one)), calls(release.run)]
        own, other = in_turn(works, 15)
    rates = [f"{640 / np.median(one):,.0f} requests a second" for one in (own, other)]
    row(
        f"16 threads x {candidates} candidates, batched: beside each request by itself",
        "cpu",
        *rates,
        ratio(own, other),
    )


def test_a_stamp_beside_a_digest_of_a_large_blob(row: Row, tmp_path: Path):
    store = open_store(str(tmp_path / "store"))
    served = make_served(tmp_path / "release", users=200, items=200)
    big = tmp_path / "release" / "base.safetensors"
    big.write_bytes(np.random.default_rng(0).bytes(256 * 2**20))
    manifest = manifest_of(served.folder, served.manifest.interface)
    for file in manifest.files:
        store.put_file_if_absent(blob_key(PIPELINE, file.sha256), served.folder / file.name)
    cache = ReleaseCache(tmp_path / "cache")

    def fetch() -> None:
        with cache.opened(store, PIPELINE, manifest) as lay_out:
            lay_out(everything(manifest))

    def anew() -> None:
        for stamp in (tmp_path / "cache/verified").iterdir():
            stamp.unlink()
        fetch()

    fetch()
    own, other = in_turn([fetch, anew], 7)
    row(
        "a release of 256 MiB made ready from the cache: beside hashing it again",
        *("cpu", f"{np.median(own) * 1e3:.1f} ms", f"{np.median(other) * 1e3:.0f} ms", ratio(own, other)),
    )


@pytest.mark.parametrize("requests", [1, 16, 256])
@pytest.mark.parametrize("device", DEVICES)
def test_a_device_by_batch_size_beside_torch(served: Served, row: Row, device: str, requests: int):
    """Scores of 100 candidates each from ids: the release's graph, and the same module in torch, eager and compiled."""
    _, network, bank, tables, _ = served.parts
    request = served.request(requests, 100)
    ids = {role: torch.from_numpy(np.array(one)).to(device) for role, one in encoded(served, request).items()}
    eager = Scorer(network, bank, tables.statistics).eval().to(device)
    inputs, shape = read_request(served.manifest.interface.inputs, request)
    loaded = load(served.folder, served.manifest, device, Engine(threads=1, cuda_graphs=device == "cuda"))

    def torch_scores(module: torch.nn.Module) -> np.ndarray:
        with torch.no_grad():
            return module(**ids).cpu().numpy()

    modules = {"eager": eager}
    if device == "cuda":  # on a CPU this would compile C++
        modules["compiled"] = torch.compile(eager)
    np.testing.assert_allclose(loaded.run(inputs, shape), torch_scores(eager), rtol=1e-3, atol=1e-4)
    works = [lambda: loaded.run(inputs, shape), *(lambda one=one: torch_scores(one) for one in modules.values())]
    own, *others = in_turn(works, 60)
    for name, other in zip(modules, others, strict=True):
        row(
            f"{requests} requests x 100 candidates of raw columns: beside the network in torch, {name}, ids given",
            *(device, f"{requests / np.median(own):,.0f} requests a second"),
            *(f"{requests / np.median(other):,.0f} requests a second", ratio(own, other)),
        )
