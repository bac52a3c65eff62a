"""Replays the last nights of a lake and pools both exams: the table of the README comes from here.

    nightrank demo-data
    python -m tests.benchmarks.replay --config infra/movielens.yaml --nights 60 --min-rows 100

`nightrank replay` does the work. Here are the choice of the nights, chains side by side, and several seeds of training.
"""

import argparse
from collections.abc import Sequence
from datetime import date
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flows.config import RetrainConfig, load_config
from flows.replay import replay_told_to
from tasks.data.contract import ObjectiveConfig
from tasks.data.lakes import nights as nights_of
from tasks.evaluate import exam_table
from tasks.ingest import lake
from tasks.joint import with_joint
from tasks.learning.exams import CANDIDATE, PARENT
from tasks.release.evidence import figures
from tasks.release.slices import ADAPTED, COMMON_ROWS, EVERYTHING, POOLED, Line, compared
from tests.steps.plain import plain_replay


def main() -> None:
    """Replay, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--nights", type=int, default=60)
    parser.add_argument("--min-rows", type=int, default=100)
    parser.add_argument("--joint", action="store_true")
    parser.add_argument(
        "--seeds", type=int, default=1, help="trainings of each night: training.seed and those after it"
    )
    parser.add_argument("--chains", type=int, default=1, help="chains of nights side by side, each started cold")
    parser.add_argument("--only", type=int, help="run this chain (0, 1, ...) and print nothing; for side-by-side runs")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--out", default="var/replay", help="folder of each chain's table and page")
    options = parser.parse_args()
    config = load_config(options.config)
    chosen = newest_nights(config, options.nights, options.min_rows)
    tables: dict[str, pa.Table] = {}
    chains = enumerate(np.array_split(np.array(chosen, dtype=object), options.chains))
    for (number, part), seed in product(chains, range(config.training.seed, config.training.seed + options.seeds)):
        if options.only not in (None, number):
            continue
        chain = config.model_copy(update={"training": config.training.model_copy(update={"seed": seed})})
        if options.chains > 1:  # a pipeline each: chains side by side would wait for each other's lease
            chain = chain.model_copy(update={"pipeline": f"{config.pipeline}-{number}"})
        out = str(Path(options.out) / f"{chain.pipeline}-{part[0]}-{part[-1]}-seed-{seed}")
        with replay_told_to(lambda *event: print(*event[:2], event[2].night, event[2].why, flush=True)):
            result = plain_replay(
                chain, part[0], part[-1], min_rows=options.min_rows, out=out, seed=options.seed, joint=options.joint
            )
        examined = [night for night in result.nights if night.exam is not None]
        place = chain.place()
        found = [
            with_joint(place, exam_table(place, night.exam.key), night.joint)
            for night in examined
            if night.exam is not None
        ]
        tables |= {f"{night.night} {seed}": table for night, table in zip(examined, found, strict=True)}
    if options.only is not None:
        return
    nights = sorted({key.split()[0] for key in tables})
    rows = sum(map(len, tables.values())) // options.seeds
    print(f"{len(nights)} nights, {nights[0]} to {nights[-1]}, {rows:,} rows, {options.seeds} seed(s)\n")
    # A row stands there once per seed, and so does a user's list of a night; all of a user's are resampled together:
    # pooled is the mean over seeds, its interval that of users.
    lines = [
        line
        for line in compared(tables, config.data, config.segments.max_support, options.seed)
        if (line.night, line.objective) == (POOLED, config.data.objectives[0].name)
    ]
    for exam in dict.fromkeys(line.exam for line in lines):
        for name in (EVERYTHING, *([] if exam == "nightly" else [COMMON_ROWS])):
            print(markdown([line for line in lines if (line.exam, line.slice) == (exam, name)]))
            if options.seeds > 1 and name == EVERYTHING:
                print(by_seed(tables, exam, config.data.objectives[0]))


def by_seed(tables: dict[str, pa.Table], exam: str, objective: ObjectiveConfig) -> str:
    """Each seed's pooled loss (log-loss, RMSE of a rating) and its distance to the nearest baseline, as a table."""
    shown = ["| seed | adapted | best baseline | loss | adapted minus it |", "|---|---:|---|---:|---:|"]
    for seed in sorted({key.split()[1] for key in tables}, key=int):
        mine = [table for key, table in tables.items() if key.split()[1] == seed]
        told = figures(pa.concat_tables(mine, promote_options="default"), exam, objective)
        losses = {method: one.get("log_loss", one.get("rmse")) for method, one in told.items() if method != PARENT}
        found = {method: loss for method, loss in losses.items() if loss is not None}
        own = found.pop(CANDIDATE)
        best = min(found, key=lambda method: found[method])
        shown.append(f"| {seed} | {own:.4f} | {best} | {found[best]:.4f} | {own - found[best]:+.4f} |")
    return "\n".join(shown) + "\n"


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


def markdown(lines: Sequence[Line]) -> str:
    """One exam as a table, best first, the candidate on top."""
    if not lines:
        return ""
    apart = "adapted minus it, 95 % interval"
    exam = lines[0].exam + ("" if lines[0].slice == EVERYTHING else f", rows {lines[0].slice.removesuffix(' row')}")
    shown = [
        f"**{exam}**: {lines[0].rows:,} rows, {lines[0].user_nights:,} users' nights",
        "",
        f"| method | log-loss | {apart} | per-user AUC | {apart} | NDCG@10 | {apart} | calibration |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for line in sorted(lines, key=lambda line: (line.method != ADAPTED, line.loss)):
        auc, ndcg, calibration = (
            "" if value is None else f"{value:.4f}" for value in (line.auc, line.ndcg, line.calibration)
        )
        cells = (line.method, f"{line.loss:.4f}", line.apart, auc, line.auc_apart, ndcg, line.ndcg_apart, calibration)
        shown.append(f"| {' | '.join(cells)} |")
    return "\n".join(shown) + "\n"


if __name__ == "__main__":
    main()
