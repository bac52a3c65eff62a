"""Nodes of the look-up graph, one method per kind that it needs."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

I64 = npt.NDArray[np.int64]


class Graph:
    """Nodes and constants of a graph under construction; methods give the name of what they make."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def node(self, kind: str, inputs: Sequence[str], output: str, **attributes: int | onnx.TensorProto) -> str:
        """One node of the standard operators."""
        name = f"lookup/{kind}{len(self.nodes)}"
        node = helper.make_node(kind, list(inputs), [output], name=name)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.nodes.append(node)
        return output

    def number(self, value: int, axis: bool = False) -> str:
        """A constant integer: a scalar, or a vector of one."""
        name = f"lookup/{'axis' if axis else 'number'}{value}"
        self.constants[name] = numpy_helper.from_array(np.array([value] if axis else value, np.int64), name)
        return name

    def stack(self, columns: Sequence[str], output: str) -> str:
        """Columns side by side on a new last axis."""
        axis = self.number(-1, axis=True)
        parts = [self.node("Unsqueeze", [one, axis], f"{output}/{position}") for position, one in enumerate(columns)]
        return self.node("Concat", parts, output, axis=-1)

    def mixed_radix(self, columns: Sequence[str], radices: Sequence[int], output: str) -> str:
        """Columns of ids as one key, as `segments.mixed_radix` makes it."""
        key = columns[0]
        for position, (column, radix) in enumerate(zip(columns[1:], radices[1:], strict=True)):
            scaled = self.node("Mul", [key, self.number(radix)], f"{output}/scaled{position}")
            key = self.node("Add", [scaled, column], f"{output}/key{position}")
        return key

    def encoder(
        self, column: str, output: str, keys: Sequence[int] | Sequence[str] | I64, values: I64, default: int
    ) -> str:
        """A look-up node; without keys it is a constant, since the operator wants at least one."""
        listed = keys.tolist() if isinstance(keys, np.ndarray) else list(keys)
        kind = "strings" if listed and isinstance(listed[0], str) else "int64s"
        if not listed:
            return self._nothing(column, output, default)
        name = f"lookup/LabelEncoder{len(self.nodes)}"
        node = helper.make_node("LabelEncoder", [column], [output], name=name, domain="ai.onnx.ml")
        attribute = node.attribute.add(name=f"keys_{kind}")
        if kind == "strings":
            attribute.type = onnx.AttributeProto.STRINGS
            attribute.strings.extend(str(key).encode() for key in listed)
        else:
            attribute.type = onnx.AttributeProto.INTS
            attribute.ints.extend(listed)
        node.attribute.add(name="values_int64s", type=onnx.AttributeProto.INTS).ints.extend(values.tolist())
        node.attribute.append(helper.make_attribute("default_int64", default))
        self.nodes.append(node)
        return output

    def _nothing(self, column: str, output: str, default: int) -> str:
        shape = self.node("Shape", [column], f"{output}/shape")
        value = numpy_helper.from_array(np.array([default], np.int64))
        return self.node("ConstantOfShape", [shape], output, value=value)
