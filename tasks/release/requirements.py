"""What a host must have to load a release's graphs, read from the graphs themselves."""

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import onnx
import onnxruntime

from tasks.release.manifest_parts import Requires

PACKAGE = "nightrank"


def requirements(graphs: Iterable[Path]) -> Requires:
    """The operator sets of some graphs together, and the version of onnxruntime that they were proved on.

    Args:
        graphs: ONNX files; their external data is not read.
    """
    opsets: dict[str, int] = {}
    ir_version = 0
    for path in graphs:
        model = onnx.load(path, load_external_data=False)
        ir_version = max(ir_version, model.ir_version)
        for one in model.opset_import:
            domain = "" if one.domain == "ai.onnx" else one.domain
            opsets[domain] = max(opsets.get(domain, 0), one.version)
    least = ".".join(onnxruntime.__version__.split(".")[:2])
    return Requires(least, dict(sorted(opsets.items())), ir_version, f"{PACKAGE} {version(PACKAGE)}")
