"""The ranker's arithmetic by hand, what it may and may not read, and its doings with missing and unknown values."""

import pytest
import torch
from torch import nn

from tasks.learning.adapters import AdapterConfig
from tasks.learning.layers import Cross, Normaliser
from tasks.learning.networks import Ranker
from tasks.learning.ranker_config import RankerConfig
from tasks.learning.ranker_shape import RankerShape

SHAPE = RankerShape(
    request_vocabularies=(4, 3), candidate_vocabularies=(6, 5), request_numbers=2, candidate_numbers=1,
    request_statistics=(2, 3), candidate_statistics=(0, 1), joint_statistics=(4,), offsets=(0,), kinds=("binary",),
)  # fmt: skip
SMALL = RankerConfig(embedding=3, hidden=4, factors=2, category_factors=1, features=3, warm_up=True, prior=True)
CROSSED = SMALL.model_copy(update={"kind": "dcn"})


def inputs(*lead, seed=0):
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
    ids = lambda *rows: torch.stack([torch.randint(0, n, lead, generator=random) for n in rows], dim=-1)  # noqa: E731
    return ids(4, 3), ids(6, 5), draw(*lead, 2), draw(*lead, 1), draw(*lead, 5)


def ranker(config=SMALL, seed=0):
    """A network with no zero left in it."""
    torch.manual_seed(seed)
    network = Ranker(SHAPE, config)
    with torch.no_grad():
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.5)
    return network.eval()


def test_normal_numbers_are_centred_scaled_clipped_and_missing_ones_are_told():
    normaliser = Normaliser(2)
    normaliser.mean.copy_(torch.tensor([10.0, 0.0]))
    normaliser.scale.copy_(torch.tensor([2.0, 1.0]))
    said = normaliser(torch.tensor([[14.0, torch.nan], [1e9, -7.0]]))
    assert said.tolist() == [[2.0, 0.0, 0.0, 1.0], [5.0, -5.0, 0.0, 0.0]]


@pytest.mark.parametrize("config", [SMALL, CROSSED, SMALL.model_copy(update={"user_statistics": True})])
def test_a_request_that_is_read_once_has_the_answers_of_one_read_with_each_candidate(config):
    network, candidates = ranker(config), 7
    requests, rows = inputs(3, seed=1), inputs(3 * candidates, seed=2)
    requests[2][0, 0] = torch.nan
    repeated = [one.repeat_interleave(candidates, dim=0) for one in requests]
    statistics = torch.cat([rows[4][:, :2], repeated[4][:, 2:4], rows[4][:, 4:]], dim=1)
    expected = network(repeated[0], rows[1], repeated[2], rows[3], statistics)
    asking = network.ask(requests[0], requests[2], requests[4][:, 2:4])
    assert asking.shape == (3, config.hidden)
    found = network.answer(asking.repeat_interleave(candidates, dim=0), rows[1], rows[3], statistics)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", [SMALL, CROSSED], ids=["mlp", "dcn"])
def test_logits_and_features_by_hand(config):
    """One row through every layer, written out."""
    network, (request, candidate, first, second, statistics) = ranker(config), inputs()
    first[1] = torch.nan
    state = {name: value.detach() for name, value in network.state_dict().items()}

    def layer(name, value):
        return state[f"{name}.weight"] @ value + state[f"{name}.bias"]

    def tower(name, value):
        return layer(f"{name}.2", layer(f"{name}.0", value).relu())

    about_request = torch.cat([
        state["request_tables.0.weight"][request[0]], state["request_tables.1.weight"][request[1]],
        torch.stack([first[0].clamp(-5, 5), torch.tensor(0.0), torch.tensor(0.0), torch.tensor(1.0)]),
        torch.zeros(2),
    ])  # fmt: skip
    about_candidate = torch.cat([
        state["candidate_tables.0.weight"][candidate[0]], state["candidate_tables.1.weight"][candidate[1]],
        second, torch.zeros(1), statistics[:2],
    ])  # fmt: skip
    left, right = tower("request_tower", about_request), tower("candidate_tower", about_candidate)
    if config.kind == "mlp":
        read = torch.cat([left, right, left * right, statistics[4:]])
    else:
        begin = torch.cat([left, right, statistics[4:]])
        once = begin * layer("cross.layers.0", begin) + begin
        read = begin * layer("cross.layers.1", once) + once
    joint = layer("joint.3", layer("joint.0", read).relu())
    heard = statistics * torch.tensor([1.0, 1, 0, 0, 1])  # the user's own statistics are off by default
    expected = statistics[:1] + layer("wide", heard) + joint
    logits, features = network(request, candidate, first, second, statistics)
    # Weights of the number and of the three tower features, predicted from the request.
    weighed = torch.cat([second.clamp(-5, 5), layer("head", right)])
    expected = expected + (state["prior"][0] @ left * weighed).sum()
    torch.testing.assert_close(logits, expected)
    factors = [state[f"factor_tables.{at}.weight"][candidate[at]] for at in (0, 1)]
    wanted = torch.cat([torch.ones(1), *factors, second.clamp(-5, 5), layer("head", right)])
    torch.testing.assert_close(features, wanted)


def test_predicted_weights_start_at_nothing_and_draw_nothing():
    batch = inputs(5)
    said = []
    for prior in (False, True):
        torch.manual_seed(3)
        network = Ranker(SHAPE, SMALL.model_copy(update={"prior": prior})).eval()
        assert (network.prior is not None) == prior
        said.append(network(*batch)[0])
    assert torch.equal(*said)
    assert "prior" not in RankerConfig().model_dump(), "bases and configs from before are others by this"
    for bare in ({"direct": False, "features": 0}, {}):
        bent = AdapterConfig(kind="film").bent if not bare else None
        assert Ranker(SHAPE, SMALL.model_copy(update=bare), bent).prior is None


def test_cross_layers_are_the_products_of_their_inputs():
    """With unit weights and no bias one layer is x_i (x_1 + x_2) + x_i."""
    cross = Cross(2, 1)
    for parameter, value in zip(cross.parameters(), (1.0, 0.0), strict=True):
        nn.init.constant_(parameter, value)
    first, second = 3.0, -0.5
    expected = [first * (first + second) + first, second * (first + second) + second]
    assert cross(torch.tensor([first, second])).tolist() == expected


def test_cross_layers_are_refused_where_there_are_none():
    assert RankerConfig(kind="dcn", cross_layers=3).cross_layers == 3
    assert "cross_layers" not in RankerConfig().model_dump(), "bases and configs from before are others by this"
    with pytest.raises(ValueError, match=r"cross_layers = 3 belongs to ranker.kind 'dcn', and the kind is 'mlp'"):
        RankerConfig(cross_layers=3)


@pytest.mark.parametrize("config", [SMALL, CROSSED], ids=["mlp", "dcn"])
def test_a_fresh_network_says_the_item_rate_and_gives_features_of_its_width(config):
    network, batch = Ranker(SHAPE, config).eval(), inputs(7)
    logits, features = network(*batch)
    assert torch.equal(logits, batch[4][..., :1])
    assert features.shape == (7, network.width) == (7, 8)
    assert torch.equal(features[:, :4], torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(7, 4))


@pytest.mark.parametrize("config", [SMALL, CROSSED], ids=["mlp", "dcn"])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_any_leading_axes_give_what_single_rows_give(lead, config):
    network, batch = ranker(config), inputs(*lead)
    logits, features = network(*batch)
    assert logits.shape == (*lead, 1)
    flat = [part.reshape(-1, part.shape[-1]) for part in batch]
    singly = [network(*(part[row] for part in flat)) for row in range(len(flat[0]))]
    torch.testing.assert_close(logits.reshape(-1, 1), torch.stack([logit for logit, _ in singly]))
    torch.testing.assert_close(features.reshape(-1, 8), torch.stack([feature for _, feature in singly]))


def test_ids_beyond_the_table_are_the_unknown_row():
    network, (request, candidate, *rest) = ranker(), inputs(4)
    beyond = network(request + 100, candidate + 100, *rest)
    unknown = network(torch.zeros_like(request), torch.zeros_like(candidate), *rest)
    assert all(torch.equal(one, other) for one, other in zip(beyond, unknown, strict=True))


@pytest.mark.parametrize("reads", [False, True])
def test_the_user_s_statistics_are_read_only_when_asked_for(reads):
    network, batch = ranker(SMALL.model_copy(update={"user_statistics": reads})), inputs(4)
    batch[4].requires_grad_()
    (slope,) = torch.autograd.grad(network(*batch)[0].sum(), batch[4])
    assert bool((slope[:, 2:4] != 0).all()) == reads
    assert (slope[:, [0, 1, 4]] != 0).all()


def test_adapter_features_know_the_candidate_and_nothing_of_the_request():
    """An adapter's weights stand for the user; his own columns must not come in a second time."""
    network, batch = ranker(), inputs(4)
    other = [*(part.clone() for part in inputs(4, seed=1))]
    mixed = (other[0], batch[1], other[2], batch[3], torch.cat([batch[4][:, :2], other[4][:, 2:]], dim=1))
    assert torch.equal(network(*batch)[1], network(*mixed)[1])
    assert not torch.equal(network(*batch)[0], network(*mixed)[0])


ROOMY = SHAPE.model_copy(update={"candidate_vocabularies": (6, 5, 3), "candidate_numbers": 2})
"""Two categorical candidate columns besides the item, and two numeric ones."""


def roomy(*lead):
    request, candidate, first, _, statistics = inputs(*lead)
    third = torch.randint(0, 3, (*lead, 1), generator=torch.Generator().manual_seed(1))
    return request, torch.cat([candidate, third], dim=-1), first, torch.randn(*lead, 2), statistics


@pytest.mark.parametrize("factors", [0, 2])
@pytest.mark.parametrize("category", [0, 3])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("features", [0, 4])
def test_the_parts_are_what_comes_out_feature_by_feature(factors, category, direct, features):
    changed = {"factors": factors, "category_factors": category, "direct": direct, "features": features}
    torch.manual_seed(2)
    network = Ranker(ROOMY, SMALL.model_copy(update=changed)).eval()
    with torch.no_grad():
        for table in network.factor_tables:
            table.weight.normal_()
    network.candidate_normaliser.mean.copy_(torch.tensor([1.0, -2.0]))
    network.candidate_normaliser.scale.copy_(torch.tensor([0.5, 4.0]))
    batch = roomy(7)
    batch[3][3] = torch.tensor([torch.nan, 1e6])
    said = network(*batch)[1]
    tables = iter(network.factor_tables)
    expected = {"constant": torch.ones(7, 1)}
    if factors:
        expected["item factors"] = next(tables).weight[batch[1][:, 0]]
    if category:
        expected["category factors"] = torch.cat([next(tables).weight[batch[1][:, at]] for at in (1, 2)], dim=1)
    assert next(tables, None) is None
    if direct:
        expected["numbers"] = ((batch[3] - torch.tensor([1.0, -2.0])) / torch.tensor([0.5, 4.0])).clamp(-5, 5)
        expected["numbers"][3] = torch.tensor([0.0, 5.0])  # a missing number is the mean
    if features:
        expected["tower features"] = said[:, -features:]
    assert list(network.parts) == list(expected)
    width = 1 + factors + 2 * category + 2 * direct + features
    assert network.width == said.shape[1] == width
    assert [at for part in network.parts.values() for at in range(width)[part]] == list(range(width))
    for name, part in network.parts.items():
        torch.testing.assert_close(said[:, part], expected[name], msg=name)


def test_without_categories_and_numbers_there_are_no_parts_of_them():
    bare = SHAPE.model_copy(update={"candidate_vocabularies": (6,), "candidate_numbers": 0})
    network = Ranker(bare, RankerConfig(warm_up=True)).eval()
    assert list(network.parts) == ["constant", "item factors"]
    assert network.warm_up is None
    request, candidate, first, _, statistics = inputs(3)
    assert network(request, candidate[:, :1], first, torch.zeros(3, 0), statistics)[1].shape == (3, 5)


def test_an_unknown_category_has_the_factors_of_the_unknown_row():
    network, (request, candidate, *rest) = ranker(), inputs(5)
    candidate[:, 1] = torch.tensor([0, 1, 4, 5, 99])
    part = network.parts["category factors"]
    rows = network.factor_tables[1].weight[[0, 1, 4, 0, 0]]
    assert torch.equal(network(request, candidate, *rest)[1][:, part], rows)


def test_an_item_without_rows_has_the_factors_that_its_columns_tell():
    """By hand: the constant, the line in its numbers and its category's row; its own row is 0, or its id is new."""
    network, (request, candidate, first, second, statistics) = ranker(), inputs(5)
    with torch.no_grad():
        network.factor_tables[0].weight[[0, 2]] = 0.0
    candidate[:, 0] = torch.tensor([2, 0, 99, 1, 2])
    candidate[:, 1] = torch.tensor([1, 2, 3, 4, 99])
    second[1] = torch.nan
    state = network.state_dict()
    numbers = torch.cat([second.nan_to_num().clamp(-5, 5), second.isnan().float()], dim=1)
    told = state["warm_up.constant"] + numbers @ state["warm_up.line.weight"].T
    told = told + state["warm_up.tables.0.weight"][[1, 2, 3, 4, 0]]
    told[3] = state["factor_tables.0.weight"][1]
    found = network(request, candidate, first, second, statistics)[1][:, network.parts["item factors"]]
    torch.testing.assert_close(found, told)
    plain = ranker(SMALL.model_copy(update={"warm_up": False}))
    assert plain.warm_up is None
    with torch.no_grad():
        plain.factor_tables[0].weight[[0, 2]] = 0.0
    cold = plain(request, candidate, first, second, statistics)[1][:, plain.parts["item factors"]]
    assert cold.any(dim=1).tolist() == [False, False, False, True, False]


def test_dropout_of_ids_requests_and_units_is_for_training_only():
    network, batch = ranker(SMALL.model_copy(update={"id_dropout": 0.5})), inputs(50)
    assert torch.equal(network(*batch)[0], network(*batch)[0])
    network.train()
    assert not torch.equal(network(*batch)[0], network(*batch)[0])
    factors = network(*batch)[1][:, 1:3]
    known, unknown = network.factor_tables[0].weight[batch[1][:, 0]], network.factor_tables[0].weight[0]
    dropped = (factors == unknown).all(dim=1)
    assert ((factors == known).all(dim=1) | dropped).all()
    assert 5 < int(dropped.sum()) < 45


def test_restore_gives_the_same_scores_and_refuses_other_shapes():
    network, batch = ranker(), inputs(4)
    again = Ranker.restore(SHAPE, SMALL, network.state_dict(), None, 0)
    assert not again.training
    assert torch.equal(again(*batch)[0], network(*batch)[0])
    with pytest.raises(RuntimeError, match="size mismatch"):
        Ranker.restore(SHAPE.model_copy(update={"request_vocabularies": (4, 9)}), SMALL, network.state_dict(), None, 0)
