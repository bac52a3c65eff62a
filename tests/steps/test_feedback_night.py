"""A night whose release takes feedback: from the config to a ranker that is told what its users have just done."""

import json

import pytest

from flows.config import RetrainConfig, load_config
from tasks.clients.object_store import open_store
from tasks.errors import InvalidConfig
from tasks.release.manifest import OPTIONAL
from tasks.release.publishing import read_manifest
from tasks.serving.ranker import Ranker
from tests.finished import Finished
from tests.steps.plain import plain_night

ROWS = 3


def test_a_night_is_published_with_graphs_that_solve_feedback(damageable: Finished):
    config = RetrainConfig.model_validate(damageable.world.config | {"export": {"feedback": ROWS}})
    before, night = damageable.results[-1], damageable.results[-1].night
    result = plain_night(config, night)
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
