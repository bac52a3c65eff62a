"""How long a rollback takes: the command, and until a warm ranker serves the release before, with what it asks for.

    python -m tests.benchmarks.rollback [--times 20] [--poll 1.0]

Two small releases in a directory; a ranker in this process polls every `--poll` seconds; each rollback is the command
line in a process of its own. Beside it the same ranker with an empty cache, which has to fetch.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from tasks.clients.directory_store import DirectoryStore
from tasks.clients.object_store import open_store
from tasks.release.moves import rollback
from tasks.release.pointer import promote, read_pointer
from tasks.release.publishing import publish_release
from tasks.serving.ranker import Ranker
from tests.releases import NIGHT, PIPELINE, make_graph, make_release, next_night

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Reads of directory stores in this process, by what is read."""
    found: Counter[str] = Counter()
    calls = {name: getattr(DirectoryStore, name) for name in ("find", "get", "size", "_stream")}

    def watch(name: str) -> None:
        def watched(self: DirectoryStore, key: str, *most: int | None) -> object:
            found["blob" if "/blobs/" in key else key.rsplit("/", 1)[-1]] += 1
            return calls[name](self, key, *most)

        setattr(DirectoryStore, name, watched)

    for name in calls:
        watch(name)
    try:
        yield found
    finally:
        for name, call in calls.items():
            setattr(DirectoryStore, name, call)


def command(store: str) -> float:
    """Seconds of `nightrank releases rollback` in a process of its own."""
    words = ["releases", "rollback", "--store", store, "--pipeline", PIPELINE, "--reason", "measured"]
    code = "import sys; from flows.cli import main; main(sys.argv[1:])"
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - begun


def shown(what: str, seconds: list[float]) -> None:
    """Print a line."""
    ordered = sorted(seconds)
    print(f"{what}: median {statistics.median(ordered):.3f} s, longest {ordered[-1]:.3f} s, {len(ordered)} times")


def main() -> None:
    """Measure, and print."""
    options = argparse.ArgumentParser()
    options.add_argument("--times", type=int, default=20)
    options.add_argument("--poll", type=float, default=1.0)
    asked = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "store").mkdir()
        store = open_store(str(root / "store"))
        first = make_release(root / "first", make_graph("full"))
        second = next_night(first, root / "second", NIGHT + timedelta(days=1))
        for token, made in enumerate((first, second), start=1):
            publish_release(store, PIPELINE, made.folder, made.manifest, {})
            promote(store, PIPELINE, made.manifest.release, made.manifest.night, token=token)
        moves, commands, back, reads = [], [], [], Counter[str]()
        with Ranker(store.url, PIPELINE, cache=root / "cache", refresh_every=asked.poll) as ranker:
            time.sleep(3 * asked.poll)  # its thread has fetched the release before by then
            for _ in range(asked.times):
                with counted() as found:
                    commands.append(command(store.url))
                    moved = time.perf_counter()
                    pointer = read_pointer(store, PIPELINE)
                    assert pointer is not None
                    while ranker.release != pointer.release:
                        time.sleep(0.005)
                    back.append(time.perf_counter() - moved)
                    reads += found
            for _ in range(asked.times):
                begun = time.perf_counter()
                rollback(store, PIPELINE, None, "measured")
                moves.append(time.perf_counter() - begun)
        shown("the move itself", moves)
        shown("the command, with Python's start", commands)
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"of which a processor worked {(spent.ru_utime + spent.ru_stime) / asked.times:.3f} s on average")
        shown(f"a warm ranker that polls every {asked.poll:g} s, from the command's end", back)
        print("it read:", dict(reads), "over all rollbacks; blobs:", reads["blob"])
        fresh = []
        for number in range(5):
            begun = time.perf_counter()
            Ranker(store.url, PIPELINE, cache=root / f"cold-{number}").close()
            fresh.append(time.perf_counter() - begun)
        shown("beside it, a ranker that starts with an empty cache", fresh)


if __name__ == "__main__":
    main()
