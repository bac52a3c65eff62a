"""Stands in for Triton's onnxruntime backend, which no package carries, as a Python backend: the same runtime, the same
graphs, one run for the calls that the server put together. Loaded by the server as `model.py`, not by tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


class TritonPythonModel:
    """One instance of a model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the graph that the config names."""
        config = json.loads(args["model_config"])
        path = Path(args["model_repository"]) / args["model_version"] / config["default_model_filename"]
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.takes = [tensor["name"] for tensor in config["input"]]
        self.gives = [tensor["name"] for tensor in config["output"]]
        self.log = (Path(args["model_repository"]).parent.parent / "runs.log").open("a", buffering=1)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer the calls that the server put together by one run."""
        import triton_python_backend_utils as triton  # the server's own, nowhere else

        calls = [{name: self.values(request, name) for name in self.takes} for request in requests]
        sizes = [len(next(iter(call.values()))) for call in calls]
        joined = {name: np.concatenate([call[name] for call in calls]) for name in self.takes}
        self.log.write(json.dumps([self.gives[0], sizes]) + "\n")
        results = [np.split(values, np.cumsum(sizes)[:-1]) for values in self.session.run(self.gives, joined)]
        return [
            triton.InferenceResponse([
                triton.Tensor(name, np.ascontiguousarray(parts[at]))
                for name, parts in zip(self.gives, results, strict=True)
            ])
            for at in range(len(calls))
        ]  # fmt: skip

    @staticmethod
    def values(request: Any, name: str) -> Any:
        """A tensor as onnxruntime takes it."""
        import triton_python_backend_utils as triton

        values = triton.get_input_tensor_by_name(request, name).as_numpy()
        if values.dtype != object:
            return values
        return np.array([one.decode() for one in values.ravel()], object).reshape(values.shape)
