"""The extra `serving` is enough: a fresh environment with it alone serves a release."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.clients.object_store import ObjectStore
from tests.releases import PIPELINE, Made

ROOT = Path(__file__).parents[2]
SERVE = """
import importlib.util, json, sys
from pathlib import Path
import boto3
import numpy as np
from prometheus_client import CollectorRegistry
from tasks.serving.metrics import Metrics
from tasks.serving.ranker import Ranker
from tasks.serving.sessions import Engine

url, pipeline, golden = sys.argv[1:]
registry = CollectorRegistry()
events = Metrics(registry, pipeline)
one = json.loads(Path(golden).read_bytes())["requests"][-1]
with Ranker(url, pipeline, engine=Engine(threads=1), refresh_every=5.0, batching=True, events=events) as ranker:
    specs = ranker.manifest.interface.inputs
    requests, candidates, width = one["shape"]
    request = {
        spec.name: np.array(one["inputs"][spec.name], object)
        .reshape((requests,) if spec.per == "request" else (requests, candidates)).tolist()
        for spec in specs
    }
    scores = ranker.score(request)
    worst = float(np.abs(scores.ravel() - np.array(one["scores"])).max())
absent = ["torch", "prefect", "pandas", "pyarrow", "onnx", "pydantic", "duckdb", "safetensors", "great_expectations"]
print(json.dumps({
    "worst": worst, "there": [name for name in absent if importlib.util.find_spec(name)],
    "counted": registry.get_sample_value(
        "nightrank_requests_total", {"pipeline": pipeline, "role": "champion", "outcome": "answered"}),
}))
"""


@pytest.mark.soak
def test_the_extra_serving_is_all_that_a_ranker_needs(store: ObjectStore, tonight: Made, tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("flows", "tasks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"{source}[serving]"], check=True)
    subprocess.run([python, "-m", "pip", "check"], check=True)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-W", "error", "-c", SERVE, store.url, PIPELINE, tonight.folder / "golden.json"],
        cwd=tmp_path, env=clean, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["worst"] < 1e-5
    assert (told["there"], told["counted"]) == ([], len(tonight.golden[-1].scores))
