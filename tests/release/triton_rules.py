"""Triton's own schema of a model's config, and what a server that follows a config to the letter answers."""

import ast
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from tasks.release.interface import Interface

Arrays = dict[str, npt.NDArray[Any]]
NUMPY = {"TYPE_STRING": object, "TYPE_INT64": np.int64, "TYPE_FP32": np.float32}


def _message() -> Any:
    """The class of `inference.ModelConfig`.

    The generated module asks for the protobuf of its year; the schema in it, a serialised descriptor, does not.
    """
    package = importlib.util.find_spec("tritonclient")
    assert package is not None
    assert package.submodule_search_locations is not None
    source = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    pool = descriptor_pool.DescriptorPool()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "AddSerializedFile":
            data = node.args[0]
            assert isinstance(data, ast.Constant)
            pool.Add(descriptor_pb2.FileDescriptorProto.FromString(data.value))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


MODEL_CONFIG = _message()


def read_config(path: Path) -> Any:
    """A `config.pbtxt`; a field or value that the schema lacks is an error."""
    return text_format.Parse(path.read_text(encoding="utf-8"), MODEL_CONFIG())


def type_of(tensor: Any) -> str:
    """A tensor's type in Triton's words."""
    name: str = tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[tensor.data_type].name
    return name


def shaped(tensor: Any, values: npt.NDArray[Any], back: bool = False) -> npt.NDArray[Any]:
    """What Triton hands on of a tensor: [batch] + dims as callers see it, [batch] + reshape as the graph does."""
    assert values.dtype == NUMPY[type_of(tensor)], tensor.name
    inside = list(tensor.reshape.shape) if tensor.HasField("reshape") else list(tensor.dims)
    outside, seen = (list(tensor.dims), inside) if back else (inside, list(tensor.dims))
    assert len(values.shape) == 1 + len(seen), (tensor.name, values.shape, seen)
    assert all(dim in (-1, size) for dim, size in zip(seen, values.shape[1:], strict=True)), (tensor.name, values.shape)
    return values if outside == seen else values.reshape(values.shape[0], *outside)


def answer_of(repository: Path, model: str, inputs: Arrays) -> Arrays:
    """What a server that follows `config.pbtxt` to the letter answers."""
    config = read_config(repository / model / "config.pbtxt")
    assert config.name == model
    assert {tensor.name for tensor in config.input} == inputs.keys()
    assert all(1 <= len(values) <= config.max_batch_size for values in inputs.values())
    if config.platform == "ensemble":
        found = {tensor.name: shaped(tensor, inputs[tensor.name]) for tensor in config.input}
        for step in config.ensemble_scheduling.step:
            inner = read_config(repository / step.model_name / "config.pbtxt")
            assert inner.max_batch_size >= config.max_batch_size
            assert (repository / step.model_name / str(step.model_version)).is_dir()
            given = {name: found[tensor] for name, tensor in step.input_map.items()}
            gives = answer_of(repository, step.model_name, given)
            found |= {tensor: gives[name] for name, tensor in step.output_map.items()}
        return {tensor.name: shaped(tensor, found[tensor.name]) for tensor in config.output}
    assert config.backend == "onnxruntime"
    path = repository / model / "1" / config.default_model_filename
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {tensor.name: shaped(tensor, inputs[tensor.name]) for tensor in config.input}
    results = session.run([tensor.name for tensor in config.output], given)
    return {
        tensor.name: shaped(tensor, values, back=True) for tensor, values in zip(config.output, results, strict=True)
    }


def as_sent(interface: Interface, inputs: Mapping[str, npt.NDArray[Any]]) -> Arrays:
    """Raw columns as a caller sends them: one value per request as [R, 1]."""
    bare = {spec.name for spec in interface.inputs if spec.shape == ("requests",)}
    return {name: values[:, None] if name in bare else values for name, values in inputs.items()}
