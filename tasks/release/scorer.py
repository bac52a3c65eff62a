"""The network, the statistics and the bank as one module, and the ONNX graph that is traced from it.

A graph depends on the network's layers and on what goes in, not on a weight nor on how many users, items and segments
there are: it is traced from a blank network once, and filled with each night's numbers. The exporter's metadata (stack
traces with source paths) is stripped, so that equal layers give equal bytes wherever they are traced.

Shapes: R requests, M candidates, F rows of feedback, H entries of a history, K objectives, D numbers of an adapter per
objective.
"""

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from tasks.data.statistics import StatisticsTables
from tasks.learning import attention, bending, feedback, layers, lists, networks, positive, solvers
from tasks.learning.bending import Bent
from tasks.learning.layers import at_positions
from tasks.learning.networks import Ranker
from tasks.learning.ranker_config import RankerConfig
from tasks.learning.ranker_shape import RankerShape
from tasks.release import exported
from tasks.release.exported import cast_constants, rename, strip
from tasks.release.lookups import IR_VERSION, OPSETS, Wires, as_model

F32 = npt.NDArray[np.float32]
PREFIX = "score/"
"""All names in the graph are the release's own or begin with this; then comes a parameter's name in the scorer."""
VOCABULARIES = (
    *("request_vocabularies", "candidate_vocabularies"),
    *("request_value_vocabularies", "candidate_value_vocabularies"),
)
"""Fields of a shape that say how many rows tables have, which no graph says."""
# Read with the modules: what lies on the disk later may be newer than what runs.
_MODULES = (attention, bending, exported, feedback, layers, lists, networks, positive, solvers)
_FILES = (*(str(module.__file__) for module in _MODULES), __file__)
_CODE = hashlib.sha256(b"".join(Path(file).read_bytes() for file in _FILES)).hexdigest()


@dataclass(frozen=True)
class Solving:
    """How the adapter of a user who brings feedback is solved.

    Attributes:
        rows: most rows of feedback that a request holds.
        steps: Newton steps.
        precision: of the user's level, float32 [K, D], D the width of what is solved: 1 for a constant alone.
    """

    rows: int
    steps: int
    precision: F32


class Scorer(nn.Module):
    """Ids and numbers in, scores out: the network with the statistics and the bank gathered inside."""

    statistics_item: Tensor
    statistics_user: Tensor
    statistics_cohort_item: Tensor
    bank: Tensor
    precision: Tensor

    def __init__(
        self, network: Ranker, bank: F32, statistics: StatisticsTables, solving: Solving | None = None
    ) -> None:
        """Join the parts.

        Args:
            network: the shared network; ids beyond its embedding tables count as unknown in it.
            bank: adapter weights [slots, K, D], D the network's width; slot 0 is the base.
            statistics: as-of statistics by vocabulary id.
            solving: how feedback is solved; None for a scorer that takes none.
        """
        super().__init__()
        self.network = network
        self.shape = network.shape
        for name in ("item", "user", "cohort_item"):
            self.register_buffer(f"statistics_{name}", torch.from_numpy(getattr(statistics, name).copy()))
        before = statistics.item.shape[1]
        self.of_user = tuple(at - before for at in self.shape.request_statistics)
        self.objectives, self.features = bank.shape[1:]
        self.register_buffer("bank", torch.from_numpy(bank.reshape(len(bank), -1).copy()))
        self.solving = solving
        if solving is not None:
            self.register_buffer("precision", torch.from_numpy(solving.precision.copy()))

    def forward(
        self,
        candidate_ids: Tensor,
        slot: Tensor,
        user_row: Tensor,
        request_ids: Tensor | None = None,
        request_numbers: Tensor | None = None,
        candidate_numbers: Tensor | None = None,
        cohort_item_row: Tensor | None = None,
        request_values: Tensor | None = None,
        candidate_values: Tensor | None = None,
        request_vectors: Tensor | None = None,
        candidate_vectors: Tensor | None = None,
        history_ids: Tensor | None = None,
        history_labels: Tensor | None = None,
        history_gaps: Tensor | None = None,
        parent_slot: Tensor | None = None,
        feedback_labels: Tensor | None = None,
    ) -> Tensor:
        """Score candidates.

        With feedback, what is per candidate holds the rows of feedback before the candidates: M is then F + M, but in
        the scores.

        Args:
            candidate_ids: vocabulary ids [R, M, 1 + Cc], the item's first; ids that the network is too old for count
                as unknown, but still find their statistics.
            slot: adapter of each request [R].
            user_row: vocabulary id of each request's user [R].
            request_ids: vocabulary ids [R, Cr]; None if there are none, as for the rest.
            request_numbers: raw numbers [R, Fr], NaN where missing.
            candidate_numbers: raw numbers [R, M, Fc].
            cohort_item_row: row of the cohort x item statistics [R, M]; 0 is a pair that was never seen.
            request_values: ids of `multi` request columns side by side [R, V], -1 behind a list's end.
            candidate_values: of candidate columns [R, M, V].
            request_vectors: `dense` request columns side by side [R, L], NaN where a vector is missing.
            candidate_vectors: of candidate columns [R, M, L].
            history_ids: vocabulary ids of the user's recent rows, as the candidate's, newest first [R, H, 1 + Cc], -1
                behind the oldest. A request's are encoded once, whatever the number of its candidates.
            history_labels: labels of their first objective [R, H], NaN where missing.
            history_gaps: seconds between them and the request [R, H].
            parent_slot: adapter of each request's segment above the user [R].
            feedback_labels: [R, F, K], NaN where missing; a row without any is none.

        Returns:
            Probabilities (binary) or values (rating), float32 [R, M, K].
        """
        requests, candidates = candidate_ids.shape[:2]
        # Rows are laid end to end, where a layer is one product with its bias, and a request's own layers run once.
        flat_ids = candidate_ids.flatten(0, 1)
        item, user = embedding(flat_ids[:, 0], self.statistics_item), embedding(user_row, self.statistics_user)

        def spread(values: Tensor) -> Tensor:
            return values.unsqueeze(1).expand(requests, candidates, values.shape[-1]).flatten(0, 1)

        statistics = [item, spread(user)]
        if cohort_item_row is not None:
            pair_row = cohort_item_row.flatten(0, 1)
            pair = embedding(pair_row, self.statistics_cohort_item)
            unseen = torch.cat([item[..., :-1], torch.zeros_like(item[..., -1:])], dim=-1)
            statistics.append(torch.where((pair_row == 0).unsqueeze(-1), unseen, pair))
        none = user[..., :0]
        asking = self.network.ask(
            none.to(torch.int64) if request_ids is None else request_ids,
            none if request_numbers is None else request_numbers,
            at_positions(user, self.of_user),
            request_values,
            request_vectors,
        )
        logits, features = self.network.answer(
            spread(asking),
            flat_ids,
            item[..., :0] if candidate_numbers is None else candidate_numbers.flatten(0, 1),
            torch.cat(statistics, dim=-1),
            None if candidate_values is None else candidate_values.flatten(0, 1),
            None if candidate_vectors is None else candidate_vectors.flatten(0, 1),
            history_ids,
            history_labels,
            history_gaps,
        )
        logits, features = (part.reshape(requests, candidates, part.shape[-1]) for part in (logits, features))
        adapter = self._adapter(slot, requests)
        if self.solving is not None:
            assert parent_slot is not None
            assert feedback_labels is not None
            given, width = feedback_labels.shape[1], self.precision.shape[1]
            features = features[..., :width]
            adapter = self.solved(
                *(logits[:, :given], features[:, :given], feedback_labels),
                *(self._adapter(parent_slot, requests)[..., :width], adapter[..., :width]),
            )
            logits, features = logits[:, given:], features[:, given:]
        values = logits + self.network.change(features, adapter)
        ends = [at for at in range(1, len(self.shape.kinds)) if len(set(self.shape.kinds[at - 1 : at + 1])) > 1]
        runs = [slice(*run) for run in pairwise([0, *ends, len(self.shape.kinds)])]
        said = [
            torch.sigmoid(values[..., run]) if self.shape.kinds[run.start] == "binary" else values[..., run]
            for run in runs
        ]
        return torch.cat(said, dim=-1) if len(said) > 1 else said[0]

    def solved(self, logits: Tensor, features: Tensor, labels: Tensor, parent: Tensor, own: Tensor) -> Tensor:
        """Weights that serve each request, of its rows of feedback; as for `feedback.adapted`."""
        assert self.solving is not None
        kinds, steps, rows = self.shape.kinds, self.solving.steps, self.solving.rows
        return feedback.adapted(logits, features, labels, parent, own, self.precision, kinds, steps, rows)

    def _adapter(self, slot: Tensor, requests: int) -> Tensor:
        return embedding(slot, self.bank).reshape(requests, self.objectives, self.features)


def traced_from(
    shape: RankerShape,
    config: RankerConfig,
    names: Wires,
    bent: Bent | None = None,
    prototypes: int = 0,
    solving: Solving | None = None,
) -> dict[str, object]:
    """What ``trace`` depends on, as JSON: layers, inputs, format, our code and the exporter's versions."""
    layers = shape.model_dump(mode="json", exclude={*VOCABULARIES, "names"})
    solved = None if solving is None else [solving.rows, solving.steps, *solving.precision.shape]
    return {
        "layers": layers,
        "tables": [len(shape.request_vocabularies), len(shape.candidate_vocabularies)],
        "ranker": config.model_dump(mode="json"),
        "bent": None if bent is None else asdict(bent),
        "prototypes": prototypes,
        "wires": {**names.between(solving is not None), "scores": names.scores},
        "solving": solved,
        "format": {"ir": IR_VERSION, "opsets": OPSETS},
        "code": _CODE,
        "versions": {package: version(package) for package in ("torch", "onnx", "onnx-ir", "onnxscript")},
    }


def trace(
    shape: RankerShape,
    config: RankerConfig,
    names: Wires,
    bent: Bent | None = None,
    prototypes: int = 0,
    solving: Solving | None = None,
) -> bytes:
    """The graph of a scorer with these layers.

    Args:
        shape: what the layers are sized by; how many rows its vocabularies have does not matter.
        config: the ranker's.
        names: what the inputs and the output are called.
        bent: what adapters bend of the dense layers; None if they are linear.
        prototypes: that rows have shares in, where adapters match; 0 for others.
        solving: of what size the systems of feedback are; None for a graph that takes none.

    Returns:
        A serialised ``ModelProto``; its initialisers that are called ``PREFIX`` and the name of a parameter or buffer
        of ``Scorer`` are blank, the others are constants.
    """
    scorer = _blank(shape, config, bent, prototypes, solving)
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
    graph = program.model_proto.graph
    cast_constants(graph)
    model = as_model(graph)
    given = {**names.between(solving is not None), "scores": names.scores}
    rename(model.graph, PREFIX, lambda name: given.get(name) or (f"{PREFIX}{name}" if name else ""))
    model.graph.name = "score"
    strip(model.graph)
    held = {f"{PREFIX}{name}" for name in numbers_of(scorer)}
    for tensor in model.graph.initializer:
        if tensor.name in held:
            blank = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type)
            tensor.CopyFrom(blank)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def numbers_of(scorer: Scorer) -> dict[str, Tensor]:
    """Parameters and buffers by name, also those that a checkpoint leaves out."""
    return {**dict(scorer.named_parameters()), **dict(scorer.named_buffers())}


def _blank(
    shape: RankerShape, config: RankerConfig, bent: Bent | None, prototypes: int, solving: Solving | None
) -> Scorer:
    """A scorer with the right layers, and tables of one row."""
    rows = {name: (1,) * len(getattr(shape, name)) for name in VOCABULARIES}
    network = Ranker(shape.model_copy(update=rows), config, bent, prototypes)
    objectives = len(shape.kinds)
    table = np.zeros((1, objectives + 1), np.float32)
    statistics = StatisticsTables(
        names=(),
        base=np.zeros(objectives, np.float32),
        item=table,
        user=table,
        cohort_columns=(),
        cohort_radices=(),
        cohort_item_keys=np.zeros(0, np.int64),
        cohort_item=table,
    )
    return Scorer(network, np.zeros((1, objectives, network.width), np.float32), statistics, solving)


def _example(scorer: Scorer, names: Wires) -> tuple[dict[str, Tensor], dict[str, dict[int, torch.export.Dim]]]:
    requests, given = 2, 0 if scorer.solving is None else 2
    candidates = given + 3
    shape = scorer.shape
    ids, numbers = torch.int64, torch.float32
    entries = (requests, scorer.network.config.history)
    sizes = {
        "candidate_ids": ((requests, candidates, len(shape.candidate_vocabularies)), ids),
        "slot": ((requests,), ids),
        "user_row": ((requests,), ids),
        "request_ids": ((requests, len(shape.request_vocabularies)), ids),
        "request_numbers": ((requests, shape.request_numbers), numbers),
        "candidate_numbers": ((requests, candidates, shape.candidate_numbers), numbers),
        "cohort_item_row": ((requests, candidates), ids),
        "request_values": ((requests, sum(shape.request_values)), ids),
        "candidate_values": ((requests, candidates, sum(shape.candidate_values)), ids),
        "request_vectors": ((requests, sum(shape.request_vectors)), numbers),
        "candidate_vectors": ((requests, candidates, sum(shape.candidate_vectors)), numbers),
        "history_ids": ((*entries, len(shape.candidate_vocabularies)), ids),
        "history_labels": (entries, numbers),
        "history_gaps": (entries, ids),
        "parent_slot": ((requests,), ids),
        "feedback_labels": ((requests, given, len(shape.kinds)), numbers),
    }
    roles = names.between(scorer.solving is not None)
    example = {role: torch.zeros(*size, dtype=dtype) for role, (size, dtype) in sizes.items() if role in roles}
    axes = {0: torch.export.Dim("requests"), 1: torch.export.Dim("candidates")}
    per_candidate = {"candidate_ids", "candidate_numbers", "cohort_item_row", "candidate_values", "candidate_vectors"}
    dims = {role: axes if role in per_candidate else {0: axes[0]} for role in example}
    if scorer.solving is not None:
        dims["feedback_labels"] = {0: axes[0], 1: torch.export.Dim("feedback")}
    return example, dims


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
