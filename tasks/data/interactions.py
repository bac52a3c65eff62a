"""One night's files: frozen by digest, held against the contract by their footers, thawed again later."""

import hashlib
import json
import os
import uuid
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.data import lakes
from tasks.data.contract import LISTS, ColumnConfig, DataConfig, DType
from tasks.data.lakes import Source
from tasks.data.lists import is_list
from tasks.errors import CorruptFile, NightChanged, NightMissing, ObjectMissing, SchemaBroken

_CHUNK = 1 << 20


@dataclass(frozen=True)
class FrozenFile:
    """One file of a night, as it was when the night was frozen."""

    path: str
    """Key below the source."""
    bytes: int
    rows: int
    sha256: str


@dataclass(frozen=True)
class FrozenNight:
    """A night's files; equal digests mean equal contents, whatever the files are called."""

    night: date
    files: tuple[FrozenFile, ...]
    rows: int
    digest: str
    """SHA-256 over the sorted (sha256, rows) of the files, and of several lakes the lake's name: free of the files'
    names and of their order."""


@dataclass(frozen=True)
class Footer:
    """What a Parquet file says about itself without any data being read."""

    rows: int
    types: tuple[tuple[str, str], ...]
    """Name and Arrow type of each column, in the file's order: files that share it can be scanned as one."""


def freeze(data: DataConfig, night: date, scratch: Path, source: Source) -> FrozenNight:
    """Copies a night's files to digest-named scratch and holds each against the contract by its footer.

    Files and folders whose names start with `_` or `.` (markers, checksums) are not part of the night.

    Args:
        data: the contract.
        night: the night's date.
        scratch: local folder; copies go to `scratch/frozen/<sha256>.parquet`.
        source: the lake.

    Raises:
        NightMissing: no files, or no rows in them.
        NightChanged: a file appeared, vanished or changed while the night was being copied.
        CorruptFile: a file is not readable Parquet.
        SchemaBroken: columns or types differ from the contract.
    """
    where = lakes.where(data, night)
    before = lakes.listing(data, night, source)
    if (lacking := lakes.absent(data, night, before)) is not None:
        raise NightMissing(
            f"{where} holds no files{lacking}; deliver its Parquet files and run the night again, or choose a night "
            "that exists"
        )
    copies = {key: _fetch(source, key, scratch, where) for key in before}
    after = lakes.listing(data, night, source)
    if changes := _changes(before, {key: size for key, (_, _, size) in copies.items()}, after):
        raise NightChanged(f"{where} changed while it was copied: {changes}; run again once the night is complete")
    footers = _footers(data, where, [(key, path) for key, (path, _, _) in copies.items()])
    files = tuple(
        FrozenFile(key, size, footer.rows, digest)
        for (key, (_, digest, size)), footer in zip(copies.items(), footers, strict=True)
    )
    rows = sum(file.rows for file in files)
    filled = [file.path for file in files if file.rows]
    if (lacking := lakes.absent(data, night, filled)) is not None:
        raise NightMissing(
            f"{where}: its {len(files)} file(s) hold 0 rows{lacking}; deliver the night's rows and run it again"
        )
    return FrozenNight(night, files, rows, _digest(data, files))


def thaw(frozen: FrozenNight, data: DataConfig, scratch: Path, source: Source) -> tuple[Path, ...]:
    """Local copies of a frozen night's files, fetched again where scratch lost them, each checked by its digest.

    Args:
        frozen: the night, as `freeze` returned it.
        data: the contract.
        scratch: the local folder that `freeze` was given, or a new one.
        source: the lake.

    Raises:
        NightChanged: the source no longer has the bytes that were frozen.
    """
    where = lakes.where(data, frozen.night)
    return tuple(_thaw(file, scratch, source, where) for file in frozen.files)


def footers(data: DataConfig, files: list[Path]) -> list[Footer]:
    """Footers of local files, each held against the contract.

    Raises:
        CorruptFile: a file is not readable Parquet.
        SchemaBroken: columns or types differ from the contract; names every difference of every file.
    """
    return _footers(data, "the night", [(path.name, path) for path in files])


def family(kind: pa.DataType) -> DType | None:
    """The contract's name of an Arrow type; None for a type that no contract can ask for.

    Unsigned 64-bit integers have none: they do not fit int64, and a silent overflow would be a different key.

    >>> family(pa.int16()), family(pa.dictionary(pa.int32(), pa.string())), family(pa.uint64())
    ('int64', 'string', None)
    """
    if pa.types.is_dictionary(kind):
        return "string" if family(kind.value_type) == "string" else None
    if pa.types.is_integer(kind):
        return None if kind == pa.uint64() else "int64"
    if pa.types.is_floating(kind):
        return "float64"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "string"
    if pa.types.is_boolean(kind):
        return "bool"
    return "timestamp" if pa.types.is_timestamp(kind) else None


def _changes(before: dict[str, int | None], copied: dict[str, int], after: dict[str, int | None]) -> str:
    sizes = [
        f"{key} had {before[key]} bytes, {copied[key]} were copied" for key in before if before[key] != copied[key]
    ]
    sizes += [
        f"{key} now has {after[key]} bytes, was {copied[key]}"
        for key in after
        if copied.get(key) not in (None, after[key])
    ]
    appeared = [f"{key} appeared" for key in after if key not in before]
    vanished = [f"{key} vanished" for key in before if key not in after]
    return _some([*appeared, *vanished, *sizes])


def _some(texts: list[str], limit: int = 8) -> str:
    more = f"; and {len(texts) - limit} more" if len(texts) > limit else ""
    return "; ".join(texts[:limit]) + more


def _fetch(source: Source, key: str, scratch: Path, where: str) -> tuple[Path, str, int]:
    """Copies one object; returns the copy, its SHA-256 and its size."""
    folder = scratch / "frozen"
    folder.mkdir(parents=True, exist_ok=True)
    incoming = folder / f".incoming-{uuid.uuid4().hex}"
    try:
        try:
            source.download(key, incoming)
        except ObjectMissing as error:
            raise NightChanged(
                f"{where}: {key} vanished while the night was copied; run again once it is complete"
            ) from error
        digest, size = _hash(incoming)
        copy = folder / f"{digest}.parquet"
        os.replace(incoming, copy)
    finally:
        incoming.unlink(missing_ok=True)
    return copy, digest, size


def _thaw(file: FrozenFile, scratch: Path, source: Source, where: str) -> Path:
    copy = scratch / "frozen" / f"{file.sha256}.parquet"
    if copy.exists() and _hash(copy) == (file.sha256, file.bytes):
        return copy
    path, digest, size = _fetch(source, file.path, scratch, where)
    if digest != file.sha256:
        raise NightChanged(
            f"{where}: {file.path} is not the file that was frozen: {size} bytes with SHA-256 {digest[:12]}…, "
            f"frozen {file.bytes} bytes with {file.sha256[:12]}…; restore it, or ingest the night again"
        )
    return path


def _hash(path: Path) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


def _digest(data: DataConfig, files: tuple[FrozenFile, ...]) -> str:
    # Which lake a file is of is a column of its rows.
    content = sorted((file.sha256, file.rows, *filter(None, (lakes.lake_of(data, file.path),))) for file in files)
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def _footers(data: DataConfig, where: str, files: list[tuple[str, Path]]) -> list[Footer]:
    found, problems = [], Counter[str]()
    first: dict[str, str] = {}
    for name, path in files:
        try:
            with pq.ParquetFile(path) as file:
                schema, rows = file.schema_arrow, file.metadata.num_rows
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CorruptFile(
                f"{where}: {name} ({path.stat().st_size} bytes) is not readable Parquet: {_line(error)}; "
                "deliver the file again and run the night again"
            ) from error
        for problem in _differences(data, schema):
            problems[problem] += 1
            first.setdefault(problem, name)
        found.append(Footer(rows, tuple((field.name, str(field.type)) for field in schema)))
    if problems:
        told = [f"{text} (in {count} of {len(files)} file(s), first {first[text]})" for text, count in problems.items()]
        raise SchemaBroken(
            f"{where} breaks the contract of {len(data.delivered)} columns: {_some(told, 40)}; "
            "fix the files upstream, or data.columns in the config"
        )
    return found


def _differences(data: DataConfig, schema: pa.Schema) -> list[str]:
    names = Counter(schema.names)
    wanted = {column.name for column in data.delivered}
    found = [f"column {column.name!r} is absent" for column in data.delivered if column.name not in names]
    instead = {data.lake_column: "filled with the lake's name, and no file may have it"}
    found += [f"column {name!r} is {instead.get(name, 'not in the contract')}" for name in names if name not in wanted]
    found += [f"column {name!r} stands {count} times" for name, count in names.items() if count > 1]
    for column in data.delivered:
        if names[column.name] == 1 and (wanted_type := _misfit(column, kind := schema.field(column.name).type)):
            found.append(f"column {column.name!r} is {kind}, the contract says {wanted_type}")
    return found


def _misfit(column: ColumnConfig, kind: pa.DataType) -> str | None:
    """What the contract says about a column, where an Arrow type does not fit it."""
    if column.kind not in LISTS:
        return None if family(kind) == column.dtype else column.dtype
    fixed = column.kind == "dense" and pa.types.is_fixed_size_list(kind) and kind.list_size != column.length
    if is_list(kind) and family(kind.value_type) == column.dtype and not fixed:
        return None
    return f"list of {column.length} {column.dtype}" if column.kind == "dense" else f"list of {column.dtype}"


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
