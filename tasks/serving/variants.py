"""Which graph of a release serves: fp32, or the smaller one that is made for the device and has passed.

And which of the release's files are opened for that: no others are fetched.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tasks.errors import InvalidConfig, ReleaseRefused
from tasks.release.manifest import LARGEST_DIFFERENCE, Manifest

VariantChoice = Literal["auto", "fp32", "fp16", "int8"]
PLAIN: Literal["fp32"] = "fp32"
TOLERANCE = 1e-4
"""Largest difference of fp32 to a golden score, absolute for probabilities, relative to 1 + the score for ratings: the
trainer keeps 1e-5 on its own host; another processor's or a GPU's arithmetic differs a little more."""
SOLVING = "score_feedback.onnx"
"""From ids and feedback to scores; whatever variant serves requests without."""
ALWAYS = ("golden.json", "interface.json")
"""Opened whatever serves."""
MADE_FOR: dict[str, Literal["fp16", "int8"]] = {"cuda": "fp16", "cpu": "int8"}


@dataclass(frozen=True)
class Chosen:
    """A graph from ids to scores.

    Attributes:
        name: `fp32`, or the variant's.
        graph: its file.
        tolerance: largest difference to a golden score.
    """

    name: str
    graph: str
    tolerance: float


@dataclass(frozen=True)
class Selection:
    """What is opened of a release.

    Attributes:
        name: for a folder that holds it alone, so that no graph finds a file there that its manifest does not list.
        files: names.
    """

    name: str
    files: tuple[str, ...]


LayOut = Callable[[Selection], Path]
"""Gives a folder that has a selection's files under their names, digests verified."""


def graphs_of(score: str, device: Literal["cpu", "cuda"]) -> tuple[str, ...]:
    """The graphs that answer requests: both halves, or where onnxruntime may join them the whole.

    Args:
        score: the graph from ids to scores.
        device: where it runs.

    >>> graphs_of("score_int8.onnx", "cpu"), graphs_of("score_feedback.onnx", "cpu")
    (('lookup.onnx', 'score_int8.onnx'), ('model_feedback.onnx',))
    """
    suffix = "_feedback" if score == SOLVING else ""
    if device == "cpu" and score == f"score{suffix}.onnx":
        return (f"model{suffix}.onnx",)
    return (f"lookup{suffix}.onnx", score)


def everything(manifest: Manifest) -> Selection:
    """All content files."""
    return Selection("whole", tuple(file.name for file in manifest.files))


def selected(manifest: Manifest, chosen: Chosen, device: Literal["cpu", "cuda"]) -> Selection:
    """What a ranker opens; everything where the manifest is of a version that does not tell what graphs open."""
    if not manifest.graphs:
        return everything(manifest)
    feedback = any(spec.per == "feedback" for spec in manifest.interface.inputs)
    graphs = [*graphs_of(chosen.graph, device), *(graphs_of(SOLVING, device) if feedback else ())]
    names = {*ALWAYS, *graphs, *(file for graph in graphs for file in manifest.graphs[graph])}
    return Selection(f"{device}-{chosen.name}", tuple(sorted(names)))


def choose(manifest: Manifest, wanted: VariantChoice, device: Literal["cpu", "cuda"]) -> Chosen:
    """The graph that is to serve.

    Args:
        manifest: the release's.
        wanted: `auto` takes the variant that is made for the device if the release has one that passed, else fp32; a
            variant's name insists on it.
        device: where the ranker runs.

    Raises:
        ReleaseRefused: the release has no such variant that passed, or it claims more room for error than any may have.
        InvalidConfig: the variant is made for another device.
    """
    plain = Chosen(PLAIN, "score.onnx", TOLERANCE)
    if wanted == PLAIN:
        return plain
    own = MADE_FOR[device]
    if wanted not in ("auto", own):
        raise InvalidConfig(
            f"variant {wanted} is not made for {device}, where this ranker runs; set variant to auto, {own} or fp32, "
            f"or run it elsewhere"
        )
    found = manifest.variants.get(own)
    if found is None or found.verdict != "passed":
        if wanted == "auto":
            return plain
        why = "it has none" if found is None else found.why
        raise ReleaseRefused(
            f"release {manifest.release[:12]} of night {manifest.night} has no {own} that passed: {why}; set variant "
            f"to auto, which takes fp32 then"
        )
    graph, tolerance = f"score_{own}.onnx", found.parity.get("tolerance", 0.0)
    if graph not in found.files or not 0 < tolerance <= LARGEST_DIFFERENCE:
        raise ReleaseRefused(
            f"release {manifest.release[:12]} of night {manifest.night} has {own} of {', '.join(found.files)} with "
            f"tolerance {tolerance:g}, limit {LARGEST_DIFFERENCE:g}, which is no {own} of ours; publish it again"
        )
    return Chosen(own, graph, tolerance)
