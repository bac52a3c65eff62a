"""Whole nights whose ranker attends to users' recent rows and whose adapters bend its layers: from the lake to the
ranker that answers, from a champion of another kind on, then from its own."""

import json
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from flows.config import RetrainConfig
from flows.nightly import NightResult
from tasks.champion import _nightly
from tasks.data.vocabulary import load as words
from tasks.learning.bank import Bank
from tasks.learning.base import load_base
from tasks.learning.exams import Night
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material
from tasks.meta_train import rows_of
from tasks.release.golden import reference_scores
from tasks.release.tables import read_tables
from tasks.serving.ranker import Ranker
from tasks.steps import open_workspace, record_of
from tasks.validate import clean_file
from tests.finished import Finished
from tests.steps.plain import plain_night

LENGTH, LEAST, DAY = 3, -(2**63), 86_400_000_000
NOON = 20_520 * DAY + DAY // 2
REQUEST: dict[str, Any] = {
    "user_id": ["user-001", "nobody", "user-007"],
    "market": ["north", None, "south"],
    "age": [30, None, 41],
    "item_id": [[100, 101], [102, 999], [103, 104]],
    "genre": [["comedy", "drama"]] * 3,
    "length": [["long", None]] * 3,
    "price": [[5.0, None], [1.0, 2.0], [3.0, 3.0]],
    "at": [NOON, NOON, NOON + 7],
    # More than are read, with an item that nobody knows; none; fewer, with labels and categories missing.
    "history_item_id": [[101, 999, 103, 104, 105], None, [107, 108]],
    "history_genre": [["drama", "comedy", "drama", "comedy", "drama"], [], ["drama", None]],
    "history_length": [["long", "short", "short", "long", "long"], None, [None, "short"]],
    "history_clicked": [[1, 0, 1, 0, 1], None, [None, 1]],
    "history_at": [[NOON - number * DAY for number in range(1, 6)], [], [NOON - DAY, None]],
}


def microseconds(value: Any) -> Any:
    """A time as requests say it; any other value as it is."""
    return round(value.timestamp() * 1_000_000) if isinstance(value, datetime) else value


def padded(name: str, given: list[Any]) -> np.ndarray:
    """A column of a request with nothing left to a reader."""
    if name in ("clicked", "age", "price"):
        missing: Any = np.nan
    else:
        missing = LEAST if name.endswith(("item_id", "at")) else ""
    if not name.startswith("history_"):
        values = np.array(given, object)
    else:
        missing = np.nan if name.endswith("clicked") else missing
        cut = [[*(one or [])][:LENGTH] for one in given]
        values = np.array([one + [missing] * (LENGTH - len(one)) for one in cut], object)
    values[values == np.array(None)] = missing
    return values.astype(object if missing == "" else np.int64 if missing == LEAST else np.float32)


def report_of(made: Finished, night: NightResult) -> dict[str, dict[str, str]]:
    """What the night's report says."""
    run = json.loads(made.store.get(f"tiny/releases/{night.published.release}/run.json").data)
    return dict(run["report"])


def test_two_nights_with_a_transformer_and_film(damageable: Finished) -> None:
    """The champion before is an `mlp`; the release answers as its network does; histories are told from the lake.

    Adapters bend the layers that read what attention finds, so that the little training of a test lets it matter.
    """
    changed = {
        "ranker": {"kind": "transformer", "history": LENGTH, "embedding": 4, "hidden": 8},
        "adapter": {"kind": "film"},
    }
    config = RetrainConfig.model_validate({**damageable.world.config, **changed})
    night = plain_night(config, damageable.next_night, override="the tests want it served")
    place, data = config.place(), config.data

    def record(step: str) -> Any:
        return record_of(place, next(ref for ref in night.steps if ref.step == step))

    folder = open_workspace(place).folder(record("export"), "release")
    told = report_of(damageable, night)["provenance"]
    assert "the parent's base does not fit" in told["training"]
    assert "precisions as configured" in told["training"]
    assert "was compared in both exams" in told["champion"]
    network = load_base({name: folder / name for name in ("base.safetensors", "base.json")}).network
    assert network.attention is not None
    assert json.loads((folder / "base.json").read_text())["format"] == 5
    weights = Bank.load(open_workspace(place).file(record("adapt-ship"), "bank.safetensors")).weights
    assert weights.shape[1:] == (1, 1 + 2 * 8)
    assert len(weights) > 10
    assert np.abs(weights[1:, :, 1:]).max() > 1e-3
    bank = np.fromfile(folder / "bank.bin", np.float32).reshape(-1, 1, network.width)

    def said_by_the_network(request: dict[str, np.ndarray]) -> np.ndarray:
        return reference_scores(network, bank, read_tables(data, folder), data, request)

    raw = {name: padded(name, values) for name, values in REQUEST.items()}
    with Ranker(damageable.world.config["store"], "tiny", device="cpu") as served:
        assert served.release == night.published.release
        manifest = served.manifest
        assert manifest.schema_version == 5
        said = served.score(json.loads(json.dumps(REQUEST)))
        np.testing.assert_allclose(said, said_by_the_network(raw), rtol=1e-5, atol=1e-5)
        liked = served.score({**REQUEST, "history_clicked": [[0, 0, 0, 1, 0], None, [0, 0]]})
        cut = {name: [None if one is None else one[:LENGTH] for one in REQUEST[name]] for name in list(REQUEST)[8:]}
        np.testing.assert_array_equal(served.score({**REQUEST, **cut}), said)
    assert (np.abs(liked - said).max(axis=(1, 2)) > 1e-4).tolist() == [True, False, True]

    # As tomorrow's night would ask it, about tonight's rows: each with a history that a loop over the lake finds.
    layout = record("prepare")
    rows, vocabularies = rows_of(place, layout), words(data, open_workspace(place).file(layout, "vocabulary.parquet"))
    tonight = Night.among(
        data, Ladder(rows, config.segments, data.user), Material(rows), damageable.next_night.toordinal()
    )
    clean = clean_file(place, record_of(place, night.validated))
    (replayed,) = _nightly(place, data, manifest, clean, rows, tonight, vocabularies).values()
    files = [clean_file(place, one) for one in open_workspace(place).records("validate")]
    lake = [one for file in files for one in pq.read_table(file).to_pylist()]
    users = vocabularies[data.user].decode(np.asarray(rows.user)[tonight.at]).to_pylist()
    place_of = {user: at for at, user in reversed([*enumerate(users)])}
    asked = sorted(
        (one for one in lake if one["at"].date() == damageable.next_night),
        key=lambda one: (place_of[one["user_id"]], one["at"]),
    )
    assert [one["user_id"] for one in asked] == users
    request: dict[str, list[Any]] = {name: [] for name in REQUEST}
    lengths = set()
    for one in asked:
        past = [row for row in lake if row["user_id"] == one["user_id"] and row["at"].date() < damageable.next_night]
        past = sorted(past, key=lambda row: row["at"], reverse=True)[:LENGTH]
        lengths.add(len(past))
        for name, values in request.items():
            if name.startswith("history_"):
                values.append([microseconds(row[name.removeprefix("history_")]) for row in past])
            else:
                visit = [row["at"] for row in asked if row["user_id"] == one["user_id"]]
                value = microseconds(min(visit) if name == "at" else one[name])
                values.append([value] if data.column(name).role in ("item", "candidate") else value)
    assert lengths == {0, LENGTH}
    expected = said_by_the_network({name: padded(name, values) for name, values in request.items()})
    np.testing.assert_allclose(replayed, expected[:, 0, 0], rtol=1e-5, atol=1e-5)

    following = damageable.world.nights[damageable.world.nights.index(damageable.next_night) + 1]
    second = plain_night(config, following, override="the tests want it served")
    told = report_of(damageable, second)["provenance"]
    assert "the parent's base" in told["training"]
    assert "does not fit" not in told["training"]
    assert f"release {night.published.release[:12]} was compared in both exams" in told["champion"]
    exams = record_of(place, second.verdict).notes["exams"][0]
    assert exams["nightly"]["champion"]["rows"] == second.validated.clean
    with Ranker(damageable.world.config["store"], "tiny", device="cpu") as served:
        assert served.release == second.published.release
