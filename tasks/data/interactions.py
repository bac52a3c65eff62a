"""One night's files: frozen by digest, held against the contract by their footers, thawed again later."""

import hashlib
import json
import os
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.data.contract import LISTS, ColumnConfig, DataConfig, DType, LakeConfig
from tasks.data.lists import is_list
from tasks.errors import CorruptFile, NightChanged, NightMissing, ObjectMissing, SchemaBroken

_CHUNK = 1 << 20


class Source(Protocol):
    """What reading a lake takes: a folder or a bucket, seen as keys with slashes."""

    def list(self, prefix: str) -> Iterator[str]:
        """Keys that start with the prefix, in order."""
        ...

    def size(self, key: str) -> int | None:
        """Bytes of an object; None where it is absent."""
        ...

    def download(self, key: str, path: Path) -> None:
        """Copies an object to a local path; raises ObjectMissing where it is absent."""
        ...


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


@dataclass(frozen=True)
class Joined:
    """Several lakes as one source: a key begins with its lake's name."""

    lakes: Mapping[str, Source]

    def list(self, prefix: str) -> Iterator[str]:
        """Keys that start with a lake's name, a slash and more; in the order of that lake."""
        source, name, rest = self._at(prefix)
        return (f"{name}/{key}" for key in source.list(rest))

    def size(self, key: str) -> int | None:
        """Bytes of an object; None where it is absent."""
        source, _, rest = self._at(key)
        return source.size(rest)

    def download(self, key: str, path: Path) -> None:
        """Copies an object to a local path; raises ObjectMissing where it is absent."""
        source, _, rest = self._at(key)
        source.download(rest, path)

    def _at(self, key: str) -> tuple[Source, str, str]:
        name, _, rest = key.partition("/")
        return self.lakes[name], name, rest


def folders(data: DataConfig, night: date) -> dict[str, str]:
    """A night's folder below the source in every lake that has begun by then, with its closing slash, by lake.

    >>> from types import SimpleNamespace
    >>> lake = SimpleNamespace(name="lake", partition="night={night}", first_night=None)
    >>> folders(SimpleNamespace(lakes=(), every_lake=(lake,)), date(1998, 4, 5))
    {'lake': 'night=1998-04-05/'}
    >>> folders(SimpleNamespace(lakes=(lake,), every_lake=(lake,)), date(1998, 4, 5))
    {'lake': 'lake/night=1998-04-05/'}
    """
    begun = [lake for lake in data.every_lake if lake.first_night is None or lake.first_night <= night]
    return {
        lake.name: _below(data, lake) + lake.partition.replace("{night}", night.isoformat()).strip("/") + "/"
        for lake in begun
    }


def nights(data: DataConfig, source: Source) -> tuple[date, ...]:
    """All nights of the source that hold at least one visible file of every lake that they need, oldest first.

    Args:
        data: the contract; its lakes' `partition` says how a night's folder is called.
        source: the lake, or all of them.
    """
    found = {lake.name: _nights_of(lake, _below(data, lake), source) for lake in data.every_lake}

    def whole(night: date) -> bool:
        begun = [lake for lake in data.every_lake if lake.first_night is None or lake.first_night <= night]
        return all(night in found[lake.name] or lake.optional for lake in begun) and any(
            night in found[lake.name] for lake in begun
        )

    return tuple(sorted(filter(whole, set().union(*found.values()))))


def _below(data: DataConfig, lake: LakeConfig) -> str:
    """What the keys of a lake begin with."""
    return f"{lake.name}/" if data.lakes else ""


def _nights_of(lake: LakeConfig, below: str, source: Source) -> set[date]:
    before, after = (below + lake.partition.strip("/")).split("{night}")
    pattern = re.compile(re.escape(before) + r"(\d{4}-\d{2}-\d{2})" + re.escape(after) + "/")
    folder = before.rpartition("/")[0]
    found = set()
    for key in source.list(f"{folder}/" if folder else ""):
        match = pattern.match(key)
        if match and _visible(key[match.end() :]):
            try:
                found.add(date.fromisoformat(match[1]))
            except ValueError:  # 2026-02-31 is a folder, but no night
                continue
    return found


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
    where = _where(data, night)
    before = listing(data, night, source)
    if (absent := _absent(data, night, before)) is not None:
        raise NightMissing(
            f"{where} holds no files{absent}; deliver its Parquet files and run the night again, or choose a night "
            "that exists"
        )
    copies = {key: _fetch(source, key, scratch, where) for key in before}
    after = listing(data, night, source)
    if changes := _changes(before, {key: size for key, (_, _, size) in copies.items()}, after):
        raise NightChanged(f"{where} changed while it was copied: {changes}; run again once the night is complete")
    footers = _footers(data, where, [(key, path) for key, (path, _, _) in copies.items()])
    files = tuple(
        FrozenFile(key, size, footer.rows, digest)
        for (key, (_, digest, size)), footer in zip(copies.items(), footers, strict=True)
    )
    rows = sum(file.rows for file in files)
    filled = [file.path for file in files if file.rows]
    if (absent := _absent(data, night, filled)) is not None:
        raise NightMissing(
            f"{where}: its {len(files)} file(s) hold 0 rows{absent}; deliver the night's rows and run it again"
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
    where = _where(data, frozen.night)
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


def _visible(path: str) -> bool:
    return bool(path) and not any(part.startswith(("_", ".")) for part in path.split("/"))


def listing(data: DataConfig, night: date, source: Source) -> dict[str, int | None]:
    """Bytes of every file of a night, by key below the source."""
    return {
        key: source.size(key)
        for folder in folders(data, night).values()
        for key in source.list(folder)
        if _visible(key[len(folder) :])
    }


def lake_of(data: DataConfig, file: FrozenFile) -> str | None:
    """The lake that a file is of; None where there is a single one."""
    return file.path.partition("/")[0] if data.lakes else None


def _absent(data: DataConfig, night: date, files: Iterable[str]) -> str | None:
    """Which lakes a night needs and has none of these files of, to be told; None if there are none."""
    here, keys = folders(data, night), list(files)
    without = [name for name, folder in here.items() if not any(key.startswith(folder) for key in keys)]
    if not data.lakes:
        return "" if without else None
    needed = {lake.name for lake in data.lakes if not lake.optional}
    short = [name for name in without if name in needed or len(without) == len(here)]
    if not here:
        return f" of any lake: the first begins on {min(lake.first_night for lake in data.lakes if lake.first_night)}"
    return f" of {', '.join(short)}" if short else None


def _where(data: DataConfig, night: date) -> str:
    sources = {lake.name: lake.source.rstrip("/") for lake in data.every_lake}
    here = folders(data, night)
    if not data.lakes:
        return f"night {night} ({sources['lake']}/{here['lake']})"
    told = [f"{name}: {sources[name]}/{folder.removeprefix(f'{name}/')}" for name, folder in here.items()]
    return f"night {night} ({', '.join(told)})"


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
    content = sorted((file.sha256, file.rows, *filter(None, (lake_of(data, file),))) for file in files)
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
