"""A night whose release takes feedback: from the config to a ranker that is told what its users have just done."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from flows.config import RetrainConfig, load_config
from tasks.adapt import with_held
from tasks.clients.object_store import open_store
from tasks.data.vocabulary import Vocabulary
from tasks.errors import InvalidConfig
from tasks.fallback import fall_back
from tasks.learning.bank import Bank, BankLevel
from tasks.release.holds import HeldSegment, change_holds
from tasks.release.manifest import OPTIONAL
from tasks.release.publishing import read_manifest
from tasks.serving.ranker import Ranker
from tests.finished import FEEDBACK as ROWS
from tests.finished import Finished
from tests.steps.plain import plain_night


def test_a_night_is_published_with_graphs_that_solve_feedback(fed: Finished):
    config, before, result = fed.config, *fed.results[-2:]
    repeated = {step.step: step.reused for step in result.steps}
    assert {name for name, reused in repeated.items() if not reused} == {"export", "publish"}
    store = open_store(config.store)
    old, new = (read_manifest(store, config.pipeline, one.published.release) for one in (before, result))
    blobs = [{file.name: file.sha256 for file in manifest.files} for manifest in (old, new)]
    assert blobs[1].keys() - blobs[0].keys() == OPTIONAL["feedback"]
    changed = {name for name, sha256 in blobs[0].items() if blobs[1][name] != sha256}
    assert changed == {"golden.json", "interface.json", "tables.json"}
    with Ranker(store, config.pipeline, device="cpu") as ranker:
        assert ranker.release == new.release
        given = {spec.name: spec for spec in ranker.manifest.interface.inputs}
        request = {name: [spec.example] if spec.per == "request" else [[spec.example] * 2]
                   for name, spec in given.items() if not spec.optional}  # fmt: skip
        *columns, label = (name for name, spec in given.items() if spec.optional)
        # What he has just left is the candidate itself: of this world's items, liking one says nothing good of others.
        brought = {name: [[given[given[name].of].example] * ROWS] for name in columns}
        liked, not_liked = (ranker.score(request | brought | {label: [[one] * ROWS]}) for one in (1, 0))
        assert (liked > not_liked).all()
        assert ranker.score(request).shape == liked.shape


def test_feedback_of_a_held_user_changes_nothing_at_once_and_in_nights_to_come(fed: Finished, tmp_path: Path):
    """One is held whom the bank has no weights for, by too few rows; one falls back whom it has."""
    config, night = fed.copy(tmp_path / "world").config, fed.results[-1].night
    store = open_store(config.store)
    who = {"columns": ("user_id",), "reason": "complaints", "by": "me", "since": "2026-03-07"}
    held = [HeldSegment(name=name, **who) for name in ("islander", "unheard of")]
    change_holds(store, config.pipeline, lambda _: held)
    first = plain_night(config, night)
    with Ranker(store, config.pipeline, device="cpu") as ranker:
        given = {spec.name: spec for spec in ranker.manifest.interface.inputs}
        users = ["user-003", "islander", "user-004", "unheard of"]
        request = {
            name: [[spec.example] * 4] * 4 if spec.per == "candidate" else [spec.example] * 4
            for name, spec in given.items()
            if not spec.optional
        } | {"user_id": users, "item_id": [[100, 101, 102, 103]] * 4}
        *columns, label = (name for name, spec in given.items() if spec.optional)
        brought = {name: [[given[given[name].of].example] * ROWS] * 4 for name in columns} | {label: [[1] * ROWS] * 4}
        spared = brought | {label: [[None] * ROWS, [1] * ROWS, [1] * ROWS, [1] * ROWS]}
        before, quiet, alone = (ranker.score(request | more) for more in (brought, spared, {}))
        told = fall_back(config.place(), config.data, config.segments.levels, {"user_id": "user-003"}, "complaints")
        assert ranker.refresh()
        after, bare = ranker.score(request | brought), ranker.score(request)
    assert told.pointer.release != first.published.release
    np.testing.assert_array_equal(after[1:], before[1:])
    np.testing.assert_allclose(after[:2], bare[:2], atol=1e-6, rtol=0)
    # Feedback was solved for him before, instead of his weights; who is held by nobody keeps it.
    assert np.abs(before - quiet)[0].max() > 1e-3
    assert (np.abs(after - bare)[2:].max(axis=(1, 2)) > 1e-3).all()
    np.testing.assert_allclose(alone[1:], bare[1:], atol=1e-6, rtol=0)
    again = plain_night(config, night)
    assert again.published.release == told.pointer.release
    # Given his own weights back, he is solved from feedback as before.
    back = (config.place(), config.data, config.segments.levels, {"user_id": "user-003"}, "better now")
    assert fall_back(*back, first.published.release).pointer.release == first.published.release
    with Ranker(store, config.pipeline, device="cpu") as ranker:
        np.testing.assert_array_equal(ranker.score(request | brought), before)


def test_who_is_held_is_named_in_the_bank_whatever_rows_he_has():
    """Of five users the nights have rows of four; one of the latter has weights."""
    vocabularies = {"user": Vocabulary("user", pa.array(["ann", "bob", "cal", "dee", "eve"]))}
    level = BankLevel(np.array([6]), np.array([2]), np.array([1]), np.array([9]), np.array([0]), np.array([4]))
    whose = SimpleNamespace(columns=("user",), radices=(6,), keys=np.array([1, 2, 3, 4]), size=4)
    bank = Bank(np.zeros((2, 1, 3), np.float32), (level,))
    held = [HeldSegment(columns=("user",), name=name, reason="", by="", since="") for name in ("ann", "eve", "fay")]
    held.append(held[0].model_copy(update={"columns": ("market",)}))
    made, absent = with_held(bank, SimpleNamespace(levels=(whose,)), vocabularies, held)  # type: ignore[arg-type]
    assert made.levels[0].refused.tolist() == [1, 4, 5]
    assert absent == (1,)
    same, absent = with_held(bank, SimpleNamespace(levels=(whose,)), vocabularies, ())  # type: ignore[arg-type]
    assert (same.levels[0].refused.tolist(), absent) == ([4], (0,))


def test_a_config_that_a_graph_cannot_solve_is_refused_by_name(tmp_path, damageable: Finished):
    tree = json.loads(json.dumps(damageable.world.config)) | {"export": {"feedback": ROWS}}
    for section, told in (
        ({"adapter": {"kind": "matching"}}, "adapter.kind is 'matching'; set it to 'ridge' or 'bias'"),
        ({"segments": {"levels": tree["segments"]["levels"][1:]}}, "feedback adapts a user, and the finest of"),
        ({"ranker": {"kind": "transformer", "history": 4}}, "ranker.history = 4 reads the user's recent rows already"),
        ({"export": {"feedback": 201}}, "export.feedback: 201 does not fit"),
    ):
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(tree | section))
        with pytest.raises(InvalidConfig, match=told):
            load_config(path)
    plain = RetrainConfig.model_validate(damageable.world.config)
    off = RetrainConfig.model_validate(damageable.world.config | {"export": {"feedback": 0}})
    assert plain.digest() == off.digest() != RetrainConfig.model_validate(tree).digest()
