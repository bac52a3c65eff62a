"""Publishes and promotes releases one after the other until somebody kills it: a process for tests of readers.

Each release has the files of one of two that were really exported, and a number in a file that no reader opens, so that
its id is new and its golden requests fit.
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from tasks.clients.object_store import open_store
from tasks.release.manifest import Manifest, content_digest, describe
from tasks.release.pointer import promote
from tasks.release.publishing import publish_release

PIPELINE = "shop"
"""As in `tests.releases`, which loads torch."""


def numbered(made: Path, room: Path, number: int) -> tuple[Path, Manifest]:
    """A folder with the files of a release and a number, and its manifest.

    Args:
        made: folder of a release, with its manifest as `../<its name>.json`.
        room: where the folder is made, anew if it is there.
        number: of the release.
    """
    folder = room / f"{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in made.iterdir():
        (folder / file.name).hardlink_to(file)
    (folder / "base.json").unlink()
    (folder / "base.json").write_text(f'{{"number": {number}}}')
    data = made.with_suffix(".json").read_bytes()
    told = Manifest.parse(data, PIPELINE, made.with_suffix(".id").read_text())
    files = describe(folder)
    return folder, replace(told, release=content_digest(files), files=files)


def main(url: str, made: list[Path], room: Path, first: int, count: int) -> None:
    """Publish and promote the releases with these numbers, and say each number when it is done."""
    store = open_store(url)
    for number in range(first, first + count):
        folder, manifest = numbered(made[number % len(made)], room, number)
        publish_release(store, PIPELINE, folder, manifest, {"run.json": b"{}"})
        promote(store, PIPELINE, manifest.release, manifest.night, token=1, force=True)
        shutil.rmtree(folder)
        print(number, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], [Path(one) for one in sys.argv[2].split(":")], Path(sys.argv[3]), *map(int, sys.argv[4:6]))
