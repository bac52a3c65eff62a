"""Retention: whether tonight's base still knows what its parent knew, on golden nights that stay the same."""

import json
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tasks.clients.workspace import StepRecord, canonical_json, digest_of
from tasks.data import vocabulary
from tasks.data.contract import DataConfig, SegmentsConfig
from tasks.errors import Conflict
from tasks.evaluate import lead_objective
from tasks.ingest import frozen_before, thawed
from tasks.learning.base import grow, shape_of
from tasks.learning.exams import CANDIDATE, PARENT, ZERO_STEPS, Night, joined, sit_contact, who_was_asked
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material, visits_of
from tasks.learning.training import steady
from tasks.meta_train import rows_of, trained_base
from tasks.parents import parent_base, trained_through
from tasks.references import BaseRef, IngestRef, ParentRef, Place, PrepareRef, RetentionRef
from tasks.release.gate import GateConfig
from tasks.release.retention import Chosen, drawn, golden_nights, gone, in_words, retained
from tasks.steps import Product, Progress, carry_out, device_of, open_workspace, recalled, record_of, store_of, verb

VERSION = 2
TABLE = "golden.parquet"


@verb
def check_retention(
    place: Place,
    data: DataConfig,
    segments: SegmentsConfig,
    gate: GateConfig,
    ingested: IngestRef,
    prepared: PrepareRef,
    base: BaseRef,
) -> RetentionRef:
    """Compare the base with the one that it started from, on golden nights.

    It reads the history alone: nothing of the night or later. The gate does not read what it finds; `judge` turns it
    into an alarm.
    """
    night, lead = ingested.night, lead_objective(data, gate)
    history = recalled(place, "history", prepared.history)
    why = _cold(ingested.parent, record_of(place, base))
    chosen = Chosen((), {})
    if ingested.parent is not None and not why:
        window = night - timedelta(days=data.window_nights)
        through = trained_through(place, ingested.parent)
        chosen = golden_nights(gate.golden.within(data.window_nights), window, prepared.nights, through, _before(place))
    as_found = {one: thawed(frozen_before(place, data, one).content).digest for one in chosen.nights}
    pinned = {one: _pinned(place, one, digest, night) for one, digest in as_found.items()}
    changed = {one: _changed(place, one, *pinned[one]) for one, digest in as_found.items() if digest != pinned[one][0]}
    left_out = [(one.isoformat(), reason) for one, reason in sorted({**chosen.left_out, **changed}.items())]
    golden = [one.toordinal() for one in chosen.nights if one not in changed]
    if not why and not golden:
        why = "no golden night" + ("" if left_out else " that the parent's training has read is in the window")
    device = device_of(place)
    section = {
        "objective": lead.model_dump(mode="json"),
        "segments": segments.model_dump(mode="json"),
        "golden": gate.golden.model_dump(mode="json", exclude={"margin"}),
        "device": device,
    }
    inputs = {
        "history": history.digest,
        "base": base.digest,
        "parent": ingested.parent.digest if ingested.parent else "none",
        "golden nights": digest_of([[one.isoformat(), as_found[one], *pinned[one]] for one in chosen.nights]),
    }

    def work(folder: Path, progress: Progress) -> Product:
        if why:
            content: dict[str, object] = {"left_out": left_out, "figures": None}
            return Product(content, {"told": f"not compared: {why}{gone(left_out)}"})
        assert ingested.parent is not None
        rows = rows_of(place, history)
        vocabularies = vocabulary.load(data, open_workspace(place).file(history, "vocabulary.parquet"))
        parent = grow(parent_base(place, ingested.parent), shape_of(data, rows, vocabularies))
        assert parent is not None, "training has started from it"
        every = visits_of(rows)
        visits = drawn(
            every.take(np.flatnonzero(np.isin(every.night, golden))),
            *(np.asarray(rows.tie), gate.golden.rows, gate.golden.seed),
        )
        # Visits of several nights, each scored as of its own.
        asked = Night(data, Ladder(rows, segments, data.user), Material(rows, device), night.toordinal(), visits)
        with steady(0, None):
            said = sit_contact(asked, trained_base(place, base).to(device), CANDIDATE, ZERO_STEPS)
            said |= sit_contact(asked, parent.to(device), PARENT)
        table = joined(who_was_asked(asked, vocabularies), said)
        pq.write_table(table, folder / TABLE, compression="zstd")
        progress(table.num_rows, table.num_rows, "rows")
        figures = retained(table, lead)
        content = {"left_out": left_out, "figures": figures}
        return Product(content, {"told": in_words(figures, left_out)}, {TABLE: folder / TABLE})

    record, shared = carry_out(place, "retention", VERSION, night, inputs, section, work)
    return RetentionRef(**shared, compared=record.content["figures"] is not None, told=record.notes["told"])


def _cold(parent: ParentRef | None, trained: StepRecord) -> str:
    """Why there is nothing that the base could have forgotten; empty where it did start from the parent."""
    if parent is None:
        return "there is no parent, the chain begins here"
    if trained.content["epoch"] == -1 or any(point[0] == -1 for point in trained.notes["curve"]):
        return ""
    return f"the base did not start from {parent.name}: {trained.notes['why']}"


def _pinned(place: Place, golden: date, digest: str, night: date) -> tuple[str, str]:
    """The freeze of a golden night with which it was first compared, and for which night that was; tonight's if none.

    Kept in the store, for the lake keeps no memory of what a night was.
    """
    store, key = store_of(place), _pin_key(place, golden)
    found = store.find(key)
    if found is None:
        pin = canonical_json({"version": 1, "frozen": digest, "first_compared": night.isoformat()})
        try:
            store.swap(key, pin, None)
        except Conflict:
            return _pinned(place, golden, digest, night)
        return digest, night.isoformat()
    pinned = json.loads(found.data)
    return str(pinned["frozen"]), str(pinned["first_compared"])


def _before(place: Place) -> list[date]:
    """Nights that were golden before."""
    keys = store_of(place).list(f"{place.pipeline}/state/golden/")
    return [date.fromisoformat(key.rsplit("night=", 1)[-1].removesuffix(".json")) for key in keys]


def _pin_key(place: Place, golden: date) -> str:
    return f"{place.pipeline}/state/golden/night={golden.isoformat()}.json"


def _changed(place: Place, golden: date, pinned: str, first: str) -> str:
    return (
        f"its files have changed since it was first compared, for night {first} (then {pinned[:12]}); name other "
        f"nights in gate.golden.nights, or delete {_pin_key(place, golden)} to go on with it as it is now"
    )
