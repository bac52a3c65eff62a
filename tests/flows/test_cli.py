"""The command line: what it prints, how it fails, and which Prefect command it equals."""

import json
import subprocess
import sys
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
import yaml

from flows import cli
from tasks.errors import ExpectationsFailed, StoreUnavailable
from tasks.references import Place, ReleaseRow
from tests.flows.verbs import stand_in
from tests.world import write_world


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(write_world(tmp_path, nights=6).config))
    return str(path)


def published(monkeypatch: pytest.MonkeyPatch, *rows: ReleaseRow) -> None:
    def listed(place: Place) -> tuple[ReleaseRow, ...]:
        return rows

    monkeypatch.setattr("flows.backfill.releases", listed)
    monkeypatch.setattr("tasks.releases.releases", listed)


@pytest.mark.usefixtures("prefect")
def test_run_shows_every_step_and_ends_with_the_scores(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch)
    cli.main(["run", "--config", config, "--night", "2026-03-05"])
    shown = capsys.readouterr().out
    for fact in (
        f"prefect deployment run nightly-retrain/nightly --param 'config=\"{config}\"' --param 'night=\"2026-03-05\"'",
        "night 2026-03-05", "first contact, 5 rows", "popularity", "0.6000", "99 clean, 1 in quarantine",
        "alarm     inert: nothing changes [1]", "gate      go, proven", "a" * 64, "the gate said go", "/r/report.html",
    ):  # fmt: skip
        assert fact in shown


@pytest.mark.usefixtures("prefect")
def test_backfill_shows_plan_nights_and_summary(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch)
    published(monkeypatch)
    cli.main(["backfill", "--config", config, "--start", "2026-03-05", "--end", "2026-03-07", "--promote"])
    shown = capsys.readouterr().out
    assert "prefect deployment run backfill/backfill" in shown
    assert "plan: 2 of 3 nights to run" in shown
    assert "2026-03-05 released: the gate said go" in shown
    assert "2026-03-07 skipped: the lake has no such night" in shown
    assert "0.6000 popularity" in shown


@pytest.mark.usefixtures("prefect")
@pytest.mark.parametrize(
    ("error", "again"), [(ExpectationsFailed("3 rows [of] 4"), False), (StoreUnavailable("busy"), True)]
)
def test_an_error_of_the_family_is_one_block_without_a_traceback(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, again: bool
) -> None:
    stand_in(monkeypatch, failing={date(2026, 3, 5): error})
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", "--config", config, "--night", "2026-03-05"])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert f"{type(error).__name__}\n{error}\n" in told
    assert ("Trying again later can help" in told) is again
    assert "Traceback" not in told


def test_a_broken_config_is_told_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", "--config", str(tmp_path / "none.yaml")])
    assert caught.value.code == 2
    assert "InvalidConfig" in capsys.readouterr().err


def test_a_night_that_is_no_date_is_refused(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "--config", config, "--night", "yesterday"])
    assert "'yesterday' is no date; give YYYY-MM-DD" in capsys.readouterr().err


def test_releases_are_listed(config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made = datetime(2026, 3, 6, 4, 30, tzinfo=UTC)
    fields = {"release": "b" * 64, "night": date(2026, 3, 5), "created": made, "go": True, "champion": True}
    row = ReleaseRow.model_validate({**fields, "parent": None, "config": "c", "report": "r"})
    published(monkeypatch, row)
    cli.main(["releases", "--config", config])
    shown = capsys.readouterr().out
    assert "2026-03-05" in shown
    assert "b" * 12 in shown


def test_doctor_looks_at_config_lake_store_and_device(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["doctor", "--config", config])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["config", "lake", "store", "device"]
    assert "6 nights, 2026-03-01 to 2026-03-06" in lines[1]
    assert "honours conditions" in lines[2]
    assert lines[3].split() == ["device", "cpu"]


@pytest.mark.parametrize("text", ["{", ""])
def test_a_request_that_is_no_json_is_refused(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "request.json").write_text(text)
    with pytest.raises(SystemExit):
        cli.main(["rank", "--config", config, "--request", str(tmp_path / "request.json")])
    assert "RequestRejected" in capsys.readouterr().err


def test_rank_without_a_place_says_what_to_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["rank", "--request", str(tmp_path / "request.json")])
    assert "give --config, or --store and --pipeline" in capsys.readouterr().err


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from flows.cli import parser; parser().format_help();"
        "import json; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"prefect", "torch", "rich", "pydantic", "pyarrow", "numpy"} & set(json.loads(done.stdout))
