"""Which trainings have keys of their own since what they answer has changed; the others keep their records."""

from datetime import date
from types import SimpleNamespace

import pytest

from tasks import meta_train as module
from tasks.data.contract import SegmentsConfig
from tasks.learning.adapters import AdapterConfig
from tasks.learning.ranker_config import RankerConfig
from tasks.learning.training_config import TrainingConfig
from tasks.references import Place
from tests.learning.small_rows import contract


class Asked(Exception):
    """Ends a step when it asks for its record."""


ONE, TWO = ("binary",), ("binary", "rating")


@pytest.mark.parametrize(
    ("adapter", "outer", "kinds", "own"),
    [
        ({}, "second_order", ONE, set()),
        ({"kind": "gradient"}, "second_order", ONE, set()),
        ({"kind": "film"}, "joint", ONE, set()),
        ({"kind": "matching"}, "second_order", ONE, {"starts"}),
        ({"kind": "film"}, "first_order", ONE, {"starts"}),
        ({"kind": "film"}, "second_order", ONE, {"starts", "bent"}),
        ({"kind": "lora"}, "second_order", ONE, {"starts", "bent"}),
        ({"kind": "gradient", "bends": "dense"}, "second_order", ONE, {"starts", "bent"}),
        ({}, "second_order", ("rating",), set()),
        ({}, "second_order", TWO, {"factors", "precisions"}),
        ({"kind": "film"}, "second_order", TWO, {"starts", "bent", "factors", "precisions"}),
    ],
)
def test_a_training_has_a_key_of_its_own_only_where_its_answers_are_others(
    monkeypatch, tmp_path, adapter, outer, kinds, own
):
    def asked(place, step, version, night, inputs, section, work):
        raise Asked((step, version, section))

    monkeypatch.setattr(module, "recalled", lambda *names: SimpleNamespace(digest="d"))
    monkeypatch.setattr(module, "device_of", lambda place: "cpu")
    monkeypatch.setattr(module, "carry_out", asked)
    configs = SegmentsConfig(levels=(("shopper",),)), RankerConfig(), TrainingConfig(outer=outer)
    night = SimpleNamespace(parent=None, night=date(2026, 3, 7))
    place = Place(store="s", pipeline="tiny", scratch=str(tmp_path))
    with pytest.raises(Asked) as found:
        module.meta_train.fn(
            place, contract(*kinds), *configs, AdapterConfig(**adapter), night, SimpleNamespace(history=None)
        )
    step, version, section = found.value.args[0]
    assert (step, version) == ("meta-train", 5)
    before = {"objectives", "segments", "ranker", "training", "adapter", "device"}
    assert set(section) == before | own
