"""An operator's word in place of the gate's: recorded, and the only way past a hold."""

from pathlib import Path

from flows.config import RetrainConfig
from tasks.release.pointer import read_pointer
from tasks.releases import releases
from tasks.steps import store_of
from tests.steps.plain import plain_night
from tests.world import write_world

REASON = "the market opens tomorrow"


def test_a_held_night_is_released_by_override_and_the_pointer_keeps_the_reason(tmp_path: Path) -> None:
    world = write_world(tmp_path, nights=5, users=24)
    # With so few users no bound is within a margin of 0, so `hold` holds.
    config = RetrainConfig.model_validate(world.config | {"gate": {"when_unsure": "hold", "margin": 0.0}})
    night, place = world.nights[-1], config.place()

    held = plain_night(config, night)
    assert (held.verdict.go, held.published.promoted) == (False, False)
    assert "--override" in held.verdict.reasons[-1]
    assert read_pointer(store_of(place), place.pipeline) is None

    released = plain_night(config, night, override=REASON)
    assert released.published.promoted
    assert [step.reused for step in released.steps[:-1]] == [True] * (len(released.steps) - 1)
    pointer = read_pointer(store_of(place), place.pipeline)
    assert pointer is not None
    assert (pointer.release, pointer.generation) == (held.published.release, 1)
    assert REASON in pointer.reason
    assert [(row.go, row.champion) for row in releases(place)] == [(True, True)]
