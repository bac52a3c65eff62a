"""A score graph whose learned numbers are bytes with a scale per row, and which computes as ever.

A row of a table or of a layer is held as ``scale x q``, q a whole number from -127 to 127 and the scale the row's
largest number over 127 (symmetric quantisation, per row and not per tensor: Krishnamoorthi, Quantizing deep
convolutional networks for efficient inference, 2018, sections 2.2 and 3). Rows are gathered as bytes and become float32
behind the gather; layers become float32 before they are used, which onnxruntime does once, when it loads. Activations
are not quantised, so no score depends on what else is in its batch.

Shapes: N rows, W numbers of a row, G groups of a row that have a scale each, w numbers of a group.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

F32 = npt.NDArray[np.float32]
I8 = npt.NDArray[np.int8]
LEVELS = 127


def quantise(values: F32) -> tuple[I8, F32]:
    """Rows as bytes and scales.

    Args:
        values: ``[..., w]``.

    Returns:
        Bytes ``[..., w]`` and scales ``[..., 1]``; a row of zeros has the scale 0.

    >>> q, scale = quantise(np.array([[0.5, -1.27, 0.004]], np.float32))
    >>> q.tolist(), scale.round(4).tolist()
    ([[50, -127, 0]], [[0.009999999776482582]])
    """
    scale = (np.abs(values).max(axis=-1, keepdims=True, initial=0.0) / LEVELS).astype(np.float32)
    parts = np.divide(values, scale, out=np.zeros_like(values), where=scale > 0)
    return np.clip(np.rint(parts), -LEVELS, LEVELS).astype(np.int8), scale


def bytes_of(name: str) -> str:
    """What the bytes of an initialiser are called."""
    return f"{name}/bytes"


def scale_of(name: str) -> str:
    """What the scales of an initialiser are called."""
    return f"{name}/scale"


def gathered(graph: onnx.GraphProto, name: str) -> bool:
    """Whether an initialiser is a table: nothing but its rows is ever read."""
    readers = [node for node in graph.node if name in node.input]
    return bool(readers) and all(
        node.op_type == "Gather"
        and node.input[0] == name
        and all(attribute.i == 0 for attribute in node.attribute if attribute.name == "axis")
        for node in readers
    )


def to_int8(
    graph: onnx.GraphProto, tables: Mapping[str, int], layers: Sequence[str], ranks: Mapping[str, int]
) -> Sequence[onnx.TensorProto]:
    """Let a graph read bytes and scales in place of float32 initialisers, which it no longer names.

    Args:
        graph: with its nodes in order; changed in place.
        tables: names of initialisers whose rows are gathered, to the groups G of a row.
        layers: names of the others.
        ranks: axes of the values that gathers give.

    Returns:
        Small initialisers that it names now beside bytes and scales.
    """
    nodes: list[onnx.NodeProto] = []
    shapes: dict[str, onnx.TensorProto] = {}
    widths = {tensor.name: tensor.dims[-1] for tensor in graph.initializer}

    def add(operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], output, **attributes))
        return output

    def constant(values: Sequence[int]) -> str:
        name = f"score/int8/{'_'.join(map(str, values))}"
        shapes[name] = onnx.numpy_helper.from_array(np.array(values, np.int64), name)
        return name

    def product(whole: str, scale: str, output: str, groups: int, axes: int, width: int) -> None:
        """Bytes ``[..., W]`` times scales ``[..., G]``."""
        single = add("Cast", [whole], f"{output}/single", to=TensorProto.FLOAT)
        if groups == 1:
            add("Mul", [single, scale], output)
            return
        split = constant([*[0] * (axes - 1), groups, width // groups])
        parts = add("Reshape", [single, split], f"{output}/groups")
        scales = add("Unsqueeze", [scale, constant([-1])], f"{output}/scales")
        scaled = add("Mul", [parts, scales], f"{output}/scaled")
        add("Reshape", [scaled, constant([*[0] * (axes - 1), width])], output)

    for name in layers:
        product(bytes_of(name), scale_of(name), name, 1, 0, 0)
    for node in graph.node:
        if node.op_type != "Gather" or node.input[0] not in tables:
            nodes.append(node)
            continue
        (name, ids), (output,) = node.input, node.output
        whole = add("Gather", [bytes_of(name), ids], f"{output}/bytes", axis=0)
        scale = add("Gather", [scale_of(name), ids], f"{output}/scale", axis=0)
        product(whole, scale, output, tables[name], ranks[output], widths[name])
    del graph.node[:]
    graph.node.extend(nodes)
    return list(shapes.values())
