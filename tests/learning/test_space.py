"""What may be searched: a space that does not fit its config is refused line by line, before anything is trained."""

from dataclasses import replace
from typing import Any, get_args

import pytest

from tasks.errors import InvalidConfig
from tasks.learning.adapters import AdapterConfig
from tasks.learning.networks import Ranker
from tasks.learning.ranker_config import RankerConfig
from tasks.learning.ranker_shape import RankerShape
from tasks.learning.space import (
    BELONGS,
    DEFAULT,
    FIXED,
    Sections,
    Settings,
    candidate_kinds,
    default_space,
    read_space,
)
from tasks.learning.training_config import BESIDE, TrainingConfig
from tests.learning.small_rows import contract

NOW = Sections(RankerConfig(), AdapterConfig(), TrainingConfig())


def test_a_space_of_every_type_is_read():
    told = {
        "training.learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
        "ranker.factors": {"type": "int", "low": 0, "high": 8},
        "ranker.direct": {"type": "choice", "choices": [True, False]},
        "training.half_life_nights": {"type": "choice", "choices": [None, 30.0]},
    }
    space = read_space(told, NOW, "space s.yaml")
    assert list(space) == list(told)
    assert space["training.learning_rate"].extremes[:2] == (1e-4, 1e-2)
    assert space["training.half_life_nights"].extremes == (None, 30.0)


@pytest.mark.parametrize(
    ("name", "told", "fault"),
    [
        ("training.learning_rat", {"type": "int", "low": 1, "high": 2}, "did you mean 'training.learning_rate'?"),
        ("segments.min_support", {"type": "int", "low": 1, "high": 2}, "no setting of ranker, adapter, training"),
        ("training.seed", {"type": "int", "low": 1, "high": 2}, "a seed that was chosen by its luck"),
        ("ranker.dropout", {"type": "float", "low": 0.1, "high": 1.5}, "1.5 is not allowed: Input should be less"),
        ("ranker.factors", {"type": "float", "low": 0.5, "high": 2.0}, "0.5 is not allowed: Input should be a valid"),
        ("ranker.factors", {"type": "float", "low": 1, "high": 9}, "is not allowed: Input should be a valid integer"),
        ("ranker.kind", {"type": "choice", "choices": ["mlp", "tree"]}, "'tree' is not allowed: Input should be 'mlp'"),
        ("ranker.factors", {"type": "int", "low": 4, "high": 4}, "low 4 must be below high 4"),
        ("ranker.factors", {"type": "int", "low": 0, "high": 4, "log": True}, "log needs a low above 0, found 0"),
        ("ranker.factors", {"type": "int", "low": 0.5, "high": 4}, "type int needs whole numbers, found 0.5 and 4"),
        ("ranker.factors", {"type": "int", "choices": [1, 2]}, "type int needs low and high, and no choices"),
        ("ranker.factors", {"type": "choice", "choices": [1]}, "a choice needs choices, at least two different ones"),
        ("ranker.factors", {"type": "integer", "low": 1, "high": 2}, "ranker.factors.type: Input should be 'float'"),
        ("ranker.factors", {"type": "int", "low": 1, "hihg": 2}, "ranker.factors.hihg: Extra inputs are not permitted"),
        ("ranker.factors", 3, "Input should be a valid dictionary"),
    ],
)
def test_a_fault_names_the_setting_and_what_is_allowed(name: str, told: Any, fault: str):
    with pytest.raises(InvalidConfig, match=r"^space s.yaml has 1 fault:\n  ") as caught:
        read_space({name: told}, NOW, "space s.yaml")
    assert name in str(caught.value)
    assert fault in str(caught.value)


def test_all_faults_are_told_together_and_an_empty_space_is_one():
    told = {"training.pul": {"type": "int", "low": 1, "high": 2}, "adapter.steps": {"type": "int", "low": 0, "high": 2}}
    with pytest.raises(InvalidConfig, match="has 2 faults:") as caught:
        read_space(told, NOW, "space s.yaml")
    assert "training.pul" in str(caught.value)
    assert "adapter.steps: 0 is not allowed" in str(caught.value)
    with pytest.raises(InvalidConfig, match="names no setting"):
        read_space({}, NOW, "space s.yaml")


def test_the_default_space_fits_the_default_config_and_holds_its_settings():
    told = {name: one.model_dump() for name, one in DEFAULT.items()}
    assert read_space(told, NOW, "the default") == DEFAULT
    for name, one in DEFAULT.items():
        low, high = one.low, one.high
        assert low <= NOW.value(name) <= high, name


def test_settings_replace_those_of_the_config_and_have_to_fit_together():
    changed = NOW.changed({"training.learning_rate": 0.01, "ranker.factors": 7})
    assert (changed.training.learning_rate, changed.ranker.factors) == (0.01, 7)
    assert (changed.adapter, changed.ranker.dropout) == (NOW.adapter, NOW.ranker.dropout)
    with pytest.raises(InvalidConfig, match="reptile"):
        NOW.changed({"training.outer": "reptile"})
    with pytest.raises(InvalidConfig, match=r"^ranker\.cross_layers = 4 belongs to .* 'dcn'"):
        NOW.changed({"ranker.cross_layers": 4})
    silent = {"ranker.factors": 0, "ranker.category_factors": 0, "ranker.features": 0, "ranker.direct": False}
    with pytest.raises(
        InvalidConfig, match=r"^adapter\.kind: 'ridge' weighs adapter features, and the ranker has none"
    ):
        NOW.changed(silent)


def test_what_is_beside_a_training_is_not_searched():
    """A study's name leaves it out: trials with it would be taken for those without."""
    assert {f"training.{name}" for name in BESIDE} <= FIXED.keys()


def other(field: Any) -> Any:
    """A value of a field that is not its default."""
    if isinstance(field.default, bool):
        return not field.default
    if isinstance(field.default, int):
        return field.default + 1
    if isinstance(field.default, float):
        return field.default * 0.9
    return next((value for value in get_args(field.annotation) if value != field.default), None)


def test_all_settings_that_a_config_refuses_beside_its_kind_are_known_to_belong_to_one():
    refused: dict[str, str] = {}
    for name, whole in NOW.named.items():
        for field, about in type(whole).model_fields.items():
            try:
                NOW.changed({f"{name}.{field}": other(about)})
            except InvalidConfig as error:
                refused[f"{name}.{field}"] = str(error)
    beside = {"ranker.prior", "ranker.warm_up"}  # they go with the adapter that is there
    assert {setting for setting, said in refused.items() if "belongs to" in said} == BELONGS.keys() - beside
    for setting, (switch, values) in BELONGS.items():
        section, field = setting.split(".")
        value = other(type(getattr(NOW, section)).model_fields[field])
        # A transformer needs a history, and heads that divide the width.
        needed: Settings = {"ranker.history": 3, "ranker.hidden": 36} if "transformer" in values else {}
        made = NOW.changed({switch: next(iter(values)), **needed, setting: value})
        assert made.value(setting) == value
        # Where another kind is drawn it is as if nothing had been said of it.
        if NOW.value(switch) not in values:
            assert made.changed({switch: NOW.value(switch)}).value(setting) == NOW.value(setting)


@pytest.mark.parametrize("name", [f"ranker.{name}" for name in ("factors", "category_factors", "direct", "features")])
def test_a_feature_is_unread_where_it_changes_no_number_of_an_adapter(name: str):
    shape = RankerShape(
        request_vocabularies=(3,), candidate_vocabularies=(5, 4), request_numbers=1, candidate_numbers=2,
        request_statistics=(0,), candidate_statistics=(1,), joint_statistics=(), offsets=(1,), kinds=("binary",),
    )  # fmt: skip
    trials: list[Settings] = [
        {"adapter.kind": kind} for kind in get_args(AdapterConfig.model_fields["kind"].annotation)
    ]
    for drawn in (*trials, {"adapter.kind": "gradient", "adapter.bends": "dense"}):
        field = RankerConfig.model_fields[name.split(".")[1]]
        widths = set()
        for value in (field.default, other(field)):
            made = NOW.changed({**drawn, name: value})
            widths.add(made.adapter.width(Ranker(shape, made.ranker, made.adapter.bent).width))
        assert NOW.applies(name, drawn) == (len(widths) > 1), drawn


def test_the_default_space_leaves_out_what_the_adapter_does_not_read():
    features = {"ranker.factors", "ranker.category_factors"}
    precisions = {"adapter.precision", "adapter.coarse_precision"}
    left_out = {"ridge": set(), "gradient": set(), "bias": features, "film": features, "lora": features,
                "none": features | precisions}  # fmt: skip
    for kind, names in left_out.items():
        now = replace(NOW, adapter=AdapterConfig(kind=kind))
        assert default_space(now).keys() == DEFAULT.keys() - names
    dense = replace(NOW, adapter=AdapterConfig(kind="gradient", bends="dense"))
    assert default_space(dense).keys() == DEFAULT.keys() - features


def test_a_kind_and_what_belongs_to_it_stand_in_one_space():
    ranks = {"type": "int", "low": 1, "high": 8}
    kinds = {"type": "choice", "choices": ["ridge", "lora"]}
    assert set(read_space({"adapter.rank": ranks, "adapter.kind": kinds}, NOW, "s")) == {"adapter.rank", "adapter.kind"}
    lora = replace(NOW, adapter=AdapterConfig(kind="lora", rank=8))
    assert set(read_space({"adapter.kind": kinds, "ranker.factors": ranks}, lora, "s")) == {
        "adapter.kind",
        "ranker.factors",
    }
    assert lora.changed({"adapter.kind": "ridge"}).adapter == AdapterConfig()
    dense = replace(NOW, adapter=AdapterConfig(kind="gradient", bends="dense"))
    both = {"type": "choice", "choices": ["ridge", "gradient"]}
    assert len(read_space({"adapter.kind": both, "ranker.factors": ranks}, dense, "s")) == 2
    assert [dense.applies("ranker.factors", {"adapter.kind": kind}) for kind in ("ridge", "gradient")] == [True, False]
    others = {"type": "choice", "choices": ["film", "bias"]}
    with pytest.raises(InvalidConfig, match=r"adapter\.rank: 1 is not allowed: adapter\.rank = 1 belongs to .* 'lora'"):
        read_space({"adapter.rank": ranks, "adapter.kind": others}, NOW, "s")
    with pytest.raises(InvalidConfig, match=r"ranker\.factors: is not read with adapter\.bends 'head'; remove it"):
        read_space({"ranker.factors": ranks, "adapter.kind": others}, NOW, "s")


def test_what_a_kind_needs_is_tried_beside_it():
    told = {
        "ranker.kind": {"type": "choice", "choices": ["mlp", "transformer"]},
        "ranker.history": {"type": "int", "low": 5, "high": 10},
        "ranker.heads": {"type": "choice", "choices": [1, 4]},
    }
    assert set(read_space(told, NOW, "space")) == set(told)
    with pytest.raises(InvalidConfig, match=r"ranker.kind: 'transformer' is not allowed: .*ranker.history is 0"):
        read_space({"ranker.kind": told["ranker.kind"]}, NOW, "space")


@pytest.mark.parametrize("own", [{"prior": True}, {"warm_up": True}])
def test_no_trial_has_settings_that_a_config_would_refuse(own: dict[str, bool]):
    """With an adapter that does not hear it, what the ranker would tell it is off."""
    now = replace(NOW, ranker=RankerConfig(**own))
    (name,) = own
    assert not now.changed({"adapter.kind": "film"}).value(f"ranker.{name}")
    assert now.changed({"adapter.kind": "gradient"}).value(f"ranker.{name}")
    assert not now.changed({"adapter.kind": "gradient", "adapter.bends": "dense"}).value(f"ranker.{name}")
    with pytest.raises(InvalidConfig, match=f"ranker.{name}: it "):
        now.changed({"ranker.factors": 0, "ranker.direct": False})


def chosen(*values: Any) -> dict[str, Any]:
    return {"type": "choice", "choices": list(values)}


def test_what_needs_a_column_that_the_data_lack_is_refused_before_a_trial():
    assert candidate_kinds(contract()) == {"numeric", "categorical"}
    assert candidate_kinds(contract(prices=0)) == {"categorical"}
    bare = replace(NOW, columns=frozenset())
    assert default_space(bare).keys() == DEFAULT.keys() - {"ranker.category_factors"}
    for name, values, kinds in (
        ("direct", (True, False), "a numeric"),
        ("category_factors", (1, 4), "a categorical or multi"),
    ):
        with pytest.raises(
            InvalidConfig, match=rf"ranker\.{name}: is not read without {kinds} candidate column; remove"
        ):
            read_space({f"ranker.{name}": chosen(*values)}, bare, "s")
    assert read_space({"ranker.category_factors": chosen(1, 4)}, replace(bare, columns=frozenset(["multi"])), "s")


def test_a_value_that_no_trial_could_use_is_refused_before_one():
    """With numbers in the columns `direct` tells an adapter enough; without, an item needs factors or features."""
    told = {"ranker.factors": {"type": "int", "low": 0, "high": 8}}
    bare = replace(NOW, columns=frozenset())
    assert read_space(told, replace(bare, columns=frozenset(["numeric"])), "s")
    with pytest.raises(
        InvalidConfig, match=r"1 fault:\n  ranker\.factors: 0 is not allowed: adapter\.kind: 'ridge' weighs"
    ):
        read_space(told, bare, "s")
    assert read_space({**told, "ranker.features": chosen(0, 2)}, bare, "s")
    with pytest.raises(InvalidConfig, match="the ranker has none but the constant"):  # the trial that has neither
        bare.changed({"ranker.factors": 0, "ranker.features": 0})
    loops = {"training.outer": chosen("second_order", "reptile")}
    with pytest.raises(InvalidConfig, match=r"1 fault:\n  training\.outer: 'reptile' is not allowed: "):
        read_space(loops, NOW, "s")
    assert len(read_space({**loops, "adapter.kind": chosen("ridge", "gradient")}, NOW, "s")) == 2
