"""A release in memory: its sessions, and the proof that they answer as the network did."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnxruntime

from tasks.errors import DeviceUnavailable, InvalidConfig, ReleaseRefused, RequestRejected
from tasks.release.manifest import InputSpec, Manifest
from tasks.serving.guards import require_variety
from tasks.serving.hashing import Hasher
from tasks.serving.requests import Arrays, read_request
from tasks.serving.runners import Halves, Pair, Runner, Whole
from tasks.serving.sessions import Device, Engine, require_gpu
from tasks.serving.variants import PLAIN, SOLVING, Chosen, LayOut, VariantChoice, choose, graphs_of, selected

F32 = npt.NDArray[np.float32]
Golden = tuple[Arrays, tuple[int, int], F32]
"""A golden request's inputs, (R, M), and expected scores [R, M, K]."""
log = logging.getLogger("nightrank.ranker")
FEEDBACK_TOLERANCE = 1e-3
"""The same of requests with feedback: what is solved differs more, and the trainer keeps 1e-4."""
_TYPES = {"int64": "tensor(int64)", "string": "tensor(string)", "float32": "tensor(float)"}


@dataclass(frozen=True)
class LoadedRelease:
    """A release that can answer.

    Attributes:
        manifest: what it says about itself.
        device: where it runs.
        user: name of the user column.
        item: name of the item column.
        runner: its graphs.
        hasher: hashes the personal columns of requests.
        feedback: those that take feedback; None where requests bring none.
        variant: which of its score graphs: `fp32`, `fp16` or `int8`.
        spared: why fp32 serves although the release has a variant that passed; None where that is not so.
    """

    manifest: Manifest
    device: Literal["cpu", "cuda"]
    user: str
    item: str
    runner: Runner
    hasher: Hasher = field(default_factory=lambda: Hasher({}), repr=False)
    feedback: Runner | None = None
    variant: str = PLAIN
    spared: str | None = None

    @property
    def binary(self) -> tuple[bool, ...]:
        """Of each objective, whether its labels are 0 and 1."""
        return tuple(objective.kind == "binary" for objective in self.manifest.interface.objectives)

    def run(self, inputs: Arrays, shape: tuple[int, int]) -> F32:
        """Scores [R, M, K] of checked inputs with R requests and M candidates.

        Raises:
            ReleaseRefused: it answers with another type or shape than its manifest says.
        """
        if 0 in shape:
            return np.zeros((*shape, len(self.binary)), np.float32)
        plain, brings = without_feedback(self.manifest, inputs), _brings(self.manifest, inputs, shape[0])
        if self.feedback is None or not brings.any():
            return self._scores(self.runner, plain, shape)
        if brings.all():
            return self._scores(self.feedback, inputs, shape)
        # Nobody's answer is another's business: who brings none is asked as if he were alone.
        scores = np.empty((*shape, len(self.binary)), np.float32)
        for these, runner, own in ((brings, self.feedback, inputs), (~brings, self.runner, plain)):
            some = {name: values[these] for name, values in own.items()}
            scores[these] = self._scores(runner, some, (int(these.sum()), shape[1]))
        return scores

    def _scores(self, runner: Runner, inputs: Arrays, shape: tuple[int, int]) -> F32:
        scores, expected = runner.run(inputs), (*shape, len(self.binary))
        if scores.shape != expected or scores.dtype != np.float32:
            raise ReleaseRefused(
                f"release {self.manifest.release[:12]} answers {scores.dtype} {list(scores.shape)}, its manifest says "
                f"float32 {list(expected)}; publish it again"
            )
        return scores


def load(
    files: Path | LayOut,
    manifest: Manifest,
    device: Device,
    engine: Engine | None = None,
    variant: VariantChoice = PLAIN,
) -> LoadedRelease:
    """Load a verified release and ask it its golden requests, which warms it up for their shapes.

    Args:
        files: gives a folder with the files that are opened, under their names, digests verified; or such a folder with
            all of them. What a fallback opens besides, from the GPU to the CPU or from a variant to fp32, is asked for
            when it comes to that.
        manifest: its manifest, parsed.
        device: `auto` tries a GPU where there is one, and falls back to the CPU.
        engine: how its sessions run; by default as onnxruntime likes.
        variant: which score graph serves, see `choose`; where `auto` has chosen a variant that does not answer as it
            should, fp32 serves if it does, and a warning says so.

    Raises:
        ReleaseRefused: the interface is not the one of the manifest, a graph does not load, a golden request is
            answered otherwise, or none tells its candidates apart.
        DeviceUnavailable: `cuda` was asked for and no GPU works.
        InvalidConfig: the engine is to use what only a GPU has, and the device is `cpu`; or the key of a personal
            column is missing on this host.
    """
    if manifest.requires is not None and not manifest.requires.met_by(onnxruntime.__version__):
        raise ReleaseRefused(
            f"release {manifest.release[:12]} of night {manifest.night} requires onnxruntime "
            f"{manifest.requires.onnxruntime}, this host has {onnxruntime.__version__}; update it, then refresh"
        )
    engine = (engine or Engine()).of(manifest.pipeline, manifest.release)
    lay_out = (lambda _: files) if isinstance(files, Path) else files
    if device == "cpu" and (engine.cuda_graphs or engine.tensorrt is not None):
        raise InvalidConfig("engine.cuda_graphs and engine.tensorrt need a GPU; set device to cuda or auto")
    if device != "cpu":
        try:
            require_gpu()
        except DeviceUnavailable:
            if device == "cuda":
                raise
            return _load(lay_out, manifest, "cpu", engine, variant)
        try:
            return _load(lay_out, manifest, "cuda", engine, variant)
        except DeviceUnavailable as error:
            if device == "cuda":
                raise
            log.warning("the GPU of this host does not serve, the CPU does: %s", error)
    return _load(lay_out, manifest, "cpu", engine, variant)


def _load(
    lay_out: LayOut, manifest: Manifest, device: Literal["cpu", "cuda"], engine: Engine, variant: VariantChoice
) -> LoadedRelease:
    chosen = choose(manifest, variant, device)
    # Outside the attempt: files that are missing or damaged refuse a release, whatever else of it might serve.
    folder = lay_out(selected(manifest, chosen, device))
    if (folder / "interface.json").read_bytes() != manifest.interface.serialise():
        raise ReleaseRefused(_about(manifest, "its interface.json says something else than its manifest"))
    golden = _golden(manifest, (folder / "golden.json").read_bytes())
    try:
        return _tried(folder, manifest, device, engine, golden, chosen)
    except ReleaseRefused as error:
        if variant != "auto" or chosen.name == PLAIN:
            raise
        plain = choose(manifest, PLAIN, device)
        found = _tried(lay_out(selected(manifest, plain, device)), manifest, device, engine, golden, plain)
        reason = f"{PLAIN} serves in place of {chosen.name}: {error}"
        log.warning("%s", reason)
        return replace(found, spared=reason)


def _tried(
    folder: Path,
    manifest: Manifest,
    device: Literal["cpu", "cuda"],
    engine: Engine,
    golden: Sequence[Golden],
    chosen: Chosen,
) -> LoadedRelease:
    """The release with one of its score graphs, asked its golden requests."""
    specs, feedback = manifest.interface.inputs, _feedback(manifest)
    own = [spec for spec in specs if spec not in feedback]
    plain = _runner(folder, manifest, device, engine, golden, chosen.graph, own)
    solving = _runner(folder, manifest, device, engine, golden, SOLVING, specs) if feedback else None
    user, item = (next(spec.name for spec in specs if spec.per == per) for per in ("request", "candidate"))
    hasher = Hasher.of(specs)
    loaded = LoadedRelease(manifest, device, user, item, plain, hasher, solving, chosen.name)
    answers = [_asked(loaded, chosen.tolerance, position, *one) for position, one in enumerate(golden)]
    require_variety(manifest, golden, answers)
    return loaded


def _feedback(manifest: Manifest) -> list[InputSpec]:
    return [spec for spec in manifest.interface.inputs if spec.per == "feedback"]


def _brings(manifest: Manifest, inputs: Arrays, requests: int) -> npt.NDArray[np.bool_]:
    """Which requests bring a row of feedback with a label [R]."""
    labels = [spec.name for spec in _feedback(manifest)][-len(manifest.interface.objectives) :]
    brings = np.zeros(requests, bool)
    for name in labels:
        if name in inputs:
            brings |= ~np.isnan(inputs[name].astype(np.float32)).all(axis=1)
    return brings


def without_feedback(manifest: Manifest, inputs: Arrays) -> Arrays:
    """What is left of a request where nobody brings feedback."""
    names = {spec.name for spec in _feedback(manifest)}
    return {name: values for name, values in inputs.items() if name not in names} if names else inputs


def _runner(
    folder: Path,
    manifest: Manifest,
    device: Literal["cpu", "cuda"],
    engine: Engine,
    golden: Sequence[Golden],
    score: str,
    specs: Sequence[InputSpec],
) -> Runner:
    """The graphs that take these inputs, `score` or what it is joined to."""
    output, names = manifest.interface.output, {spec.name for spec in specs}
    graphs = [folder / name for name in graphs_of(score, device)]
    first = next((inputs for inputs, _, _ in golden if inputs.keys() == names), None)
    if first is None:
        raise ReleaseRefused(_about(manifest, f"no golden request is one for {graphs[0].name}"))
    try:
        runner: Runner
        if len(graphs) == 1:
            runner = Whole(graphs[0], output, engine)
        else:
            lookup, scores = graphs
            on_gpu = device == "cuda"
            runner = Halves(lookup, scores, output, engine, first) if on_gpu else Pair(lookup, scores, output, engine)
    except DeviceUnavailable:
        raise
    except Exception as error:  # onnxruntime's errors share no base class below Exception
        beside = "; ".join(
            f"{graph.name} with {', '.join(manifest.graphs[graph.name]) or 'no other file'}"
            for graph in graphs
            if graph.name in manifest.graphs
        )
        told = f" from {beside}, as its manifest says" if beside else ""
        raise ReleaseRefused(_about(manifest, f"onnxruntime does not load it{told}: {error}")) from error
    wanted = {spec.name: (_TYPES[spec.dtype], len(spec.shape)) for spec in specs}
    found = {value.name: (value.type, len(value.shape)) for value in runner.inputs}
    if found != wanted:
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ReleaseRefused(_about(manifest, f"its graph takes other inputs than its manifest says: {', '.join(odd)}"))
    return runner


def _asked(
    loaded: LoadedRelease, tolerance: float, position: int, inputs: Arrays, shape: tuple[int, int], expected: F32
) -> F32:
    """The answer to a golden request, if it is the right one."""
    manifest = loaded.manifest
    ratings = np.array([objective.kind == "rating" for objective in manifest.interface.objectives])
    try:
        answer = loaded.run(inputs, shape)
    except ReleaseRefused:
        raise
    except Exception as error:  # as above
        raise ReleaseRefused(_about(manifest, f"golden request {position} fails: {error}")) from error
    scale = np.where(ratings, 1.0 + np.abs(expected), 1.0)
    limits = np.where(_brings(manifest, inputs, shape[0]), FEEDBACK_TOLERANCE, tolerance)
    differences = np.max(np.abs(answer - expected) / scale, axis=(1, 2))
    worst = int(np.argmax(differences / limits))  # the first that is not a number, if there is one
    difference, limit = float(differences[worst]), float(limits[worst])
    if not difference <= limit:  # also where it is not a number
        raise ReleaseRefused(
            _about(
                manifest,
                f"golden request {position} is answered {difference:.3g} off by {loaded.variant}, limit {limit:g}",
            )
        )
    return answer


def _golden(manifest: Manifest, data: bytes) -> list[Golden]:
    specs, objectives = manifest.interface.inputs, len(manifest.interface.objectives)
    binary = [objective.kind == "binary" for objective in manifest.interface.objectives]
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
            rows = int(one.get("feedback", 0))
            asked = [spec for spec in specs if rows or spec.per != "feedback"]
            axes = {"request": (requests,), "candidate": (requests, candidates), "feedback": (requests, rows)}
            inputs, shape = read_request(
                asked, {spec.name: _shaped(spec, one, axes[spec.per]) for spec in asked}, binary=binary
            )
            golden.append((inputs, shape, expected))
        return golden
    except (ValueError, TypeError, KeyError, RecursionError, RequestRejected) as error:
        raise ReleaseRefused(_about(manifest, f"its golden requests cannot be read: {error!r}")) from error


def _shaped(spec: InputSpec, one: dict[str, dict[str, list[object]]], axes: tuple[int, ...]) -> object:
    values = one["inputs"][spec.name]
    flat = np.array(values, np.float32 if spec.dtype == "float32" else object)
    shaped = flat.reshape(axes if spec.values is None else (*axes, spec.values))
    return shaped.astype(np.int64) if spec.dtype == "int64" else shaped


def _about(manifest: Manifest, what: str) -> str:
    return f"release {manifest.release[:12]} of night {manifest.night} is refused: {what}; publish it again"
