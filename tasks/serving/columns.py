"""Columns of ranking requests: what a caller may pass, turned into exactly the tensors that a release takes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tasks.errors import RequestRejected
from tasks.release.manifest import InputSpec

Arrays = dict[str, npt.NDArray[np.generic]]


def read_column(spec: InputSpec, values: object) -> npt.NDArray[np.generic]:
    """A column with its type, and lists filled up to the places of the column."""
    return shielded(spec, lambda: _column(spec, values))


def shielded(spec: InputSpec, read: Callable[[], npt.NDArray[np.generic]]) -> npt.NDArray[np.generic]:
    """A column as it is read; of a personal one no error, nor what led to it, holds a value."""
    if spec.personal is None:
        return read()
    try:
        return read()
    except RequestRejected:
        pass  # raised anew where this one is no longer its context
    raise RequestRejected(
        f"column {spec.name!r} does not hold {spec.dtype} of shape [{', '.join(map(str, spec.shape))}]; its values are "
        f"personal and are not shown"
    )


def _column(spec: InputSpec, values: object) -> npt.NDArray[np.generic]:
    if spec.values is None:
        return _single(spec, values)
    if spec.of is not None:
        return _entries(spec, values)
    if isinstance(values, np.ndarray) and values.ndim == len(spec.shape):
        return _vectors(spec, _padded(spec, _single(spec, values)))
    axes = len(spec.shape) - 1
    cells = _cells(spec, values, axes)
    if cells.ndim != axes:
        raise RequestRejected(
            f"column {spec.name!r} has {cells.ndim} axes of lists (shape {list(cells.shape)}), expected {axes}: "
            f"[{', '.join(map(str, spec.shape[:-1]))}], each a list"
        )
    return _vectors(spec, _from_lists(spec, cells))


def _entries(spec: InputSpec, values: object) -> npt.NDArray[np.generic]:
    """A column of histories, cut to the newest entries or filled up behind the oldest."""
    assert spec.values is not None
    if isinstance(values, np.ndarray) and values.ndim == 2:
        return _padded(spec, _single(spec, values[:, : spec.values]))
    rows_of(spec.name, values)
    lists = [() if cell is None else cell for cell in _cells(spec, values, 1).ravel().tolist()]
    newest = [[*cell[: spec.values], *[None] * (spec.values - len(cell))] for cell in lists]
    return _single(spec, newest) if newest else np.zeros((0, spec.values), spec.dtype.replace("string", "object"))


def require_same_rows(columns: Mapping[str, object], what: str = "history", rows: str = "entries") -> None:
    """Refuse columns that do not have a value for each row of the past: labels would be those of other items.

    Args:
        columns: by name.
        what: it is that they tell of.
        rows: what to call them.
    """
    lengths = {name: [len(cell) for cell in rows_of(name, values)] for name, values in columns.items()}
    for (one, known), (other, found) in pairwise(lengths.items()):
        for at, (expected, count) in enumerate(zip(known, found, strict=False)):
            if count != expected:
                raise RequestRejected(
                    f"the {what} of request {at} has {expected} {rows} in {one!r} and {count} in {other!r}; give "
                    f"each column one value per {rows.replace('ies', 'y').rstrip('s')}, None where it is missing"
                )


def rows_of(name: str, values: object) -> list[Sequence[object]]:
    """What each request has to tell of its user's past in a column."""
    scalar = isinstance(values, np.ndarray) and values.ndim == 0
    if scalar or isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise RequestRejected(
            f"column {name!r} is {values!r:.80} of type {type(values).__name__}, expected a list per request, or None "
            "for one without a history"
        )
    cells = list(values)
    for at, cell in enumerate(cells):
        if cell is not None and not (
            isinstance(cell, list | tuple) or (isinstance(cell, np.ndarray) and cell.ndim > 0)
        ):
            raise RequestRejected(
                f"column {name!r} holds {cell!r:.80} of type {type(cell).__name__} for request {at}, expected a list"
            )
    return [() if cell is None else cell for cell in cells]


def require_newest_first(spec: InputSpec, time: npt.NDArray[np.generic]) -> None:
    """Refuse histories that are not in order: of longer ones the oldest entries would be read."""
    known = time != spec.missing
    wrong = known[:, 1:] & known[:, :-1] & (time[:, 1:] > time[:, :-1])  # type: ignore[operator]
    if wrong.any():
        request, entry = np.argwhere(wrong)[0]
        raise RequestRejected(
            f"column {spec.name!r} has {time[request, entry + 1]} behind {time[request, entry]} in the history of "
            f"request {request}; give the newest entry first, in every column"
        )


def _cells(spec: InputSpec, values: object, axes: int) -> npt.NDArray[np.object_]:
    """An array of lists; the first axes of nested lists are its own, whatever the lists have in common."""
    if isinstance(values, np.ndarray):
        return values.astype(object)
    if not isinstance(values, list | tuple):
        return np.array(values, dtype=object)
    rows = [values] if axes == 1 else list(values)
    if any(not isinstance(row, list | tuple) for row in rows):
        raise RequestRejected(f"column {spec.name!r} must hold a list per request, with a list per candidate")
    if len({len(row) for row in rows}) > 1:
        raise RequestRejected(f"column {spec.name!r} is a ragged list; give each request as many candidates")
    flat = [cell for row in rows for cell in row]
    cells = np.empty(len(flat), object)
    cells[:] = flat
    return cells if axes == 1 else cells.reshape(len(rows), len(rows[0]) if rows else 0)


def _from_lists(spec: InputSpec, cells: npt.NDArray[np.object_]) -> npt.NDArray[np.generic]:
    """Lists of values as one array whose last axis has the places of the column."""
    assert spec.values is not None
    given = [cell is not None for cell in cells.ravel().tolist()]
    lists = [() if cell is None else cell for cell in cells.ravel().tolist()]
    for odd in (cell for cell in lists if not isinstance(cell, list | tuple | np.ndarray)):
        raise RequestRejected(f"column {spec.name!r} holds {odd!r:.80} of type {type(odd).__name__}, expected a list")
    lengths = np.array([len(cell) for cell in lists], np.int64)
    _fits(spec, lengths[given])
    flat = [value for cell in lists for value in cell]
    if any(isinstance(value, list | tuple | np.ndarray) for value in flat):
        raise RequestRejected(f"column {spec.name!r} holds a list inside a list, expected {spec.dtype}")
    if any(value is None or (spec.missing is not None and value == spec.missing) for value in flat):
        remedy = "give the whole vector, or None" if spec.dtype == "float32" else "leave it out of the list"
        raise RequestRejected(f"column {spec.name!r} holds a missing value inside a list; {remedy}")
    values = np.empty(len(flat), object)
    values[:] = flat
    typed = _single(replace(spec, per="request", values=None), values)
    table = np.full((len(lists), spec.values), np.nan if spec.missing is None else spec.missing, typed.dtype)
    table[np.arange(spec.values) < lengths[:, None]] = typed
    return table.reshape(*cells.shape, spec.values)


def _fits(spec: InputSpec, lengths: npt.NDArray[np.int64]) -> None:
    """Refuse lists of lengths that the column does not have."""
    assert spec.values is not None
    vector = spec.dtype == "float32" and spec.of is None
    wrong = lengths[lengths != spec.values] if vector else lengths[lengths > spec.values]
    if len(wrong):
        allowed = f"{spec.values}" if vector else f"at most {spec.values}"
        raise RequestRejected(f"column {spec.name!r} holds a list of {wrong[0]} values, expected {allowed}")


def _padded(spec: InputSpec, array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """An array of lists of equal length, filled up to the places of the column."""
    assert spec.values is not None
    _fits(spec, np.array(array.shape[-1:], np.int64))
    fill = np.nan if spec.missing is None else spec.missing
    more = np.full((*array.shape[:-1], spec.values - array.shape[-1]), fill, array.dtype)
    return np.concatenate([array, more], axis=-1)


def _vectors(spec: InputSpec, array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Refuse vectors with numbers that are none, unless all of them are missing."""
    if spec.dtype == "float32":
        finite = np.isfinite(array)
        if not (finite.all(axis=-1) | np.isnan(array).all(axis=-1)).all():
            raise RequestRejected(
                f"column {spec.name!r} holds a vector with a number that is missing or not finite as float32; give the "
                f"whole vector, or None"
            )
    return array


def _single(spec: InputSpec, values: object) -> npt.NDArray[np.generic]:
    if isinstance(values, np.ndarray):
        array = values
    else:
        try:
            array = np.array(values, dtype=object)
        except ValueError as error:
            raise RequestRejected(
                f"column {spec.name!r} is a ragged list; give each request as many candidates"
            ) from error
    if array.ndim != len(spec.shape):
        raise RequestRejected(
            f"column {spec.name!r} has {array.ndim} axes (shape {list(array.shape)}), expected {len(spec.shape)}: "
            f"[{', '.join(map(str, spec.shape))}]; rows of unequal length count as ragged"
        )
    if array.dtype == object:
        array = _typed(spec, array)
    kind = array.dtype.kind
    if spec.dtype == "int64":
        if kind == "i" or (kind == "u" and (array.size == 0 or array.max() < 2**63)):
            return array.astype(np.int64)
    elif spec.dtype == "float32":
        if kind in "biuf":
            with np.errstate(over="ignore"):
                return array.astype(np.float32)
    elif kind in "UO":
        return _unicode(spec, array.astype(object))
    raise RequestRejected(f"column {spec.name!r} has dtype {_shown(array)}, expected {spec.dtype}")


def _unicode(spec: InputSpec, array: npt.NDArray[np.object_]) -> npt.NDArray[np.object_]:
    """Refuse strings that cannot be written as UTF-8, as keys of releases are."""
    try:
        "".join(array.ravel().tolist()).encode()
        return array
    except UnicodeEncodeError:
        pass  # it holds the values: raised anew where it is no longer the context
    raise RequestRejected(
        f"column {spec.name!r} holds a string with half of a surrogate pair (such as \\ud800 in JSON), which is no "
        f"Unicode text; give whole characters, or None"
    )


def _typed(spec: InputSpec, array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Give an array of Python values its type; each value is looked at, because numpy would turn 7 into "7"."""
    flat = array.ravel().tolist()
    allowed = {
        "int64": (int, np.integer),
        "float32": (int, float, np.integer, np.floating, np.bool_),
        "string": (str,),
    }[spec.dtype]
    for value in flat:
        if value is None:
            continue
        if not isinstance(value, allowed) or (isinstance(value, bool) and spec.dtype == "int64"):
            raise RequestRejected(
                f"column {spec.name!r} holds {value!r:.80} of type {type(value).__name__}, expected {spec.dtype}"
            )
    if spec.dtype == "string":
        result = np.empty(len(flat), object)
        result[:] = [spec.missing if value is None else str(value) for value in flat]
        return result.reshape(array.shape)
    marker = np.nan if spec.dtype == "float32" else spec.missing
    filled = [marker if value is None else value for value in flat]
    try:
        return np.array(filled, np.float64 if spec.dtype == "float32" else np.int64).reshape(array.shape)
    except OverflowError as error:
        raise RequestRejected(f"column {spec.name!r} holds a number that does not fit into {spec.dtype}") from error


def _shown(array: npt.NDArray[np.generic]) -> str:
    return f"{array.dtype} (such as {array.ravel()[0]!r:.80})" if array.size else str(array.dtype)
