"""What a leak would be, said once as assertions, and the two machines that they are held against.

`Pipeline` carries a night through the verbs up to both exams, in a store of its own. `Bench` examines one small night
row by row: its clean rows come in as a table, and every prediction that any method makes about them comes out.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flows.config import RetrainConfig
from tasks.adapt import adapt
from tasks.clients.workspace import StepRecord
from tasks.data import states, vocabulary
from tasks.data.columns import Rows, build_rows
from tasks.evaluate import evaluate, exam_table
from tasks.export import export
from tasks.ingest import ingest
from tasks.learning.bank import Bank
from tasks.learning.baselines import Baselines
from tasks.learning.exams import CONDITIONS, Night, facts, joined, sit
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material
from tasks.learning.training import steady
from tasks.meta_train import meta_train, rows_of, trained_base
from tasks.prepare import night_of_record, prepare
from tasks.references import BankRef, BaseRef, ExamRef, ExportRef, IngestRef, PrepareRef, ValidateRef
from tasks.steps import open_workspace, recalled, record_of
from tasks.validate import clean_file, validate

Change = Callable[[pa.Table], pa.Table]
FROM_HISTORY = ("history", "meta-train", "adapt-exam")
"""Steps that may not know the night."""


@dataclass(frozen=True)
class Examined:
    """A night up to its exams."""

    config: RetrainConfig
    ingested: IngestRef
    validated: ValidateRef
    prepared: PrepareRef
    base: BaseRef
    bank: BankRef
    exam: ExamRef

    def record(self, step: str) -> StepRecord:
        """The record of a step of this night."""
        place = self.config.place()
        if step == "history":
            return recalled(place, "history", self.prepared.history)
        refs = (self.ingested, self.validated, self.prepared, self.base, self.bank, self.exam)
        return record_of(place, next(ref for ref in refs if ref.step == step))

    def table(self) -> pa.Table:
        """The exam table."""
        return exam_table(self.config.place(), self.exam.key)

    def ship(self) -> BankRef:
        """The bank to ship."""
        config = self.config
        sections = (config.place(), config.data, config.segments, config.adapter)
        return adapt.fn(*sections, self.prepared, self.base, bank="ship", exam=self.exam)

    def export(self) -> ExportRef:
        """The release, unpublished."""
        config = self.config
        sections = (config.place(), config.data, config.segments, config.statistics, config.export)
        return export.fn(*sections, self.ingested, self.validated, self.prepared, self.base, self.ship())


class Pipeline:
    """A lake, a store and a scratch folder of its own.

    Args:
        folder: where.
        tree: the config as JSON; its places are replaced.
        like: another pipeline, whose nights of history are taken over as they were validated.
    """

    def __init__(self, folder: Path, tree: dict[str, Any], like: "Pipeline | None" = None) -> None:
        self.folder = folder
        source = Path(tree["data"]["source"]) if like is None else like.folder / "lake"
        shutil.copytree(source, folder / "lake")
        if like is not None:
            forget = shutil.ignore_patterns("history", "prepare", "meta-train", "adapt-*", "evaluate", "export", "last")
            shutil.copytree(like.folder / "store", folder / "store", ignore=forget)
            shutil.copytree(like.folder / "scratch" / "frozen", folder / "scratch" / "frozen")
        places = {"store": str(folder / "store"), "scratch": str(folder / "scratch")}
        self.tree = {**tree, **places, "data": {**tree["data"], "source": str(folder / "lake")}}

    def change(self, night: date, change: Change) -> None:
        """Rewrite a night of the lake."""
        partition = self.folder / "lake" / f"night={night.isoformat()}"
        table = pa.concat_tables([pq.read_table(file) for file in sorted(partition.glob("*.parquet"))])
        shutil.rmtree(partition)
        partition.mkdir()
        pq.write_table(change(table), partition / "part-0.parquet")

    def night(self, night: date, **sections: Any) -> Examined:
        """Carry a night out up to its exams; `sections` replace those of the config."""
        config = RetrainConfig.model_validate({**self.tree, **sections})
        place, data, segments, adapter, gate = config.place(), config.data, config.segments, config.adapter, config.gate
        ingested = ingest.fn(place, data, gate, night, config.digest())
        validated = validate.fn(place, data, ingested)
        prepared = prepare.fn(place, data, segments, config.statistics, ingested, validated)
        base = meta_train.fn(place, data, segments, config.ranker, config.training, adapter, ingested, prepared)
        bank = adapt.fn(place, data, segments, adapter, prepared, base, bank="exam")
        exam = evaluate.fn(place, data, segments, config.baselines, gate, ingested, prepared, base, bank)
        assert not any(ref.reused for ref in (base, bank, exam)), "nothing is proved by a step that was not done"
        return Examined(config, ingested, validated, prepared, base, bank, exam)


def assert_history_is_untouched(one: Examined, other: Examined) -> None:
    """Vocabulary, statistics and columns of history, base and exam bank are the same bytes."""
    for step in FROM_HISTORY:
        mine, theirs = one.record(step), other.record(step)
        assert mine.content["files"], step
        assert mine.content == theirs.content, f"{step} knows the night"
        assert mine.key == theirs.key, f"the key of {step} depends on the night"


def assert_nightly_scores_stand(one: Examined, other: Examined, tolerance: float) -> None:
    """Rows that both nights have were predicted alike in the nightly exam, by every method."""
    mine, theirs = one.table(), other.table()
    _, at, where = np.intersect1d(mine["tie"].to_numpy(), theirs["tie"].to_numpy(), return_indices=True)
    assert len(at) > 10
    names = [name for name in mine.column_names if name.startswith("nightly/")]
    assert len(names) == 9 * len(one.config.data.objectives), names
    assert set(names) <= set(theirs.column_names)
    for name in [*names, "history", "support", "level", "segment"]:
        here, there = (
            table[name].to_numpy(zero_copy_only=False)[rows] for table, rows in ((mine, at), (theirs, where))
        )
        if name in names and tolerance:
            np.testing.assert_allclose(here, there, rtol=0, atol=tolerance, err_msg=name)
        else:
            np.testing.assert_array_equal(here, there, err_msg=name)


class Bench:
    """One small night behind a given history, to be examined again and again.

    Args:
        examined: a night whose history, base and exam bank are used.
        folder: for files.
    """

    def __init__(self, examined: Examined, folder: Path) -> None:
        self.config, self.folder, self.night = examined.config, folder, examined.ingested.night
        place, data = self.config.place(), self.config.data
        workspace = open_workspace(place)
        history = examined.record("history")
        begin = {night.isoformat() for night in examined.prepared.nights}
        states_of = [recalled(place, "statistics", key) for key in history.content["states"]]
        self.states = [(night_of_record(record), workspace.file(record, "state.parquet")) for record in states_of]
        validations = list(workspace.records("validate"))
        self.clean = [
            (night_of_record(record), clean_file(place, record))
            for record in validations
            if night_of_record(record).isoformat() in begin
        ]
        assert len(self.clean) == len(self.states) == len(begin)
        self.known = vocabulary.load(data, workspace.file(history, "vocabulary.parquet"))
        self.base = trained_base(place, examined.base)
        self.bank = Bank.load(workspace.file(record_of(place, examined.bank), "bank.safetensors"))
        self.count = 0

    def rows(self, table: pa.Table) -> tuple[Rows, vocabulary.Vocabularies]:
        """Columns of history and of these rows as the night."""
        self.count += 1
        folder = self.folder / str(self.count)
        folder.mkdir()
        data, statistics = self.config.data, self.config.statistics
        clean, state = folder / "clean.parquet", folder / "state.parquet"
        pq.write_table(table, clean)
        states.save_state(states.night_state(data, statistics, clean), state)
        vocabularies = vocabulary.extend(self.known, [clean])
        nights, every = [*self.clean, (self.night, clean)], [*self.states, (self.night, state)]
        rows = build_rows(data, self.config.segments, statistics, nights, every, vocabularies, folder / "rows")
        return rows, vocabularies

    def examine(self, table: pa.Table) -> pa.Table:
        """Both exams on these rows, in the order of the table."""
        rows, vocabularies = self.rows(table)
        ladder, material = Ladder(rows, self.config.segments, self.config.data.user), Material(rows)
        night = Night.among(self.config.data, ladder, material, self.night.toordinal())
        with steady(0, 1):
            rivals = Baselines(self.config.baselines, ladder, material, self.base.kinds, night.ordinal)
            found = joined(facts(night, self.bank, vocabularies), sit(night, self.base, self.bank, rivals))
        shutil.rmtree(self.folder / str(self.count))
        # Rows are known by what they are, not by where an order that may leak has put them.
        data = self.config.data
        items = vocabularies[data.item].decode(np.asarray(rows.item)[night.at]).to_pylist()
        mine = zip(found["user"].to_pylist(), items, np.asarray(rows.time)[night.at].tolist(), strict=True)
        place = {key: number for number, key in enumerate(mine)}
        asked = [table[name].to_pylist() for name in (data.user, data.item)]
        keys = list(zip(*asked, table[data.time].cast(pa.int64()).to_pylist(), strict=True))
        assert len(place) == found.num_rows == len(keys)
        return found.take([place[key] for key in keys])


def assert_label_reaches_only_later_rows(before: pa.Table, after: pa.Table, row: int) -> int:
    """Tables of equal rows, but for one row's label: who may say something else about whom.

    Nobody in the nightly exam; in first contact, about later rows of the same user only.

    Returns:
        How many predictions did change.
    """
    user = before["user"].to_numpy(zero_copy_only=False)
    at = before["at"].to_numpy()
    may = (user == user[row]) & (at > at[row])
    names = [name for name in before.column_names if name.split("/")[0] in CONDITIONS]
    assert {name.split("/")[0] for name in names} == set(CONDITIONS)
    moved = 0
    for name in [*names, "history", "support", "level", "segment"]:
        here, there = (table[name].to_numpy(zero_copy_only=False) for table in (before, after))
        fixed = np.ones(len(user), bool) if name.startswith("nightly") or name not in names else ~may
        np.testing.assert_array_equal(here[fixed], there[fixed], err_msg=f"{name}, label of row {row}")
        if name in names:
            moved += int(np.count_nonzero(~((here == there) | (np.isnan(here) & np.isnan(there)))))
    return moved


def history_rows(examined: Examined) -> Rows:
    """Columns of history and night."""
    return rows_of(examined.config.place(), examined.record("prepare"))
