"""A release in memory: its sessions, and the proof that they answer as the network did."""

import ctypes
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnxruntime

from tasks.errors import DeviceUnavailable, ReleaseRefused, RequestRejected
from tasks.release.manifest import InputSpec, Manifest
from tasks.serving.requests import read_request

F32 = npt.NDArray[np.float32]
Arrays = dict[str, npt.NDArray[np.generic]]
Device = Literal["auto", "cpu", "cuda"]
TOLERANCE = 1e-4
"""Largest difference to a golden score, absolute for probabilities, relative to 1 + the score for ratings: the trainer
keeps 1e-5 on its own host; another processor's or a GPU's arithmetic differs a little more."""
GPU = "cuda"
"""Where the tensors of `score.onnx` lie."""
_TYPES = {"int64": "tensor(int64)", "string": "tensor(string)", "float32": "tensor(float)"}


@dataclass(frozen=True)
class LoadedRelease:
    """A release that can answer.

    Attributes:
        manifest: what it says about itself.
        device: where it runs.
        item: name of the item column.
        sessions: one after the other: `model.onnx`, or `lookup.onnx` on the CPU and `score.onnx` on the GPU.
    """

    manifest: Manifest
    device: Literal["cpu", "cuda"]
    item: str
    sessions: tuple[onnxruntime.InferenceSession, ...]

    def run(self, inputs: Arrays, shape: tuple[int, int]) -> F32:
        """Scores [R, M, K] of checked inputs with R requests and M candidates."""
        expected = (*shape, len(self.manifest.interface.objectives))
        if 0 in shape:
            return np.zeros(expected, np.float32)
        output = self.manifest.interface.output
        if self.device == "cpu":
            scores = self.sessions[0].run([output], inputs)[0]
        else:
            lookup, score = self.sessions
            between = [value.name for value in score.get_inputs()]
            binding = score.io_binding()
            for name, values in zip(between, lookup.run(between, inputs), strict=True):
                binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(values, GPU, 0))
            binding.bind_output(output, GPU)
            score.run_with_iobinding(binding)
            scores = binding.copy_outputs_to_cpu()[0]
        if scores.shape != expected or scores.dtype != np.float32:
            raise ReleaseRefused(
                f"release {self.manifest.release[:12]} answers {scores.dtype} {list(scores.shape)}, its manifest says "
                f"float32 {list(expected)}; publish it again"
            )
        result: F32 = scores
        return result


def load(folder: Path, manifest: Manifest, device: Device) -> LoadedRelease:
    """Load a verified release and ask it its golden requests.

    Args:
        folder: its files under their names, digests verified.
        manifest: its manifest, parsed.
        device: `auto` tries a GPU where there is one, and falls back to the CPU.

    Raises:
        ReleaseRefused: the interface is not the one of the manifest, a graph does not load, or a golden request is
            answered otherwise.
        DeviceUnavailable: `cuda` was asked for and no GPU works.
    """
    if (folder / "interface.json").read_bytes() != manifest.interface.serialise():
        raise ReleaseRefused(_about(manifest, "its interface.json says something else than its manifest"))
    if device != "cpu":
        try:
            _require_gpu()
            return _load(folder, manifest, "cuda")
        except DeviceUnavailable:
            if device == "cuda":
                raise
    return _load(folder, manifest, "cpu")


def _load(folder: Path, manifest: Manifest, device: Literal["cpu", "cuda"]) -> LoadedRelease:
    try:
        if device == "cpu":
            sessions: tuple[onnxruntime.InferenceSession, ...] = (_session(folder / "model.onnx", "cpu"),)
        else:
            sessions = (_session(folder / "lookup.onnx", "cpu"), _session(folder / "score.onnx", "cuda"))
    except DeviceUnavailable:
        raise
    except Exception as error:  # onnxruntime's errors share no base class below Exception
        raise ReleaseRefused(_about(manifest, f"onnxruntime does not load it: {error}")) from error
    specs = manifest.interface.inputs
    wanted = {spec.name: (_TYPES[spec.dtype], len(spec.shape)) for spec in specs}
    found = {value.name: (value.type, len(value.shape)) for value in sessions[0].get_inputs()}
    if found != wanted:
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ReleaseRefused(_about(manifest, f"its graph takes other inputs than its manifest says: {', '.join(odd)}"))
    item = next(spec.name for spec in specs if spec.per == "candidate")
    loaded = LoadedRelease(manifest, device, item, sessions)
    _ask_golden(loaded, (folder / "golden.json").read_bytes())
    return loaded


def _session(path: Path, device: Literal["cpu", "cuda"]) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Threads that wait for a next request by spinning take the cores of whoever asks it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    wanted = ["CUDAExecutionProvider", "CPUExecutionProvider"] if device == "cuda" else ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(path, options, providers=wanted)
    if (given := session.get_providers()[0]) != wanted[0]:
        raise DeviceUnavailable(
            f"onnxruntime gave a session on {given}, not {wanted[0]}: CUDA 13 or cuDNN 9 is missing on this host; "
            f"install them or set device to cpu"
        )
    return session


def _require_gpu() -> None:
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
    if not ready or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise DeviceUnavailable(
            "device is cuda, and this host has no NVIDIA driver with a GPU; set device to cpu or auto"
        )
    onnxruntime.preload_dlls()


def _ask_golden(loaded: LoadedRelease, data: bytes) -> None:
    manifest = loaded.manifest
    ratings = np.array([objective.kind == "rating" for objective in manifest.interface.objectives])
    for position, (inputs, shape, expected) in enumerate(_golden(manifest, data)):
        try:
            answer = loaded.run(inputs, shape)
        except ReleaseRefused:
            raise
        except Exception as error:  # as above
            raise ReleaseRefused(_about(manifest, f"golden request {position} fails: {error}")) from error
        scale = np.where(ratings, 1.0 + np.abs(expected), 1.0)
        difference = float(np.max(np.abs(answer - expected) / scale))
        if not difference <= TOLERANCE:  # also where it is not a number
            raise ReleaseRefused(
                _about(manifest, f"golden request {position} is answered {difference:.3g} off, limit {TOLERANCE:g}")
            )


def _golden(manifest: Manifest, data: bytes) -> list[tuple[Arrays, tuple[int, int], F32]]:
    """Golden requests as inputs, (R, M) and expected scores [R, M, K]."""
    specs, objectives = manifest.interface.inputs, len(manifest.interface.objectives)
    try:
        found = json.loads(data)
        if found["schema_version"] != 1 or not found["requests"]:
            raise ValueError("there are none of schema version 1")
        golden = []
        for one in found["requests"]:
            requests, candidates, width = one["shape"]
            if min(requests, candidates) < 1 or width != objectives:
                raise ValueError(f"shape {one['shape']} does not fit {objectives} objectives")
            expected = np.array(one["scores"], np.float32).reshape(requests, candidates, width)
            if not np.isfinite(expected).all():
                raise ValueError("a score is not finite")
            inputs, shape = read_request(specs, {spec.name: _shaped(spec, one, requests, candidates) for spec in specs})
            golden.append((inputs, shape, expected))
        return golden
    except (ValueError, TypeError, KeyError, RecursionError, RequestRejected) as error:
        raise ReleaseRefused(_about(manifest, f"its golden requests cannot be read: {error!r}")) from error


def _shaped(spec: InputSpec, one: dict[str, dict[str, list[object]]], requests: int, candidates: int) -> object:
    values = one["inputs"][spec.name]
    flat = np.array(values, np.float32 if spec.dtype == "float32" else object)
    axes = (requests,) if spec.per == "request" else (requests, candidates)
    shaped = flat.reshape(axes if spec.values is None else (*axes, spec.values))
    return shaped.astype(np.int64) if spec.dtype == "int64" else shaped


def _about(manifest: Manifest, what: str) -> str:
    return f"release {manifest.release[:12]} of night {manifest.night} is refused: {what}; publish it again"
