"""Requests with feedback: what a caller may pass, which graphs answer, and what is refused."""

import json
import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from tasks.clients.object_store import open_store
from tasks.data.contract import DataConfig
from tasks.errors import ReleaseRefused, RequestRejected
from tasks.release.interface import InputSpec, Objective, read_interface
from tasks.release.lookups import objectives
from tasks.release.manifest import Manifest, content_digest
from tasks.release.moves import challenge
from tasks.release.pointer import promote
from tasks.release.publishing import publish_release
from tasks.release.strict_json import Reader
from tasks.serving import loaded
from tasks.serving.feedback import bounds_of
from tasks.serving.loaded import load
from tasks.serving.metrics import Metrics
from tasks.serving.ranker import Ranker
from tasks.serving.requests import read_request
from tasks.serving.runners import Whole
from tasks.serving.sessions import Engine
from tests.release.test_schemas import accepts
from tests.releases import (
    COLUMNS,
    FEEDBACK,
    NIGHT,
    PIPELINE,
    UNSOLVABLE,
    Made,
    bounded,
    make_release,
    next_night,
    shared_feedback_graph,
    shared_graph,
    with_variants,
)

LEAST = -(2**63)


def _given(name: str, dtype: str, of: str, values: int | None = None) -> InputSpec:
    missing = {"int64": LEAST, "string": "", "float32": None}[dtype]
    return InputSpec(name, "feedback", dtype, "", missing, None, values, of, optional=True, rows=3)


SPECS = (
    InputSpec("user", "request", "string", "", ""),
    InputSpec("item", "candidate", "int64", "", LEAST),
    InputSpec("tags", "candidate", "string", "", "", values=2),
    _given("feedback_item", "int64", "item"),
    _given("feedback_tags", "string", "tags", 2),
    _given("feedback_liked", "float32", "liked"),
    _given("feedback_stars", "float32", "stars"),
)
PLAIN = {"user": ["ann", "bob", "eve"], "item": [[1], [2], [3]], "tags": [[["x"]], [[]], [["y"]]]}
BROUGHT = {
    "feedback_item": [[7, 8, 9, 10], [7], None],
    "feedback_tags": [[["x", "y"], [], ["x"], []], [None], []],
    "feedback_liked": [[1, None, 0, 1], [True], None],
    "feedback_stars": [[4.5, 3, None, 1], [None], []],
}
BINARY = (True, False)


def test_the_newest_rows_are_taken_and_short_feedback_is_filled_up():
    arrays, shape = read_request(SPECS, json.loads(json.dumps(PLAIN | BROUGHT)), binary=BINARY)
    assert shape == (3, 1)
    assert arrays["feedback_item"].tolist() == [[7, 8, 9], [7, LEAST, LEAST], [LEAST] * 3]
    assert arrays["feedback_tags"].tolist()[0] == [["x", "y"], ["", ""], ["x", ""]]
    liked = np.array([[1, np.nan, 0], [1, np.nan, np.nan], [np.nan] * 3], np.float32)
    np.testing.assert_array_equal(arrays["feedback_liked"], liked, strict=True)
    stars = np.array([[4.5, 3, np.nan], [np.nan] * 3, [np.nan] * 3], np.float32)
    np.testing.assert_array_equal(arrays["feedback_stars"], stars, strict=True)


def test_arrays_may_be_filled_up_already():
    lists, _ = read_request(SPECS, PLAIN | BROUGHT, binary=BINARY)
    filled = {name: lists[name] for name in BROUGHT}
    again, _ = read_request(SPECS, PLAIN | filled, binary=BINARY)
    for name, values in lists.items():
        np.testing.assert_array_equal(again[name], values, err_msg=name, strict=True)


@pytest.mark.parametrize(
    "brought",
    [
        {},
        dict.fromkeys(BROUGHT),
        {name: [None, [], None] for name in BROUGHT},
        BROUGHT | {"feedback_liked": [[None] * 4, [None], []], "feedback_stars": [[None] * 4, [None], []]},
    ],
)
def test_where_nobody_brings_a_label_there_is_no_feedback(brought):
    arrays, _ = read_request(SPECS, PLAIN | brought, binary=BINARY)
    assert arrays.keys() == PLAIN.keys()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"feedback_stars": None}, "brings feedback in .* and lacks feedback_stars; give every column"),
        (
            {"feedback_liked": [[1], [1], None]},
            "feedback of request 0 has 4 rows in 'feedback_tags' and 1 in 'feedback_l",
        ),
        ({"feedback_liked": [[2, 0, 0, 1], [1], None]}, "label 2.0 in row 0 of request 0, expected 0 or 1, or None"),
        ({"feedback_liked": [[1, 0, 0.5, 1], [1], None]}, "label 0.5 in row 2 of request 0, expected 0 or 1"),
        (
            {"feedback_stars": [[1, 2, 3, 4], [np.inf], None]},
            "label inf in row 0 of request 1, expected a finite number",
        ),
        (
            {"feedback_stars": [[1, 1e300, 3, 4], [1], None]},
            "label inf in row 1 of request 0, expected a finite number",
        ),
        ({"feedback_item": [["7"] * 4, [7], None]}, "'feedback_item' holds '7' of type str, expected int64"),
        ({"feedback_item": 7}, "'feedback_item' is 7 of type int, expected a list per request"),
        ({"feedback_item": [7, [7], None]}, "'feedback_item' holds 7 of type int for request 0, expected a list"),
        ({name: values[:2] for name, values in BROUGHT.items()}, "has feedback of 2 requests, expected 3; give None"),
        ({"feedback_tags": [[["x", "y", "z"], [], [], []], [None], []]}, "'feedback_tags' holds a list of 3 values"),
        (
            {"feedback_tags": [[["\udfff"], [], [], []], [None], []]},
            "'feedback_tags' holds a string with half of a surr",
        ),
        ({"feedback_age": [[1]]}, "holds feedback_age, which the release does not know"),
    ],
)
def test_feedback_that_means_nothing_is_rejected(changed, told):
    with pytest.raises(RequestRejected, match=told):
        read_request(SPECS, PLAIN | BROUGHT | changed, binary=BINARY)


def test_labels_of_ratings_lie_within_bounds():
    for label, bound in ((5.5, (1.0, 5.0)), (0.5, (1.0, 5.0)), (-1e30, bounds_of(Objective("stars", "rating")))):
        told = re.escape(
            f"the label {np.float32(label)} in row 2 of request 0, expected a number from {bound[0]:.0f} to"
        )
        with pytest.raises(RequestRejected, match=told):
            read_request(
                SPECS,
                PLAIN | BROUGHT | {"feedback_stars": [[4, 3, label, 1], [1], None]},
                binary=BINARY,
                bounds=((-1e6, 1e6), bound),
            )
    for label in (0.1, 0.7):  # neither is a number of float32
        arrays, _ = read_request(
            SPECS,
            PLAIN | BROUGHT | {"feedback_stars": [[label] * 4, [None], None]},
            binary=BINARY,
            bounds=((-1e6, 1e6), (label, label)),
        )
        assert arrays["feedback_stars"][0, 0] == np.float32(label)


def test_bounds_are_the_contracts_or_a_million():
    def objective(minimum: float | None, maximum: float | None) -> Objective:
        columns = [*COLUMNS["full"][:4], {**COLUMNS["full"][4], "minimum": minimum, "maximum": maximum}]
        outcomes = [{"name": "stars", "column": "stars", "kind": "rating"}, {"name": "liked", "column": "liked"}]
        data = DataConfig.model_validate({"source": "lake", "columns": columns, "objectives": outcomes})
        first, second = objectives(data)
        assert second == Objective("liked", "binary")
        return first

    for said, expected in (
        ((1, 5), (1.0, 5.0)),
        ((None, None), (-1e6, 1e6)),
        ((-np.inf, np.inf), (-1e6, 1e6)),
        ((0, None), (0.0, 1e6)),
        ((3e6, None), (3e6, 4e6)),
        ((None, 10), (-1e6, 10.0)),
        ((None, -3e6), (-4e6, -3e6)),
        ((0, 1e9), (0.0, 1e9)),
    ):
        assert bounds_of(objective(*said)) == expected


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A release that takes feedback."""
    solved = shared_feedback_graph(tmp_path_factory, "full")
    folder = tmp_path_factory.mktemp("feedback") / "release"
    return make_release(folder, shared_graph(tmp_path_factory, "full"), "full", with_feedback=solved)


@pytest.fixture(scope="module")
def ranker(made: Made, tmp_path_factory: pytest.TempPathFactory):
    """A ranker that serves it."""
    store = open_store(str(tmp_path_factory.mktemp("store")))
    publish_release(store, PIPELINE, made.folder, made.manifest, {})
    promote(store, PIPELINE, made.manifest.release, NIGHT, token=1)
    with Ranker(store, PIPELINE, device="cpu") as opened:
        yield opened


def test_golden_requests_with_feedback_are_answered(made, ranker):
    with_feedback = [one for one in made.golden if "feedback_item" in one.inputs]
    assert len(with_feedback) == 4
    for one in made.golden:
        np.testing.assert_allclose(ranker.score(dict(one.inputs)), one.scores, atol=1e-4, rtol=1e-4)
    plain = {name: values for name, values in with_feedback[0].inputs.items() if "feedback" not in name}
    assert np.abs(ranker.score(plain) - with_feedback[0].scores).max() > 1e-2


def test_requests_with_and_without_feedback_share_a_batch(made, ranker):
    one = next(one for one in made.golden if one.scores.shape[0] == 4 and "feedback_item" in one.inputs)
    whole = ranker.score(dict(one.inputs))
    for at in range(4):
        alone = {name: values[at : at + 1] for name, values in one.inputs.items()}
        np.testing.assert_allclose(ranker.score(alone)[0], whole[at], atol=1e-5, rtol=1e-5)
    # The last brings none: what he is told is what he would be told without.
    plain = {name: values[3:] for name, values in one.inputs.items() if "feedback" not in name}
    np.testing.assert_allclose(ranker.score(plain)[0], whole[3], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_whoever_brings_no_feedback_is_answered_as_if_he_were_alone(made, tmp_path: Path, variant):
    """To the bit, also where the smaller graph serves, which takes no feedback; who brings some is solved by fp32."""
    smaller = with_variants(made, tmp_path / "files")
    release = load(smaller.folder, smaller.manifest, "cpu", Engine(threads=1), variant)
    one = next(one for one in made.golden if one.scores.shape[0] == 4 and "feedback_item" in one.inputs)
    inputs, shape = dict(one.inputs), one.scores.shape[:2]
    whole = release.run(inputs, shape)
    plain = {name: values for name, values in inputs.items() if "feedback" not in name}
    (silent,) = np.flatnonzero(
        np.isnan(inputs["feedback_liked"]).all(axis=1) & np.isnan(inputs["feedback_stars"]).all(axis=1)
    )
    alone = {name: values[[silent]] for name, values in plain.items()}
    np.testing.assert_array_equal(whole[silent], release.run(alone, (1, shape[1]))[0])
    solved = load(smaller.folder, smaller.manifest, "cpu", Engine(threads=1)).run(inputs, shape)
    brings = np.arange(len(whole)) != silent
    np.testing.assert_allclose(whole[brings], solved[brings], atol=1e-6, rtol=1e-6)
    assert (np.abs(whole[silent] - solved[silent]).max() > 1e-5) == (variant == "int8")


def test_who_has_liked_a_genre_is_told_of_more_of_it(made, ranker):
    request = dict(made.golden[2].inputs)
    items, genres = request["item"][0].tolist(), request["genre"][0].tolist()
    years = request["year"][0].tolist()
    says = {
        "feedback_item": [items[:FEEDBACK]],
        "feedback_genre": [genres[:FEEDBACK]],
        "feedback_year": [years[:FEEDBACK]],
        "feedback_stars": [[None] * FEEDBACK],
    }
    liked, hated = (
        ranker.score(request | says | {"feedback_liked": [[value] * FEEDBACK]})[0, :, 0] for value in (1, 0)
    )
    assert (liked[:FEEDBACK] > hated[:FEEDBACK]).all()


def test_an_interface_with_feedback_is_read_strictly(made):
    told = json.loads((made.folder / "interface.json").read_bytes())
    assert read_interface(Reader("it"), told) == made.manifest.interface
    given = [at for at, one in enumerate(told["inputs"]) if one["per"] == "feedback"]
    assert told["inputs"][given[0]]["rows"] == FEEDBACK
    for change in (
        lambda inputs: inputs.pop(given[0]),
        lambda inputs: inputs.pop(given[-1]),
        lambda inputs: inputs[given[0]].pop("rows"),
        lambda inputs: inputs[given[0]].update(rows=FEEDBACK + 1),
        lambda inputs: inputs[given[1]].update(optional=False),
        lambda inputs: inputs[given[2]].update(of="genre"),
        lambda inputs: [inputs[at].update(rows=0) for at in given],
        lambda inputs: inputs[0].update(rows=FEEDBACK),
        lambda inputs: inputs[given[0]].update(per=["feedback"]),
    ):
        inputs = json.loads(json.dumps(told["inputs"]))
        change(inputs)
        with pytest.raises(ReleaseRefused):
            read_interface(Reader("it"), told | {"inputs": inputs})


def test_a_manifest_with_feedback_fits_its_schema(made):
    told = json.loads(made.manifest.serialise())
    assert accepts("manifest", told)
    inputs = told["interface"]["inputs"]
    given = next(one for one in inputs if one["per"] == "feedback")
    for odd in ("of", "rows", "optional"):
        kept = given.pop(odd)
        assert not accepts("manifest", told), odd
        given[odd] = kept
    given["rows"] = 0
    assert not accepts("manifest", told)
    given["rows"] = FEEDBACK
    inputs[0]["rows"] = FEEDBACK
    assert not accepts("manifest", told)


def test_a_release_whose_graphs_with_feedback_answer_otherwise_is_refused(made, tmp_path: Path, monkeypatch):
    for path in made.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    told = json.loads((tmp_path / "golden.json").read_bytes())
    last = told["requests"][-1]
    assert last["feedback"] == FEEDBACK
    last["scores"][0] += 0.01
    (tmp_path / "golden.json").write_bytes(json.dumps(told).encode())
    with pytest.raises(ReleaseRefused, match=r"golden request 13 is answered .* limit 0.001"):
        load(tmp_path, made.manifest, "cpu")
    monkeypatch.setattr(loaded, "FEEDBACK_TOLERANCE", 0.1)
    assert load(tmp_path, made.manifest, "cpu").feedback is not None
    told["requests"] = told["requests"][:10]
    (tmp_path / "golden.json").write_bytes(json.dumps(told).encode())
    with pytest.raises(ReleaseRefused, match=r"no golden request is one for model_feedback\.onnx"):
        load(tmp_path, made.manifest, "cpu")
    bare = [file for file in made.manifest.files if "feedback" not in file.name]
    lacking = replace(made.manifest, files=tuple(bare), release=content_digest(bare))
    with pytest.raises(ReleaseRefused, match="do not agree whether requests bring feedback"):
        Manifest.parse(lacking.serialise(), PIPELINE, lacking.release)
    plain = replace(made.manifest.interface, inputs=tuple(s for s in made.manifest.interface.inputs if not s.optional))
    (tmp_path / "interface.json").write_bytes(plain.serialise())
    assert load(tmp_path, replace(made.manifest, interface=plain), "cpu").feedback is None


@pytest.fixture
def wide(made, tmp_path: Path) -> tuple[Made, Made]:
    """The release, and another bank, of a contract that lets any label of a rating through."""
    other = next_night(made, tmp_path / "next", NIGHT + timedelta(days=1))
    return tuple(bounded(one, tmp_path / f"wide {n}", -3.4e38, 3.4e38) for n, one in enumerate((made, other)))


@pytest.mark.parametrize("batching", [False, True])
def test_feedback_that_cannot_be_solved_is_rejected_and_no_release_is_blamed(wide, tmp_path: Path, batching: bool):
    champion, challenger = wide
    store, registry = open_store(str(tmp_path)), CollectorRegistry()
    for one in wide:
        publish_release(store, PIPELINE, one.folder, one.manifest, {})
    promote(store, PIPELINE, champion.manifest.release, NIGHT, token=1)
    plain = {name: values for name, values in UNSOLVABLE.items() if "feedback" not in name}
    with Ranker(store, PIPELINE, device="cpu", batching=batching, events=Metrics(registry, PIPELINE)) as ranker:
        for rival in (None, challenger.manifest.release):
            if rival is not None:
                challenge(store, PIPELINE, rival, 10_000, "a try")
                ranker.refresh()
            for user in range(4):
                with pytest.raises(RequestRejected, match=r"feedback of 1 of 1 requests cannot be solved: .*numbers"):
                    ranker.score(UNSOLVABLE | {"user": [f"x{user}"]})
            assert np.isfinite(ranker.score(plain)).all()
            assert (ranker.challenger, ranker.warnings) == (rival, ())
    for role, outcome, count in (
        ("champion", "rejected", 8),
        ("champion", "failed", None),
        ("challenger", "failed", None),
    ):
        labels = {"pipeline": PIPELINE, "role": role, "outcome": outcome}
        assert registry.get_sample_value("nightrank_requests_total", labels) == count


def test_a_challenger_that_cannot_solve_what_the_champion_can_loses_with_the_second_user(
    wide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    champion, challenger = wide
    store, run = open_store(str(tmp_path)), Whole.run
    for one in wide:
        publish_release(store, PIPELINE, one.folder, one.manifest, {})
    promote(store, PIPELINE, champion.manifest.release, NIGHT, token=1)
    challenge(store, PIPELINE, challenger.manifest.release, 10_000, "a try")
    asked = UNSOLVABLE | {"feedback_stars": [[1.0, 2.0, 3.0, 4.0, 5.0]]}
    with Ranker(store, PIPELINE, device="cpu") as ranker:
        state, specs = ranker._follower.serving(), champion.manifest.interface.inputs
        answers = {
            user: state.release.run(*read_request(specs, asked | {"user": [user]}, binary=BINARY))
            for user in ("x1", "x2")
        }

        def bad(self: Whole, inputs):
            return run(self, inputs) * np.float32(np.nan if self is state.challenger.feedback else 1)

        monkeypatch.setattr(Whole, "run", bad)
        for user, expected in (("x1", challenger), ("x1", challenger), ("x2", None)):
            answer = ranker.answer(asked | {"user": [user]})
            np.testing.assert_allclose(answer.scores, answers[user], rtol=1e-6)
            assert answer.releases == (champion.manifest.release,)
            assert ranker.challenger == (expected and expected.manifest.release)
        assert "cannot be solved" in ranker.warnings[0]


def test_a_release_that_is_at_fault_without_feedback_too_is_refused(made, ranker, monkeypatch: pytest.MonkeyPatch):
    run = Whole.run
    monkeypatch.setattr(Whole, "run", lambda self, inputs: run(self, inputs) * np.float32(np.nan))
    asked = UNSOLVABLE | {"feedback_stars": [[1.0, 2.0, 3.0, 4.0, 5.0]]}
    with pytest.raises(ReleaseRefused, match="gives nan for request 0"):
        ranker.score(asked)


def test_a_label_beyond_every_rating_is_rejected(ranker):
    for label in (3.4e38, -1e30, 1.1e6):
        with pytest.raises(
            RequestRejected, match=r"'feedback_stars' holds the label .*from -1000000 to 1000000, or None"
        ):
            ranker.score(UNSOLVABLE | {"feedback_stars": [[1.0, label, 3.0, 4.0, 5.0]]})
