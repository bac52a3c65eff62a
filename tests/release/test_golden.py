"""Golden requests: what they cover, and that parity notices a single wrong weight."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tasks.errors import ParityBroken
from tasks.release.golden import NEVER_SEEN, SHAPES, TOLERANCE, check_parity, draw_requests, make_golden
from tests.releases import Made


def test_graphs_agree_with_the_network(made: Made):
    assert made.parity.requests == 2 * len(SHAPES)
    assert made.parity.scores == sum(golden.scores.size for golden in made.golden)
    assert max(made.parity.model, made.parity.split) <= TOLERANCE == 1e-5


def test_golden_requests_hold_real_rows_unknown_keys_and_missing_values(full: Made):
    plain, difficult = full.golden[-2].inputs, full.golden[-1].inputs
    known = set(full.rows["user"].to_pylist())
    assert set(plain["user"].tolist()) <= known
    assert NEVER_SEEN["string"] in difficult["user"].tolist()
    assert NEVER_SEEN["int64"] in difficult["item"].ravel().tolist()
    assert "" in difficult["job"].tolist()
    assert NEVER_SEEN["string"] in difficult["genre"].ravel().tolist()
    assert np.isnan(difficult["age"]).any()
    assert not np.isnan(difficult["age"]).all()


def test_the_draw_is_seeded(full: Made):
    one, two, other = (draw_requests(full.data, full.rows, seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a[name], b[name], equal_nan=a[name].dtype.kind == "f")
               for a, b in zip(one, two, strict=True) for name in a)  # fmt: skip
    assert not all(np.array_equal(a["item"], b["item"]) for a, b in zip(one, other, strict=True))


def test_no_rows_no_golden_requests(full: Made):
    with pytest.raises(ValueError, match="at least one row"):
        draw_requests(full.data, full.rows[:0])


@pytest.mark.parametrize("file", ["base.bin", "statistics.bin", "bank.bin"])
def test_one_perturbed_weight_breaks_parity(full: Made, tmp_path: Path, file: str):
    folder = tmp_path / "release"
    shutil.copytree(full.folder, folder)
    weights = np.fromfile(folder / file, np.float32)
    unknown_item = -(-full.tables.statistics.cohort_item.size // 16) * 16  # behind the pairs, aligned to 64 bytes
    used = {"base.bin": -1, "statistics.bin": unknown_item, "bank.bin": 0}[file]
    weights[used] += 0.05
    weights.tofile(folder / file)
    with pytest.raises(ParityBroken, match=r"model.onnx differs from the network by .* limit 1e-05"):
        check_parity(full.data, full.tables, full.golden, folder)


def test_a_broken_half_is_noticed_too(full: Made, tmp_path: Path):
    folder = tmp_path / "release"
    shutil.copytree(full.folder, folder)
    graph = (folder / "score.onnx").read_bytes()
    assert graph.count(b"Sigmoid") == 1
    (folder / "score.onnx").write_bytes(graph.replace(b"Sigmoid", b"Softmax", 1))
    with pytest.raises(ParityBroken, match=r"lookup\.onnx"):
        check_parity(full.data, full.tables, full.golden, folder)


def test_a_network_that_gives_nan_has_no_golden_answers(full: Made):
    statistics = full.tables.statistics
    kept = statistics.item.copy()
    statistics.item[:] = np.nan
    try:
        with pytest.raises(ParityBroken, match="not finite"):
            make_golden(full.network, full.bank, full.tables, full.data, [full.golden[0].inputs])
    finally:
        statistics.item[:] = kept


def test_the_file_is_json_with_exact_numbers_and_null_for_nan(full: Made):
    found = json.loads((full.folder / "golden.json").read_bytes())["requests"]
    for read, golden in zip(found, full.golden, strict=True):
        scores = np.array(read["scores"], np.float32).reshape(read["shape"])
        np.testing.assert_array_equal(scores, golden.scores)
        ages = np.array(read["inputs"]["age"], np.float32)
        np.testing.assert_array_equal(ages, golden.inputs["age"])
