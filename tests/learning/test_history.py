"""Histories against a plain loop over the rows, attention against numpy, and what neither may know."""

import json
from dataclasses import replace
from datetime import date

import numpy as np
import pytest
import torch

from tasks.learning import history as module
from tasks.learning import material as materials
from tasks.learning.adapters import Adaptation, AdapterConfig, Precisions
from tasks.learning.attention import Attention
from tasks.learning.base import Base, load_base, save_base
from tasks.learning.catalogue import _inputs, catalogue
from tasks.learning.episodes import draw, score_visits
from tasks.learning.exams import Night
from tasks.learning.ladder import Ladder
from tasks.learning.losses import Losses
from tasks.learning.material import Dialect, Material, visits_of
from tasks.learning.networks import Ranker
from tasks.learning.ranker_config import RankerConfig
from tasks.learning.setting import Setting
from tasks.learning.training import meta_train
from tasks.learning.training_config import TrainingConfig
from tests.learning.small_rows import DAY, FIRST, LADDER, contract, ladder_of, one_aim, opposed, shape, table
from tests.learning.test_catalogue import tables

LENGTH = 5
SMALL = RankerConfig(kind="transformer", history=LENGTH, embedding=3, hidden=4, blocks=2)


def ranker(rows, config=SMALL, seed=0):
    """A network whose layers all say something."""
    torch.manual_seed(seed)
    network = Ranker(shape(rows), config).eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(std=0.4)
    return network


def random_table(seed):
    """Unknown users and items among others, and nights that are no days in UTC: they begin an hour late."""
    random = np.random.default_rng(seed)
    rows = table(random.integers(0, 5, 90), random.integers(0, 6, 90), item=random.integers(0, 9, 90))
    return replace(rows, time=rows.time + random.integers(DAY // 24, 25 * DAY // 24) // 2 * 2)


@pytest.mark.parametrize("seed", range(4))
def test_a_history_is_what_a_loop_over_the_user_s_rows_of_earlier_nights_finds(seed):
    rows, random = random_table(seed), np.random.default_rng(seed)
    visits, asked = visits_of(rows), random.integers(0, 90, 40)
    found = module.histories(rows, visits.rows.start, visits.first, asked, LENGTH)
    for at, row in zip(asked, found.row, strict=True):
        mine = [
            other
            for other in reversed(range(90))
            if rows.user[other] == rows.user[at] > 0 and rows.night[other] < rows.night[at]
        ][:LENGTH]
        mine += [-1] * (LENGTH - len(mine))
        began = min(rows.time[(rows.user == rows.user[at]) & (rows.night == rows.night[at])])
        gaps = [int(began - rows.time[other]) // 1_000_000 for other in mine]
        known = [other >= 0 and rows.item[other] > 0 for other in mine]
        assert found.at[row].tolist() == [other if there else -1 for other, there in zip(mine, known, strict=True)]
        assert found.gaps[row].tolist() == [gap if there else 0 for gap, there in zip(gaps, known, strict=True)]
    assert len(found.at) < 40
    assert (found.at >= 0).any(axis=1).sum() > 5


def test_no_rows_have_no_histories():
    visits = visits_of(table([1, 1], [0, 1]))
    found = module.histories(table([1, 1], [0, 1]), visits.rows.start, visits.first, np.zeros(0, np.int64), 3)
    assert (found.at.shape, found.row.shape) == ((0, 3), (0,))


def test_batches_hold_ids_labels_and_gaps_and_a_dialect_translates_the_ids():
    rows = opposed(nights=3, users=6)
    at = np.flatnonzero(rows.night == FIRST + 2)[[0, 1, -1]]
    ids, labels, gaps, row = Material(rows).recent(at, 20)
    visits = visits_of(rows)
    found = module.histories(rows, visits.rows.start, visits.first, at, 20)
    there = found.at >= 0
    assert 0 < there.sum() < there.size
    assert ids.numpy()[there].tolist() == rows.candidate_ids[found.at[there]].tolist()
    assert (ids.numpy()[~there] == -1).all()
    np.testing.assert_array_equal(labels.numpy(), np.where(there, rows.labels[found.at, 0], np.nan))
    assert gaps.tolist() == found.gaps.tolist()
    assert row.tolist() == found.row.tolist()
    theirs = np.random.default_rng(0).permutation(20)
    told = Material(rows, dialect=Dialect((np.arange(9),) * 2, (theirs, theirs))).recent(at, 20)[0].numpy()
    assert told[there].tolist() == theirs[rows.candidate_ids[found.at[there]]].tolist()
    assert (told[~there] == -1).all()


# Attention


def told(seed=0, given=(5, 2, 0)):
    """An attention whose weights are random, and three histories, of which the second and third are not full."""
    torch.manual_seed(seed)
    attention = Attention(6, 8, LENGTH, heads=2, blocks=2, dropout=0.0).eval()
    with torch.no_grad():
        for weight in attention.parameters():
            weight.normal_(std=0.5)
    attention.labels.fit(torch.tensor([0.4]), torch.tensor([0.5]))
    random = np.random.default_rng(seed)
    there = torch.arange(LENGTH) < torch.tensor(given)[:, None]
    labels = torch.from_numpy(random.integers(0, 2, (3, LENGTH)).astype(np.float32))
    labels[0, 1] = float("nan")
    gaps = torch.from_numpy(np.sort(np.exp(random.uniform(0, 22, (3, LENGTH))).astype(np.int64)))
    items = torch.from_numpy(random.normal(size=(3, LENGTH, 6)).astype(np.float32))
    return attention, [items, there, labels, gaps]


def by_hand(attention, items, there, labels, gaps, candidate):
    """What one candidate finds in one history, token by token, in numpy: the text of the module, and nothing shared."""
    w = {name: value.detach().numpy().astype(np.float64) for name, value in attention.named_parameters()}

    def dense(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def enter(item, label):
        told = [0.0, 1.0] if np.isnan(label) else [(label - 0.4) / 0.5, 0.0]
        return dense("enter", np.r_[item, told])

    def class_of(gap):
        return 0 if gap < 60 else min(int(np.log2(gap // 60)) + 1, 23)

    def step(name, x, read, bias):
        """`read` are tokens, `bias` [heads] of each."""
        query = dense(f"{name}.query", norm(f"{name}.before", x))
        parts = []
        for head in range(2):
            mine = slice(4 * head, 4 * head + 4)
            keys = [dense(f"{name}.key", norm(f"{name}.before", one))[mine] for one in read]
            values = [dense(f"{name}.value", norm(f"{name}.before", one))[mine] for one in read]
            score = np.exp([query[mine] @ key / 2 + b[head] for key, b in zip(keys, bias, strict=True)])
            parts.append(sum(s * value for s, value in zip(score / score.sum(), values, strict=True)))
        x = x + dense(f"{name}.out", np.concatenate(parts))
        return x + dense(f"{name}.dense.3", np.maximum(dense(f"{name}.dense.0", norm(f"{name}.between", x)), 0))

    def bias(apart, gap):
        return w["place_bias"][apart] + w["gap_bias"][class_of(gap)]

    mine = [number for number in range(LENGTH) if there[number]]
    tokens = {number: enter(items[number], labels[number]) + w["gap_table"][class_of(gaps[number])] for number in mine}
    begin = w["beginning"]
    for block in ("encoder.0", "encoder.1"):
        after = {}
        for at in mine:
            older = [one for one in mine if one >= at]
            biases = [bias(one - at, gaps[one] - gaps[at]) for one in older]
            after[at] = step(block, tokens[at], [*(tokens[one] for one in older), begin], [*biases, np.zeros(2)])
        tokens, begin = after, step(block, begin, [begin], [np.zeros(2)])
    biases = [bias(one + 1, gaps[one]) for one in mine]
    read = [*(tokens[one] for one in mine), begin]
    return norm("leave", step("target", enter(candidate, np.nan), read, [*biases, np.zeros(2)]))


def test_attention_is_what_numpy_makes_of_its_definition():
    """Full, short and empty histories; five candidates of each request, and the same as rows that share histories."""
    attention, history = told()
    candidates = torch.from_numpy(np.random.default_rng(9).normal(size=(3, 5, 6)).astype(np.float32))
    encoded = attention.encode(*history)
    found = attention(candidates, encoded).detach().numpy()
    for request in range(3):
        own = [part[request].numpy().astype(np.float64) for part in history]
        own[3] = history[3][request].numpy()
        for number in range(5):
            expected = by_hand(attention, *own, candidates[request, number].numpy().astype(np.float64))
            np.testing.assert_allclose(found[request, number], expected, rtol=1e-4, atol=1e-4)
    rows = attention(candidates.flatten(0, 1), encoded, torch.arange(3).repeat_interleave(5)).detach().numpy()
    np.testing.assert_allclose(rows.reshape(found.shape), found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changed", range(LENGTH))
def test_an_entry_is_read_by_itself_and_by_newer_ones_only(changed):
    attention, history = told(given=(5, 5, 5))
    before = attention.encode(*history)[0].detach()
    history[0] = history[0].clone()
    history[0][:, changed] += 1.0
    after = attention.encode(*history)[0].detach()
    differs = (after != before).any(dim=-1)
    assert differs[:, : changed + 1].all()
    assert not differs[:, changed + 1 :].any()


def test_what_fills_a_history_up_does_not_matter_and_an_empty_one_is_the_learned_token():
    attention, history = told(given=(5, 2, 0))
    candidates = torch.ones(3, 2, 6)
    expected = attention(candidates, attention.encode(*history)).detach()
    items, there, labels, gaps = (part.clone() for part in history)
    items[~there], labels[~there], gaps[~there] = 77.0, float("nan"), 10**9
    found = attention(candidates, attention.encode(items, there, labels, gaps)).detach()
    assert torch.equal(found, expected)
    assert found.isfinite().all()
    assert not torch.equal(found[1], found[2])
    again = attention(candidates, attention.encode(items.roll(1, 0), there & False, labels, gaps)).detach()
    torch.testing.assert_close(again, expected[2].expand_as(again))


# The network


def scores_of(rows, network, at):
    with torch.no_grad():
        return Material(rows).scorer(network)(at)[0].numpy()


def test_rows_requests_and_visits_that_step_apart_read_the_same():
    """Rows that share histories, requests with candidates, and one request at a time under vmap."""
    rows = opposed(nights=3, users=6, each=4)
    network, visits = ranker(rows), visits_of(rows).of_nights(FIRST + 2, FIRST + 2)
    at = (visits.rows.start[:, None] + np.arange(4)).ravel()
    *own, ids, labels, gaps, row = Material(rows).inputs(at, LENGTH)
    shared = [part[row].reshape(len(visits), 4, *part.shape[1:])[:, 0].contiguous() for part in (ids, labels, gaps)]
    by_visit = [part.reshape(len(visits), 4, *part.shape[1:]) for part in own]
    expected = scores_of(rows, network, at).reshape(-1, 4, 1)
    with torch.no_grad():
        requests = network(*by_visit, *shared)[0]
        apart = torch.func.vmap(lambda *inputs: network(*inputs)[0])(*by_visit, *shared)
    np.testing.assert_allclose(requests.numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(apart.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_history_is_encoded_once_however_many_candidates_there_are_or_rows_of_a_visit():
    rows = opposed(nights=3, users=6, each=4)
    network, at = ranker(rows), np.flatnonzero(rows.night == FIRST + 2)
    seen = []
    network.attention.encoder[0].register_forward_pre_hook(lambda block, given: seen.append(given[0].shape))
    scores_of(rows, network, at)
    visits = len(np.unique(rows.user[at]))
    assert visits < len(at)
    *own, ids, labels, gaps, row = Material(rows).inputs(at[:2], LENGTH)
    with torch.no_grad():
        network(*(part[:, None].expand(2, 50, *part.shape[1:]) for part in own), ids[row], labels[row], gaps[row])
    assert [tuple(shape) for shape in seen] == [(visits, LENGTH + 1, 4), (2, LENGTH + 1, 4)]


def test_many_rows_are_scored_part_by_part(monkeypatch):
    rows = opposed(nights=3, users=6)
    network, at = ranker(rows), np.random.default_rng(0).permutation(len(rows))
    whole, sizes = scores_of(rows, network, at), []
    network.register_forward_pre_hook(lambda network, given: sizes.append(len(given[0])))
    monkeypatch.setattr(materials, "HISTORY_NUMBERS", 7 * 6 * (4 + 2 * 6))
    np.testing.assert_allclose(scores_of(rows, network, at), whole, rtol=1e-5, atol=1e-6)
    assert (max(sizes), sum(sizes)) == (7, len(rows))


def test_in_training_ids_of_entries_are_dropped_as_others_are(monkeypatch):
    rows = opposed(nights=3, users=9)
    network, seen = ranker(rows, SMALL.model_copy(update={"id_dropout": 0.5})).train(), []
    encode = network.attention.encode
    monkeypatch.setattr(network.attention, "encode", lambda items, *rest: seen.append(items) or encode(items, *rest))
    network(*Material(rows).inputs(np.arange(len(rows)), LENGTH))
    ids = Material(rows).recent(np.arange(len(rows)), LENGTH)[0]
    there = ids[..., 0] > 0
    dropped = (seen[0][..., :3] == network.candidate_tables[0].weight[0]).all(dim=-1)[there]
    kept = (seen[0][..., :3] == network.candidate_tables[0].weight[ids[..., 0].clamp_min(0)]).all(dim=-1)[there]
    assert 0.35 < dropped.float().mean() < 0.65
    assert (dropped | kept).all()


def of_night_and_later_changed(rows, night):
    """Other items, labels and categories on a night and after it."""
    random, later = np.random.default_rng(0), rows.night >= night
    ids = np.where(later[:, None], random.permutation(rows.candidate_ids), rows.candidate_ids)
    labels = np.where(later[:, None], 1 - rows.labels, rows.labels).astype(np.float32)
    return replace(rows, candidate_ids=ids, labels=labels)


def assert_histories_end_before(rows, night):
    """No history of a night's rows holds what is changed on that night or later; some hold what was before."""
    at = np.flatnonzero(rows.night == night)
    expected, found = (
        [part.numpy() for part in Material(one).recent(at, LENGTH)]
        for one in (rows, of_night_and_later_changed(rows, night))
    )
    for before, after in zip(expected, found, strict=True):
        np.testing.assert_array_equal(before, after, err_msg="a history has seen its own night")
    assert (expected[0] >= 0).any()


def test_rows_of_the_same_night_or_later_are_in_no_history_and_earlier_ones_are():
    rows = opposed(nights=4, users=8, each=5)
    assert_histories_end_before(rows, FIRST + 2)
    network, at = ranker(rows), np.flatnonzero(rows.night == FIRST + 2)
    earlier = of_night_and_later_changed(rows, FIRST)
    only_labels = replace(rows, labels=earlier.labels)
    assert (scores_of(only_labels, network, at) != scores_of(rows, network, at)).mean() > 0.5
    later = replace(rows, labels=of_night_and_later_changed(rows, FIRST + 2).labels)
    np.testing.assert_array_equal(scores_of(later, network, at), scores_of(rows, network, at))


def test_a_history_that_holds_earlier_rows_of_its_own_visit_is_caught(monkeypatch):
    rows = opposed(nights=4, users=8, each=5)

    def leaky(rows, start, first, at, length):
        every = np.arange(len(rows))  # a visit, and a night, of its own for every row
        users = first[np.searchsorted(start, every, side="right") - 1]
        return module.histories(replace(rows, night=rows.time), every, users, at, length)

    monkeypatch.setattr(materials, "histories", leaky)
    with pytest.raises(AssertionError, match="a history has seen its own night"):
        assert_histories_end_before(rows, FIRST + 2)


def test_users_of_a_catalogue_bring_the_history_of_their_visit():
    rows = opposed(nights=5, users=14, each=8)
    night = Night.among(contract(), Ladder(rows, ladder_of(), "shopper"), Material(rows), FIRST + 3)
    candidates = catalogue(rows, FIRST + 3, 0)
    inputs = _inputs(night.data, night.material, tables(rows), candidates, night.visits, LENGTH)
    expected = night.material.recent(night.visits.rows.start, LENGTH)
    pairs = inputs[-1].reshape(len(night.visits), len(candidates))
    assert (pairs == expected[-1][:, None]).all()
    for given, part in zip(inputs[-4:-1], expected[:-1], strict=True):
        assert torch.equal(given.nan_to_num(-7.0), part.nan_to_num(-7.0))


def moody(nights=7, users=30, each=4):
    """Every user likes all or nothing in a night, and the next night it is the other way round."""
    night, user = (part.ravel() for part in np.meshgrid(np.arange(nights), np.repeat(np.arange(users), each)))
    mood = ((user + night) % 2).astype(np.float32)[:, None]
    random = np.random.default_rng(0)
    return table(user + 1, night, item=random.integers(1, 9, len(user)), labels=mood)


def test_what_only_the_order_of_a_user_s_rows_tells_is_learned_from_them():
    """Everybody has liked half of what he saw, and will not like tonight what he liked on the night before."""
    rows = moody()
    config = TrainingConfig(epochs=2, steps_per_epoch=20, visits_per_step=60, stop_nights=1, min_stop_rows=10,
                            learning_rate=2e-2, average=0.8)  # fmt: skip
    losses = {}
    for kind in ("mlp", "transformer"):
        history = {"history": 4} if kind == "transformer" else {}
        none = {"factors": 0, "category_factors": 0, "dropout": 0.0, "request_dropout": 0.0}
        ranker = RankerConfig(kind=kind, embedding=4, hidden=8, **none, **history)
        sections = (contract(), ladder_of(), ranker, AdapterConfig(kind="none"), config)
        setting = Setting(*sections, rows, shape(rows), date.fromordinal(FIRST + 7), "cpu")
        losses[kind] = min(point[2] for point in meta_train(setting).curve)
    assert losses["mlp"] > 0.6
    assert losses["transformer"] < 0.1


def test_how_long_ago_the_last_visit_was_is_learned():
    """Who was here last night likes everything, and who was away for some nights likes nothing."""
    random = np.random.default_rng(0)
    user, night, labels = [], [], []
    for who in range(60):
        at = int(random.integers(3))
        while at < 12:
            away = int(random.choice([1, 4]))
            at += away
            user += [who + 1] * 4
            night += [at] * 4
            labels += [float(away == 1)] * 4
    rows = table(user, night, item=random.integers(1, 9, len(user)), labels=np.array(labels))
    config = TrainingConfig(epochs=4, steps_per_epoch=20, visits_per_step=60, stop_nights=2, min_stop_rows=10,
                            learning_rate=1e-2, average=0.8)  # fmt: skip
    losses = {}
    for kind, history in (("mlp", {}), ("transformer", {"history": 3})):
        none = {"factors": 0, "category_factors": 0, "dropout": 0.0, "request_dropout": 0.0}
        ranker = RankerConfig(kind=kind, embedding=4, hidden=8, **none, **history)
        setting = Setting(
            contract(), ladder_of(), ranker, AdapterConfig(kind="none"), config, rows, shape(rows),
            date.fromordinal(FIRST + 12), "cpu",
        )  # fmt: skip
        losses[kind] = min(point[2] for point in meta_train(setting).curve)
    assert losses["mlp"] > 0.55
    assert losses["transformer"] < 0.3


DENSE = AdapterConfig(kind="gradient", bends="dense")
LINEAR = [AdapterConfig(kind=kind) for kind in ("bias", "ridge", "matching", "gradient")]
BENT = [AdapterConfig(kind="film"), AdapterConfig(kind="lora"), DENSE]


@pytest.mark.parametrize(
    ("outer", "adapter"),
    [
        *(("second_order", adapter) for adapter in (*LINEAR, *BENT)),
        ("first_order", BENT[0]),
        ("first_order", LINEAR[3]),
    ],
)
def test_attention_is_trained_with_every_adapter(outer, adapter):
    rows = one_aim(opposed(nights=5, users=10, each=5))
    config = TrainingConfig(outer=outer, epochs=1, steps_per_epoch=2, visits_per_step=8, stop_nights=1,
                            min_stop_rows=5, average=0.0, patience=9)  # fmt: skip
    setting = Setting(
        contract(), ladder_of(), SMALL, adapter, config, rows, shape(rows), date.fromordinal(FIRST + 5), "cpu"
    )  # fmt: skip
    trained = meta_train(setting)
    assert np.isfinite([point[2] for point in trained.curve]).all()
    network, precisions = trained.base.network, trained.base.precisions
    torch.manual_seed(0)
    with torch.no_grad():  # layers that begin at zero would hide what they multiply
        for weight in network.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    loss = Losses(setting).of_step(network, precisions, *draw(setting.visits, 8, np.random.default_rng(1)))[1]
    slopes = torch.autograd.grad(loss, [network.attention.target.query.weight, network.attention.gap_table])
    assert all(slope.isfinite().all() and slope.abs().max() > 1e-6 for slope in slopes)


@pytest.mark.parametrize("adapter", [AdapterConfig(), AdapterConfig(kind="film")], ids=["ridge", "film"])
def test_the_meta_gradient_through_attention_is_that_of_finite_differences(adapter):
    rows = one_aim(opposed(nights=4, users=5, each=6))
    torch.manual_seed(0)
    network = Ranker(shape(rows), SMALL, adapter.bent).eval().double()
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    ladder, material = Ladder(rows, ladder_of(), "shopper"), Material(rows)
    visits = visits_of(rows).of_nights(FIRST + 2, FIRST + 3)
    after = np.full(len(visits), 3)
    precisions = torch.full((2, 1, adapter.width(network.width)), 3.0, dtype=torch.float64)
    names = ("attention.target.query.weight", "attention.enter.bias", "attention.gap_bias")
    moved = [dict(network.named_parameters())[name].detach().clone() for name in names]
    moved[2] = moved[2][10:14].clone()  # classes of hours and days

    def loss(query, enter, gaps):
        table = torch.cat([network.attention.gap_bias[:10], gaps, network.attention.gap_bias[14:]])
        own = dict(zip(names, (query, enter, table), strict=True))

        def scorer(at):
            inputs = [part.double() if part.is_floating_point() else part for part in material.inputs(at, LENGTH)]
            return torch.func.functional_call(network, own, tuple(inputs))

        adaptation = Adaptation.of(network, adapter)
        scores = score_visits(ladder, visits, after, scorer, material, precisions, adaptation)
        labels = material.labels(scores.rows).double()
        return torch.nn.functional.binary_cross_entropy_with_logits(scores.adapted, labels)

    assert torch.autograd.gradcheck(loss, [one.requires_grad_() for one in moved], eps=1e-6, atol=1e-7)


# What is stored, and what is refused


def test_a_base_with_histories_is_of_a_format_of_its_own(tmp_path):
    rows = opposed(nights=2, users=6)
    network = ranker(rows)
    precisions = Precisions(2, 1, network.width, AdapterConfig())
    back = load_base(
        save_base(Base(network, precisions, LADDER, AdapterConfig(), date.fromordinal(FIRST)), tmp_path)
    ).network
    assert json.loads((tmp_path / "base.json").read_text())["format"] == 5
    at = np.arange(len(rows))
    np.testing.assert_array_equal(scores_of(rows, back, at), scores_of(rows, network, at))


def test_a_config_without_histories_says_nothing_of_them():
    dumped = RankerConfig().model_dump(mode="json")
    assert not {"history", "heads", "blocks"} & dumped.keys()
    assert RankerConfig.model_validate(SMALL.model_dump(mode="json")) == SMALL


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"kind": "transformer"}, r"ranker\.history is 0; set ranker\.history to how many"),
        ({"kind": "transformer", "history": 9, "hidden": 9}, r"ranker\.heads = 2 does not divide ranker\.hidden = 9"),
        ({"history": 9}, r"ranker\.history = 9 belongs to ranker\.kind 'transformer', and the kind is 'mlp'; remove"),
        ({"kind": "dcn", "heads": 4}, r"ranker\.heads = 4 belongs to ranker\.kind 'transformer'"),
        ({"blocks": 2, "history": 1}, r"(?s)ranker\.history = 1 .*ranker\.blocks = 2 belongs to"),
        ({"kind": "transformer", "history": 201}, "less than or equal to 200"),
    ],
)
def test_what_nothing_would_obey_is_refused_with_the_remedy(given, says):
    with pytest.raises(ValueError, match=says):
        RankerConfig(**given)
