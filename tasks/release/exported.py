"""What torch's exporter leaves in a graph, put in order: names, constants, and traces of where it was made."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx


def _inner_graphs(attribute: onnx.AttributeProto) -> Sequence[onnx.GraphProto]:
    """Bodies of control flow."""
    return [attribute.g] if attribute.type == attribute.GRAPH else list(attribute.graphs)


def _read(graph: onnx.GraphProto) -> set[str]:
    """Names of all values that a graph or a body in it reads or gives."""
    inner = [one for node in graph.node for attribute in node.attribute for one in _inner_graphs(attribute)]
    own = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    return own.union(*map(_read, inner))


def rename(graph: onnx.GraphProto, prefix: str, to: Callable[[str], str]) -> None:
    """Call nodes by a prefix and their names, and values as a function says, in bodies of control flow as well."""
    for node in graph.node:
        node.name = f"{prefix}{node.name}"
        node.input[:] = [to(name) for name in node.input]
        node.output[:] = [to(name) for name in node.output]
        for attribute in node.attribute:
            for inner in _inner_graphs(attribute):
                rename(inner, prefix, to)
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = to(value.name)


def cast_constants(graph: onnx.GraphProto) -> None:
    """Give constants the type that they are cast to: onnxruntime casts them like another value anew in every run."""
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input)}
    constants = {node.output[0]: node for node in graph.node if node.op_type == "Constant"}
    for node in graph.node:
        if node.op_type != "CastLike" or node.input[0] not in constants or not types.get(node.input[1]):
            continue
        (held,) = constants[node.input[0]].attribute
        given = onnx.helper.get_attribute_value(held)
        values = onnx.numpy_helper.to_array(given) if held.type == held.TENSOR else np.array(given)
        cast = onnx.numpy_helper.from_array(values.astype(onnx.helper.tensor_dtype_to_np_dtype(types[node.input[1]])))
        node.CopyFrom(onnx.helper.make_node("Constant", [], list(node.output), node.name, value=cast))
    unread = constants.keys() - _read(graph)
    kept = [node for node in graph.node if not unread.intersection(node.output)]
    del graph.node[:]
    graph.node.extend(kept)


def strip(graph: onnx.GraphProto) -> None:
    """Drop everything that says where and by what the graph was made."""
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
                strip(inner)
