"""List columns in the ranker: pooling, normalisation and starts by hand, and a world where only a tag tells."""

import json
from dataclasses import replace
from datetime import date
from itertools import product

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from tasks.data.contract import DataConfig
from tasks.data.vocabulary import Vocabulary
from tasks.learning import starts
from tasks.learning.adapters import AdapterConfig, Precisions
from tasks.learning.base import Base, grow, load_base, save_base, shape_of
from tasks.learning.closed_form import Rated, factorise, factorise_lists
from tasks.learning.descent import optimiser_of
from tasks.learning.ladder import Ladder
from tasks.learning.lists import VectorNormaliser, pooled
from tasks.learning.material import Dialect, Material, visits_of
from tasks.learning.networks import Ranker
from tasks.learning.outer import reptile
from tasks.learning.ranker_config import RankerConfig
from tasks.learning.ranker_shape import RankerShape
from tasks.learning.setting import Setting
from tasks.learning.training import meta_train
from tasks.learning.training_config import TrainingConfig
from tests.learning import small_rows
from tests.learning.small_rows import FIRST, ladder_of, one_aim, opposed, table, vocabularies_of

SHAPE = RankerShape(
    request_vocabularies=(4,), candidate_vocabularies=(6, 5), request_numbers=1, candidate_numbers=1,
    request_statistics=(2, 3), candidate_statistics=(0, 1), joint_statistics=(4,), offsets=(0,), kinds=("binary",),
    request_value_vocabularies=(3,), request_values=(2,), request_vectors=(2,),
    candidate_value_vocabularies=(4, 5), candidate_values=(3, 2), candidate_vectors=(2, 1),
)  # fmt: skip
SMALL = RankerConfig(embedding=3, hidden=4, factors=2, category_factors=1, features=2)
NAN = float("nan")


def ranker(config=SMALL, shape=SHAPE, seed=0):
    """A network with no zero left in it."""
    torch.manual_seed(seed)
    network = Ranker(shape, config)
    with torch.no_grad():
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.5)
    return network.eval()


def inputs(*lead):
    """One row of every difficulty, repeated along the leading axes."""
    random = torch.Generator().manual_seed(0)
    plain = (
        *(torch.tensor([2]).expand(*lead, 1), torch.tensor([5, 3]).expand(*lead, 2)),
        *(torch.randn(*lead, width, generator=random) for width in (1, 1, 5)),
    )
    values = torch.tensor([2, -1]), torch.tensor([1, 3, 1, 99, -1])
    vectors = torch.tensor([NAN, NAN]), torch.tensor([3.0, -4.0, 0.5])
    return *plain, *(one.expand(*lead, len(one)) for one in (*values, *vectors))


def test_the_mean_is_of_the_values_that_are_there():
    table = nn.Embedding.from_pretrained(torch.tensor([[10.0, 0.0], [1.0, 2.0], [3.0, 5.0]]))
    ids = torch.tensor([[1, 2, 0], [2, 2, 1], [0, 0, 0], [0, 0, 0]])
    given = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    expected = [[2.0, 3.5], [7 / 3, 4.0], [10.0, 0.0], [0.0, 0.0]]  # the third list holds one unknown value
    torch.testing.assert_close(pooled(table, ids, given), torch.tensor(expected))


def test_a_vector_is_normalised_number_by_number_and_a_missing_one_is_zeros_and_a_flag():
    normaliser = VectorNormaliser(2)
    normaliser.fit(torch.tensor([10.0, 0.0]), torch.tensor([2.0, 1e-9]))
    said = normaliser(torch.tensor([[14.0, -1.5], [NAN, NAN], [NAN, 3.0], [1e9, -7.0]]))
    assert said.tolist() == [[2.0, -1.5, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [5.0, -5.0, 0.0]]


@pytest.mark.parametrize("kind", ["mlp", "dcn"])
def test_logits_and_features_by_hand(kind):
    """What the towers read, written out; the layers behind them are those of the same network without lists."""
    network, row = ranker(SMALL.model_copy(update={"kind": kind})), inputs()
    network.candidate_lists.normalisers[0].fit(torch.tensor([1.0, 0.0]), torch.tensor([4.0, 2.0]))
    state = {name: value.detach() for name, value in network.state_dict().items()}
    of_request = state["request_lists.value_tables.0.weight"]
    first, second = (state[f"candidate_lists.value_tables.{at}.weight"] for at in (0, 1))
    about_request = torch.cat([of_request[2], torch.tensor([0.0, 0.0, 1.0])])
    about_candidate = torch.cat([
        (2 * first[1] + first[3]) / 3, second[0],  # 99 is beyond the table: unknown
        torch.tensor([0.5, -2.0, 0.0]), torch.tensor([0.5, 0.0]),
    ])  # fmt: skip
    heard = []
    for name in ("request_tower", "candidate_tower"):
        getattr(network, name).register_forward_hook(lambda module, given, out: heard.append(given[0]))
    logits, features = network(*row)
    plain = 3 + 2 + 2, 2 * 3 + 2 + 2
    torch.testing.assert_close(heard[0][plain[0] :], about_request)
    torch.testing.assert_close(heard[1][plain[1] :], about_candidate)
    tags, codes = (state[f"factor_tables.{at}.weight"] for at in (2, 3))
    expected = torch.cat([state["factor_tables.1.weight"][3], (2 * tags[1] + tags[3]) / 3, codes[0]])
    torch.testing.assert_close(features[network.parts["category factors"]], expected)
    assert len(features) == network.width == 1 + 2 + 3 + 1 + 2
    assert torch.isfinite(logits).all()


def test_any_leading_axes_give_what_single_rows_give():
    network = ranker()
    logits, features = network(*inputs(2, 3))
    single = [part.reshape(6, -1) for part in inputs(2, 3)]
    for at in range(6):
        one = network(*(part[at] for part in single))
        torch.testing.assert_close(logits.reshape(6, 1)[at], one[0])
        torch.testing.assert_close(features.reshape(6, -1)[at], one[1])


def test_the_order_of_values_says_nothing_and_an_empty_list_is_not_an_unknown_value():
    network, (*plain, request, candidate, mood, look) = ranker(), inputs()
    said = network(*plain, request, candidate, mood, look)
    other = network(*plain, request, candidate[[2, 0, 1, 4, 3]], mood, look)
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(said, other, strict=True))
    empty, unknown = (network(*plain, request, torch.tensor([v, -1, -1, 99, -1]), mood, look)[1] for v in (-1, 0))
    assert not torch.equal(empty, unknown)


def test_values_are_dropped_one_by_one_in_training():
    network = ranker(SMALL.model_copy(update={"id_dropout": 0.5}))
    row = [part.clone() for part in inputs(400)]
    row[6][:, :3] = torch.tensor([1, 2, -1])
    network.train()
    part = network.parts["category factors"].start + 1
    table = network.factor_tables[2].weight.detach()[:, 0]
    found = network(*row)[1][:, part].detach()
    cases = torch.stack([(one + two) / 2 for one in (table[0], table[1]) for two in (table[0], table[2])])
    nearest = (found[:, None] - cases).abs()
    assert nearest.min(dim=1).values.max() < 1e-6
    assert torch.bincount(nearest.argmin(dim=1), minlength=4).min() > 60


def test_every_visit_of_reptile_reads_its_own_lists():
    """Visits are mapped over at once; the gradient of one alone is the same as beside another."""
    rows = tagged(nights=2, users=6, each=4)
    torch.manual_seed(0)
    network = Ranker(shape(rows), SMALL).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    adapter = AdapterConfig(kind="gradient", steps=2)
    precisions = torch.ones(2, 1, adapter.width(network.width))
    ladder, visits = Ladder(rows, ladder_of(), "shopper"), visits_of(rows).of_nights(FIRST, FIRST)

    def moved(chosen):
        few = visits.take(np.array(chosen))
        return reptile(ladder, few, network, Material(rows), precisions, adapter, torch.ones(1), 0.5)[1]

    both, *apart = (moved(chosen) for chosen in ([0, 1], [0], [1]))
    for name in ("candidate_lists.value_tables.0.weight", "candidate_tower.0.weight", "factor_tables.2.weight"):
        assert both[name].abs().sum() > 0
        torch.testing.assert_close(both[name], (apart[0][name] + apart[1][name]) / 2, rtol=1e-4, atol=1e-6)


def test_new_values_take_up_rows_and_more_places_are_no_other_base(tmp_path):
    """New values and longer lists change no score; the base comes back from disk under its own format."""
    network = ranker()
    precisions = Precisions(1, 1, network.width, AdapterConfig())
    base = Base(network, precisions, (("user",),), AdapterConfig(), date(2026, 3, 1))
    wider = SHAPE.model_copy(update={
        "request_value_vocabularies": (7,), "candidate_value_vocabularies": (4, 6), "candidate_values": (4, 2),
    })  # fmt: skip
    grown = grow(base, wider)
    row = inputs()
    longer = [*row[:6], torch.tensor([1, 3, 1, -1, 99, -1]), *row[7:]]
    for one, other in zip(network(*row), grown.network(*longer), strict=True):
        torch.testing.assert_close(one, other)
    assert grow(base, SHAPE.model_copy(update={"candidate_value_vocabularies": (3, 5)})) is None
    assert grow(base, SHAPE.model_copy(update={"candidate_vectors": (3, 1)})) is None
    back = load_base(save_base(base, tmp_path))
    assert back.network.shape == SHAPE
    assert all(torch.equal(one, other) for one, other in zip(back.network(*row), network(*row), strict=True))
    assert json.loads((tmp_path / "base.json").read_text())["format"] == 4


@pytest.mark.parametrize(("kind", "number"), [("mlp", 2), ("dcn", 3)])
def test_a_base_without_lists_says_nothing_of_them(tmp_path, kind, number):
    rows = opposed(nights=2, users=6)
    network = Ranker(small_rows.shape(rows), RankerConfig(kind=kind, embedding=2, hidden=2))
    precisions = Precisions(1, 1, network.width, AdapterConfig())
    save_base(Base(network, precisions, (("user",),), AdapterConfig(), date(2026, 3, 1)), tmp_path)
    told = json.loads((tmp_path / "base.json").read_text())
    assert told["format"] == number
    assert not [name for name in told["shape"] if "value" in name or "vector" in name]
    assert not [name for name in network.state_dict() if "list" in name]


def test_embeddings_of_values_decay_as_embeddings_and_their_factors_do_not():
    network = ranker()
    groups = optimiser_of(network, Precisions(1, 1, network.width, AdapterConfig()), 0.1, 0.2, 0.3).param_groups
    held = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    decay = {name: held[id(parameter)] for name, parameter in network.named_parameters()}
    assert {decay[name] for name in decay if "value_tables" in name} == {0.3}
    assert {decay[name] for name in decay if name.startswith("factor_tables")} == {0.0}


def with_lists(rows, tags, look):
    """Rows with one `multi` and one `dense` candidate column."""
    return replace(rows, candidate_values=np.asarray(tags, np.int32), candidate_vectors=np.asarray(look, np.float32))


def contract():
    told = small_rows.contract().model_dump()
    tags = {"name": "tags", "role": "candidate", "dtype": "int64", "kind": "multi", "max_values": 2}
    look = {"name": "look", "role": "candidate", "dtype": "float64", "kind": "dense", "length": 2}
    return DataConfig.model_validate(told | {"columns": (*told["columns"], tags, look)})


def shape(rows, most=4):
    known = vocabularies_of(rows) | {"tags": Vocabulary("tags", pa.array(np.arange(most), pa.int64()))}
    return shape_of(contract(), rows, known)


def test_batches_hold_the_lists_and_a_dialect_translates_their_values():
    rows = one_aim(opposed(nights=2, users=6))
    random = np.random.default_rng(0)
    tags, look = random.integers(-1, 5, (len(rows), 2)), random.normal(size=(len(rows), 2))
    rows, at = with_lists(rows, tags, look), np.array([3, 0, 11])
    assert len(Material(one_aim(opposed(nights=2, users=6))).inputs(at)) == 5
    *_, no_values, values, no_vectors, vectors = Material(rows).inputs(at)
    assert (no_values.shape, no_vectors.shape) == ((3, 0), (3, 0))
    assert (values.dtype, values.tolist()) == (torch.int64, tags[at].tolist())
    assert vectors.tolist() == look[at].astype(np.float32).tolist()
    theirs = np.array([0, 7, 5, 0, 2])
    same = tuple(np.arange(50) for _ in range(2))
    told = Material(rows, dialect=Dialect(same, same, (), (theirs,), (), (2,))).inputs(at)
    assert told[6].tolist() == np.where(tags[at] < 0, -1, theirs[tags[at]]).tolist()


def test_vectors_are_normalised_by_the_training_rows_that_have_one(monkeypatch):
    rows = one_aim(opposed(nights=2, users=9))
    look = np.random.default_rng(0).normal(5.0, 3.0, (len(rows), 2))
    look[::3] = np.nan
    rows = with_lists(rows, np.zeros((len(rows), 2)), look)
    at = np.arange(0, len(rows), 2)
    known = rows.candidate_vectors[at][~np.isnan(rows.candidate_vectors[at, 0])].astype(np.float64)
    monkeypatch.setattr(starts, "VECTOR_NUMBERS", 20)
    network = Ranker(shape(rows), SMALL)
    starts.normalise(network, contract(), rows, at)
    (normaliser,) = network.candidate_lists.normalisers
    np.testing.assert_allclose(normaliser.mean.numpy(), known.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(normaliser.scale.numpy(), known.std(axis=0), rtol=1e-6)
    with_lists(rows, np.zeros((len(rows), 2)), look * np.nan)
    starts.normalise(network, contract(), with_lists(rows, rows.candidate_values, look * np.nan), at)
    assert (normaliser.mean.tolist(), normaliser.scale.tolist()) == ([0.0, 0.0], [1.0, 1.0])


def planted(seed=0, users=30, items=8, count=900, width=2):
    random = np.random.default_rng(seed)
    user, value = random.integers(0, users, count), random.integers(1, items, (count, 3))
    lengths = random.integers(0, 4, count)
    taste, factor = random.normal(size=(users, width)), random.normal(size=(items, width))
    factor[0] = 0.0
    given = np.arange(3) < lengths[:, None]
    mean = (factor[value] * given[..., None]).sum(1) / np.maximum(lengths, 1)[:, None]
    label = (taste[user] * mean).sum(1) + random.normal(0, 0.2, count)
    row, place = np.nonzero(given)
    held = [torch.from_numpy(one) for one in (user, row, value[row, place], label, random.uniform(0.5, 2, count))]
    return *held, torch.from_numpy(random.normal(size=(items, width)))


def test_factors_of_lists_of_one_are_the_factors_of_items():
    user, _, _, label, weight, start = planted()
    item = torch.from_numpy(np.random.default_rng(1).integers(0, 8, len(user)))
    rows, none = torch.arange(len(user)), torch.zeros(len(user))
    for kind, labels in (("rating", label), ("binary", (label > 0).double())):
        table = labels[:, None]
        rated = Rated(user, none[:, None], table, weight, (kind,), 30, strength=2.0, bias_strength=3.0, sweeps=4)
        expected = factorise(rated, item, start)
        found = factorise_lists(rated, rows, item, start)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("objectives", [1, 2])
def test_factors_of_lists_lower_the_joint_loss_with_every_sweep_and_end_where_it_is_flat(objectives):
    """The loss is written out and its slope taken by autograd; users' parts are solved exactly for given factors.

    A second rating is of the opposite tastes, in other units, missing here and there, and worth half as much.
    """
    user, row, value, label, weight, start = planted()
    labels, worth = torch.stack([label, -7 * label][:objectives], dim=1), (4.0, 2.0)[:objectives]
    labels[::5, 1:] = float("nan")
    given = ~torch.isnan(labels)
    mass = weight[:, None] * given
    spread = ((mass * labels.nan_to_num() ** 2).sum(dim=0) / mass.sum(dim=0)).sqrt()
    share = 1.0 / torch.bincount(row, minlength=len(user)).clamp_min(1)

    def loss(factors):
        mean = torch.zeros(len(user), 2, dtype=torch.float64)
        mean = mean.index_add(0, row, factors[value] * share[row, None])
        total = 3.0 * (factors[1:] ** 2).sum() / 2
        for one, aim in product(range(30), range(objectives)):
            mine = (user == one) & given[:, aim]
            told, own = labels[mine, aim] / spread[aim], weight[mine]
            inputs = torch.cat([torch.ones_like(mean[mine, :1]), mean[mine]], dim=1)
            system = inputs.T @ (own[:, None] * inputs) + torch.diag(torch.tensor([5.0, 3.0, 3.0]).double())
            taste = torch.linalg.solve(system, inputs.T @ (own * told))
            left = (own * (told - inputs @ taste) ** 2).sum() + 5 * taste[0] ** 2 + 3 * (taste[1:] ** 2).sum()
            total = total + worth[aim] / worth[0] * left / 2
        return total

    found, losses = start.clone(), []
    found[0] = 0.0
    for sweeps in (1, 1, 1, 300):
        kinds = ("rating",) * objectives
        rated = Rated(user, torch.zeros_like(labels), labels, weight, kinds, 30, 3.0, 5.0, sweeps, worth)
        found = factorise_lists(rated, row, value, found).double()
        losses.append(float(loss(found)))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]
    flat = found.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(flat), flat)
    assert slope[1:].abs().max() < 1e-3 * losses[-1]
    assert not found[0].any()


def tagged(seed=0, nights=5, users=24, each=10):
    """Items that never come back, half of them with a good tag among others; every second user likes a third tag.

    logit P = 2 (good tag or not) + 2 taste (third tag or not), each ±1.
    """
    random = np.random.default_rng(seed)
    taste = np.where(np.arange(users) % 2 == 0, 1, -1)
    night, user = (part.ravel() for part in np.meshgrid(np.arange(nights), np.repeat(np.arange(users), each)))
    good, third = (np.where(random.random(len(user)) < 0.5, 1, -1) for _ in range(2))
    chance = 1 / (1 + np.exp(-(2 * good + 2 * taste[user] * third)))
    order = np.lexsort((np.arange(len(user)), night, user))
    rows = table(
        user + 1, night, item=np.arange(1, len(user) + 1), labels=(random.random(len(user)) < chance).astype(np.float32)
    )
    tags = np.stack([np.where(good > 0, 1, 2), np.where(third > 0, 3, -1)], axis=1)[order]
    return with_lists(rows, tags, random.normal(size=(len(rows), 2)))


def test_what_only_a_tag_tells_is_learned_from_it():
    """By the shared network what all like, by adapters what each likes; the same training without the column cannot."""
    rows = tagged()
    blind = replace(rows, candidate_values=None, candidate_vectors=None)
    config = TrainingConfig(epochs=2, steps_per_epoch=5, visits_per_step=20, stop_nights=1, min_stop_rows=10,
                            learning_rate=2e-2)  # fmt: skip
    ranker = RankerConfig(embedding=4, hidden=8, factors=2, category_factors=2, dropout=0.0, request_dropout=0.0)

    def stop_loss(data, rows, sized):
        trained = meta_train(
            Setting(data, ladder_of(), ranker, AdapterConfig(), config, rows, sized, date.fromordinal(FIRST + 5))
        )
        return min(point[2] for point in trained.curve)

    without = stop_loss(small_rows.contract(), blind, small_rows.shape(blind))
    told = stop_loss(contract(), rows, shape(rows))
    assert without > 0.65
    assert told < 0.45
