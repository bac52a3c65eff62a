"""What a night says of own weights: over the exams that the gate pools, of one kind of weights, and without names."""

import json

import pyarrow as pa

from flows.config import RetrainConfig
from tasks.adapt import cost_of
from tasks.evaluate import ADAPTED, EARNED, LIFT, exam_table
from tasks.release import cost, earned, lift
from tasks.release.evidence import segment_evidence
from tasks.release.segment_gate import decide_segments
from tasks.steps import open_workspace, recalled
from tests.finished import Finished
from tests.steps.plain import plain_night


def exams(made: Finished) -> list[pa.Table]:
    """Exam tables of the finished nights, the newest first."""
    steps = [{step.step: step for step in one.steps} for one in made.results]
    return [exam_table(made.config.place(), one["evaluate"].key) for one in reversed(steps)]


def test_it_is_that_of_the_exams_that_are_pooled(finished: Finished) -> None:
    place, data, segments = finished.config.place(), finished.config.data, finished.config.segments
    steps = [{step.step: step for step in one.steps} for one in finished.results]
    record = recalled(place, "evaluate", steps[-1]["evaluate"].key)
    tables, workspace = exams(finished), open_workspace(place)
    assert record.notes["nights"] == len(tables) > 1
    gained = lift.lifts(tables, data, segments.levels)
    assert lift.load(workspace.file(record, LIFT)).equals(gained)
    assert earned.load(workspace.file(record, EARNED)) == earned.curve(tables, data, segments.levels, seed=0)
    banks = [recalled(place, "adapt-exam", one["adapt-exam"].key) for one in reversed(steps)]
    paid = cost.costs([cost_of(bank) for bank in banks], gained, tables, data, segments.levels, seed=0)
    assert [cost.Cost(**one) for one in record.notes["cost"]] == paid
    verdicts = decide_segments(finished.config.gate, segment_evidence(tables, data.objectives[0]))
    assert record.content["harmful"] == [one.model_dump(mode="json") for one in verdicts.harm(2)]


def test_the_report_says_it_without_a_users_name(finished: Finished) -> None:
    release = finished.results[-1].published.release
    run, page = (
        finished.store.get(f"tiny/releases/{release}/{name}").data.decode() for name in ("run.json", "report.html")
    )
    worth = json.loads(run)["report"]["worth"]
    assert worth["nights"] == len(finished.results)
    assert {one["level"] for one in worth["steps"]} <= {"user_id", "market"}
    assert {one["method"] for one in worth["varieties"]} >= {"adapted", "zero steps", "popularity"}
    for said in ("What own weights are worth", "Own weights by support", "Cost: ", "Lists: "):
        assert said in page
    named = {one["segment"] for one in lift_rows(finished) if one["level"] == "user_id"}
    assert not [name for name in named if f">{name}<" in page or f'"{name}"' in run]


def lift_rows(made: Finished) -> list[dict[str, object]]:
    """What is known of every segment's lift, names and all."""
    found: list[dict[str, object]] = lift.lifts(exams(made), made.config.data, made.config.segments.levels).to_pylist()
    return found


def test_weights_of_another_kind_prove_nothing(damageable: Finished) -> None:
    """Another precision is another adapter: the exams before it are no evidence about its weights."""
    tree = damageable.world.config
    changed = RetrainConfig.model_validate({**tree, "adapter": {**tree.get("adapter", {}), "precision": 9.0}})
    night = damageable.results[-1].night
    again = plain_night(changed, night, promote=False)
    steps = {step.step: step for step in again.steps}
    place = changed.place()
    assert recalled(place, "evaluate", steps["evaluate"].key).notes["nights"] == 1
    table = exam_table(place, steps["evaluate"].key)
    assert table.schema.metadata[ADAPTED] != exams(damageable)[0].schema.metadata[ADAPTED]
    # The release's own gate pools them all the same: it asks how good the answers were, whoever gave them.
    told = recalled(place, "judge", steps["judge"].key).notes["exams"][0]["comparisons"]
    assert {one["nights"] for one in told if one["method"] == "popularity"} == {len(damageable.results)}
