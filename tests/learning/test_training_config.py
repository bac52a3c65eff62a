"""The training's section of the config: what it refuses, and what it leaves out of a dump."""

import pytest

from tasks.learning.training_config import BESIDE, TrainingConfig

LATER = ("half_life_nights", "pull", "averaging", "swa_after", "mixed_precision", "members", "distill", *BESIDE)


def test_fields_that_came_later_are_no_part_of_a_dump_at_their_defaults():
    assert not set(LATER) & TrainingConfig().model_dump(mode="json").keys()
    assert set(LATER) < TrainingConfig.model_fields.keys()
    told = TrainingConfig(averaging="swa", swa_after=2, mixed_precision=True, members=3, distill=0.7, tensorboard="x")
    dumped = told.model_dump(mode="json")
    assert {"averaging", "swa_after", "mixed_precision", "members", "distill", "tensorboard"} < dumped.keys()
    assert TrainingConfig.model_validate(dumped) == told


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"swa_after": 2}, r"swa_after = 2 belongs to training\.averaging 'swa'"),
        ({"averaging": "swa", "epochs": 1}, r"leaves none of training\.epochs = 1 to average; lower it"),
        ({"mixed_precision": True, "outer": "reptile"}, r"mixed_precision does not go with training\.outer 'reptile'"),
        ({"members": 2, "outer": "reptile"}, r"members = 2: .*'reptile' has none; set training\.outer"),
        ({"members": 2, "outer": "joint"}, r"members = 2: .*'joint' has none; set training\.outer"),
        ({"distill": 0.9}, r"distill = 0\.9 belongs to training\.members above 1"),
        ({"tensorboard": "s3://bucket/runs"}, r"'s3://bucket/runs' is no local directory"),
    ],
)
def test_what_nothing_would_obey_is_refused_with_the_remedy(given, says):
    with pytest.raises(ValueError, match=says):
        TrainingConfig(**given)


@pytest.mark.parametrize(
    "given",
    [
        {"averaging": "swa", "epochs": 0},
        {"averaging": "swa", "swa_after": 0, "epochs": 1},
        {"members": 2, "outer": "first_order", "mixed_precision": True, "averaging": "swa"},
        {"mixed_precision": True, "outer": "joint"},
    ],
)
def test_what_goes_together_is_allowed(given):
    TrainingConfig(**given)
