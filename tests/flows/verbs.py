"""Stand-ins for the verbs: each returns a reference that says what it was called with, and does nothing."""

from collections.abc import Callable
from datetime import date
from typing import Any

import pytest

from tasks import references
from tasks.references import ScoreRow, StepRef

NIGHT = date(2026, 3, 5)

FIELDS: dict[str, dict[str, Any]] = {
    "IngestRef": {
        "rows": 100, "files": 2, "bytes": 9, "frozen": "f", "parent": None, "champion": None, "champion_night": None,
        "exams": (),
    },
    "ValidateRef": {"rows": 100, "clean": 99, "bad": 1, "reasons": {"outside_night": 1}},
    "PrepareRef": {"nights": (date(2026, 3, 1),), "left_out": {}, "rows": 1, "users": 1, "items": 1, "segments": 1},
    "BaseRef": {"epochs": 3, "stop_loss": 0.5, "parameters": 10},
    "BankRef": {"segments": 3, "adapted": 2},
    "ExamRef": {"rows": 99, "users": 10},
    "VerdictRef": {
        "go": True, "decided_by": "proven", "reasons": (), "alarms": ("inert: nothing changes [1]",),
        "scores": (
            ScoreRow(exam="nightly", method="adapted", rows=99, log_loss=0.5, auc=0.7),
            ScoreRow(exam="nightly", method="popularity", rows=99, log_loss=0.6, auc=0.6),
            ScoreRow(exam="first contact, 5 rows", method="adapted", rows=50, log_loss=0.45),
        ),
    },
    "ExportRef": {"release": "a" * 64, "bytes": 9, "parity": 1e-7},
    "PublishRef": {"release": "a" * 64, "promoted": True, "why": "the gate said go", "report": "/r/report.html"},
}  # fmt: skip

ORDER = ["ingest", "validate", "prepare", "meta_train", "adapt", "evaluate", "judge", "adapt", "export", "publish"]
KINDS = {
    "ingest": "IngestRef", "validate": "ValidateRef", "prepare": "PrepareRef", "meta_train": "BaseRef",
    "adapt": "BankRef", "evaluate": "ExamRef", "judge": "VerdictRef", "export": "ExportRef", "publish": "PublishRef",
}  # fmt: skip


class Calls(list[tuple[str, tuple[Any, ...], dict[str, Any]]]):
    """Which verbs were called, in order, with what."""

    def named(self, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return next((args, kwargs) for called, args, kwargs in self if called == name)


def stand_in(monkeypatch: pytest.MonkeyPatch, failing: dict[date, Exception] | None = None) -> Calls:
    """Replace the verbs in `flows.nightly`; on the nights in ``failing``, `validate` raises."""
    calls = Calls()

    def fake(name: str) -> Callable[..., StepRef]:
        def called(*args: Any, **kwargs: Any) -> StepRef:
            calls.append((name, args, kwargs))
            night = next((arg for arg in args if isinstance(arg, date)), None) or args[-1] if name == "ingest" else None
            if name == "validate" and failing and args[2].night in failing:
                raise failing[args[2].night]
            fields = dict(FIELDS[KINDS[name]])
            if name == "ingest":
                fields["night"] = night
            if name == "publish":
                fields["night"] = args[2].night
            if name == "adapt":
                fields["bank"] = kwargs["bank"]
            step = f"adapt-{kwargs['bank']}" if name == "adapt" else name
            kind: type[StepRef] = getattr(references, KINDS[name])
            return kind(step=step, key="k", digest=step, reused=False, seconds=1.0, peak_mib=2.0, **fields)

        return called

    for name in KINDS:
        monkeypatch.setattr(f"flows.nightly.{name}", fake(name))
    return calls
