"""Where interactions lie: a night's folder in one lake, or in several that are read as one.

Keys below the source begin with the lake's name where there are several.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Protocol

from tasks.data.contract import DataConfig, LakeConfig


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
    found = nights_by_lake(data, source)
    return tuple(night for night in sorted(set().union(*found.values())) if not why_absent(data, found, night))


def nights_by_lake(data: DataConfig, source: Source) -> dict[str, frozenset[date]]:
    """The nights that each lake has visible files of, by the lake's name."""
    return {lake.name: frozenset(_nights_of(lake, _below(data, lake), source)) for lake in data.every_lake}


def why_absent(data: DataConfig, found: Mapping[str, Collection[date]], night: date) -> str:
    """Why a night is not there, by the lakes that it needs; empty if it is.

    Args:
        data: the contract.
        found: from `nights_by_lake`.
        night: the night.
    """
    begun = [lake for lake in data.every_lake if lake.first_night is None or lake.first_night <= night]
    without = [lake for lake in begun if night not in found[lake.name]]
    if len(without) == len(begun):
        return f"the {'lakes have' if data.lakes else 'lake has'} no such night"
    short = [lake.name for lake in without if not lake.optional]
    return f"nothing of {', '.join(short)}" if short else ""


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


def listing(data: DataConfig, night: date, source: Source) -> dict[str, int | None]:
    """Bytes of every file of a night, by key below the source."""
    return {
        key: source.size(key)
        for folder in folders(data, night).values()
        for key in source.list(folder)
        if _visible(key[len(folder) :])
    }


def lake_of(data: DataConfig, key: str) -> str | None:
    """The lake that a file is of, by its key below the source; None where there is a single one."""
    return key.partition("/")[0] if data.lakes else None


def absent(data: DataConfig, night: date, files: Iterable[str]) -> str | None:
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


def where(data: DataConfig, night: date) -> str:
    """A night and the folders that it lies in, to be told."""
    sources = {lake.name: lake.source.rstrip("/") for lake in data.every_lake}
    here = folders(data, night)
    if not data.lakes:
        return f"night {night} ({sources['lake']}/{here['lake']})"
    told = [f"{name}: {sources[name]}/{folder.removeprefix(f'{name}/')}" for name, folder in here.items()]
    return f"night {night} ({', '.join(told)})"


def _visible(path: str) -> bool:
    return bool(path) and not any(part.startswith(("_", ".")) for part in path.split("/"))
