"""Feedback in requests: the look-up against its oracle, and the graphs against the solver of the bank."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tasks.errors import ParityBroken
from tasks.learning.solvers import solve
from tasks.release import golden as golden_requests
from tasks.release.feedback_inputs import feedback_columns, feedback_labels
from tasks.release.golden import check_parity, draw_requests, make_golden
from tasks.release.graphs import EXTERNAL, export
from tasks.release.lookups import encode, input_specs, lookup_graph, wires
from tasks.release.nodes import ENCODER_KEYS
from tasks.release.scorer import Scorer, Solving
from tasks.release.tables import ServingTables, read_tables, write_tables
from tests.release.test_lookups import run
from tests.releases import (
    FEEDBACK,
    Made,
    make_parts,
    make_release,
    record_answers,
    shared_feedback_graph,
    shared_graph,
    solving_of,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A release that takes feedback."""
    graphs = (shared_graph(tmp_path_factory, "full"), "full")
    solved = shared_feedback_graph(tmp_path_factory, "full")
    return make_release(tmp_path_factory.mktemp("feedback") / "release", *graphs, with_feedback=solved)


@pytest.fixture(scope="module")
def listed(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """One whose items have lists of categories and vectors, as have requests; of a small system, which traces soon."""
    folder, (data, network, bank, tables, rows) = tmp_path_factory.mktemp("lists"), make_parts("lists")
    tables = replace(tables, feedback=3)
    solving = Solving(3, 1, solving_of(data, network).precision)
    export(network, bank, tables, data, folder, solving=solving)
    golden = make_golden(network, bank, tables, data, draw_requests(data, rows, feedback=3), solving)
    return replace(
        made,
        **{"data": data, "network": network, "bank": bank, "tables": tables, "rows": rows, "golden": golden},
        **{"folder": folder, "parity": check_parity(data, tables, golden, folder), "solving": solving},
    )


@pytest.fixture(params=["made", "listed"])
def each(request: pytest.FixtureRequest) -> Made:
    """Either."""
    found: Made = request.getfixturevalue(request.param)
    return found


def session(made: Made, name: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(made.folder / name, providers=["CPUExecutionProvider"])


def asked(made: Made, requests: int = 1) -> dict[str, np.ndarray]:
    """A golden request of so many, with feedback in all of its rows."""
    first = feedback_labels(made.data)[0]
    request = next(dict(one.inputs) for one in made.golden if len(one.inputs.get(first, ())) == requests)
    for name in feedback_labels(made.data):
        request[name] = np.nan_to_num(request[name], nan=1.0)
    return request


def test_the_inputs_are_those_of_a_candidate_and_a_label_for_each_objective(made):
    specs = {spec.name: spec for spec in input_specs(made.data, feedback=FEEDBACK) if spec.per == "feedback"}
    assert {name: (spec.dtype, spec.of) for name, spec in specs.items()} == {
        "feedback_item": ("int64", "item"),
        "feedback_genre": ("string", "genre"),
        "feedback_year": ("float32", "year"),
        "feedback_liked": ("float32", "liked"),
        "feedback_stars": ("float32", "stars"),
    }
    assert all(spec.optional and spec.rows == FEEDBACK for spec in specs.values())
    assert specs["feedback_item"].shape == ("requests", "feedback")
    assert not [spec for spec in input_specs(made.data) if spec.optional]


@pytest.mark.parametrize("refused", [(), (2, 4, 6, 8, 10)])
@pytest.mark.parametrize("kind", ["full", "lean", "clashing", "lists"])
def test_the_look_up_equals_its_oracle(kind, refused):
    data, _, _, tables, rows = make_parts(kind)
    levels = (replace(tables.levels[0], rolled_back=np.array(refused, np.int64)), *tables.levels[1:])
    tables = replace(tables, levels=levels, feedback=FEEDBACK)
    names = wires(data, tables)
    graph = lookup_graph(data, tables, names, feedback=True).SerializeToString()
    brought = 0
    for request in (one for seed in (0, 1, 2) for one in draw_requests(data, rows, seed, feedback=FEEDBACK)):
        if feedback_labels(data)[0] not in request:
            assert "parent_slot" not in encode(data, tables, request)
            continue
        found, expected = run(graph, dict(request)), encode(data, tables, request)
        assert names.between(True).keys() == expected.keys()
        for role, name in names.between(True).items():
            np.testing.assert_array_equal(found[name], expected[role], err_msg=role)
        said = np.stack([request[name] for name in feedback_labels(data)], axis=-1)
        hit = np.isin(tables.ids(data.user, request[data.user]), refused)
        np.testing.assert_array_equal(expected["feedback_labels"][~hit], said[~hit])
        assert np.isnan(expected["feedback_labels"][hit]).all()
        brought += (~np.isnan(said)).any(axis=(1, 2))[hit if refused else ~hit].sum()
    assert brought


def test_the_slot_above_is_that_of_the_coarser_segment(made):
    request = asked(made)
    found = encode(made.data, made.tables, request)
    coarser = replace(made.tables, levels=made.tables.levels[1:])
    np.testing.assert_array_equal(found["parent_slot"], encode(made.data, coarser, request)["slot"])


def test_both_pairs_read_the_same_weights(made):
    files = {
        name: {
            one.name: tuple(sorted((entry.key, entry.value) for entry in one.external_data))
            for one in onnx.load(made.folder / name, load_external_data=False).graph.initializer
            if one.external_data
        }
        for name in ("score.onnx", "score_feedback.onnx", "model.onnx", "model_feedback.onnx")
    }
    assert files["score.onnx"] == files["score_feedback.onnx"]
    assert files["model_feedback.onnx"].items() >= files["score.onnx"].items()
    assert {dict(one)["location"] for one in files["score_feedback.onnx"].values()} == set(EXTERNAL.values())
    sizes = [(made.folder / name).stat().st_size for name in ("score.onnx", "score_feedback.onnx")]
    assert sizes[1] < sizes[0] + 400_000


def by_hand(made: Made, request: dict[str, np.ndarray]) -> np.ndarray:
    """Scores under weights that the bank's solver gives for the rows of feedback, in its own precision."""
    assert made.solving is not None
    plain = Scorer(made.network, made.bank, made.tables.statistics).eval()
    data, tables = made.data, made.tables
    rows = {name: request[brought] for name, brought in feedback_columns(data).items()}
    seen = record_answers(plain.network, len(request[data.user]))
    for part in ({**request, **rows}, request):
        bare = {name: values for name, values in part.items() if not name.startswith("feedback_")}
        encoded = {role: torch.from_numpy(np.array(one)) for role, one in encode(data, tables, bare).items()}
        with torch.no_grad():
            plain(**encoded)
    (logits, features), (asked_logits, asked_features) = seen
    coarser = replace(tables, levels=tables.levels[1:])
    parent = torch.from_numpy(made.bank[encode(data, coarser, bare)["slot"]])
    own = torch.from_numpy(made.bank[encode(data, tables, bare)["slot"]])
    labels = torch.from_numpy(np.stack([request[name] for name in feedback_labels(data)], axis=-1).astype(np.float32))
    kinds = [objective.kind for objective in data.objectives]
    ones, precision = torch.ones(labels.shape[:2]), torch.from_numpy(made.solving.precision)
    solution = solve(features, logits + features @ parent.mT, labels, ones, precision, kinds, made.solving.steps)
    brought = (~labels.isnan()).any(dim=2).any(dim=1)[:, None, None]
    values = asked_logits + asked_features @ torch.where(brought, parent + solution, own).mT
    binary = torch.tensor([kind == "binary" for kind in kinds])
    return torch.where(binary, torch.sigmoid(values), values).numpy()


def refusing(made: Made) -> ServingTables:
    """The tables of the release, with every user refused who has no weights of his own."""
    users, *coarser = made.tables.levels
    others = np.setdiff1d(np.arange(1, made.tables.vocabularies[made.data.user].rows), users.keys)
    return replace(made.tables, levels=(replace(users, rolled_back=others), *coarser))


@pytest.mark.parametrize("encoder_keys", [ENCODER_KEYS, 0])
def test_a_user_who_is_refused_weights_is_solved_none_and_nobody_else_notices(
    made, tmp_path, tmp_path_factory, encoder_keys
):
    """Against the release that refuses nobody, asked with his labels and without; to the bit."""
    data, tables = made.data, refusing(made)
    traced = {False: made.graph, True: shared_feedback_graph(tmp_path_factory, "full")}
    graphs = (made.network, made.bank, tables, data, tmp_path)
    export(*graphs, lambda *layers: traced[layers[-1] is not None], encoder_keys, made.solving)
    known, request = tables.vocabularies["user"].keys.to_pylist(), asked(made, requests=4)
    request["user"] = np.array([known[1], known[0], "nobody", known[3]], object)
    hit = np.array([True, False, False, True])
    np.testing.assert_array_equal(np.isin(tables.ids("user", request["user"]), tables.refused), hit)
    bare = {spec.name: request[spec.name] for spec in input_specs(data)}
    silent = request | {
        name: np.where(hit[:, None], np.float32(np.nan), request[name]) for name in feedback_labels(data)
    }
    held = replace(made, folder=tmp_path)
    before, after = (session(one, "model_feedback.onnx").run(None, request)[0] for one in (made, held))
    np.testing.assert_array_equal(after[~hit], before[~hit])
    assert (np.abs(after - before)[hit].max(axis=(1, 2)) > 1e-2).all()
    np.testing.assert_array_equal(after, session(made, "model_feedback.onnx").run(None, silent)[0])
    for one in range(4):
        alone = {name: values[one : one + 1] for name, values in request.items()}
        np.testing.assert_allclose(
            session(held, "model_feedback.onnx").run(None, alone)[0], after[one : one + 1], atol=1e-6, rtol=1e-6
        )
    # Other shapes multiply in another order: the graph without feedback may differ in the last bits.
    plain = session(held, "model.onnx").run(None, bare)[0]
    np.testing.assert_allclose(after[hit], plain[hit], atol=1e-6, rtol=1e-6)
    assert np.abs(after[~hit] - plain[~hit]).max() > 1e-2
    golden = make_golden(made.network, made.bank, tables, data, [request, bare], made.solving)
    np.testing.assert_allclose(golden[0].scores[hit], golden[1].scores[hit], atol=1e-6, rtol=1e-6)
    parity = check_parity(data, tables, golden, tmp_path)
    assert parity.feedback is not None
    assert parity.feedback < 1e-5
    drawn = make_golden(made.network, made.bank, tables, data, [one.inputs for one in made.golden], made.solving)
    assert check_parity(data, tables, drawn, tmp_path).requests == 14
    with pytest.raises(ParityBroken, match=r"model_feedback.onnx differs from the network"):
        check_parity(
            data, made.tables, make_golden(*graphs[:2], made.tables, data, [bare, request], made.solving), tmp_path
        )


@pytest.mark.parametrize("count", [0, 1, FEEDBACK])
def test_the_graph_equals_the_solver_of_the_bank(each, count):
    request = asked(each)
    for column in (*feedback_columns(each.data).values(), *feedback_labels(each.data)):
        request[column] = request[column][:, :count]
    found = session(each, "model_feedback.onnx").run(None, request)[0]
    expected = by_hand(each, request)
    scale = np.where([False, True], 1 + np.abs(expected), 1.0)
    assert np.max(np.abs(found - expected) / scale) < 1e-4
    bare = {spec.name: request[spec.name] for spec in input_specs(each.data)}
    plain = session(each, "model.onnx").run(None, bare)[0]
    if count == 0:
        np.testing.assert_allclose(found, plain, atol=1e-6, rtol=1e-6)
    else:
        assert np.abs(found - plain).max() > 1e-2


def test_of_more_rows_than_the_graph_solves_the_first_count(each):
    request = asked(each)
    more = {name: request[name] for name in (*feedback_columns(each.data).values(), *feedback_labels(each.data))}
    more = {name: np.concatenate([values, values[:, ::-1]], axis=1) for name, values in more.items()}
    graph = session(each, "model_feedback.onnx")
    np.testing.assert_allclose(graph.run(None, request | more)[0], graph.run(None, request)[0], atol=2e-6, rtol=2e-6)


def test_golden_requests_with_feedback_are_far_from_what_the_bank_says_and_near_the_graphs(each):
    assert each.parity.feedback is not None
    assert each.parity.feedback < 1e-5
    assert each.parity.requests == len(each.golden) == 14
    plain = [one for one in each.golden if feedback_labels(each.data)[0] not in one.inputs]
    assert check_parity(each.data, each.tables, plain, each.folder).feedback is None


def test_a_graph_that_solves_otherwise_is_found(made, monkeypatch):
    wrong = [replace(one, scores=one.scores + np.float32(2e-4)) for one in made.golden]
    monkeypatch.setattr(golden_requests, "TOLERANCE", 1.0)
    with pytest.raises(ParityBroken, match=r"model_feedback.onnx differs from the network by .* limit 0.0001"):
        check_parity(made.data, made.tables, wrong, made.folder)


def test_tables_and_solving_have_to_fit(made, tmp_path):
    graphs = made.network, made.bank, replace(made.tables, feedback=0), made.data, tmp_path
    with pytest.raises(ParityBroken, match="bring 0 rows of feedback, the graphs solve 5"):
        export(*graphs, solving=Solving(FEEDBACK, 2, np.ones((2, made.network.width), np.float32)))


def test_tables_remember_how_much_feedback_there_is(made, tmp_path):
    write_tables(made.tables, tmp_path)
    assert read_tables(made.data, tmp_path).feedback == FEEDBACK
