"""Replays the last nights of a lake and pools both exams: the table of the README comes from here.

    nightrank demo-data
    python -m tests.benchmarks.replay --config infra/movielens.yaml --nights 60 --min-rows 100

Nights that the store has not published yet are run first, in order. Then the exam tables of the chosen nights are
pooled: every method on the same rows, differences paired and bootstrapped by user. `--joint` adds an ablation: the same
network trained jointly, without adapters in its loss, and the same ridge solved on it afterwards.
"""

import argparse
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from flows.config import RetrainConfig, load_config
from tasks.data import vocabulary
from tasks.data.interactions import nights as nights_of
from tasks.ingest import lake, released_prefix
from tasks.learning.adapters import apply
from tasks.learning.bank import Bank, fill_bank
from tasks.learning.base import Base, shape_of
from tasks.learning.exams import (
    CANDIDATE,
    CHAMPION,
    PARENT,
    SUPPORTS,
    Night,
    Scores,
    column,
    contact,
    gather,
    joined,
    probability,
    sit_contact,
)
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material, Visits
from tasks.learning.training import meta_train
from tasks.meta_train import rows_of
from tasks.references import Place
from tasks.release.evidence import compare, figures
from tasks.steps import open_workspace, recalled, store_of
from tests.steps.plain import plain_night

JOINT = "joint + ridge"


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--nights", type=int, default=60)
    parser.add_argument("--min-rows", type=int, default=100)
    parser.add_argument("--joint", action="store_true")
    parser.add_argument("--chains", type=int, default=1, help="chains of nights side by side, each started cold")
    parser.add_argument("--only", type=int, help="run this chain (0, 1, ...) and print nothing; for side-by-side runs")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    options = parser.parse_args()
    config = load_config(options.config)
    chosen = newest_nights(config, options.nights, options.min_rows)
    tables: list[pa.Table] = []
    for number, part in enumerate(np.array_split(np.array(chosen, dtype=object), options.chains)):
        if options.only not in (None, number):
            continue
        chain = config if options.chains == 1 else config.model_copy(update={"pipeline": f"{config.pipeline}-{number}"})
        for night in part:
            if not published(chain.place(), night):
                print(night, plain_night(chain, night).published.why, flush=True)
        found = [exam(chain.place(), night) for night in part]
        if options.joint:
            found = [joined(table, answers) for table, answers in zip(found, joint(chain, list(part)), strict=True)]
        tables += found
    if options.only is not None:
        return
    print(f"{len(chosen)} nights, {chosen[0]} to {chosen[-1]}, {sum(table.num_rows for table in tables):,} rows\n")
    for condition, common in [
        ("nightly", False),
        *((contact(k), common) for k in SUPPORTS for common in (False, True)),
    ]:
        print(markdown(config, tables, condition, common, options.seed))


def newest_nights(config: RetrainConfig, count: int, least: int) -> list[date]:
    """The last nights of the lake with enough rows, oldest first."""
    source = Path(config.data.source)
    present = nights_of(config.data, lake(config.data))
    folders = {night: source / config.data.partition.format(night=night.isoformat()) for night in present}
    rows = {
        night: sum(pq.ParquetFile(file).metadata.num_rows for file in folder.glob("*.parquet"))
        for night, folder in folders.items()
    }
    return [night for night in present if rows[night] >= least][-count:]


def published(place: Place, night: date) -> dict[str, str] | None:
    """What the store keeps of a night's newest release."""
    found = store_of(place).find(f"{released_prefix(place)}night={night.isoformat()}.json")
    return None if found is None else dict(json.loads(found.data))


def exam(place: Place, night: date) -> pa.Table:
    """A night's exam with its champion's answers."""
    made = published(place, night)
    assert made is not None, f"night {night} has no release: see what the backfill said about it"
    workspace = open_workspace(place)
    table = pq.read_table(workspace.file(recalled(place, "evaluate", made["exam"]), "exam.parquet"))
    answers = pq.read_table(workspace.file(recalled(place, "judge", made["verdict"]), "champion.parquet"))
    return joined(table, {name: answers[name].to_numpy() for name in answers.column_names})


def joint(config: RetrainConfig, chosen: list[date]) -> Iterator[dict[str, np.ndarray]]:
    """The ablation's answers, night by night, each base started from the one before, as the candidate's are."""
    place, workspace, data = config.place(), open_workspace(config.place()), config.data
    layouts = {
        date.fromisoformat(record.content["nights"][-1]): record
        for record in workspace.records("prepare")
        if record.content["nights"][-1] in {night.isoformat() for night in chosen}
    }
    before = {record.key: record for record in workspace.records("history")}
    by_nights = {tuple(record.content["nights"]): record for record in before.values()}
    parent: Base | None = None
    for night in chosen:
        layout = layouts[night]
        history = by_nights[tuple(layout.content["nights"][:-1])]
        past, rows = rows_of(place, history), rows_of(place, layout)
        words = vocabulary.load(data, workspace.file(history, "vocabulary.parquet"))
        trained = meta_train(
            *(data, config.segments, config.ranker, config.adapter, config.training.model_copy(update={"meta": False})),
            *(past, shape_of(data, past, words), night),
            parent=parent,
        )
        parent = trained.base
        ladder, material = Ladder(past, config.segments, data.user), Material(past)
        bank = fill_bank(
            *(ladder, material, material.scorer(parent.network), parent.table(), parent.kinds, config.adapter),
            night.toordinal(),
        )
        ladder, material = Ladder(rows, config.segments, data.user), Material(rows)
        sitting = Night.among(data, ladder, material, night.toordinal())
        yield gather(sitting, "nightly", nightly(sitting, parent, bank)) | sit_contact(sitting, parent, JOINT)
        print(f"joint {night}: {trained.why}", flush=True)


def nightly(night: Night, base: Base, bank: Bank):  # type: ignore[no-untyped-def]
    """The nightly exam of one base and bank."""
    weights = torch.from_numpy(bank.weights)

    def score(visits: Visits) -> Scores:
        at = visits.rows.flat()[0]
        logits, features = base.network(*night.material.inputs(at))
        slots = torch.from_numpy(bank.slots_of(night.ladder.rows, at))
        return {JOINT: (at, probability(apply(logits, features[:, : weights.shape[-1]], weights[slots]), base.kinds))}

    return score


def listed(table: pa.Table, night: str) -> pa.Table:
    """The table with users told apart by night."""
    users = pc.binary_join_element_wise(table["user"], night, "@")
    return table.set_column(table.column_names.index("user"), "user", users)


def markdown(config: RetrainConfig, tables: list[pa.Table], condition: str, common: bool, seed: int) -> str:
    """One exam as a table, best first, the candidate on top."""
    lead = config.data.objectives[0]
    names = [name for name in tables[0].column_names if all(name in table.column_names for table in tables)]
    # A user's list is one night's: across nights his scores come from different models, and are not compared.
    pooled = pa.concat_tables([listed(table.select(names), str(night)) for night, table in enumerate(tables)])
    told = figures(pooled, condition, lead, common)
    against = compare([table.select(names) for table in tables], condition, lead, seed, common)
    rows = sorted(told.items(), key=lambda entry: (entry[0] != CANDIDATE, entry[1]["log_loss"]))
    lines = [
        f"**{condition}{', rows after the 20th' if common else ''}**: {told[CANDIDATE]['rows']:,} rows, "
        f"{told[CANDIDATE]['users']:,} users' nights",
        "",
        "| method | log-loss | candidate minus it, 95 % | calibration | AUC | NDCG@10 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for method, one in rows:
        if method == PARENT:
            continue
        gap = ""
        if method in against:
            vs = against[method][0]
            gap = f"{vs.estimate:+.4f} [{vs.low:+.4f}, {vs.high:+.4f}]"
        shown = (one[name] for name in ("log_loss", "calibration_error", "auc", "ndcg_at_10"))
        loss, calibration, auc, ndcg = (float("nan") if value is None else value for value in shown)
        lines.append(f"| {method} | {loss:.4f} | {gap} | {calibration:.4f} | {auc:.4f} | {ndcg:.4f} |")
    answered = [table for table in tables if column(condition, CHAMPION, lead.name) in table.column_names]
    if answered:
        vs, nights = compare(answered, condition, lead, seed, common)[CHAMPION]
        lines += ["", f"against the champion, {nights} nights: {vs.estimate:+.4f} [{vs.low:+.4f}, {vs.high:+.4f}]"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
