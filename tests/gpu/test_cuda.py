"""What only a CUDA device can show: the same numbers as on the CPU, and a release that really runs there."""

from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.learning.adapters import solve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def test_a_solve_on_the_device_equals_the_processors() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(64, 20, 8, generator=generator)
    offsets = torch.randn(64, 20, 2, generator=generator)
    labels = (torch.rand(64, 20, 2, generator=generator) > 0.5).float()
    weights = (torch.rand(64, 20, generator=generator) > 0.2).float()
    precision = torch.full((2, 8), 4.0)
    kinds = ("binary", "rating")
    here = solve(features, offsets, labels, weights, precision, kinds)
    there = solve(*(part.cuda() for part in (features, offsets, labels, weights, precision)), kinds)
    torch.testing.assert_close(there.cpu(), here, atol=1e-5, rtol=1e-4)


def test_a_night_on_the_device_publishes_a_release_that_runs_there(tmp_path: Path) -> None:
    from flows.config import RetrainConfig
    from tasks.serving.ranker import Ranker
    from tests.steps.plain import plain_night
    from tests.world import write_world

    world = write_world(tmp_path)
    night: date = world.nights[-1]
    result = plain_night(RetrainConfig.model_validate(world.config | {"device": "cuda"}), night)
    store, pipeline = world.config["store"], world.config["pipeline"]
    with Ranker(store, pipeline, device="cuda") as gpu, Ranker(store, pipeline, device="cpu") as cpu:
        assert (gpu.device, gpu.release) == ("cuda", result.published.release)
        request = {
            spec.name: [spec.example] if spec.per == "request" else [[spec.example]]
            for spec in cpu.manifest.interface.inputs
        }
        np.testing.assert_allclose(gpu.score(request), cpu.score(request), atol=1e-4)
