"""A whole night with lake and store in S3 is the night of a directory, to the byte."""

from pathlib import Path

import pytest

from flows.config import RetrainConfig
from tasks.clients.object_store import open_store
from tasks.release.pointer import read_pointer
from tasks.serving.ranker import Ranker
from tests.finished import Finished
from tests.s3_server import S3Server
from tests.steps.plain import plain_night


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    s3_server.make_bucket("nights")
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return "s3://nights"


def test_lake_and_store_in_s3_give_the_release_that_directories_give(
    finished: Finished, tmp_path: Path, bucket: str
) -> None:
    local = finished.results[0]
    lake, tree = open_store(f"{bucket}/lake"), finished.world.config
    source = Path(tree["data"]["source"])
    for file in sorted(source.rglob("*.parquet")):
        if file.parent.name <= f"night={local.night}":
            assert lake.put_file_if_absent(file.relative_to(source).as_posix(), file)
    places = {"store": f"{bucket}/store", "scratch": str(tmp_path / "elsewhere")}
    config = RetrainConfig.model_validate(tree | places | {"data": tree["data"] | {"source": f"{bucket}/lake"}})
    store = open_store(config.store)
    traced = sorted(finished.store.list(f"{config.pipeline}/work/graph/"))  # to trace the same again is not the point
    assert traced
    for key in traced:
        assert store.put_if_absent(key, finished.store.get(key).data)

    remote = plain_night(config, local.night)

    assert remote.published.release == local.published.release
    assert [step.digest for step in remote.steps[:-1]] == [step.digest for step in local.steps[:-1]]
    assert sorted(store.list(f"{config.pipeline}/work/graph/")) == traced
    pointer = read_pointer(store, config.pipeline)
    assert pointer is not None
    assert (pointer.release, pointer.generation) == (local.published.release, 1)
    with Ranker(config.store, config.pipeline, device="cpu") as ranker:
        assert ranker.release == local.published.release
