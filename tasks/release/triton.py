"""A release as a model repository of Triton Inference Server: look-up and scores as two models, an ensemble of both.

    <out>/
      shop/config.pbtxt              the ensemble: raw columns in, scores out; names the two models below
      shop/20260301/release.json     its version is the night; which release this is, for people
      shop_lookup_1f3a.../           raw columns to ids, on the CPU: config.pbtxt, 1/ and warmup/
      shop_score_1f3a.../            ids to scores: the same, with the weights beside the graph

The two models bear the release's id and never change, and the ensemble names them: an ensemble of "the newest version"
of each would put one night's ids and another's weights together while Triton loads them one after the other.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from tasks.clients.object_store import ObjectStore
from tasks.errors import InvalidConfig, ParityBroken, ReleaseRefused
from tasks.release.interface import InputSpec
from tasks.release.manifest import Manifest, blob_key
from tasks.release.strict_json import canonical
from tasks.release.triton_config import Tensor, Warmup, ensemble_config, model_config, tensors

Arrays = Mapping[str, npt.NDArray[np.generic]]
Device = Literal["cpu", "cuda"]
TOLERANCE = 1e-4
"""Largest difference to a golden score, as for a ranker: absolute for probabilities, relative to 1 + a rating."""
TOLD = "release.json"
"""Lies in the ensemble's version folder, and marks an ensemble as written here."""


@dataclass(frozen=True)
class Served:
    """How Triton is to serve a release.

    Attributes:
        name: of the ensemble; the models' names begin with it.
        device: where scores are computed. Look-ups hold strings and stay on the CPU.
        max_batch: most requests (R) of one call, and of calls that Triton puts together.
        instances: copies of each model that run at the same time, each with its own memory.
    """

    name: str
    device: Device = "cpu"
    max_batch: int = 64
    instances: int = 1

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", self.name):
            raise InvalidConfig(
                f"{self.name!r} cannot name a Triton model here; give up to 100 letters, digits, '_', '.' and '-'"
            )
        for field, value, limit in (("max_batch", self.max_batch, 4096), ("instances", self.instances, 64)):
            if not 1 <= value <= limit:
                raise InvalidConfig(f"{field} is {value}; give a number from 1 to {limit}")


@dataclass(frozen=True)
class Repository:
    """An ensemble that was written.

    Attributes:
        folder: the model repository.
        ensemble: the model that callers ask.
        version: its version: the night's digits.
        models: the models that it is made of, in order.
        difference: largest difference to a golden score that the written files gave.
    """

    folder: Path
    ensemble: str
    version: int
    models: tuple[str, str]
    difference: float


@dataclass(frozen=True)
class _Part:
    """One of the ensemble's models while it is written."""

    model: str
    graph: str
    folder: Path
    takes: tuple[Tensor, ...]
    gives: tuple[Tensor, ...]

    @cached_property
    def session(self) -> onnxruntime.InferenceSession:
        """The files as they were written, on the CPU."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        return onnxruntime.InferenceSession(self.folder / "1" / self.graph, options, providers=["CPUExecutionProvider"])

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[np.generic]]:
        """What it gives for what it takes of `inputs`."""
        names = [tensor.name for tensor in self.gives]
        found = self.session.run(names, {tensor.name: inputs[tensor.name] for tensor in self.takes})
        return dict(zip(names, found, strict=True))


def write_repository(store: ObjectStore, manifest: Manifest, out: Path, served: Served) -> tuple[Repository, ...]:
    """Write a release into a model repository, beside whatever other models that holds.

    The release's models come first and the ensemble that names them last, so that a server which is told to load the
    ensemble finds all of it. Models of other releases stay: remove them once no server has them loaded.

    Args:
        store: where the release is.
        manifest: its manifest, read and checked.
        out: the model repository; made where it is missing.
        served: how it is to be served.

    Returns:
        The ensemble for requests, and where the release takes feedback a second one for requests that bring it.

    Raises:
        InvalidConfig: the repository has a model of that name that is somebody else's.
        ReleaseRefused: the release lacks a file, or its golden requests cannot be read.
        ParityBroken: the written models do not answer the golden requests, or cannot be batched.
        StoreError: the store cannot be read, or a file is not what the manifest says.
    """
    has = {file.name for file in manifest.files}
    kinds = [kind for kind in ("", "_feedback") if not kind or f"lookup{kind}.onnx" in has]
    for kind in kinds:
        ensemble = out / f"{served.name}{kind}"
        if (ensemble / "config.pbtxt").exists() and not list(ensemble.glob(f"*/{TOLD}")):
            raise InvalidConfig(f"{ensemble} holds a model that was not written here; give another name")
    return tuple(_written(store, manifest, out, served, kind) for kind in kinds)


def _written(store: ObjectStore, manifest: Manifest, out: Path, served: Served, kind: str) -> Repository:
    """One ensemble: the graphs whose names end in `kind`, tried by the golden requests that are for them."""
    name, version = f"{served.name}{kind}", int(manifest.night.strftime("%Y%m%d"))
    ensemble = out / name
    with _room(out) as room:
        golden = _golden(store, manifest, room, brings=bool(kind))
        lookup, score = (_laid_out(store, manifest, served.name, part + kind, room) for part in ("lookup", "score"))
        encoded, difference = _asked(manifest, golden, lookup, score)
        widest = max(range(len(golden)), key=lambda at: golden[at][1].shape[1])
        for part, sample in ((lookup, golden[widest][0]), (score, encoded[widest])):
            config = model_config(
                part.model,
                part.graph,
                part.takes,
                part.gives,
                device=served.device if part is score else "cpu",
                instances=served.instances,
                max_batch=served.max_batch,
                gather=part is score,
                warmups=_warmups(part, sample, served.max_batch),
            )
            (part.folder / "config.pbtxt").write_text(config, encoding="utf-8")
        for part in (lookup, score):
            if (out / part.model).exists():  # of the same release, perhaps served otherwise
                os.replace(out / part.model, room / f"old {part.model}")
            os.replace(part.folder, out / part.model)
        steps = [(part.model, part.takes, part.gives) for part in (lookup, score)]
        text = ensemble_config(name, version, lookup.takes, score.gives, steps, served.max_batch)
        (room / "config.pbtxt").write_text(text, encoding="utf-8")
        (ensemble / str(version)).mkdir(parents=True, exist_ok=True)
        told = {"schema_version": 1, "pipeline": manifest.pipeline, "release": manifest.release}
        (ensemble / str(version) / TOLD).write_bytes(canonical({**told, "night": manifest.night.isoformat()}) + b"\n")
        os.replace(room / "config.pbtxt", ensemble / "config.pbtxt")
    return Repository(out, name, version, (lookup.model, score.model), difference)


@contextmanager
def _room(out: Path) -> Iterator[Path]:
    """A folder on the repository's file system for what is not finished."""
    room = out / f".nightrank-{uuid.uuid4().hex}"
    try:
        room.mkdir(parents=True)
        yield room
    except OSError as error:
        raise InvalidConfig(f"the model repository {out} cannot be written: {error}; give another folder") from error
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _fetched(store: ObjectStore, manifest: Manifest, name: str, folder: Path) -> Path:
    file = next((file for file in manifest.files if file.name == name), None)
    if file is None:
        raise ReleaseRefused(f"release {manifest.release[:12]} has no {name}, which its graphs read; publish it again")
    store.download(blob_key(manifest.pipeline, file.sha256), folder / name, file.sha256)
    return folder / name


def _laid_out(store: ObjectStore, manifest: Manifest, name: str, part: str, room: Path) -> _Part:
    """A graph in its version's folder, with every file that it reads."""
    model, graph = f"{name}_{part}_{manifest.release[:12]}", f"{part}.onnx"
    version = room / model / "1"
    version.mkdir(parents=True)
    found = onnx.load(_fetched(store, manifest, graph, version), load_external_data=False).graph
    beside = {one.value for tensor in found.initializer for one in tensor.external_data if one.key == "location"}
    for file in sorted(beside):
        _fetched(store, manifest, file, version)
    return _Part(model, graph, room / model, tensors(found.input, graph), tensors(found.output, graph))


def _golden(
    store: ObjectStore, manifest: Manifest, room: Path, brings: bool
) -> list[tuple[Arrays, npt.NDArray[np.float32]]]:
    """Golden requests that bring feedback, or that do not, as inputs and expected scores [R, M, K]."""
    specs = {spec.name: spec for spec in manifest.interface.inputs}
    try:
        found = json.loads(_fetched(store, manifest, "golden.json", room).read_bytes())
        golden: list[tuple[Arrays, npt.NDArray[np.float32]]] = []
        for one in found["requests"]:
            if ("feedback" in one) != brings:
                continue
            scores = np.array(one["scores"], np.float32).reshape(one["shape"])
            places = {"request": one["shape"][:1], "candidate": one["shape"][:2]}
            rows = [one["shape"][0], one.get("feedback", 0)]
            inputs = {
                name: _values(specs[name], values, places.get(specs[name].per, rows))
                for name, values in one["inputs"].items()
            }
            golden.append((inputs, scores))
        if not golden:
            raise ValueError("there are none")
        return golden
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ReleaseRefused(
            f"golden requests of release {manifest.release[:12]} cannot be read: {error!r}; publish it again"
        ) from error


def _values(spec: InputSpec, flat: list[object], shape: list[int]) -> npt.NDArray[np.generic]:
    dtype = {"float32": np.float32, "int64": np.int64, "string": object}[spec.dtype]
    return np.array(flat, dtype).reshape(shape if spec.values is None else [*shape, spec.values])


def _asked(
    manifest: Manifest, golden: Sequence[tuple[Arrays, npt.NDArray[np.float32]]], lookup: _Part, score: _Part
) -> tuple[list[dict[str, npt.NDArray[np.generic]]], float]:
    """What lies between the models for each golden request, and the largest difference of what comes out."""
    ratings = np.array([objective.kind == "rating" for objective in manifest.interface.objectives])
    encoded, worst = [], 0.0
    for inputs, expected in golden:
        if lacking := sorted({tensor.name for tensor in lookup.takes} - inputs.keys()):
            raise ReleaseRefused(
                f"a golden request of release {manifest.release[:12]} lacks {', '.join(lacking)}; publish it again"
            )
        between = lookup.run(inputs)
        encoded.append(between)
        answer = np.asarray(score.run(between)[score.gives[0].name], np.float32)
        scale = np.where(ratings, 1.0 + np.abs(expected), 1.0)
        off = np.abs(answer - expected) / scale if answer.shape == expected.shape else np.array(np.inf)
        worst = float(np.maximum(worst, off.max()))  # stays not a number, too
    if not worst <= TOLERANCE:
        raise ParityBroken(
            f"release {manifest.release[:12]} answers its golden requests {worst:.3g} off as look-up and score, limit "
            f"{TOLERANCE:g}; nothing was written"
        )
    return encoded, worst


def _warmups(part: _Part, sample: Arrays, max_batch: int) -> tuple[Warmup, ...]:
    """The first request of a golden one, alone and as the largest batch; writes its files."""
    folder = part.folder / "warmup"
    folder.mkdir()
    inputs = {}
    for position, tensor in enumerate(part.takes):
        values, file = sample[tensor.name][0:1], f"input_{position}"
        (folder / file).write_bytes(raw_bytes(values))
        inputs[tensor.name] = values.shape[1:], file
    return tuple(Warmup(name, batch, inputs) for name, batch in (("one", 1), ("full", max_batch)))


def raw_bytes(values: npt.NDArray[np.generic]) -> bytes:
    r"""A tensor as Triton reads it from a file or a request: row-major, little-endian, strings behind their length.

    >>> raw_bytes(np.array(["é"], object))
    b'\x02\x00\x00\x00\xc3\xa9'
    """
    if values.dtype != object:
        return values.astype(values.dtype.newbyteorder("<")).tobytes()
    encoded = [str(value).encode() for value in values.ravel()]
    return b"".join(len(one).to_bytes(4, "little") + one for one in encoded)
