"""A night is judged once: its Data Docs show that verdict, and only where it was remembered is it reached anew."""

import re
import shutil
from pathlib import Path

import pytest

from tasks.data import expectations
from tasks.ingest import ingest
from tasks.references import IngestRef, Place
from tasks.steps import open_workspace, recalled
from tasks.validate import validate
from tests.finished import Finished


def pages(place: Place, key: str) -> dict[str, str]:
    """The verdicts in the Data Docs of a night, without times and random names of their parts."""
    record = recalled(place, "docs", key)
    assert "data_docs/index.html" in record.content["files"]
    varied = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[\d.]*|\d{8}T\d{6}[\d.]*|-[0-9a-f]{8}(-[0-9a-f]+){4}")
    files = {
        name: open_workspace(place).file(record, name) for name in record.content["files"] if "/validations/" in name
    }
    return {varied.sub("", name): varied.sub("", path.read_text()) for name, path in files.items()}


def test_data_docs_show_the_verdict_that_was_reached_or_reach_it_again(
    damageable: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, place = damageable.config, damageable.config.place()
    judge, nights = expectations.validate, []

    def counted(*given: object) -> expectations.Validated:
        nights.append(given[1])
        return judge(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(expectations, "validate", counted)
    ingested: IngestRef = ingest.fn(place, config.data, config.gate, damageable.next_night, config.digest())
    at_once = validate.fn(place, config.data, ingested)
    assert nights == [damageable.next_night]
    shown = pages(place, at_once.docs)
    assert len(shown) == 1
    (page,) = shown.values()
    assert str(at_once.rows) in re.findall(r">\s*(\d+)\s*<", page)
    shutil.rmtree(Path(config.store) / "tiny/work/docs" / at_once.docs)
    again = validate.fn(place, config.data, ingested)
    assert nights == [damageable.next_night] * 2
    assert again.docs == at_once.docs
    assert pages(place, again.docs) == shown
