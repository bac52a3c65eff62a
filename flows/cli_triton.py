"""`nightrank releases triton`: a release as a model repository of Triton Inference Server."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def add_triton(action: Callable[..., argparse.ArgumentParser], names: str) -> None:
    """Add the command.

    Args:
        action: makes a command below `releases` that says where the releases are.
        names: how a release may be named.
    """
    made = action("triton", _triton, "write a release as a model repository of Triton Inference Server")
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="the model repository; others in it stay")
    made.add_argument("--release", default="champion", help=f"{names} (default: champion)")
    made.add_argument("--name", help="of the ensemble that callers ask (default: the pipeline's)")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where scores are computed")
    made.add_argument("--max-batch", type=int, default=64, metavar="R", help="most requests of a call (default: 64)")
    made.add_argument("--instances", type=int, default=1, metavar="N", help="copies of each model (default: 1)")


def _triton(options: argparse.Namespace, console: "Console") -> None:
    from flows.cli_releases import opened
    from tasks.release.published import resolve
    from tasks.release.publishing import read_manifest
    from tasks.release.triton import Served, write_repository

    store, pipeline = opened(options, "nightrank releases triton")
    served = Served(options.name or pipeline, options.device, options.max_batch, options.instances)
    manifest = read_manifest(store, pipeline, resolve(store, pipeline, options.release))
    for made in write_repository(store, manifest, options.out, served):
        console.print(
            f"{made.folder}: ensemble {made.ensemble}, version {made.version}, of {' and '.join(made.models)}; "
            f"golden requests are answered to within {made.difference:.1g}\n"
            f"load it: POST v2/repository/models/{made.ensemble}/load",
            soft_wrap=True,
        )
