"""External files of a release: where large tensors lie, beside the graphs that name them.

They are mapped and not read, may be larger than a graph's 2 GB, and travel only where they change.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from tasks.errors import ParityBroken, ReleaseRefused

ALIGNMENT = 64
"""Tensors in external files start at multiples of this many bytes, so that they can be mapped as they lie."""


class ExternalFiles:
    """The external files of one release under construction. A tensor is written once, whatever graphs name it.

    Args:
        folder: an existing folder; files of an earlier attempt in it are replaced.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sizes: dict[str, int] = {}
        self._placed: dict[str, TensorProto] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the files that were begun, in that order."""
        return tuple(self._sizes)

    def begin(self, file: str) -> None:
        """Make a file that stays empty unless a tensor is put there."""
        if file not in self._sizes:
            (self._folder / file).write_bytes(b"")
            self._sizes[file] = 0

    def place(self, file: str, name: str, values: npt.NDArray[np.generic]) -> TensorProto:
        """Append a tensor to a file.

        Args:
            file: bare name of the file.
            name: the tensor's; one that was placed before is not written again.
            values: its numbers, of any shape with elements.

        Returns:
            An initialiser that says where they lie.

        Raises:
            ParityBroken: another tensor has this name.
        """
        if name not in self._placed:
            self.begin(file)
            offset = -(-self._sizes[file] // ALIGNMENT) * ALIGNMENT
            little = np.ascontiguousarray(values.astype(values.dtype.newbyteorder("<"), copy=False))
            with (self._folder / file).open("ab") as opened:
                opened.write(bytes(offset - self._sizes[file]))
                little.tofile(opened)
            self._sizes[file] = offset + little.nbytes
            tensor = TensorProto(
                name=name,
                data_type=helper.np_dtype_to_tensor_dtype(values.dtype),
                dims=values.shape,
                data_location=TensorProto.EXTERNAL,
            )
            for key, value in {"location": file, "offset": str(offset), "length": str(little.nbytes)}.items():
                tensor.external_data.add(key=key, value=value)
            self._placed[name] = tensor
        placed = self._placed[name]
        if tuple(placed.dims) != values.shape:
            raise ParityBroken(
                f"tensor {name} is {list(values.shape)} in one graph, {list(placed.dims)} in another; this is a defect "
                f"of the export"
            )
        return placed


def opened_by(graphs: Iterable[Path]) -> Mapping[str, tuple[str, ...]]:
    """Which external files graphs open, by the names that they themselves give.

    Args:
        graphs: ONNX files.

    Returns:
        Name of each graph's file to the files that hold its tensors, wherever in it these stand.

    Raises:
        ReleaseRefused: one is no ONNX file.
    """
    found = {}
    for path in graphs:
        try:
            model = onnx.load(path, load_external_data=False)
        except Exception as error:  # protobuf's, which is onnx's to import
            raise ReleaseRefused(f"{path.name} is no ONNX file ({error}); export the release again") from error
        found[path.name] = tuple(sorted({one for tensor in _tensors(model) for one in _locations(tensor)}))
    return found


def _tensors(message: Any) -> Iterator[TensorProto]:
    """Every tensor of a graph: of initialisers, dense and sparse, and of attributes, also in graphs inside nodes."""
    if isinstance(message, TensorProto):
        yield message
        return
    for _, value in message.ListFields():
        if hasattr(value, "ListFields"):
            yield from _tensors(value)
        elif not isinstance(value, str | bytes | int | float) and hasattr(value[0], "ListFields"):
            for one in value:
                yield from _tensors(one)


def _locations(tensor: TensorProto) -> Iterator[str]:
    if tensor.data_location == TensorProto.EXTERNAL:
        yield from (entry.value for entry in tensor.external_data if entry.key == "location")
