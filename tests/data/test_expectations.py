import json
import logging
import math
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.data import expectations
from tasks.data.canaries import canaries
from tasks.data.contract import ColumnConfig, DataConfig, ExpectationConfig, ObjectiveConfig
from tasks.data.expectations import Validated, data_docs, validate
from tasks.data.rules import Rule, rules
from tasks.errors import CorruptFile, ExpectationsFailed, InvalidConfig, NightMissing, SchemaBroken, ValidatorBroken
from tests.data.nights import NIGHT, SCHEMA, contract, row, write


def judge(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Validated:
    return validate(contract(**changes), NIGHT, [write(folder / "0.parquet", rows)], folder / "out")


def good(count: int = 20) -> list[dict[str, Any]]:
    return [row(number) for number in range(count)]


def own(kind: str, **kwargs: Any) -> tuple[ExpectationConfig, ...]:
    return (ExpectationConfig(type=kind, kwargs=kwargs),)


def test_a_good_night_is_all_clean_and_tells_what_was_expected(tmp_path: Path) -> None:
    found = judge(tmp_path, good())
    assert (found.rows, found.clean, found.bad, found.reasons, found.examples) == (20, 20, 0, {}, ())
    assert found.quarantine_file is None
    assert pq.read_metadata(found.clean_file).num_rows == 20
    assert all(told["success"] for told in found.expectations)
    abouts = {told["about"] for told in found.expectations}
    assert abouts == {
        *("columns", "rows", "labels:liked", "labels:rating", "outside_night", "duplicate"),
        *(f"null:{name}" for name in ("user", "item", "at", "liked", "age", "plan", "weight")),
        *("range:rating", "range:age", "allowed:plan", "domain:liked", "negative:weight"),
        *(f"not_finite:{name}" for name in ("rating", "price", "weight")),
    }
    json.dumps(found.expectations, allow_nan=False)


def test_a_night_of_one_row_passes(tmp_path: Path) -> None:
    assert judge(tmp_path, good(1)).clean == 1


def test_bad_rows_below_the_limit_are_quarantined_and_the_night_goes_on(tmp_path: Path) -> None:
    found = judge(tmp_path, [*good(), row(30, age=500), row(31, price=math.nan), row(1)], max_bad_rows=0.2)
    assert (found.rows, found.clean, found.bad) == (23, 20, 3)
    assert found.reasons == {"duplicate": 1, "not_finite:price": 1, "range:age": 1}
    assert found.quarantine_file is not None
    assert pq.read_metadata(found.quarantine_file).num_rows == 3
    failed = {told["about"]: told for told in found.expectations if not told["success"]}
    assert set(failed) == set(found.reasons)
    assert failed["range:age"]["unexpected"] == 1
    assert failed["range:age"]["observed"] == [500]
    assert not any(told["stops"] for told in failed.values())


def test_more_bad_rows_than_the_limit_stop_the_night_with_counts_examples_and_remedy(tmp_path: Path) -> None:
    rows = [*good(), row(30, age=500), row(31, item=None), row(32, age=-4)]
    with pytest.raises(ExpectationsFailed) as caught:
        judge(tmp_path, rows, max_bad_rows=0.1)
    for told in (
        "night 2026-03-10 stops: 3 of 23 rows (13.04%) are bad, limit 10.00%: range:age 2, null:item 1; examples ",
        '"age": 500',
        "quarantine.parquet",
        "fix them upstream or raise data.max_bad_rows",
    ):
        assert told in str(caught.value)
    assert pq.read_metadata(tmp_path / "out" / "quarantine.parquet").num_rows == 3


def test_the_limit_itself_is_allowed(tmp_path: Path) -> None:
    assert judge(tmp_path, [*good(19), row(30, age=500)], max_bad_rows=0.05).bad == 1


def test_a_night_without_clean_rows_stops(tmp_path: Path) -> None:
    with pytest.raises(ExpectationsFailed, match=r"1 of 1 rows \(100.00%\) are bad"):
        judge(tmp_path, [row(1, age=500)], max_bad_rows=0.999)


@pytest.mark.parametrize("label", ["liked", "rating"])
def test_a_label_that_is_missing_everywhere_stops_the_night(tmp_path: Path, label: str) -> None:
    with pytest.raises(ExpectationsFailed, match=f"expect_column_values_to_not_be_null with .*'{label}'.* failed"):
        judge(tmp_path, [one | {label: None} for one in good()])


def test_a_label_that_only_bad_rows_have_stops_the_night(tmp_path: Path) -> None:
    rows = [*(one | {"rating": None} for one in good()), row(30, rating=9.0)]
    with pytest.raises(ExpectationsFailed, match="label 'rating' is missing in all 20 clean rows"):
        judge(tmp_path, rows)


@pytest.mark.parametrize("bounds", [{"min_rows": 21}, {"max_rows": 19}])
def test_too_few_or_too_many_rows_stop_the_night(tmp_path: Path, bounds: dict[str, int]) -> None:
    with pytest.raises(ExpectationsFailed, match=r"expect_table_row_count_to_be_between .* failed, observed 20"):
        judge(tmp_path, good(), **bounds)


def test_the_users_own_expectations_stop_the_night_when_they_fail(tmp_path: Path) -> None:
    mean = own("expect_column_mean_to_be_between", column="age", min_value=0, max_value=100)
    assert judge(tmp_path, good(), expectations=mean).expectations[-1]["observed"] == pytest.approx(27.5)
    mean = own("expect_column_mean_to_be_between", column="age", min_value=90, max_value=100)
    with pytest.raises(
        ExpectationsFailed, match=r"expect_column_mean_to_be_between .*observed 27.5.*data.expectations"
    ):
        judge(tmp_path, good(), expectations=mean)


def test_quantiles_have_plain_verdicts(tmp_path: Path) -> None:
    ranges = {"quantiles": [0.5], "value_ranges": [[0, 100]]}
    quantiles = own("expect_column_quantile_values_to_be_between", column="age", quantile_ranges=ranges)
    assert judge(tmp_path, good(), expectations=quantiles).expectations[-1]["success"] is True


def test_an_expectation_that_raises_is_a_broken_validator_and_no_verdict(tmp_path: Path) -> None:
    broken = own("expect_column_mean_to_be_between", column="item", min_value=0, max_value=1)
    with pytest.raises(
        ValidatorBroken, match=r"expect_column_mean_to_be_between .*raised instead of judging.*no verdict"
    ):
        judge(tmp_path, good(), expectations=broken)


@pytest.mark.parametrize(
    ("kind", "kwargs", "told"),
    [
        ("expect_column_to_be_nice", {"column": "age"}, "expect_column_to_be_nice .*cannot be built"),
        ("expect_column_mean_to_be_between", {"column": "age", "minimum": 1}, "cannot be built"),
        ("expect_column_values_to_not_be_null", {"column": "agee"}, r"speaks of \['agee'\]"),
    ],
)
def test_an_expectation_that_cannot_be_built_is_an_invalid_config(
    tmp_path: Path, kind: str, kwargs: dict[str, Any], told: str
) -> None:
    with pytest.raises(InvalidConfig, match=told):
        judge(tmp_path, good(), expectations=own(kind, **kwargs))


def test_files_without_rows_are_a_missing_night(tmp_path: Path) -> None:
    with pytest.raises(NightMissing, match="hold 0 rows"):
        judge(tmp_path, [])


def test_files_that_break_the_contract_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "0.parquet", good())
    pq.write_table(pq.read_table(path).drop_columns(["age"]), path)
    with pytest.raises(SchemaBroken, match="column 'age' is absent"):
        validate(contract(), NIGHT, [path], tmp_path / "out")


def test_pages_that_cannot_be_read_are_a_corrupt_file_and_no_verdict(tmp_path: Path) -> None:
    path = write(tmp_path / "0.parquet", good(500))
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)
    with pytest.raises(CorruptFile, match=r"0\.parquet"):
        validate(contract(), NIGHT, [path], tmp_path / "out")


def test_a_second_validation_replaces_the_first(tmp_path: Path) -> None:
    judge(tmp_path, [*good(), row(30, age=500)])
    found = judge(tmp_path, good(5))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clean.parquet"]
    assert pq.read_metadata(found.clean_file).num_rows == 5


def test_data_docs_are_built_into_a_folder_also_for_a_night_with_bad_rows(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    data_docs(judge(tmp_path, [*good(), row(30, plan="<script>alert(1)</script>")]), docs)
    assert (docs / "index.html").exists()
    page = next((docs / "validations").rglob("*.html")).read_text()
    assert "it's; --" in page or "it&#39;s; --" in page
    assert "<script>alert(1)" not in page


def test_nothing_is_printed_logged_or_warned_about(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        data_docs(judge(tmp_path, [*good(), row(30, age=500)]), tmp_path / "docs")
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_importing_the_module_does_not_import_great_expectations() -> None:
    heavy = "{'great_expectations', 'sqlalchemy', 'pandas'}"
    code = f"import sys, tasks.data.expectations; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.fixture
def unproven() -> Iterator[None]:
    """No contract has been proven yet in this process."""
    expectations._prove.cache_clear()
    yield
    expectations._prove.cache_clear()


def other_contract() -> DataConfig:
    """Strings as keys, a bool label, one that may be missing, and columns at the edges of what bounds can say."""
    columns = (
        ColumnConfig(name="user", role="user", dtype="string", allowed=("u",)),
        ColumnConfig(name="item", role="item", dtype="int64", minimum=float(-(2**63)), maximum=1e30),
        ColumnConfig(name="time", role="time", dtype="timestamp"),
        ColumnConfig(name="bought", role="label", dtype="bool"),
        ColumnConfig(name="stars", role="label", dtype="float64", allowed=(1, 2.5), nullable=True),
        ColumnConfig(name="select", role="request", kind="numeric", dtype="bool", nullable=True),
        ColumnConfig(name="share", role="request", kind="numeric", dtype="float64", minimum=0.25, maximum=0.25),
        ColumnConfig(name="dollars", role="weight", dtype="int64", minimum=5),
        ColumnConfig(name="one", role="candidate", kind="multi", dtype="string", max_values=2, nullable=True),
        ColumnConfig(name="codes", role="request", kind="multi", dtype="int64"),
        ColumnConfig(name="vector", role="candidate", kind="dense", dtype="float64", length=2, nullable=True),
        ColumnConfig(name="opened", role="ignored", kind="multi", dtype="bool"),
        ColumnConfig(name="instants", role="ignored", kind="multi", dtype="timestamp"),
        ColumnConfig(name="raw", role="ignored", kind="dense", dtype="float64", length=2),
    )
    objectives = (
        ObjectiveConfig(name="bought", column="bought"),
        ObjectiveConfig(name="stars", column="stars", kind="rating"),
    )
    return DataConfig(source="x", columns=columns, objectives=objectives, time_zone="Asia/Kolkata")


def personal_contract(**changes: Any) -> DataConfig:
    """Hashed plans, and lists of hashed friends."""
    mark = {"personal": {"key_id": "k1"}, "role": "request", "dtype": "string"}
    plan = ColumnConfig(name="plan", kind="categorical", **mark)
    friends = ColumnConfig(name="friends", kind="multi", max_values=2, nullable=True, **mark)
    columns = tuple(plan if column.name == "plan" else column for column in contract().columns)
    return contract(columns=(*columns, friends), **changes)


def test_what_is_not_hashed_goes_to_quarantine_and_nobody_is_shown_it(tmp_path: Path) -> None:
    good_hash, secrets = "0123456789abcdef" * 4, ("secret", "0123456789ABCDEF" * 4, "", "0" * 63, "0" * 64 + "\n")
    rows = [row(number, plan=good_hash, friends=[good_hash] * (number % 3)) for number in range(6)]
    rows += [row(10 + number, plan=plan, friends=None) for number, plan in enumerate(secrets)]
    rows += [row(20 + number, plan=good_hash, friends=[good_hash, plan]) for number, plan in enumerate(secrets)]
    rows.append(row(40, plan=good_hash, friends=[good_hash], age=500))
    table = pa.table(
        {
            **{name: pa.array([one[name] for one in rows], SCHEMA.field(name).type) for name in SCHEMA.names},
            "friends": pa.array([one["friends"] for one in rows], pa.list_(pa.string())),
        }
    )
    pq.write_table(table, tmp_path / "0.parquet")
    found = validate(personal_contract(), NIGHT, [tmp_path / "0.parquet"], tmp_path / "out")
    assert found.reasons == {"not_hashed:plan": 5, "not_hashed:friends": 5, "range:age": 1}
    assert (found.clean, found.bad) == (6, 11)
    told = json.dumps([found.expectations, found.examples], default=str)
    assert "secret" not in told
    assert "ABCDEF" not in told
    assert "personal, not shown" in told
    with pytest.raises(ExpectationsFailed) as caught:
        validate(personal_contract(max_bad_rows=0.1), NIGHT, [tmp_path / "0.parquet"], tmp_path / "again")
    assert "not_hashed:plan 5" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "data", [contract(), contract(time_zone="America/Sao_Paulo"), other_contract(), personal_contract()]
)
def test_canaries_break_every_rule_of_a_contract_and_are_judged_right(unproven: None, data: DataConfig) -> None:
    batches = {canary.name: canary for canary in canaries(data)}
    codes = {rule.code for rule in rules(data, NIGHT)} | {"duplicate", "conflicting_duplicate"}
    edge = (
        {"range:item"} if data.user == "user" and data.column("item").dtype == "int64" else set()
    )  # nothing is beyond it
    assert batches["bad"].reasons == codes - edge
    assert batches["good"].reasons == set()
    expectations._prove(expectations._contract(data))


def test_canaries_are_judged_once_per_contract(unproven: None, tmp_path: Path) -> None:
    judge(tmp_path, good())
    judge(tmp_path, good(), max_bad_rows=0.9)
    assert expectations._prove.cache_info().misses == 1
    judge(tmp_path, good(), time_zone="Etc/GMT+1")
    assert expectations._prove.cache_info().misses == 2


@pytest.mark.parametrize("code", ["range:age", "null:user", "allowed:plan", "outside_night"])
def test_a_rule_that_lets_everything_pass_is_caught_by_the_canaries(
    unproven: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    def blind(data: DataConfig, night: Any) -> tuple[Rule, ...]:
        return tuple(
            Rule(r.code, r.column, "true", {}, r.expectation, r.kwargs) if r.code == code else r
            for r in rules(data, night)
        )

    monkeypatch.setattr(expectations, "rules", blind)
    with pytest.raises(ValidatorBroken, match=f"the bad canary batch is misjudged by the rules about {code}"):
        judge(tmp_path, good())


@pytest.mark.parametrize(
    ("code", "canary"), [("range:age", "bad"), ("duplicate", "bad"), ("labels:liked", "unlabelled")]
)
def test_an_expectation_that_never_fails_is_caught_by_the_canaries(
    unproven: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, canary: str
) -> None:
    told = expectations._told

    def blind(data: DataConfig, check: Any, result: Any) -> dict[str, Any]:
        return told(data, check, result) | ({"success": True, "unexpected": 0} if check.about == code else {})

    monkeypatch.setattr(expectations, "_told", blind)
    with pytest.raises(
        ValidatorBroken, match=f"the {canary} canary batch is misjudged by the expectations about {code}"
    ):
        judge(tmp_path, good())


def test_a_split_and_an_expectation_that_disagree_break_the_validator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge(tmp_path, good())
    told = expectations._told
    monkeypatch.setattr(
        expectations,
        "_told",
        lambda data, check, result: (
            told(data, check, result) | ({"unexpected": 3} if check.about == "range:age" else {})
        ),
    )
    with pytest.raises(ValidatorBroken, match="finds 3 rows, our rule range:age 0"):
        judge(tmp_path, good())


def test_a_contract_that_no_value_can_keep_is_an_invalid_config(tmp_path: Path) -> None:
    age = ColumnConfig(name="age", role="request", kind="numeric", dtype="int64", minimum=5, allowed=(1, 2))
    columns = tuple(age if column.name == "age" else column for column in contract().columns)
    with pytest.raises(InvalidConfig, match="column 'age': no value keeps its minimum 5"):
        judge(tmp_path, good(), columns=columns)


def test_nights_of_a_zone_with_summer_time_are_judged_by_its_days(tmp_path: Path) -> None:
    first = datetime(2026, 3, 9, 23)  # midnight in Berlin, in UTC
    times = [first - timedelta(seconds=1), first, first + timedelta(days=1) - timedelta(seconds=1)]
    found = judge(tmp_path, [row(number) | {"at": at} for number, at in enumerate(times)], time_zone="Europe/Berlin")
    assert found.reasons == {"outside_night": 1}
