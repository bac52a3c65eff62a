"""What only a CUDA device can show: the same numbers as on the CPU, and a release that really runs there."""

from datetime import date
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from tasks.learning.adapters import Adaptation, AdapterConfig
from tasks.learning.solvers import ObjectiveKind

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("kind", ["ridge", "gradient"])
def test_an_adaptation_on_the_device_equals_the_processors(kind: Literal["ridge", "gradient"]) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(64, 20, 8, generator=generator)
    offsets = torch.randn(64, 20, 2, generator=generator)
    labels = (torch.rand(64, 20, 2, generator=generator) > 0.5).float()
    weights = (torch.rand(64, 20, generator=generator) > 0.2).float()
    precision = torch.full((2, 8), 4.0)
    kinds: tuple[ObjectiveKind, ...] = ("binary", "rating")
    how, parts = Adaptation(kinds, AdapterConfig(kind=kind)), (features, offsets, labels, weights, precision)
    here = how.solve(*parts, torch.zeros(64, 2, 8))
    there = how.solve(*(part.cuda() for part in parts), torch.zeros(64, 2, 8).cuda())
    torch.testing.assert_close(there.cpu(), here, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("outer", ["second_order", "first_order", "reptile", "joint"])
def test_every_outer_loop_trains_on_the_device(outer: str) -> None:
    from tests.learning.small_rows import one_aim, opposed
    from tests.learning.test_training import NIGHTS, SHORT, train

    rows = one_aim(opposed(nights=NIGHTS, users=45))
    config = SHORT.model_copy(update={"outer": outer, "epochs": 1})
    here, there = (
        train(rows, adapter=AdapterConfig(kind="gradient"), config=config, device=on) for on in ("cpu", "cuda")
    )
    assert there.curve[0][2] == pytest.approx(here.curve[0][2], rel=0.02)
    assert np.isfinite(there.curve[1][1:]).all()


def test_mixed_precision_on_the_device_computes_layers_in_bfloat16_and_learns_as_float32_does() -> None:
    from tests.learning.small_rows import one_aim, opposed
    from tests.learning.test_training import NIGHTS, SHORT, train

    rows = one_aim(opposed(nights=NIGHTS, users=45))
    layers: set[torch.dtype] = set()

    def forward(layer: torch.nn.Module, _given: object, said: object) -> None:
        if layer.training and isinstance(layer, torch.nn.Linear):
            assert isinstance(said, torch.Tensor)
            layers.add(said.dtype)

    watching = torch.nn.modules.module.register_module_forward_hook(forward)
    try:
        plain = train(rows, config=SHORT, device="cuda")
        assert layers == {torch.float32}
        layers.clear()
        mixed = train(rows, config=SHORT.model_copy(update={"mixed_precision": True}), device="cuda")
    finally:
        watching.remove()
    assert layers == {torch.bfloat16}
    assert mixed.curve[0] == plain.curve[0]
    for ours, theirs in zip(mixed.curve[1:], plain.curve[1:], strict=True):
        assert ours[1:] == pytest.approx(theirs[1:], rel=0.02)
    assert {part.dtype for part in mixed.base.network.parameters()} == {torch.float32}


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


def test_halves_on_the_device_answer_as_their_manifest_says(tmp_path: Path) -> None:
    """The score graph in half precision, bound to the device's memory, beside fp32 there."""
    from flows.config import RetrainConfig
    from tasks.serving.ranker import Ranker
    from tests.steps.plain import plain_night
    from tests.world import write_world

    world = write_world(tmp_path)
    wide = {"variants": ["fp16", "int8"], "max_auc_loss": 0.1, "max_log_loss_rise": 0.1}
    config = RetrainConfig.model_validate(world.config | {"device": "cuda", "export": wide})
    plain_night(config, world.nights[-1])
    store, pipeline = world.config["store"], world.config["pipeline"]
    with Ranker(store, pipeline, "cuda") as half, Ranker(store, pipeline, "cuda", variant="fp32") as whole:
        assert (half.variant, whole.variant) == ("fp16", "fp32")
        random, columns = np.random.default_rng(0), half.manifest.interface.inputs
        request = {
            spec.name: [spec.example] * 8 if spec.per == "request" else [[spec.example] * 16] * 8 for spec in columns
        }
        request["item_id"] = random.integers(100, 130, size=(8, 16)).tolist()
        together = half.score(request)
        difference = np.abs(together - whole.score(request)).max()
        assert 0 < difference < half.manifest.variants["fp16"].parity["tolerance"]
        alone = np.concatenate([half.score({name: [one[row]] for name, one in request.items()}) for row in range(8)])
        np.testing.assert_allclose(alone, together, atol=2e-3)
