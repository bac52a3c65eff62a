"""Homes of Prefect for tests: a database that is migrated once, and which servers still run on one."""

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path


def migrate(home: Path) -> None:
    """Make Prefect's database in a home of its own: hundreds of migrations, more work than a small night."""
    home.mkdir()
    done = subprocess.run(
        [str(Path(sys.executable).parent / "prefect"), "server", "database", "upgrade", "-y"],
        env={**os.environ, "PREFECT_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Everything is in the one file, which is what the copies are made of.
    assert not [path.name for path in home.iterdir() if path.name.startswith("prefect.db-")]


def home_with(database: Path, home: Path) -> Path:
    """A home with a copy of a migrated database."""
    home.mkdir(parents=True, exist_ok=True)
    shutil.copy(database, home / "prefect.db")
    return home


def servers_of(home: Path) -> list[int]:
    """Process ids of the Prefect servers that keep their database in this home."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            environment = (folder / "environ").read_bytes().split(b"\0")
            if f"PREFECT_HOME={home}".encode() in environment and b"uvicorn" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found
