"""The memory of steps: first write wins, damage is found, nothing half-done is ever recalled."""

import json
import os
from pathlib import Path

import pytest

from tasks.clients.object_store import ObjectStore, open_store
from tasks.clients.workspace import StepRecord, Workspace, canonical_json, digest_of
from tasks.errors import ObjectCorrupt, ObjectMissing, StoreError, StoreUnavailable


@pytest.fixture
def workspace(store: ObjectStore, tmp_path: Path) -> Workspace:
    return Workspace(store, "movies", tmp_path / "scratch")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Three files by name, two of them in a folder, two of them equal."""
    (tmp_path / "made").mkdir()
    contents = {"base.bin": b"base", "rows/labels.npy": b"labels", "rows/deep/copy.npy": b"labels"}
    paths = {name: tmp_path / "made" / str(number) for number, name in enumerate(contents)}
    for name, path in paths.items():
        path.write_bytes(contents[name])
    return paths


def _remember(workspace: Workspace, files: dict[str, Path], notes: dict[str, object] | None = None) -> StepRecord:
    return workspace.remember("prepare", "k" * 64, {"rows": 3}, notes or {}, files)


def _damage(store: ObjectStore, key: str) -> None:
    found = store.get(key)
    store.delete(key)
    store.put_if_absent(key, found.data[:-1] + b"?")


def test_the_key_changes_with_everything_that_matters_and_nothing_else(workspace: Workspace) -> None:
    key = workspace.key("prepare", 1, {"a": "1", "b": "2"}, {"x": 1, "y": [1, 2]})
    assert len(key) == 64
    assert key == workspace.key("prepare", 1, {"b": "2", "a": "1"}, {"y": (1, 2), "x": 1})
    others = [
        workspace.key("adapt", 1, {"a": "1", "b": "2"}, {"x": 1, "y": [1, 2]}),
        workspace.key("prepare", 2, {"a": "1", "b": "2"}, {"x": 1, "y": [1, 2]}),
        workspace.key("prepare", 1, {"a": "1", "b": "3"}, {"x": 1, "y": [1, 2]}),
        workspace.key("prepare", 1, {"a": "1", "b": "2"}, {"x": 2, "y": [1, 2]}),
        workspace.key("prepare", 1, {"a": "1", "b": "2"}, {"x": 1, "y": [2, 1]}),
    ]
    assert len({key, *others}) == 6


def test_canonical_json_has_no_word_for_nan() -> None:
    with pytest.raises(ValueError):
        canonical_json({"x": float("nan")})


def test_what_was_never_remembered_is_not_recalled(workspace: Workspace) -> None:
    assert workspace.recall("prepare", "k" * 64) is None
    assert list(workspace.records("prepare")) == []


def test_a_step_is_recalled_as_remembered(workspace: Workspace, files: dict[str, Path]) -> None:
    record = _remember(workspace, files, {"seconds": 1.5})
    assert workspace.recall("prepare", "k" * 64) == record
    assert list(workspace.records("prepare")) == [record]
    assert list(workspace.records("adapt")) == []
    assert record.content["rows"] == 3
    assert record.content["files"]["base.bin"]["bytes"] == 4
    assert record.digest == digest_of(record.content)
    assert workspace.file(record, "base.bin").read_bytes() == b"base"


def test_notes_are_outside_the_digest(workspace: Workspace, files: dict[str, Path]) -> None:
    first = workspace.remember("prepare", "a" * 64, {"rows": 3}, {"seconds": 1}, files)
    second = workspace.remember("prepare", "b" * 64, {"rows": 3}, {"seconds": 2}, files)
    assert first.digest == second.digest


def test_the_first_write_wins_and_is_what_the_second_gets(
    workspace: Workspace, files: dict[str, Path], tmp_path: Path
) -> None:
    first = _remember(workspace, files)
    files["base.bin"].write_bytes(b"another run's")
    assert _remember(workspace, files, {"late": True}) == first
    assert workspace.file(first, "base.bin").read_bytes() == b"base"


def test_a_run_that_died_before_its_record_is_not_recalled_and_can_be_repeated(
    workspace: Workspace, store: ObjectStore, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(key: str, data: bytes) -> bool:
        raise StoreUnavailable(f"died before {key}")

    with monkeypatch.context() as patch:
        patch.setattr(store, "put_if_absent", die)
        with pytest.raises(StoreUnavailable, match=r"record\.json"):
            _remember(workspace, files)
    assert workspace.recall("prepare", "k" * 64) is None
    assert len(list(store.list("movies/work/"))) == 2  # equal files are one
    assert workspace.recall("prepare", "k" * 64) is None
    assert _remember(workspace, files) == workspace.recall("prepare", "k" * 64)


def test_a_folder_is_laid_out_and_used_again(workspace: Workspace, files: dict[str, Path]) -> None:
    record = _remember(workspace, files)
    folder = workspace.folder(record, "rows")
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "labels.npy",
        "deep/copy.npy",
    }
    assert (folder / "deep" / "copy.npy").read_bytes() == b"labels"
    inode = (folder / "labels.npy").stat().st_ino
    assert workspace.folder(record, "rows") == folder
    assert (folder / "labels.npy").stat().st_ino == inode


def test_a_damaged_folder_is_laid_out_anew(workspace: Workspace, files: dict[str, Path], tmp_path: Path) -> None:
    record = _remember(workspace, files)
    folder = workspace.folder(record, "rows")
    (folder / "labels.npy").unlink()
    (folder / "labels.npy").write_bytes(b"other!")
    (folder / "deep" / "copy.npy").unlink()
    assert (workspace.folder(record, "rows") / "labels.npy").read_bytes() == b"labels"
    assert (workspace.folder(record, "rows") / "deep" / "copy.npy").read_bytes() == b"labels"


def test_a_folder_that_another_run_laid_out_meanwhile_is_left_to_it(
    workspace: Workspace, files: dict[str, Path], store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pipelines of one lake share a scratch: the slower one comes when the other reads already."""
    record = _remember(workspace, files)
    other = Workspace(store, "movies", tmp_path / "scratch")
    link, opened = os.link, []

    def meanwhile(source: Path, target: Path) -> None:
        if not opened:
            monkeypatch.setattr(os, "link", link)
            opened.append((other.folder(record, "rows") / "labels.npy").stat().st_ino)
            (other.folder(record, "rows") / "mine").touch()
        link(source, target)

    monkeypatch.setattr(os, "link", meanwhile)
    folder = workspace.folder(record, "rows")
    assert (folder / "mine").exists()
    assert [(folder / "labels.npy").stat().st_ino] == opened
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_a_copy_in_scratch_that_was_damaged_is_fetched_again(
    s3_url: str, files: dict[str, Path], tmp_path: Path
) -> None:
    store = open_store(s3_url)
    workspace = Workspace(store, "movies", tmp_path / "scratch")
    record = _remember(workspace, files)
    workspace.file(record, "base.bin").write_bytes(b"flip")
    assert Workspace(store, "movies", tmp_path / "scratch").file(record, "base.bin").read_bytes() == b"base"


def test_a_damaged_file_in_the_store_is_found_by_its_digest(
    workspace: Workspace, store: ObjectStore, files: dict[str, Path]
) -> None:
    record = _remember(workspace, files)
    _damage(store, f"movies/work/prepare/{'k' * 64}/{record.content['files']['base.bin']['sha256']}")
    with pytest.raises(ObjectCorrupt, match="SHA-256"):
        workspace.file(record, "base.bin")


def test_a_file_that_the_store_lost_is_missing(
    workspace: Workspace, store: ObjectStore, files: dict[str, Path]
) -> None:
    record = _remember(workspace, files)
    store.delete(f"movies/work/prepare/{'k' * 64}/{record.content['files']['base.bin']['sha256']}")
    with pytest.raises(ObjectMissing, match=r"restore it, or delete .*/ and run again: the step is repeated"):
        workspace.file(record, "base.bin")


def test_a_damaged_record_is_refused_with_the_remedy(
    workspace: Workspace, store: ObjectStore, files: dict[str, Path]
) -> None:
    _remember(workspace, files)
    _damage(store, f"movies/work/prepare/{'k' * 64}/record.json")
    with pytest.raises(ObjectCorrupt, match=r"delete .*/ and run again: the step is repeated"):
        workspace.recall("prepare", "k" * 64)


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "0" * 64},
        {"content": {"files": {}, "rows": 4}},
        {"step": "adapt"},
        {"schema_version": 2},
        {"surprise": 1},
    ],
    ids=str,
)
def test_a_changed_record_is_refused(
    workspace: Workspace, store: ObjectStore, files: dict[str, Path], change: dict[str, object]
) -> None:
    _remember(workspace, files)
    where = f"movies/work/prepare/{'k' * 64}/record.json"
    found = store.get(where)
    store.swap(where, json.dumps({**json.loads(found.data), **change}).encode(), found.etag)
    with pytest.raises(ObjectCorrupt):
        workspace.recall("prepare", "k" * 64)


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "a/../../b"])
def test_a_record_with_hostile_file_names_is_refused(
    workspace: Workspace, store: ObjectStore, files: dict[str, Path], name: str
) -> None:
    with pytest.raises(StoreError, match=r"^key "):
        _remember(workspace, {name: files["base.bin"]})
    content = {"files": {name: {"sha256": "0" * 64, "bytes": 1}}}
    hostile = {"schema_version": 1, "step": "prepare", "key": "k", "content": content, "notes": {}}
    store.put_if_absent("movies/work/prepare/k/record.json", canonical_json({**hostile, "digest": digest_of(content)}))
    with pytest.raises(ObjectCorrupt):
        workspace.recall("prepare", "k")


def test_names_of_pipelines_and_steps_are_single_parts(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        Workspace(store, "a/b", tmp_path)
    with pytest.raises(StoreError):
        Workspace(store, "a", tmp_path).recall("../b", "k")


def test_misuse_is_named(workspace: Workspace, files: dict[str, Path]) -> None:
    record = _remember(workspace, files)
    with pytest.raises(StoreError, match="has no file 'none'; it has"):
        workspace.file(record, "none")
    with pytest.raises(StoreError, match="no files below 'none'/"):
        workspace.folder(record, "none")
    with pytest.raises(StoreError, match="holds 'files'"):
        workspace.remember("prepare", "x", {"files": {}}, {}, {})
