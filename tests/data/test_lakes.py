"""Where nights lie, in one lake and in several that are read as one."""

import re
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.data.contract import DataConfig, LakeConfig
from tasks.data.interactions import freeze, thaw
from tasks.data.lakes import Joined, lake_of, listing, nights, nights_by_lake, why_absent
from tasks.errors import NightMissing, SchemaBroken
from tests.data.nights import NIGHT, SCHEMA, Folder, contract, row, write

PART = f"night={NIGHT}"


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    write(tmp_path / "lake" / PART / "part 0.parquet", [row(number) for number in range(5)])
    return tmp_path / "lake"


def test_the_nights_of_a_source_are_listed_in_order(lake: Path) -> None:
    for name in (
        "night=2026-01-02/0.parquet",
        "night=2026-02-31/0.parquet",
        "night=2026-01-03/_SUCCESS",
        "other/0.parquet",
    ):
        (lake / name).parent.mkdir(parents=True, exist_ok=True)
        (lake / name).write_bytes(b"x")
    assert nights(contract(), Folder(lake)) == (date(2026, 1, 2), NIGHT)


def test_nights_lie_where_the_partition_says(tmp_path: Path) -> None:
    write(tmp_path / "a" / "dt-2026-03-10-v1" / "0.parquet", [row(1)])
    data = contract(partition="a/dt-{night}-v1")
    assert nights(data, Folder(tmp_path)) == (NIGHT,)
    assert freeze(data, NIGHT, tmp_path / "scratch", Folder(tmp_path)).rows == 1


# Several lakes


def of_lakes(*lakes: LakeConfig) -> DataConfig:
    columns = tuple(column.model_copy(update={"allowed": None}) for column in contract().columns)
    return contract(source="", columns=columns, lakes=lakes, lake_column="plan", own_keys=("item",))


def deliver(root: Path, lake: str, night: date, count: int = 2, folder: str = "night={}") -> None:
    rows = [row(number) for number in range(count)]
    schema = pa.schema([field for field in SCHEMA if field.name != "plan"])
    write(root / lake / folder.format(night) / "0.parquet", [{**one, "plan": None} for one in rows], schema)


def joined(root: Path, *names: str) -> Joined:
    return Joined({name: Folder(root / name) for name in names})


FIRST, SECOND, THIRD = (NIGHT + timedelta(days=day) for day in range(3))


@pytest.fixture
def lakes(tmp_path: Path) -> Path:
    """Books have every night, films begin on the second, and toys come when they like, on nights of another name."""
    for night in (FIRST, SECOND, THIRD):
        deliver(tmp_path, "books", night)
    deliver(tmp_path, "films", SECOND)
    deliver(tmp_path, "toys", THIRD, folder="of/{}/all")
    return tmp_path


BOOKS, FILMS = LakeConfig(name="books", source="b"), LakeConfig(name="films", source="f", first_night=SECOND)
AGAIN = LakeConfig(name="again", source="b/")
FREE = LakeConfig(name="free", source="x")
TOYS = LakeConfig(name="toys", source="t", partition="of/{night}/all", optional=True)


def test_a_night_is_there_when_every_lake_that_it_needs_is(lakes: Path) -> None:
    source = joined(lakes, "books", "films", "toys")
    assert nights(of_lakes(BOOKS, FILMS), source) == (FIRST, SECOND)
    assert nights(of_lakes(BOOKS), source) == (FIRST, SECOND, THIRD)
    assert nights(of_lakes(FILMS, TOYS), source) == (SECOND,)
    assert nights(of_lakes(TOYS), source) == (THIRD,)
    assert nights(of_lakes(BOOKS, TOYS), source) == (FIRST, SECOND, THIRD)


def test_why_a_night_is_not_there_is_told_by_lake(lakes: Path) -> None:
    data = of_lakes(BOOKS, FILMS, TOYS)
    found = nights_by_lake(data, joined(lakes, "books", "films", "toys"))
    assert {name: sorted(own) for name, own in found.items()} == {
        "books": [FIRST, SECOND, THIRD], "films": [SECOND], "toys": [THIRD],
    }  # fmt: skip
    assert [why_absent(data, found, night) for night in (FIRST, SECOND, THIRD)] == ["", "", "nothing of films"]
    assert why_absent(data, found, THIRD + timedelta(days=1)) == "the lakes have no such night"
    assert why_absent(contract(), {"lake": [FIRST]}, SECOND) == "the lake has no such night"


def test_the_files_of_a_night_are_those_of_its_lakes(lakes: Path, tmp_path: Path) -> None:
    source, data = joined(lakes, "books", "films", "toys"), of_lakes(BOOKS, FILMS, TOYS)
    frozen = freeze(data, SECOND, tmp_path / "scratch", source)
    paths = [f"books/night={SECOND}/0.parquet", f"films/night={SECOND}/0.parquet"]
    assert [file.path for file in frozen.files] == paths == list(listing(data, SECOND, source))
    assert [lake_of(data, file.path) for file in frozen.files] == ["books", "films"]
    assert len({file.sha256 for file in frozen.files}) == 1
    copies = thaw(frozen, data, tmp_path / "scratch", source)
    assert [pq.read_metadata(copy).num_rows for copy in copies] == [2, 2]
    (copies[0]).unlink()
    assert thaw(frozen, data, tmp_path / "scratch", source) == copies
    assert list(listing(of_lakes(BOOKS, TOYS), THIRD, source))[-1] == f"toys/of/{THIRD}/all/0.parquet"


def test_which_lake_a_file_is_of_is_part_of_the_digest(lakes: Path, tmp_path: Path) -> None:
    source = joined(lakes, "books", "films")
    digests = [freeze(of_lakes(one), SECOND, tmp_path, source).digest for one in (BOOKS, FILMS)]
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    ("chosen", "night", "told"),
    [
        ((BOOKS, FILMS), THIRD, r"films: f/night=2026-.*holds no files of films"),
        ((TOYS, FILMS), FIRST, "holds no files of toys"),
        ((FILMS,), FIRST, f"holds no files of any lake: the first begins on {SECOND}"),
    ],
)
def test_a_night_that_lacks_a_lake_is_missing(
    lakes: Path, tmp_path: Path, chosen: tuple[LakeConfig, ...], night: date, told: str
) -> None:
    with pytest.raises(NightMissing, match=told):
        freeze(of_lakes(*chosen), night, tmp_path, joined(lakes, "books", "films", "toys"))


def test_a_lake_without_rows_is_missing_and_one_that_says_the_lake_itself_is_refused(
    lakes: Path, tmp_path: Path
) -> None:
    source, data = joined(lakes, "books", "films"), of_lakes(BOOKS, FILMS)
    deliver(lakes, "films", THIRD, count=0)
    with pytest.raises(NightMissing, match=r"2 file\(s\) hold 0 rows of films"):
        freeze(data, THIRD, tmp_path, source)
    write(lakes / "films" / f"night={THIRD}" / "0.parquet", [row(0)])
    with pytest.raises(SchemaBroken, match="column 'plan' is filled with the lake's name, and no file may have it"):
        freeze(data, THIRD, tmp_path, source)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"source": ""}, "source is missing: name the lake's directory"),
        ({"lake_column": "plan"}, "there are no lakes: remove them"),
        ({"lakes": (BOOKS,), "source": "x", "lake_column": "plan"}, "source and partition speak of a single lake"),
        ({"lakes": (BOOKS,), "source": ""}, "lakes need lake_column"),
        ({"lakes": (BOOKS, BOOKS), "source": "", "lake_column": "plan"}, "lakes are named twice: books"),
        ({"lakes": (BOOKS, AGAIN), "source": "", "lake_column": "plan"}, "lakes have the same source and partition"),
        ({"lakes": (FREE,), "source": "", "lake_column": "plan", "own_keys": ("item", "item")}, "a column twice"),
        ({"lakes": (BOOKS,), "source": "", "lake_column": "age"}, "lake_column: 'age' is no string column"),
        ({"lakes": (BOOKS,), "source": "", "lake_column": "cinema"}, "lake_column: 'cinema' is no string column"),
        ({"lakes": (BOOKS,), "source": "", "lake_column": "plan"}, "books is not among the allowed values of 'plan'"),
        ({"lakes": (FREE,), "source": "", "lake_column": "plan", "own_keys": ("user",)}, "own_keys: 'user' is no str"),
        ({"lakes": (FREE,), "source": "", "lake_column": "plan", "own_keys": ("plan",)}, "'plan' has allowed values"),
    ],
)
def test_lakes_that_cannot_be_told_apart_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        contract(**changes)
