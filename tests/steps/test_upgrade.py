"""After an upgrade that changed the format of bases: the next night runs, and says what it could not go on from."""

import json

import pytest

from tasks import meta_train
from tasks.learning import base, initialisation
from tasks.steps import record_of
from tests.finished import Finished
from tests.steps.plain import plain_night


def test_a_parent_of_another_format_gives_no_start_and_is_compared_in_the_nightly_exam(
    damageable: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    champion = damageable.pointer.release
    was = base.FORMATS["plain"]
    monkeypatch.setitem(base.FORMATS, "plain", 99)
    made = plain_night(damageable.config, damageable.next_night)
    run = json.loads(damageable.store.get(f"tiny/releases/{made.published.release}/run.json").data)
    assert run["parent"] == run["champion"] == champion
    told = run["report"]["provenance"]
    assert told["training"].startswith(f"release {champion[:12]} gives no start (")
    assert f"has format {was}, and this version of nightrank reads 99, " in told["training"]
    assert told["training"].count("started in closed form") == 1
    assert "is compared in the nightly exam only" in told["champion"]
    exams = record_of(damageable.config.place(), made.verdict).notes["exams"][0]
    assert exams["nightly"]["champion"]["rows"] == made.validated.clean
    assert "champion" not in exams["first_contact"]["5"]


def test_a_finished_night_that_an_upgrade_makes_otherwise_is_released_again_in_its_own_place(
    damageable: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pointer names what the older version made of the very same night: that move was nobody else's."""
    before = damageable.pointer
    first = plain_night(damageable.config, damageable.next_night)
    monkeypatch.setattr(meta_train, "VERSION", meta_train.VERSION + 1)
    monkeypatch.setattr(initialisation, "MORE_SWEEPS", initialisation.MORE_SWEEPS + 1)
    second = plain_night(damageable.config, damageable.next_night)
    assert first.published.promoted
    assert second.published.promoted
    assert second.published.release != first.published.release
    after = damageable.pointer
    assert (after.release, after.generation) == (second.published.release, before.generation + 2)
    told = [json.loads(damageable.store.get(f"tiny/releases/{made.published.release}/run.json").data)
            for made in (first, second)]  # fmt: skip
    assert [run["champion"] for run in told] == [before.release] * 2
    again = plain_night(damageable.config, damageable.next_night)
    assert again.published.release == second.published.release
    assert damageable.pointer == after
