"""`nightrank releases ...`: what a person and a machine read, how it fails, and the runbook's commands."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import cli
from tasks.release.manifest import blob_key
from tasks.release.published import stored_manifest
from tasks.release.signing import KEY_VARIABLE, SigningKey
from tests.finished import Finished

ROOT = Path(__file__).parent.parent.parent
RUNBOOK = (ROOT / "infra" / "runbook.md").read_text(encoding="utf-8")
Say = Callable[..., str]
ODD_SHARES = ("some", "nan", "inf", "1_0", "1e1", "", "-0", "-5", " 5", "5\n", ".", "1.2.3", "\u0665", "9" * 5000)


@pytest.fixture(autouse=True)
def a_wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def say(damageable: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs `nightrank releases` on two finished nights; what it prints, or after an error its block."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(damageable.world.config))

    def run(*words: str, fails: bool = False) -> str:
        said = ["releases", words[0], "--config", str(path), *words[1:]]
        if fails:
            with pytest.raises(SystemExit) as ended:
                cli.main(said)
            assert ended.value.code == 2
            return capsys.readouterr().err
        cli.main(said)
        return capsys.readouterr().out

    return run


def ids(world: Finished) -> list[str]:
    return [result.published.release for result in world.results]


def test_the_list_says_what_the_pointer_names(damageable: Finished, say: Say) -> None:
    first, second = ids(damageable)
    lines = [line.split() for line in say("list").splitlines()]
    assert [line[:4] for line in lines if line and line[0].startswith("2026-")] == [
        ["2026-03-05", first[:12], "go", "previous"],
        ["2026-03-06", second[:12], "go", "champion"],
    ]
    told = json.loads(say("list", "--json"))
    assert [(one["release"], one["roles"], one["parent"]) for one in told] == [
        (first, ["previous"], None),
        (second, ["champion"], first),
    ]


def test_one_damaged_release_hides_no_other_and_stops_the_collector_in_one_block(
    damageable: Finished, say: Say
) -> None:
    first, second = ids(damageable)
    key = f"tiny/releases/{first}/run.json"
    damageable.store.delete(key)
    damageable.store.put_if_absent(key, b"{")
    shown = say("list")
    rows = [line.split() for line in shown.splitlines()]
    lines = [row for row in rows if row and row[0].startswith("2026-")]
    assert lines == [
        ["2026-03-05", first[:12], "go", "previous", "unknown", "damaged"],
        ["2026-03-06", second[:12], "go", "champion", first[:12], *lines[1][5:]],
    ]
    assert f"damaged {first[:12]}: {damageable.store.url}/{key} is damaged: it is not JSON" in shown
    told = json.loads(say("list", "--json"))
    assert [(one["release"], len(one["damaged"])) for one in told] == [(first, 1), (second, 0)]
    before = damageable.published()
    for words in (["gc", "--dry-run"], ["gc"]):
        block = say(*words, fails=True)
        assert block.startswith("ObjectCorrupt\n")
        assert f"{key} is damaged" in block
        assert "from a copy" in block
    assert damageable.published() == before
    shown = say("show", "previous")
    assert f"damaged   {damageable.store.url}/{key} is damaged" in shown
    assert "gate      go" in shown
    assert "parent    unknown" in shown
    damageable.store.delete(f"tiny/releases/{second}/report.html")
    assert second[:12] in say("list")


def test_show_tells_where_a_release_is_from_and_what_it_holds(damageable: Finished, say: Say) -> None:
    first, second = ids(damageable)
    shown = say("show")
    for fact in (
        second, "2026-03-06, made 20", "is        champion", f"parent    {first}", f"beside release {first}",
        "moved     promote, generation 2", "bank.bin", "clicked (binary)",
        "matrix factorisation", "onnxruntime-gpu", "report.html", "variant   none but fp32",
        "signed    unsigned: who can", "requires  onnxruntime 1.",
    ):  # fmt: skip
        assert fact in shown
    levels = [line.split()[:2] + line.split()[3:4] for line in shown.splitlines() if " ridge " in line]
    assert levels == [["user_id", "ridge", "33"], ["market", "ridge", "2"]]  # with weights of their own
    for name in (first, first[:6], "previous", "2026-03-05"):
        told = json.loads(say("show", name, "--json"))
        assert (told["release"], told["night"], told["parent"]) == (first, "2026-03-05", None)
    manifest = stored_manifest(damageable.store, "tiny", first)
    assert {one["name"]: one["sha256"] for one in told["files"]} == {one.name: one.sha256 for one in manifest.files}
    assert told["bytes"] == manifest.size
    assert [(one["what"], one["generation"]) for one in told["moves"]] == [("promote", 1)]
    assert told["metrics"]["clicked"]["candidate"]["rows"] > 0


def test_diff_counts_what_a_ranker_fetches(damageable: Finished, say: Say) -> None:
    first, second = ids(damageable)
    then, now = (stored_manifest(damageable.store, "tiny", one) for one in (first, second))
    fetched = sum(file.bytes for file in now.files if file.sha256 not in {one.sha256 for one in then.files})
    shown = say("diff")
    assert f"from release {first[:12]} of night 2026-03-05" in shown
    assert f"fetches {fetched:,} of {now.size:,} bytes" in shown
    assert "inputs and objectives are the same" in shown
    told = json.loads(say("diff", "previous", "champion", "--json"))
    assert told["fetched"] == fetched
    assert {one["name"]: one["same"] for one in told["files"]} == {
        name: {one.name: one.sha256 for one in then.files}[name] == digest
        for name, digest in {one.name: one.sha256 for one in now.files}.items()
    }
    assert told["levels"] == [{"name": "user_id", "before": "29", "after": "33"}]
    same = json.loads(say("diff", "champion", "champion", "--json"))
    assert (same["fetched"], same["interface"], same["levels"], same["provenance"]) == (0, [], [], [])


def test_verify_tries_what_a_ranker_would_and_says_what_is_wrong(damageable: Finished, say: Say) -> None:
    store, (first, second) = damageable.store, ids(damageable)
    checks = json.loads(say("verify", "--all", "--json"))
    assert set(checks) == {first, second}
    assert {one["name"]: one["fine"] for one in checks[second]} == dict.fromkeys(
        ("manifest", "signature", "beside", "files", "answers"), True
    )
    bank = next(file for file in stored_manifest(store, "tiny", second).files if file.name == "bank.bin")
    key = blob_key("tiny", bank.sha256)
    data = store.get(key).data
    store.delete(key)
    store.put_if_absent(key, bytes([data[0] ^ 1]) + data[1:])
    assert f"1 of 1 releases would be refused by rankers, or were changed: {second[:12]}" in say("verify", fails=True)
    store.delete(key)
    said = say("verify", "champion", "previous", fails=True)
    assert "1 of 2 releases" in said
    assert "fine" in say("verify", "previous")


def test_the_pointer_is_moved_by_hand_and_says_how_it_stands(damageable: Finished, say: Say) -> None:
    first, second = ids(damageable)
    shown = say("rollback", "--reason", "clicks halved", "--hold")
    assert f"champion  {first} of night 2026-03-05" in shown
    assert "generation 3" in shown
    assert "held      no night promotes: clicks halved" in shown
    assert "nights promote" in say("unhold", "--reason", "found it")
    assert f"rival     {second} answers 2.5 % of the users" in say(
        "challenger", "2026-03-06", "--share", "2.5", "--reason", "to be sure"
    )
    now = damageable.pointer
    assert (now.release, now.challenger, now.share, now.hold) == (first, second, 250, None)
    assert "champion, " not in say("list")
    assert "challenger" in say("list")
    assert "rival     none" in say("challenger", "--none", "--reason", "enough seen")
    assert f"champion  {second}" in say("promote", "2026-03-06", "--reason", "it was the log")
    assert "no night promotes: an incident" in say("hold", "--reason", "an incident")
    now = damageable.pointer
    assert (now.release, now.previous, now.generation, now.challenger) == (second, first, 8, None)
    assert [one["what"] for one in json.loads(say("show", "previous", "--json"))["moves"]] == [
        "promote", "rollback", "unhold", "challenger", "challenger"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (["show", "challenger"], "ObjectMissing", "names no challenger"),
        (["verify", "2020-01-01"], "ObjectMissing", "night 2020-01-01 has no release"),
        (["promote", "previous", "--reason", "x"], "ReleaseRefused", "rollback --to"),
        (["rollback", "--reason", " "], "InvalidConfig", "needs a reason"),
        (["challenger", "previous", "--reason", "x"], "InvalidConfig", "give --share in percent"),
        (["challenger", "champion", "--share", "5", "--reason", "x"], "InvalidConfig", "is its champion"),
        (["fallback", "user_id=nobody", "--reason", "x"], "ObjectMissing", "has no weights of its own"),
        (["fallback", "user_id=user-003"], "InvalidConfig", "needs a reason"),
        (
            ["fallback", "user_id=user-003", "user_id=user-004", "--reason", "x"],
            "InvalidConfig",
            "user_id is named twice; a fallback is of one segment: give one a command",
        ),
        (["fallback", "user_id=user-003", "--undo"], "ObjectMissing", "is not held; held: none"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_block_and_changes_nothing(
    damageable: Finished, say: Say, words: list[str], error: str, said: str
) -> None:
    before = damageable.published()
    block = say(*words, fails=True)
    assert block.startswith(f"{error}\n")
    assert said in block
    assert damageable.published() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["challenger", "ab12", "--share", "0", "--reason", "x"], "percent from 0.01 to 100"),
        (["challenger", "ab12", "--share", "0.001", "--reason", "x"], "percent from 0.01 to 100"),
        *(
            (["challenger", "ab12", "--share", share, "--reason", "x"], "is no share; give percent")
            for share in ODD_SHARES
        ),
        (["challenger", "ab12", "--share", "5.000000001", "--reason", "x"], "by hundredths"),
        (["challenger", "ab12", "--share", "100.01", "--reason", "x"], "percent from 0.01 to 100"),
        (["gc", "--config", "C", "--grace", "0"], "give a whole number from 1 to 1,000,000"),
        (["gc", "--config", "C", "--grace", "9" * 5000], "give a whole number from 1 to 1,000,000"),
        (["fallback", "--config", "C", "ann"], "give COLUMN=KEY"),
        (["rollback"], "--reason"),
    ],
)
def test_words_that_cannot_be_meant_are_refused_before_anything_is_read(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["releases", *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_fallback_and_its_end_are_told(damageable: Finished, say: Say) -> None:
    first = damageable.pointer.release
    shown = say("fallback", "user_id=user-003", "--reason", "complaints")
    assert "segment user_id=user-003 is served by its parent's weights, on nights to come as well" in shown
    assert damageable.pointer.release in shown
    assert "is held already" in say("fallback", "user_id=user-003", "--reason", "complaints")
    told = json.loads(say("show", "--json"))
    assert (told["decided_by"], told["override"]) == ("operator", "complaints")
    assert "has weights of its own again from the next night on" in say("fallback", "user_id=user-003", "--undo")
    say("fallback", "user_id=user-004", "--reason", "so has he")
    back = say("fallback", "user_id=user-003", "--to", first, "--reason", "better now")
    assert "segment user_id=user-003 has its earlier weights, until the next night solves it anew" in back
    assert "its hold" not in back
    back = say("fallback", "user_id=user-004", "--to", first, "--reason", "he as well")
    assert "its hold  ends, so that nights to come solve it; it was held since 20" in back
    assert ": so has he" in back
    again = say("fallback", "user_id=user-004", "--to", first, "--reason", "he as well")
    assert "has these very weights in the champion: no release was made, and the pointer stays" in again
    assert f"champion  {first}" in again


def test_gc_says_what_it_would_do_what_it_did_and_when_it_goes_on(damageable: Finished, say: Say) -> None:
    damageable.store.put_if_absent(f"tiny/blobs/{'ab' * 32}", b"left")
    before = list(damageable.store.list("tiny/state/"))
    dry = say("gc", "--dry-run")
    assert "would be marked   0 releases, 1 blobs" in dry
    assert list(damageable.store.list("tiny/state/")) == before
    shown = say("gc", "--keep", "1", "--grace", "48")
    for fact in (
        "one of the newest 1, champion",
        "previous",
        "marked   0 releases, 1 blobs",
        "next     something is old",
    ):
        assert fact in shown
    assert "waiting  0 releases, 1 blobs" in say("gc", "--grace", "48")


def test_moves_need_no_config_and_load_nothing_heavy(damageable: Finished) -> None:
    """Where seconds count, and on a ranker's host, which has neither torch nor Prefect."""
    import subprocess
    import sys

    words = ["rollback", "--store", damageable.config.store, "--pipeline", "tiny", "--reason", "clicks halved"]
    code = (
        "import sys; from flows.cli import main; main(sys.argv[1:]);"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'prefect', 'pydantic', 'pandas'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "releases", *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert damageable.pointer.release == ids(damageable)[0]


def test_a_place_that_nobody_names_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["releases", "list", "--store", "somewhere"])
    assert "give --config, or --store and --pipeline" in capsys.readouterr().err


def test_a_store_that_is_not_there_and_a_pipeline_without_releases_are_told_apart(
    damageable: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    SigningKey.generate().save(tmp_path / "key.pem")
    monkeypatch.setenv(KEY_VARIABLE, str(tmp_path / "key.pem"))
    missing = tmp_path / "no" / "such"
    for words in (
        ["list"],
        ["list", "--json"],
        ["verify", "--all"],
        ["show"],
        ["triton", "--out", str(tmp_path / "t")],
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["releases", *words, "--store", str(missing), "--pipeline", "tiny"])
        assert ended.value.code == 2
        block = capsys.readouterr().err
        assert block.startswith("ObjectMissing\n")
        assert f"store {missing}: there is no such directory" in block
    assert not missing.parent.exists()
    where = ["--store", damageable.config.store, "--pipeline", "tin"]
    said = f"no releases of pipeline 'tin' in {damageable.store.url}: "
    cli.main(["releases", "list", *where])
    assert said in capsys.readouterr().out
    cli.main(["releases", "list", "--json", *where])
    assert json.loads(capsys.readouterr().out) == []
    for words in (
        ["verify", "--all"],
        ["verify"],
        ["show", "2026-03-05"],
        ["show", "previous"],
        ["sign", "--unsigned"],
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["releases", *words, *where])
        assert ended.value.code == 2
        block = " ".join(capsys.readouterr().err.split())
        assert block.startswith("NoRelease ")
        assert said in block
        assert "releases list" not in block


def test_a_pipeline_without_releases_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--store", str(tmp_path), "--pipeline", "tiny"]
    for words in (["rollback", "--reason", "x"], ["hold", "--reason", "x"]):
        with pytest.raises(SystemExit):
            cli.main(["releases", words[0], *where, *words[1:]])
        block = capsys.readouterr().err
        assert block.startswith("NoRelease\n")
        assert "promote a release first" in block


def commands_of_the_runbook() -> list[list[str]]:
    """Every command in it, in code blocks and in code spans."""
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```$", RUNBOOK, flags=re.MULTILINE | re.DOTALL))
    prose = re.sub(r"^```.*?^```$", "", RUNBOOK, flags=re.MULTILINE | re.DOTALL)
    found = [*blocks.splitlines(), *re.findall(r"`(nightrank [^`]+)`", prose)]
    return [shlex.split(line, comments=True) for line in found if line.strip() not in ("", "nightrank releases")]


@pytest.mark.parametrize("words", commands_of_the_runbook(), ids=" ".join)
def test_every_command_of_the_runbook_parses(words: list[str]) -> None:
    assert words[0] == "nightrank"
    options: Any = cli.parser().parse_args(words[1:])
    assert callable(options.command)


def test_the_runbook_knows_every_error_and_every_alarm() -> None:
    from tasks import errors
    from tasks.errors import DataRejected, NightrankError, StoreError

    known = {one.__name__ for one in vars(errors).values() if isinstance(one, type) and issubclass(one, NightrankError)}
    families = {one.__name__ for one in (NightrankError, DataRejected, StoreError)}
    told = set(re.findall(r"`([A-Z][A-Za-z]+)`", RUNBOOK))
    assert known - families - told == set()
    alarms = re.findall(r"\*\*Alarms have names\.\*\*.*?They stop nothing", README, flags=re.DOTALL)
    named = set(re.findall(r"`([a-z]+)`", alarms[0]))
    assert len(named) == 5
    assert named <= set(re.findall(r"^\| `([a-z]+)` \|", RUNBOOK, flags=re.MULTILINE))


README = (ROOT / "README.md").read_text(encoding="utf-8")
