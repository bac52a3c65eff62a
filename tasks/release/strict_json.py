"""JSON that is read without trust and written in one spelling."""

import json
import math
import re
from collections.abc import Sequence
from datetime import date
from typing import NoReturn

from tasks.errors import ReleaseRefused

SCHEMA_VERSION = 1
"""Of golden requests, of signatures, and the first of manifests and pointers."""
LISTS_VERSION = 2
"""Of an older manifest whose release reads list columns."""
HISTORY_VERSION = 3
"""Of an older manifest whose release reads the user's history."""
VARIANTS_VERSION = 4
"""Of an older manifest that says what a release requires, its segments, its variants, what lies beside it."""
MANIFEST_VERSION = 5
"""Of the manifests that are written: also which files each graph opens, and within which bounds ratings lie."""
POINTER_VERSION = 2
"""Of a pointer that is signed, or names a challenger or a hold; every other one keeps the number that older readers
know."""
REMEDY = "publish the release again (its night, or the fallback that made it), or promote another one"
"""What helps where nothing else is said."""
_DIGITS = re.compile(r"[0-9a-f]+")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def canonical(value: object) -> bytes:
    """JSON with one spelling: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()


class Reader:
    """Reads untrusted JSON field by field; whatever is odd is a `ReleaseRefused` that names the document."""

    def __init__(self, what: str) -> None:
        """Read a document that messages call ``what``."""
        self.what = what

    def refuse(self, why: str, remedy: str | None = None) -> NoReturn:
        """Raise `ReleaseRefused` with a reason, and what to do where that is not `REMEDY`."""
        raise ReleaseRefused(f"{self.what} is refused: {why}"[:500] + f"; {remedy or REMEDY}")

    def document(self, data: bytes, limit: int) -> object:
        """Parse JSON of at most ``limit`` bytes."""
        if len(data) > limit:
            self.refuse(f"it has {len(data)} bytes, more than the limit of {limit}")
        try:
            return json.loads(data.decode("utf-8"), object_pairs_hook=self._pairs, parse_constant=self._constant)
        except (ValueError, RecursionError) as error:
            self.refuse(f"it is not JSON ({error})")

    def _pairs(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key is doubled")
        return found

    def _constant(self, name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    def mapping(self, value: object, what: str) -> dict[str, object]:
        """The value, if it is an object."""
        if not isinstance(value, dict):
            self.refuse(f"{what} is no object")
        return value

    def sequence(self, value: object, what: str) -> Sequence[object]:
        """The value, if it is a list."""
        if not isinstance(value, list):
            self.refuse(f"{what} is no list")
        return value

    def fields(
        self,
        value: object,
        what: str,
        names: Sequence[str],
        versioned: bool = True,
        versions: Sequence[int] = (SCHEMA_VERSION,),
    ) -> dict[str, object]:
        """The value, if it is an object with exactly these fields (and one of the schema versions)."""
        found = self.mapping(value, what)
        version = found.get("schema_version")
        if versioned and (type(version) is not int or version not in versions):
            known = ", ".join(map(str, versions))
            newer = type(version) is int and version > max(versions)
            told = f"its schema version is {version!r:.80}, this reader knows {known}"
            self.refuse(told, "update nightrank on this host" if newer else None)
        expected = {*names, "schema_version"} if versioned else set(names)
        if odd := sorted(expected ^ set(found)):
            self.refuse(f"{what} has missing or unknown fields: {', '.join(odd)}")
        return found

    def text(self, value: object, what: str, limit: int | None = None) -> str:
        """The value, if it is text of at most ``limit`` characters."""
        if not isinstance(value, str):
            self.refuse(f"{what} is no text")
        if limit is not None and len(value) > limit:
            self.refuse(f"{what} has {len(value)} characters, limit {limit}")
        return value

    def choice(self, value: object, what: str, known: Sequence[str]) -> str:
        """The value, if it is one of the known ones."""
        if not isinstance(value, str) or value not in known:
            self.refuse(f"{what} is {value!r:.80}, known are {', '.join(known)}")
        return value

    def number(self, value: object, what: str) -> float:
        """The value, if it is a finite number."""
        if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
            self.refuse(f"{what} is {value!r:.80}, not a number")
        return float(value)  # type: ignore[arg-type]

    def name(self, value: object) -> str:
        """The value, if it can name a column or a tensor."""
        if not isinstance(value, str) or not _NAME.fullmatch(value):
            self.refuse(f"{value!r} is no name")
        return value

    def count(self, value: object, what: str) -> int:
        """The value, if it is a whole number that is not negative."""
        if type(value) is not int or value < 0:
            self.refuse(f"{what} is {value!r}, not a count")
        return value

    def digest(self, value: object, what: str, length: int = 64) -> str:
        """The value, if it has so many hexadecimal digits; 64 are a SHA-256."""
        if not isinstance(value, str) or len(value) != length or not _DIGITS.fullmatch(value):
            self.refuse(f"{what} is {value!r:.80}, not {length} hexadecimal digits")
        return value

    def night(self, value: object) -> date:
        """The value as a date."""
        try:
            return date.fromisoformat(self.text(value, "night"))
        except ValueError:
            self.refuse(f"night is {value!r}, not a date")
