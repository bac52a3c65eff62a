"""Publish: blobs, manifest last, then one compare-and-swap of the pointer, if the gate agreed."""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from getpass import getuser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tasks.clients.workspace import canonical_json
from tasks.data.contract import DataConfig
from tasks.evaluate import exam_table
from tasks.ingest import intent_key, released_prefix
from tasks.learning.intervals import Interval
from tasks.references import (
    BankRef,
    BaseRef,
    ExamRef,
    ExportRef,
    IngestRef,
    Place,
    PrepareRef,
    PublishRef,
    StepRef,
    ValidateRef,
    VerdictRef,
)
from tasks.release.gate import GateConfig, ReleaseVerdict
from tasks.release.gate import override as overridden
from tasks.release.interface import Interface, read_interface
from tasks.release.manifest import Manifest, describe
from tasks.release.night import (
    Adapters,
    Comparison,
    Epoch,
    Expectation,
    HistoryNight,
    InputFile,
    Intake,
    LadderLevel,
    NightReport,
    ObjectiveExams,
    PublishedFile,
    Step,
)
from tasks.release.pointer import promote as move_pointer
from tasks.release.pointer import publish_release, read_pointer
from tasks.release.report import render
from tasks.release.strict_json import Reader
from tasks.releases import location
from tasks.steps import Product, Progress, carry_out, open_workspace, recalled, record_of, still_held, store_of, verb

VERSION = 1
PACKAGES = ("torch", "onnx", "onnxruntime-gpu", "numpy", "pyarrow", "duckdb", "great-expectations", "prefect")


@verb
def publish(
    place: Place,
    data: DataConfig,
    gate: GateConfig,
    ingested: IngestRef,
    validated: ValidateRef,
    prepared: PrepareRef,
    base: BaseRef,
    exam: ExamRef,
    verdict: VerdictRef,
    ship: BankRef,
    exported: ExportRef,
    steps: tuple[StepRef, ...],
    config: str,
    promote: bool,
    override: str | None,
    token: int,
) -> PublishRef:
    """Make the release visible, then move the pointer if the gate said go and promotion was asked for.

    Raises:
        PointerMoved: somebody else moved the pointer since the night began.
        StoreError: the store refused; publishing again is safe.
    """
    store, workspace = store_of(place), open_workspace(place)
    night = ingested.night
    if override is not None:
        said = ReleaseVerdict(verdict.go, "hold", verdict.reasons)
        decision = overridden(said, True, _operator(), override)
        verdict = verdict.model_copy(
            update={"go": True, "decided_by": decision.decided_by, "reasons": decision.reasons}
        )
    folder_key = f"{place.pipeline}/releases/{exported.release}"

    def work(folder: Path, progress: Progress) -> Product:
        release = folder / "release"
        shutil.copytree(workspace.folder(record_of(place, exported), "release"), release)
        report = _report(place, data, gate, ingested, validated, prepared, base, exam, verdict, ship, exported, steps)
        run = {
            "version": 1,
            "night": night.isoformat(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "go": verdict.go,
            "decided_by": verdict.decided_by,
            "parent": ingested.parent,
            "champion": ingested.champion,
            "config": config,
            "exam": exam.key,
            "verdict": verdict.key,
            "report": asdict(report),
        }
        pages = {
            name: workspace.file(docs, name).read_bytes()
            for docs in (recalled(place, "docs", validated.docs),)
            for name in docs.content["files"]
        }
        manifest = Manifest(
            place.pipeline,
            exported.release,
            describe(release),
            _interface(release / "interface.json"),
            record_of(place, exported).notes["parity"],
            {one["objective"]: one["nightly"] for one in record_of(place, verdict).notes["exams"]},
            report.provenance,
        )
        extra = {**pages, "run.json": canonical_json(run), "report.html": render(report).encode()}
        published = publish_release(store, place.pipeline, release, manifest, extra)
        progress(len(manifest.files), len(manifest.files), "files")
        _note_intent(place, ingested, exported.release, config)
        still_held()
        why, promoted = _promote(place, ingested, exported, verdict, promote, token)
        return Product(
            {"release": exported.release, "promoted": promoted, "why": why},
            {"new": published.new, "written": list(published.written), "reused": list(published.reused)},
        )

    inputs = {"release": exported.digest, "verdict": verdict.digest, "generation": str(ingested.generation)}
    section = {"promote": promote, "config": config, "override": override}
    record, shared = carry_out(place, "publish", VERSION, night, inputs, section, work)
    # Also where the record was there: since then another config may have made this night its own.
    _note_released(place, ingested, exam, verdict, exported, config)
    return PublishRef(
        **shared,
        release=exported.release,
        night=night,
        promoted=record.content["promoted"],
        why=record.content["why"],
        report=location(place, f"{folder_key}/report.html"),
    )


def _promote(
    place: Place, ingested: IngestRef, exported: ExportRef, verdict: VerdictRef, asked: bool, token: int
) -> tuple[str, bool]:
    """Whether the pointer names the release now, and the sentence that says why."""
    pointer = read_pointer(store_of(place), place.pipeline)
    if pointer is not None and pointer.release == exported.release:
        # A run that died here has moved it; moving it again writes the ledger entry that may be lacking, and no more.
        return move_pointer(store_of(place), place.pipeline, exported.release, ingested.night, token).reason, True
    if not asked:
        return "promotion was not asked for (--promote)", False
    if not verdict.go:
        return f"the gate holds it ({verdict.decided_by})", False
    if pointer is not None and pointer.night > ingested.night:
        return f"the pointer names the later night {pointer.night}; it moves back only by force", False
    # An operator's reason is the first of the reasons; pointer and ledger keep it.
    why = verdict.reasons[0] if verdict.decided_by == "operator" else f"the gate said go ({verdict.decided_by})"
    move_pointer(
        *(store_of(place), place.pipeline, exported.release, ingested.night, token),
        expected=ingested.generation,
        reason=why,
    )
    return why, True


def _operator() -> str:
    try:
        return getuser()
    except (OSError, KeyError):  # a container's user need not have a name
        return f"uid {os.getuid()}"


def _note_intent(place: Place, ingested: IngestRef, release: str, config: str) -> None:
    """Tell a run that resumes this one which release it was about to promote."""
    store, key = store_of(place), intent_key(place, ingested.night, ingested.frozen, config)
    before = store.get(key)
    after = canonical_json({**json.loads(before.data), "release": release})
    if after != before.data:
        store.swap(key, after, before.etag)


def _note_released(
    place: Place, ingested: IngestRef, exam: ExamRef, verdict: VerdictRef, exported: ExportRef, config: str
) -> None:
    """Keep the night's newest release where later nights look for parents and earlier exams."""
    store, key = store_of(place), f"{released_prefix(place)}night={ingested.night.isoformat()}.json"
    before = store.find(key)
    after = canonical_json(
        {
            "version": 1,
            "release": exported.release,
            "go": verdict.go,
            "exam": exam.key,
            "verdict": verdict.key,
            "config": config,
        }
    )
    if before is None or before.data != after:
        store.swap(key, after, None if before is None else before.etag)


def _interface(path: Path) -> Interface:
    read = Reader(f"the exported {path.name}")
    return read_interface(read, read.document(path.read_bytes(), 2**24))


def _report(
    place: Place,
    data: DataConfig,
    gate: GateConfig,
    ingested: IngestRef,
    validated: ValidateRef,
    prepared: PrepareRef,
    base: BaseRef,
    exam: ExamRef,
    verdict: VerdictRef,
    ship: BankRef,
    exported: ExportRef,
    steps: tuple[StepRef, ...],
) -> NightReport:
    store = store_of(place)
    frozen = record_of(place, ingested).content["frozen"]
    checked, trained, judged = record_of(place, validated), record_of(place, base), record_of(place, verdict)
    examined = record_of(place, exam)
    layout = recalled(place, "history", prepared.history)
    files = record_of(place, exported).content["files"]
    blobs = f"{place.pipeline}/blobs/"
    lead = gate.objective or data.objectives[0].name
    return NightReport(
        pipeline=place.pipeline,
        night=ingested.night.isoformat(),
        release=exported.release,
        parent=ingested.parent,
        champion=ingested.champion,
        go=verdict.go,
        decided_by=verdict.decided_by,
        reasons=verdict.reasons,
        intake=Intake(
            files=tuple(InputFile(**file) for file in frozen["files"]),
            rows=validated.rows,
            clean=validated.clean,
            bad=validated.bad,
            limit=data.max_bad_rows,
            reasons=validated.reasons,
            examples=tuple(checked.notes["examples"]),
            expectations=tuple(_expectation(one) for one in checked.notes["expectations"]),
            data_docs="data_docs/index.html",
        ),
        history=(
            *(HistoryNight(night, None) for night in layout.content["nights"]),
            *(HistoryNight(night, None, reason) for night, reason in prepared.left_out.items()),
        ),
        curve=tuple(Epoch(*point) for point in trained.notes["curve"]),
        best_epoch=trained.content["epoch"],
        objectives=tuple(_exams(one, lead, gate) for one in judged.notes["exams"]),
        adapters=_adapters(place, data, ship, examined.content["harmful"], examined.notes, exam),
        published=tuple(
            PublishedFile(
                name.removeprefix("release/"), about["bytes"], about["sha256"], store.exists(blobs + about["sha256"])
            )
            for name, about in sorted(files.items())
        ),
        steps=tuple(Step(step.step, step.seconds, step.peak_mib, step.reused) for step in steps),
        alarms=tuple((name, message) for name, message in judged.notes["alarms"]),
        provenance=provenance() | {"training": trained.notes["why"], "champion": judged.notes["champion"]["why"]},
    )


def _expectation(one: Mapping[str, Any]) -> Expectation:
    about = ", ".join(str(value) for name, value in one["kwargs"].items() if name in ("column", "column_list"))
    found = one["observed"] if one["observed"] is not None else f"{one['unexpected']} unexpected"
    return Expectation(f"{one['type']}({about})", bool(one["success"]), str(found))


def _exams(told: Mapping[str, Any], lead: str, gate: GateConfig) -> ObjectiveExams:
    return ObjectiveExams(
        objective=told["objective"],
        loss="log-loss" if told["kind"] == "binary" else "squared error",
        nightly=told["nightly"],
        first_contact={int(k): figures for k, figures in told["first_contact"].items()},
        comparisons=tuple(
            Comparison.of(
                *(one["exam"], one["method"], Interval.from_json(one["interval"])),
                *(one["k"], one["common_rows"], one["nights"]),
            )
            for one in told["comparisons"]
        ),
        margin=gate.margin if told["objective"] == lead else None,
    )


def _adapters(
    place: Place, data: DataConfig, ship: BankRef, harmful: list[list[str]], notes: Mapping[str, Any], exam: ExamRef
) -> Adapters:
    record = record_of(place, ship)
    served = exam_table(place, exam.key)["level"].to_numpy()
    names = record.content["names"]
    return Adapters(
        levels=tuple(
            LadderLevel(name, seen, adapted, len(harmful[at]), int((served == at).sum()))
            for at, (name, seen, adapted) in enumerate(
                zip(names, record.content["seen"], record.content["levels"], strict=True)
            )
        ),
        support=tuple((label, count) for label, count in record.content["support"]),
        tested=tuple(notes["tested"]),
    )


def provenance() -> dict[str, str]:
    """What made a release: commit, Python, machine and package versions."""
    told = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            told[package] = version(package)
        except PackageNotFoundError:
            told[package] = "not installed"
    root = Path(__file__).resolve().parent.parent
    found = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    told["commit"] = found.stdout.strip() if found.returncode == 0 else "not a git checkout"
    return told
