"""What pools over exams of several nights when a later one has a method that the earlier ones did not know."""

import numpy as np
import pyarrow as pa
import pytest

from tasks.data.contract import ObjectiveConfig
from tasks.learning.metrics import log_loss
from tasks.release.evidence import compare, figures
from tasks.release.gate import GateConfig, decide_release

LIKED = ObjectiveConfig(name="liked", column="liked")
CONDITION = "contact 5"


def exam(seed: int, strengths: dict[str, float], users: int = 40, each: int = 8) -> pa.Table:
    """One night; the larger its strength, the more a method knows of the labels."""
    random = np.random.default_rng(seed)
    count = users * each
    labels = random.integers(0, 2, count).astype(np.float32)
    columns: dict[str, object] = {
        "user": [f"{seed}-{number // each}" for number in range(count)],
        "tie": random.permutation(count),
        "at": np.tile(np.arange(each, dtype=np.int32), users),
        "label/liked": labels,
    }
    for method, strength in strengths.items():
        said = 1 / (1 + np.exp(-strength * (2 * labels - 1) - random.normal(size=count)))
        # The first five rows of everybody are support.
        columns[f"{CONDITION}/{method}/liked"] = np.where(columns["at"] < 5, np.nan, said).astype(np.float32)
    return pa.table(columns)


@pytest.fixture(scope="module")
def nights() -> list[pa.Table]:
    """The newest first: only that one knows item-kNN."""
    known = {"candidate": 1.0, "popularity": 0.2}
    return [exam(0, {**known, "item-kNN": 0.9}), exam(1, known), exam(2, {**known, "forgotten": 3.0})]


def loss(table: pa.Table, method: str) -> np.ndarray:
    said = table[f"{CONDITION}/{method}/liked"].to_numpy().astype(float)
    asked = ~np.isnan(said)
    return log_loss(table["label/liked"].to_numpy().astype(float)[asked], said[asked])


def test_a_method_is_compared_on_the_nights_that_have_it(nights: list[pa.Table]) -> None:
    """And one that the newest night does not have is not compared at all."""
    found = compare(nights, CONDITION, LIKED, seed=0)
    assert {method: pooled for method, (_, pooled) in found.items()} == {"popularity": 3, "item-kNN": 1}
    fresh, old = found["item-kNN"][0], found["popularity"][0]
    assert fresh == compare(nights[:1], CONDITION, LIKED, seed=0)["item-kNN"][0]
    assert (fresh.users, fresh.rows) == (40, 120)
    assert fresh.estimate == pytest.approx((loss(nights[0], "candidate") - loss(nights[0], "item-kNN")).mean())
    assert (old.users, old.rows) == (120, 360)
    gains = np.concatenate([loss(night, "candidate") - loss(night, "popularity") for night in nights])
    assert old.estimate == pytest.approx(gains.mean())


def test_the_gate_takes_the_new_method_as_the_best_baseline(nights: list[pa.Table]) -> None:
    against = {method: vs for method, (vs, _) in compare(nights, CONDITION, LIKED, seed=0).items()}
    verdict = decide_release(GateConfig(), against)
    assert verdict.reasons[1].startswith("against item-kNN: ")
    assert "over 40 users and 120 rows" in verdict.reasons[1]


def test_every_method_of_a_night_has_its_figures(nights: list[pa.Table]) -> None:
    told = figures(nights[0], CONDITION, LIKED)
    assert list(told) == ["candidate", "popularity", "item-kNN"]
    assert told["item-kNN"]["log_loss"] == pytest.approx(loss(nights[0], "item-kNN").mean(), rel=1e-6)
    assert "item-kNN" not in figures(nights[1], CONDITION, LIKED)
