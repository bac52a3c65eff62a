"""Figures of lists by method and objective, and their means over nights."""

from pathlib import Path

import numpy as np
import pytest

from tasks.learning.catalogue import Catalogue
from tasks.release.slices import ADAPTED, POOLED
from tasks.release.variety import Variety, load, save, varieties, with_pooled

CANDIDATES = Catalogue(
    items=np.array([4, 9, 2, 7]),
    ids=np.array([[4, 1], [9, 1], [2, 2], [7, 0]]),
    newest=np.zeros(4, np.int64),
    known=11,
)
LISTS = {
    "candidate": np.array([[[0, 1], [0, 2]], [[3, 2], [1, 0]]]),
    "popularity": np.array([[[0, 1], [0, 1]], [[0, 1], [0, 1]]]),
}


def test_every_method_and_objective_has_its_figures() -> None:
    found = varieties(LISTS, ("liked", "stars"), CANDIDATES, "2026-03-05")
    told = {(one.objective, one.method): one for one in found}
    assert told["liked", ADAPTED] == Variety(
        "liked", ADAPTED, "2026-03-05", 2, 4, 2, 3 / 4, pytest.approx((-3 * 0 - 1 * 1 + 1 * 1 + 3 * 2) / 16), 0.5, 0.5
    )
    assert told["stars", ADAPTED] == Variety("stars", ADAPTED, "2026-03-05", 2, 4, 2, 1.0, 0.0, 1.0, 0.5)
    assert told["liked", "popularity"] == Variety(
        "liked", "popularity", "2026-03-05", 2, 4, 2, 0.5, pytest.approx(0.5), 0.0, 0.0
    )
    assert len(found) == len(told) == 4


def test_nights_count_once_each_and_what_is_undefined_not_at_all(tmp_path: Path) -> None:
    nights = [
        Variety("liked", ADAPTED, "2026-03-05", 200, 1_500, 10, 0.4, 0.8, 0.6, None),
        Variety("liked", "popularity", "2026-03-05", 200, 1_500, 10, 0.1, 0.9, 0.0, None),
        Variety("liked", ADAPTED, "2026-03-06", 1, 1_501, 10, 0.2, 0.9, None, None),
    ]
    found = with_pooled(nights)
    assert found[:3] == nights
    assert found[3] == Variety(
        "liked", ADAPTED, POOLED, 201, 1_500, 10, pytest.approx(0.3), pytest.approx(0.85), 0.6, None
    )
    assert found[4] == Variety("liked", "popularity", POOLED, 200, 1_500, 10, 0.1, 0.9, 0.0, None)
    save(found, tmp_path / "variety.parquet")
    assert load(tmp_path / "variety.parquet") == found
