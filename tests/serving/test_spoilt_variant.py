"""A release whose smaller graph does not answer as it should, with digests that fit: who notices, and what serves."""

from pathlib import Path

import pytest

from tasks.clients.object_store import ObjectStore
from tasks.errors import ReleaseRefused
from tasks.release.manifest import Manifest
from tasks.release.pointer import promote
from tasks.release.publishing import publish_release
from tasks.serving.loaded import load
from tasks.serving.ranker import Ranker
from tasks.verify import verify
from tests.releases import NIGHT, PIPELINE, Made, with_variants


def published(store: ObjectStore, made: Made, folder: Path, spoilt: bool) -> Manifest:
    """A champion with an int8 graph that passed; spoilt, its bank is other bytes."""
    made = with_variants(made, folder, spoilt=("int8",) if spoilt else ())
    publish_release(store, PIPELINE, folder, made.manifest, {})
    promote(store, PIPELINE, made.manifest.release, NIGHT, token=2)
    return made.manifest


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
