"""Bad input, met by a whole night while a good release is in place: a named error with its remedy, and nothing else.

What each rule finds row by row is told by the tests of `tests/data`; here the night stops, and readers see no change.
"""

import errno
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from flows import cli
from tasks.errors import (
    CorruptFile,
    DataRejected,
    ExpectationsFailed,
    NightMissing,
    NotEnoughHistory,
    ObjectCorrupt,
    PointerMoved,
    ReleaseRefused,
    SchemaBroken,
    StoreUnwritable,
)
from tasks.release.manifest import Pointer, blob_key, pointer_key
from tasks.release.pointer import promote
from tasks.release.publishing import read_manifest
from tasks.serving.ranker import Ranker
from tasks.steps import watched_by
from tests.finished import Finished
from tests.steps.plain import plain_night

Change = Callable[[pa.Table], pa.Table]


def rewrite(finished: Finished, change: Change) -> None:
    """Change the first file of the next night."""
    path = finished.files_of(finished.next_night)[0]
    pq.write_table(change(pq.read_table(path, partitioning=None)), path)


def replaced(name: str, make: Callable[[pa.ChunkedArray], Any]) -> Change:
    """A change of one column, its type included."""

    def change(table: pa.Table) -> pa.Table:
        return table.set_column(table.column_names.index(name), name, make(table[name]))

    return change


def every_second(name: str, value: object) -> Change:
    """Every second row gets the value."""

    def make(values: pa.ChunkedArray) -> Any:
        hit = pa.array(np.arange(len(values)) % 2 == 0)
        return pc.if_else(hit, pa.scalar(value, values.type), values)

    return replaced(name, make)


def no_files(finished: Finished) -> None:
    for path in finished.files_of(finished.next_night):
        path.unlink()


def no_rows(finished: Finished) -> None:
    for path in finished.files_of(finished.next_night):
        pq.write_table(pq.read_table(path, partitioning=None).slice(0, 0), path)


def truncated(finished: Finished) -> None:
    path = finished.files_of(finished.next_night)[0]
    path.write_bytes(path.read_bytes()[:-100])


def no_labels(finished: Finished) -> None:
    for path in finished.files_of(finished.next_night):
        table = pq.read_table(path, partitioning=None)
        pq.write_table(replaced("clicked", lambda values: pa.nulls(len(values), values.type))(table), path)


def twice_with_another_outcome(table: pa.Table) -> pa.Table:
    again = replaced("clicked", lambda values: pc.subtract(1, values))(table.slice(0, 20))
    return pa.concat_tables([table, again])


def by(change: Change) -> Callable[[Finished], None]:
    return lambda finished: rewrite(finished, change)


def as_text(values: pa.ChunkedArray) -> Any:
    return values.cast(pa.string())


FAULTS: dict[str, tuple[Callable[[Finished], None], type[DataRejected], tuple[str, ...]]] = {
    "an absent column": (
        by(lambda table: table.drop_columns(["market"])), SchemaBroken, ("market", "fix the files upstream"),
    ),
    "a column too many": (
        by(lambda table: table.append_column("extra", table["price"])), SchemaBroken, ("extra",),
    ),
    "a wrong type": (by(replaced("price", as_text)), SchemaBroken, ("price", "string", "float64")),
    "digit strings for numbers": (by(replaced("item_id", as_text)), SchemaBroken, ("item_id", "string", "int64")),
    "a missing night": (no_files, NightMissing, ("holds no files", "deliver")),
    "an empty night": (no_rows, NightMissing, ("0 rows", "deliver")),
    "a truncated file": (truncated, CorruptFile, ("part-0.parquet", "again")),
    "a label that is null everywhere": (no_labels, ExpectationsFailed, ("clicked",)),
    "NaN": (by(every_second("price", float("nan"))), ExpectationsFailed, ("price", "max_bad_rows")),
    "a label outside its domain": (by(every_second("clicked", 2)), ExpectationsFailed, ("domain:clicked",)),
    "duplicate keys": (by(twice_with_another_outcome), ExpectationsFailed, ("duplicate", "max_bad_rows")),
    "timestamps outside the night": (
        by(replaced("at", lambda values: pc.subtract(values, pa.scalar(timedelta(days=2))))),
        ExpectationsFailed, ("outside_night", "max_bad_rows"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_night_of_bad_data_stops_with_a_named_error(damageable: Finished, fault: str) -> None:
    spoil, kind, told = FAULTS[fault]
    before = damageable.published()
    spoil(damageable)
    with pytest.raises(kind) as caught:
        plain_night(damageable.config, damageable.next_night)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert damageable.next_night.isoformat() in message
    for words in told:
        assert words in message
    assert damageable.published() == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"gate": {"margn": 0.01}}, ("gate.margn: unknown field", "did you mean 'margin'?")),
        ({"night_lag_days": "one"}, ("night_lag_days: 'one' does not fit",)),
    ],
    ids=["an unknown key", "a wrong type"],
)
def test_a_config_that_does_not_fit_stops_before_anything_starts(
    damageable: Finished,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    told: tuple[str, ...],
) -> None:
    before = damageable.published()
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**damageable.world.config, **change}))
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", "--config", str(path), "--night", damageable.next_night.isoformat()])
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    for words in ("InvalidConfig", str(path), *told):
        assert words in shown
    assert damageable.published() == before


def test_too_little_history_names_the_first_night_that_can_run(damageable: Finished) -> None:
    before, nights = damageable.published(), damageable.world.nights
    with pytest.raises(NotEnoughHistory) as caught:
        plain_night(damageable.config, nights[1])
    assert "has 1 clean nights" in str(caught.value)
    assert f"the first night that can run is {nights[3]}" in str(caught.value)
    assert damageable.published() == before


def test_a_night_of_one_row_runs(damageable: Finished) -> None:
    damageable.files_of(damageable.next_night)[1].unlink()
    rewrite(damageable, lambda table: table.slice(0, 1))
    result = plain_night(damageable.config, damageable.next_night)
    assert result.validated.clean == 1
    assert [row.rows for row in result.verdict.scores if row.exam == "nightly" and row.method == "adapted"] == [1]
    with Ranker(damageable.config.store, "tiny", device="cpu") as ranker:
        assert ranker.release == result.published.release


def test_a_full_disk_stops_the_night_and_readers_go_on(damageable: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    before = damageable.published()

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Ranker(damageable.config.store, "tiny", device="cpu") as ranker, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(StoreUnwritable, match="No space left on device; free space or grant write access"):
            plain_night(damageable.config, damageable.next_night)
        assert not ranker.refresh()
        assert (ranker.release, ranker.refusal) == (damageable.pointer.release, None)
    assert damageable.published() == before


class Rival:
    """A watcher that moves the pointer away and back while this run is about to publish."""

    def __init__(self, world: Finished) -> None:
        self.world = world

    def started(self, step: str, why: str) -> None:
        if step == "publish":
            for number in (1, 0):
                point_at(self.world, number)

    def progressed(self, step: str, done: float, total: float | None, unit: str) -> None: ...

    def finished(self, step: str, reused: bool, seconds: float) -> None: ...


def point_at(world: Finished, number: int) -> Pointer:
    """Name one of the finished releases, as an operator does who rolls back."""
    made = world.results[number].published
    token = world.pointer.fencing_token
    return promote(world.store, "tiny", made.release, made.night, token, force=True, reason="by hand")


def test_a_pointer_that_moved_under_us_is_left_where_it_is(damageable: Finished) -> None:
    held = point_at(damageable, 0)
    ours = damageable.results[1].published
    remedy = "run the night again to be compared with what it names now"
    with pytest.raises(PointerMoved, match=remedy), watched_by(Rival(damageable)):
        plain_night(damageable.config, ours.night)
    assert damageable.pointer.release == held.release
    assert damageable.pointer.generation == held.generation + 2

    again = plain_night(damageable.config, ours.night)
    assert (again.published.release, again.published.promoted) == (ours.release, True)
    assert damageable.pointer.release == ours.release


def damage(world: Finished, release: str, name: str) -> None:
    """Flip a bit in the middle of one file of a release."""
    manifest = read_manifest(world.store, "tiny", release)
    digest = next(file.sha256 for file in manifest.files if file.name == name)
    path = world.store.local_path(blob_key("tiny", digest))
    assert path is not None
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_tampered_release_is_refused_and_the_old_one_keeps_serving(damageable: Finished) -> None:
    old, new = (result.published.release for result in damageable.results)
    point_at(damageable, 0)
    with Ranker(damageable.config.store, "tiny", device="cpu") as ranker:
        damage(damageable, new, "bank.bin")
        point_at(damageable, 1)
        assert not ranker.refresh()
        assert ranker.release == old
        assert "bank.bin" in str(ranker.refusal)
        point_at(damageable, 0)
        assert not ranker.refresh()
        assert ranker.refusal is None
    point_at(damageable, 1)
    with pytest.raises(ReleaseRefused, match=r"bank\.bin"):
        Ranker(damageable.config.store, "tiny", device="cpu")


def test_a_damaged_pointer_is_an_error_of_both_sides_and_stays_as_evidence(damageable: Finished) -> None:
    path = damageable.store.local_path(pointer_key("tiny"))
    assert path is not None
    path.write_bytes(path.read_bytes()[:-20])
    before = damageable.published()
    with pytest.raises(ReleaseRefused, match=r"current\.json"):
        Ranker(damageable.config.store, "tiny", device="cpu")
    with pytest.raises(ReleaseRefused, match=r"current\.json"):
        plain_night(damageable.config, damageable.next_night)
    assert damageable.published() == before


@pytest.mark.parametrize("name", ["base.safetensors", "vocabulary.parquet"])
def test_a_tampered_parent_stops_the_next_night(damageable: Finished, tmp_path: Path, name: str) -> None:
    """On a host that has no verified copy of its own."""
    parent = damageable.results[1].published.release
    damage(damageable, parent, name)
    before = damageable.published()
    elsewhere = damageable.config.model_copy(update={"scratch": str(tmp_path / "scratch")})
    with pytest.raises(ObjectCorrupt) as caught:
        plain_night(elsewhere, damageable.next_night)
    for words in (f"{name} of release {parent[:12]}", "expected", "restore it", "tiny/work/export/"):
        assert words in str(caught.value)
    assert damageable.published() == before
