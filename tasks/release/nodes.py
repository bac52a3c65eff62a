"""Nodes of the look-up graph, one method per kind that it needs."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
import pyarrow as pa
from onnx import helper, numpy_helper

from tasks.release.external import ExternalFiles
from tasks.release.key_tables import PREFIX, KeyTable, build_table
from tasks.release.tables import ServingTables

I64 = npt.NDArray[np.int64]
VOCABULARY, SEGMENTS, COHORT = "lookup_vocabulary.bin", "lookup_segments.bin", "lookup_cohort.bin"
"""Files of tables of many keys: those of columns, which only grow, of segments, and of pairs of cohort and item."""
PARTS = ("starts", "keys", "values")
"""Arrays of a table that lie in a file."""
CONTRIBUTED = "com.microsoft"
"""Domain of onnxruntime's own operators."""
ENCODER_KEYS = 20_000
"""Keys that a node may hold as attributes. They are read and put into a hash map whenever a release is loaded; more
lie in a table that is mapped."""


class Graph:
    """Nodes and constants of a graph under construction; methods give the name of what they make.

    Args:
        files: get the tables of look-ups with many keys; None keeps all keys in nodes.
        encoder_keys: a look-up of more keys is a table.
    """

    def __init__(self, files: ExternalFiles | None = None, encoder_keys: int = ENCODER_KEYS) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self._files, self._encoder_keys = files, encoder_keys

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

    def without(self, values: str, refused: str, output: str) -> str:
        """Numbers [R, F, K], NaN throughout where an integer [R] is not 0."""
        axis = self.number(-1, axis=True)
        whole = self.node(
            "Unsqueeze", [self.node("Unsqueeze", [refused, axis], f"{refused}/column"), axis], f"{refused}/all"
        )
        hit = self.node("Cast", [whole], f"{refused}/hit", to=onnx.TensorProto.BOOL)
        return self.node("Where", [hit, self._constant("nan", np.array(np.nan, np.float32)), values], output)

    def keys_of(self, tables: ServingTables, name: str, column: str, output: str, listed: bool) -> str:
        """The ids of a column's keys.

        Args:
            tables: hold the vocabularies.
            name: the column's in the lake.
            column: what is looked up.
            output: gets the ids, 0 where a key is unknown.
            listed: whether what fills lists up has an id that says so.
        """
        table = f"{name}/listed" if listed else name
        return self.look_up(column, output, *tables.entries(name, listed), 0, VOCABULARY, table)

    def look_up(
        self, column: str, output: str, keys: pa.Array | I64, values: I64, default: int, file: str, name: str
    ) -> str:
        """A look-up; without keys it is a constant, since the operator wants at least one.

        Args:
            column: what is looked up.
            output: gets what is found, int64 of the same shape.
            keys: distinct strings or integers.
            values: what is found of each.
            default: what is found of every other key.
            file: gets the table, where there are many keys.
            name: the table's.
        """
        if not len(keys):
            return self._nothing(column, output, default)
        if self._files is None or len(keys) <= self._encoder_keys:
            return self._encoder(column, output, keys.tolist(), values, default)
        table = build_table(keys, values, default)
        parts = {part: self._files.place(file, f"lookup/{name}/{part}", getattr(table, part)) for part in PARTS}
        return self._table(column, output, table, {part: self._kept(tensor) for part, tensor in parts.items()})

    def _encoder(self, column: str, output: str, keys: list[int] | list[str], values: I64, default: int) -> str:
        name = f"lookup/LabelEncoder{len(self.nodes)}"
        node = helper.make_node("LabelEncoder", [column], [output], name=name, domain="ai.onnx.ml")
        kind = "strings" if isinstance(keys[0], str) else "int64s"
        attribute = node.attribute.add(name=f"keys_{kind}")
        if kind == "strings":
            attribute.type = onnx.AttributeProto.STRINGS
            attribute.strings.extend(str(key).encode() for key in keys)
        else:
            attribute.type = onnx.AttributeProto.INTS
            attribute.ints.extend(keys)
        node.attribute.add(name="values_int64s", type=onnx.AttributeProto.INTS).ints.extend(values.tolist())
        node.attribute.append(helper.make_attribute("default_int64", default))
        self.nodes.append(node)
        return output

    def _table(self, column: str, output: str, table: KeyTable, parts: Mapping[str, str]) -> str:
        """What `KeyTable.find` does."""
        low = self._hash(column, f"{output}/low", table.seeds[0])
        wanted = column
        if table.strings:
            prefix = self._constant("prefix", np.array(PREFIX, object))
            behind = self.node("StringConcat", [prefix, column], f"{output}/behind")
            high = self._hash(behind, f"{output}/high", table.seeds[1])
            high = self.node("Cast", [high], f"{output}/high/wide", to=onnx.TensorProto.INT64)
            high = self.node("Mul", [high, self.number(2**32)], f"{output}/high/bits")
            wide = self.node("Cast", [low], f"{output}/low/wide", to=onnx.TensorProto.INT64)
            wanted = self.node("Add", [high, wide], f"{output}/wanted")
        mask = self._constant(f"mask{table.mask}", np.array(table.mask, np.int32))
        bucket = self.node("BitwiseAnd", [low, mask], f"{output}/bucket")
        start = self.node("Gather", [parts["starts"], bucket], f"{output}/start")
        along = self._constant(f"places{table.probes}", np.arange(table.probes, dtype=np.int32))
        places = self.node("Add", [start, along], f"{output}/places")
        there = self.node("Gather", [parts["keys"], places], f"{output}/there")
        wanted = self.node("Unsqueeze", [wanted, self.number(-1, axis=True)], f"{output}/wanted/column")
        same = self.node("Equal", [there, wanted], f"{output}/same")
        given = self.node("Gather", [parts["values"], places], f"{output}/given")
        given = self.node("Where", [same, given, self._constant("none", np.array(0, np.int32))], f"{output}/matches")
        found = self.node("ReduceSum", [given, self.number(-1, axis=True)], f"{output}/sum", keepdims=0)
        # Of no elements onnxruntime's reductions keep the axis that they should take away.
        shape = self.node("Shape", [column], f"{output}/shape")
        found = self.node("Reshape", [found, shape], f"{output}/found", allowzero=1)
        if not table.default:
            return self.node("Cast", [found], output, to=onnx.TensorProto.INT64)
        found = self.node("Cast", [found], f"{output}/found/wide", to=onnx.TensorProto.INT64)
        return self.node("Add", [found, self.number(table.default)], output)

    def _hash(self, column: str, output: str, seed: int) -> str:
        node = helper.make_node("MurmurHash3", [column], [output], f"lookup/MurmurHash3{len(self.nodes)}")
        node.domain = CONTRIBUTED
        node.attribute.extend(helper.make_attribute(key, value) for key, value in {"positive": 0, "seed": seed}.items())
        self.nodes.append(node)
        return output

    def _constant(self, name: str, values: npt.NDArray[np.generic]) -> str:
        return self._kept(numpy_helper.from_array(values, f"lookup/{name}"))

    def _kept(self, tensor: onnx.TensorProto) -> str:
        self.constants[tensor.name] = tensor
        return tensor.name

    def _nothing(self, column: str, output: str, default: int) -> str:
        shape = self.node("Shape", [column], f"{output}/shape")
        value = numpy_helper.from_array(np.array([default], np.int64))
        return self.node("ConstantOfShape", [shape], output, value=value)
