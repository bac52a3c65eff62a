"""Rows of a night as a release's graphs are asked about them: raw columns, each row a request with one candidate."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tasks.data.columns import Rows, microseconds
from tasks.data.contract import DataConfig
from tasks.data.lists import is_list, padded, values_of
from tasks.data.vocabulary import Vocabularies
from tasks.errors import ReleaseRefused
from tasks.learning.exams import Night
from tasks.learning.history import histories
from tasks.learning.material import I64
from tasks.release.interface import InputSpec

Columns = dict[str, npt.NDArray[np.generic]]


def past_of(
    inputs: Sequence[InputSpec], data: DataConfig, rows: Rows, night: Night, vocabularies: Vocabularies, at: I64
) -> Columns:
    """What a release takes of the users' histories, as raw keys, for rows at positions [N]; by input [N, H]."""
    specs = [spec for spec in inputs if spec.recalls]
    if not specs:
        return {}
    assert specs[0].values is not None
    # The night's visits are all that these rows are of, and each is asked for when it began.
    visit = np.searchsorted(night.visits.rows.start, at, side="right") - 1
    past: Columns = {data.time: np.asarray(rows.time)[night.visits.rows.start[visit]]}
    found = histories(rows, night.visits.rows.start, night.visits.first, at, specs[0].values)
    places = found.at[found.row]
    columns = (data.item, *data.named("candidate", "categorical"))
    labels = [objective.column for objective in data.objectives]
    for spec in specs:
        if spec.of in columns:
            keys = vocabularies[spec.of].decode(np.asarray(rows.candidate_ids[places.ravel(), columns.index(spec.of)]))
            known = keys.cast(pa.string() if spec.dtype == "string" else pa.int64())
            values = pc.fill_null(known, spec.missing).to_numpy(zero_copy_only=False).reshape(places.shape)
        elif spec.of in labels:
            values = np.asarray(rows.labels[:, labels.index(spec.of)][places])
        elif spec.of == data.time:
            values = np.asarray(rows.time[places])
        else:
            raise ReleaseRefused(f"its history is of the column {spec.of!r}, which the contract no longer has")
        fill = np.nan if spec.missing is None else spec.missing
        past[spec.name] = np.where(places < 0, np.array(fill, values.dtype), values)
    return past


def order_of(users: pa.ChunkedArray, data: DataConfig, vocabularies: Vocabularies) -> I64:
    """Where the exam's rows [N], by user and then by time, stand among clean rows, which are in order of time."""
    order: I64 = np.argsort(vocabularies[data.user].encode(users), kind="stable")
    return order


def columns_of(inputs: Sequence[InputSpec], table: pa.Table, beside: Mapping[str, object]) -> Columns:
    """Raw columns of rows: [N], of candidates [N, 1], and one axis more for lists.

    Args:
        inputs: what the release takes.
        table: the rows.
        beside: inputs that come from elsewhere.

    Raises:
        ReleaseRefused: the contract has no such column any more.
    """
    request: Columns = {}
    for spec in inputs:
        if spec.name in beside or spec.per == "feedback":
            continue
        if spec.name not in table.column_names:
            raise ReleaseRefused(f"it asks for the column {spec.name!r}, which the contract no longer has")
        values = table[spec.name]
        if is_list(values.type) != (spec.values is not None):
            raise ReleaseRefused(f"the column {spec.name!r} holds lists in one of contract and release only")
        if spec.values is not None:
            raw = _lists(spec, values)
            request[spec.name] = raw if spec.per == "request" else raw[:, None]
            continue
        if spec.dtype == "float32":
            raw = pc.fill_null(values.cast(pa.float64()), float("nan")).to_numpy().astype(np.float32)
        elif pa.types.is_timestamp(values.type):
            raw = microseconds(values)
        elif spec.dtype == "int64":
            raw = pc.fill_null(values.cast(pa.int64()), spec.missing).to_numpy()
        else:
            raw = pc.fill_null(values.cast(pa.string()), spec.missing).to_numpy(zero_copy_only=False)
        request[spec.name] = raw if spec.per == "request" else raw[:, None]
    return request


def _lists(spec: InputSpec, lists: pa.ChunkedArray) -> npt.NDArray[np.generic]:
    """A column of lists [N, V], as a reader pads them."""
    assert spec.values is not None
    values, lengths = values_of(lists)
    asked = lengths[lengths > 0] if spec.dtype == "float32" else lengths
    if wrong := asked[asked != spec.values if spec.dtype == "float32" else asked > spec.values].tolist():
        raise ReleaseRefused(f"it takes lists of {spec.values} values in {spec.name!r}, and tonight's have {wrong[0]}")
    if spec.dtype == "float32":
        return padded(values.cast(pa.float32()).to_numpy(), lengths, spec.values, np.nan)
    flat = values.cast(pa.int64() if spec.dtype == "int64" else pa.string()).to_numpy(zero_copy_only=False)
    return padded(flat, lengths, spec.values, spec.missing)
