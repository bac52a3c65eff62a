"""What Triton Inference Server is told about a release: `config.pbtxt` of an ensemble and of its two models.

Text in protobuf's text format of Triton's `ModelConfig`; names and meaning of the fields are those of its
`model_config.proto`.

Triton batches along the first axis, which must be the first of every input and output and is left out of `dims`. Every
tensor of a release begins with `requests`, so its graphs are batched as they are. A tensor that has no other axis (a
column of the request, `slot`) may not be told with empty `dims`: callers send it as [R, 1], and Triton takes the last
axis away before the graph sees it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import onnx

from tasks.errors import ParityBroken

Value: TypeAlias = "str | int | tuple[int, ...] | list[tuple[str, Value]]"
Message: TypeAlias = list[tuple[str, Value]]
"""Fields in order: a str is quoted, a `Word` is not, a tuple of numbers stays in line, a `Message` is nested."""
BATCH_AXIS = "requests"
"""Name of the axis that every tensor of a release begins with."""
TYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.INT32: "TYPE_INT32",
    onnx.TensorProto.BOOL: "TYPE_BOOL",
    onnx.TensorProto.STRING: "TYPE_STRING",
}


class Word(str):
    """A name of the schema, such as a value of an enumeration: written without quotes."""


@dataclass(frozen=True)
class Tensor:
    """An input or output as Triton is told about it.

    Attributes:
        name: as in the graph.
        type: a `DataType` of Triton.
        dims: its axes behind the batch axis, -1 for a free one.
    """

    name: str
    type: str
    dims: tuple[int, ...]

    def message(self, ensemble: bool = False) -> Message:
        """The tensor as an input or output; an ensemble has no graph whose shapes could be other ones."""
        told: Message = [("name", self.name), ("data_type", Word(self.type)), ("dims", self.dims or (1,))]
        if not self.dims and not ensemble:
            told.append(("reshape", [("shape", ())]))
        return told


@dataclass(frozen=True)
class Warmup:
    """A request that Triton asks itself before it serves a model.

    Attributes:
        name: for the log.
        batch: how often the one request is repeated.
        inputs: tensor name to the shape behind the batch axis, and to the file below `warmup/`.
    """

    name: str
    batch: int
    inputs: Mapping[str, tuple[tuple[int, ...], str]]


def tensors(values: Iterable[onnx.ValueInfoProto], graph: str) -> tuple[Tensor, ...]:
    """Inputs or outputs of a graph.

    Args:
        values: as the graph declares them.
        graph: its name, for errors.

    Raises:
        ParityBroken: a tensor cannot be batched along its first axis, or is of a type that Triton is not told about.
    """
    found = []
    for value in values:
        kind, axes = value.type.tensor_type.elem_type, value.type.tensor_type.shape.dim
        if not axes or axes[0].dim_param != BATCH_AXIS or kind not in TYPES:
            shown = [axis.dim_param or axis.dim_value for axis in axes]
            raise ParityBroken(
                f"{graph} has {value.name!r} of type {onnx.TensorProto.DataType.Name(kind)} and shape {shown}; Triton "
                f"batches along the first axis, which must be {BATCH_AXIS!r}: this is a defect of the export"
            )
        dims = tuple(-1 if axis.dim_param else axis.dim_value for axis in axes[1:])
        found.append(Tensor(value.name, TYPES[kind], dims))
    return tuple(found)


def model_config(
    name: str,
    graph: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    device: Literal["cpu", "cuda"],
    instances: int,
    max_batch: int,
    gather: bool,
    warmups: Sequence[Warmup],
) -> str:
    """`config.pbtxt` of one graph on the onnxruntime backend.

    Args:
        name: of the model and its folder.
        graph: file name in the version's folder.
        inputs: what it takes.
        outputs: what it gives.
        device: where it runs.
        instances: copies of it, each with its own memory.
        max_batch: most requests of one call.
        gather: whether Triton may put calls together that wait for the same instance (dynamic batching).
        warmups: asked before it serves.
    """
    types = {tensor.name: tensor.type for tensor in inputs}
    message: Message = [
        ("name", name),
        ("backend", "onnxruntime"),
        ("max_batch_size", max_batch),
        *(("input", tensor.message()) for tensor in inputs),
        *(("output", tensor.message()) for tensor in outputs),
        ("instance_group", [("count", instances), ("kind", Word("KIND_GPU" if device == "cuda" else "KIND_CPU"))]),
        ("default_model_filename", graph),
    ]
    if gather:
        message.append(("dynamic_batching", []))
    for warmup in warmups:
        told: Message = [("name", warmup.name), ("batch_size", warmup.batch)]
        for key, (dims, file) in warmup.inputs.items():
            value: Message = [("data_type", Word(types[key])), ("dims", dims or (1,)), ("input_data_file", file)]
            told.append(("inputs", [("key", key), ("value", value)]))
        message.append(("model_warmup", told))
    return pbtxt(message)


def ensemble_config(
    name: str,
    version: int,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    steps: Sequence[tuple[str, Sequence[Tensor], Sequence[Tensor]]],
    max_batch: int,
) -> str:
    """`config.pbtxt` of an ensemble whose tensors are called as in the graphs.

    Args:
        name: of the ensemble and its folder.
        version: the one version that it serves.
        inputs: what a caller sends.
        outputs: what he gets.
        steps: model, its inputs and its outputs, in order.
        max_batch: most requests of one call.
    """
    told: Message = []
    for model, takes, gives in steps:
        maps = [("input_map", tensor.name) for tensor in takes] + [("output_map", tensor.name) for tensor in gives]
        mapped: Message = [(field, [("key", tensor), ("value", tensor)]) for field, tensor in maps]
        told.append(("step", [("model_name", model), ("model_version", 1), *mapped]))
    return pbtxt(
        [
            ("name", name),
            ("platform", "ensemble"),
            ("max_batch_size", max_batch),
            *(("input", tensor.message(ensemble=True)) for tensor in inputs),
            *(("output", tensor.message(ensemble=True)) for tensor in outputs),
            ("version_policy", [("specific", [("versions", (version,))])]),
            ("ensemble_scheduling", told),
        ]
    )


def pbtxt(message: Message, depth: int = 0) -> str:
    r"""A message in protobuf's text format.

    >>> print(pbtxt([("name", 'a "b"'), ("kind", Word("KIND_CPU")), ("dims", (-1, 2)), ("reshape", [("shape", ())])]))
    name: "a \"b\""
    kind: KIND_CPU
    dims: [-1, 2]
    reshape {
      shape: []
    }
    <BLANKLINE>
    """
    pad, lines = "  " * depth, []
    for name, value in message:
        if isinstance(value, list):
            lines.append(f"{pad}{name} {{\n{pbtxt(value, depth + 1)}{pad}}}\n")
        elif isinstance(value, tuple):
            lines.append(f"{pad}{name}: [{', '.join(map(str, value))}]\n")
        else:
            said = _quoted(value) if isinstance(value, str) and not isinstance(value, Word) else value
            lines.append(f"{pad}{name}: {said}\n")
    return "".join(lines)


def _quoted(text: str) -> str:
    """A string as the text format has it; bytes that are no printable ASCII in octal."""
    plain = {34: '\\"', 92: "\\\\"}
    return '"' + "".join(plain.get(b, chr(b) if 32 <= b < 127 else f"\\{b:03o}") for b in text.encode()) + '"'
