"""Smaller forms of `score.onnx`, built beside it from the same weights: their recipes, and what they are called.

A variant takes what `score.onnx` takes, from the same `lookup.onnx`, and shares its statistics. Weights with two or
more axes (tables, layers, the bank) are what it holds otherwise; biases, norms and all that is no weight stay as they
are. Which rankers may load it is judged apart, on rows that the weights have not seen.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from tasks.errors import ParityBroken
from tasks.release import half_graph, int8_graph
from tasks.release.export_config import VariantName
from tasks.release.external import ALIGNMENT
from tasks.release.graphs import EXTERNAL
from tasks.release.half_graph import halves, to_half
from tasks.release.int8_graph import bytes_of, gathered, quantise, scale_of, to_int8
from tasks.release.manifest_parts import LARGEST_DIFFERENCE
from tasks.release.scorer import PREFIX

F32 = npt.NDArray[np.float32]
BANK = f"{PREFIX}bank"
SHARED = frozenset({EXTERNAL["statistics_"]})
"""External files that variants read as they are."""
PROVIDERS: Mapping[VariantName, str] = {"fp16": "CUDAExecutionProvider", "int8": "CPUExecutionProvider"}
"""What each is made for."""
SLACK: Mapping[VariantName, float] = {"fp16": 2e-3, "int8": 1e-4}
"""How much further off than here a golden request may be answered elsewhere: a GPU adds up halves in another order."""
JUDGED = "base_{}.bin"
"""The file of a variant that is the same wherever base and recipe are the same, whatever the bank."""
CHUNK = 2**20
"""About how many numbers of a table are held in memory at a time."""
_FILES = (half_graph.__file__, int8_graph.__file__, __file__)
# Read with the modules, as the scorer's.
_CODE = hashlib.sha256(b"".join(Path(file).read_bytes() for file in _FILES)).hexdigest()


def files_of(name: VariantName) -> tuple[str, ...]:
    """Files of a variant, its graph first.

    >>> files_of("int8")
    ('score_int8.onnx', 'base_int8.bin', 'bank_int8.bin')
    """
    return (f"score_{name}.onnx", *(_renamed(file, name) for file in EXTERNAL.values() if file not in SHARED))


def parity_of(name: VariantName, apart: float | None) -> dict[str, float]:
    """What a manifest tells of a variant's answers to golden requests.

    Args:
        name: which.
        apart: its largest difference here; None where an answer is not finite.
    """
    said = {} if apart is None else {"largest": apart}
    return {**said, "tolerance": min(LARGEST_DIFFERENCE, (apart or 0.0) + SLACK[name])}


def built_from(names: tuple[VariantName, ...]) -> dict[str, object]:
    """What variants depend on beside the weights, as JSON: which, our code and the library's version."""
    return {"names": list(names), "code": _CODE, "versions": {name: version(name) for name in ("onnx", "numpy")}}


def build(name: VariantName, folder: Path, objectives: int) -> None:
    """Write a variant's files.

    Args:
        name: which.
        folder: holds `score.onnx` and its external files.
        objectives: K; each has its own scales in the bank.

    Raises:
        ParityBroken: the graph is not valid ONNX.
    """
    model = onnx.load(folder / "score.onnx", load_external_data=False)
    graph = model.graph
    known = _types_of(model)
    weights = [one for one in graph.initializer if _is_weight(one)]
    kept = [one for one in graph.initializer if not _is_weight(one)]
    with _Files(folder, name) as files:
        kept = [files.copied(one) if _lies_in(one) not in (None, *SHARED) else one for one in kept]
        if name == "fp16":
            held = [files.converted(one) for one in weights]
            to_half(graph, frozenset(known), frozenset(one.name for one in held))
        else:
            tables = {one.name: 1 for one in weights if gathered(graph, one.name)}
            tables |= {BANK: objectives} if BANK in tables else {}
            layers = [one.name for one in weights if one.name not in tables]
            held = [part for one in weights for part in files.quantised(one, tables.get(one.name, 1))]
            held += to_int8(graph, tables, layers, known)
    del graph.initializer[:]
    graph.initializer.extend([*held, *kept])
    path = folder / files_of(name)[0]
    path.write_bytes(model.SerializeToString(deterministic=True))
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ParityBroken(
            f"{path.name} is not valid ONNX: {error}; this is a defect of the variant's recipe"
        ) from error


def _types_of(model: onnx.ModelProto) -> Mapping[str, int]:
    """Axes of every float32 value, by name."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*inferred.input, *inferred.output, *inferred.value_info)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    constants = {one.name: len(one.dims) for one in inferred.initializer if one.data_type == TensorProto.FLOAT}
    return values | constants


def _lies_in(tensor: onnx.TensorProto) -> str | None:
    """Name of the external file that holds a tensor."""
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), None)


def _is_weight(tensor: onnx.TensorProto) -> bool:
    return len(tensor.dims) > 1 and _lies_in(tensor) not in (None, *SHARED)


def _renamed(file: str, name: str) -> str:
    return f"{Path(file).stem}_{name}{Path(file).suffix}"


@dataclass(frozen=True)
class _Place:
    """Where a tensor's numbers lie."""

    file: str
    offset: int


class _Files:
    """The external files of a variant, written from start to end, a bounded number of rows at a time."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        own = [file for file in EXTERNAL.values() if file not in SHARED]
        self._parts = {file: (folder / _renamed(file, name)).open("wb") for file in own}
        self._name = name

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in self._parts.values():
            part.close()

    def copied(self, tensor: onnx.TensorProto) -> onnx.TensorProto:
        """A tensor as it is, beside the others."""
        return self._write(tensor, tensor.name, self._rows(tensor), np.dtype("<f4"), tuple(tensor.dims))

    def converted(self, tensor: onnx.TensorProto) -> onnx.TensorProto:
        """A tensor as halves."""
        chunks = (halves(rows) for rows in self._rows(tensor))
        return self._write(tensor, tensor.name, chunks, np.dtype("<f2"), tuple(tensor.dims))

    def quantised(self, tensor: onnx.TensorProto, groups: int) -> tuple[onnx.TensorProto, onnx.TensorProto]:
        """A tensor's bytes and its scales, ``groups`` for each row."""
        shape = tuple(tensor.dims)
        scales: list[F32] = []

        def chunks() -> Iterator[npt.NDArray[np.generic]]:
            for rows in self._rows(tensor):
                q, scale = quantise(rows.reshape(*rows.shape[:-1], groups, -1))
                scales.append(scale[..., 0])
                yield q.reshape(rows.shape)

        whole = self._write(tensor, bytes_of(tensor.name), chunks(), np.dtype("i1"), shape)
        scale = self._write(tensor, scale_of(tensor.name), iter(scales), np.dtype("<f4"), (*shape[:-1], groups))
        return whole, scale

    def _rows(self, tensor: onnx.TensorProto) -> Iterator[F32]:
        """The numbers along the first axis, part by part."""
        where = {entry.key: entry.value for entry in tensor.external_data}
        shape = tuple(tensor.dims)
        path, offset = self._folder / where["location"], int(where["offset"])
        values: F32 = np.memmap(path, "<f4", "r", offset, shape)
        step = max(1, CHUNK // max(1, int(np.prod(shape[1:]))))
        for start in range(0, shape[0], step):
            yield np.asarray(values[start : start + step])

    def _write(
        self,
        tensor: onnx.TensorProto,
        name: str,
        chunks: Iterator[npt.NDArray[np.generic]],
        dtype: np.dtype[np.generic],
        shape: tuple[int, ...],
    ) -> onnx.TensorProto:
        source = _lies_in(tensor)
        assert source is not None
        part = self._parts[source]
        part.write(bytes(-part.tell() % ALIGNMENT))
        offset = part.tell()
        for chunk in chunks:
            part.write(np.ascontiguousarray(chunk, dtype).tobytes())
        return _outside(name, _renamed(source, self._name), offset, part.tell() - offset, dtype, shape)


def _outside(
    name: str, file: str, offset: int, length: int, dtype: np.dtype[np.generic], shape: tuple[int, ...]
) -> onnx.TensorProto:
    """A tensor that lies in an external file."""
    tensor = onnx.TensorProto(name=name, data_type=onnx.helper.np_dtype_to_tensor_dtype(dtype), dims=shape)
    for key, value in {"location": file, "offset": str(offset), "length": str(length)}.items():
        tensor.external_data.add(key=key, value=value)
    tensor.data_location = TensorProto.EXTERNAL
    return tensor
