"""Slices and pooled figures against plain loops over a small exam table, and against scikit-learn."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from numpy.typing import NDArray
from sklearn.metrics import log_loss

from tasks.data.contract import DataConfig
from tasks.learning.exams import CANDIDATE, COMMON, CONDITIONS, PARENT, ZERO_STEPS, column
from tasks.release.evidence import compare, segment_evidence
from tasks.release.slices import ADAPTED, GIVEN, POOLED, SLICES, Line, compared, load, save, slices
from tests.learning.small_rows import contract

NIGHTS = ("2026-03-01", "2026-03-02")
METHODS = ("candidate", "popularity", ZERO_STEPS)
MAX_SUPPORT = 30


def exam(seed: int, kinds: tuple[str, ...] = ("binary",), users: int = 9) -> pa.Table:
    """A night's exam: users with 1 to 30 rows, some of them new, some items too, and a label missing here and there."""
    random = np.random.default_rng(seed)
    count = random.integers(1, 31, users)
    history = np.where(random.random(users) < 0.4, 0, random.integers(1, 60, users))
    who = np.repeat(np.arange(users), count)
    at = np.concatenate([np.arange(one) for one in count])
    columns: dict[str, object] = {
        "user": [f"user {one + 3 * seed}" for one in who],
        "tie": random.permutation(len(who)),
        "at": at.astype(np.int32),
        "history": history[who].astype(np.int32),
        "item_history": np.where(random.random(len(who)) < 0.3, 0, 4).astype(np.int32),
        "level": np.zeros(len(who), np.int8),
        "segment": [f"user {one}" for one in who],
        "support": history[who],
    }
    for number, kind in enumerate(kinds):
        label = (random.random(len(who)) < 0.5).astype(np.float32) if kind == "binary" else random.random(len(who))
        label[random.random(len(who)) < 0.1] = np.nan
        columns[f"label/aim{number}"] = label.astype(np.float32)
        for condition in CONDITIONS:
            for method in (*METHODS, PARENT) if condition == "nightly" else METHODS:
                said = random.integers(1, 20, len(who)) / 20
                said[at < GIVEN[condition]] = np.nan
                columns[column(condition, method, f"aim{number}")] = said.astype(np.float32)
    return pa.table(columns)


@pytest.fixture(scope="module")
def tables() -> dict[str, pa.Table]:
    """Two nights that share some of their users."""
    return {night: exam(seed) for seed, night in enumerate(NIGHTS)}


@pytest.fixture(scope="module")
def lines(tables: dict[str, pa.Table]) -> list[Line]:
    return compared(tables, contract(), MAX_SUPPORT, seed=3)


def belongs(row: dict[str, float], given: int) -> set[str]:
    """The slices of a row, one by one."""
    support = min(row["history"] + given, MAX_SUPPORT)
    size = "0" if support == 0 else "1-5" if support <= 5 else "6-20" if support <= 20 else "21+"
    new = (row["history"] == 0, row["item_history"] == 0)
    novelty = {
        (True, False): "new user", (False, True): "new item", (True, True): "new user and item",
        (False, False): "both known",
    }[new]  # fmt: skip
    return {"all", f"support {size}", novelty} | ({f"after the {COMMON}th row"} if row["at"] >= COMMON else set())


def won(label: NDArray[np.float64], said: NDArray[np.float64]) -> float:
    """Share of the pairs of one liked and one not in which the liked one is put higher; a tie is half a win."""
    ahead = said[label == 1][:, None] - said[label == 0]
    return float(np.mean((ahead > 0) + 0.5 * (ahead == 0)))


def test_every_figure_is_that_of_a_loop_over_the_rows(tables: dict[str, pa.Table], lines: list[Line]) -> None:
    kept: dict[tuple[str, str, str, str], list[tuple[str, str, float, float, float]]] = defaultdict(list)
    for night, table in tables.items():
        for row in table.to_pylist():
            for condition in CONDITIONS:
                label, own = row["label/aim0"], row[column(condition, "candidate", "aim0")]
                if np.isnan(label) or np.isnan(own):
                    continue
                for name in belongs(row, GIVEN[condition]):
                    for method in METHODS:
                        said = row[column(condition, method, "aim0")]
                        for when in (night, POOLED):
                            one = (row["user"], f"{row['user']}@{night}", label, own, said)
                            kept[condition, name, ADAPTED if method == CANDIDATE else method, when].append(one)
    assert {(line.exam, line.slice, line.method, line.night) for line in lines} == set(kept)
    assert {line.slice for line in lines} == set(SLICES)
    for line in lines:
        rows = kept[line.exam, line.slice, line.method, line.night]
        users, lists, label, own, said = (np.array(values) for values in zip(*rows, strict=True))
        assert (line.rows, line.users, line.user_nights) == (len(rows), len(set(users)), len(set(lists)))
        assert line.log_loss == pytest.approx(log_loss(label, said, labels=[0, 1]))
        assert line.rmse is None
        assert line.calibration is not None
        both = [lists == one for one in set(lists) if len(set(label[lists == one])) == 2]
        aucs = [won(label[one], said[one]) for one in both]
        assert line.auc == (pytest.approx(np.mean(aucs)) if aucs else None)
        ahead = [won(label[one], own[one]) - won(label[one], said[one]) for one in both]
        known = ahead and line.method != ADAPTED
        assert line.auc_difference == (pytest.approx(np.mean(ahead), abs=1e-12) if known else None)
        gap = log_loss(label, own, labels=[0, 1]) - log_loss(label, said, labels=[0, 1])
        assert line.difference == (None if line.method == ADAPTED else pytest.approx(gap))
        if line.low is not None and line.high is not None:
            assert line.users >= 5
            assert line.low <= gap <= line.high


def night_of(users: Mapping[str, tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]]) -> pa.Table:
    """A night's nightly exam from each user's labels, and what the candidate and popularity said of them."""
    who = [(user, *row) for user, told in users.items() for row in zip(*told, strict=True)]
    user, label, own, other = zip(*who, strict=True)
    zeros = np.zeros(len(who), np.int32)
    return pa.table(
        {
            "user": user, "tie": np.arange(len(who)), "at": zeros, "history": zeros, "item_history": zeros,
            "label/aim0": np.array(label, np.float32),
            column("nightly", CANDIDATE, "aim0"): np.array(own, np.float32),
            column("nightly", "popularity", "aim0"): np.array(other, np.float32),
        }
    )  # fmt: skip


def against_popularity(tables: Mapping[str, pa.Table]) -> Line:
    (line,) = (
        line
        for line in compared(tables, contract(), MAX_SUPPORT, seed=0)
        if (line.exam, line.slice, line.method, line.night) == ("nightly", "all", "popularity", POOLED)
    )
    return line


def test_differences_of_auc_and_ndcg_are_those_counted_by_hand() -> None:
    """A user's night counts once each; one without both labels has no AUC, one without a liked row no NDCG."""
    first = night_of(
        {
            "a": ((1, 0), (0.9, 0.1), (0.1, 0.9)),  # AUC 1 and 0; NDCG 1 and 1 / log2(3)
            "b": ((1, 0, 0), (0.5, 0.5, 0.1), (0.1, 0.5, 0.9)),  # AUC 3/4 and 0; NDCG 1, as the tie is drawn, and 1 / 2
            "c": ((1, 1), (0.2, 0.4), (0.3, 0.1)),  # no AUC; NDCG 1 and 1
            "d": ((0, 0), (0.2, 0.4), (0.3, 0.1)),
        }
    )
    second = night_of({"a": ((0, 1), (0.3, 0.3), (0.2, 0.8))})  # AUC 1/2 and 1; NDCG 1 / log2(3), as drawn, and 1
    line = against_popularity(dict(zip(NIGHTS, (first, second), strict=True)))
    assert line.auc_difference == pytest.approx((1 + 0.75 - 0.5) / 3)
    assert line.ndcg_difference == pytest.approx(0.5 / 4)
    assert (line.users, line.user_nights, line.auc_low, line.ndcg_high) == (4, 5, None, None)


def test_a_difference_that_every_user_has_is_certain_and_one_that_few_have_is_not() -> None:
    same = {f"user {at}": ((1, 0), (0.9, 0.1), (0.5, 0.5)) for at in range(6)}
    line = against_popularity({NIGHTS[0]: night_of(same)})
    assert (line.auc_difference, line.auc_low, line.auc_high) == (0.5, 0.5, 0.5)
    gap = 1 - 1 / np.log2(3)  # a tie goes to the first row, which everybody likes; he who does not is put second
    line = against_popularity({NIGHTS[0]: night_of({**same, "user 5": ((0, 1), (0.1, 0.9), (0.5, 0.5))})})
    assert (line.auc_difference, line.auc_low, line.auc_high) == (0.5, 0.5, 0.5)
    assert (line.ndcg_difference, line.ndcg_low) == (pytest.approx(gap / 6), 0)
    assert line.ndcg_high == pytest.approx(gap / 2, abs=0.1)


def test_all_trainings_and_nights_of_a_user_are_resampled_as_one() -> None:
    """Nights repeated threefold say no more of users than once; those of other users would."""
    whole = exam(5, users=40)
    once = whole.drop_columns([name for name in whole.column_names if name.startswith("contact")])
    others = [once.set_column(0, "user", pc.binary_join_element_wise(once["user"], str(at), "-")) for at in range(3)]
    alone, again, more = (
        against_popularity({f"{NIGHTS[0]} {at}": one for at, one in enumerate(tables)})
        for tables in ([once], [once] * 3, others)
    )

    def bounds(line: Line) -> tuple[float, ...]:
        found = (line.auc_low, line.auc_difference, line.auc_high, line.ndcg_low, line.ndcg_difference, line.ndcg_high)
        return tuple(value for value in found if value is not None)

    assert len(bounds(alone)) == 6
    assert again.user_nights == 3 * alone.user_nights
    assert bounds(again) == pytest.approx(bounds(alone))
    for low in (0, 3):
        widths = [found[low + 2] - found[low] for found in (bounds(more), bounds(alone))]
        assert widths[0] == pytest.approx(widths[1] / np.sqrt(3), rel=0.15)


def test_pooled_intervals_are_those_of_the_gate(tables: dict[str, pa.Table], lines: list[Line]) -> None:
    objective = contract().objectives[0]
    for exam_, common in (("nightly", False), ("contact 5", False), ("contact 20", True)):
        against = compare(list(tables.values()), exam_, objective, seed=3, common=common)
        name = f"after the {COMMON}th row" if common else "all"
        for method in ("popularity", ZERO_STEPS):
            (line,) = (
                line
                for line in lines
                if (line.exam, line.slice, line.method, line.night) == (exam_, name, method, POOLED)
            )
            vs, nights = against[method]
            assert nights == len(NIGHTS)
            bounds = vs.as_json()
            for mine, theirs in ((line.difference, "estimate"), (line.low, "low"), (line.high, "high")):
                assert mine == (None if bounds[theirs] is None else pytest.approx(bounds[theirs]))


def test_sizes_of_support_and_what_is_new_split_the_rows(tables: dict[str, pa.Table]) -> None:
    for table in tables.values():
        for given in GIVEN.values():
            chosen = slices(table, given, MAX_SUPPORT)
            for start in ("support", ("new", "both")):
                parts = [mask for name, mask in chosen.items() if name.startswith(start)]
                assert len(parts) == 4
                assert (np.sum(parts, axis=0) == 1).all()


def test_support_is_no_more_than_is_read() -> None:
    table = pa.table({"history": [100, 3, 0], "item_history": [1, 1, 1], "at": [30, 30, 30]})
    assert slices(table, 20, 20)["support 6-20"].all()
    assert slices(table, 20, 128)["support 21+"].tolist() == [True, True, False]


def test_a_method_that_one_night_lacks_is_compared_on_the_others(tables: dict[str, pa.Table]) -> None:
    first, second = tables.values()
    lacking = second.drop_columns([column(condition, "popularity", "aim0") for condition in CONDITIONS])
    found = compared(dict(zip(NIGHTS, (first, lacking), strict=True)), contract(), MAX_SUPPORT, seed=3)
    alone = compared({NIGHTS[0]: first}, contract(), MAX_SUPPORT, seed=3)
    for ours in (line for line in found if (line.method, line.night) == ("popularity", POOLED)):
        (theirs,) = (
            line for line in alone
            if (line.exam, line.slice, line.method, line.night) == (ours.exam, ours.slice, "popularity", POOLED)
        )  # fmt: skip
        assert ours == theirs
    own = [line for line in found if (line.exam, line.slice, line.method) == ("nightly", "all", ADAPTED)]
    assert own[-1].rows == own[0].rows + own[1].rows


def test_ratings_have_an_rmse_and_squared_errors_are_compared() -> None:
    data: DataConfig = contract("binary", "rating")
    table = exam(1, ("binary", "rating"))
    found = compared({NIGHTS[0]: table}, data, MAX_SUPPORT, seed=0)
    stars = [line for line in found if line.objective == "aim1" and (line.exam, line.slice) == ("nightly", "all")]
    label = table["label/aim1"].to_numpy().astype(np.float64)
    known = ~np.isnan(label)
    for line in stars:
        own, said = (
            table[column("nightly", name, "aim1")].to_numpy()[known].astype(np.float64)
            for name in (CANDIDATE, CANDIDATE if line.method == ADAPTED else line.method)
        )
        assert line.rmse == pytest.approx(np.sqrt(np.mean((said - label[known]) ** 2)))
        assert (line.log_loss, line.auc, line.calibration) == (None, None, None)
        assert (line.auc_difference, line.auc_low, line.ndcg_difference, line.ndcg_high) == (None, None, None, None)
        if line.method != ADAPTED:
            gap = np.mean((own - label[known]) ** 2) - np.mean((said - label[known]) ** 2)
            assert line.difference == pytest.approx(gap)


def test_lines_come_back_from_parquet_and_equal_lines_are_equal_bytes(lines: list[Line], tmp_path: Path) -> None:
    save(lines, tmp_path / "a.parquet")
    save(lines, tmp_path / "b.parquet")
    assert load(tmp_path / "a.parquet") == lines
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_earlier_exams_without_the_items_history_still_pool_in_the_gate(tables: dict[str, pa.Table]) -> None:
    """Exams that were examined before the column was there are read by the gate for a week."""
    tonight, before = tables.values()
    objective = contract().objectives[0]
    older = before.drop_columns(["item_history"])
    assert compare([tonight, older], "nightly", objective, seed=0) == compare(
        [tonight, before], "nightly", objective, seed=0
    )
    found, expected = (segment_evidence([tonight, one], objective) for one in (older, before))
    assert found.rows.sum() == expected.rows.sum()
    assert pc.sum(pa.array(found.sums)).as_py() == pytest.approx(expected.sums.sum())
