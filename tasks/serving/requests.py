"""Ranking requests: what a caller may pass, turned into exactly the tensors that a release takes."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from tasks.errors import RequestRejected
from tasks.release.manifest import InputSpec

Arrays = dict[str, npt.NDArray[np.generic]]


def read_request(specs: Sequence[InputSpec], request: Mapping[str, object]) -> tuple[Arrays, tuple[int, int]]:
    """Check a request and give its columns their types.

    Integers may be of any width, numbers may be integers, floats or booleans; digit strings are not integers. None
    becomes the column's missing marker (NaN for numbers).

    Args:
        specs: the inputs of the release.
        request: column name to array or nested list.

    Returns:
        Arrays by column, and (R, M): requests and candidates per request.

    Raises:
        RequestRejected: names the column, what came, and what was expected.

    >>> from tasks.release.manifest import InputSpec
    >>> specs = (InputSpec("user", "request", "string", "", ""), InputSpec("item", "candidate", "int64", "", -1))
    >>> read_request(specs, {"user": ["ann"], "item": [[3, None]]})
    ({'user': array(['ann'], dtype=object), 'item': array([[ 3, -1]])}, (1, 2))
    """
    names = {spec.name for spec in specs}
    if lacking := [spec.name for spec in specs if spec.name not in request]:
        raise RequestRejected(f"the request lacks {', '.join(lacking)}; it must hold {', '.join(sorted(names))}")
    if extra := sorted(str(name) for name in request.keys() - names):
        raise RequestRejected(f"the request holds {', '.join(extra)}, which the release does not know; leave it out")
    arrays = {spec.name: _column(spec, request[spec.name]) for spec in specs}
    first = {per: next(spec.name for spec in specs if spec.per == per) for per in ("request", "candidate")}
    requests, candidates = arrays[first["candidate"]].shape
    for spec in specs:
        expected = (requests,) if spec.per == "request" else (requests, candidates)
        if (found := arrays[spec.name].shape) != expected:
            raise RequestRejected(
                f"column {spec.name!r} has shape {list(found)}, expected {list(expected)}, because "
                f"{first['candidate']!r} has shape {[requests, candidates]} (requests x candidates)"
            )
    return arrays, (requests, candidates)


def _column(spec: InputSpec, values: object) -> npt.NDArray[np.generic]:
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
            f"[{', '.join(spec.shape)}]; rows of unequal length count as ragged"
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
        return array.astype(object)
    raise RequestRejected(f"column {spec.name!r} has dtype {_shown(array)}, expected {spec.dtype}")


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
