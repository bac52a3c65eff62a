"""Gathers what the benchmarks measured into one table, which is printed when all of them have run."""

import platform
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

HEADER = ("measured", "device", "the product's code", "beside it", "in figures")
ROWS = pytest.StashKey[list[tuple[str, ...]]]()
Row = Callable[..., None]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Both sides of a ratio compute on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Row:
    """Adds one row to the table: what was measured, on what, and three cells of figures."""
    rows = request.config.stash.setdefault(ROWS, [])

    def add(*cells: str) -> None:
        assert len(cells) == len(HEADER)
        rows.append(cells)

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table as markdown, ready for RESULTS.md."""
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    cards = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    terminalreporter.write_line("")
    terminalreporter.write_line(f"{versions}, {platform.machine()}, one thread{cards}")
    terminalreporter.write_line("")
    for cells in (HEADER, ("---", "---", "---:", "---:", "---"), *rows):
        terminalreporter.write_line("| " + " | ".join(cells) + " |")
