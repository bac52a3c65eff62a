"""What only a CUDA device can show of the reader: that nodes run there, captured graphs, and TensorRT."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.serving.loaded import load
from tasks.serving.runners import Halves
from tasks.serving.sessions import CUDA, TENSORRT, Engine
from tests.releases import Made, make_release, shared_graph

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A release."""
    return make_release(tmp_path_factory.mktemp("made") / "release", shared_graph(tmp_path_factory, "full"))


def test_the_scores_of_a_release_are_computed_on_the_device(made: Made) -> None:
    release = load(made.folder, made.manifest, "cuda")
    placement = release.runner.placement
    assert release.device == "cuda"
    assert placement.nodes[CUDA] > 50
    assert not {"Gather", "Gemm", "MatMul"} & set(placement.strays)


def test_captured_graphs_answer_as_the_network_does(made: Made) -> None:
    release = load(made.folder, made.manifest, "cuda", Engine(cuda_graphs=True))
    runner = release.runner
    assert isinstance(runner, Halves)
    for _ in range(3):  # as it comes, captured, replayed
        for golden in made.golden:
            scores = release.run(dict(golden.inputs), golden.scores.shape[:2])
            np.testing.assert_allclose(scores, golden.scores, atol=1e-4, rtol=1e-4)
    backwards = {name: values[::-1].copy() for name, values in made.golden[-1].inputs.items()}
    scores = release.run(backwards, made.golden[-1].scores.shape[:2])
    np.testing.assert_allclose(scores, made.golden[-1].scores[::-1], atol=1e-4, rtol=1e-4)
    assert runner._captured > 0


def test_tensorrt_answers_as_the_network_does_and_finds_its_engine_again(made: Made, tmp_path: Path) -> None:
    engine = Engine(tensorrt=tmp_path / "engines")
    for _ in range(2):
        release = load(made.folder, made.manifest, "cuda", engine)
        assert release.runner.placement.nodes.get(TENSORRT, 0) > 0
        for golden in made.golden:
            scores = release.run(dict(golden.inputs), golden.scores.shape[:2])
            np.testing.assert_allclose(scores, golden.scores, atol=1e-4, rtol=1e-4)
    assert list((tmp_path / "engines").rglob("*"))
