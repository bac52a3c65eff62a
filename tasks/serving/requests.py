"""Ranking requests: what a caller may pass, turned into exactly the tensors that a release takes."""

from collections.abc import Mapping, Sequence

from tasks.errors import RequestRejected
from tasks.release.manifest import InputSpec
from tasks.serving.columns import Arrays as Arrays
from tasks.serving.columns import read_column, require_newest_first, require_same_rows
from tasks.serving.feedback import Bounds, read_feedback
from tasks.serving.hashing import Hasher


def read_request(
    specs: Sequence[InputSpec],
    request: Mapping[str, object],
    hasher: Hasher | None = None,
    binary: Sequence[bool] = (),
    bounds: Sequence[Bounds] = (),
) -> tuple[Arrays, tuple[int, int]]:
    """Check a request and give its columns their types.

    Integers may be of any width, numbers may be integers, floats or booleans; digit strings are not integers. None
    becomes the column's missing marker (NaN for numbers). Of list columns a value is a list: of categories as many as
    there are, none of them missing, or the whole vector; None is an empty list or a missing vector. An array of list
    columns may be padded by the missing marker already.

    Of the user's history a value is a list with one value per entry, newest first, None where it is missing; of longer
    ones the newest entries are taken, and None is no history. Feedback may be left out, see `read_feedback`.

    Args:
        specs: the inputs of the release.
        request: column name to array or nested list.
        hasher: hashes personal columns; None where the request holds what the lake holds.
        binary: of each objective, whether its labels are 0 and 1, as feedback gives them.
        bounds: of each objective, between what labels of feedback lie; see `read_feedback`.

    Returns:
        Arrays by column, those of feedback only where there is some, and (R, M): requests and candidates per request.

    Raises:
        RequestRejected: names the column, what came, and what was expected; of a personal column not what came.

    >>> from tasks.release.manifest import InputSpec
    >>> specs = (InputSpec("user", "request", "string", "", ""), InputSpec("item", "candidate", "int64", "", -1))
    >>> read_request(specs, {"user": ["ann"], "item": [[3, None]]})
    ({'user': array(['ann'], dtype=object), 'item': array([[ 3, -1]])}, (1, 2))
    >>> specs += (InputSpec("tags", "candidate", "string", "", "", values=2),)
    >>> read_request(specs, {"user": ["ann"], "item": [[3, 4]], "tags": [[["red", "blue"], []]]})[0]["tags"].tolist()
    [[['red', 'blue'], ['', '']]]
    """
    names = {spec.name for spec in specs}
    given = [spec for spec in specs if spec.per == "feedback"]
    specs = [spec for spec in specs if spec.per != "feedback"]
    if lacking := [spec.name for spec in specs if spec.name not in request]:
        must = ", ".join(sorted(spec.name for spec in specs))
        raise RequestRejected(f"the request lacks {', '.join(lacking)}; it must hold {must}")
    if extra := sorted(str(name) for name in request.keys() - names):
        raise RequestRejected(f"the request holds {', '.join(extra)}, which the release does not know; leave it out")
    arrays = {spec.name: read_column(spec, request[spec.name]) for spec in specs}
    past = [spec for spec in specs if spec.recalls]
    require_same_rows({spec.name: request[spec.name] for spec in past})
    asked = {spec.name for spec in specs if spec.per == "request"}
    for spec in past:
        if spec.of in asked:  # when it was: the only one of these columns that is also the request's own
            require_newest_first(spec, arrays[spec.name])
    first = {per: next(spec.name for spec in specs if spec.per == per) for per in ("request", "candidate")}
    requests, candidates = arrays[first["candidate"]].shape
    for spec in specs:
        expected = (requests,) if spec.per == "request" else (requests, candidates)
        expected += () if spec.values is None else (spec.values,)
        if (found := arrays[spec.name].shape) != expected:
            raise RequestRejected(
                f"column {spec.name!r} has shape {list(found)}, expected {list(expected)}, because "
                f"{first['candidate']!r} has shape {[requests, candidates]} (requests x candidates)"
            )
    arrays |= read_feedback(given, request, requests, binary, bounds)
    if hasher is not None:
        arrays |= {
            spec.name: hasher.hashed(spec, arrays[spec.name]) for spec in (*specs, *given) if spec.name in arrays
        }
    return arrays, (requests, candidates)
