"""A whole night with lake and store in S3 is the night of a directory, to the byte; least privilege is enough for it.

The night runs with the rights of `infra/policies/publisher.json`, the ranker with those of `reader.json`.
"""

from pathlib import Path

import pytest

from flows.config import RetrainConfig
from tasks.clients.object_store import open_store
from tasks.release.pointer import read_pointer
from tasks.serving.ranker import Ranker
from tests.finished import Finished
from tests.s3_server import PUBLISHER, RANKER, S3Server
from tests.steps.plain import plain_night


def test_lake_and_store_in_s3_give_the_release_that_directories_give_with_least_privilege(
    finished: Finished, tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act_as(*identity: tuple[str, str]) -> None:
        for name, value in s3_server.environment(*identity).items():
            monkeypatch.setenv(name, value)

    for bucket in ("lake", "models"):
        s3_server.make_bucket(bucket)
    act_as()
    local = finished.results[0]
    lake, tree = open_store("s3://lake/interactions"), finished.world.config
    source = Path(tree["data"]["source"])
    for file in sorted(source.rglob("*.parquet")):
        if file.parent.name <= f"night={local.night}":
            assert lake.put_file_if_absent(file.relative_to(source).as_posix(), file)
    places = {"store": "s3://models/nightrank", "scratch": str(tmp_path / "elsewhere")}
    config = RetrainConfig.model_validate(tree | places | {"data": tree["data"] | {"source": "s3://lake/interactions"}})
    store = open_store(config.store)
    traced = sorted(finished.store.list(f"{config.pipeline}/work/graph/"))  # to trace the same again is not the point
    assert traced
    for key in traced:
        assert store.put_if_absent(key, finished.store.get(key).data)

    act_as(PUBLISHER)
    remote = plain_night(config, local.night)

    assert remote.published.release == local.published.release
    assert [step.digest for step in remote.steps[:-1]] == [step.digest for step in local.steps[:-1]]
    assert sorted(store.list(f"{config.pipeline}/work/graph/")) == traced
    pointer = read_pointer(store, config.pipeline)
    assert pointer is not None
    assert (pointer.release, pointer.generation) == (local.published.release, 1)
    act_as(RANKER)
    with Ranker(config.store, config.pipeline, device="cpu") as ranker:
        assert ranker.release == local.published.release
