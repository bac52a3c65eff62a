"""Feedback as a request carries it: what its user has just done, as rows with labels; and what the graphs read of it.

Columns are arrays ``[R, F]``, of lists ``[R, F, V]``. A row without any label is none: that is how they are filled up.
Rows of feedback are looked up and scored together with the candidates, before them: a graph holds every table once.

Shapes: R requests, M candidates, F rows of feedback, V places of a list, K objectives.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from tasks.data.contract import DataConfig
from tasks.release.interface import Example, InputSpec
from tasks.release.nodes import Graph

Arrays = Mapping[str, npt.NDArray[np.generic]]


def feedback_columns(data: DataConfig) -> dict[str, str]:
    """Columns of a candidate to what the inputs of the feedback's are called."""
    return dict(zip(_columns(data), _names(data), strict=False))


def feedback_labels(data: DataConfig) -> tuple[str, ...]:
    """What the inputs of the feedback's labels are called, by objective."""
    return _names(data)[len(_columns(data)) :]


def _columns(data: DataConfig) -> tuple[str, ...]:
    return data.item, *data.named("candidate")


def _names(data: DataConfig) -> tuple[str, ...]:
    taken = {column.name for column in data.columns}
    names = []
    for wanted in (*_columns(data), *(objective.name for objective in data.objectives)):
        name = f"feedback_{wanted}"
        while name in taken:
            name += "_"
        taken.add(name)
        names.append(name)
    return tuple(names)


def feedback_specs(
    data: DataConfig, candidates: Mapping[str, InputSpec], rows: int, examples: Mapping[str, Example]
) -> tuple[InputSpec, ...]:
    """What a request may hold of its user's feedback: the candidate's columns, then a label per objective.

    Args:
        data: the contract.
        candidates: the inputs of the candidates, by column.
        rows: most rows of feedback; 0 gives nothing.
        examples: a value per input, for readers of the manifest.
    """
    if not rows:
        return ()
    specs = [
        replace(
            candidates[column],
            name=name,
            per="feedback",
            meaning=f"{column} of rows that the user has just left, as of a candidate; at most {rows} rows",
            example=examples.get(name),
            of=column,
            optional=True,
            rows=rows,
        )
        for column, name in feedback_columns(data).items()
    ]
    for objective, name in zip(data.objectives, feedback_labels(data), strict=True):
        meaning = f"label {objective.name} of the same rows, as in {objective.column}; a row without any label is none"
        specs.append(
            InputSpec(
                name=name,
                per="feedback",
                dtype="float32",
                meaning=meaning,
                missing=None,
                example=examples.get(name),
                of=objective.column,
                optional=True,
                rows=rows,
            )
        )
    return tuple(specs)


def together(data: DataConfig, request: Arrays) -> dict[str, npt.NDArray[np.generic]]:
    """A request whose candidates are the rows of its feedback, and behind them its candidates."""
    joined = {
        column: np.concatenate([request[name], request[column]], axis=1)
        for column, name in feedback_columns(data).items()
    }
    return {**request, **joined}


def labels_of(data: DataConfig, request: Arrays) -> npt.NDArray[np.float32]:
    """Labels of the feedback ``[R, F, K]``."""
    return np.stack([np.asarray(request[name], np.float32) for name in feedback_labels(data)], axis=-1)


def joined_nodes(data: DataConfig, graph: Graph) -> dict[str, str]:
    """Add to a look-up graph what `together` does; candidate columns to the tensors that hold both."""
    return {
        column: graph.node("Concat", [name, column], f"lookup/together/{column}", axis=1)
        for column, name in feedback_columns(data).items()
    }
