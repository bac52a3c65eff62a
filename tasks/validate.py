"""Validate: clean rows and quarantined rows of a frozen night, and whether it may be learned from."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tasks import errors
from tasks.clients.workspace import StepRecord
from tasks.data import expectations
from tasks.data.contract import DataConfig
from tasks.data.expectations import Validated
from tasks.data.interactions import FrozenNight, thaw
from tasks.data.lakes import lake_of
from tasks.errors import DataRejected
from tasks.ingest import lake, thawed
from tasks.references import IngestRef, Place, ValidateRef
from tasks.steps import Product, Progress, carry_out, open_workspace, record_of, verb

VERSION = 1
QUARANTINE = "quarantine.parquet"


@verb
def validate(place: Place, data: DataConfig, ingested: IngestRef) -> ValidateRef:
    """Hold a frozen night against its expectations; bad rows go to quarantine.

    Raises:
        ExpectationsFailed: the night breaks an expectation, or too many of its rows are bad.
        ValidatorBroken: there is no verdict.
    """
    frozen = thawed(record_of(place, ingested).content)
    made: list[Validated] = []
    record, shared = validate_night(place, data, frozen, made.append)
    docs = "" if ingested.replayed else _build_docs(place, data, frozen, made)[0].key
    content = record.content
    return ValidateRef(
        **shared,
        rows=content["rows"],
        clean=content["clean"],
        bad=content["bad"],
        reasons=content["reasons"],
        docs=docs,
    )


def validate_night(
    place: Place, data: DataConfig, frozen: FrozenNight, told: Callable[[Validated], None] = lambda found: None
) -> tuple[StepRecord, dict[str, object]]:
    """The validation of a frozen night, made now or before.

    Args:
        place: where.
        data: the contract.
        frozen: the night.
        told: called with what a validation found that is made now.

    Raises:
        ExpectationsFailed: as `validate`; the rejection itself is remembered.
    """

    def work(folder: Path, progress: Progress) -> Product:
        try:
            found = _judged(place, data, frozen, folder)
        except DataRejected as error:
            bad = folder / QUARANTINE
            message = str(error).replace(str(bad), f"{{{QUARANTINE}}}")
            kept = {QUARANTINE: bad} if bad.exists() else {}
            return Product({"rejected": {"error": type(error).__name__, "message": message}}, {}, kept)
        told(found)
        progress(found.rows, found.rows, "rows")
        parquet = {"clean.parquet": found.clean_file}
        if found.quarantine_file is not None:
            parquet[QUARANTINE] = found.quarantine_file
        return Product(
            {"rows": found.rows, "clean": found.clean, "bad": found.bad, "reasons": found.reasons},
            {"expectations": found.expectations, "examples": list(found.examples)},
            parquet,
        )

    record, shared = carry_out(
        place, "validate", VERSION, frozen.night, {"files": frozen.digest}, expected_section(data), work
    )
    if "rejected" in record.content:
        rejected = record.content["rejected"]
        message = rejected["message"]
        if QUARANTINE in record.content["files"]:
            message = message.replace(f"{{{QUARANTINE}}}", str(open_workspace(place).file(record, QUARANTINE)))
        raise getattr(errors, rejected["error"])(message)
    return record, shared


def _judged(place: Place, data: DataConfig, frozen: FrozenNight, folder: Path) -> Validated:
    """The verdict on a frozen night's files, with clean and bad rows in the folder."""
    files = thaw(frozen, data, Path(place.scratch), lake(data))
    lakes = [lake_of(data, file.path) for file in frozen.files]
    return expectations.validate(data, frozen.night, files, folder, lakes)


def expected_section(data: DataConfig) -> dict[str, object]:
    """What of the contract a validation depends on."""
    kept = data.model_dump(mode="json", exclude={"source", "partition", "lakes", "window_nights", "min_history_nights"})
    return dict(kept)


def clean_file(place: Place, record: StepRecord) -> Path:
    """The clean rows of a validated night."""
    return open_workspace(place).file(record, "clean.parquet")


def _build_docs(
    place: Place, data: DataConfig, frozen: FrozenNight, made: Sequence[Validated]
) -> tuple[StepRecord, dict[str, object]]:
    """Data Docs are a step of their own: their bytes tell the time of the run, and no digest may depend on them.

    They show the validation that was just made; where it was remembered, the night is judged once more for them.
    """

    def work(folder: Path, progress: Progress) -> Product:
        found = made[-1] if made else _judged(place, data, frozen, folder)
        site = folder / "data_docs"
        expectations.data_docs(found, site)
        pages = {
            f"data_docs/{path.relative_to(site).as_posix()}": path
            for path in sorted(site.rglob("*"))
            if path.suffix in (".html", ".css")  # not the four megabytes of fonts and pictures, night after night
        }
        return Product({"pages": len(pages)}, {}, pages)

    return carry_out(place, "docs", VERSION, frozen.night, {"files": frozen.digest}, expected_section(data), work)
