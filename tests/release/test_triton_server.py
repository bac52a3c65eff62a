"""A model repository under Triton's own server: it loads, warms up, batches, answers and changes releases.

The server is the real one, out of the package that carries it. It has no onnxruntime backend; `triton_backend.py`
stands in for that, so what is shown here is everything around the graphs: configs, ensemble, shapes, strings, warm-up,
batching and the change of releases.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import venv
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tasks.clients.object_store import ObjectStore, open_store
from tasks.release.publishing import publish_release
from tasks.release.triton import Served, write_repository
from tests.ports import free_ports
from tests.release.triton_rules import as_sent
from tests.releases import NIGHT, PIPELINE, Made, next_night

pytestmark = pytest.mark.soak

WHEELS = {
    "nvidia-pytriton==0.7.0": "21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df",
    "numpy==1.26.4": None,  # the server's stub was built for its layout
}
WORDS = {"string": "BYTES", "int64": "INT64", "float32": "FP32"}


@dataclass(frozen=True)
class Installed:
    """The server's files."""

    server: Path
    backends: Path
    python: Path
    libraries: Path


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The server out of its package, beside a Python that has what the stand-in needs."""
    room = tmp_path_factory.mktemp("triton")
    for name, digest in WHEELS.items():
        folder = room / name.split("==")[0]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), name]
        subprocess.run(command, check=True)
        (wheel,) = folder.glob("*.whl")
        if digest is not None:
            assert hashlib.sha256(wheel.read_bytes()).hexdigest() == digest
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    package = room / "nvidia-pytriton" / "pytriton" / "tritonserver"
    stub = package / "python_backend_stubs" / f"3.{sys.version_info.minor}" / "triton_python_backend_stub"
    python = room / "python"
    venv.create(python, with_pip=False)
    site = python / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    (site / "ours.pth").write_text(f"{room / 'numpy'}\n{room / 'ours'}\n")
    (room / "ours").mkdir()
    for name in ("onnxruntime", "flatbuffers", "packaging", "google"):
        (room / "ours" / name).symlink_to(Path(onnxruntime.__file__).parents[1] / name)
    backends = package / "backends"
    (backends / "python" / stub.name).write_bytes(stub.read_bytes())
    (backends / "onnxruntime").mkdir()
    (backends / "onnxruntime" / "model.py").write_bytes((Path(__file__).parent / "triton_backend.py").read_bytes())
    for program in (package / "bin" / "tritonserver", backends / "python" / stub.name):
        program.chmod(0o755)
    return Installed(
        package / "bin" / "tritonserver", backends, python, room / "nvidia-pytriton" / "nvidia_pytriton.libs"
    )


@dataclass(frozen=True)
class Triton:
    """A server on a model repository."""

    port: int
    log: Path

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON of one call."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v2/{path}", data, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, json.loads(response.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def ask(self, made: Made, inputs: Any) -> tuple[str, Any]:
        """Version and scores of one ranking call."""
        status, found = self.post("models/shop/infer", message(made, inputs))
        assert status == 200, found
        (output,) = found["outputs"]
        return found["model_version"], np.array(output["data"], np.float32).reshape(output["shape"])


def message(made: Made, inputs: Any) -> dict[str, Any]:
    """A request as Triton's protocol has it; NaN as it is, which the server's parser takes."""
    interface = made.manifest.interface
    kinds = {spec.name: WORDS[spec.dtype] for spec in interface.inputs}
    return {
        "inputs": [
            {"name": name, "datatype": kinds[name], "shape": list(values.shape), "data": values.ravel().tolist()}
            for name, values in as_sent(interface, inputs).items()
        ]
    }


@contextmanager
def served(installed: Installed, repository: Path, log: Path) -> Iterator[Triton]:
    """A server that has loaded the ensemble; strict: it adds nothing to the configs."""
    (port,) = free_ports(1)
    words = [str(installed.server), f"--model-repository={repository}", f"--backend-directory={installed.backends}"]
    words += ["--model-control-mode=explicit", "--load-model=shop", "--disable-auto-complete-config"]
    words += ["--http-address=127.0.0.1", f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false"]
    libraries = f"{sys.base_prefix}/lib:{installed.libraries}"
    environment = {"PATH": f"{installed.python / 'bin'}:{os.environ['PATH']}", "LD_LIBRARY_PATH": libraries}
    with log.open("wb") as written:
        process = subprocess.Popen(words, env=environment, stdout=written, stderr=written)
        try:
            while True:
                assert process.poll() is None, log.read_text()
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/models/shop/ready", timeout=60).close()
                    break
                except urllib.error.URLError:
                    time.sleep(0.1)
            yield Triton(port, log)
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture
def repository(full: Made, tmp_path: Path) -> tuple[ObjectStore, Path]:
    """A release's model repository, for batches of up to 16."""
    store = open_store(str(tmp_path / "store"))
    publish_release(store, PIPELINE, full.folder, full.manifest, {})
    write_repository(store, full.manifest, tmp_path / "models", Served("shop", max_batch=16))
    return store, tmp_path / "models"


def runs(repository: Path, output: str) -> list[list[int]]:
    """Sizes of the calls that went into each run of the model with that output."""
    told = [json.loads(line) for line in (repository.parent / "runs.log").read_text().splitlines()]
    return [sizes for name, sizes in told if name == output]


def test_it_loads_warms_up_and_answers_every_golden_request(full: Made, repository, installed: Installed, tmp_path):
    _, models = repository
    with served(installed, models, tmp_path / "log") as triton:
        assert runs(models, "candidate_ids") == runs(models, "scores") == [[1], [1] * 16]  # warm-up, nothing else yet
        for golden in full.golden:
            version, scores = triton.ask(full, golden.inputs)
            assert version == "20260301"
            np.testing.assert_allclose(scores, golden.scores, rtol=1e-5, atol=1e-5)
        wide = {name: np.concatenate([values, values[:1]]) for name, values in full.golden[8].inputs.items()}
        status, told = triton.post("models/shop/infer", message(full, wide))
        assert (status, "batch-size must be <= 16" in told["error"]) == (400, True)


def test_calls_of_one_shape_are_scored_together_and_others_are_not(full: Made, repository, installed, tmp_path: Path):
    _, models = repository
    goldens = [full.golden[number] for number in (2, 3, 0, 1)]  # 1 x 20 twice, 1 x 1 twice
    with served(installed, models, tmp_path / "log") as triton, ThreadPoolExecutor(32) as pool:
        calls = [goldens[number % 4] for number in range(400)]
        answers = list(pool.map(lambda golden: triton.ask(full, golden.inputs), calls))
    for golden, (_, scores) in zip(calls, answers, strict=True):
        np.testing.assert_allclose(scores, golden.scores, rtol=1e-5, atol=1e-5)
    scored, looked_up = runs(models, "scores")[2:], runs(models, "candidate_ids")[2:]
    assert sum(map(len, scored)) == sum(map(len, looked_up)) == 400
    assert max(map(len, scored)) > 1
    assert max(map(len, looked_up)) == 1


def test_a_release_comes_in_under_traffic_and_no_call_fails_or_is_answered_by_two(
    full: Made, repository, installed: Installed, tmp_path: Path
):
    store, models = repository
    after = next_night(full, tmp_path / "release", NIGHT + timedelta(days=1))
    publish_release(store, PIPELINE, after.folder, after.manifest, {})
    expected = {"20260301": full.golden[8].scores, "20260302": after.golden[8].scores}
    assert np.abs(expected["20260301"] - expected["20260302"]).max() > 0.01
    said: list[str] = []
    stop = threading.Event()

    def caller(triton: Triton) -> None:
        while not stop.is_set():
            version, scores = triton.ask(full, full.golden[8].inputs)
            np.testing.assert_allclose(scores, expected[version], rtol=1e-5, atol=1e-5)
            said.append(version)

    def until(done: Callable[[], bool]) -> None:
        while not done():
            time.sleep(0.05)

    with served(installed, models, tmp_path / "log") as triton, ThreadPoolExecutor(4) as pool:
        callers = [pool.submit(caller, triton) for _ in range(4)]
        until(lambda: len(said) > 50 or any(one.done() for one in callers))
        old = [path.name for path in models.iterdir() if path.name != "shop"]
        write_repository(store, after.manifest, models, Served("shop", max_batch=16))
        assert triton.post("repository/models/shop/load", {}) == (200, None)
        until(lambda: said.count("20260302") > 50 or any(one.done() for one in callers))
        assert [triton.post(f"repository/models/{name}/unload", {})[0] for name in old] == [200, 200]
        stop.set()
        assert [one.result() for one in callers] == [None] * 4
    assert set(said) == {"20260301", "20260302"}
