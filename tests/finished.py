"""Two nights of the tiny world that have been run: the good release that bad input must leave in place.

Made once per test session, however many workers there are; a test that changes anything works on a copy.
"""

import pickle
import shutil
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from flows.config import RetrainConfig
from flows.nightly import NightResult
from tasks.clients.object_store import ObjectStore, open_store
from tasks.release.manifest import Pointer
from tasks.release.pointer import read_pointer
from tests.shared import made_once
from tests.steps.plain import plain_night
from tests.world import LATE_NIGHT, World, write_world

DONE = (LATE_NIGHT - 1, LATE_NIGHT)
"""The nights that are done, counted from 0; the second has a row in quarantine."""
FEEDBACK = 3
"""Rows of feedback that requests may bring to the nights with feedback."""


@dataclass(frozen=True)
class Finished:
    """A world and what was made of it."""

    world: World
    results: tuple[NightResult, ...]

    @property
    def config(self) -> RetrainConfig:
        return RetrainConfig.model_validate(self.world.config)

    @property
    def next_night(self) -> date:
        """The night after those that are done."""
        return self.world.nights[LATE_NIGHT + 1]

    @property
    def store(self) -> ObjectStore:
        return open_store(self.world.config["store"])

    @property
    def pointer(self) -> Pointer:
        found = read_pointer(self.store, self.world.config["pipeline"])
        assert found is not None
        return found

    def files_of(self, night: date) -> list[Path]:
        """The files of a night of the lake."""
        return sorted((Path(self.world.config["data"]["source"]) / f"night={night}").iterdir())

    def published(self) -> dict[str, bytes]:
        """Everything that a reader of releases can see, by key."""
        parts = (f"tiny/{part}" for part in ("blobs/", "releases/", "current.json", "ledger/"))
        return {key: self.store.get(key).data for part in parts for key in self.store.list(part)}

    def copy(self, folder: Path) -> "Finished":
        """The same in another folder, to do damage to."""
        original = Path(self.world.config["store"]).parent
        shutil.copytree(original, folder, dirs_exist_ok=True)
        tree = self.world.config
        places = {"store": str(folder / "store"), "scratch": str(folder / "scratch")}
        changed: dict[str, Any] = {**tree, **places, "data": {**tree["data"], "source": str(folder / "lake")}}
        return replace(self, world=replace(self.world, config=changed))


def fed_nights(factory: pytest.TempPathFactory, finished: Finished) -> Finished:
    """The same, and the last of them done anew with feedback."""

    def make(folder: Path) -> None:
        world = finished.copy(folder / "world")
        config = world.world.config | {"export": {"feedback": FEEDBACK}}
        world = replace(world, world=replace(world.world, config=config))
        done = replace(world, results=(*world.results, plain_night(world.config, world.results[-1].night)))
        (folder / "finished.pickle").write_bytes(pickle.dumps(done))

    found: Finished = pickle.loads((made_once(factory, "fed", make) / "finished.pickle").read_bytes())
    return found


def finished_nights(factory: pytest.TempPathFactory) -> Finished:
    """The nights, run by the first worker that asks."""

    def make(folder: Path) -> None:
        world = write_world(folder, nights=8)
        config = RetrainConfig.model_validate(world.config)
        done = Finished(world, tuple(plain_night(config, world.nights[number]) for number in DONE))
        (folder / "finished.pickle").write_bytes(pickle.dumps(done))

    found: Finished = pickle.loads((made_once(factory, "finished", make) / "finished.pickle").read_bytes())
    return found
