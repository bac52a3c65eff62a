from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.data.interactions import freeze, thaw
from tasks.errors import CorruptFile, NightChanged, NightMissing, SchemaBroken
from tests.data.nights import NIGHT, SCHEMA, Folder, contract, row, table, write

PART = f"night={NIGHT}"


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    write(tmp_path / "lake" / PART / "part 0.parquet", [row(number) for number in range(5)])
    write(tmp_path / "lake" / PART / "sub" / "part-1.parquet", [row(number) for number in range(5, 8)])
    return tmp_path / "lake"


def test_a_frozen_night_names_its_files_rows_and_digests(lake: Path, tmp_path: Path) -> None:
    frozen = freeze(contract(), NIGHT, tmp_path / "scratch", Folder(lake))
    assert [file.path for file in frozen.files] == [f"{PART}/part 0.parquet", f"{PART}/sub/part-1.parquet"]
    assert [file.rows for file in frozen.files] == [5, 3]
    assert frozen.rows == 8
    for file in frozen.files:
        copy = tmp_path / "scratch" / "frozen" / f"{file.sha256}.parquet"
        assert copy.read_bytes() == (lake / file.path).read_bytes()
        assert file.bytes == copy.stat().st_size


def test_the_digest_does_not_depend_on_file_names(lake: Path, tmp_path: Path) -> None:
    before = freeze(contract(), NIGHT, tmp_path / "a", Folder(lake))
    (lake / PART / "part 0.parquet").rename(lake / PART / "z.parquet")
    after = freeze(contract(), NIGHT, tmp_path / "b", Folder(lake))
    assert [file.path for file in after.files] != [file.path for file in before.files]
    assert after.digest == before.digest


def test_the_digest_depends_on_content(lake: Path, tmp_path: Path) -> None:
    before = freeze(contract(), NIGHT, tmp_path / "a", Folder(lake))
    write(lake / PART / "part 0.parquet", [row(number, age=99) for number in range(5)])
    assert freeze(contract(), NIGHT, tmp_path / "a", Folder(lake)).digest != before.digest


def test_markers_and_hidden_files_are_no_part_of_a_night(lake: Path, tmp_path: Path) -> None:
    before = freeze(contract(), NIGHT, tmp_path / "a", Folder(lake))
    for name in ("_SUCCESS", ".part-0.parquet.crc", "_temporary/0.parquet"):
        (lake / PART / name).parent.mkdir(exist_ok=True)
        (lake / PART / name).write_bytes(b"x")
    assert freeze(contract(), NIGHT, tmp_path / "a", Folder(lake)) == before


def test_an_absent_night_is_missing(lake: Path, tmp_path: Path) -> None:
    with pytest.raises(NightMissing, match=r"night 2026-03-11 \(lake/night=2026-03-11/\) holds no files"):
        freeze(contract(), date(2026, 3, 11), tmp_path, Folder(lake))


def test_a_night_without_rows_is_missing(tmp_path: Path) -> None:
    write(tmp_path / "lake" / PART / "0.parquet", [])
    with pytest.raises(NightMissing, match=r"1 file\(s\) hold 0 rows"):
        freeze(contract(), NIGHT, tmp_path, Folder(tmp_path / "lake"))


class Restless(Folder):
    """A folder in which something happens after the first download."""

    def __init__(self, root: Path, happens: str) -> None:
        super().__init__(root)
        self.happens = happens

    def download(self, key: str, path: Path) -> None:
        super().download(key, path)
        happens, self.happens = self.happens, ""
        night = self.root / PART
        if happens == "appears":
            write(night / "late.parquet", [row(100)])
        elif happens == "vanishes":
            (night / "sub" / "part-1.parquet").unlink()
        elif happens == "vanishes once copied":
            (self.root / key).unlink()
        elif happens == "grows":
            write(self.root / key, [row(number) for number in range(500)])


@pytest.mark.parametrize(
    ("happens", "told"),
    [
        ("appears", "late.parquet appeared"),
        ("vanishes", "sub/part-1.parquet vanished"),
        ("vanishes once copied", "part 0.parquet vanished"),
        ("grows", "part 0.parquet now has"),
    ],
)
def test_a_night_that_changes_while_it_is_copied_is_refused(
    lake: Path, tmp_path: Path, happens: str, told: str
) -> None:
    with pytest.raises(NightChanged, match=told):
        freeze(contract(), NIGHT, tmp_path, Restless(lake, happens))
    assert not list((tmp_path / "frozen").glob(".incoming*"))


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "headless"])
def test_a_file_that_is_not_whole_parquet_is_corrupt(lake: Path, tmp_path: Path, damage: str) -> None:
    path = lake / PART / "part 0.parquet"
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[:-40], "empty": b"", "text": b"user,item\n1,2\n", "headless": whole[-8:]}[damage]
    )
    with pytest.raises(
        CorruptFile, match=r"part 0.parquet \(\d+ bytes\) is not readable Parquet.*deliver the file again"
    ):
        freeze(contract(), NIGHT, tmp_path, Folder(lake))


def test_every_difference_from_the_contract_is_named_at_once(lake: Path, tmp_path: Path) -> None:
    rows = table([row(1)])
    broken = rows.drop_columns(["age"]).append_column("extra", pa.array([1]))
    broken = broken.set_column(0, "user", pa.array(["1"]))
    broken = broken.set_column(broken.column_names.index("rating"), "rating", pa.array([3]))
    pq.write_table(broken, lake / PART / "part 0.parquet")
    with pytest.raises(SchemaBroken) as caught:
        freeze(contract(), NIGHT, tmp_path, Folder(lake))
    for told in (
        "column 'age' is absent",
        "column 'extra' is not in the contract",
        "column 'user' is string, the contract says int64",
        "column 'rating' is int64, the contract says float64",
        "in 1 of 2 file(s), first night=2026-03-10/part 0.parquet",
        "fix the files upstream",
    ):
        assert told in str(caught.value)


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ("user", pa.string()),
        ("user", pa.uint64()),
        ("user", pa.float64()),
        ("user", pa.decimal128(10, 0)),
        ("item", pa.binary()),
        ("at", pa.string()),
        ("at", pa.int64()),
        ("at", pa.date32()),
        ("liked", pa.bool_()),
        ("rating", pa.string()),
    ],
)
def test_another_type_than_the_contracts_is_refused(tmp_path: Path, column: str, kind: pa.DataType) -> None:
    schema = pa.schema([field.with_type(kind) if field.name == column else field for field in SCHEMA])
    path = tmp_path / "lake" / PART / "0.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(schema.empty_table(), path)
    with pytest.raises(SchemaBroken, match=f"column '{column}' is "):
        freeze(contract(), NIGHT, tmp_path, Folder(tmp_path / "lake"))


def test_narrower_types_and_another_column_order_are_accepted(tmp_path: Path) -> None:
    kinds = {
        "user": pa.int8(),
        "item": pa.dictionary(pa.int32(), pa.string()),
        "at": pa.timestamp("ms"),
        "liked": pa.uint8(),
        "rating": pa.float32(),
        "note": pa.large_string(),
    }
    fields = [field.with_type(kinds.get(field.name, field.type)) for field in SCHEMA]
    plain = row(1) | {"at": row(1)["at"].replace(tzinfo=None)}
    rows = pa.Table.from_pylist([plain], schema=pa.schema(fields[::-1]))
    path = tmp_path / "lake" / PART / "0.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(rows, path)
    assert freeze(contract(), NIGHT, tmp_path, Folder(tmp_path / "lake")).rows == 1


def test_thawing_returns_the_copies_and_fetches_lost_ones_again(lake: Path, tmp_path: Path) -> None:
    source = Folder(lake)
    frozen = freeze(contract(), NIGHT, tmp_path, source)
    paths = thaw(frozen, contract(), tmp_path, source)
    assert [path.stem for path in paths] == [file.sha256 for file in frozen.files]
    paths[0].unlink()
    paths[1].write_bytes(b"damaged")
    assert thaw(frozen, contract(), tmp_path, source) == paths
    assert paths[1].read_bytes() == (lake / frozen.files[1].path).read_bytes()


@pytest.mark.parametrize("gone", [True, False])
def test_thawing_refuses_other_bytes_than_were_frozen(lake: Path, tmp_path: Path, gone: bool) -> None:
    frozen = freeze(contract(), NIGHT, tmp_path / "a", Folder(lake))
    if gone:
        (lake / frozen.files[0].path).unlink()
    else:
        write(lake / frozen.files[0].path, [row(77)])
    with pytest.raises(NightChanged, match=r"part 0\.parquet"):
        thaw(frozen, contract(), tmp_path / "b", Folder(lake))
