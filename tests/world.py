"""A tiny lake with a known answer, where only adaptation can get there.

Every user has a hidden taste, drawn by a coin that no column knows of: he likes long items and dislikes short ones,
or the other way round. The two markets are opposed in the same way about comedies and dramas. So, for everybody:

    logit P(clicked) = MARKET_PULL · market · genre + TASTE_PULL · taste · length        (each factor ±1)

Every item is liked by half of the world, so popularity says nothing; the best that anybody can say without the
user's own rows is the average over both tastes (``blind_log_loss``); who knows his taste reaches ``bayes_log_loss``.

With ``lists`` genre and length are no columns of their own: they are two of an item's tags, beside one that is new
every night, and what else is known are vectors and codes that say nothing.
"""

from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

MARKET_PULL = 1.0
TASTE_PULL = 2.0
FIRST_NIGHT = date(2026, 3, 1)
ITEMS = 16
LATE_NIGHT = 5
"""The night, counted from 0, whose files hold a row of two nights before."""
THIN_MARKET = "isle"
"""A third market with one user and two rows a night on two nights: fewer than `segments.min_support`."""

SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.int64()),
        ("at", pa.timestamp("us", tz="UTC")),
        ("clicked", pa.int64()),
        ("stars", pa.float64()),
        ("market", pa.string()),
        ("age", pa.int64()),
        ("genre", pa.string()),
        ("length", pa.string()),
        ("price", pa.float64()),
    ]
)
LISTS = {
    "tags": pa.list_(pa.string()),
    "look": pa.list_(pa.float32(), 3),
    "codes": pa.large_list(pa.int32()),
    "mood": pa.list_(pa.float64()),
}
"""Columns that a world with lists has instead of genre and length."""


@dataclass(frozen=True)
class World:
    """What was written, and what is true about it."""

    config: dict[str, Any]
    """A config as JSON, for `RetrainConfig`."""
    nights: tuple[date, ...]
    rows: dict[date, int]
    """Rows per night, bad ones included."""
    bad: dict[date, int]
    """Rows per night that belong in quarantine."""
    newcomers: dict[date, tuple[str, ...]]
    """Users first seen on a night."""
    tastes: dict[str, int] = field(repr=False)
    """The hidden coin of each user, ±1."""
    blind_log_loss: float
    """Expected log-loss of the best prediction that knows everything but the user's taste."""
    bayes_log_loss: float
    """Expected log-loss of the prediction that knows everything."""


def write_world(
    folder: Path,
    *,
    seed: int = 0,
    nights: int = 12,
    users: int = 40,
    objectives: int = 1,
    first_night: date = FIRST_NIGHT,
    lists: bool = False,
) -> World:
    """Write the lake below ``folder`` / ``lake``, equal bytes for equal arguments.

    Args:
        folder: also holds `store` and `scratch`, which the config names.
        seed: of everything random.
        nights: how many, from ``first_night`` on.
        users: how many in all; a third of them is there from the first night, the others come evenly.
        objectives: 1 (`clicked`), or 2 (and the rating `stars`).
        lists: tags, vectors and codes instead of genre and length.
    """
    random = np.random.default_rng(seed)
    names = np.array([f"user-{number:03d}" for number in range(users)])
    taste = random.permutation(np.where(np.arange(users) % 2 == 0, 1, -1))
    market = np.where(np.arange(users) // 2 % 2 == 0, 1, -1)
    age = random.integers(18, 70, users)
    later = np.linspace(1, nights - 1, users - users // 3).round().astype(int)
    first = np.concatenate([np.zeros(users // 3, int), later])
    genre, length = np.where(np.arange(ITEMS) % 2 == 0, 1, -1), np.where(np.arange(ITEMS) // 2 % 2 == 0, 1, -1)
    price = np.round(random.uniform(1.0, 20.0, ITEMS), 2)

    days = tuple(first_night + timedelta(days=number) for number in range(nights))
    rows: dict[date, int] = {}
    bad = dict.fromkeys(days, 0)
    for number, day in enumerate(days):
        here = np.flatnonzero((first == number) | ((first < number) & (random.random(users) < 0.4)))
        who = np.repeat(here, np.where(first[here] == number, ITEMS, ITEMS // 2))
        what = np.concatenate([random.permutation(ITEMS)[:count] for count in np.bincount(who)[here]])
        chance = _chance(market[who], genre[what], taste[who], length[what])
        table = {
            "user_id": list(names[who]),
            "item_id": list(what + 100),
            "at": list(_moments(day, random.permutation(86_000)[: len(who)])),
            "clicked": list((random.random(len(who)) < chance).astype(int)),
            "stars": list(np.round(1 + 4 * chance + random.normal(0, 0.2, len(who)), 3).clip(1, 5)),
            "market": [("north", "south")[value] for value in (market[who] < 0).astype(int)],
            "age": [None if value % 7 == 0 else int(value) for value in age[who]],
            "genre": [("comedy", "drama")[value] for value in (genre[what] < 0).astype(int)],
            "length": [("long", "short")[value] for value in (length[what] < 0).astype(int)],
            "price": list(price[what]),
        }
        if number in (3, 7):
            for item in (0, 1):
                at = _at(day, 86_200 + item)
                _append(table, ("islander", 100 + item, at, item, 3.0, THIN_MARKET, 33, "comedy", "long", 5.0))
        if number == LATE_NIGHT:
            late = _at(days[number - 2], 86_300)
            _append(table, ("user-000", 100, late, 1, 4.0, "north", 40, "comedy", "long", 5.0))
            bad[day] = 1
        rows[day] = len(table["user_id"])
        if lists:
            bad[day] += _as_lists(table, number)
        _write_night(folder / "lake" / f"night={day.isoformat()}", table)

    return World(
        config=_config(folder, objectives, lists),
        nights=days,
        rows=rows,
        bad=bad,
        newcomers={day: tuple(names[first == number].tolist()) for number, day in enumerate(days)},
        tastes=dict(zip(names.tolist(), taste.tolist(), strict=True)),
        blind_log_loss=_expected_log_loss(knows_taste=False),
        bayes_log_loss=_expected_log_loss(knows_taste=True),
    )


def _chance(market: Any, genre: Any, taste: Any, length: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-(MARKET_PULL * market * genre + TASTE_PULL * taste * length)))


def _expected_log_loss(knows_taste: bool) -> float:
    """Mean entropy over the four equally likely combinations of (market · genre) and (taste · length)."""
    agrees, likes = np.meshgrid([1, -1], [1, -1], indexing="ij")
    truth = _chance(agrees, 1, likes, 1)
    said = truth if knows_taste else np.broadcast_to(truth.mean(axis=1, keepdims=True), truth.shape)
    return float(-(truth * np.log(said) + (1 - truth) * np.log(1 - said)).mean())


def _at(day: date, second: int) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC) + timedelta(seconds=second)


def _moments(day: date, seconds: Any) -> list[datetime]:
    return [_at(day, int(second)) for second in seconds]


def _append(table: dict[str, list[Any]], row: tuple[Any, ...]) -> None:
    for column, value in zip(table.values(), row, strict=True):
        column.append(value)


def _as_lists(table: dict[str, list[Any]], night: int) -> int:
    """Genre and length as tags, in either order; what may be missing is for every fifth item. Returns the bad rows."""
    items, users = table["item_id"], [int(name[-3:]) if name[-3:].isdigit() else 0 for name in table["user_id"]]
    pairs = zip(table.pop("genre"), table.pop("length"), items, strict=True)
    table["tags"] = [
        [f"night-{night}", genre, length] if item % 2 else [length, genre] for genre, length, item in pairs
    ]
    table["look"] = [None if item % 5 == 0 else [item / 10, 1.0, -float(item % 3)] for item in items]
    table["codes"] = [[None, [], [7], [user, 7, 9]][user % 4] for user in users]
    table["mood"] = [None if user % 7 == 0 else [float(user), 0.5] for user in users]
    table["tags"][0] = None  # one row whose genre nobody told
    if night != 1:
        return 0
    table["tags"][1], table["look"][2], table["mood"][3] = list("abcde"), [float("nan")] * 3, [1.0]
    return 3


def _write_night(folder: Path, columns: dict[str, list[Any]]) -> None:
    """Two files a night, as a real writer leaves them."""
    folder.mkdir(parents=True)
    kinds = {name: SCHEMA.field(name).type if name in SCHEMA.names else LISTS[name] for name in columns}
    table = pa.table(columns, schema=pa.schema(kinds))
    half = table.num_rows // 2
    pq.write_table(table.slice(0, half), folder / "part-0.parquet")
    pq.write_table(table.slice(half), folder / "part-1.parquet")


def _config(folder: Path, objectives: int, lists: bool) -> dict[str, Any]:
    labels = [
        {"name": "clicked", "column": "clicked", "kind": "binary"},
        {"name": "stars", "column": "stars", "kind": "rating", "weight": 0.5},
    ]
    described = {"role": "candidate", "dtype": "string", "kind": "categorical"}
    multi, dense = {"kind": "multi", "nullable": True}, {"dtype": "float64", "kind": "dense", "nullable": True}
    said = [
        {**described, "name": "genre", "allowed": ["comedy", "drama"]},
        {**described, "name": "length", "allowed": ["long", "short"]},
    ]
    if lists:
        said = [
            {"name": "tags", "role": "candidate", "dtype": "string", "max_values": 4, **multi},
            {"name": "look", "role": "candidate", "length": 3, **dense},
            {"name": "codes", "role": "request", "dtype": "int64", **multi},
            {"name": "mood", "role": "request", "length": 2, **dense},
        ]
    return {
        "version": 1,
        "pipeline": "tiny",
        "store": str(folder / "store"),
        "scratch": str(folder / "scratch"),
        "device": "cpu",
        "data": {
            "source": str(folder / "lake"),
            "time_zone": "UTC",
            "columns": [
                {"name": "user_id", "role": "user", "dtype": "string"},
                {"name": "item_id", "role": "item", "dtype": "int64"},
                {"name": "at", "role": "time", "dtype": "timestamp"},
                {"name": "clicked", "role": "label", "dtype": "int64"},
                {"name": "stars", "role": "label", "dtype": "float64", "minimum": 1, "maximum": 5},
                {"name": "market", "role": "request", "dtype": "string", "kind": "categorical"},
                {"name": "age", "role": "request", "dtype": "int64", "kind": "numeric", "nullable": True, "minimum": 0},
                *said,
                {"name": "price", "role": "candidate", "dtype": "float64", "kind": "numeric", "minimum": 0},
            ],
            "objectives": labels[:objectives],
            "window_nights": 30,
            "min_history_nights": 3,
            "max_bad_rows": 0.05,
        },
        "segments": {"levels": [["user_id"], ["market"]], "min_support": 5},
        "statistics": {"cohort": ["market"]},
        "ranker": {"embedding": 8, "hidden": 16, "features": 8},
        # As little training as teaches anything: the nights of the tests are there to be many.
        "training": {
            "threads": 1,
            "stop_nights": 2,
            "min_stop_rows": 50,
            "epochs": 2,
            "steps_per_epoch": 4,
            "visits_per_step": 16,
        },
        # A hundred rows prove nothing: `promote` lets the pointer move unless a night is shown to be worse.
        "gate": {"objective": "clicked", "min_exam_rows": 20, "when_unsure": "promote"},
    }
