"""A base on disk, a base that grows, and files that are no base."""

import json
from dataclasses import replace
from datetime import date

import pytest
import torch

from tasks.errors import FormatUnknown, ObjectCorrupt
from tasks.learning.adapters import AdapterConfig, Precisions
from tasks.learning.base import DESCRIPTION, WEIGHTS, Base, grow, load_base, save_base, shape_of
from tasks.learning.material import Material
from tasks.learning.networks import Ranker, RankerConfig
from tests.learning.small_rows import contract, opposed, shape, vocabularies_of

KINDS = ("binary", "rating")
LEVELS = (("shopper",), ("market",))
RIDGE = AdapterConfig()
BENT = ({"kind": "film"}, {"kind": "lora", "rank": 2}, {"kind": "gradient", "bends": "dense"})
ATTENDING = {"kind": "matching", "prototypes": 3}
SMALL = RankerConfig(embedding=3, hidden=4, factors=2, features=3)


@pytest.fixture(scope="module")
def rows():
    return opposed(nights=2, users=9)


def base_of(rows, seed=0, more=0, adapter=RIDGE, ranker=SMALL):
    """A base with random numbers in everything that is stored."""
    torch.manual_seed(seed)
    network = Ranker(shape(rows, *KINDS, more=more), ranker, adapter.bent, adapter.matching)
    precisions = Precisions(2, 2, adapter.width(network.width), adapter)
    with torch.no_grad():
        for stored in (*network.state_dict().values(), *precisions.state_dict().values()):
            stored.copy_(torch.rand_like(stored) + 0.1)
    return Base(network.eval(), precisions, LEVELS, adapter, date(2026, 3, 2))


def scores(base, rows):
    with torch.no_grad():
        return Material(rows).scorer(base.network)(torch.arange(len(rows)).numpy())


@pytest.mark.parametrize("nights", [None, 9])
def test_a_base_knows_how_few_nights_its_chain_began_on(rows, tmp_path, nights):
    base = replace(base_of(rows), begun_on=nights)
    assert load_base(save_base(base, tmp_path)).begun_on == nights
    assert ("begun_on" in json.loads((tmp_path / DESCRIPTION).read_text())) == (nights is not None)
    assert grow(base, shape(rows, *KINDS, more=3)).begun_on == nights
    assert base.to("cpu").begun_on == nights


@pytest.mark.parametrize(
    "adapter", [*({"kind": kind} for kind in ("none", "bias", "ridge", "gradient")), *BENT, ATTENDING], ids=str
)
def test_a_base_comes_back_from_disk(rows, tmp_path, adapter):
    base = base_of(rows, adapter=AdapterConfig(**adapter, steps=2))
    back = load_base(save_base(base, tmp_path))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(scores(back, rows), scores(base, rows), strict=True))
    assert torch.equal(back.table(), base.table())
    assert (back.levels, back.adapter, back.trained_through) == (base.levels, base.adapter, base.trained_through)
    assert (back.network.shape, back.network.config) == (base.network.shape, base.network.config)
    assert back.kinds == KINDS
    assert not back.network.training
    assert not back.table().requires_grad
    assert back.parameters() == base.parameters() > 0


def test_equal_bases_are_equal_bytes_and_others_are_not(rows, tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        folder.mkdir()
        save_base(base_of(rows, seed), folder)
    first, second, other = ([(folder / name).read_bytes() for name in (WEIGHTS, DESCRIPTION)] for folder in folders)
    assert first == second
    assert first[0] != other[0]


@pytest.mark.parametrize(
    ("adapter", "ranker", "number"),
    [
        ({"kind": "ridge"}, {}, 2),
        ({"kind": "gradient"}, {"kind": "dcn"}, 3),
        ({"kind": "ridge"}, {"warm_up": True}, 4),
        *((bent, {}, 4) for bent in BENT),
        (BENT[0], {"kind": "dcn"}, 4),
        (ATTENDING, {}, 5),
        (ATTENDING, {"warm_up": True}, 5),
    ],
)
def test_an_older_version_reads_no_base_whose_parts_it_does_not_know(rows, tmp_path, adapter, ranker, number):
    """By the number of the format, which a version that knows fewer of them refuses."""
    base = base_of(rows, adapter=AdapterConfig(**adapter), ranker=SMALL.model_copy(update=ranker))
    assert json.loads(save_base(base, tmp_path)[DESCRIPTION].read_text())["format"] == number


def broken(files, how):
    """Damage the files of a base."""
    weights, description = files[WEIGHTS], files[DESCRIPTION]
    told = json.loads(description.read_text())
    if how == "weights cut short":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif how == "weights are noise":
        weights.write_bytes(b"\x00noise" * 50)
    elif how == "weights are empty":
        weights.write_bytes(b"")
    elif how == "description is no JSON":
        description.write_bytes(b"\xff\xfe{")
    elif how == "description is a list":
        description.write_text("[1]")
    else:
        key, value = {
            "another format": ("format", 99),
            "an unknown adapter": ("adapter", {"kind": "magic"}),
            "an unknown setting": ("ranker", told["ranker"] | {"depth": 3}),
            "another width": ("ranker", told["ranker"] | {"hidden": 5}),
            "more rows": ("shape", told["shape"] | {"request_vocabularies": [50, 2]}),
            "no shape": ("shape", None),
            "a level more": ("levels", [["shopper"], ["market"], ["region"]]),
            "no date": ("trained_through", "yesterday"),
        }[how]
        description.write_text(json.dumps(told | {key: value}))


@pytest.mark.parametrize(
    "how",
    [
        "weights cut short", "weights are noise", "weights are empty", "description is no JSON",
        "description is a list", "another format", "an unknown adapter", "an unknown setting", "another width",
        "more rows", "no shape", "a level more", "no date",
    ],
)  # fmt: skip
def test_files_that_do_not_make_a_base_are_refused(rows, tmp_path, how):
    files = save_base(base_of(rows), tmp_path)
    broken(files, how)
    expected = FormatUnknown if how == "another format" else ObjectCorrupt
    with pytest.raises(expected, match=r"base\.json"):
        load_base(files)


def test_the_shape_follows_the_contract_and_the_vocabularies(rows):
    sized = shape_of(contract(*KINDS), rows, vocabularies_of(rows, more=4))
    known = vocabularies_of(rows)
    assert sized.request_vocabularies == (known["market"].rows + 4, known["region"].rows + 4)
    assert sized.candidate_vocabularies == (known["product"].rows + 4, known["genre"].rows + 4)
    assert (sized.request_numbers, sized.candidate_numbers) == (1, 1)
    assert rows.statistics_names[0:3] == ("item_rate:aim0", "item_rate:aim1", "item_count")
    assert sized.candidate_statistics == (0, 1, 2)
    assert sized.request_statistics == (3, 4, 5)
    assert sized.joint_statistics == (6, 7, 8)
    assert sized.offsets == (0, 1)
    assert sized.kinds == KINDS


@pytest.mark.parametrize("adapter", [{"kind": "ridge"}, BENT[1]], ids=str)
def test_growing_changes_no_score_of_old_ids_nor_of_new_ones(rows, adapter):
    base = base_of(rows, adapter=AdapterConfig(**adapter))
    grown = grow(base, shape(rows, *KINDS, more=5))
    assert grown.network.shape == shape(rows, *KINDS, more=5)
    fresh = [torch.full((4, 2), 0), torch.full((4, 2), 0), torch.rand(4, 1), torch.rand(4, 1), torch.rand(4, 9)]
    fresh[0] += torch.tensor([shape(rows, *KINDS).request_vocabularies])  # the first ids that are new
    fresh[1] += torch.tensor([shape(rows, *KINDS).candidate_vocabularies])
    for one, other in (
        (scores(base, rows), scores(grown, rows)),
        (base.network(*fresh), grown.network(*fresh)),
    ):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))
    assert (grown.levels, grown.adapter, grown.trained_through) == (base.levels, base.adapter, base.trained_through)
    assert torch.equal(grown.table(), base.table())


def test_growing_leaves_the_parent_alone(rows):
    base = base_of(rows)
    before = {name: value.clone() for name, value in base.network.state_dict().items()}
    grow(base, shape(rows, *KINDS, more=5))
    assert all(torch.equal(value, before[name]) for name, value in base.network.state_dict().items())


@pytest.mark.parametrize(
    "change",
    [
        {"request_numbers": 2},
        {"kinds": ("binary", "binary")},
        {"request_statistics": (), "joint_statistics": (3, 4, 5, 6, 7, 8)},
        {"request_vocabularies": (2, 2)},
        {"request_vocabularies": (4, 2, 7)},
        {"request_vocabularies": (4,)},
        {"candidate_vocabularies": (13, 4, 9)},
        {"candidate_vocabularies": (13,)},
        {"candidate_vocabularies": (12, 4)},
    ],
)
def test_a_base_of_another_shape_or_with_more_rows_is_no_start(rows, change):
    base = base_of(rows)
    assert (base.network.shape.request_vocabularies, base.network.shape.candidate_vocabularies) == ((4, 2), (13, 4))
    assert grow(base, base.network.shape.model_copy(update=change)) is None
    assert grow(base, base.network.shape) is not None
