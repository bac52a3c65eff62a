"""Sessions of onnxruntime: how they are set up, and the proof of where their nodes really run.

A session that asks for CUDA falls back to the CPU with a log line only, as a whole or node by node. So a session on a
device is made with onnxruntime's profiler, answers one request, and the profile says which provider ran each node.
"""

import ctypes
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import onnxruntime

from tasks.errors import DeviceUnavailable, InvalidConfig, ReleaseRefused

log = logging.getLogger("nightrank.ranker")
Device = Literal["auto", "cpu", "cuda"]
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"


@dataclass(frozen=True)
class Engine:
    """How sessions run, wherever that is.

    Attributes:
        threads: of the CPU per session; 0 takes one per core. A service that answers on many threads takes 1.
        cuda_graphs: replay a captured graph for shapes that repeat; on a GPU only.
        tensorrt: folder for TensorRT's engines, which it builds for minutes where there is none for the release yet;
            None does without. On a GPU only. Those of releases that the cache keeps no longer are removed, so that
            rankers share this folder only with those that share their cache.
    """

    threads: int = 0
    cuda_graphs: bool = False
    tensorrt: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot run.

        Raises:
            InvalidConfig: fewer threads than none.
        """
        if self.threads < 0:
            raise InvalidConfig(f"engine.threads is {self.threads}; 0 takes one per core, 1 or more that many")

    def of(self, pipeline: str, release: str) -> "Engine":
        """The same for one release: TensorRT's engines hold weights, so each release has a folder of its own.

        >>> Engine(tensorrt=Path("engines")).of("shop", "1f3a").tensorrt.as_posix()
        'engines/shop/1f3a'
        """
        return self if self.tensorrt is None else replace(self, tensorrt=self.tensorrt / pipeline / release)


@dataclass(frozen=True)
class Placement:
    """Where the nodes of a graph ran.

    Attributes:
        nodes: provider to number of nodes.
        strays: operators that made numbers on the CPU although a device was asked for; shapes and ids are the CPU's.
    """

    nodes: Mapping[str, int] = field(default_factory=dict)
    strays: tuple[str, ...] = ()


def open_session(
    path: Path, engine: Engine, on: Literal["cpu", "cuda"], profile: Path | None = None
) -> onnxruntime.InferenceSession:
    """A session on the CPU, or one that asks for the GPU.

    Args:
        path: the graph; its external files lie beside it.
        engine: how it runs.
        on: where.
        profile: prefix of the profile that `proved` reads; None profiles nothing.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Threads that wait for a next request by spinning take the cores of whoever asks it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads = engine.threads
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(path, options, providers=providers(engine) if on == "cuda" else [CPU])


def providers(engine: Engine) -> list[str | tuple[str, dict[str, str]]]:
    """Providers of a session on the GPU with their options, the most wanted first.

    Args:
        engine: how it runs; TensorRT's folder is the release's own.
    """
    graphs = {"enable_cuda_graph": "1"} if engine.cuda_graphs else {}
    wanted: list[str | tuple[str, dict[str, str]]] = [(CUDA, graphs), CPU]
    if engine.tensorrt is not None:
        engine.tensorrt.mkdir(parents=True, exist_ok=True)
        built = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(engine.tensorrt)}
        captured = {"trt_cuda_graph_enable": "1"} if engine.cuda_graphs else {}
        wanted.insert(0, (TENSORRT, built | captured))
    return wanted


def proved(
    path: Path, engine: Engine, on: Literal["cpu", "cuda"], ask: Callable[[onnxruntime.InferenceSession], object]
) -> tuple[onnxruntime.InferenceSession, Placement]:
    """A session, and where its nodes ran when it was asked.

    Args:
        path: the graph.
        engine: how it runs.
        on: where it has to run.
        ask: runs the session once.

    Raises:
        DeviceUnavailable: nothing of it ran on the GPU.
    """
    with tempfile.TemporaryDirectory(prefix="nightrank-profile-") as folder:
        session = open_session(path, engine, on, Path(folder) / "run")
        try:
            ask(session)
        finally:
            profile = Path(session.end_profiling())
        placement = read_profile(profile.read_bytes(), on)
    _require_placed(placement, session, on)
    return session, placement


def _require_placed(placement: Placement, session: onnxruntime.InferenceSession, on: Literal["cpu", "cuda"]) -> None:
    if on == "cpu":
        return
    if not placement.nodes.keys() & {CUDA, TENSORRT}:
        raise DeviceUnavailable(
            f"the session gives {', '.join(session.get_providers())}, and when it was asked all "
            f"{sum(placement.nodes.values())} nodes ran on {', '.join(sorted(placement.nodes)) or 'nothing'}: CUDA 13 "
            f"or cuDNN 9 is missing on this host; install them or set device to cpu"
        )
    if placement.strays:
        log.warning("on the GPU's behalf the CPU computed %s", ", ".join(placement.strays))


def read_profile(data: bytes, on: Literal["cpu", "cuda"]) -> Placement:
    """Which provider ran which node, from onnxruntime's profile.

    Args:
        data: the profile: a JSON list of events.
        on: where the session was to run.

    Raises:
        ReleaseRefused: it cannot be read.
    """
    try:
        ran = {
            (event["args"]["node_index"], event["name"]): event["args"]
            for event in json.loads(data)
            if event.get("cat") == "Node" and "provider" in event.get("args", {})
        }
        nodes = Counter(args["provider"] for args in ran.values())
        here = [args for args in ran.values() if on == "cuda" and args["provider"] == CPU]
        strays = {
            args["op_name"]
            for args in here
            if any("float" in dtype for made in args.get("output_type_shape", ()) for dtype in made)
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ReleaseRefused(f"onnxruntime's profile cannot be read ({error!r}); set device to cpu") from error
    return Placement(dict(nodes), tuple(sorted(strays)))


def require_gpu() -> None:
    """Ask the driver itself: onnxruntime lists CUDA on hosts that have no GPU.

    Raises:
        DeviceUnavailable: there is no driver or no GPU.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        count = ctypes.c_int(0)
        ready = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    except OSError:
        ready = False
    if not ready or CUDA not in onnxruntime.get_available_providers():
        raise DeviceUnavailable(
            "device is cuda, and this host has no NVIDIA driver with a GPU; set device to cpu or auto"
        )
    onnxruntime.preload_dlls()
