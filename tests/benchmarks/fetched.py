"""What a ranker fetches of a release when it starts, for the night after, and after going back, by variant.

    python -m tests.benchmarks.fetched --store var/releases --pipeline movielens --nights 1998-03-29 1998-03-30

It works on a copy of the store, a directory, whose pointer it moves from the first night's release to the second's and
back, for a new ranker with an empty cache each time. Bytes are those of the blobs, as S3 would send them.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from tasks.clients.object_store import ObjectStore, open_store
from tasks.release.pointer import promote
from tasks.release.published import resolve, stored_manifest
from tasks.serving.ranker import Ranker

VARIANTS = ("fp32", "int8")
"""Those that a CPU serves."""


class Counted:
    """A store that counts what is downloaded."""

    def __init__(self, store: ObjectStore) -> None:
        self._store, self.url = store, store.url
        self.blobs: list[int] = []

    def download(
        self, key: str, path: Path, sha256: str | None = None, between: Callable[[], object] | None = None
    ) -> None:
        """As the store does."""
        self._store.download(key, path, sha256, between)
        self.blobs.append(path.stat().st_size)

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def told(self) -> str:
        """What was downloaded since this was asked last."""
        found, self.blobs = self.blobs, []
        return f"{sum(found):,} bytes in {len(found)} files"


def main() -> None:
    """Measure, and print."""
    options = argparse.ArgumentParser()
    options.add_argument("--store", type=Path, required=True, help="a directory; it stays as it is")
    options.add_argument("--pipeline", required=True)
    options.add_argument("--nights", nargs=2, required=True, help="two that were released, the earlier one first")
    asked = options.parse_args()
    with tempfile.TemporaryDirectory() as room:
        for part in ("releases", "blobs", "state/released"):
            shutil.copytree(asked.store / asked.pipeline / part, Path(room) / "store" / asked.pipeline / part)
        store = open_store(str(Path(room) / "store"))
        made = [stored_manifest(store, asked.pipeline, resolve(store, asked.pipeline, one)) for one in asked.nights]
        for manifest in made:
            print(f"{manifest.night}: manifest of version {manifest.schema_version}, {manifest.size:,} bytes in "
                  f"{len(manifest.files)} files")  # fmt: skip
        for variant in VARIANTS:
            counted, told = Counted(store), []
            promote(store, asked.pipeline, made[0].release, made[0].night, token=1, force=True)
            cache = Path(room) / f"cache-{variant}"
            with Ranker(counted, asked.pipeline, "cpu", cache, variant=variant) as ranker:  # type: ignore[arg-type]
                told.append(f"starts with {counted.told()}")
                for manifest, what in ((made[1], "the night after"), (made[0], "going back")):
                    promote(store, asked.pipeline, manifest.release, manifest.night, token=1, force=True)
                    ranker.refresh()
                    if (ranker.release, ranker.variant) != (manifest.release, variant):
                        raise SystemExit(f"{variant} does not serve {manifest.night}: {ranker.warnings}")
                    told.append(f"{what} {counted.told()}")
            print(f"{variant}: " + "; ".join(told))


if __name__ == "__main__":
    main()
