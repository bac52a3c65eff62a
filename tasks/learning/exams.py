"""Both exams on a night, row by row: what each method said about every row of it.

*Nightly*: adapters from earlier nights, every row of the night as query. *First contact*: a user's support is his
earlier nights plus his first k rows of the night, the later ones are query. Every method with a user part gets the same
support. Figures and intervals are computed from these tables, so exams of several nights pool by reading several.

Shapes: N rows of the night, K objectives.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from tasks.data.contract import DataConfig
from tasks.data.segments import split_keys
from tasks.data.vocabulary import Vocabularies
from tasks.learning.bank import Bank
from tasks.learning.base import Base
from tasks.learning.baselines import Baselines
from tasks.learning.episodes import score_visits
from tasks.learning.ladder import Ladder
from tasks.learning.material import I64, Material, Visits, visits_of
from tasks.learning.solvers import ObjectiveKind

SUPPORTS = (0, 5, 20)
"""Same-night support rows of the exam of first contact."""
COMMON = 20
"""Rows of a user after which every support size is compared on the same rows."""
CANDIDATE, ZERO_STEPS, PARENT, CHAMPION = "candidate", "zero steps", "parent", "champion"
JOINT = "joint training"
LADDER = b"ladder"
"""Where a table's metadata name the columns of each level."""
CHUNK = 131_072
"""About how many rows of the night are scored at a time."""

F32 = npt.NDArray[np.float32]
Scores = dict[str, tuple[I64, Tensor]]


def column(condition: str, method: str, objective: str) -> str:
    """Name of the column of predictions.

    >>> column("contact 5", "popularity", "liked")
    'contact 5/popularity/liked'
    """
    return f"{condition}/{method}/{objective}"


def contact(support: int) -> str:
    """Name of the condition of first contact after some rows."""
    return f"contact {support}"


CONDITIONS = ("nightly", *(contact(support) for support in SUPPORTS))


@dataclass(frozen=True)
class Night:
    """The night to be examined, among the rows of its window.

    Attributes:
        data: the contract.
        ladder: segments over history and night.
        material: the rows.
        ordinal: the night.
        visits: the night's visits.
    """

    data: DataConfig
    ladder: Ladder
    material: Material
    ordinal: int
    visits: Visits

    @classmethod
    def among(cls, data: DataConfig, ladder: Ladder, material: Material, ordinal: int) -> "Night":
        """The visits of a night in a row table."""
        return cls(data, ladder, material, ordinal, visits_of(ladder.rows).of_nights(ordinal, ordinal))

    @property
    def at(self) -> I64:
        """Positions of the night's rows [N]: by user, then by time."""
        return self.visits.rows.flat()[0]

    def chunks(self) -> Iterator[Visits]:
        """The visits in parts of about `CHUNK` rows."""
        part = np.cumsum(self.visits.rows.lengths) // CHUNK
        return (self.visits.take(np.flatnonzero(part == number)) for number in np.unique(part))


def facts(night: Night, bank: Bank, vocabularies: Vocabularies) -> pa.Table:
    """Who each row of the night is, what its labels are and which segment of the bank serves it, in raw keys.

    Columns: `user` (string), `tie`, `at` (the row's number in the user's night), `history` and `item_history` (rows of
    the user, and of the item, on earlier nights of the window), `label/<objective>`, `level` (that serves it, -1 for
    the base), `segment` (its raw key), `support`.
    """
    rows, at = night.ladder.rows, night.at
    first = np.repeat(night.visits.rows.start, night.visits.rows.lengths)
    user = np.asarray(rows.user)[at]
    columns: dict[str, pa.Array] = {
        "user": vocabularies[night.data.user].decode(user).cast(pa.string()),
        "tie": pa.array(np.asarray(rows.tie)[at]),
        "at": pa.array((at - first).astype(np.int32)),
        "history": pa.array((first - np.repeat(night.visits.first, night.visits.rows.lengths)).astype(np.int32)),
    }
    item, earlier = np.asarray(rows.item), np.asarray(rows.night) < night.ordinal
    before = np.bincount(item[earlier], minlength=int(item.max(initial=0)) + 1)
    columns["item_history"] = pa.array(before[item[at]].astype(np.int32))
    for number, objective in enumerate(night.data.objectives):
        columns[f"label/{objective.name}"] = pa.array(np.asarray(rows.labels)[at, number])
    slots = bank.slots_of(rows, at)
    level = np.full(len(at), -1, np.int8)
    support = np.zeros(len(at), np.int64)
    segment = pa.array([""] * 1).take(pa.array(np.zeros(len(at), np.int64)))
    for number, own in enumerate(bank.levels):
        if len(own.slots) == 0:
            continue
        place = np.full(len(bank.weights), -1, np.int64)
        place[own.slots] = np.arange(len(own.slots))
        mine = place[slots]
        served = mine >= 0
        level[served], support[served] = number, own.support[mine[served]]
        names = segment_names(own.keys, rows.levels[number].columns, tuple(own.radices.tolist()), vocabularies)
        segment = pc.if_else(pa.array(served), names.take(pa.array(np.maximum(mine, 0))), segment)
    table = pa.table(columns | {"level": pa.array(level), "segment": segment, "support": pa.array(support)})
    # Exams pool only with those of the same ladder: a level's number means nothing without its columns.
    return table.replace_schema_metadata({LADDER: json.dumps([one.columns for one in rows.levels])})


def who_was_asked(asked: Night, vocabularies: Vocabularies) -> pa.Table:
    """Who each row is, by raw key, when it was, and what its labels are; of visits of one night or of several.

    Columns: `user` (string), `night` (an ordinal), `at` (the row's number in the user's night), `label/<objective>`.
    """
    rows, at = asked.ladder.rows, asked.at
    first = np.repeat(asked.visits.rows.start, asked.visits.rows.lengths)
    labels = np.asarray(rows.labels)[at]
    return pa.table(
        {
            "user": vocabularies[asked.data.user].decode(np.asarray(rows.user)[at]).cast(pa.string()),
            "night": pa.array(np.asarray(rows.night)[at]),
            "at": pa.array((at - first).astype(np.int32)),
            **{f"label/{one.name}": pa.array(labels[:, at]) for at, one in enumerate(asked.data.objectives)},
        }
    )


def segment_names(
    keys: I64, columns: tuple[str, ...], radices: tuple[int, ...], vocabularies: Vocabularies
) -> pa.Array:
    """Raw keys of segments, joined by a bar: they mean the same in every night, which mixed-radix keys do not."""
    ids = split_keys(keys, radices)
    parts = [vocabularies[name].decode(ids[:, at]).cast(pa.string()) for at, name in enumerate(columns)]
    return pc.binary_join_element_wise(*parts, " | ", null_handling="replace", null_replacement="?")


def sit(night: Night, base: Base, bank: Bank, baselines: Baselines) -> dict[str, F32]:
    """Predictions of the candidate, its parents and base, and the baselines, under every condition.

    Returns:
        Column name to predictions [N], NaN where the row is not query.
    """
    nightly = _from_bank(night, base, bank, CANDIDATE, PARENT, ZERO_STEPS)

    def after(support: int) -> Callable[[Visits], Scores]:
        def contacts(visits: Visits) -> Scores:
            scores = contact_scores(night, base, visits, support)
            said = {CANDIDATE: scores[1], ZERO_STEPS: scores[2]}
            given = np.full(len(visits), support, np.int64)
            return {name: (scores[0], p) for name, p in said.items()} | baselines.score(visits, given)

        return contacts

    def nightly_all(visits: Visits) -> Scores:
        return nightly(visits) | baselines.score(visits, np.zeros(len(visits), np.int64))

    predictions = gather(night, "nightly", nightly_all)
    for support in SUPPORTS:
        predictions |= gather(night, contact(support), after(support))
    return predictions


def sit_nightly(night: Night, base: Base, bank: Bank, method: str) -> dict[str, F32]:
    """Predictions of one adapted base in the nightly exam.

    Args:
        night: whose visits are scored.
        base: with its own adapter.
        bank: everybody's weights from earlier nights.
        method: what to call it.
    """
    return gather(night, "nightly", _from_bank(night, base, bank, method))


def _from_bank(
    night: Night, base: Base, bank: Bank, adapted: str, parent: str | None = None, zero_steps: str | None = None
) -> Callable[[Visits], Scores]:
    """What visits are scored by under everybody's weights, under those of one level up, and under none, by name."""
    scorer = night.material.scorer(base.network)
    weights = torch.from_numpy(bank.weights).to(night.material.device)
    above = np.arange(len(bank.weights), dtype=np.int64)
    for level in bank.levels:
        above[level.slots] = level.parent

    def score(visits: Visits) -> Scores:
        at = visits.rows.flat()[0]
        logits, features = scorer(at)
        slots = bank.slots_of(night.ladder.rows, at)
        said = {adapted: base.adaptation.scores(logits, features, weights, slots)}
        if parent is not None:
            said[parent] = base.adaptation.scores(logits, features, weights, above[slots])
        if zero_steps is not None:
            said[zero_steps] = logits
        return {name: (at, probability(scores, base.kinds)) for name, scores in said.items()}

    return score


def sit_contact(night: Night, base: Base, method: str, zero_steps: str | None = None) -> dict[str, F32]:
    """Predictions of one adapted base in first contact: a champion's, with its own solver on the same support.

    Args:
        night: whose visits are scored.
        base: with its own adapter.
        method: what to call the adapted base.
        zero_steps: what to call the same base without adapters; None leaves it out.
    """
    predictions: dict[str, F32] = {}
    for support in SUPPORTS:

        def contacts(visits: Visits, support: int = support) -> Scores:
            scores = contact_scores(night, base, visits, support)
            said = {method: (scores[0], scores[1])}
            return said if zero_steps is None else {**said, zero_steps: (scores[0], scores[2])}

        predictions |= gather(night, contact(support), contacts)
    return predictions


def contact_scores(night: Night, base: Base, visits: Visits, support: int) -> tuple[I64, Tensor, Tensor]:
    """Positions of the rows after the first `support`, and predictions with and without adapters."""
    scores = score_visits(
        *(night.ladder, visits, np.full(len(visits), support, np.int64), night.material.scorer(base.network)),
        *(night.material, base.table(), base.adaptation),
    )
    return scores.rows, probability(scores.adapted, base.kinds), probability(scores.base, base.kinds)


def probability(scores: Tensor, kinds: tuple[ObjectiveKind, ...]) -> Tensor:
    """Predictions ``[T, K]`` from scores: the sigmoid of binary objectives, ratings as they are."""
    binary = torch.tensor([kind == "binary" for kind in kinds], device=scores.device)
    return torch.where(binary, torch.sigmoid(scores), scores)


def gather(night: Night, condition: str, score: Callable[[Visits], Scores]) -> dict[str, F32]:
    """Run a scorer over the night part by part and lay its answers beside the night's rows."""
    place = np.full(len(night.ladder.rows), -1, np.int64)
    place[night.at] = np.arange(len(night.at))
    predictions: dict[str, F32] = {}
    with torch.no_grad():
        for visits in night.chunks():
            for method, (at, values) in score(visits).items():
                answers = values.float().cpu().numpy()
                for number, objective in enumerate(night.data.objectives):
                    name = column(condition, method, objective.name)
                    if name not in predictions:
                        predictions[name] = np.full(len(night.at), np.nan, np.float32)
                    predictions[name][place[at]] = answers[:, number]
    return predictions


def joined(facts: pa.Table, predictions: Mapping[str, F32]) -> pa.Table:
    """The exam as one table."""
    for name, values in predictions.items():
        facts = facts.append_column(name, pa.array(values))
    return facts
