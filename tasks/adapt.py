"""Adapt: the weights of every segment, all of them in batched passes; once for the exam, once to ship."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from tasks.clients.workspace import StepRecord, digest_of
from tasks.data import vocabulary
from tasks.data.columns import Rows
from tasks.data.contract import DataConfig, SegmentsConfig
from tasks.data.segments import level_name
from tasks.data.vocabulary import Vocabularies
from tasks.learning.adapters import Adaptation, AdapterConfig
from tasks.learning.bank import Bank, Harmful, fill_bank
from tasks.learning.exams import segment_names
from tasks.learning.ladder import Ladder
from tasks.learning.material import I64, Material
from tasks.learning.training import steady
from tasks.meta_train import rows_of, trained_base
from tasks.references import BankRef, BaseRef, ExamRef, Place, PrepareRef
from tasks.release.cost import Spent
from tasks.release.holds import HeldSegment, key_of
from tasks.release.segment_gate import LevelHarm
from tasks.steps import Product, Progress, carry_out, device_name, device_of, open_workspace, recalled, record_of, verb

VERSION = 4


@verb
def adapt(
    place: Place,
    data: DataConfig,
    segments: SegmentsConfig,
    adapter: AdapterConfig,
    prepared: PrepareRef,
    base: BaseRef,
    bank: Literal["exam", "ship"],
    exam: ExamRef | None = None,
    held: tuple[HeldSegment, ...] = (),
) -> BankRef:
    """Solve the bank.

    Args:
        place: where.
        data: the contract.
        segments: the ladder.
        adapter: how to solve.
        prepared: the columns.
        base: the base.
        bank: `exam` reads the history alone, `ship` the night as well.
        exam: for `ship`: of which segments and support sizes it is proven that own weights do harm. They get their
            parent's.
        held: for `ship`: segments that an operator holds at their parent's weights.
    """
    layout = recalled(place, "history", prepared.history) if bank == "exam" else record_of(place, prepared)
    proven = [] if exam is None else record_of(place, exam).content["harmful"]
    night = record_of(place, prepared).content["nights"][-1]
    device = device_of(place)
    section = {
        "segments": segments.model_dump(mode="json"),
        "adapter": adapter.model_dump(mode="json"),
        "device": device,
    }

    def work(folder: Path, progress: Progress) -> Product:
        rows = rows_of(place, layout)
        vocabularies = vocabulary.load(data, open_workspace(place).file(layout, "vocabulary.parquet"))
        ladder, material = Ladder(rows, segments, data.user), Material(rows, device)
        trained = trained_base(place, base).to(device)
        before = int(np.asarray(rows.night).max()) + 1
        milliseconds: list[float] = []
        how = Adaptation.of(trained.network, adapter)
        with steady(0, None):
            filled = fill_bank(
                *(ladder, material, material.scorer(trained.network), trained.table(), how, before),
                harmful=refuser(rows, vocabularies, proven, held) if proven or held else None,
                milliseconds=milliseconds,
            )
        filled, absent = with_held(filled, rows, vocabularies, held)
        filled.save(folder / "bank.safetensors")
        solved = sum(len(level.keys) for level in filled.levels)
        progress(solved, solved, "segments")
        seen = [level.size + more for level, more in zip(rows.levels, absent, strict=True)]
        content = {
            "names": [level_name(level.columns) for level in rows.levels],
            "seen": seen,
            "levels": [len(level.keys) for level in filled.levels],
            "refused": [len(level.refused) for level in filled.levels],
            "support": support_histogram(filled),
            "segments": sum(seen),
            "adapted": solved,
        }
        cost = {"bytes": filled.bytes, "milliseconds": [round(one, 3) for one in milliseconds]}
        notes = {"cost": cost | {"device": device_name(device)}}
        return Product(content, notes, {"bank.safetensors": folder / "bank.safetensors"})

    inputs = {"layout": layout.digest, "base": base.digest, "harmful": digest_of(proven)}
    if held:  # a night without any keeps the key that it had before segments could be held
        inputs["held"] = digest_of([[*one.columns, one.name] for one in held])
    record, shared = carry_out(place, f"adapt-{bank}", VERSION, date.fromisoformat(night), inputs, section, work)
    return BankRef(**shared, bank=bank, segments=record.content["segments"], adapted=record.content["adapted"])


def with_held(
    bank: Bank, rows: Rows, vocabularies: Vocabularies, held: Sequence[HeldSegment]
) -> tuple[Bank, tuple[int, ...]]:
    """A bank that names all held segments among those refused, also those without rows enough for weights.

    Requests may bring rows of their own, and a graph that solves them has to know whose it is not to.

    Args:
        bank: none of the held segments has weights in it.
        rows: what it was solved from.
        vocabularies: of the rows.
        held: segments that an operator holds at their parent's weights; one that no night of the chain knows is left
            out.

    Returns:
        The bank, and by level how many held segments have no rows at all.
    """
    levels, absent = [], []
    for whose, level in zip(rows.levels, bank.levels, strict=True):
        names = [one.name for one in held if one.columns == whose.columns]
        keys = [key_of(name, whose.columns, whose.radices, vocabularies) for name in names]
        known = np.array([key for key in keys if key is not None], np.int64)
        levels.append(replace(level, refused=np.union1d(level.refused, known)))
        absent.append(int((~np.isin(known, whose.keys)).sum()))
    return Bank(bank.weights, tuple(levels)), tuple(absent)


def cost_of(bank: StepRecord) -> list[Spent]:
    """What each level of a bank took, finest first.

    A bank that was solved before this was measured has no such notes; they are no content, so it need not be solved
    again, and its bytes and milliseconds are None.
    """
    names, counts = bank.content["names"], bank.content["levels"]
    nothing = {"bytes": [None] * len(names), "milliseconds": [None] * len(names), "device": None}
    cost = bank.notes.get("cost", nothing)
    levels = zip(names, counts, cost["bytes"], cost["milliseconds"], strict=True)
    return [Spent(name, count, size, took, cost["device"]) for name, count, size, took in levels]


def support_histogram(bank: Bank) -> list[tuple[str, int]]:
    """Segments with weights of their own, by support rows."""
    edges = [1, 6, 21, 51, 101, 10**18]
    labels = ["1 to 5", "6 to 20", "21 to 50", "51 to 100", "101 and more"]
    counts = np.sum([np.histogram(level.support, edges)[0] for level in bank.levels], axis=0)
    return list(zip(labels, counts.tolist(), strict=True))


def refuser(
    rows: Rows,
    vocabularies: Vocabularies,
    proven: Sequence[Mapping[str, object]],
    held: Sequence[HeldSegment] = (),
) -> Harmful:
    """A function that says which segments of a bank get no weights of their own.

    Args:
        rows: what the bank is solved from.
        vocabularies: of the rows.
        proven: `LevelHarm` of each level as JSON, finest first; empty where nothing is proven.
        held: segments that an operator holds at their parent's weights.
    """
    harms = [LevelHarm.model_validate(one) for one in proven] or [LevelHarm()] * len(rows.levels)
    kept_back = [np.array([one.name for one in held if one.columns == level.columns], str) for level in rows.levels]

    def refused(level: int, keys: I64, support: I64) -> npt.NDArray[np.bool_]:
        harm, whose = harms[level], rows.levels[level]
        if not harm.proven and not len(kept_back[level]):
            return np.zeros(len(keys), bool)
        names = segment_names(keys, whose.columns, whose.radices, vocabularies).to_numpy(zero_copy_only=False)
        return harm.refuses(names.astype(str), support) | np.isin(names.astype(str), kept_back[level])

    return refused
