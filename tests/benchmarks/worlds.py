"""Default settings on worlds that they were not chosen on: ten kinds of signal, seven nights from a cold start each.

    python -m tests.benchmarks.worlds [--seed SEED] [NAME ...]

A world has 1,500 users in four markets, 400 items in eight categories with three numbers, and 120 visits of about 15
rows a night; nine nights are there before the first exam. Only what a row's logit is made of differs, beside a bias of
every user and item. The printed table compares log-loss (squared error and RMSE where the label is a rating) pooled
over the nights, with intervals by user.
"""

import argparse
import tempfile
from collections.abc import Callable
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flows.config import RetrainConfig
from tasks.release.slices import ADAPTED, EVERYTHING, POOLED, Line, load
from tests.steps.plain import plain_replay

USERS, ITEMS, NIGHTS, VISITS, BEFORE = 1500, 400, 16, 120, 9
START = date(2026, 1, 1)
HOURS = 6
Array = "np.ndarray[Any, Any]"


class World:
    """What users and items are like.

    Args:
        seed: of everything that is drawn.
    """

    def __init__(self, seed: int) -> None:
        self.random = random = np.random.default_rng(seed)
        self.category, self.numbers = random.integers(0, 8, ITEMS), random.normal(size=(ITEMS, 3))
        self.vectors, self.factors = random.normal(size=(ITEMS, 16)), random.normal(size=(ITEMS, 3))
        self.popularity, self.bias = random.normal(0, 0.7, ITEMS), random.normal(0, 0.6, USERS)
        self.market, self.device = random.integers(0, 4, USERS), random.integers(0, 2, USERS)
        self.of_market, self.of_device = random.normal(size=(4, 8)), random.normal(size=(2, 8))
        self.tastes, self.of_numbers = random.normal(size=(USERS, 3)), random.normal(size=(USERS, 3))
        self.of_vectors = random.normal(size=(USERS, 16)) / 4
        self.active = random.gamma(1.0, 1.0, USERS)
        self.of_hour = np.random.default_rng([seed, 1]).normal(size=(HOURS, 8))  # leaves the draws of the others


def hour_of(user: Array, night: int) -> Array:
    """What is of a visit alone: neither the user's nor the night's."""
    return (user * 31 + night * 17) % HOURS


Signal = Callable[[World, Array, Array, int], Array]
WORLDS: dict[str, Signal] = {
    "nothing": lambda w, u, i, n: np.zeros(len(u)) - w.popularity[i] - w.bias[u],
    "market x category": lambda w, u, i, n: w.of_market[w.market[u], w.category[i]],
    "device x category": lambda w, u, i, n: w.of_device[w.device[u], w.category[i]],
    "request x category": lambda w, u, i, n: w.of_hour[hour_of(u, n), w.category[i]],
    "user x numbers": lambda w, u, i, n: (w.of_numbers[u] * w.numbers[i]).sum(1),
    "user x factors": lambda w, u, i, n: 0.8 * (w.tastes[u] * w.factors[i]).sum(1),
    "user x factors, a rating": lambda w, u, i, n: 0.8 * (w.tastes[u] * w.factors[i]).sum(1),
    "user x vector": lambda w, u, i, n: (w.of_vectors[u] * w.vectors[i]).sum(1),
    "drift": lambda w, u, i, n: (
        w.popularity[(i + 17 * n) % ITEMS] - w.popularity[i] + 0.5 * (w.tastes[u] * w.factors[i]).sum(1)
    ),
    "sparse": lambda w, u, i, n: 0.8 * w.of_market[w.market[u], w.category[i]] - 3.5,
}


def written(name: str, folder: Path, seed: int) -> RetrainConfig:
    """Write a world's lake; returns a config that leaves all that can be left at its default."""
    world = World(seed)
    for night in range(NIGHTS):
        random, day = world.random, START + timedelta(days=night)
        who = random.choice(USERS, VISITS, replace=False, p=world.active / world.active.sum())
        count = np.clip(random.poisson(60 if name == "sparse" else 15, VISITS), 1, ITEMS)
        user = np.repeat(who, count)
        item = np.concatenate([random.choice(ITEMS, one, replace=False) for one in count])
        logit = world.popularity[item] + world.bias[user] + WORLDS[name](world, user, item, night)
        second = np.concatenate([np.sort(random.integers(0, 86_400, one)) for one in count])
        midnight = datetime(day.year, day.month, day.day)
        columns = {
            "user_id": user,
            "item_id": item + 10,
            "at": [midnight + timedelta(seconds=int(s), microseconds=at) for at, s in enumerate(second)],
            "liked": (random.random(len(user)) < 1 / (1 + np.exp(-logit))).astype(np.int64),
            "stars": logit + random.normal(0, 0.7, len(user)),
            "market": [f"m{one}" for one in world.market[user]],
            "device": [f"d{one}" for one in world.device[user]],
            "category": [f"c{one}" for one in world.category[item]],
            **{f"n{at}": world.numbers[item, at] for at in range(3)},
            "vector": list(world.vectors[item]),
        }
        if name.startswith("request"):
            columns["hour"] = [f"h{one}" for one in hour_of(user, night)]
        path = folder / "lake" / f"night={day}" / "part.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table(columns), path)
    return RetrainConfig.model_validate(_config(name, folder))


def _config(name: str, folder: Path) -> dict[str, Any]:
    text = {"dtype": "string", "kind": "categorical"}
    columns = [
        {"name": "user_id", "role": "user", "dtype": "int64"},
        {"name": "item_id", "role": "item", "dtype": "int64"},
        {"name": "at", "role": "time", "dtype": "timestamp"},
        {"name": "liked", "role": "label", "dtype": "int64"},
        {"name": "stars", "role": "label", "dtype": "float64"},
        {"name": "market", "role": "request", **text},
        {"name": "device", "role": "request", **text},
        {"name": "category", "role": "candidate", **text},
        *({"name": f"n{at}", "role": "candidate", "dtype": "float64", "kind": "numeric"} for at in range(3)),
        {"name": "vector", "role": "candidate", "dtype": "float64", "kind": "dense", "length": 16},
    ]
    if name.startswith("request"):
        columns.append({"name": "hour", "role": "request", **text})
    rating = name.endswith("a rating")
    objective = {"name": "stars", "kind": "rating"} if rating else {"name": "liked", "kind": "binary"}
    data = {"source": str(folder / "lake"), "partition": "night={night}", "time_zone": "UTC", "window_nights": 60}
    return {
        "version": 1,
        "pipeline": "world",
        "store": str(folder / "store"),
        "scratch": str(folder / "scratch"),
        "device": "cpu",
        "data": data | {"columns": columns, "objectives": [objective | {"column": objective["name"]}]},
        "segments": {"levels": [["user_id"], ["market"]]},
        "statistics": {"cohort": ["market"]},
    }


def main() -> None:
    """Replay each world and print the adapted ranker beside its best rival."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*WORLDS, []], metavar="NAME", help=", ".join(WORLDS))
    parser.add_argument("--seed", type=int, default=0, help="of the worlds")
    options = parser.parse_args()
    print("| world | exam | adapted | zero steps | best other | loss | adapted minus it, 95 % interval |")
    print("|---|---|---:|---:|---|---:|---:|")
    for name in options.names or WORLDS:
        with tempfile.TemporaryDirectory() as folder:
            config = written(name, Path(folder), options.seed)
            first, last = (START + timedelta(days=number) for number in (BEFORE, NIGHTS - 1))
            made = plain_replay(config, first, last, out=str(Path(folder) / "out"))
            lines = [one for one in load(Path(made.written.table)) if (one.slice, one.night) == (EVERYTHING, POOLED)]
        for exam in ("nightly", "contact 5"):
            mine = {one.method: one for one in lines if one.exam == exam}
            others = [one for method, one in mine.items() if method not in (ADAPTED, "zero steps")]
            best: Line = min(others, key=lambda one: one.loss)
            print(
                f"| {name} | {exam} | {mine[ADAPTED].loss:.4f} | {mine['zero steps'].loss:.4f} | {best.method} | "
                f"{best.loss:.4f} | {best.apart} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
