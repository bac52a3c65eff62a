"""A score graph that computes in half precision, and what of it must not.

Halves have 11 bits and end at 65,504, so only what is normalised or learned is held and multiplied in them: tables,
layers and the bank. These stay in single precision, whatever stands between them: what goes in (raw numbers, gaps,
statistics) up to where it meets learned numbers, so that normalising never subtracts two halves; normalisations,
softmax and sums over rows; and the products and sums that end in a score, so that a score has no rounding of its own.
"""

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

F16 = npt.NDArray[np.float16]
HALVES = frozenset(
    {
        "Add", "Concat", "Expand", "Gather", "Gemm", "Identity", "MatMul", "Mul", "Relu", "Reshape", "Slice", "Split",
        "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
    }
)  # fmt: skip
"""Operators that compute in half where a half goes in; all others get single precision."""
ENDS = frozenset({"Add", "Concat", "Identity", "Reshape", "Sigmoid", "Slice", "Sub", "Where"})
"""Operators between a product and the scores."""
PRODUCTS = frozenset({"Gemm", "MatMul"})
SMALLEST, LARGEST = np.float16(2.0**-24), np.float16(65504.0)


def halves(values: npt.NDArray[np.float32]) -> F16:
    """Numbers rounded to halves.

    One that is not 0 stays so (an item's factors of 0 mean that it has none), and one beyond the largest half becomes
    that.

    >>> halves(np.array([1 / 3, 1e-30, 0.0, -7e4], np.float32)).tolist()
    [0.333251953125, 5.960464477539063e-08, 0.0, -65504.0]
    """
    near = np.clip(values, -LARGEST.astype(np.float32), LARGEST.astype(np.float32)).astype(np.float16)
    return np.where((near == 0) & (values != 0), np.copysign(SMALLEST, values).astype(np.float16), near)


def to_half(graph: onnx.GraphProto, floats: frozenset[str], held: frozenset[str]) -> None:
    """Let a graph compute in half from the initialisers that are held in half, and cast where the precision changes.

    Args:
        graph: with its nodes in order; changed in place.
        floats: names of all values that were float32.
        held: names of initialisers that are float16 now.
    """
    whole = _ending(graph)
    in_half = set(held)
    nodes: list[onnx.NodeProto] = []
    casts: dict[str, str] = {}

    def as_wanted(name: str, half: bool) -> str:
        if name not in floats or (name in in_half) == half:
            return name
        if name not in casts:
            casts[name] = f"{name}/{'half' if half else 'single'}"
            to = TensorProto.FLOAT16 if half else TensorProto.FLOAT
            nodes.append(helper.make_node("Cast", [name], [casts[name]], f"{name}/cast", to=to))
        return casts[name]

    for node in graph.node:
        outputs = [name for name in node.output if name in floats]
        half = (
            bool(outputs)
            and node.op_type in HALVES
            and node.name not in whole
            and any(name in in_half for name in node.input)
        )
        if node.op_type != "Shape":
            node.input[:] = [as_wanted(name, half) for name in node.input]
        if half:
            in_half.update(outputs)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _ending(graph: onnx.GraphProto) -> frozenset[str]:
    """Names of the nodes between the scores and the products that they are sums of, both included."""
    makers = {name: node for node in graph.node for name in node.output}
    found: set[str] = set()
    open_ends = [value.name for value in graph.output]
    while open_ends:
        node = makers.get(open_ends.pop())
        if node is None or node.name in found or node.op_type not in ENDS | PRODUCTS:
            continue
        found.add(node.name)
        if node.op_type in ENDS:
            open_ends.extend(node.input)
    return frozenset(found)
