"""An operator's word in place of the gate's: recorded, and the only way past a hold."""

import shutil
from pathlib import Path

from flows.config import RetrainConfig
from tasks.release.pointer import promote
from tasks.release.published import stored_manifest
from tasks.releases import releases
from tests.finished import Finished
from tests.steps.plain import plain_night

REASON = "the market opens tomorrow"


def test_a_held_night_is_released_by_override_and_the_pointer_keeps_the_reason(damageable: Finished) -> None:
    tree = damageable.world.config
    # With so few users no bound is within a margin of 0, so `hold` holds.
    config = RetrainConfig.model_validate(tree | {"gate": tree["gate"] | {"when_unsure": "hold", "margin": 0.0}})
    place = config.place()
    # The last night stands as it did before it was released: its records are there, and readers see the night before.
    first, last = (made.published for made in damageable.results)
    token = damageable.pointer.fencing_token
    before = promote(damageable.store, "tiny", first.release, first.night, token, force=True, reason="by hand")
    shutil.rmtree(Path(config.store) / "tiny" / "releases" / last.release)

    held = plain_night(config, last.night)
    assert (held.verdict.go, held.published.promoted) == (False, False)
    assert "--override" in held.verdict.reasons[-1]
    assert damageable.pointer == before
    assert [(row.go, row.champion) for row in releases(place)] == [(True, True), (False, False)]

    released = plain_night(config, last.night, override=REASON)
    assert released.published.promoted
    assert [step.reused for step in released.steps[:-1]] == [True] * (len(released.steps) - 1)
    pointer = damageable.pointer
    assert (pointer.release, pointer.previous) == (held.published.release, first.release)
    assert pointer.generation == before.generation + 1
    assert REASON in pointer.reason
    assert [(row.go, row.champion) for row in releases(place)] == [(True, False), (True, True)]

    # A retry, or the schedule, runs the night once more: the operator's word stands, and nothing is written.
    again = plain_night(config, last.night)
    assert again.published == released.published.model_copy(update={"reused": True})
    assert damageable.pointer == pointer
    assert [(row.go, row.champion) for row in releases(place)] == [(True, False), (True, True)]

    # Where the release is lost it is published again, the pointer stays, and its manifest tells who let it through.
    shutil.rmtree(Path(config.store) / "tiny" / "releases" / last.release)
    made = plain_night(config, last.night)
    assert [step.step for step in made.steps if not step.reused] == ["publish"]
    assert (made.published.release, made.published.promoted) == (last.release, True)
    assert damageable.pointer == pointer
    told = stored_manifest(damageable.store, "tiny", last.release).provenance["override"]
    assert str(told).startswith("go: decided by ")
    assert str(told).endswith(REASON)
