"""Graphs of bases that are bent or attend: onnxruntime against the learning code, and what they are made from."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.errors import ParityBroken
from tasks.learning.adapters import Adaptation, AdapterConfig
from tasks.release.golden import check_parity, draw_requests, make_golden
from tasks.release.graphs import export
from tasks.release.lookups import encode, wires
from tasks.release.scorer import Scorer, traced_from
from tests.release.test_graphs import ask
from tests.releases import make_graph, make_parts, record_answers

KINDS = {
    "lora": ("full", AdapterConfig(kind="lora", rank=2)),
    "dense": ("clashing", AdapterConfig(kind="gradient", bends="dense")),
    "film": ("full", AdapterConfig(kind="film")),
    "matching": ("full", AdapterConfig(kind="matching", prototypes=3)),
}
TRACED = ("lora", "dense")
"""A graph takes long to trace; those of the other kinds are in whole nights."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_many_segments_says_what_the_learning_code_says(kind: str, tmp_path: Path) -> None:
    """Every request under its own adapter; those of slot 0 are the base's, to the last digit of parity."""
    release, adapter = KINDS[kind]
    data, network, bank, tables, rows = make_parts(release, bent=adapter.bent, prototypes=adapter.matching)
    assert bank.shape[2] == network.width == adapter.width(network.width)
    bank *= np.float32(0.5)
    bank[1] = 0.0
    golden = make_golden(network, bank, tables, data, draw_requests(data, rows, history=tables.history))
    one = golden[-2]
    encoded = {role: torch.from_numpy(np.array(ids)) for role, ids in encode(data, tables, one.inputs).items()}
    seen = record_answers(network, len(encoded["slot"]))
    with torch.no_grad():
        answers = Scorer(network, bank, tables.statistics).eval()(**encoded).numpy()
    ((logits, inputs),) = seen
    requests, candidates = logits.shape[:2]
    slots = encoded["slot"].numpy()
    assert len(np.unique(slots)) > 3
    with torch.no_grad():
        scores = Adaptation.of(network, adapter).scores(
            logits.flatten(0, 1), inputs.flatten(0, 1), torch.from_numpy(bank), np.repeat(slots, candidates)
        ).reshape(requests, candidates, -1)  # fmt: skip
    binary = torch.tensor([objective == "binary" for objective in network.shape.kinds])
    expected = torch.where(binary, torch.sigmoid(scores), scores).numpy()
    np.testing.assert_allclose(answers, expected, rtol=2e-5, atol=2e-5)
    base = torch.where(binary, torch.sigmoid(logits), logits).numpy()
    plain = np.abs(bank[slots]).max(axis=(1, 2)) == 0
    np.testing.assert_allclose(answers[plain], base[plain], rtol=1e-5, atol=1e-5)
    assert np.abs(answers[~plain] - base[~plain]).max() > 0.05
    if kind not in TRACED:
        return
    graph = make_graph(release, adapter.bent)
    export(network, bank, tables, data, tmp_path, lambda *_: graph)
    assert check_parity(data, tables, golden, tmp_path).scores > 0
    assert (tmp_path / "bank.bin").stat().st_size == 4 * bank.size
    np.testing.assert_allclose(ask(tmp_path, "model.onnx", dict(one.inputs)), answers, rtol=2e-5, atol=2e-5)
    for requests, candidates in ((1, 1), (1, 7), (3, 0), (0, 2)):
        cut = first_of(one.inputs, data, requests, candidates)
        assert ask(tmp_path, "model.onnx", cut).shape == (requests, candidates, len(data.objectives))


def first_of(inputs, data, requests, candidates):  # type: ignore[no-untyped-def]
    """The first requests and candidates of a request."""
    per = {column.name: column.role for column in data.columns}
    return {
        name: values[:requests, :candidates] if per[name] in ("item", "candidate") else values[:requests]
        for name, values in inputs.items()
    }


def test_a_graph_is_remembered_by_what_adapters_read() -> None:
    data, network, _, tables, _ = make_parts("lean")
    names = wires(data, tables)
    bents = [None, *(AdapterConfig(**kind).bent for kind in (
        {"kind": "film"}, {"kind": "lora"}, {"kind": "lora", "rank": 3}, {"kind": "gradient", "bends": "dense"}
    ))]  # fmt: skip
    keys = [str(traced_from(network.shape, network.config, names, bent)) for bent in bents]
    keys += [str(traced_from(network.shape, network.config, names, prototypes=prototypes)) for prototypes in (3, 4)]
    assert len(set(keys)) == len(bents) + 2
    assert traced_from(network.shape, network.config, names) == traced_from(network.shape, network.config, names, None)


def test_a_bank_of_another_kind_is_refused(tmp_path: Path) -> None:
    data, network, _, tables, _ = make_parts("lean", bent=AdapterConfig(kind="film").bent)
    linear = make_parts("lean")[2]
    with pytest.raises(ParityBroken, match=rf"float32 \[slots, 1, {network.width}\]"):
        export(network, linear, tables, data, tmp_path)
