"""The command line: what it prints, how it fails, what it leaves running, and which Prefect command it equals."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows import cli
from tasks.release.manifest import blob_key
from tasks.release.moves import hold as hold_pointer
from tasks.release.publishing import read_manifest
from tasks.release.signing import UNSIGNED
from tasks.steps import hold
from tests.finished import Finished
from tests.prefect_homes import home_with, servers_of
from tests.steps.plain import plain_night, plain_replay

ROOT = Path(__file__).parent.parent.parent


def written(world: Finished, folder: Path) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(world.world.config))
    return str(path)


@pytest.fixture(autouse=True)
def a_wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def world(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Its two nights are finished under the config that the command line is given."""
    copied = finished.copy(tmp_path_factory.mktemp("cli"))
    for result in copied.results:
        plain_night(copied.config, result.night)
    return copied


@pytest.fixture(scope="module")
def config(world: Finished, tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(world, tmp_path_factory.mktemp("config"))


@pytest.mark.usefixtures("prefect")
def test_run_shows_every_step_and_ends_with_the_scores(
    world: Finished, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = world.results[1]
    cli.main(["run", "--config", config, "--night", result.night.isoformat()])
    shown = capsys.readouterr().out
    for fact in (
        f"prefect deployment run nightly-retrain/nightly --param 'config=\"{config}\"' --param 'night=\"2026-03-06\"'",
        *(f"{step.step:<11} reused" for step in result.steps),
        "night 2026-03-06", "first contact, 5 rows", "matrix factorisation", "popularity",
        f"{result.validated.clean} clean, 1 in quarantine; history 5 nights", "gate      go",
        f"release   {result.published.release}", "champion  yes", "report.html",
    ):  # fmt: skip
        assert fact in shown


@pytest.mark.usefixtures("prefect")
def test_backfill_shows_plan_nights_and_summary(
    world: Finished, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["backfill", "--config", config, "--start", "2026-03-01", "--end", "2026-03-01", "--promote"])
    shown = capsys.readouterr().out
    assert "prefect deployment run backfill/backfill" in shown
    assert "plan: 1 of 1 nights to run" in shown
    assert "2026-03-01 skipped: night 2026-03-01 has 0 clean nights" in shown
    assert [line.split() for line in shown.splitlines()].count(["2026-03-01", "skipped"]) == 1
    cli.main(["backfill", "--config", config, "--start", "2026-03-05", "--end", "2026-03-09", "--dry-run"])
    shown = capsys.readouterr().out
    assert "plan: 2 of 5 nights to run" in shown
    assert f"finished: release {world.results[0].published.release[:12]}" in shown
    assert "the lake has no such night" in shown


@pytest.mark.usefixtures("prefect")
def test_replay_shows_the_pooled_tables_and_where_the_page_is(
    world: Finished, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    first, last = (result.night for result in world.results)
    plain = plain_replay(world.config, first, last, out=str(tmp_path / "plain"))
    span = ["--start", first.isoformat(), "--end", last.isoformat()]
    cli.main(["replay", "--config", config, *span, "--out", str(tmp_path / "out"), "--per-night"])
    shown = capsys.readouterr().out
    for fact in (
        f"nightly, clicked, {first}", f"contact 5, clicked, {last}",
        f"{first} examined (1 of 2)", "nightly, clicked, 2 nights", "contact 5, clicked, adapted by slice",
        "contact 20, clicked: no rows", "matrix factorisation", "support 21+", str(tmp_path / "out" / "replay.html"),
    ):  # fmt: skip
        assert fact in shown
    assert "user_id, clicked: own weights " in shown
    assert "market, clicked: own weights " in shown
    assert str(tmp_path / "out" / "replay-segments.parquet") in shown
    assert (tmp_path / "out" / "replay.parquet").read_bytes() == Path(plain.written.table).read_bytes()


def started(home: Path, *arguments: str) -> "subprocess.Popen[str]":
    """The command line in a process of its own, with the embedded server that a person gets."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_LOGGING")}
    code = """
import atexit, pathlib, sys
atexit.register(lambda: pathlib.Path(sys.argv.pop()).write_text("\\n".join(sys.modules)))
from flows.cli import main
main(sys.argv[1:-1])
"""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments, str(home.parent / "loaded")],
        cwd=ROOT, env=environment | {"PREFECT_HOME": str(home)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


@pytest.mark.parametrize("first", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["later", "first on a host"])
def test_a_failing_night_is_one_block_on_an_otherwise_clean_screen(
    damageable: Finished, prefect_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    if first:  # Prefect makes its database before the run begins
        monkeypatch.delenv("PREFECT_SERVER_DATABASE_MIGRATE_ON_START")
    else:
        home_with(prefect_database, tmp_path / "prefect")
    path = damageable.files_of(damageable.next_night)[0]
    path.write_bytes(path.read_bytes()[:-100])
    night = damageable.next_night.isoformat()
    process = started(tmp_path / "prefect", "run", "--config", written(damageable, tmp_path), "--night", night)
    shown, errors = process.communicate(timeout=180)
    assert process.returncode == 2, errors
    assert errors.startswith("CorruptFile\nnight 2026-03-07")
    assert "part-0.parquet" in errors
    assert len(errors.strip().splitlines()) == 2
    assert len(shown.strip().splitlines()) == 1
    loaded = (tmp_path / "loaded").read_text().splitlines()
    assert "prefect.flows" in loaded
    assert "prefect.server.api.server" not in loaded, "the run has loaded the server into its own process"
    assert servers_of(tmp_path / "prefect") == []


def test_a_broken_config_is_told_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", "--config", str(tmp_path / "none.yaml")])
    assert caught.value.code == 2
    assert "InvalidConfig" in capsys.readouterr().err


def test_a_night_that_is_no_date_is_refused(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "--config", config, "--night", "yesterday"])
    assert "'yesterday' is no date; give YYYY-MM-DD" in capsys.readouterr().err


@pytest.mark.usefixtures("prefect")
def test_search_ends_with_what_the_last_block_says_and_goes_on_from_its_file(
    world: Finished, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["search", "--config", config, "--night", world.next_night.isoformat(), "--trials", "1"]
    words += ["--block", "1", "--cuts", "1", "--seed", "0", "--storage", str(tmp_path / "trials.journal")]
    cli.main(words)
    shown = capsys.readouterr().out
    for fact in (
        "search      1 trials\n", "training.embedding_decay", "history   6 nights\n",
        "trials    1 finished; remembered",
        "chosen by 2026-03-05 to 2026-03-05: own settings 0.", "(optimistic: it was chosen by these nights)",
    ):  # fmt: skip
        assert fact in shown
    assert ("own settings did best" in shown) != ("2026-03-06 to 2026-03-06, which nothing was chosen by" in shown)
    cli.main(words)
    assert "1 trials, 1 of them done before" in capsys.readouterr().out


def test_doctor_looks_at_config_lake_store_keys_pointer_leftovers_and_device(
    world: Finished, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["doctor", "--config", config])
    lines = capsys.readouterr().out.splitlines()
    subjects = ["config", "lake", "store", "keys", "pointer", "lease", "left", "device"]
    assert [line.split()[0] for line in lines] == subjects
    assert "8 nights, 2026-03-01 to 2026-03-08" in lines[1]
    assert "honours conditions" in lines[2]
    assert lines[3] == f"keys    {UNSIGNED}"
    pointer = world.pointer
    assert lines[4] == f"pointer release {pointer.release[:12]} of night {pointer.night}, generation 2"
    assert lines[5:] == ["lease   nobody runs", "left    nothing", "device  cpu"]


def test_doctor_tells_what_was_left_and_refuses_a_champion_that_lacks_a_file(
    damageable: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, store, champion = written(damageable, tmp_path), damageable.store, damageable.pointer.release
    first = damageable.results[0].published.release
    old, new = ({one.name: one.sha256 for one in read_manifest(store, "tiny", r).files} for r in (first, champion))
    store.delete(blob_key("tiny", old["bank.bin"]))
    store.put_if_absent(blob_key("tiny", "ab" * 32), b"left")
    store.put_if_absent(f"tiny/releases/{'cd' * 32}/run.json", b"{}")
    intent = {"parent": None, "champion": None, "release": "ef" * 32}
    store.put_if_absent("tiny/work/intent/2026-03-09/x.json", json.dumps(intent).encode())
    hold_pointer(store, "tiny", "an incident")
    with hold(damageable.config.place()):
        cli.main(["doctor", "--config", config])
    said = capsys.readouterr().out
    for fact in (
        "generation 3; held, no night promotes: an incident", f"pid {os.getpid()} on ", "token 3",
        "night 2026-03-09 was about to promote release efefefefefef", f"release {first[:12]} lacks 1 files",
        "1 releases without a manifest, of publishes that died (cdcdcdcdcdcd)", "1 blobs, 4 bytes",
    ):  # fmt: skip
        assert fact in said
    store.delete(blob_key("tiny", new["bank.bin"]))
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--config", config])
    assert ended.value.code == 2
    block = " ".join(capsys.readouterr().err.split())
    assert block.startswith(f"ObjectCorrupt release {champion[:12]}")
    assert "bank.bin (absent, expected" in block


def test_doctor_tells_lakes_apart(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = yaml.safe_load(Path(config).read_text())
    source, columns = tree["data"].pop("source"), tree["data"].pop("columns")
    (tmp_path / "empty").mkdir()
    lakes = [{"name": "shop", "source": source}, {"name": "blog", "source": str(tmp_path / "empty"), "optional": True}]
    told = tmp_path / "lakes.yaml"
    told.write_text(
        yaml.safe_dump(tree | {"data": {**tree["data"], "columns": columns, "lakes": lakes, "lake_column": "market"}})
    )
    cli.main(["doctor", "--config", str(told)])
    said = " ".join(capsys.readouterr().out.split())
    assert f"lake shop, {source}: 8 nights, 2026-03-01 to 2026-03-08" in said
    assert f"lake blog, {tmp_path / 'empty'}: no nights yet" in said


def test_doctor_looks_at_the_directory_for_tensorboard(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = yaml.safe_load(Path(config).read_text())
    told, runs = tmp_path / "told.yaml", tmp_path / "file" / "runs"
    told.write_text(yaml.safe_dump(tree | {"training": {**tree["training"], "tensorboard": str(runs)}}))
    cli.main(["doctor", "--config", str(told)])
    assert capsys.readouterr().out.splitlines()[-1] == f"curves  {runs}: writable for TensorBoard"
    assert list(runs.iterdir()) == []
    shutil.rmtree(tmp_path / "file")
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--config", str(told)])
    assert ended.value.code == 2
    assert "remove training.tensorboard" in " ".join(capsys.readouterr().err.split())


def test_rank_prints_the_candidates_of_the_champion(
    world: Finished, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = {
        "user_id": ["user-000", "nobody"], "market": ["north"] * 2, "age": [40, None], "item_id": [[100, 102, 999]] * 2,
        "genre": [["comedy"] * 3] * 2, "length": [["long", "short", "long"]] * 2, "price": [[5.0, 5.0, 1.0]] * 2,
    }  # fmt: skip
    (tmp_path / "request.json").write_text(json.dumps(request))
    for where in (["--config", config], ["--store", world.config.store, "--pipeline", "tiny"]):
        cli.main(["rank", *where, "--request", str(tmp_path / "request.json")])
        shown = capsys.readouterr().out
        assert f"request 2 of 2, release {world.pointer.release[:12]} of night 2026-03-06" in shown
        assert shown.count(" 999 ") == 2
        assert "clicked" in shown


def test_demo_data_builds_a_lake_and_a_request_to_try(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["demo-data", "--target", str(tmp_path)])
    assert "built: 213 nights, 1997-09-20 to 1998-04-22, 100,000 interactions" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "request.json").read_text())) >= {"user_id", "movie_id", "genre_drama"}


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


def test_the_readme_tells_of_every_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = cli.parser().format_help().split("COMMAND", 2)[2]
    commands = {line.split()[0] for line in shown.splitlines() if line.startswith("    ") and line[4] != " "}
    assert commands >= {"run", "backfill", "replay", "releases", "doctor", "rank", "demo-data"}
    assert [name for name in sorted(commands) if f"nightrank {name}" not in text] == []


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from flows.cli import parser; parser().format_help();"
        "import json; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"prefect", "torch", "rich", "pydantic", "pyarrow", "numpy"} & set(json.loads(done.stdout))
