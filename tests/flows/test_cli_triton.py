"""`nightrank releases triton`: the champion of a real night, as callers of a Triton server would ask it."""

from pathlib import Path

import numpy as np
import pytest

from flows.cli import main
from tasks.release.publishing import read_manifest
from tasks.serving.ranker import Ranker
from tests.finished import Finished
from tests.release.triton_rules import answer_of, as_sent, read_config


def test_the_champion_is_written_and_answers_as_the_reader_does(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    where = ["--store", finished.world.config["store"], "--pipeline", "tiny"]
    main(["releases", "triton", *where, "--out", str(tmp_path / "models"), "--name", "films", "--max-batch", "8"])
    release = finished.pointer.release[:12]
    said = capsys.readouterr().out
    assert f"ensemble films, version {finished.pointer.night:%Y%m%d}, of films_lookup_{release} and" in said
    assert "load it: POST v2/repository/models/films/load" in said
    assert {read_config(path).max_batch_size for path in (tmp_path / "models").glob("*/config.pbtxt")} == {8}
    interface = read_manifest(finished.store, "tiny", finished.pointer.release).interface
    kinds = {"string": object, "int64": np.int64, "float32": np.float32}
    request = {}
    for spec in interface.inputs:
        example = spec.missing if spec.example is None else spec.example
        filled = np.nan if example is None else example
        request[spec.name] = np.full((2,) if spec.per == "request" else (2, 3), filled, kinds[spec.dtype])
    found = answer_of(tmp_path / "models", "films", as_sent(interface, request))[interface.output]
    with Ranker(*where[1::2], device="cpu") as ranker:
        np.testing.assert_allclose(found, ranker.score(request), rtol=1e-5, atol=1e-5)


def test_a_name_that_triton_could_not_have_ends_with_2(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    where = ["--store", finished.world.config["store"], "--pipeline", "tiny", "--out", str(tmp_path / "models")]
    with pytest.raises(SystemExit, match="2"):
        main(["releases", "triton", *where, "--name", "a/b"])
    assert "'a/b' cannot name a Triton model here" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()
