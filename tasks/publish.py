"""Publish: blobs, manifest last, then one compare-and-swap of the pointer, if the gate agreed."""

import json
import os
import shutil
from dataclasses import asdict
from datetime import UTC, date, datetime
from getpass import getuser
from pathlib import Path

from tasks.clients.workspace import canonical_json
from tasks.data.contract import DataConfig
from tasks.evaluate import LIFT
from tasks.ingest import intent_key, released_prefix
from tasks.night_report import night_report
from tasks.references import ExamRef, ExportRef, FinishedSteps, IngestRef, Place, PublishRef, VerdictRef
from tasks.release import lift
from tasks.release.export_config import ExportConfig
from tasks.release.external import opened_by
from tasks.release.gate import GateConfig, ReleaseVerdict
from tasks.release.gate import override as overridden
from tasks.release.interface import Interface, read_interface
from tasks.release.manifest import Manifest, describe, manifest_key
from tasks.release.manifest_parts import LevelSegments
from tasks.release.marks import names_of, spare
from tasks.release.notes import find_night
from tasks.release.pointer import promote as move_pointer
from tasks.release.pointer import read_pointer
from tasks.release.publishing import publish_release
from tasks.release.report import render
from tasks.release.requirements import requirements
from tasks.release.segments_table import level_segments
from tasks.release.strict_json import Reader
from tasks.releases import location
from tasks.steps import Product, Progress, carry_out, open_workspace, recalled, record_of, still_held, store_of, verb
from tasks.variants import described

VERSION = 1


@verb
def publish(
    place: Place,
    data: DataConfig,
    gate: GateConfig,
    settings: ExportConfig,
    done: FinishedSteps,
    config: str,
    promote: bool,
    override: str | None,
    token: int,
) -> PublishRef:
    """Make the release visible, then move the pointer if the gate said go and promotion was asked for.

    Args:
        place: where.
        data: the contract.
        gate: the gate's section.
        settings: what variants may cost.
        done: what the night's steps have left.
        config: digest of the config, to be kept with the release.
        promote: whether the pointer may move.
        override: an operator's reason to release although the gate holds; it stands when the night is run again.
        token: of the lease, for the pointer.

    Raises:
        PointerMoved: somebody else moved the pointer since the night began.
        ObjectCorrupt: the gate holds the night, and its note, where an override would stand, is damaged.
        StoreError: the store refused; publishing again is safe.
    """
    store, workspace = store_of(place), open_workspace(place)
    if override is None and not done.verdict.go:
        override = _standing_override(place, done.ingested.night, done.exported.release)
    if override is not None:
        done = done.model_copy(update={"verdict": _overridden(done.verdict, override)})
    ingested, exported, verdict = done.ingested, done.exported, done.verdict
    night = ingested.night
    folder_key = f"{place.pipeline}/releases/{exported.release}"

    def work(folder: Path, progress: Progress) -> Product:
        release = folder / "release"
        shutil.copytree(workspace.folder(record_of(place, exported), "release"), release)
        report = night_report(place, data, gate, done)
        run = {
            "version": 1,
            "night": night.isoformat(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "go": verdict.go,
            "decided_by": verdict.decided_by,
            "parent": None if ingested.parent is None else ingested.parent.release,
            "champion": ingested.champion,
            "config": config,
            "exam": done.exam.key,
            "verdict": verdict.key,
            "report": asdict(report),
        }
        pages = {
            name: workspace.file(docs, name).read_bytes()
            for docs in (recalled(place, "docs", done.validated.docs),)
            for name in docs.content["files"]
        }
        manifest = Manifest(
            place.pipeline,
            exported.release,
            describe(release),
            _interface(release / "interface.json"),
            {name: value for name, value in record_of(place, exported).notes["parity"].items() if name != "variants"},
            {one["objective"]: one["nightly"] for one in record_of(place, verdict).notes["exams"]},
            {**report.provenance, **({} if override is None else {"override": verdict.reasons[0]})},
            requirements(sorted(release.glob("*.onnx"))),
            _segments(place, done, release, data),
            variants=described(place, data, settings, done),
            graphs=opened_by(sorted(release.glob("*.onnx"))),
        )
        extra = {
            **pages,
            "run.json": canonical_json(run),
            "report.html": render(report).encode(),
            "lift.parquet": workspace.file(record_of(place, done.exam), LIFT).read_bytes(),
        }
        spare(store, place.pipeline, names_of(manifest), leased=True)
        published = publish_release(store, place.pipeline, release, manifest, extra, still_held)
        still_held()
        progress(len(manifest.files), len(manifest.files), "files")
        replaces = _note_intent(place, ingested, exported.release, config)
        still_held()
        why, promoted = _promote(place, ingested, exported, verdict, promote, token, replaces)
        return Product(
            {"release": exported.release, "promoted": promoted, "why": why},
            {
                "new": published.new,
                "written": list(published.written),
                "reused": list(published.reused),
                "signed_by": published.signed_by,
            },
        )

    inputs = {"release": exported.digest, "verdict": verdict.digest, "generation": str(ingested.generation)}
    if done.variants is not None:
        inputs["variants"] = done.variants.digest
    section = {"promote": promote, "config": config, "override": override}
    # `nightrank releases gc` may have removed it since.
    there = manifest_key(place.pipeline, exported.release)
    record, shared = carry_out(
        place, "publish", VERSION, night, inputs, section, work, stands=lambda _: store.exists(there)
    )
    # Also where the record was there: since then another config may have made this night its own.
    _note_released(place, ingested, done.exam, verdict, exported, config, override)
    return PublishRef(
        **shared,
        release=exported.release,
        night=night,
        promoted=record.content["promoted"],
        why=record.content["why"],
        report=location(place, f"{folder_key}/report.html"),
        signed_by=record.notes.get("signed_by"),  # a publish that was recorded before there were signatures has none
    )


def _segments(place: Place, done: FinishedSteps, release: Path, data: DataConfig) -> tuple[LevelSegments, ...]:
    """Who is served by what, from the bank that ships and the exams."""
    ship, exam, interface = (
        record_of(place, done.ship),
        record_of(place, done.exam),
        _interface(release / "interface.json"),
    )
    return level_segments(
        release / "segments.parquet",
        lift.load(open_workspace(place).file(exam, LIFT)),
        data.objectives[0].name,
        [level.columns for level in interface.levels],
        ship.content["seen"],
        json.loads((release / "base.json").read_bytes())["adapter"]["kind"],
        exam.notes["nights"],
    )


def _promote(
    place: Place,
    ingested: IngestRef,
    exported: ExportRef,
    verdict: VerdictRef,
    asked: bool,
    token: int,
    replaces: str | None,
) -> tuple[str, bool]:
    """Whether the pointer names the release now, and the sentence that says why.

    Where it names the release that this very night made before, of the same rows and config by an older version, the
    move that is to be followed was our own.
    """
    pointer = read_pointer(store_of(place), place.pipeline)
    if pointer is not None and pointer.release == exported.release:
        # A run that died here has moved it; moving it again writes the ledger entry that may be lacking, and no more.
        return move_pointer(store_of(place), place.pipeline, exported.release, ingested.night, token).reason, True
    if not asked:
        return "promotion was not asked for (--promote)", False
    if not verdict.go:
        return f"the gate holds it ({verdict.decided_by})", False
    if pointer is not None and pointer.hold is not None:
        return f"an operator holds the pointer ({pointer.hold})", False
    if pointer is not None and pointer.night > ingested.night:
        return f"the pointer names the later night {pointer.night}; it moves back only by force", False
    # An operator's reason is the first of the reasons; pointer and ledger keep it.
    why = verdict.reasons[0] if verdict.decided_by == "operator" else f"the gate said go ({verdict.decided_by})"
    ours = pointer is not None and pointer.release == replaces and pointer.night == ingested.night
    move_pointer(
        *(store_of(place), place.pipeline, exported.release, ingested.night, token),
        expected=pointer.generation if pointer is not None and ours else ingested.generation,
        reason=why,
    )
    return why, True


def _overridden(verdict: VerdictRef, reason: str) -> VerdictRef:
    """The verdict with an operator's word in place of the gate's."""
    said = ReleaseVerdict(verdict.go, "hold", verdict.reasons)
    decision = overridden(said, True, _operator(), reason)
    return verdict.model_copy(update={"go": True, "decided_by": decision.decided_by, "reasons": decision.reasons})


def _operator() -> str:
    try:
        return getuser()
    except (OSError, KeyError):  # a container's user need not have a name
        return f"uid {os.getuid()}"


def _note_intent(place: Place, ingested: IngestRef, release: str, config: str) -> str | None:
    """Tell a run that resumes this one which release it was about to promote; returns which one that replaces."""
    store, key = store_of(place), intent_key(place, ingested.night, ingested.frozen, config)
    before = store.get(key)
    noted: dict[str, str | None] = json.loads(before.data)
    if noted["release"] not in (None, release):
        noted["replaces"] = noted["release"]
    after = canonical_json({**noted, "release": release})
    if after != before.data:
        store.swap(key, after, before.etag)
    return noted.get("replaces")


def _note_released(
    place: Place,
    ingested: IngestRef,
    exam: ExamRef,
    verdict: VerdictRef,
    exported: ExportRef,
    config: str,
    override: str | None,
) -> None:
    """Keep the night's newest release where later nights look for parents and earlier exams."""
    store, key = store_of(place), _released_key(place, ingested.night)
    before = store.find(key)
    after = canonical_json(
        {
            "version": 1,
            "release": exported.release,
            "go": verdict.go,
            "exam": exam.key,
            "verdict": verdict.key,
            "config": config,
            "override": override,
        }
    )
    if before is None or before.data != after:
        store.swap(key, after, None if before is None else before.etag)


def _standing_override(place: Place, night: date, release: str) -> str | None:
    """The reason with which an operator has released this very release of the night before: his word stands."""
    noted = find_night(store_of(place), _released_key(place, night))
    return noted.override if noted is not None and noted.release == release else None


def _released_key(place: Place, night: date) -> str:
    return f"{released_prefix(place)}night={night.isoformat()}.json"


def _interface(path: Path) -> Interface:
    read = Reader(f"the exported {path.name}")
    return read_interface(read, read.document(path.read_bytes(), 2**24))
