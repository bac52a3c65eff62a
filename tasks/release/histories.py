"""A user's history as a request carries it: raw columns of his recent rows, and what the network reads of them.

Columns are arrays ``[R, H]``, newest first. An entry without an item key is none: that is how they are filled up.

Shapes: R requests, M candidates, H entries, Cc categorical candidate columns.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from tasks.data.contract import DataConfig
from tasks.data.lists import NOTHING
from tasks.data.vocabulary import MISSING
from tasks.learning.history import SECOND
from tasks.release.interface import Example, InputSpec
from tasks.release.nodes import Graph
from tasks.release.tables import ServingTables

FARTHEST = 1 << 61
"""Microseconds from 1970, 70,000 years: times beyond are taken for this, so that no difference overflows."""


def history_columns(data: DataConfig) -> dict[str, str]:
    """Columns of the lake whose earlier values a request carries, to what the inputs are called.

    They are the item, the categorical candidate columns, the label of the first objective, and the time.
    """
    taken = {column.name for column in data.columns}

    def free(name: str) -> str:
        while name in taken:
            name += "_"
        taken.add(name)
        return name

    columns = (data.item, *data.named("candidate", "categorical"), data.objectives[0].column, data.time)
    return {column: free(f"history_{column}") for column in columns}


def history_specs(data: DataConfig, history: int, examples: Mapping[str, Example]) -> tuple[InputSpec, ...]:
    """What a request holds of its user's history, and when it is asked; nothing where none is read.

    Args:
        data: the contract.
        history: entries that the network reads.
        examples: a value per input, for readers of the manifest.
    """
    if not history:
        return ()
    unit = "microseconds since 1970 in UTC"
    meanings = {
        data.item: (
            f"item keys of the user's newest rows before the request, newest first, {history} of them; an unknown one "
            f"is read as such, and behind the oldest stands what stands for a missing value"
        ),
        data.objectives[0].column: f"labels of the same rows, as in {data.objectives[0].column}, newest first",
        data.time: f"times of the same rows, {unit}, newest first",
    }
    asked = f"when the user's visit began, or the ranking is asked for, {unit}"
    specs = [InputSpec(data.time, "request", "int64", asked, MISSING["int64"], examples.get(data.time))]
    for column, name in history_columns(data).items():
        keyed = column not in (data.objectives[0].column, data.time)
        dtype = data.column(column).dtype if keyed else "int64" if column == data.time else "float32"
        specs.append(
            InputSpec(
                name=name,
                per="request",
                dtype=dtype,  # type: ignore[arg-type]  # the contract allows int64 and string for what is looked up
                meaning=meanings.get(column, f"{column} of the same rows, newest first; an unknown one is missing"),
                missing=None if dtype == "float32" else MISSING[dtype],
                example=examples.get(name),
                values=history,
                of=column,
            )
        )
    return tuple(specs)


def encode_history(
    data: DataConfig, tables: ServingTables, request: Mapping[str, npt.NDArray[np.generic]]
) -> dict[str, npt.NDArray[np.generic]]:
    """What the network reads of histories, in numpy: role to array."""
    names = history_columns(data)
    item, *_ = columns = (data.item, *data.named("candidate", "categorical"))
    ids = [tables.ids(column, request[names[column]]) for column in columns]
    ids[0] = np.where(request[names[item]] == MISSING[data.column(item).dtype], NOTHING, ids[0])
    asked, time = (np.asarray(request[name], np.int64) for name in (data.time, names[data.time]))
    unknown = (asked == MISSING["int64"])[:, None] | (time == MISSING["int64"])
    asked, time = (values.clip(-FARTHEST, FARTHEST) for values in (asked, time))
    gaps = np.maximum(asked[:, None] - time, 0) // SECOND
    return {
        "history_ids": np.stack(ids, axis=-1),
        "history_labels": np.asarray(request[names[data.objectives[0].column]], np.float32),
        "history_gaps": np.where(unknown, 0, gaps),
    }


def history_nodes(data: DataConfig, tables: ServingTables, graph: Graph, names: Sequence[str]) -> dict[str, str]:
    """Add to a look-up graph what histories need.

    A table of keys may be large, so candidates and entries are looked up in one.

    Args:
        data: the contract.
        tables: vocabularies, and how many entries there are.
        graph: gets the nodes.
        names: of the tensors of ids, labels and gaps.

    Returns:
        Names of the candidates' own ids by column: the item's and the categorical ones'.
    """
    inputs, length, axis = history_columns(data), tables.history, graph.number(1, axis=True)
    border, end = graph.number(-length, axis=True), graph.number(np.iinfo(np.int64).max, axis=True)
    candidates, entries = {}, []
    for column in (data.item, *data.named("candidate", "categorical")):
        both = graph.node("Concat", [column, inputs[column]], f"lookup/both/{column}", axis=1)
        found = graph.keys_of(tables, column, both, f"lookup/all/{column}", listed=column == data.item)
        own = graph.node("Slice", [found, graph.number(0, axis=True), border, axis], f"lookup/own/{column}")
        candidates[column] = graph.node("Max", [own, graph.number(0)], f"lookup/ids/{column}")
        entries.append(graph.node("Slice", [found, border, end, axis], f"lookup/entries/{column}"))
    graph.stack(entries, names[0])
    graph.node("Identity", [inputs[data.objectives[0].column]], names[1])

    # By comparing: onnxruntime's Max of int64 takes 0 for the greater of 0 and a number between 2^31 and 2^32.
    def at_least(name: str, least: int, result: str) -> str:
        low = graph.number(least)
        return graph.node("Where", [graph.node("Less", [name, low], f"{result}/less"), low, name], result)

    def near(name: str) -> str:
        late, high = at_least(name, -FARTHEST, f"lookup/late/{name}"), graph.number(FARTHEST)
        beyond = graph.node("Greater", [late, high], f"lookup/beyond/{name}")
        return graph.node("Where", [beyond, high, late], f"lookup/near/{name}")

    asked, time, missing = near(data.time), near(inputs[data.time]), graph.number(int(MISSING["int64"]))
    gap = graph.node("Sub", [graph.node("Unsqueeze", [asked, axis], "lookup/asked"), time], "lookup/gap")
    gap = at_least(gap, 0, "lookup/gap/past")
    gap = graph.node("Div", [gap, graph.number(SECOND)], "lookup/gap/seconds")
    undated = graph.node("Equal", [inputs[data.time], missing], "lookup/undated")
    timeless = graph.node("Equal", [data.time, missing], "lookup/timeless")
    timeless = graph.node("Unsqueeze", [timeless, axis], "lookup/timeless/column")
    unknown = graph.node("Or", [undated, timeless], "lookup/unknown")
    graph.node("Where", [unknown, graph.number(0), gap], names[2])
    return candidates
