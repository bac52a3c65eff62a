"""Whole nights with an adapter that bends the dense layers: from a linear champion on, then from its own."""

import json
from pathlib import Path

import numpy as np

from flows.config import RetrainConfig
from flows.nightly import NightResult
from tasks.learning.bank import Bank
from tasks.serving.ranker import Ranker
from tasks.steps import open_workspace, record_of
from tests.finished import Finished
from tests.steps.plain import plain_night


def told_by(made: Finished, night: NightResult) -> dict[str, dict[str, str]]:
    """What the night's report says."""
    run = json.loads(made.store.get(f"tiny/releases/{night.published.release}/run.json").data)
    return dict(run["report"])


def test_two_nights_with_film(damageable: Finished) -> None:
    tree = {**damageable.world.config, "adapter": {"kind": "film"}}
    tree["ranker"] = {**tree.get("ranker", {}), "hidden": 8}
    config = RetrainConfig.model_validate(tree)
    first = plain_night(config, damageable.next_night, override="the tests want it served")
    told = told_by(damageable, first)
    assert "the parent's base does not fit" in told["provenance"]["training"]
    assert "precisions as configured" in told["provenance"]["training"]
    assert "was compared in both exams" in told["provenance"]["champion"]

    def file(step: str, name: str) -> Path:
        (ref,) = (one for one in first.steps if one.step == step)
        return open_workspace(config.place()).file(record_of(config.place(), ref), name)

    bank = Bank.load(file("adapt-ship", "bank.safetensors"))
    assert bank.weights.shape[1:] == (1, 1 + 2 * 8)
    assert len(bank.weights) > 10
    assert np.abs(bank.weights[1:, :, 1:]).max() > 1e-3
    assert json.loads(file("meta-train", "base.json").read_text())["format"] == 4

    night = damageable.world.nights[damageable.world.nights.index(damageable.next_night) + 1]
    second = plain_night(config, night, override="the tests want it served")
    told = told_by(damageable, second)
    assert "the parent's base" in told["provenance"]["training"]
    assert "does not fit" not in told["provenance"]["training"]
    assert f"release {first.published.release[:12]} was compared in both exams" in told["provenance"]["champion"]
    exams = record_of(config.place(), second.verdict).notes["exams"][0]
    assert exams["nightly"]["champion"]["rows"] == second.validated.clean
    with Ranker(damageable.world.config["store"], "tiny") as ranker:
        assert ranker.release == second.published.release
