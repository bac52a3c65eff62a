"""Whether a release goes out: every branch by hand-made intervals."""

from math import inf, nan

import pytest
from pydantic import ValidationError

from tasks.errors import InvalidConfig
from tasks.learning.intervals import Interval
from tasks.release.gate import GateConfig, ReleaseVerdict, decide_release, override

BETTER = Interval(-0.02, -0.03, -0.01, 90, 900)
WITHIN = Interval(0.001, -0.003, 0.005, 90, 900)
DOUBT_BELOW = Interval(-0.004, -0.02, 0.012, 90, 900)
DOUBT_AT_ZERO = Interval(0.0, -0.02, 0.02, 90, 900)
DOUBT_ABOVE = Interval(0.004, -0.012, 0.02, 90, 900)
SMALL_HARM = Interval(0.01, 0.004, 0.016, 90, 900)
WORSE = Interval(0.02, 0.006, 0.03, 90, 900)
UNMEASURED = Interval(nan, -inf, inf, 0, 0)
UNBOUNDED = Interval(-0.01, -inf, inf, 3, 30)


@pytest.mark.parametrize(
    ("champion", "baseline", "when_unsure", "go", "decided_by"),
    [
        (BETTER, BETTER, "hold", True, "proven"),
        (WITHIN, BETTER, "hold", True, "proven"),  # an upper bound equal to the margin is within it
        (BETTER, WITHIN, "hold", True, "proven"),
        (DOUBT_BELOW, BETTER, "hold", False, "hold"),
        (BETTER, DOUBT_BELOW, "hold", False, "hold"),
        (DOUBT_BELOW, BETTER, "promote_if_not_worse", True, "promote_if_not_worse"),
        (DOUBT_AT_ZERO, DOUBT_BELOW, "promote_if_not_worse", True, "promote_if_not_worse"),
        (DOUBT_ABOVE, BETTER, "promote_if_not_worse", False, "promote_if_not_worse"),
        (BETTER, DOUBT_ABOVE, "promote_if_not_worse", False, "promote_if_not_worse"),
        (DOUBT_ABOVE, DOUBT_ABOVE, "promote", True, "promote"),
        (SMALL_HARM, BETTER, "promote", True, "promote"),  # above zero, yet maybe within the margin
        (WORSE, BETTER, "promote", False, "proven_worse"),
        (BETTER, WORSE, "promote", False, "proven_worse"),
        (WORSE, BETTER, "promote_if_not_worse", False, "proven_worse"),
        (UNBOUNDED, UNBOUNDED, "hold", False, "hold"),
        (UNBOUNDED, UNBOUNDED, "promote_if_not_worse", True, "promote_if_not_worse"),
        (UNMEASURED, BETTER, "promote_if_not_worse", False, "promote_if_not_worse"),
        (BETTER, UNMEASURED, "promote_if_not_worse", False, "promote_if_not_worse"),
        (UNMEASURED, UNMEASURED, "hold", False, "hold"),
        (UNMEASURED, UNMEASURED, "promote", True, "promote"),
        (None, BETTER, "promote_if_not_worse", False, "promote_if_not_worse"),  # could not be loaded: never a win
        (None, BETTER, "hold", False, "hold"),
        (None, BETTER, "promote", True, "promote"),
        (None, WORSE, "promote", False, "proven_worse"),
    ],
)
def test_the_verdict_follows_the_intervals(champion, baseline, when_unsure, go, decided_by):
    candidate_vs = {"popularity": baseline} | ({} if champion is None else {"champion": champion})
    verdict = decide_release(GateConfig(when_unsure=when_unsure), candidate_vs, "champion")
    assert (verdict.go, verdict.decided_by) == (go, decided_by)
    assert verdict.reasons[-1].startswith("go: " if go else "hold: ")


@pytest.mark.parametrize(
    ("baseline", "go"), [(BETTER, True), (DOUBT_BELOW, True), (DOUBT_ABOVE, False), (WORSE, False)]
)
def test_without_a_champion_only_baselines_count(baseline, go):
    verdict = decide_release(GateConfig(), {"popularity": baseline})
    assert verdict.go is go
    assert verdict.reasons[0] == "there is no champion yet: only baselines are compared"


def test_only_the_best_baseline_is_compared():
    candidate_vs = {"global": BETTER, "popularity": WITHIN, "zero steps": DOUBT_BELOW}
    verdict = decide_release(GateConfig(), candidate_vs)
    assert verdict.decided_by == "proven"
    assert [line.split(":")[0] for line in verdict.reasons[1:-1]] == ["against popularity"]


def test_the_champion_is_no_baseline():
    verdict = decide_release(GateConfig(when_unsure="hold"), {"champion": WITHIN, "popularity": BETTER}, "champion")
    assert [line.split(":")[0] for line in verdict.reasons[:-1]] == ["against champion", "against popularity"]
    assert verdict.decided_by == "proven"


def test_reasons_give_the_figures_and_the_limit():
    reasons = decide_release(GateConfig(margin=0.01), {"popularity": DOUBT_BELOW}).reasons
    assert reasons == (
        "there is no champion yet: only baselines are compared",
        "against popularity: -0.0040 [-0.0200, +0.0120] over 90 users and 900 rows, upper bound above the margin 0.01",
        "go: unsure, but no point estimate is above zero",
    )


def test_a_champion_that_could_not_be_examined_is_called_not_comparable():
    verdict = decide_release(GateConfig(), {"popularity": BETTER}, "release 3fa9")
    assert verdict.reasons[0] == "against release 3fa9: not comparable, which is never a win"
    assert "--override" in verdict.reasons[-1]


def test_no_baseline_at_all_is_told():
    verdict = decide_release(GateConfig(), {})
    assert not verdict.go
    assert "no baseline could be compared: the pooled exams have no rows" in verdict.reasons


def test_the_margin_decides_what_is_proven():
    interval = Interval(0.0, -0.01, 0.01, 90, 900)
    assert decide_release(GateConfig(margin=0.01, when_unsure="hold"), {"popularity": interval}).go
    assert not decide_release(GateConfig(margin=0.0099, when_unsure="hold"), {"popularity": interval}).go


@pytest.mark.parametrize("go", [True, False])
def test_an_override_records_who_and_why_and_keeps_the_gates_reasons(go):
    verdict = override(decide_release(GateConfig(), {"popularity": WORSE}), go, "ann", "  the log was wrong ")
    assert (verdict.go, verdict.decided_by) == (go, "operator")
    assert verdict.reasons[0].endswith("decided by ann, because: the log was wrong")
    assert any("against popularity" in line for line in verdict.reasons[1:])


def test_an_override_without_a_reason_is_refused():
    with pytest.raises(InvalidConfig, match="needs a reason"):
        override(ReleaseVerdict(False, "hold", ()), True, "ann", " \n")


@pytest.mark.parametrize(
    "wrong", [{"margin": -0.1}, {"when_unsure": "yes"}, {"false_discovery": 0}, {"pool_nights": 0}, {"threshold": 1}]
)
def test_a_wrong_gate_config_is_refused(wrong):
    with pytest.raises(ValidationError):
        GateConfig(**wrong)
