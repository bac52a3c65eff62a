"""What a night's report says, gathered from the records that its steps left."""

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tasks.adapt import cost_of
from tasks.data.contract import DataConfig
from tasks.evaluate import EARNED, LIFT, exam_table
from tasks.learning.exams import PARENT
from tasks.learning.intervals import Interval
from tasks.recommend import varieties_of
from tasks.references import FinishedSteps, Place
from tasks.release import cost, earned, lift
from tasks.release.gate import GateConfig
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
    Retention,
    TimedStep,
    Worth,
)
from tasks.release.signing import signer
from tasks.release.variety import with_pooled
from tasks.steps import open_workspace, recalled, record_of, store_of

PACKAGES = ("torch", "onnx", "onnxruntime-gpu", "numpy", "pyarrow", "duckdb", "great-expectations", "prefect")


def night_report(place: Place, data: DataConfig, gate: GateConfig, done: FinishedSteps) -> NightReport:
    """Everything that a person is told about a night.

    Args:
        place: where its records are.
        data: the contract.
        gate: the gate's section.
        done: the night's steps; the verdict is the operator's where he overruled the gate.

    Raises:
        ObjectMissing: a record is gone.
    """
    ingested, validated, verdict = done.ingested, done.validated, done.verdict
    frozen = record_of(place, ingested).content["frozen"]
    checked, trained, judged = record_of(place, validated), record_of(place, done.base), record_of(place, verdict)
    layout = recalled(place, "history", done.prepared.history)
    store, files = store_of(place), record_of(place, done.exported).content["files"]
    blobs = f"{place.pipeline}/blobs/"
    lead = gate.objective or data.objectives[0].name
    return NightReport(
        pipeline=place.pipeline,
        night=ingested.night.isoformat(),
        release=done.exported.release,
        parent=None if ingested.parent is None else ingested.parent.release,
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
            *(HistoryNight(night, None, reason) for night, reason in done.prepared.left_out.items()),
        ),
        curve=tuple(Epoch(*point) for point in trained.notes["curve"]),
        best_epoch=trained.content["epoch"],
        objectives=tuple(_exams(one, lead, gate) for one in judged.notes["exams"]),
        adapters=_adapters(place, done),
        published=tuple(
            PublishedFile(
                name.removeprefix("release/"), about["bytes"], about["sha256"], store.exists(blobs + about["sha256"])
            )
            for name, about in sorted(files.items())
        ),
        steps=tuple(TimedStep(step.step, step.seconds, step.peak_mib, step.reused) for step in done.in_order),
        alarms=tuple((name, message) for name, message in judged.notes["alarms"]),
        retention=_retention(record_of(place, done.retention).content["figures"], done.retention.told, gate),
        worth=_worth(place, data, done),
        signed_by=None if (key := signer()) is None else key.key_id,
        provenance=_provenance()
        | {"training": trained.notes["why"], "champion": judged.notes["champion"]["why"]}
        | ({"TensorBoard": trained.notes["unwritten"]} if "unwritten" in trained.notes else {}),
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


def _retention(figures: Mapping[str, Any] | None, told: str, gate: GateConfig) -> Retention:
    if figures is None:
        return Retention(told)

    def compared(one: Mapping[str, Any], method: str, k: int, nights: int) -> Comparison:
        return Comparison.of("golden", method, Interval.from_json(one["interval"]), k, nights=nights)

    nights = figures["nights"]
    return Retention(
        told,
        tuple(compared(one, one["method"], one["k"], len(nights)) for one in figures["pooled"]),
        tuple((one["night"], compared(one, PARENT, 0, 1)) for one in nights),
        gate.golden.margin,
    )


def _worth(place: Place, data: DataConfig, done: FinishedSteps) -> Worth:
    examined, workspace = record_of(place, done.exam), open_workspace(place)
    return Worth(
        nights=examined.notes["nights"],
        steps=tuple(earned.load(workspace.file(examined, EARNED))),
        lifts=tuple(lift.summaries(lift.load(workspace.file(examined, LIFT)), examined.notes["unnamed"])),
        costs=tuple(cost.Cost(**one) for one in examined.notes["cost"]),
        varieties=tuple(with_pooled(varieties_of(place, done.lists))),
    )


def _adapters(place: Place, done: FinishedSteps) -> Adapters:
    ship = record_of(place, done.ship)
    shipped = ship.content
    served = exam_table(place, done.exam.key)["level"].to_numpy()
    counts = zip(*(shipped[name] for name in ("names", "seen", "levels", "refused")), strict=True)
    return Adapters(
        levels=tuple(
            LadderLevel(name, seen, adapted, refused, int((served == at).sum()), cost.bytes, cost.milliseconds)
            for at, ((name, seen, adapted, refused), cost) in enumerate(zip(counts, cost_of(ship), strict=True))
        ),
        support=tuple((label, count) for label, count in shipped["support"]),
        tested=tuple(record_of(place, done.exam).notes["tested"]),
    )


def _provenance() -> dict[str, str]:
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
