"""A process that loads one graph and answers requests: how long that took, and what it keeps in memory.

    python -m tests.benchmarks.asked_sessions GRAPH.onnx REQUESTS.npz

Every array of the file is an input; the first axis is cut into requests. Prints JSON.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
from onnx import TensorProto, helper


def resident() -> int:
    """Bytes of this process that lie in memory, mapped files among them."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def session(graph: Path | bytes) -> onnxruntime.InferenceSession:
    """A session as a ranker's, on one thread."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def main() -> None:
    """Load, answer each request once, and say what that took."""
    graph, requests = Path(sys.argv[1]), np.load(sys.argv[2])
    inputs = {
        name: requests[name].astype(object) if requests[name].dtype.kind == "U" else requests[name] for name in requests
    }
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [])
    same = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "same", [value], [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [])
    ])  # fmt: skip
    opsets = [helper.make_opsetid("", 20)]
    session(helper.make_model(same, ir_version=10, opset_imports=opsets).SerializeToString())  # what any session takes
    before, began = resident(), time.perf_counter()
    asked = session(graph)
    loaded, after_load = time.perf_counter() - began, resident()
    taken = []
    for position in range(len(next(iter(inputs.values())))):
        request = {name: values[position] for name, values in inputs.items()}
        began = time.perf_counter()
        asked.run(None, request)
        taken.append(time.perf_counter() - began)
    told = {"load": loaded, "kept": after_load - before, "grown": resident() - before, "median": median(taken)}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
