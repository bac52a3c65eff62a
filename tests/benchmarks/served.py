"""A release of a realistic size, and its network written by hand in numpy: what a reader is compared with."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.learning.ranker_config import RankerConfig
from tasks.release.golden import draw_requests, make_golden, write_golden
from tasks.release.graphs import export
from tasks.release.lookups import encode, wires
from tasks.release.manifest import Manifest
from tasks.release.scorer import trace
from tests.releases import contract, describe, make_parts, make_rows, manifest_of

F32 = npt.NDArray[np.float32]
FILES = ("base.safetensors", "base.json", "segments.parquet", "tables.json")


@dataclass
class Served:
    """A release without what only a trainer reads, and everything that its scores are computed from."""

    folder: Path
    manifest: Manifest
    parts: tuple[Any, ...]

    def request(self, requests: int, candidates: int, seed: int = 0) -> dict[str, npt.NDArray[np.generic]]:
        """Raw columns, drawn from the rows: every request of another user."""
        data, rows = self.parts[0], self.parts[4]
        random = np.random.default_rng(seed)
        drawn = {}
        for spec in self.manifest.interface.inputs:
            shape = (requests,) if spec.per == "request" else (requests, candidates)
            values = rows[spec.name].take(pa.array(random.integers(rows.num_rows, size=int(np.prod(shape)))))
            if spec.dtype == "string":
                raw = np.array(values.fill_null("").to_pylist(), object)
            elif spec.dtype == "int64":
                raw = values.cast(pa.int64()).fill_null(spec.missing).to_numpy()
            else:
                raw = values.cast(pa.float64()).to_numpy().astype(np.float32)
            drawn[spec.name] = raw.reshape(shape)
        assert data.user in drawn
        return drawn


def served_parts(users: int = 2_000, items: int = 3_000, config: RankerConfig | None = None) -> tuple[Any, ...]:
    """Contract, network, bank, tables and rows with two objectives and two levels, by default of the default network.

    Every other user has weights of his own.
    """
    data = contract("full")
    rows = make_rows(data, 40_000)
    random = np.random.default_rng(7)
    for name, count in ((data.user, users + 2), (data.item, items + 2)):
        drawn = random.permutation(np.arange(len(rows)) % count)
        keys = pa.array([f"user {one} é" for one in drawn]) if name == data.user else pa.array(drawn * 1_000_003)
        rows = rows.set_column(rows.column_names.index(name), name, keys)
    return make_parts("full", rows=rows, config=config or RankerConfig())


def make_served(folder: Path, users: int = 2_000, items: int = 3_000) -> Served:
    """A release of these parts."""
    parts = served_parts(users, items)
    data, network, bank, tables, rows = parts
    folder.mkdir(parents=True)
    export(network, bank, tables, data, folder, lambda *_: trace(network.shape, network.config, wires(data, tables)))
    golden = make_golden(network, bank, tables, data, draw_requests(data, rows))
    write_golden(data, golden, folder)
    for name in FILES:
        (folder / name).write_bytes(json.dumps(name).encode())  # a reader of the graphs opens none of them
    return Served(folder, manifest_of(folder, describe(data, tables, golden)), parts)


class ByHand:
    """The same network as somebody would write it in numpy: dictionaries for keys, matrices for layers."""

    def __init__(self, served: Served) -> None:
        self.data, self.network, bank, self.tables, _ = served.parts
        network, shape = self.network, self.network.shape
        self.bank = bank
        self.state = {name: one.detach().numpy() for name, one in network.state_dict().items()}
        self.keys = {
            name: {key: at for at, key in enumerate(vocabulary.keys.to_pylist(), 1)}
            for name, vocabulary in self.tables.vocabularies.items()
        }
        levels, self.slots = self.tables.levels, []
        for level in levels:
            self.slots.append((level, dict(zip(level.keys.tolist(), level.slots.tolist(), strict=True))))
        statistics = self.tables.statistics
        self.pairs = {key: at for at, key in enumerate(statistics.cohort_item_keys.tolist(), 1)}
        self.shape = shape
        self.layers = {
            name: (self.state[f"{name}.weight"].T.copy(), self.state[f"{name}.bias"])
            for name in ("request_tower.0", "request_tower.2", "candidate_tower.0", "candidate_tower.2")
        }
        self.layers |= {
            name: (self.state[f"{name}.weight"].T.copy(), self.state[f"{name}.bias"])
            for name in ("joint.0", "joint.3", "wide")
        }

    def read(self, request: dict[str, npt.NDArray[np.generic]]) -> dict[str, npt.NDArray[np.generic]]:
        """Raw columns of one request to ids and numbers."""
        data = self.data
        ids = {
            name: np.array([self.keys[name].get(one, 0) for one in request[name].ravel().tolist()])
            for name in data.vocabularies
        }
        user, item = int(ids[data.user][0]), ids[data.item]
        slot = 0
        for level, slots in self.slots:
            key = 0
            for column, radix in zip(level.columns, level.radices, strict=True):
                key = key * radix + int(ids[column][0])
            if key in slots:
                slot = slots[key]
                break
        statistics = self.tables.statistics
        cohort = 0
        for name, radix in zip(statistics.cohort_columns, statistics.cohort_radices, strict=False):
            cohort = cohort * radix + int(ids[name][0])
        pairs = cohort * statistics.cohort_radices[-1] + item
        return {
            "candidate_ids": np.stack([item, *(ids[n] for n in data.named("candidate", "categorical"))], axis=-1),
            "request_ids": np.array([ids[name][0] for name in data.named("request", "categorical")]),
            "request_numbers": np.array([request[name][0] for name in data.named("request", "numeric")], np.float32),
            "candidate_numbers": np.stack([request[n][0] for n in data.named("candidate", "numeric")], axis=-1),
            "user_row": np.array(user),
            "slot": np.array(slot),
            "cohort_item_row": np.array([self.pairs.get(one, 0) for one in pairs.tolist()]),
        }

    def __call__(self, given: dict[str, npt.NDArray[np.generic]]) -> F32:
        """Scores [M, K] of one request with M candidates."""
        state, shape, statistics = self.state, self.shape, self.tables.statistics
        ids, pair = given["candidate_ids"], given["cohort_item_row"]
        items, count = statistics.item[ids[:, 0]], len(ids)
        unseen = items.copy()
        unseen[:, -1] = 0.0
        pairs = np.where((pair == 0)[:, None], unseen, statistics.cohort_item[pair])
        user = np.broadcast_to(statistics.user[given["user_row"]], (count, statistics.user.shape[1]))
        told = np.concatenate([items, user, pairs], axis=1)
        normal = self._normal("statistics_normaliser", told)[:, : shape.statistics].copy()
        normal[:, list(shape.request_statistics)] = 0.0  # ranker.user_statistics is off
        asked = [state[f"request_tables.{at}.weight"][self._known("request", at, one)]
                 for at, one in enumerate(given["request_ids"])]  # fmt: skip
        left = self._tower(
            "request_tower",
            np.concatenate([
                *asked, self._normal("request_normaliser", given["request_numbers"]),
                normal[0, list(shape.request_statistics)],
            ]),
        )  # fmt: skip
        numbers = self._normal("candidate_normaliser", given["candidate_numbers"])
        known = [self._known("candidate", at, ids[:, at]) for at in range(ids.shape[1])]
        embedded = [state[f"candidate_tables.{at}.weight"][one] for at, one in enumerate(known)]
        right = self._tower(
            "candidate_tower", np.concatenate([*embedded, numbers, normal[:, list(shape.candidate_statistics)]], axis=1)
        )
        seen = normal[:, list(shape.joint_statistics)]
        joint = np.concatenate([np.broadcast_to(left, right.shape), right, left * right, seen], axis=1)
        hidden = np.maximum(self._linear("joint.0", joint), 0.0)
        logits = told[:, list(shape.offsets)] + self._linear("wide", normal) + self._linear("joint.3", hidden)
        factors = [state[f"factor_tables.{place}.weight"][known[at]] for place, at in enumerate(self.network.factored)]
        features = np.concatenate(
            [np.ones((count, 1), np.float32), *factors, numbers[:, : shape.candidate_numbers]], axis=1
        )
        values = logits + features @ self.bank[given["slot"]].T
        for at, kind in enumerate(shape.kinds):
            if kind == "binary":
                values[:, at] = 1.0 / (1.0 + np.exp(-values[:, at]))
        return values

    def _known(self, side: str, at: int, ids: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        return np.where(ids < len(self.state[f"{side}_tables.{at}.weight"]), ids, 0)

    def _linear(self, name: str, values: F32) -> F32:
        weight, bias = self.layers[name]
        return values @ weight + bias

    def _tower(self, name: str, values: F32) -> F32:
        return self._linear(f"{name}.2", np.maximum(self._linear(f"{name}.0", values), 0.0))

    def _normal(self, name: str, values: F32) -> F32:
        mean, scale = self.state[f"{name}.mean"], self.state[f"{name}.scale"]
        missing = np.isnan(values)
        scaled = np.clip((np.where(missing, mean, values) - mean) / scale, -5.0, 5.0)
        return np.concatenate([scaled, missing.astype(np.float32)], axis=-1)


def encoded(served: Served, request: dict[str, npt.NDArray[np.generic]]) -> dict[str, npt.NDArray[np.generic]]:
    """The look-up's oracle, for the proof that `ByHand` reads a request as the release does."""
    data, _, _, tables, _ = served.parts
    return encode(data, tables, request)
