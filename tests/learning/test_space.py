"""What may be searched: a space that does not fit its config is refused line by line, before anything is trained."""

from typing import Any

import pytest

from tasks.errors import InvalidConfig
from tasks.learning.adapters import AdapterConfig
from tasks.learning.networks import RankerConfig
from tasks.learning.space import DEFAULT, Sections, read_space
from tasks.learning.training_config import TrainingConfig

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
    with pytest.raises(InvalidConfig, match=r"belongs to .* 'dcn'"):
        NOW.changed({"ranker.cross_layers": 4})
