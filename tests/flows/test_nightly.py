"""A night end to end on the tiny world: what a ranker and a person see of it, and that it is remembered."""

import hashlib
import json
import re
from dataclasses import replace
from datetime import UTC, date, datetime
from html.parser import HTMLParser
from inspect import signature
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from prefect import Task

from flows import nightly
from flows.config import RetrainConfig
from flows.nightly import NightResult, night_of, nightly_retrain
from tasks.errors import ExpectationsFailed, InvalidConfig, NightMissing
from tasks.evaluate import exam_table
from tasks.learning.exams import CANDIDATE, column
from tasks.references import Place
from tasks.release.manifest import Manifest, blob_key, content_digest
from tasks.release.publishing import read_manifest
from tasks.releases import releases
from tasks.serving.ranker import Ranker
from tasks.steps import open_workspace
from tests.finished import Finished

STEPS = [
    "ingest", "validate", "prepare", "meta-train", "adapt-exam", "evaluate", "recommend", "retention", "judge",
    "adapt-ship", "export", "publish",
]  # fmt: skip


@pytest.fixture(scope="module")
def third(finished: Finished, tmp_path_factory: pytest.TempPathFactory, prefect: None) -> Finished:
    """The third night, by Prefect's engine, after two that were run before. Read only."""
    copied = finished.copy(tmp_path_factory.mktemp("third"))
    result = nightly_retrain(copied.config, copied.next_night)
    return replace(copied, results=(*copied.results, result))


@pytest.fixture(scope="module")
def result(third: Finished) -> NightResult:
    return third.results[-1]


@pytest.fixture(scope="module")
def manifest(third: Finished, result: NightResult) -> Manifest:
    return read_manifest(third.store, "tiny", result.published.release)


def beside(third: Finished, number: int, name: str) -> bytes:
    """What lies beside the manifest of one of the releases."""
    return third.store.get(f"tiny/releases/{third.results[number].published.release}/{name}").data


def file_of(third: Finished, manifest: Manifest, name: str) -> bytes:
    digest = next(file.sha256 for file in manifest.files if file.name == name)
    return third.store.get(blob_key("tiny", digest)).data


def test_the_steps_come_in_order(result: NightResult) -> None:
    assert [step.step for step in result.steps] == STEPS


def test_the_pointer_names_the_release_and_the_one_before(third: Finished, result: NightResult) -> None:
    pointer = third.pointer
    assert (pointer.release, pointer.night) == (result.published.release, third.next_night)
    assert pointer.previous == third.results[-2].published.release
    assert pointer.generation == 3
    assert result.published.promoted


def test_each_night_starts_from_the_one_before(third: Finished) -> None:
    parents = [json.loads(beside(third, number, "run.json"))["parent"] for number in range(3)]
    assert parents == [None, *(result.published.release for result in third.results[:-1])]


def test_the_manifest_says_who_is_served_by_what_and_what_lies_beside(third: Finished, manifest: Manifest) -> None:
    listed = pq.read_table(BytesIO(file_of(third, manifest, "segments.parquet")))
    columns = [one.columns for one in manifest.interface.levels]
    assert [one.columns for one in manifest.segments] == columns == [("user_id",), ("market",)]
    for number, (level, spec) in enumerate(zip(manifest.segments, manifest.interface.levels, strict=True)):
        rows = listed.filter(pc.equal(listed["level"], number))
        support = rows.filter(pc.equal(rows["source"], "own"))["support"].to_pylist()
        assert (level.kind, level.own) == ("ridge", spec.segments)
        assert level.own + level.parent + level.rolled_back == level.segments
        assert level.support is not None
        assert (level.support.sum, level.own) == (sum(support), len(support))
        assert level.support.median == sorted(support)[len(support) // 2] or len(support) % 2 == 0
    assert {one.name for one in manifest.beside} == {"run.json", "report.html", "lift.parquet"}
    for one in manifest.beside:
        data = beside(third, 2, one.name)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (one.bytes, one.sha256)
    assert manifest.requires is not None
    assert manifest.requires.onnxruntime == "1.31"
    assert manifest.requires.opsets[""] >= 20


def test_vocabularies_only_grow(third: Finished) -> None:
    def keys(number: int, name: str) -> list[object]:
        manifest = read_manifest(third.store, "tiny", third.results[number].published.release)
        path = third.store.local_path(
            blob_key("tiny", next(file.sha256 for file in manifest.files if file.name == "vocabulary.parquet"))
        )
        table = pq.read_table(path, partitioning=None)
        found: list[object] = table.filter(pc.equal(table["column"], name)).to_pylist()
        return found

    for name in ("user_id", "item_id", "market"):
        for number in (0, 1):
            before, after = keys(number, name), keys(number + 1, name)
            assert after[: len(before)] == before


def test_the_graph_is_traced_once_for_all_nights(third: Finished) -> None:
    """Though each has more users than the one before."""
    workspace = open_workspace(third.config.place())
    assert len(list(workspace.records("export"))) == 3
    assert all(third.world.newcomers[result.night] for result in third.results)
    (graph,) = workspace.records("graph")
    assert "for night" not in graph.notes["made_from"]


def test_the_release_id_is_the_digest_of_files_that_are_what_the_manifest_says(
    third: Finished, manifest: Manifest, result: NightResult
) -> None:
    for file in manifest.files:
        stored = third.store.get(blob_key("tiny", file.sha256)).data
        assert (len(stored), hashlib.sha256(stored).hexdigest()) == (file.bytes, file.sha256)
    assert content_digest(manifest.files) == result.published.release == manifest.release
    assert {"model.onnx", "lookup.onnx", "score.onnx", "golden.json"} <= {file.name for file in manifest.files}


def test_a_ranker_says_what_the_torch_network_said(third: Finished, manifest: Manifest) -> None:
    golden = json.loads(file_of(third, manifest, "golden.json"))
    with Ranker(third.config.store, "tiny", device="cpu") as ranker:
        assert (ranker.release, ranker.night) == (manifest.release, third.next_night)
        for one in golden["requests"]:
            shapes = {"request": one["shape"][:1], "candidate": one["shape"][:2]}
            request = {
                spec.name: np.array(one["inputs"][spec.name], object).reshape(shapes[spec.per])
                for spec in manifest.interface.inputs
            }
            expected = np.array(one["scores"]).reshape(one["shape"])
            assert np.abs(ranker.score(request) - expected).max() <= 1e-5
    assert len(golden["requests"]) >= 10


def test_users_get_what_their_own_rows_say(third: Finished) -> None:
    """Users alike in all but their past: who liked long films gets the long comedy first, the others the short."""
    world = third.world
    seen = sorted(name for night in world.nights[:6] for name in world.newcomers[night])
    taste = np.array([world.tastes[name] for name in seen])
    many = len(seen)
    request = {
        "user_id": seen,
        "market": ["north"] * many,
        "age": [40] * many,
        "item_id": [[100, 102]] * many,
        "genre": [["comedy", "comedy"]] * many,
        "length": [["long", "short"]] * many,
        "price": [[5.0, 5.0]] * many,
    }
    with Ranker(third.config.store, "tiny", device="cpu") as ranker:
        scores = ranker.score(request)[:, :, 0]
    gap = scores[:, 0] - scores[:, 1]
    assert gap[taste > 0].mean() - gap[taste < 0].mean() > 0.1


def test_the_exam_table_is_the_night_and_the_scores_come_from_it(third: Finished, result: NightResult) -> None:
    table = exam_table(third.config.place(), next(step.key for step in result.steps if step.step == "evaluate"))
    assert table.num_rows == result.validated.clean == third.world.rows[third.next_night]
    said = table[column("nightly", CANDIDATE, "clicked")].to_numpy().astype(np.float64)
    clicked = table["label/clicked"].to_numpy()
    loss = -(clicked * np.log(said) + (1 - clicked) * np.log(1 - said)).mean()
    shown = next(row for row in result.verdict.scores if (row.exam, row.method) == ("nightly", "adapted"))
    assert shown.rows == table.num_rows
    assert shown.log_loss == pytest.approx(loss, abs=1e-5)


def test_adaptation_beats_zero_steps_in_both_exams(result: NightResult) -> None:
    """The world is made so that nothing else can get below `blind_log_loss`."""
    losses = {(row.exam, row.method): row.log_loss for row in result.verdict.scores}
    for exam in ("nightly", "first contact, 5 rows"):
        assert losses[exam, "adapted"] < losses[exam, "zero steps"]


def test_every_baseline_and_the_champion_are_examined(result: NightResult) -> None:
    methods = {row.method for row in result.verdict.scores if row.exam == "nightly"}
    assert methods == {
        "adapted", "zero steps", "global rate", "popularity", "bias + offset", "matrix factorisation", "item-kNN",
        "logistic regression", "champion",
    }  # fmt: skip


def test_the_verdict_has_reasons(result: NightResult) -> None:
    assert result.verdict.go
    assert any(reason.startswith("against champion: ") for reason in result.verdict.reasons)


def test_the_bad_row_is_in_quarantine_and_told(third: Finished) -> None:
    second = third.results[1]
    assert (second.validated.bad, second.validated.reasons) == (1, {"outside_night": 1})
    assert b"outside_night" in beside(third, 1, "report.html")


class Links(HTMLParser):
    """Everything that a page fetches or runs."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        fetching = ("src", "srcset", "data", "poster", "action") if tag != "link" else ("href",)
        self.fetched += [value or "" for name, value in attrs if name in fetching]
        self.fetched += [tag] if tag in ("script", "iframe", "object", "embed") else []


def test_the_report_is_one_self_contained_page(third: Finished, result: NightResult) -> None:
    assert Path(result.published.report).is_file()
    page = Path(result.published.report).read_text()
    links = Links()
    links.feed(page)
    assert links.fetched == []
    assert not re.search(r"url\(|@import", page)
    for words in (result.published.release[:12], third.next_night.isoformat(), "<svg", "matrix factorisation"):
        assert words in page
    assert beside(third, 2, "data_docs/index.html")


def test_the_token_of_the_lease_goes_into_the_pointer_and_grows(third: Finished) -> None:
    moves = [
        json.loads(json.loads(third.store.get(key).data)["pointer"])["fencing_token"]
        for key in third.store.list("tiny/ledger/")
    ]
    assert len(moves) == 3
    assert moves == sorted(set(moves))


def test_each_night_says_what_its_base_retains_of_a_golden_night(third: Finished) -> None:
    told = [json.loads(beside(third, number, "run.json"))["report"]["retention"] for number in range(3)]
    assert told[0]["told"] == "not compared: there is no parent, the chain begins here"
    assert [result.retention.told for result in third.results] == [one["told"] for one in told]
    for number in (1, 2):
        golden = {date.fromisoformat(night): whole for night, whole in told[number]["nights"]}
        assert min(golden) == third.world.nights[0]
        assert max(golden) < third.results[number].night
        assert golden[min(golden)]["rows"] == third.world.rows[third.world.nights[0]]
        against = {(one["k"], one["method"]): one for one in told[number]["comparisons"]}
        assert against[0, "parent"]["estimate"] != 0.0
        rows = sum(whole["rows"] for whole in golden.values())
        assert against[0, "parent"]["rows"] == rows > against[5, "zero steps"]["rows"] > 0
        assert f"on {len(golden)} golden night" in told[number]["told"]
        page = beside(third, number, "report.html").decode()
        assert "What is retained" in page
        assert told[number]["told"] in page
    pin = json.loads(third.store.get(f"tiny/state/golden/night={third.world.nights[0]}.json").data)
    assert pin["first_compared"] == third.results[1].night.isoformat()


def test_releases_are_listed_by_night(third: Finished) -> None:
    rows = releases(third.config.place())
    assert [row.release for row in rows] == [result.published.release for result in third.results]
    assert [row.champion for row in rows] == [False, False, True]


@pytest.mark.usefixtures("prefect")
def test_the_night_again_changes_nothing(third: Finished, result: NightResult) -> None:
    def written() -> dict[str, bytes]:
        return {key: third.store.get(key).data for key in third.store.list("tiny/") if key != "tiny/lease"}

    before = written()
    again = nightly_retrain(third.config, third.next_night)
    assert [step.step for step in again.steps if not step.reused] == []
    assert again.published.release == result.published.release
    assert written() == before


@pytest.mark.usefixtures("prefect")
def test_a_dict_a_path_and_a_model_are_the_same_config(third: Finished, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(third.config.model_dump(mode="json")))
    for given in (third.config.model_dump(mode="json"), str(path)):
        again: NightResult = nightly_retrain(given, third.next_night.isoformat())  # type: ignore[call-overload]
        assert all(step.reused for step in again.steps)


@pytest.mark.usefixtures("prefect")
def test_without_a_night_it_is_the_one_before_today(third: Finished) -> None:
    yesterday = {nightly.night_of(datetime.now(UTC), third.config)}
    with pytest.raises(NightMissing) as caught:  # the world is older
        nightly_retrain(third.config)
    yesterday |= {nightly.night_of(datetime.now(UTC), third.config)}  # midnight may have passed
    assert any(f"night {night} " in str(caught.value) for night in yesterday)


@pytest.mark.usefixtures("prefect")
def test_an_error_of_the_family_comes_out_as_itself(damageable: Finished) -> None:
    for path in damageable.files_of(damageable.next_night):
        table = pq.read_table(path, partitioning=None)
        stars = pc.add(table["stars"], 10.0)
        pq.write_table(table.set_column(table.column_names.index("stars"), "stars", stars), path)
    with pytest.raises(ExpectationsFailed, match="range:stars"):
        nightly_retrain(damageable.config, damageable.next_night)


@pytest.mark.usefixtures("prefect")
def test_a_config_that_is_not_there_is_said_to_be_so() -> None:
    with pytest.raises(InvalidConfig, match="does not exist"):
        nightly_retrain("no/such.yaml", date(2026, 3, 5))


VERBS: list[Task[..., Any]] = [found for found in vars(nightly).values() if isinstance(found, Task)]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_a_verb_gets_a_place_and_its_own_sections_and_never_the_whole_config(verb: Task[..., Any]) -> None:
    annotations = [parameter.annotation for parameter in signature(verb.fn).parameters.values()]
    assert annotations[0] is Place
    assert RetrainConfig not in annotations


@pytest.mark.parametrize(
    ("scheduled", "zone", "lag", "night"),
    [
        (datetime(2026, 3, 6, 2, 0, tzinfo=UTC), "UTC", 1, date(2026, 3, 5)),
        (datetime(2026, 3, 6, 2, 0, tzinfo=UTC), "UTC", 0, date(2026, 3, 6)),
        (datetime(2026, 3, 5, 23, 30, tzinfo=UTC), "Europe/Berlin", 1, date(2026, 3, 5)),
        (datetime(2026, 3, 6, 2, 0, tzinfo=UTC), "America/New_York", 1, date(2026, 3, 4)),
        # Clocks go forward at 01:00 UTC: still one calendar day a night.
        (datetime(2026, 3, 29, 0, 30, tzinfo=UTC), "Europe/Berlin", 1, date(2026, 3, 28)),
        (datetime(2026, 3, 29, 22, 30, tzinfo=UTC), "Europe/Berlin", 1, date(2026, 3, 29)),
    ],
)
def test_the_night_is_the_scheduled_local_date_less_the_lag(
    finished: Finished, scheduled: datetime, zone: str, lag: int, night: date
) -> None:
    data = finished.config.data.model_copy(update={"time_zone": zone})
    assert night_of(scheduled, finished.config.model_copy(update={"data": data, "night_lag_days": lag})) == night
