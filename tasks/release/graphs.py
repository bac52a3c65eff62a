"""Export: the network, the bank and the tables as three ONNX graphs over one set of weights.

`lookup.onnx` turns raw columns into ids, `score.onnx` turns ids and numbers into scores, `model.onnx` is both in one.
Weights lie in external files that are cut by how fast they change: `base.bin`, `statistics.bin`, `bank.bin`; both
`score.onnx` and `model.onnx` refer to them by bare name. The exporter's metadata (stack traces with source paths) is
stripped, so that equal inputs give equal bytes wherever they are exported.

Shapes: R requests, M candidates, K objectives, D adapter features.
"""

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn.functional import embedding

from tasks.data.contract import DataConfig
from tasks.errors import ParityBroken
from tasks.learning.networks import Ranker
from tasks.release.lookups import OPSETS, Wires, as_model, lookup_graph, wires
from tasks.release.tables import ServingTables

F32 = npt.NDArray[np.float32]
ALIGNMENT = 64
"""Tensors in external files start at multiples of this many bytes, so that they can be mapped as they lie."""
EXTERNAL = {"network.": "base.bin", "statistics_": "statistics.bin", "bank": "bank.bin"}
"""Prefix of a parameter's name to the external file that holds it."""


@dataclass(frozen=True)
class ExportedGraphs:
    """What an export wrote.

    Attributes:
        folder: where the files are.
        files: their names: three graphs and three external files.
        wires: names of the tensors between the two halves.
    """

    folder: Path
    files: tuple[str, ...]
    wires: Wires


class Scorer(nn.Module):
    """Ids and numbers in, scores out: the network with the statistics and the bank gathered inside."""

    statistics_item: Tensor
    statistics_user: Tensor
    statistics_cohort_item: Tensor
    bank: Tensor
    binary: Tensor

    def __init__(self, network: Ranker, bank: F32, tables: ServingTables) -> None:
        """Join the parts.

        Args:
            network: the shared network; ids beyond its embedding tables count as unknown in it.
            bank: adapter weights [slots, K, D]; slot 0 is the base.
            tables: the statistics by vocabulary id.
        """
        super().__init__()
        self.network = network
        self.shape = network.shape
        for name in ("item", "user", "cohort_item"):
            self.register_buffer(f"statistics_{name}", torch.from_numpy(getattr(tables.statistics, name).copy()))
        self.objectives, self.features = bank.shape[1:]
        self.register_buffer("bank", torch.from_numpy(bank.reshape(len(bank), -1).copy()))
        self.register_buffer("binary", torch.tensor([kind == "binary" for kind in self.shape.kinds]))

    def forward(
        self,
        candidate_ids: Tensor,
        slot: Tensor,
        user_row: Tensor,
        request_ids: Tensor | None = None,
        request_numbers: Tensor | None = None,
        candidate_numbers: Tensor | None = None,
        cohort_item_row: Tensor | None = None,
    ) -> Tensor:
        """Score candidates.

        Args:
            candidate_ids: vocabulary ids [R, M, 1 + Cc], the item's first; ids that the network is too old for count
                as unknown, but still find their statistics.
            slot: adapter of each request [R].
            user_row: vocabulary id of each request's user [R].
            request_ids: vocabulary ids [R, Cr]; None if there are none, as for the rest.
            request_numbers: raw numbers [R, Fr], NaN where missing.
            candidate_numbers: raw numbers [R, M, Fc].
            cohort_item_row: row of the cohort x item statistics [R, M]; 0 is a pair that was never seen.

        Returns:
            Probabilities (binary) or values (rating), float32 [R, M, K].
        """
        requests, candidates = candidate_ids.shape[:2]
        item = embedding(candidate_ids[..., 0], self.statistics_item)
        none = item[..., :0]

        def spread(values: Tensor) -> Tensor:
            return values.unsqueeze(1).expand(requests, candidates, values.shape[-1])

        statistics = [item, spread(embedding(user_row, self.statistics_user))]
        if cohort_item_row is not None:
            pair = embedding(cohort_item_row, self.statistics_cohort_item)
            unseen = torch.cat([item[..., :-1], torch.zeros_like(item[..., -1:])], dim=-1)
            statistics.append(torch.where((cohort_item_row == 0).unsqueeze(-1), unseen, pair))
        logits, features = self.network(
            none.to(torch.int64) if request_ids is None else spread(request_ids),
            candidate_ids,
            none if request_numbers is None else spread(request_numbers),
            none if candidate_numbers is None else candidate_numbers,
            torch.cat(statistics, dim=-1),
        )
        adapter = embedding(slot, self.bank).reshape(requests, self.objectives, self.features)
        values = logits + torch.matmul(features, adapter.transpose(1, 2))
        if all(kind == "binary" for kind in self.shape.kinds):
            return torch.sigmoid(values)
        return torch.where(self.binary, torch.sigmoid(values), values)


def export(network: Ranker, bank: F32, tables: ServingTables, data: DataConfig, folder: Path) -> ExportedGraphs:
    """Write the graphs and their external files.

    Args:
        network: the shared network; exported from evaluation mode, on the CPU.
        bank: adapter weights, float32 [slots, K, D]; slot 0 is the base.
        tables: vocabularies, statistics and slots.
        data: the contract: names and types of the inputs.
        folder: an existing folder for the files.

    Raises:
        ParityBroken: bank, tables and network do not fit together, or the graphs are not valid ONNX.
    """
    _check_fit(network, bank, tables)
    names = wires(data, tables)
    lookup = lookup_graph(data, tables, names)
    score = _score_graph(Scorer(copy.deepcopy(network).cpu().eval(), bank, tables), names)
    _take_out_weights(score, folder)
    graph = helper.make_graph(
        [*lookup.graph.node, *score.graph.node],
        "model",
        lookup.graph.input,
        score.graph.output,
        [*lookup.graph.initializer, *score.graph.initializer],
    )
    models = {"lookup.onnx": lookup, "score.onnx": score, "model.onnx": as_model(graph)}
    for name, model in models.items():
        _strip(model)
        (folder / name).write_bytes(model.SerializeToString(deterministic=True))
        try:
            onnx.checker.check_model(str(folder / name), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ParityBroken(f"{name} is not valid ONNX: {error}; this is a defect of the export") from error
    return ExportedGraphs(folder, (*models, *EXTERNAL.values()), names)


def _check_fit(network: Ranker, bank: F32, tables: ServingTables) -> None:
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
    for level in tables.levels:
        if len(level.slots) and (level.slots.min() < 0 or level.slots.max() >= len(bank)):
            raise ParityBroken(
                f"level [{', '.join(level.columns)}] names slots {level.slots.min()} to {level.slots.max()}, "
                f"the bank has {len(bank)}"
            )


def _score_graph(scorer: Scorer, names: Wires) -> onnx.ModelProto:
    """Export the scorer; all names are the release's own or begin with `score/`."""
    example, dims = _example(scorer, names)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            scorer.eval(),
            kwargs=example,
            dynamo=True,
            opset_version=OPSETS[""],
            output_names=["scores"],
            dynamic_shapes=dims,
            optimize=False,  # folding and merging depend on the weights' values; the runtime optimises when it loads
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = as_model(program.model_proto.graph)
    given = {**names.between(), "scores": names.scores}
    _rename(model.graph, lambda name: given.get(name) or (f"score/{name}" if name else ""))
    model.graph.name = "score"
    return model


def _example(scorer: Scorer, names: Wires) -> tuple[dict[str, Tensor], dict[str, dict[int, torch.export.Dim]]]:
    requests, candidates = 2, 3
    shape = scorer.shape
    ids, numbers = torch.int64, torch.float32
    sizes = {
        "candidate_ids": ((requests, candidates, len(shape.candidate_vocabularies)), ids),
        "slot": ((requests,), ids),
        "user_row": ((requests,), ids),
        "request_ids": ((requests, len(shape.request_vocabularies)), ids),
        "request_numbers": ((requests, shape.request_numbers), numbers),
        "candidate_numbers": ((requests, candidates, shape.candidate_numbers), numbers),
        "cohort_item_row": ((requests, candidates), ids),
    }
    roles = names.between()
    example = {role: torch.zeros(*size, dtype=dtype) for role, (size, dtype) in sizes.items() if role in roles}
    axes = {0: torch.export.Dim("requests"), 1: torch.export.Dim("candidates")}
    per_candidate = {"candidate_ids", "candidate_numbers", "cohort_item_row"}
    return example, {role: axes if role in per_candidate else {0: axes[0]} for role in example}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's talk about itself (torchvision, tree specs, axis names) off the operator's screen."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
            warnings.filterwarnings("ignore", category=UserWarning, message=".*axis name.*will not be used.*")
            yield
    finally:
        logger.setLevel(before)


def _inner_graphs(attribute: onnx.AttributeProto) -> Sequence[onnx.GraphProto]:
    """Bodies of control flow."""
    return [attribute.g] if attribute.type == attribute.GRAPH else list(attribute.graphs)


def _rename(graph: onnx.GraphProto, to: Callable[[str], str]) -> None:
    for node in graph.node:
        node.name = f"score/{node.name}"
        node.input[:] = [to(name) for name in node.input]
        node.output[:] = [to(name) for name in node.output]
        for attribute in node.attribute:
            for inner in _inner_graphs(attribute):
                _rename(inner, to)
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = to(value.name)


def _take_out_weights(model: onnx.ModelProto, folder: Path) -> None:
    """Move the parameters' bytes into the external files, in the order of their names."""
    parts: dict[str, bytearray] = {file: bytearray() for file in EXTERNAL.values()}
    for tensor in sorted(model.graph.initializer, key=lambda one: one.name):
        name = tensor.name.removeprefix("score/")
        file = next((file for prefix, file in EXTERNAL.items() if name.startswith(prefix)), None)
        if file is None or tensor.data_type != TensorProto.FLOAT:
            continue
        data = onnx.numpy_helper.to_array(tensor).astype("<f4").tobytes()
        if not data:
            continue
        part = parts[file]
        part.extend(bytes(-len(part) % ALIGNMENT))
        for field in ("raw_data", "float_data", "external_data"):
            tensor.ClearField(field)
        entries = {"location": file, "offset": str(len(part)), "length": str(len(data))}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
        tensor.data_location = TensorProto.EXTERNAL
        part.extend(data)
    for file, part in parts.items():
        (folder / file).write_bytes(part)


def _strip(model: onnx.ModelProto) -> None:
    """Drop everything that says where and by what the graph was made."""
    del model.metadata_props[:]
    model.doc_string, model.producer_name, model.producer_version = "", "nightrank", ""
    _strip_graph(model.graph)


def _strip_graph(graph: onnx.GraphProto) -> None:
    del graph.value_info[:]
    del graph.quantization_annotation[:]
    graph.doc_string = ""
    for described in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del described.metadata_props[:]
        described.doc_string = ""
    for node in graph.node:
        for attribute in node.attribute:
            attribute.doc_string = ""
            for inner in _inner_graphs(attribute):
                _strip_graph(inner)
