"""Harm proven in the exam, carried out on the bank that ships: it holds segments that no exam has seen."""

import json

import numpy as np
import pyarrow as pa
import pytest

from tasks import evaluate
from tasks.data import vocabulary
from tasks.data.contract import ObjectiveConfig
from tasks.learning.bank import Bank
from tasks.learning.exams import segment_names
from tasks.release.segment_evidence import SegmentEvidence
from tasks.steps import open_workspace, recalled
from tests.finished import Finished
from tests.steps.plain import plain_night


def evidence(acquitted: str) -> SegmentEvidence:
    """Users with 16 to 31 support rows are harmed, all but one, who has rows of his own on five nights to show it."""
    harm = np.linspace(0.1, 0.3, 12)
    rows = np.array([*[10] * len(harm), *[8] * 5])
    mean = np.append(harm, [-0.2] * 5)
    key = np.array([*(f"someone {number}" for number in range(len(harm))), *[acquitted] * 5])
    return SegmentEvidence(
        level=np.zeros(len(rows), np.int64),
        key=key,
        user=key,
        support=np.full(len(rows), 20),
        rows=rows,
        sums=rows * mean,
        squares=rows * (mean**2 + 0.01),
    )


def test_users_who_are_new_on_the_night_fall_back_with_their_step(
    damageable: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    night = damageable.next_night
    new = damageable.world.newcomers[night]
    acquitted, others = new[0], set(new[1:])
    assert others

    def told(_tables: list[pa.Table], _objective: ObjectiveConfig) -> SegmentEvidence:
        return evidence(acquitted)

    monkeypatch.setattr(evaluate, "segment_evidence", told)
    result = plain_night(damageable.config, night)
    place, data = damageable.config.place(), damageable.config.data
    records = {step.step: recalled(place, step.step, step.key) for step in result.steps}
    assert records["evaluate"].content["harmful"] == [
        {"convicted": [], "steps": [[16, 31]], "acquitted": [acquitted]},
        {"convicted": [], "steps": [], "acquitted": []},
    ]

    told = [alarm for alarm in result.verdict.alarms if "proven to do harm" in alarm]
    assert len(told) == 1
    assert "own weights of level user_id are proven to do harm: to all with support 16 to 31 (+" in told[0]

    words = vocabulary.load(data, open_workspace(place).file(records["prepare"], "vocabulary.parquet"))
    ship = Bank.load(open_workspace(place).file(records["adapt-ship"], "bank.safetensors"))
    users, markets = ship.levels

    def names(keys: np.ndarray) -> list[str]:
        found: list[str] = segment_names(keys, (data.user,), tuple(users.radices.tolist()), words).to_pylist()
        return found

    kept = dict(zip(names(users.keys), users.support.tolist(), strict=True))
    assert 16 <= kept.pop(acquitted) <= 31
    assert kept
    assert not [name for name, support in kept.items() if 16 <= support <= 31]
    assert others <= set(names(users.refused))
    assert len(markets.refused) == 0

    assert acquitted not in json.dumps(records["evaluate"].notes)  # users are counted, not named
    run = json.loads(damageable.store.get(f"tiny/releases/{result.published.release}/run.json").data)
    counts = [(level["adapted"], level["fallen_back"]) for level in run["report"]["adapters"]["levels"]]
    assert counts == [(len(level.keys), len(level.refused)) for level in ship.levels]
