"""Equal inputs give equal bytes: in another folder, another process, and however the lake's files are cut and named."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.config import RetrainConfig
from tasks.clients.workspace import Workspace
from tasks.steps import open_workspace
from tests.steps.plain import plain_night
from tests.world import World, write_world

ROOT = Path(__file__).resolve().parents[2]
FROM_ROWS = ("validate", "prepare", "meta-train", "adapt-exam", "evaluate", "adapt-ship", "export")
OF_THE_NIGHT = (*FROM_ROWS, "judge", "publish")
OF_EACH = (*FROM_ROWS, "statistics", "history")


def small(folder: Path, nights: int) -> World:
    world = write_world(folder, nights=nights, users=18)
    world.config["training"] |= {"epochs": 1, "steps_per_epoch": 3, "min_stop_rows": 20}
    world.config["baselines"] = {"sweeps": 2}
    return world


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

    def start(self, night: date) -> "subprocess.Popen[str]":
        """Begin a night in a process of its own, in another working directory and with other hashes of strings."""
        (self.folder / "cwd").mkdir(exist_ok=True)
        (self.folder / "config.json").write_text(json.dumps(self.config))
        environment = {**os.environ, "PYTHONHASHSEED": "4242", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [
                *(sys.executable, "-W", "ignore", "-m", "tests.steps.plain", str(self.folder / "config.json")),
                *(night.isoformat(), str(self.folder / f"{night.isoformat()}.json")),
            ],
            cwd=self.folder / "cwd",
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def told(self, night: date) -> dict[str, Any]:
        return dict(json.loads((self.folder / f"{night.isoformat()}.json").read_text()))

    def workspace(self) -> Workspace:
        return open_workspace(RetrainConfig.model_validate(self.config).place())

    def contents(self, step: str) -> list[dict[str, Any]]:
        """Content of every record of a step, in order of the nights that they were made for."""
        records = sorted(self.workspace().records(step), key=lambda one: str(one.notes["made_from"]["for night"]))
        return [record.content for record in records]


def two_places(folder: Path, nights: int) -> tuple[Somewhere, Somewhere, World]:
    world = small(folder / "one", nights)
    other = folder / "two with blanks" / "deeper"
    shutil.copytree(folder / "one" / "lake", other / "lake")
    cut_and_renamed(other / "lake")
    config = json.loads(json.dumps(world.config))
    config |= {"store": "store", "scratch": "../scratch"}  # relative to the working directory
    config["data"] |= {"source": str(other / "lake")}
    return Somewhere(folder / "one", world.config), Somewhere(other, config), world


def together(here: Somewhere, there: Somewhere, nights: Sequence[date]) -> None:
    """Carry nights out in order, in this process and in others at once."""
    for night in nights:
        process = there.start(night)
        made = plain_night(RetrainConfig.model_validate(here.config), night)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said[-3000:]
        told = {"release": made.published.release, "digests": {step.step: step.digest for step in made.steps}}
        (here.folder / f"{night.isoformat()}.json").write_text(json.dumps(told))


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
        contents = one.contents(step)
        assert contents
        assert contents == there.contents(step), step


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Somewhere, Somewhere, World]:
    one, other, world = two_places(tmp_path_factory.mktemp("determinism"), nights=4)
    together(one, other, world.nights[3:])
    return one, other, world


def test_another_folder_process_working_directory_and_cut_of_the_files_give_the_same_bytes(
    places: tuple[Somewhere, Somewhere, World],
) -> None:
    one, other, world = places
    assert_equal_nights(one, other, world.nights[3:])


def test_another_setting_of_the_baselines_leaves_the_release_as_it_is(
    places: tuple[Somewhere, Somewhere, World],
) -> None:
    one, _, world = places
    night = world.nights[3]
    before = one.told(night)
    changed = RetrainConfig.model_validate({**one.config, "baselines": {"sweeps": 3, "offset_strength": 9.0}})
    after = plain_night(changed, night)
    reused = {step.step: step.reused for step in after.steps}
    assert [step for step, again in reused.items() if not again] == ["evaluate", "judge", "publish"]
    # Nothing was decided otherwise about a segment, so what is shipped is what was shipped.
    records = {record.key: record for record in one.workspace().records("evaluate")}
    assert len(records) == 2
    assert len({json.dumps(record.content["harmful"]) for record in records.values()}) == 1
    assert after.published.release == before["release"]
    assert [path.name for path in Path(one.config["store"]).glob("tiny/releases/*")] == [before["release"]]


@pytest.mark.soak
def test_three_nights_that_descend_from_each_other_give_the_same_bytes(tmp_path: Path) -> None:
    one, other, world = two_places(tmp_path, nights=6)
    together(one, other, world.nights[3:])
    assert_equal_nights(one, other, world.nights[3:])
