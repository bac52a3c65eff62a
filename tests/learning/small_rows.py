"""Row tables in memory, a contract for them, and a small world of opposed tastes that only adaptation can serve."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import date

import numpy as np
import pyarrow as pa
import torch

from tasks.data.columns import Rows
from tasks.data.contract import DataConfig, SegmentsConfig, StatisticsConfig
from tasks.data.segments import build_levels
from tasks.data.statistics import statistics_names
from tasks.data.vocabulary import Vocabulary
from tasks.learning.base import shape_of

FIRST = date(2026, 3, 1).toordinal()
DAY = 86_400_000_000
LADDER = (("shopper",), ("market",))
STATISTICS = StatisticsConfig(cohort=("market",))


def contract(*kinds: str, prices: int = 1) -> DataConfig:
    """One objective per kind: binary or rating. Without any, one binary objective."""
    kinds = kinds or ("binary",)
    columns = [
        {"name": "shopper", "role": "user", "dtype": "int64"},
        {"name": "product", "role": "item", "dtype": "int64"},
        {"name": "at", "role": "time", "dtype": "timestamp"},
        {"name": "market", "role": "request", "dtype": "int64", "kind": "categorical"},
        {"name": "region", "role": "request", "dtype": "int64", "kind": "categorical"},
        {"name": "age", "role": "request", "dtype": "float64", "kind": "numeric", "nullable": True},
        {"name": "genre", "role": "candidate", "dtype": "int64", "kind": "categorical"},
        *(
            {"name": f"price{at or ''}", "role": "candidate", "dtype": "float64", "kind": "numeric"}
            for at in range(prices)
        ),
        *({"name": f"label{at}", "role": "label", "dtype": "float64"} for at in range(len(kinds))),
    ]
    objectives = [{"name": f"aim{at}", "column": f"label{at}", "kind": kind} for at, kind in enumerate(kinds)]
    return DataConfig.model_validate({"source": "lake", "columns": columns, "objectives": objectives})


def ladder_of(levels: Sequence[Sequence[str]] = LADDER, **limits: int) -> SegmentsConfig:
    return SegmentsConfig.model_validate({"levels": levels, **limits})


def table(
    user: Sequence[int],
    night: Sequence[int],
    *,
    item: Sequence[int] | None = None,
    labels: np.ndarray | None = None,
    market: Sequence[int] | None = None,
    region: Sequence[int] | None = None,
    statistics: np.ndarray | None = None,
    weights: Sequence[float] | None = None,
    age: Sequence[float] | None = None,
    genre: Sequence[int] | None = None,
    price: Sequence[float] | np.ndarray | None = None,
    levels: Sequence[Sequence[str]] = LADDER,
    radices: dict[str, int] | None = None,
) -> Rows:
    """Rows in order of (user, time); `night` counts from 0, and equal (user, night) keep the order given.

    Ids are vocabulary ids, 0 unknown. What is not given is one market, item and region, label 0 and nothing else.
    Several prices a row are as many numeric columns.
    """
    count = len(user)
    kinds = 1 if labels is None else np.asarray(labels).reshape(count, -1).shape[1]

    def column(values, default, dtype):
        return np.full(count, default, dtype) if values is None else np.asarray(values, dtype)

    order = np.lexsort((np.arange(count), night, user))
    night_of = FIRST + np.asarray(night, np.int64)
    time = night_of * DAY + np.arange(count) * 1000
    ids = {
        "shopper": np.asarray(user, np.int64),
        "product": column(item, 1, np.int64),
        "market": column(market, 1, np.int64),
        "region": column(region, 1, np.int64),
        "genre": column(genre, 1, np.int64),
    }
    sizes = {name: int(values.max(initial=0)) + 1 for name, values in ids.items()} | (radices or {})
    width = 3 * (kinds + 1)
    names = statistics_names(contract(*["binary"] * kinds), STATISTICS)
    flat = {
        "request_ids": np.stack([ids["market"], ids["region"]], axis=1),
        "candidate_ids": np.stack([ids["product"], ids["genre"]], axis=1),
        "request_numbers": column(age, np.nan, np.float32)[:, None],
        "candidate_numbers": column(price, 1.0, np.float32).reshape(count, -1 if count else 1),
        "statistics": np.zeros((count, width), np.float32) if statistics is None else statistics.astype(np.float32),
        "labels": np.zeros((count, 1), np.float32) if labels is None else np.asarray(labels).reshape(count, -1),
        "weights": column(weights, 1.0, np.float32),
        "time": time,
        "night": night_of.astype(np.int32),
        "user": ids["shopper"],
        "item": ids["product"],
        "tie": np.arange(count, dtype=np.int64),
    }
    flat = {name: np.ascontiguousarray(values[order]) for name, values in flat.items()}
    flat["labels"] = flat["labels"].astype(np.float32)
    by_name = {"shopper": flat["user"], "market": flat["request_ids"][:, 0], "region": flat["request_ids"][:, 1]}
    built = build_levels(ladder_of(levels), by_name, sizes, flat["time"], flat["tie"])
    return Rows(**flat, levels=built, statistics_names=names)


def before(rows: Rows, night: int, levels: Sequence[Sequence[str]] = LADDER) -> Rows:
    """A table of its own of the rows before a night (counted from 0)."""
    return part(rows, np.asarray(rows.night) < FIRST + night, levels)


def part(rows: Rows, keep: np.ndarray, levels: Sequence[Sequence[str]] = LADDER) -> Rows:
    """A table of its own of some rows, with the same vocabularies."""
    names = [name for name in vars(rows) if isinstance(getattr(rows, name), np.ndarray)]
    flat = {name: np.asarray(getattr(rows, name))[keep] for name in names}
    sizes = {name: radix for level in rows.levels for name, radix in zip(level.columns, level.radices, strict=True)}
    by_name = {"shopper": flat["user"], "market": flat["request_ids"][:, 0], "region": flat["request_ids"][:, 1]}
    built = build_levels(ladder_of(levels), by_name, sizes, flat["time"], flat["tie"])
    return Rows(**flat, levels=built, statistics_names=rows.statistics_names)


def with_labels(rows: Rows, labels: np.ndarray) -> Rows:
    """The same rows with other labels [N, K]."""
    return replace(rows, labels=np.ascontiguousarray(labels, np.float32))


def vocabularies_of(rows: Rows, more: int = 0) -> dict[str, Vocabulary]:
    """Vocabularies that know every id of the rows, and `more` keys besides."""
    tables = {
        "shopper": rows.user,
        "product": rows.item,
        "market": rows.request_ids[:, 0],
        "region": rows.request_ids[:, 1],
        "genre": rows.candidate_ids[:, 1],
    }
    return {
        name: Vocabulary(name, pa.array(np.arange(int(ids.max(initial=0)) + more), pa.int64()))
        for name, ids in tables.items()
    }


def shape(rows: Rows, *kinds: str, more: int = 0):
    return shape_of(contract(*kinds, prices=rows.candidate_numbers.shape[1]), rows, vocabularies_of(rows, more))


def opposed(seed: int = 0, nights: int = 6, users: int = 60, items: int = 12, each: int = 10) -> Rows:
    """Half of the users like even items and the other half odd ones; nothing but their own rows tells which.

    Two of three users come on any night. The as-of item rates are those of the earlier nights, smoothed; the other
    statistics say nothing. The two objectives are a click and a rating of the same taste.
    """
    random = np.random.default_rng(seed)
    taste = np.where(np.arange(users) % 2 == 0, 1, -1)[random.permutation(users)]
    user, night, item, click, stars = [], [], [], [], []
    for number in range(nights):
        for who in np.flatnonzero(random.random(users) < 2 / 3):
            what = random.permutation(items)[:each]
            pull = 2.0 * taste[who] * np.where(what % 2 == 0, 1, -1)
            user += [who + 1] * each
            night += [number] * each
            item += list(what + 1)
            click += list(random.random(each) < 1 / (1 + np.exp(-pull)))
            stars += list(3 + 0.5 * pull + random.normal(0, 0.3, each))
    user, night, item = (np.array(values) for values in (user, night, item))
    labels = np.stack([np.array(click, np.float32), np.array(stars, np.float32)], axis=1)
    statistics = np.zeros((len(user), 9), np.float32)
    for number in range(nights):
        earlier, tonight = night < number, night == number
        count = np.bincount(item[earlier], minlength=items + 1)
        for aim, base in enumerate((0.5, 3.0)):
            rate = (np.bincount(item[earlier], labels[earlier, aim], items + 1) + 10 * base) / (count + 10)
            statistics[tonight, aim] = (np.log(rate / (1 - rate)) if aim == 0 else rate)[item[tonight]]
        statistics[tonight, 2] = np.log1p(count)[item[tonight]]
    return table(
        user, night, item=item, labels=labels, statistics=statistics, market=user % 3 + 1, age=20.0 + user,
        genre=item % 3 + 1, price=item / 2,
    )  # fmt: skip


def one_aim(rows: Rows) -> Rows:
    """The same rows with their first objective only."""
    keep = [0, 2, 3, 5, 6, 8]
    names = tuple(rows.statistics_names[at] for at in keep)
    return replace(rows, labels=rows.labels[:, :1], statistics=rows.statistics[:, keep], statistics_names=names)


class Told:
    """A scorer of fixed logits and features per position, in double precision."""

    def __init__(self, logits: torch.Tensor, features: torch.Tensor) -> None:
        self.logits, self.features = logits, features

    def __call__(self, at: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return self.logits[torch.from_numpy(at)], self.features[torch.from_numpy(at)]


def told(rows: Rows, width: int = 3, seed: int = 0) -> Told:
    """Random offsets and features of every row; the first feature is 1."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(len(rows), width))
    features[:, 0] = 1.0
    logits = random.normal(size=(len(rows), rows.labels.shape[1]))
    return Told(torch.from_numpy(logits), torch.from_numpy(features))
