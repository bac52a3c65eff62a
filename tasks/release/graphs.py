"""Export: the network, the bank and the tables as ONNX graphs over one set of weights.

`lookup.onnx` turns raw columns into ids, `score.onnx` turns ids and numbers into scores, `model.onnx` is both in one.
Weights lie in external files that are cut by how fast they change: `base.bin`, `statistics.bin`, `bank.bin`; both
`score.onnx` and `model.onnx` refer to them by bare name. So do `lookup.onnx` and `model.onnx` to tables of many keys.
Where requests may bring feedback, `model_feedback.onnx` and its two halves take it, over the same files: a request
without any costs what it did.

Shapes: K objectives, D numbers of an adapter per objective.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from tasks.data.contract import DataConfig
from tasks.errors import ParityBroken
from tasks.learning.bending import Bent
from tasks.learning.networks import Ranker
from tasks.learning.ranker_config import RankerConfig
from tasks.learning.ranker_shape import RankerShape
from tasks.release.external import ExternalFiles
from tasks.release.lookups import Wires, as_model, lookup_graph, wires
from tasks.release.nodes import ENCODER_KEYS
from tasks.release.scorer import PREFIX, Scorer, Solving, numbers_of, trace
from tasks.release.tables import ServingTables

F32 = npt.NDArray[np.float32]
Trace = Callable[[RankerShape, RankerConfig, Wires, Bent | None, int, Solving | None], bytes]
EXTERNAL = {"network.": "base.bin", "statistics_": "statistics.bin", "bank": "bank.bin"}
"""Prefix of a parameter's name to the external file that holds it."""
PARTS = ("lookup", "score", "model")
"""Graphs of a pair: its halves, and both in one."""


@dataclass(frozen=True)
class ExportedGraphs:
    """What an export wrote.

    Attributes:
        folder: where the files are.
        files: their names: three graphs, three more where feedback is taken, three external files of weights, and those
            of tables of many keys.
        wires: names of the tensors between the two halves.
    """

    folder: Path
    files: tuple[str, ...]
    wires: Wires


def export(
    network: Ranker,
    bank: F32,
    tables: ServingTables,
    data: DataConfig,
    folder: Path,
    traced: Trace = trace,
    encoder_keys: int = ENCODER_KEYS,
    solving: Solving | None = None,
) -> ExportedGraphs:
    """Write the graphs and their external files.

    Args:
        network: the shared network; exported from evaluation mode, on the CPU.
        bank: adapter weights, float32 [slots, K, D]; slot 0 is the base.
        tables: vocabularies, statistics and slots.
        data: the contract: names and types of the inputs.
        folder: an existing folder for the files.
        traced: gives the graph of the network's layers, which is filled here.
        encoder_keys: a look-up of more keys is a table in an external file.
        solving: how feedback is solved; None where requests bring none.

    Raises:
        ParityBroken: bank, tables and network do not fit together, or the graphs are not valid ONNX.
    """
    _check_fit(network, bank, tables, solving)
    names, files = wires(data, tables), ExternalFiles(folder)
    for file in EXTERNAL.values():
        files.begin(file)
    graphs: list[str] = []
    for one, suffix in ((None, ""), (solving, "_feedback"))[: 1 if solving is None else 2]:
        lookup = lookup_graph(data, tables, names, files, encoder_keys, feedback=one is not None)
        layers = network.shape, network.config, names, network.bent, network.prototypes
        score = onnx.load_from_string(traced(*layers, one))
        _fill(score, Scorer(copy.deepcopy(network).cpu(), bank, tables.statistics, one), files)
        graphs += _write(lookup, score, suffix, folder)
    return ExportedGraphs(folder, (*graphs, *files.names), names)


def _write(lookup: onnx.ModelProto, score: onnx.ModelProto, suffix: str, folder: Path) -> list[str]:
    """Write two halves, and both in one; gives their names."""
    graph = helper.make_graph(
        [*lookup.graph.node, *score.graph.node],
        "model",
        lookup.graph.input,
        score.graph.output,
        [*lookup.graph.initializer, *score.graph.initializer],
    )
    models = {f"{name}{suffix}.onnx": one for name, one in zip(PARTS, (lookup, score, as_model(graph)), strict=True)}
    for name, model in models.items():
        (folder / name).write_bytes(model.SerializeToString(deterministic=True))
        try:
            onnx.checker.check_model(str(folder / name), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ParityBroken(f"{name} is not valid ONNX: {error}; this is a defect of the export") from error
    return list(models)


def _check_fit(network: Ranker, bank: F32, tables: ServingTables, solving: Solving | None) -> None:
    shape = network.shape
    expected = (len(shape.kinds), network.width)
    if bank.ndim != 3 or bank.dtype != np.float32 or bank.shape[1:] != expected or len(bank) == 0:
        raise ParityBroken(
            f"the bank is {bank.dtype} {list(bank.shape)}, the network takes "
            f"float32 [slots, {expected[0]}, {expected[1]}]"
        )
    if not np.isfinite(bank).all():
        raise ParityBroken(f"the bank has {int((~np.isfinite(bank)).sum())} numbers that are not finite; adapt again")
    if len(tables.statistics.names) != shape.statistics:
        raise ParityBroken(f"there are {len(tables.statistics.names)} statistics, the network takes {shape.statistics}")
    if tables.history != network.config.history:
        raise ParityBroken(
            f"requests carry {tables.history} entries of a history, the network reads {network.config.history}"
        )
    if tables.feedback != (0 if solving is None else solving.rows):
        raise ParityBroken(
            f"requests bring {tables.feedback} rows of feedback, the graphs solve {solving and solving.rows}"
        )
    for level in tables.levels:
        if len(level.slots) and (level.slots.min() < 0 or level.slots.max() >= len(bank)):
            raise ParityBroken(
                f"level [{', '.join(level.columns)}] names slots {level.slots.min()} to {level.slots.max()}, "
                f"the bank has {len(bank)}"
            )


def _fill(model: onnx.ModelProto, scorer: Scorer, files: ExternalFiles) -> None:
    """Put the numbers into the blank initialisers: weights into the external files, in the order of their names."""
    numbers = {f"{PREFIX}{name}": tensor for name, tensor in numbers_of(scorer).items()}
    for tensor in sorted(model.graph.initializer, key=lambda one: one.name):
        if tensor.name not in numbers:
            continue
        values = numbers[tensor.name].detach().numpy()
        name = tensor.name.removeprefix(PREFIX)
        file = next((file for prefix, file in EXTERNAL.items() if name.startswith(prefix)), None)
        if file is None or tensor.data_type != TensorProto.FLOAT or not values.size:
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        else:
            tensor.CopyFrom(files.place(file, tensor.name, values.astype(np.float32, copy=False)))
