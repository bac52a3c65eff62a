"""A release whose smaller graph does not answer as it should, with digests that fit: who notices, and what serves."""

from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest

from tasks.clients.object_store import ObjectStore
from tasks.errors import ReleaseRefused
from tasks.release.golden import make_golden, write_golden
from tasks.release.manifest import Manifest, Variant
from tasks.release.pointer import promote
from tasks.release.publishing import publish_release
from tasks.release.variants import build, files_of
from tasks.serving.loaded import load
from tasks.serving.ranker import Ranker
from tasks.verify import verify
from tests.releases import NIGHT, PIPELINE, Made, described_anew


def published(store: ObjectStore, made: Made, folder: Path, spoilt: bool) -> Manifest:
    """A champion with an int8 graph that passed; spoilt, its bank is other bytes."""
    copytree(made.folder, folder)
    bank = made.bank * np.float32(0.1)  # an untrained bank is too large for bytes
    (folder / "bank.bin").write_bytes(bank.tobytes())
    golden = make_golden(made.network, bank, made.tables, made.data, [one.inputs for one in made.golden])
    write_golden(made.data, golden, folder, made.tables.history)
    build("int8", folder, len(made.data.objectives))
    if spoilt:
        file = folder / "bank_int8.bin"
        file.write_bytes(np.random.default_rng(0).integers(-20, 20, file.stat().st_size, np.int8).tobytes())
    passed = Variant(files_of("int8"), "CPUExecutionProvider", {"tolerance": 0.05}, {}, "passed", "close")
    manifest = replace(described_anew(made, folder), variants={"int8": passed})
    publish_release(store, PIPELINE, folder, manifest, {})
    promote(store, PIPELINE, manifest.release, NIGHT, token=2)
    return manifest


def test_verify_says_which_graphs_answer(store: ObjectStore, tonight: Made, tmp_path: Path):
    sound = published(store, tonight, tmp_path / "sound", spoilt=False)
    checks = {check.name: check for check in verify(store, PIPELINE, sound.release)}
    assert not [check.told for check in checks.values() if not check.fine]
    assert checks["int8"].told == "the graphs of int8 load here and answer the golden requests"
    with Ranker(store, PIPELINE, "cpu") as ranker:
        assert (ranker.variant, ranker.warnings) == ("int8", ())

    spoilt = published(store, tonight, tmp_path / "spoilt", spoilt=True)
    checks = {check.name: check for check in verify(store, PIPELINE, spoilt.release)}
    assert [name for name, check in checks.items() if not check.fine] == ["int8"]
    assert "off by int8" in checks["int8"].told


def test_fp32_serves_in_place_of_a_spoilt_variant_and_a_warning_says_so(
    store: ObjectStore, tonight: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    manifest = published(store, tonight, tmp_path / "spoilt", spoilt=True)
    with Ranker(store, PIPELINE, "cpu") as ranker:
        assert ranker.manifest.release == manifest.release
        assert ranker.variant == "fp32"
        (warning,) = ranker.warnings
        assert warning.startswith("fp32 serves in place of int8: ")
        assert "off by int8" in warning
        assert warning in caplog.text
        plain = load(tmp_path / "spoilt", manifest, "cpu")
        asked = tonight.golden[-1].inputs
        assert (ranker.score(asked) == plain.run(dict(asked), tonight.golden[-1].scores.shape[:2])).all()
    with pytest.raises(ReleaseRefused, match="off by int8"):
        Ranker(store, PIPELINE, "cpu", variant="int8")
