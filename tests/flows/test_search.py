"""A search on the tiny world: it finds what is better, says so honestly, and never reads the night or a later one."""

import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from flows import search as flows_search
from flows.config import RetrainConfig, as_yaml, load_config
from tasks.clients.object_store import ObjectStore
from tasks.errors import InvalidConfig, NotEnoughHistory
from tasks.learning import training
from tasks.learning.adapters import AdapterConfig
from tasks.learning.networks import RankerConfig
from tasks.learning.space import Parameter, Sections
from tasks.learning.training_config import TrainingConfig
from tasks.search import SearchRef, settings_of, shape_before
from tests.finished import Finished
from tests.steps.plain import plain_verbs
from tests.world import write_world

SPACE = {
    "ranker.category_factors": {"type": "choice", "choices": [0, 4]},
    "training.learning_rate": {"type": "float", "low": 1.0e-4, "high": 1.0e-3, "log": True},
}


def searched(tree: dict[str, Any], night: date, folder: Path, **options: Any) -> SearchRef:
    folder.mkdir(exist_ok=True)
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(options.pop("space", SPACE)))
    told = {
        "trials": 2,
        "block": 2,
        "cuts": 1,
        "space": str(path),
        "storage": str(folder / "trials.journal"),
        **options,
    }
    with plain_verbs(flows_search, least=2):
        return flows_search.search.fn(RetrainConfig.model_validate(tree), night, **told)


def outside(store: ObjectStore) -> dict[str, bytes]:
    """Everything in the store but step records and the lease."""
    keys = [key for key in store.list("tiny/") if not key.startswith("tiny/work/") and key != "tiny/lease"]
    return {key: store.get(key).data for key in keys}


@pytest.fixture(scope="module")
def world(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A pipeline with two releases, and a config that cannot know what anybody likes.

    Its adapters have no feature but the constant and the price.
    """
    copied = finished.copy(tmp_path_factory.mktemp("search"))
    tree = copied.world.config
    blind = {**tree["ranker"], "factors": 0, "category_factors": 0, "features": 0}
    brief = {**tree["training"], "epochs": 1, "steps_per_epoch": 2}
    return replace(copied, world=replace(copied.world, config={**tree, "ranker": blind, "training": brief}))


@pytest.fixture(scope="module")
def found(world: Finished, tmp_path_factory: pytest.TempPathFactory) -> tuple[SearchRef, Path]:
    folder = tmp_path_factory.mktemp("found")
    lake = [path.read_bytes() for night in world.world.nights for path in world.files_of(night)]
    before = outside(world.store)
    result = searched(world.world.config, world.next_night, folder)
    assert outside(world.store) == before
    assert [path.read_bytes() for night in world.world.nights for path in world.files_of(night)] == lake
    return result, folder


def test_it_finds_the_planted_setting_and_proves_it_on_nights_that_it_was_not_chosen_by(
    world: Finished, found: tuple[SearchRef, Path]
) -> None:
    result, _ = found
    assert (result.complete, result.pruned, result.own_is_best) == (2, 0, False)
    best = {one.name: one.best for one in result.settings}
    assert best["ranker.category_factors"] == 4
    assert {one.name: one.own for one in result.settings}["ranker.category_factors"] == 0
    assert result.best < result.own
    nights = world.world.nights
    assert (result.chosen_by, result.last) == ((nights[2], nights[3]), (nights[4], nights[5]))
    assert nights[6] == world.next_night
    after = {line.support: line for line in result.lines}
    assert sorted(after) == [0, 5]
    assert after[0].rows == sum(world.world.rows[night] - world.world.bad[night] for night in nights[4:6])
    for line in after.values():
        assert line.difference == pytest.approx(line.best - line.own, abs=1e-6)
    assert after[5].high is not None
    assert after[5].high < 0


def test_the_best_settings_are_yaml_that_a_config_takes(
    world: Finished, found: tuple[SearchRef, Path], tmp_path: Path
) -> None:
    best = {one.name: one.best for one in found[0].settings}
    tree = {**world.world.config}
    for section, fields in yaml.safe_load(as_yaml(best)).items():
        tree[section] = {**tree[section], **fields}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(tmp_path / "config.yaml")
    assert config.ranker.category_factors == 4
    assert config.training.learning_rate == best["training.learning_rate"]
    assert config.training.epochs == 1


def test_what_a_best_of_another_kind_puts_back_to_its_default_is_printed_too() -> None:
    """Else the printed YAML would not fit a config that has a rank."""
    own = Sections(RankerConfig(), AdapterConfig(kind="lora", rank=8), TrainingConfig())
    space = {
        "adapter.kind": Parameter(type="choice", choices=("ridge", "lora")),
        "ranker.factors": Parameter(type="int", low=1, high=8),
    }
    ridge = own.changed({"adapter.kind": "ridge", "ranker.factors": 6})
    told = [(one.name, one.own, one.best) for one in settings_of(space, own, ridge)]
    assert told == [("adapter.kind", "lora", "ridge"), ("ranker.factors", 4, 6), ("adapter.rank", 8, 4)]
    assert AdapterConfig.model_validate({"kind": "lora", "rank": 8} | {"kind": "ridge", "rank": 4}) == ridge.adapter
    assert [one.name for one in settings_of(space, own, own)] == ["adapter.kind"]


def test_nothing_of_the_night_or_later_is_read(world: Finished, found: tuple[SearchRef, Path], tmp_path: Path) -> None:
    other = world.copy(tmp_path / "other")
    for night in (one for one in other.world.nights if one >= other.next_night):
        for path in other.files_of(night):
            path.write_bytes(b"absurd")
    # Nights that were validated stay so; what is made of them is made again.
    shutil.rmtree(Path(other.config.store) / "tiny" / "work" / "history")
    there = searched(other.world.config, other.next_night, tmp_path / "there")
    assert there.model_copy(update={"storage": found[0].storage}) == found[0]


def test_a_key_that_is_new_in_the_last_block_changes_no_loss_of_the_blocks_before(
    world: Finished, found: tuple[SearchRef, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = world.copy(tmp_path / "other")
    nights = other.world.nights
    path = next(one for one in other.files_of(nights[5]) if pq.read_table(one, partitioning=None).num_rows)
    table = pq.read_table(path, partitioning=None)
    items = [999, *table["item_id"].to_pylist()[1:]]
    at = table.column_names.index("item_id")
    pq.write_table(table.set_column(at, "item_id", pa.array(items, table.schema.field(at).type)), path)
    shutil.rmtree(Path(other.config.store) / "tiny" / "work")
    cuts: dict[date, int] = {}
    train = training.meta_train

    def counted(*given: Any, **named: Any) -> Any:
        cuts[given[0].night] = given[0].shape.candidate_vocabularies[0]
        return train(*given, **named)

    monkeypatch.setattr(training, "meta_train", counted)
    there = searched(other.world.config, other.next_night, tmp_path / "there")
    assert (there.own, there.best, there.settings) == (found[0].own, found[0].best, found[0].settings)
    # A table has a row for each item until the cut, and the unknown one.
    for cut, rows in cuts.items():
        seen = [
            pq.read_table(one, partitioning=None) for night in nights if night < cut for one in other.files_of(night)
        ]
        assert rows == 1 + len({item for one in seen for item in one["item_id"].to_pylist()})
    assert sorted(cuts) == [nights[2], nights[4]]


def test_tables_are_sized_by_the_keys_before_the_cut(tmp_path: Path) -> None:
    data = RetrainConfig.model_validate(write_world(tmp_path, nights=2, users=4, lists=True).config).data
    counts = {side: len(data.named(side, "categorical")) for side in ("request", "candidate")}
    places = {side: sum(data.widths(side, "multi")) for side in ("request", "candidate")}
    assert places["candidate"]
    night = np.array([7, 8, 9])
    # Rows of nights 7, 8 and 9 have ids 1, 2 and 9 everywhere; lists end behind their first value.
    ids = {side: np.full((3, width), -1) for side, width in places.items()}
    for name, table in ids.items():
        for width, start in zip(data.widths(name, "multi"), np.cumsum((0, *data.widths(name, "multi"))), strict=False):
            assert width
            table[:, start] = (1, 2, 9)
    rows = SimpleNamespace(
        night=night,
        statistics_names=(),
        request_ids=np.repeat([[1], [2], [9]], counts["request"], axis=1),
        candidate_ids=np.repeat([[1], [2], [9]], 1 + counts["candidate"], axis=1),
        request_values=ids["request"] if places["request"] else None,
        candidate_values=ids["candidate"],
    )
    words = {name: SimpleNamespace(rows=10) for name in data.vocabularies}
    for first, size in ((7, 1), (8, 2), (9, 3), (10, 10)):
        shape = shape_before(data, rows, words, first)
        tables = (shape.request_vocabularies, shape.candidate_vocabularies)
        values = (shape.request_value_vocabularies, shape.candidate_value_vocabularies)
        assert {found for part in (*tables, *values) for found in part} == {size}
        assert tuple(map(len, values)) == (len(shape.request_values), len(shape.candidate_values))


def test_it_goes_on_where_it_was_and_trains_nothing_twice(
    world: Finished, found: tuple[SearchRef, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, folder = found
    shutil.copytree(folder, tmp_path / "again")
    # What is no part of any loss drops no trial.
    beside = {"checkpoint_seconds": 7.0, "tensorboard": str(tmp_path / "runs")}
    tree = {**world.world.config, "training": {**world.world.config["training"], **beside}}
    cuts: list[date] = []
    train = training.meta_train

    def counted(*given: Any, **named: Any) -> Any:
        cuts.append(given[0].night)
        return train(*given, **named)

    monkeypatch.setattr(training, "meta_train", counted)
    again = searched(tree, world.next_night, tmp_path / "again")
    assert again.model_copy(update={"storage": result.storage}) == result
    assert cuts == [world.world.nights[4]] * 2  # the comparison on the last block


def test_what_cannot_be_searched_is_refused_before_anything_is_read(world: Finished, tmp_path: Path) -> None:
    night = world.next_night
    wrong = {"training.learning_rat": SPACE["training.learning_rate"]}
    with pytest.raises(InvalidConfig, match=r"space .* has 1 fault:\n  training.learning_rat: .*did you mean"):
        searched(world.world.config, night, tmp_path, space=wrong)
    with pytest.raises(InvalidConfig, match="must hold a mapping"):
        searched(world.world.config, night, tmp_path, space=[1])
    with pytest.raises(InvalidConfig, match="--trials: 0"):
        searched(world.world.config, night, tmp_path, trials=0)
    with pytest.raises(NotEnoughHistory, match=r"6 nights, and a search with 2 \+ 1 blocks of 2 nights needs 8"):
        searched(world.world.config, night, tmp_path, cuts=2)
