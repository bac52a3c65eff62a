"""`nightrank keys`: what an operator types, and what the files are afterwards."""

import re
import subprocess
from pathlib import Path

import pytest

from flows import cli
from tasks.release.signing import KEYS_VARIABLE, Keyring, SigningKey


def test_keys_are_made_listed_rotated_and_revoked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ring, old, new = tmp_path / "ring.json", tmp_path / "old.pem", tmp_path / "new.pem"
    cli.main(["keys", "create", "--keys", str(ring), "--key", str(old), "--comment", "at home"])
    first = SigningKey.load(old).key_id
    shown = capsys.readouterr().out
    assert f"key     {first}: {old} signs" in shown
    assert f"export NIGHTRANK_SIGNING_KEY={old} NIGHTRANK_TRUSTED_KEYS={ring}" in shown
    monkeypatch.setenv(KEYS_VARIABLE, str(ring))
    cli.main(["keys", "rotate", "--key", str(new)])
    assert re.search("hand the keyring to every ranker.*then sign.*nightrank releases sign", capsys.readouterr().out)
    second = SigningKey.load(new).key_id
    cli.main(["keys", "revoke", first])
    assert f"revoked {first}" in capsys.readouterr().out
    cli.main(["keys", "list"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(line[0], line[1]) for line in lines] == [(first, "revoked"), (second, "active")]
    assert lines[0][3:] == ["at", "home"]
    assert [key.state for key in Keyring.load(ring).keys] == ["revoked", "active"]
    cli.main(["keys", "revoke", second])
    assert "no key signs now" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [(["list"], "which keyring"), (["create", "--key", "/proc/key.pem", "--keys", "r"], "cannot be made")],
)
def test_what_cannot_be_done_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["keys", *words])
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert "InvalidConfig" in shown
    assert told in shown


def test_rotating_signs_nothing_for_rankers_do_not_know_the_new_key_yet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["keys", "rotate", "--keys", str(tmp_path / "ring.json"), "--key", str(tmp_path / "key.pem")]
    with pytest.raises(SystemExit):
        cli.main([*words, "--config", "config.yaml"])
    assert "unrecognized arguments: --config" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_line_to_export_holds_from_any_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, elsewhere = tmp_path / "my keys", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(home)
    cli.main(["keys", "create", "--keys", "ring.json", "--key", "k1.pem"])
    (line,) = [one for one in capsys.readouterr().out.splitlines() if one.startswith("export ")]
    told = subprocess.run(
        ["sh", "-c", f'{line}; cat "$NIGHTRANK_SIGNING_KEY" "$NIGHTRANK_TRUSTED_KEYS"'],
        cwd=elsewhere, capture_output=True, check=True,
    )  # fmt: skip
    assert told.stdout == (home / "k1.pem").read_bytes() + (home / "ring.json").read_bytes()
