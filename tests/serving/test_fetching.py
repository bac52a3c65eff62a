"""What a ranker fetches of a release: what it opens, and nothing else."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from tasks.clients.object_store import ObjectStore, open_store
from tasks.errors import ReleaseRefused
from tasks.release.manifest import Manifest, blob_key, manifest_key, pointer_key
from tasks.release.pointer import promote
from tasks.release.publishing import publish_release
from tasks.serving import loaded, runners, sessions
from tasks.serving.loaded import load
from tasks.serving.ranker import Ranker
from tasks.serving.sessions import CPU
from tasks.serving.variants import VariantChoice, choose, everything, selected
from tests.releases import (
    NIGHT,
    PIPELINE,
    Made,
    make_release,
    next_night,
    shared_feedback_graph,
    shared_graph,
    smuggle,
    with_variants,
)
from tests.s3_server import S3Server
from tests.serving.test_refresher import eventually

SAID = {"golden.json", "interface.json"}
WHOLE = SAID | {"model.onnx", "base.bin", "statistics.bin", "bank.bin"}
BYTES = SAID | {"lookup.onnx", "score_int8.onnx", "base_int8.bin", "bank_int8.bin", "statistics.bin"}
SPLIT = SAID | {"lookup.onnx", "score.onnx", "base.bin", "bank.bin", "statistics.bin"}
HALVES = SAID | {"lookup.onnx", "score_fp16.onnx", "base_fp16.bin", "bank_fp16.bin", "statistics.bin"}
SOLVES = {"model_feedback.onnx", "base.bin", "bank.bin", "statistics.bin"}
EXPECTED: dict[VariantChoice, set[str]] = {"fp32": WHOLE, "int8": BYTES, "auto": BYTES}
BOTH = ("fp16", "int8")


class Watched:
    """A store that notes the keys of what is asked of it."""

    def __init__(self, store: ObjectStore) -> None:
        self._store, self.sizes, self.downloads, self.reads = store, [], [], []
        self.url = store.url

    def size(self, key: str) -> int | None:
        self.sizes.append(key)
        return self._store.size(key)

    def download(self, key: str, path: Path, sha256: str | None = None, between: object = None) -> None:
        self.downloads.append(key)
        self._store.download(key, path, sha256, between)  # type: ignore[arg-type]

    def find(self, key: str, most: int | None = None) -> object:
        self.reads.append(key)
        return self._store.find(key, most)

    def fetched(self, *of: Made) -> list[str]:
        """Names of the files that were fetched since the last time, once each time; nothing else was asked for."""
        names = {blob_key(PIPELINE, file.sha256): file.name for made in of for file in made.manifest.files}
        assert self.sizes == self.downloads  # each is looked at before it is fetched
        assert set(self.reads) <= {pointer_key(PIPELINE), *(manifest_key(PIPELINE, m.manifest.release) for m in of)}
        found = sorted(names[key] for key in self.downloads)
        self.sizes.clear(), self.downloads.clear(), self.reads.clear()
        return found


@pytest.fixture(scope="module")
def small(tonight: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A release with both smaller graphs."""
    return with_variants(tonight, tmp_path_factory.mktemp("small") / "release", BOTH)


@pytest.fixture(scope="module")
def later(tomorrow: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Its next night."""
    return with_variants(tomorrow, tmp_path_factory.mktemp("later") / "release", BOTH)


@pytest.fixture(scope="module")
def spoilt(tonight: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """One whose smaller graphs do not answer their golden requests."""
    return with_variants(tonight, tmp_path_factory.mktemp("spoilt") / "release", BOTH, spoilt=BOTH)


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    (tmp_path / "watched").mkdir()
    return Watched(open_store(str(tmp_path / "watched")))


def release(watched: Watched, made: Made, move: bool = True) -> None:
    publish_release(watched._store, PIPELINE, made.folder, made.manifest, {})
    if move:
        point(watched, made)


def point(watched: Watched, made: Made) -> None:
    promote(watched._store, PIPELINE, made.manifest.release, made.manifest.night, token=1, force=True)


def opened(watched: Watched, variant: VariantChoice, cache: Path | None = None, device: str = "cpu", **more: object):
    return Ranker(watched, PIPELINE, device, cache, variant=variant, **more)  # type: ignore[arg-type]


def changed(before: Made, after: Made, names: set[str]) -> list[str]:
    """Of some files those that the later release does not share."""
    old, new = ({file.name: file.sha256 for file in made.manifest.files} for made in (before, after))
    return sorted(name for name in names if old[name] != new[name])


@pytest.mark.parametrize("variant", list(EXPECTED))
def test_a_ranker_asks_for_the_files_that_it_opens_and_for_the_next_night_for_what_changed(
    watched: Watched, small: Made, later: Made, variant: VariantChoice
):
    release(watched, small)
    with opened(watched, variant) as ranker:
        assert watched.fetched(small) == sorted(EXPECTED[variant])
        release(watched, later)
        assert ranker.refresh()
        assert ranker.variant == ("fp32" if variant == "fp32" else "int8")
        fetched = watched.fetched(small, later)
        assert fetched == changed(small, later, EXPECTED[variant])
        assert 2 <= len(fetched) < len(EXPECTED[variant])


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_each_of_these_files_is_needed(small: Made, tmp_path: Path, variant: VariantChoice):
    """onnxruntime itself opens them: without any one of them nothing is loaded."""
    for lacking in sorted(EXPECTED[variant]):
        folder = tmp_path / lacking
        folder.mkdir()
        for name in EXPECTED[variant] - {lacking}:
            (folder / name).hardlink_to(small.folder / name)
        with pytest.raises((ReleaseRefused, FileNotFoundError), match=r"does not load|No such file"):
            load(folder, small.manifest, "cpu", variant=variant)
        (folder / lacking).hardlink_to(small.folder / lacking)
        assert load(folder, small.manifest, "cpu", variant=variant).variant == variant


def test_int8_serves_from_a_store_that_has_nothing_else(watched: Watched, small: Made):
    release(watched, small)
    asked = small.golden[-1].inputs
    with opened(watched, "int8") as ranker:
        before = ranker.score(asked)
    for file in small.manifest.files:
        if file.name not in BYTES:
            watched._store.delete(blob_key(PIPELINE, file.sha256))
    with opened(watched, "int8") as ranker:
        np.testing.assert_array_equal(ranker.score(asked), before)
    with pytest.raises(ReleaseRefused, match=r"(bank|base|model).* has None bytes in the store"):
        opened(watched, "fp32")


def test_a_damaged_file_of_the_chosen_variant_is_a_refusal_and_no_reason_to_serve_fp32(watched: Watched, small: Made):
    release(watched, small)
    key = blob_key(PIPELINE, next(one.sha256 for one in small.manifest.files if one.name == "bank_int8.bin"))
    data = watched._store.get(key).data
    watched._store.delete(key)
    watched._store.put_if_absent(key, bytes([data[0] ^ 1]) + data[1:])
    for variant in ("auto", "int8"):
        with pytest.raises(ReleaseRefused, match=r"bank_int8\.bin is damaged"):
            opened(watched, variant)
    with opened(watched, "fp32") as ranker:
        assert ranker.release == small.manifest.release


def test_where_auto_falls_back_to_fp32_the_rest_is_fetched_then(watched: Watched, spoilt: Made, small: Made):
    release(watched, spoilt)
    with opened(watched, "auto") as ranker:
        assert (ranker.variant, len(ranker.warnings)) == ("fp32", 1)
        fetched = watched.fetched(spoilt)
        assert fetched == sorted([*BYTES, *(WHOLE - BYTES)])
        np.testing.assert_allclose(ranker.score(spoilt.golden[-1].inputs), spoilt.golden[-1].scores, atol=1e-5)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU in the place of the GPU."""
    monkeypatch.setattr(loaded, "require_gpu", lambda: None)
    monkeypatch.setattr(runners, "_DEVICE", "cpu")
    monkeypatch.setattr(runners, "GPU", "cpu")


@pytest.mark.parametrize(("variant", "expected"), [("auto", HALVES), ("fp16", HALVES), ("fp32", SPLIT)])
def test_a_ranker_on_a_gpu_asks_for_its_graphs(
    watched: Watched, small: Made, stand_in: None, variant: VariantChoice, expected: set[str]
):
    release(watched, small)
    with opened(watched, variant, device="cuda") as ranker:
        assert ranker.device == "cuda"
        assert watched.fetched(small) == sorted(expected)


def test_where_the_gpu_does_not_compute_the_processors_files_are_fetched_then(
    watched: Watched, small: Made, later: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And of the release before, which is held ready: those of the processor that serves."""
    monkeypatch.setattr(loaded, "require_gpu", lambda: None)
    monkeypatch.setattr(runners, "GPU", "cpu")
    monkeypatch.setattr(sessions, "providers", lambda *_: [CPU])  # what is left of the list when CUDA does not load
    release(watched, later)
    release(watched, small)
    with opened(watched, "auto", tmp_path / "cache", device="auto") as ranker:
        assert (ranker.device, ranker.variant) == ("cpu", "int8")
        assert watched.fetched(small) == sorted([*HALVES, *(BYTES - HALVES)])
        ranker._follower.poll()
        assert watched.fetched(small, later) == changed(small, later, BYTES)


def test_a_release_that_takes_feedback_needs_its_fp32_weights(
    watched: Watched, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
):
    graphs = shared_graph(tmp_path_factory, "full"), shared_feedback_graph(tmp_path_factory, "full")
    made = make_release(tmp_path / "feedback", graphs[0], with_feedback=graphs[1])
    small = with_variants(made, tmp_path / "small")
    release(watched, small)
    for variant, expected in (("int8", BYTES | SOLVES), ("fp32", WHOLE | SOLVES)):
        with opened(watched, variant):
            assert watched.fetched(small) == sorted(expected)


def test_of_a_release_that_does_not_say_what_its_graphs_open_everything_is_fetched(watched: Watched, small: Made):
    older = replace(small, manifest=replace(small.manifest, schema_version=4, graphs={}))
    smuggle(watched._store, older.folder, older.manifest)
    assert Manifest.parse(older.manifest.serialise(), PIPELINE, older.manifest.release) == older.manifest
    point(watched, older)
    with opened(watched, "int8"):
        assert watched.fetched(older) == sorted(file.name for file in older.manifest.files)


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_after_a_rollback_nothing_is_fetched(
    watched: Watched, small: Made, later: Made, tmp_path: Path, variant: VariantChoice
):
    """By a ranker that has served the release before, and by one that has it from its thread alone."""
    release(watched, small)
    release(watched, later)
    with opened(watched, variant, tmp_path / "cache", refresh_every=0.02) as ranker:
        eventually(lambda: ranker._follower._held == 2)
        assert watched.fetched(small, later) == sorted([*EXPECTED[variant], *changed(later, small, EXPECTED[variant])])
        for made in (small, later, small):
            point(watched, made)
            eventually(lambda made=made: ranker.release == made.manifest.release)
            assert ranker.variant == variant
        assert watched.fetched(small, later) == []


def test_a_fallback_that_has_happened_is_at_hand_after_a_rollback(
    watched: Watched, spoilt: Made, later: Made, tmp_path: Path
):
    release(watched, spoilt)
    with opened(watched, "auto", tmp_path / "cache") as ranker:
        release(watched, later)
        assert ranker.refresh()
        assert ranker.variant == "int8"
        watched.fetched(spoilt, later)
        point(watched, spoilt)
        assert ranker.refresh()
        assert ranker.variant == "fp32"
        assert watched.fetched(spoilt, later) == []


def laid_out(cache: Path) -> dict[str, dict[str, set[str]]]:
    return {
        made.name: {one.name: {file.name for file in one.iterdir()} for one in made.iterdir()}
        for made in (cache / "releases").iterdir()
    }


def test_rankers_of_two_variants_share_a_cache_and_take_nothing_from_each_other(
    watched: Watched, small: Made, later: Made, tmp_path: Path
):
    third = with_variants(
        next_night(small, tmp_path / "n", NIGHT + timedelta(days=2), seed=9), tmp_path / "third", BOTH
    )
    release(watched, small)
    cache, both = tmp_path / "cache", {"cpu-fp32": WHOLE, "cpu-int8": BYTES}
    with opened(watched, "fp32", cache) as plain, opened(watched, "int8", cache) as bytes_:
        # What both open is fetched by the first of them.
        assert watched.fetched(small) == sorted(WHOLE | BYTES)
        release(watched, later)
        for ranker in (bytes_, plain):
            assert ranker.refresh()
        assert laid_out(cache) == {made.manifest.release: both for made in (small, later)}
        watched.fetched(small, later)
        point(watched, small)
        for ranker in (plain, bytes_):
            assert ranker.refresh()
        point(watched, later)
        for ranker in (plain, bytes_):
            assert ranker.refresh()
        assert watched.fetched(small, later) == []
        release(watched, third)
        for ranker in (plain, bytes_):
            assert ranker.refresh()
            made = third.golden[-1]
            np.testing.assert_allclose(ranker.score(made.inputs), made.scores, atol=0.05)
        assert laid_out(cache) == {made.manifest.release: both for made in (later, third)}
        kept = {
            file.sha256 for made in (later, third) for file in made.manifest.files if file.name in WHOLE | BYTES
        }  # fmt: skip
        assert {one.name for one in (cache / "blobs").iterdir()} == kept


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return "s3://tests/fetching"


def test_of_a_real_s3_server_no_more_is_asked(bucket: str, small: Made):
    watched = Watched(open_store(bucket))
    release(watched, small)
    for variant, expected in EXPECTED.items():
        with opened(watched, variant) as ranker:
            assert watched.fetched(small) == sorted(expected)
            np.testing.assert_allclose(ranker.score(small.golden[-1].inputs), small.golden[-1].scores, atol=0.05)


def test_what_a_manifest_does_not_list_no_graph_finds(watched: Watched, small: Made, tmp_path: Path):
    """Not even in a cache that another ranker has filled: each opens what its own graphs are said to open."""
    lists = {**small.manifest.graphs, "score_int8.onnx": ("base_int8.bin", "statistics.bin")}
    short = replace(small.manifest, graphs=lists)
    with pytest.raises(
        ReleaseRefused, match=r"score_int8\.onnx .* opens 'bank_int8.bin', 'base_int8.bin', 'stat"
    ) as no:
        publish_release(watched._store, PIPELINE, small.folder, short, {})
    assert "the manifest says 'base_int8.bin', 'statistics.bin': a ranker that fetched these" in str(no.value)
    assert watched._store.find(manifest_key(PIPELINE, short.release)) is None
    smuggle(watched._store, small.folder, short)
    point(watched, replace(small, manifest=short))
    with opened(watched, "fp32", tmp_path / "cache"):
        pass
    with pytest.raises(
        ReleaseRefused, match=r"score_int8\.onnx with base_int8\.bin, statistics\.bin, as its"
    ) as refused:
        opened(watched, "int8", tmp_path / "cache")
    assert "does not load it from lookup.onnx with no other file; score_int8.onnx with" in str(refused.value)
    assert "bank_int8.bin" in str(refused.value)


def test_a_selection_is_of_the_manifests_own_graphs(small: Made):
    chosen = choose(small.manifest, "int8", "cpu")
    assert set(selected(small.manifest, chosen, "cpu").files) == BYTES
    assert set(everything(small.manifest).files) == {path.name for path in small.folder.iterdir()}
