"""Nothing that is judged on a night has seen it, and no row is judged by what has seen its label.

Each assertion is also shown a planted leak of its kind, and must catch it.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.config import RetrainConfig
from tasks.data import columns, states
from tasks.data.contract import DataConfig
from tasks.data.segments import I64
from tasks.data.statistics import serving_tables
from tasks.data.vocabulary import Vocabularies
from tasks.learning import initialisation
from tasks.learning.ladder import Ladder
from tasks.learning.material import Visits, Windows
from tasks.meta_train import rows_of
from tasks.release.evidence import compare
from tasks.steps import open_workspace, recalled, record_of
from tests.finished import Finished
from tests.shared import lend_graph
from tests.steps.leaks import (
    Bench,
    Change,
    Examined,
    Pipeline,
    assert_history_is_untouched,
    assert_label_reaches_only_later_rows,
    assert_nightly_scores_stand,
    history_rows,
)
from tests.world import FIRST_NIGHT, World, write_world

NIGHT = FIRST_NIGHT + timedelta(days=4)
NOTE = {"name": "note", "role": "ignored", "dtype": "string"}
TRAIL = {"name": "trail", "role": "ignored", "dtype": "float64", "kind": "multi", "max_values": 2}


def replaced(table: pa.Table, **values: Any) -> pa.Table:
    for name, column in values.items():
        at = table.column_names.index(name)
        table = table.set_column(at, table.schema.field(at), pa.array(column, table.schema.field(at).type))
    return table


def permuted_labels(table: pa.Table) -> pa.Table:
    order = np.random.default_rng(1).permutation(table.num_rows)
    return replaced(table, clicked=table["clicked"].take(order), stars=table["stars"].take(order))


def newcomers(table: pa.Table) -> pa.Table:
    """As many rows again, of users, items, markets and numbers that nobody knew."""
    count = table.num_rows
    more = replaced(
        table,
        user_id=[f"new-{number % 5}" for number in range(count)],
        item_id=[900 + number for number in range(count)],
        market=["moon"] * count,
        age=[99] * count,
        price=[500.0] * count,
    )
    return pa.concat_tables([table, more])


def tenfold(table: pa.Table) -> pa.Table:
    """Each row ten times, at other microseconds, and with other numbers."""
    at = table["at"].cast(pa.int64()).to_numpy()
    copies = [
        replaced(table, at=at + number, price=[1000.0 * number] * table.num_rows, age=[90] * table.num_rows)
        for number in range(1, 10)
    ]
    return pa.concat_tables([table, *copies])


def fewer(table: pa.Table) -> pa.Table:
    return table.slice(0, table.num_rows // 3)


@dataclass(frozen=True)
class Home:
    """The pipeline that the others are compared with."""

    world: World
    pipeline: Pipeline
    examined: Examined


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("leaks")
    world = write_world(folder / "world", nights=6, users=24)
    tree = world.config
    tree["training"] |= {"epochs": 1, "steps_per_epoch": 3}
    tree["baselines"] = {"sweeps": 2}
    tree["data"]["columns"].append(NOTE)
    pipeline = Pipeline(folder / "home", tree)
    for night in world.nights:
        pipeline.change(night, lambda table: table.append_column("note", pa.array(["x"] * table.num_rows)))
    return Home(world, pipeline, pipeline.night(NIGHT))


def changed(home: Home, folder: Path, change: Change) -> Examined:
    """The same night after a change to its rows, all of it done again."""
    pipeline = Pipeline(folder / change.__name__, home.pipeline.tree, like=home.pipeline)
    pipeline.change(NIGHT, change)
    return pipeline.night(NIGHT)


def unchanged(table: pa.Table) -> pa.Table:
    return table


class TestTheNight:
    """Changing the night changes nothing that is judged on it."""

    @pytest.mark.parametrize("change", [permuted_labels, newcomers, tenfold, fewer])
    def test_no_byte_of_history_base_or_exam_bank_depends_on_it(
        self, home: Home, tmp_path: Path, change: Change
    ) -> None:
        other = changed(home, tmp_path, change)
        assert other.ingested.frozen != home.examined.ingested.frozen
        assert_history_is_untouched(home.examined, other)
        # With other rows beside it, a row stands in another batch, and its last bits may differ.
        assert_nightly_scores_stand(home.examined, other, tolerance=0.0 if change is permuted_labels else 1e-6)
        if change is permuted_labels:
            shipped = [
                record_of(one.config.place(), one.ship()).content["files"]["bank.safetensors"]["sha256"]
                for one in (home.examined, other)
            ]
            assert shipped[0] != shipped[1], "the bank that is shipped has learned nothing from the night"

    def test_a_normaliser_that_has_seen_the_night_is_caught(
        self, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fit = initialisation.normalise

        def leak(config: RetrainConfig) -> None:
            def leaky(network: Any, data: Any, rows: Any, at: I64) -> None:
                place = config.place()
                (layout,) = open_workspace(place).records("prepare")
                every = rows_of(place, layout)
                fit(network, data, every, np.arange(len(every)))

            monkeypatch.setattr(initialisation, "normalise", leaky)

        found = []
        for change in (unchanged, tenfold):
            pipeline = Pipeline(tmp_path / change.__name__, home.pipeline.tree, like=home.pipeline)
            pipeline.change(NIGHT, change)
            leak(RetrainConfig.model_validate(pipeline.tree))
            found.append(pipeline.night(NIGHT))
        with pytest.raises(AssertionError, match="meta-train knows the night"):
            assert_history_is_untouched(*found)

    def test_statistics_that_count_the_rows_own_night_are_caught(
        self, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        count_own_night(monkeypatch)
        found = [changed(home, tmp_path, change) for change in (unchanged, permuted_labels)]
        with pytest.raises(AssertionError, match="nightly/"):
            assert_nightly_scores_stand(*found, tolerance=1e-3)

    def test_what_is_shipped_is_what_the_next_night_would_be_given(
        self, home: Home, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With a window of four nights, the oldest of them drops out in between."""
        tree = home.pipeline.tree
        short = {"data": {**tree["data"], "window_nights": 4}, "statistics": {"cohort": ["market"]}}
        tonight = home.pipeline.night(NIGHT, **short, pipeline="short")
        shipped: list[Any] = []

        class Enough(Exception):
            pass

        def kept(data: Any, statistics: Any, vocabularies: Vocabularies, nights: Any) -> None:
            shipped.extend((vocabularies, nights, serving_tables(data, statistics, vocabularies, nights)))
            raise Enough

        monkeypatch.setattr("tasks.export.serving_tables", kept)
        with pytest.raises(Enough):
            tonight.export()
        vocabularies, nights, made = shipped
        assert [night for night, _ in nights] == [NIGHT - timedelta(days=days) for days in (3, 2, 1, 0)]
        assert len(tonight.prepared.nights) == 4
        tomorrow = home.pipeline.night(NIGHT + timedelta(days=1), **short, pipeline="short")
        assert tomorrow.prepared.nights[0] == NIGHT - timedelta(days=3)
        rows = history_rows(tomorrow)
        at = np.flatnonzero(np.asarray(rows.night) == tomorrow.ingested.night.toordinal())
        assert len(at) > 50
        data = tomorrow.config.data
        clean = pq.read_table(
            open_workspace(tomorrow.config.place()).file(tomorrow.record("validate"), "clean.parquet")
        )
        ids = {name: vocabularies[name].encode(clean[name]) for name in (data.user, data.item, "market")}
        assert (ids[data.user] == 0).any(), "there is a user that the release does not know"
        said = made.features(ids[data.user], ids[data.item], [ids["market"]])
        place = dict(zip(np.asarray(rows.tie)[at].tolist(), at.tolist(), strict=True))
        same = [place[tie] for tie in ties_of(clean, data).tolist()]
        np.testing.assert_array_equal(said, np.asarray(rows.statistics)[same])


def ties_of(clean: pa.Table, data: DataConfig) -> I64:
    with duckdb.connect(config={"threads": 1}) as connection:
        times = clean[data.time].cast(pa.int64()).to_numpy()
        return columns.tie_digest(clean[data.user], clean[data.item], times, connection)


def small_night() -> pa.Table:
    """41 rows: an old user beyond the largest support, a newcomer, and two of few rows; many rows at equal moments."""
    random = np.random.default_rng(7)
    users = ["user-000"] * 26 + ["new-000"] * 9 + ["user-001"] * 4 + ["new-001"] * 2
    count = len(users)
    begin = datetime(NIGHT.year, NIGHT.month, NIGHT.day, tzinfo=UTC)
    place = np.concatenate([np.arange(26), np.arange(9), np.arange(4), np.arange(2)])
    item = (place * 5) % 16
    return pa.table(
        {
            "user_id": users,
            "item_id": item + 100,
            # Two or three rows of a user share each moment, and some of the moments straddle the end of a support.
            "at": pa.array(
                [begin + timedelta(hours=1, seconds=(int(number) + 1) * 2 // 5) for number in place],
                pa.timestamp("us", tz="UTC"),
            ),
            "clicked": random.integers(0, 2, count),
            "stars": np.full(count, 3.0),
            "market": ["north"] * 26 + ["south"] * 9 + ["north"] * 4 + ["moon"] * 2,
            "age": pa.array([30] * 26 + [None] * 9 + [40] * 6, pa.int64()),
            "genre": [("comedy", "drama")[number % 2] for number in item],
            "length": [("long", "short")[number // 2 % 2] for number in item],
            "price": np.round(random.uniform(1.0, 20.0, 16), 2)[item],
            "note": ["x"] * count,
        }
    )


@pytest.fixture(scope="module")
def bench(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(home.examined, tmp_path_factory.mktemp("bench"))


def flipped(table: pa.Table, row: int) -> pa.Table:
    labels = table["clicked"].to_numpy().copy()
    labels[row] = 1 - labels[row]
    return replaced(table, clicked=labels)


def assert_no_label_leaks(bench: Bench) -> int:
    """Change every row's label in turn; returns how many predictions moved, all of them rightly."""
    table = small_night()
    before = bench.examine(table)
    return sum(
        assert_label_reaches_only_later_rows(before, bench.examine(flipped(table, row)), row)
        for row in range(table.num_rows)
    )


class TestALabel:
    """Changing one row's label changes no prediction but those of the same user's later rows in first contact."""

    def test_every_row_in_turn(self, bench: Bench) -> None:
        assert assert_no_label_leaks(bench) > 500

    def test_statistics_that_count_the_rows_own_night_are_caught(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        count_own_night(monkeypatch)
        with pytest.raises(AssertionError, match="nightly/"):
            assert_no_label_leaks(bench)

    def test_support_that_ends_one_row_late_is_caught(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        split = Visits.split

        def late(visits: Visits, after: I64) -> tuple[I64, Windows]:
            border, query = split(visits, after)
            return np.minimum(border + 1, visits.rows.stop), query

        monkeypatch.setattr(Visits, "split", late)
        with pytest.raises(AssertionError, match=r"nightly/bias|contact 0/"):
            assert_no_label_leaks(bench)

    def test_a_coarse_segment_that_reads_the_night_itself_is_caught(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = Ladder._before
        monkeypatch.setattr(
            Ladder, "_before", lambda ladder, at, segment, night: before(ladder, at, segment, night + 1)
        )
        with pytest.raises(AssertionError, match="contact"):
            assert_no_label_leaks(bench)

    def test_ties_in_time_that_are_ordered_by_label_are_caught(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read = columns._read_keys

        def by_label(data: Any, path: Path, vocabularies: Any, connection: Any) -> tuple[I64, I64, I64]:
            user, time, tie = read(data, path, vocabularies, connection)
            label = pq.read_table(path, columns=["clicked"])["clicked"].to_numpy()
            return user, time, (tie >> 1) + (label << 62)

        monkeypatch.setattr(columns, "_read_keys", by_label)
        with pytest.raises(AssertionError, match=r"contact|history"):
            assert_no_label_leaks(bench)


def count_own_night(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant a leak: the as-of statistics of a row include its own night."""
    write = columns._write_night

    def leaky(data: Any, statistics: Any, night: Any, path: Path, vocabularies: Any, running: Any, *rest: Any) -> None:
        running.add(states.night_state(data, statistics, path))
        write(data, statistics, night, path, vocabularies, running, *rest)

    monkeypatch.setattr(columns, "_write_night", leaky)


class TestALabelColumn:
    """No label is an input, whether or not an objective reads it."""

    def test_a_release_is_the_same_bytes_when_an_unused_label_and_ignored_columns_are_noise(
        self, finished: Finished, tmp_path: Path
    ) -> None:
        """Compared with a night whose contract knows of no ignored column at all."""
        random = np.random.default_rng(3)
        made, tree = finished.results[0], finished.world.config

        def noise(table: pa.Table) -> pa.Table:
            rows = table.num_rows
            noisy = replaced(table, stars=random.uniform(1, 5, rows))
            trails = [random.random(count).tolist() for count in random.integers(0, 5, rows)]
            noisy = noisy.append_column("note", pa.array([str(value) for value in random.random(rows)]))
            return noisy.append_column("trail", pa.array(trails, pa.list_(pa.float64())))

        contract = {**tree["data"], "columns": [*tree["data"]["columns"], NOTE, TRAIL]}
        noisy = Pipeline(tmp_path / "noisy", {**tree, "data": contract})
        for night in finished.world.nights:
            noisy.change(night, noise)
        other = noisy.night(made.night)
        steps = {ref.step: ref for ref in made.steps}
        assert other.record("validate").digest != steps["validate"].digest
        place = finished.config.place()
        history = recalled(place, "history", made.prepared.history)
        for step in ("history", "prepare", "meta-train", "adapt-exam", "evaluate"):
            mine = history if step == "history" else record_of(place, steps[step])
            assert mine.content["files"] == other.record(step).content["files"], step
        lend_graph(place.store, noisy.tree["store"])  # traced again if it were another
        assert other.export().release == made.published.release

    @pytest.mark.parametrize(
        "change",
        [
            {"segments": {"levels": [["user_id"], ["clicked"]]}},
            {"segments": {"levels": [["stars"]]}},
            {"statistics": {"cohort": ["clicked"]}},
            {"statistics": {"cohort": ["note"]}},
        ],
        ids=str,
    )
    def test_the_config_refuses_a_label_as_a_segment_or_a_cohort(self, home: Home, change: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"clicked|stars|note"):
            RetrainConfig.model_validate({**home.pipeline.tree, **change})

    @pytest.mark.parametrize("kind", ["categorical", "numeric"])
    def test_the_contract_refuses_a_label_that_is_also_an_input(self, home: Home, kind: str) -> None:
        tree = home.pipeline.tree
        both = {"name": "clicked", "role": "candidate", "dtype": "int64", "kind": kind}
        for columns_ in (
            [*tree["data"]["columns"], both],
            [both if column["name"] == "clicked" else column for column in tree["data"]["columns"]],
            [column | {"kind": kind} if column["name"] == "clicked" else column for column in tree["data"]["columns"]],
        ):
            with pytest.raises(ValueError, match="clicked"):
                RetrainConfig.model_validate({**tree, "data": {**tree["data"], "columns": columns_}})


class TestRandomLabels:
    """Where nothing can be known, nothing is claimed."""

    def test_adaptation_does_not_beat_the_global_rate(self, home: Home, tmp_path: Path) -> None:
        random = np.random.default_rng(11)
        blind = Pipeline(tmp_path / "blind", home.pipeline.tree)
        for night in home.world.nights:
            blind.change(night, lambda table: replaced(table, clicked=random.integers(0, 2, table.num_rows)))
        there = blind.night(NIGHT)
        lead = there.config.data.objectives[0]
        for condition in ("nightly", "contact 0", "contact 5"):
            interval = compare([there.table()], condition, lead, seed=0)["global rate"][0]
            assert interval.high > 0, f"{condition}: adaptation beat the global rate on coins by {-interval.high}"
        # The same measure does see what there is to be seen.
        interval = compare([home.examined.table()], "contact 5", lead, seed=0)["global rate"][0]
        assert interval.high < 0
