"""A release's graphs at work: `model.onnx` on the CPU, or `lookup.onnx` and a score graph on the CPU or the GPU."""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime

from tasks.serving.sessions import Engine, Placement, open_session, proved

Arrays = Mapping[str, npt.NDArray[np.generic]]
GPU = "cuda"
"""Where the tensors of `score.onnx` lie."""
MOST_SHAPES = 16
"""Shapes with a captured graph and buffers of their own; the one that was longest not asked for makes room."""
WITHOUT_GRAPH = "-1"
"""As `gpu_graph_id`: neither capture this run nor replay one."""


class Runner(Protocol):
    """What answers requests that were checked."""

    placement: Placement

    @property
    def inputs(self) -> Sequence[onnxruntime.NodeArg]:
        """Raw columns that it takes."""

    def run(self, inputs: Arrays) -> npt.NDArray[np.float32]:
        """Scores [R, M, K]."""


class Whole:
    """`model.onnx` on the CPU."""

    def __init__(self, graph: Path, output: str, engine: Engine) -> None:
        self.placement = Placement()
        self._session = open_session(graph, engine, "cpu")
        self._output = [output]

    @property
    def inputs(self) -> Sequence[onnxruntime.NodeArg]:
        """Raw columns that it takes."""
        given: Sequence[onnxruntime.NodeArg] = self._session.get_inputs()
        return given

    def run(self, inputs: Arrays) -> npt.NDArray[np.float32]:
        """Scores [R, M, K]."""
        scores: npt.NDArray[np.float32] = self._session.run(self._output, inputs)[0]
        return scores


class Pair:
    """`lookup.onnx` and a smaller form of `score.onnx`, one after the other on the CPU."""

    def __init__(self, lookup: Path, score: Path, output: str, engine: Engine) -> None:
        self.placement = Placement()
        self._lookup, self._score = (open_session(graph, engine, "cpu") for graph in (lookup, score))
        self._between = [value.name for value in self._score.get_inputs()]
        self._output = [output]

    @property
    def inputs(self) -> Sequence[onnxruntime.NodeArg]:
        """Raw columns that they take."""
        given: Sequence[onnxruntime.NodeArg] = self._lookup.get_inputs()
        return given

    def run(self, inputs: Arrays) -> npt.NDArray[np.float32]:
        """Scores [R, M, K]."""
        values = dict(zip(self._between, self._lookup.run(self._between, inputs), strict=True))
        scores: npt.NDArray[np.float32] = self._score.run(self._output, values)[0]
        return scores


class Halves:
    """`lookup.onnx` on the CPU, `score.onnx` on the GPU, with inputs and output bound to the device's memory.

    With `cuda_graphs` a shape that comes again gets buffers at fixed addresses, and onnxruntime replays the graph that
    it captured for it. It allows one such run at a time.
    """

    def __init__(self, lookup: Path, score: Path, output: str, engine: Engine, first: Arrays) -> None:
        """Open both.

        Args:
            lookup: the graph from raw columns to ids.
            score: the graph from ids to scores.
            output: name of the scores.
            engine: how they run.
            first: a request, for the proof that the second one runs on the GPU.

        Raises:
            DeviceUnavailable: it does not.
        """
        self._output = output
        self._lookup = open_session(lookup, engine, "cpu")
        self._graphs = engine.cuda_graphs
        self._running = threading.Lock()
        self._buffers: OrderedDict[tuple[tuple[int, ...], ...], _Buffers | None] = OrderedDict()
        self._captured = 0

        def ask(session: onnxruntime.InferenceSession) -> None:
            self._between = [value.name for value in session.get_inputs()]
            self._plain(session, self._lookup.run(self._between, first))

        self._score, self.placement = proved(score, engine, _DEVICE, ask)

    @property
    def inputs(self) -> Sequence[onnxruntime.NodeArg]:
        """Raw columns that they take."""
        given: Sequence[onnxruntime.NodeArg] = self._lookup.get_inputs()
        return given

    def run(self, inputs: Arrays) -> npt.NDArray[np.float32]:
        """Scores [R, M, K]."""
        values = self._lookup.run(self._between, inputs)
        if not self._graphs:
            return self._plain(self._score, values)
        with self._running:
            buffers = self._buffers_of(values)
            return self._plain(self._score, values) if buffers is None else buffers.run(self._score, values)

    def _plain(
        self, session: onnxruntime.InferenceSession, values: Sequence[npt.NDArray[np.generic]]
    ) -> npt.NDArray[np.float32]:
        binding = session.io_binding()
        for name, one in zip(self._between, values, strict=True):
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(one, GPU, 0))
        binding.bind_output(self._output, GPU)
        session.run_with_iobinding(binding, _options(WITHOUT_GRAPH) if self._graphs else None)
        scores: npt.NDArray[np.float32] = binding.copy_outputs_to_cpu()[0]
        return scores

    def _buffers_of(self, values: Sequence[npt.NDArray[np.generic]]) -> "_Buffers | None":
        """Buffers of a shape that came before; None at its first time, which may be its last."""
        key = tuple(one.shape for one in values)
        if key not in self._buffers:
            while len(self._buffers) >= MOST_SHAPES:
                self._buffers.popitem(last=False)
            self._buffers[key] = None
            return None
        self._buffers.move_to_end(key)
        if (found := self._buffers[key]) is None:
            self._captured += 1
            found = self._buffers[key] = _Buffers(self._score, self._between, values, self._output, self._captured)
        return found


class _Buffers:
    """Inputs and output of one shape at addresses that stay."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        names: Sequence[str],
        values: Sequence[npt.NDArray[np.generic]],
        output: str,
        number: int,
    ) -> None:
        self._inputs = [onnxruntime.OrtValue.ortvalue_from_numpy(one, GPU, 0) for one in values]
        self._binding = session.io_binding()
        for name, one in zip(names, self._inputs, strict=True):
            self._binding.bind_ortvalue_input(name, one)
        # A first run tells the output's shape, and has the device's memory allocated before anything is captured.
        self._binding.bind_output(output, GPU)
        session.run_with_iobinding(self._binding, _options(WITHOUT_GRAPH))
        self._scores = self._binding.get_outputs()[0]
        self._binding.bind_ortvalue_output(output, self._scores)
        self._options = _options(str(number))

    def run(
        self, session: onnxruntime.InferenceSession, values: Sequence[npt.NDArray[np.generic]]
    ) -> npt.NDArray[np.float32]:
        for one, new in zip(self._inputs, values, strict=True):
            one.update_inplace(new)
        session.run_with_iobinding(self._binding, self._options)
        scores: npt.NDArray[np.float32] = self._scores.numpy().copy()
        return scores


_DEVICE: Literal["cpu", "cuda"] = "cuda"


def _options(graph: str) -> onnxruntime.RunOptions:
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph)
    return options
