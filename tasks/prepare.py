"""Prepare: vocabularies, as-of statistics and columns of the window, with the night and without it."""

from datetime import date, timedelta
from pathlib import Path

from tasks.clients.workspace import StepRecord, digest_of
from tasks.data import states, vocabulary
from tasks.data.columns import build_rows
from tasks.data.contract import DataConfig, SegmentsConfig, StatisticsConfig
from tasks.data.lakes import nights as nights_of
from tasks.data.lakes import nights_by_lake, why_absent
from tasks.errors import DataRejected, NotEnoughHistory
from tasks.ingest import frozen_before, lake, thawed
from tasks.parents import VOCABULARY, parent_file
from tasks.references import HistoryRef, IngestRef, ParentRef, Place, PrepareRef, ValidateRef
from tasks.steps import Product, Progress, carry_out, open_workspace, quietly, record_of, verb
from tasks.validate import clean_file, validate_night

VERSION = 1


@verb
def prepare(
    place: Place,
    data: DataConfig,
    segments: SegmentsConfig,
    statistics: StatisticsConfig,
    ingested: IngestRef,
    validated: ValidateRef,
) -> PrepareRef:
    """Bring in the window's nights, and lay out history, and history with the night, as columns.

    The history is a record of its own: training and the exam bank are given nothing else, so that no byte of the night
    can reach them.

    Raises:
        NotEnoughHistory: fewer clean nights before this one than `data.min_history_nights`.
    """
    night = ingested.night
    past, past_states, left_out = _brought_in(place, data, statistics, night, ingested.replayed)
    history, _ = _lay_out(place, data, segments, statistics, night, "history", ingested.parent, past, past_states)
    tonight = record_of(place, validated)
    every = [*past, tonight]
    every_state = [*past_states, _state(place, data, statistics, tonight)]
    record, shared = _lay_out(
        place, data, segments, statistics, night, "prepare", ingested.parent, every, every_state, after=history
    )
    content = record.content
    return PrepareRef(
        **shared,
        history=history.key,
        nights=tuple(date.fromisoformat(one) for one in history.content["nights"]),
        left_out=left_out,
        rows=content["rows"],
        users=content["users"],
        items=content["items"],
        segments=content["segments"],
    )


@verb
def prepare_history(
    place: Place, data: DataConfig, segments: SegmentsConfig, statistics: StatisticsConfig, night: date
) -> HistoryRef:
    """Lay out the history of a night that is not run, and need not be there, from no parent.

    Raises:
        NotEnoughHistory: as `prepare`.
    """
    past, past_states, left_out = _brought_in(place, data, statistics, night, replayed=True)
    record, shared = _lay_out(place, data, segments, statistics, night, "history", None, past, past_states)
    nights = tuple(date.fromisoformat(one) for one in record.content["nights"])
    return HistoryRef(**shared, nights=nights, left_out=left_out)


def _brought_in(
    place: Place, data: DataConfig, statistics: StatisticsConfig, night: date, replayed: bool
) -> tuple[list[StepRecord], list[StepRecord], dict[str, str]]:
    """Validations and statistics of the window's nights before this one, and why some nights are left out."""
    past, left_out = _history(place, data, night, replayed)
    if len(past) < data.min_history_nights:
        raise NotEnoughHistory(_too_early(data, night, len(past), left_out))
    return past, [_state(place, data, statistics, record) for record in past], left_out


def _history(place: Place, data: DataConfig, night: date, replayed: bool) -> tuple[list[StepRecord], dict[str, str]]:
    """Validations of the window's nights before this one, oldest first, and why some are left out."""
    begin = night - timedelta(days=data.window_nights)
    found = nights_by_lake(data, lake(data))
    span = [begin + timedelta(days=number) for number in range(data.window_nights)]
    absent = {one: why_absent(data, found, one) for one in span}
    present = [one for one, why in absent.items() if not why]
    records: list[StepRecord] = []
    left_out: dict[str, str] = {}
    with quietly("history") as progress:
        for done, one in enumerate(present, start=1):
            try:
                frozen = thawed(frozen_before(place, data, one, replayed).content)
                records.append(validate_night(place, data, frozen)[0])
            except DataRejected as error:
                left_out[one.isoformat()] = f"{type(error).__name__}: {error}"
            progress(done, len(present), "nights")
    first = min((one for own in found.values() for one in own if one >= begin), default=night)
    left_out |= {one.isoformat(): f"NightMissing: {why}" for one, why in absent.items() if why and one >= first}
    return records, dict(sorted(left_out.items()))


def _too_early(data: DataConfig, night: date, found: int, left_out: dict[str, str]) -> str:
    needed = data.min_history_nights
    present = nights_of(data, lake(data))
    usable = [one for one in present if one.isoformat() not in left_out]
    span = timedelta(days=data.window_nights)
    first = next((one for at, one in enumerate(usable) if at >= needed and one - usable[at - needed] <= span), None)
    when = f"the first night that can run is {first}" if first else f"no night of the lake has {needed} before it"
    told = [f"{one} ({why})" for one, why in sorted(left_out.items())[:5]]
    broken = f"; left out: {', '.join(told)}" if told else ""
    return (
        f"night {night} has {found} clean nights in the {data.window_nights} nights before it, and "
        f"data.min_history_nights is {needed}; {when}{broken}"
    )


def _state(place: Place, data: DataConfig, statistics: StatisticsConfig, record: StepRecord) -> StepRecord:
    """The mergeable statistics of one validated night."""
    section = {
        "user": data.user,
        "item": data.item,
        "objectives": [objective.model_dump(mode="json", exclude={"weight"}) for objective in data.objectives],
        "cohort": list(statistics.cohort),
    }

    def work(folder: Path, progress: Progress) -> Product:
        states.save_state(states.night_state(data, statistics, clean_file(place, record)), folder / "state.parquet")
        return Product({}, {}, {"state.parquet": folder / "state.parquet"})

    night = night_of_record(record)
    with quietly("history"):
        return carry_out(place, "statistics", VERSION, night, {"validate": record.digest}, section, work)[0]


def night_of_record(record: StepRecord) -> date:
    """The night that a record was made for."""
    return date.fromisoformat(record.notes["made_from"]["for night"])


def _lay_out(
    place: Place,
    data: DataConfig,
    segments: SegmentsConfig,
    statistics: StatisticsConfig,
    night: date,
    step: str,
    parent: ParentRef | None,
    validations: list[StepRecord],
    night_states: list[StepRecord],
    after: StepRecord | None = None,
) -> tuple[StepRecord, dict[str, object]]:
    """Vocabulary and columns of some nights. `after`: the record whose vocabulary goes on; else the parent's does."""
    workspace = open_workspace(place)
    dates = [night_of_record(record) for record in validations]
    section = {
        "columns": [column.model_dump(mode="json") for column in data.columns],
        "objectives": [objective.model_dump(mode="json") for objective in data.objectives],
        "levels": [list(level) for level in segments.levels],
        "statistics": statistics.model_dump(mode="json"),
    }
    inputs = {
        "parent": parent.digest if parent else "none",
        "nights": _digest(validations),
        "statistics": _digest(night_states),
    }

    def work(folder: Path, progress: Progress) -> Product:
        if after is not None:
            known = vocabulary.load(data, workspace.file(after, "vocabulary.parquet"))
        elif parent is not None:
            known = vocabulary.load(data, parent_file(place, parent, VOCABULARY))
        else:
            known = vocabulary.empty(data)
        clean = [clean_file(place, record) for record in validations]
        vocabularies = vocabulary.extend(known, clean)
        vocabulary.save(vocabularies, folder / "vocabulary.parquet")
        state_files = [workspace.file(record, "state.parquet") for record in night_states]
        rows = build_rows(
            *(data, segments, statistics, list(zip(dates, clean, strict=True))),
            *(list(zip(dates, state_files, strict=True)), vocabularies, folder / "rows"),
        )
        progress(len(rows), len(rows), "rows")
        return Product(
            {
                "nights": [one.isoformat() for one in dates],
                "states": [record.key for record in night_states],
                "rows": len(rows),
                "users": vocabularies[data.user].size,
                "items": vocabularies[data.item].size,
                "segments": sum(level.size for level in rows.levels),
                "vocabularies": vocabulary.sizes(vocabularies),
            },
            {},
            {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()},
        )

    return carry_out(place, step, VERSION, night, inputs, section, work)


def _digest(records: list[StepRecord]) -> str:
    return digest_of([record.digest for record in records])
