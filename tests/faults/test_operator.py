"""An operator's rights on a real server are enough to collect, to move the pointer and to look; nobody else's remove.

Commands are run as an operator runs them, each with the identity that `infra/policies` gives its rights.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import cli
from tasks.clients import s3_multipart, s3_store
from tasks.clients.object_store import CHECKS, open_store
from tasks.clients.s3_client import s3_client
from tasks.clients.s3_store import S3Store
from tasks.errors import StoreUnwritable
from tasks.release.manifest import Manifest, blob_key
from tasks.release.marks import Marks, change_marks, marks_key, read_marks
from tasks.release.pointer import read_pointer
from tasks.steps import open_workspace, store_of
from tests.releases import NIGHT, Made, deliver, make_release, next_night, shared_graph
from tests.s3_server import ADMIN, OPERATOR, PUBLISHER, RANKER, S3Server

ROOT = Path(__file__).parents[2]
PIPELINE = "tiny"
URL = "s3://models/nightrank"
NIGHTS = 5
DAY = timedelta(days=1)


@dataclass
class Published:
    """Releases of successive nights in the store of the policies, and a hand that acts with somebody's rights."""

    manifests: tuple[Manifest, ...]
    truth: S3Store
    config: Path
    act_as: Callable[[tuple[str, str]], None]
    capsys: pytest.CaptureFixture[str]

    def say(self, *words: str) -> str:
        """What a command prints."""
        self.capsys.readouterr()
        cli.main(list(words))
        return " ".join(self.capsys.readouterr().out.split())

    def refused(self, *words: str) -> str:
        """The error that a command ends with."""
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(list(words))
        assert ended.value.code == 2
        return " ".join(self.capsys.readouterr().err.split())

    def gc(self, *more: str) -> tuple[str, ...]:
        return ("releases", "gc", "--config", str(self.config), "--keep", "1", *more)

    def verify(self) -> None:
        """Every release that is visible loads and answers its golden requests."""
        said = self.say("releases", "verify", "--all", "--store", URL, "--pipeline", PIPELINE)
        assert said.count("answers") >= 1

    def everything(self) -> dict[str, bytes]:
        """Every object but those that a collector writes for itself."""
        own = (marks_key(PIPELINE), f"{PIPELINE}/lease")
        return {key: self.truth.get(key).data for key in self.truth.list("") if key not in own}

    def two_days_later(self) -> None:
        """What was marked was marked two days ago."""
        back = {name: when - 2 * DAY for name, when in read_marks(self.truth, PIPELINE)[0].since.items()}
        change_marks(self.truth, PIPELINE, lambda marks: Marks(back, marks.removing))

    def going(self, keys: Iterable[str]) -> tuple[list[str], set[str]]:
        """The releases that nothing names, and of the keys those of these releases and of their own blobs."""
        gone, stay = self.manifests[:2], self.manifests[2:]
        named = {file.sha256 for one in stay for file in one.files}
        blobs = {blob_key(PIPELINE, file.sha256) for one in gone for file in one.files if file.sha256 not in named}
        folders = tuple(f"{PIPELINE}/releases/{one.release}/" for one in gone)
        beside = {key for key in keys if key.startswith(folders)}
        assert len(blobs) == 6
        assert len(beside) == 4
        return [one.release for one in gone], blobs | beside


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, ...]:
    """A release a night, of the policies' pipeline."""
    folder = tmp_path_factory.mktemp("operator")
    first = make_release(folder / "0", shared_graph(tmp_path_factory, "lean"), "lean")
    later = (next_night(first, folder / str(one), NIGHT + one * DAY, seed=one) for one in range(1, NIGHTS))
    return tuple(replace(made, manifest=replace(made.manifest, pipeline=PIPELINE)) for made in (first, *later))


@pytest.fixture
def published(
    nights: tuple[Made, ...],
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Published]:
    """All nights delivered with a publisher's rights; the store is empty before and after."""

    def act_as(identity: tuple[str, str]) -> None:
        for name, value in s3_server.environment(identity).items():
            monkeypatch.setenv(name, value)
        for opened in (store_of, open_workspace):
            opened.cache_clear()

    s3_server.make_bucket("models")
    act_as(ADMIN)
    truth = S3Store("models", "nightrank", s3_client())
    for key in truth.list(""):
        truth.delete(key)
    act_as(PUBLISHER)
    deliver(open_store(URL), nights)
    (tmp_path / "lake").mkdir()
    tree = yaml.safe_load((ROOT / "infra" / "movielens.yaml").read_text())
    told = {"pipeline": PIPELINE, "store": URL, "scratch": str(tmp_path / "scratch")}
    data = {"data": tree["data"] | {"source": str(tmp_path / "lake")}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree | told | data))
    yield Published(tuple(made.manifest for made in nights), truth, tmp_path / "config.yaml", act_as, capsys)
    for key in truth.list(""):
        truth.delete(key)
    act_as(ADMIN)


def test_an_operator_removes_what_nothing_names_and_nothing_else(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_store, "PAGE_KEYS", 7)  # so that every list is of several pages
    before = published.everything()
    releases, gone = published.going(before)
    named = f"2 releases: {', '.join(one[:12] for one in sorted(releases))}, 6 blobs"
    published.act_as(OPERATOR)

    assert f"would be marked {named}" in published.say(*published.gc("--dry-run"))
    assert published.everything() == before
    assert read_marks(published.truth, PIPELINE)[0] == Marks()

    assert f"marked {named}" in published.say(*published.gc())
    assert published.everything() == before
    published.two_days_later()
    assert f"would be removed {named}" in published.say(*published.gc("--dry-run"))
    assert published.everything() == before

    assert f"removed {named}" in published.say(*published.gc())
    assert published.everything() == {key: data for key, data in before.items() if key not in gone}
    assert read_marks(published.truth, PIPELINE)[0] == Marks()
    published.verify()
    said = published.say(*published.gc())
    assert "removed 0 releases, 0 blobs" in said
    assert "marked 0 releases, 0 blobs" in said


def test_a_publisher_may_mark_and_not_remove(published: Published) -> None:
    before = published.everything()
    gone = published.going(before)[1]
    published.act_as(PUBLISHER)
    published.say(*published.gc())
    published.two_days_later()
    marked = read_marks(published.truth, PIPELINE)[0]
    said = published.refused(*published.gc())
    assert said.startswith("StoreUnwritable cannot write tiny/releases/")
    assert "AccessDenied" in said
    assert "the bucket's policy" in said
    assert published.everything() == before
    assert read_marks(published.truth, PIPELINE)[0] == marked
    published.verify()
    published.act_as(OPERATOR)  # to whom the same marks are good
    published.say(*published.gc())
    assert published.everything() == {key: data for key, data in before.items() if key not in gone}


def test_a_ranker_may_neither_mark_nor_look(published: Published) -> None:
    before, lease = published.everything(), published.truth.find(f"{PIPELINE}/lease")
    published.act_as(RANKER)
    for words, key in ((published.gc(), f"{PIPELINE}/lease"), (published.gc("--dry-run"), marks_key(PIPELINE))):
        said = published.refused(*words)
        assert said.startswith(f"StoreError cannot read {key} from {URL}")
        assert "AccessDenied" in said
        assert "the bucket's policy" in said
    assert published.everything() == before
    assert published.truth.find(f"{PIPELINE}/lease") == lease
    assert read_marks(published.truth, PIPELINE)[0] == Marks()


def test_an_operator_looks_moves_the_pointer_and_holds_it(published: Published) -> None:
    published.act_as(OPERATOR)
    assert "writable, honours conditions" in published.say("doctor", "--config", str(published.config))
    where = ("--store", URL, "--pipeline", PIPELINE)
    first, last = published.manifests[0].release, published.manifests[-1].release
    for words in (
        ("rollback", "--to", first, "--hold"),
        ("unhold",),
        ("promote", last),
        ("challenger", first, "--share", "5"),
        ("hold",),
    ):
        published.say("releases", *words, "--reason", "drill", *where)
    pointer = read_pointer(published.truth, PIPELINE)
    assert pointer is not None
    assert (pointer.release, pointer.challenger, pointer.generation) == (last, first, NIGHTS + 5)
    assert len(list(published.truth.list(f"{PIPELINE}/ledger/"))) == NIGHTS + 5
    for words in (("list",), ("show",), ("diff",)):
        assert published.say("releases", *words, *where)


def test_an_operator_s_collection_frees_what_a_dead_publisher_left(
    published: Published, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And is not stopped by an upload that is under way."""
    (tmp_path / "large").write_bytes(b"x" * 6_000_000)
    monkeypatch.setattr(s3_store, "SINGLE_PUT_BYTES", 1000)
    monkeypatch.setattr(s3_multipart, "PART_BYTES", 5 * 2**20)

    class Died(BaseException):
        """The process is gone."""

    def die(*_: Any) -> None:
        raise Died

    published.act_as(PUBLISHER)
    store = open_store(URL)
    with monkeypatch.context() as dying:
        dying.setattr(s3_multipart.Upload, "complete", die)
        with pytest.raises(Died):
            store.put_file_if_absent(blob_key(PIPELINE, "ab" * 32), tmp_path / "large")
    published.truth.put_if_absent(f"{CHECKS}{'0a' * 16}", b"left")

    def parts() -> int:
        return len(published.truth._client.list_multipart_uploads(Bucket="models").get("Uploads", ()))

    def left() -> list[str]:
        return list(published.truth.list(".nightrank"))

    assert (parts(), len(left())) == (1, 2)
    published.act_as(OPERATOR)
    published.say(*published.gc())
    assert (parts(), len(left())) == (1, 2)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
    published.say(*published.gc())
    assert (parts(), left()) == (0, [])


def test_an_operator_writes_no_release(published: Published) -> None:
    before = published.everything()
    published.act_as(OPERATOR)
    store = open_store(URL)
    for key in (blob_key(PIPELINE, "ab" * 32), f"{PIPELINE}/releases/new/manifest.json", f"{PIPELINE}/state/new.json"):
        with pytest.raises(StoreUnwritable, match="AccessDenied"):
            store.put_if_absent(key, b"forged")
    assert published.everything() == before


@pytest.mark.soak
def test_thousands_of_blobs_that_nothing_names_are_removed(published: Published) -> None:
    """More than a page of a list, which is a thousand keys."""
    orphans = [blob_key(PIPELINE, f"{number:064x}") for number in range(2_100)]
    before = published.everything()
    gone = published.going(before)[1]
    for key in orphans:
        published.truth.put_if_absent(key, b"orphan")
    published.act_as(OPERATOR)
    began = time.monotonic()
    assert "marked 2 releases" in published.say(*published.gc())
    published.two_days_later()
    marked = time.monotonic()
    assert ", 2106 blobs" in published.say(*published.gc())
    with published.capsys.disabled():
        print(f"marked in {marked - began:.1f} s, removed in {time.monotonic() - marked:.1f} s")
    assert published.everything() == {key: data for key, data in before.items() if key not in gone}
    published.verify()
