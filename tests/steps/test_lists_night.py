"""A night whose items have tags and vectors, and whose requests have codes and vectors: from the lake to the ranker.

Its segments match their support with prototypes, so that a whole night of that adapter is here too.
"""

import json
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.config import RetrainConfig, load_config
from flows.nightly import NightResult
from tasks import evaluate
from tasks.champion import _ask
from tasks.clients.object_store import open_store
from tasks.errors import InvalidConfig, ReleaseRefused
from tasks.learning.base import load_base
from tasks.night_alarms import of_inputs
from tasks.release import alarms
from tasks.release.golden import reference_scores
from tasks.release.manifest import CONTENT
from tasks.release.publishing import read_manifest
from tasks.release.tables import read_tables
from tasks.release.triton import Served, write_repository
from tasks.serving.loaded import load
from tasks.serving.ranker import Ranker
from tasks.steps import open_workspace, record_of
from tasks.validate import clean_file
from tests.release.triton_rules import answer_of, as_sent
from tests.steps.plain import plain_night, plain_replay
from tests.world import World, write_world


@dataclass(frozen=True)
class Night:
    """The world, what was made of its fifth night, and the release's files."""

    world: World
    config: RetrainConfig
    result: NightResult
    folder: Path

    def reference(self, request: dict[str, np.ndarray]) -> np.ndarray:
        """What the network says, with the look-up done in numpy."""
        network = load_base({name: self.folder / name for name in ("base.safetensors", "base.json")}).network
        bank = np.fromfile(self.folder / "bank.bin", np.float32).reshape(-1, 1, network.width)
        data = self.config.data
        return reference_scores(network, bank, read_tables(data, self.folder), data, request)


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Night:
    world = write_world(tmp_path_factory.mktemp("lists"), nights=5, users=24, lists=True)
    config = RetrainConfig.model_validate(world.config | {"adapter": {"kind": "matching"}})
    result = plain_night(config, world.nights[4])
    export = next(step for step in result.steps if step.step == "export")
    folder = open_workspace(config.place()).folder(record_of(config.place(), export), "release")
    return Night(world, config, result, folder)


REQUEST: dict[str, Any] = {
    "user_id": ["user-001", "nobody", "user-007"],
    "market": ["north", None, "south"],
    "age": [30, None, 41],
    "codes": [[7, 1, 123456], None, []],
    "mood": [None, [2.0, 0.5], [1.0, -1.0]],
    "item_id": [[100, 101], [102, 999], [103, 104]],
    "tags": [[["comedy", "long"], []], [None, ["drama", "never heard", "short", "night-1"]], [["long"], ["long"]]],
    "look": [[[10.0, 1.0, -1.0], None], [None, [1.0, 2, 3]], [[0, 0, 0], None]],
    "price": [[5.0, None], [1.0, 2.0], [3.0, 3.0]],
}
EMPTY = -(2**63)
PADDED = {
    **{name: np.array(REQUEST[name], object) for name in ("user_id",)},
    "market": np.array(["north", "", "south"], object),
    "age": np.array([30, np.nan, 41], np.float32),
    "codes": np.array([[7, 1, 123456, *[EMPTY] * 13], [EMPTY] * 16, [EMPTY] * 16]),
    "mood": np.array([[np.nan] * 2, [2, 0.5], [1, -1]], np.float32),
    "item_id": np.array(REQUEST["item_id"]),
    "tags": np.array([
        [["comedy", "long", "", ""], [""] * 4], [[""] * 4, ["drama", "never heard", "short", "night-1"]],
        [["long", "", "", ""], ["long", "", "", ""]],
    ], object),
    "look": np.array([
        [[10, 1, -1], [np.nan] * 3], [[np.nan] * 3, [1, 2, 3]], [[0, 0, 0], [np.nan] * 3],
    ], np.float32),
    "price": np.array([[5, np.nan], [1, 2], [3, 3]], np.float32),
}  # fmt: skip
"""The same with nothing left to a reader."""


def test_a_json_request_of_plain_lists_is_answered_as_by_the_network(night: Night) -> None:
    """Empty lists, unknown values, missing vectors and lists of different lengths in one batch."""
    with Ranker(night.config.store, "tiny", device="cpu") as ranker:
        said = ranker.score(json.loads(json.dumps(REQUEST)))
        assert [one.position for one in ranker.rank(REQUEST)[2]] == [1, 2]
    np.testing.assert_allclose(said, night.reference(PADDED), rtol=1e-5, atol=1e-5)
    told = dict(PADDED, tags=np.where(PADDED["tags"] == "long", "short", PADDED["tags"]))
    assert (np.abs(night.reference(told)[:, 0] - said[:, 0]).ravel() > 1e-4).tolist() == [True, False, True]


def test_the_release_as_a_repository_of_triton_answers_the_same(night: Night, tmp_path: Path) -> None:
    store, pipeline = open_store(night.config.store), night.config.pipeline
    manifest = read_manifest(store, pipeline, night.result.published.release)
    write_repository(store, manifest, tmp_path, Served("tiny"))
    inputs = {name: np.asarray(values) for name, values in PADDED.items()}
    said = answer_of(tmp_path, "tiny", as_sent(manifest.interface, inputs))
    np.testing.assert_allclose(said["scores"], night.reference(PADDED), rtol=1e-5, atol=1e-5)


def test_the_interface_says_what_to_pass(night: Night) -> None:
    with Ranker(night.config.store, "tiny", device="cpu") as ranker:
        specs = {spec.name: spec for spec in ranker.manifest.interface.inputs}
    assert (specs["tags"].dtype, specs["tags"].shape) == ("string", ("requests", "candidates", 4))
    assert (specs["codes"].dtype, specs["codes"].shape) == ("int64", ("requests", 16))
    assert (specs["look"].dtype, specs["look"].shape) == ("float32", ("requests", "candidates", 3))
    assert {spec.name for spec in specs.values() if spec.values is not None} == {"tags", "look", "codes", "mood"}
    example = specs["tags"].example
    assert isinstance(example, tuple)
    assert set(example) & {"comedy", "drama"}


def test_bad_lists_of_the_history_are_not_learned_from_and_new_tags_are_known(night: Night) -> None:
    assert sum(night.world.bad.values()) == 3
    record = record_of(night.config.place(), night.result.steps[2])
    assert record.content["rows"] == sum(night.world.rows.values()) - 3
    known = pq.read_table(night.folder / "vocabulary.parquet").to_pylist()
    tags = [one["key_string"] for one in known if one["column"] == "tags"]
    assert tags[:5] == ["comedy", "drama", "long", "night-0", "short"]
    assert tags[5:] == ["night-1", "night-2", "night-3", "night-4"]


def test_tastes_for_tags_are_adapted_to(night: Night) -> None:
    """Length is a tag and nothing else, and every user has a taste of his own for it."""
    losses = {(row.exam, row.method): row.log_loss for row in night.result.verdict.scores}
    for exam in ("nightly", "first contact, 5 rows"):
        assert losses[exam, "adapted"] < losses[exam, "zero steps"] - 0.03


@pytest.mark.parametrize("name", [None, "tags", "look"])
def test_a_list_that_tells_the_label_is_named(night: Night, monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    """Planted where the judge reads: a tag, or a number of a vector, that says how the row came out."""
    place, data = night.config.place(), night.config.data
    steps = {step.step: step for step in night.result.steps}
    rows = evaluate.rows_of(place, record_of(place, steps["prepare"]))
    liked = np.asarray(rows.labels)[:, 0]
    assert rows.candidate_values is not None
    assert rows.candidate_vectors is not None
    tags, looks = np.array(rows.candidate_values), np.array(rows.candidate_vectors)
    if name == "tags":
        tags[:, 0], tags[:, 1:] = 1 + liked, -1
    if name == "look":
        looks[:] = 5 * liked[:, None]
    planted = replace(rows, candidate_values=tags, candidate_vectors=looks)
    monkeypatch.setattr(alarms, "LEAK_CLASS_ROWS", 20)  # the night is small
    told = [alarm.message for alarm in of_inputs(data, planted, night.world.nights[4].toordinal())]
    assert [str(name) in message for message in told] == ([] if name is None else [True])


def test_a_replay_ranks_items_by_their_lists_as_well(night: Night, tmp_path: Path) -> None:
    """The exam is the night's own; what users would be shown is new, and the same lists for all would say nothing."""
    day = night.world.nights[4]
    replayed = plain_replay(night.config, day, day, out=str(tmp_path))
    assert [one.exam is not None for one in replayed.nights] == [True]
    shown = pq.read_table(tmp_path / "replay-variety.parquet").to_pylist()
    methods = {row["method"]: row for row in shown}
    assert {"adapted", "zero steps", "popularity"} <= methods.keys()
    assert methods["adapted"]["personalisation"] > methods["popularity"]["personalisation"] == 0


def test_a_replayed_champion_reads_the_lists_of_the_lake(night: Night, tmp_path: Path) -> None:
    """Each row as a request with one candidate; lists that the release has no room for are refused."""
    for name in CONTENT:
        (tmp_path / name).write_bytes((night.folder / name).read_bytes())
    with Ranker(night.config.store, "tiny", device="cpu") as ranker:
        champion = load(tmp_path, ranker.manifest, "cpu")
        table = pq.read_table(clean_file(night.config.place(), record_of(night.config.place(), night.result.validated)))
        said = _ask(champion, table)
        one = {spec.name: table[spec.name].to_pylist() for spec in ranker.manifest.interface.inputs}
        request = {
            spec.name: one[spec.name] if spec.per == "request" else [[value] for value in one[spec.name]]
            for spec in ranker.manifest.interface.inputs
        }
        np.testing.assert_array_equal(said, ranker.score(request)[:, 0])
    for name, value, kind in (("tags", list("abcde"), pa.list_(pa.string())), ("look", [1.0], pa.list_(pa.float32()))):
        at = table.column_names.index(name)
        with pytest.raises(ReleaseRefused, match=f"'{name}', and tonight's have {len(value)}"):
            _ask(champion, table.set_column(at, name, pa.array([value] * table.num_rows, kind)))
        with pytest.raises(ReleaseRefused, match=f"'{name}' holds lists in one of contract and release only"):
            _ask(champion, table.set_column(at, name, pa.array(["a"] * table.num_rows)))


@pytest.mark.parametrize(
    ("section", "value", "told"),
    [
        ("segments", {"levels": [["user_id"], ["codes"]]}, "segments.levels[1]: 'codes' is not the user or a categor"),
        ("segments", {"levels": [["mood"]]}, "segments.levels[0]: 'mood' is not the user or a categorical request"),
        ("statistics", {"cohort": ["codes"]}, "statistics.cohort[0]: 'codes' is not a categorical request column"),
    ],
)
def test_lists_are_no_segment_and_no_cohort(tmp_path: Path, section: str, value: object, told: str) -> None:
    tree = write_world(tmp_path, nights=1, users=9, first_night=date(2026, 3, 1), lists=True).config
    (tmp_path / "config.yaml").write_text(json.dumps({**tree, section: value}))
    with pytest.raises(InvalidConfig) as caught:
        load_config(tmp_path / "config.yaml")
    assert told in str(caught.value)
