"""Which trainings have a key of their own since gradients through bent layers changed in their last bits."""

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


@pytest.mark.parametrize(
    ("adapter", "outer", "own"),
    [
        ({}, "second_order", False),
        ({"kind": "gradient"}, "second_order", False),
        ({"kind": "matching"}, "second_order", False),
        ({"kind": "film"}, "first_order", False),
        ({"kind": "film"}, "second_order", True),
        ({"kind": "lora"}, "second_order", True),
        ({"kind": "gradient", "bends": "dense"}, "second_order", True),
    ],
)
def test_only_second_order_training_through_bent_layers_is_another_one(monkeypatch, tmp_path, adapter, outer, own):
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
            place, contract(), *configs, AdapterConfig(**adapter), night, SimpleNamespace(history=None)
        )
    step, version, section = found.value.args[0]
    assert (step, version) == ("meta-train", 3)
    before = {"objectives", "segments", "ranker", "training", "adapter", "device"}
    assert set(section) == before | ({"bent"} if own else set())
