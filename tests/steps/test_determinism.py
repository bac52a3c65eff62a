"""Equal inputs give equal bytes: in another folder, another process, and however the lake's files are cut and named."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.config import RetrainConfig
from flows.nightly import NightResult
from tasks.clients.workspace import StepRecord, Workspace
from tasks.steps import open_workspace
from tests.faults.victims import Nursery
from tests.finished import Finished
from tests.steps.plain import plain_night
from tests.world import write_world

FROM_ROWS = ("validate", "prepare", "meta-train", "adapt-exam", "evaluate", "adapt-ship", "export")
OF_THE_NIGHT = (*FROM_ROWS, "judge", "publish")
OF_EACH = (*FROM_ROWS, "statistics", "history")


def cut_and_renamed(lake: Path) -> None:
    """The same rows in other files: one of one row, one of the rest backwards, and an empty one."""
    for partition in lake.iterdir():
        files = sorted(partition.glob("*.parquet"))
        table = pa.concat_tables([pq.read_table(file) for file in files])
        for file in files:
            file.unlink()
        backwards = table.take(list(range(table.num_rows - 1, 0, -1)))
        pq.write_table(backwards, partition / "a b=c.parquet", compression="zstd")
        pq.write_table(table.slice(0, 1), partition / "z.parquet", compression="none")
        pq.write_table(table.slice(0, 0), partition / "m.parquet")


@dataclass(frozen=True)
class Somewhere:
    """A place where nights are carried out, from nothing."""

    folder: Path
    config: dict[str, Any]

    def carry_out(self, nursery: Nursery, night: date) -> None:
        """Run a night in a process of its own, in another working directory and with other hashes of strings."""
        (self.folder / "cwd").mkdir(exist_ok=True)
        ended = nursery.run(self.config, night, folder=self.folder / "cwd")
        told = {name: ended.result[name] for name in ("release", "digests")}
        (self.folder / f"{night.isoformat()}.json").write_text(json.dumps(told))

    def keep(self, made: NightResult) -> None:
        """Keep what a night of this process told."""
        told = {"release": made.published.release, "digests": {step.step: step.digest for step in made.steps}}
        (self.folder / f"{made.night.isoformat()}.json").write_text(json.dumps(told))

    def told(self, night: date) -> dict[str, Any]:
        return dict(json.loads((self.folder / f"{night.isoformat()}.json").read_text()))

    def workspace(self) -> Workspace:
        return open_workspace(RetrainConfig.model_validate(self.config).place())

    def contents(self, step: str, through: date) -> list[dict[str, Any]]:
        """Content of every record of a step up to a night, in order of the nights that they were made for."""
        records = [record for record in self.workspace().records(step) if night_of(record) <= through.isoformat()]
        return [record.content for record in sorted(records, key=night_of)]


def night_of(record: StepRecord) -> str:
    """The night that a record was made for."""
    return str(record.notes["made_from"]["for night"])


def elsewhere(config: dict[str, Any], folder: Path) -> Somewhere:
    """Another place for the same nights, with other files of the same rows."""
    other = folder / "two with blanks" / "deeper"
    shutil.copytree(config["data"]["source"], other / "lake")
    cut_and_renamed(other / "lake")
    # Relative to the working directory.
    places = {"store": "store", "scratch": "../scratch"}
    return Somewhere(other, {**config, **places, "data": {**config["data"], "source": str(other / "lake")}})


def assert_equal_nights(one: Somewhere, other: Somewhere, nights: Sequence[date]) -> None:
    there = Somewhere(
        other.folder,
        {**other.config, "store": str(other.folder / "cwd" / "store"), "scratch": str(other.folder / "scratch")},
    )
    for night in nights:
        mine, theirs = one.told(night), there.told(night)
        assert mine["release"] == theirs["release"]
        assert {step: mine["digests"][step] for step in OF_THE_NIGHT} == {
            step: theirs["digests"][step] for step in OF_THE_NIGHT
        }
        # Ingest is about the files themselves, and they are not the same.
        assert mine["digests"]["ingest"] != theirs["digests"]["ingest"]
    for step in OF_EACH:
        contents = one.contents(step, nights[-1])
        assert contents
        assert contents == there.contents(step, nights[-1]), step


def test_another_folder_process_working_directory_and_cut_of_the_files_give_the_same_bytes(
    finished: Finished, nursery: Nursery, tmp_path: Path
) -> None:
    made = finished.results[0]
    one, other = Somewhere(tmp_path, finished.world.config), elsewhere(finished.world.config, tmp_path)
    one.keep(made)
    other.carry_out(nursery, made.night)
    assert_equal_nights(one, other, [made.night])


def test_another_setting_of_the_baselines_leaves_the_release_as_it_is(damageable: Finished) -> None:
    before = damageable.results[-1]
    baselines = {"sweeps": 3, "offset_strength": 9.0}
    changed = RetrainConfig.model_validate({**damageable.world.config, "baselines": baselines})
    after = plain_night(changed, before.night)
    reused = {step.step: step.reused for step in after.steps}
    assert [step for step, again in reused.items() if not again] == ["evaluate", "recommend", "judge", "publish"]
    # Nothing was decided otherwise about a segment, so what is shipped is what was shipped.
    every = open_workspace(changed.place()).records("evaluate")
    records = [record for record in every if night_of(record) == before.night.isoformat()]
    assert len(records) == 2
    assert len({json.dumps(record.content["harmful"]) for record in records}) == 1
    assert after.published.release == before.published.release
    released = {path.name for path in Path(changed.store).glob("tiny/releases/*")}
    assert released == {made.published.release for made in damageable.results}


@pytest.mark.soak
def test_three_nights_that_descend_from_each_other_give_the_same_bytes(nursery: Nursery, tmp_path: Path) -> None:
    world = write_world(tmp_path / "one", nights=6, users=18)
    world.config["training"] |= {"epochs": 1, "steps_per_epoch": 3, "min_stop_rows": 20}
    world.config["baselines"] = {"sweeps": 2}
    one, other = Somewhere(tmp_path / "one", world.config), elsewhere(world.config, tmp_path)
    for night in world.nights[3:]:
        one.keep(plain_night(RetrainConfig.model_validate(one.config), night))
        other.carry_out(nursery, night)
    assert_equal_nights(one, other, world.nights[3:])
