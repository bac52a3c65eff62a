"""The gate: every branch by hand-made intervals, convictions against hand arithmetic and a loop."""

from math import inf, nan

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from tasks.errors import InvalidConfig
from tasks.learning.intervals import Interval
from tasks.release import segment_gate
from tasks.release.gate import GateConfig, ReleaseVerdict, decide_release, override
from tasks.release.segment_gate import SegmentEvidence, decide_segments

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


def test_benjamini_hochberg_by_hand():
    # Benjamini and Hochberg's own example of 15 p values: at 5 % the first four are rejected (limits .0033 rank).
    p = [
        0.0001,
        0.0004,
        0.0019,
        0.0095,
        0.0201,
        0.0278,
        0.0298,
        0.0344,
        0.0459,
        0.3240,
        0.4262,
        0.5719,
        0.6528,
        0.7590,
        1.0,
    ]
    shuffle = np.random.default_rng(0).permutation(15)
    rejected = segment_gate.benjamini_hochberg(np.array(p)[shuffle], 0.05)
    assert sorted(np.array(p)[shuffle][rejected]) == p[:4]


def test_benjamini_hochberg_rejects_what_a_later_rank_pulls_in():
    # 0.04 > 0.05 / 2, but rank 2 passes at 0.05 and takes rank 1 with it.
    assert segment_gate.benjamini_hochberg(np.array([0.05, 0.04]), 0.05).tolist() == [True, True]


@pytest.mark.parametrize(("p", "rejected"), [([], []), ([1.0], [False]), ([0.0], [True]), ([0.2, 0.2], [False, False])])
def test_benjamini_hochberg_at_its_edges(p, rejected):
    assert segment_gate.benjamini_hochberg(np.array(p), 0.1).tolist() == rejected


def test_benjamini_hochberg_equals_scipys_adjusted_p_values():
    random = np.random.default_rng(0)
    for _ in range(50):
        p = np.append(random.random(40), random.random(20) ** 6)
        assert np.array_equal(segment_gate.benjamini_hochberg(p, 0.1), stats.false_discovery_control(p) <= 0.1)


@pytest.mark.parametrize("degrees", [4, 9, 99, 10_000])
def test_p_values_are_students(degrees):
    t = np.linspace(-6, 6, 201)
    t = t[t != 0]
    found = segment_gate._harm_p(t, np.ones_like(t), np.full_like(t, degrees))
    assert found == pytest.approx(stats.t.sf(t, degrees), abs=0.0025)


def test_an_estimate_without_variance_is_as_sure_as_its_sign():
    p = segment_gate._harm_p(np.array([0.1, -0.1, 0.0]), np.zeros(3), np.full(3, 99.0))
    assert p == pytest.approx([0.0, 1.0, 1.0], abs=1e-12)


def evidence_of(entries) -> SegmentEvidence:
    """From (level, key, support, differences of its rows) per exam and segment."""
    level, key, support, rows = zip(*entries, strict=True)
    return SegmentEvidence(
        level=np.array(level),
        key=np.array(key),
        support=np.array(support),
        rows=np.array([len(r) for r in rows]),
        sums=np.array([np.sum(r) for r in rows]),
        squares=np.array([np.sum(np.square(r)) for r in rows]),
    )


def test_a_segment_with_rows_of_its_own_is_judged_by_them_pooled_over_exams():
    random = np.random.default_rng(0)
    good, bad = random.normal(-0.1, 0.3, (2, 80)), random.normal(0.1, 0.3, (2, 80))
    evidence = evidence_of(
        [(0, "good", 9, good[0]), (0, "bad", 9, bad[0]), (0, "bad", 30, bad[1]), (0, "good", 30, good[1])]
    )
    verdicts = decide_segments(
        GateConfig(), evidence, np.zeros(3, int), np.array(["bad", "new", "good"]), np.full(3, 9)
    )
    assert verdicts.keep.tolist() == [False, True, True]
    tested = verdicts.tested
    index = tested.key.tolist().index("bad")
    assert tested.rows.tolist() == [160, 160]
    expected = stats.ttest_1samp(bad.ravel(), 0, alternative="greater")
    assert tested.estimate[index] == pytest.approx(bad.mean())
    assert tested.p[index] == pytest.approx(expected.pvalue, abs=1e-4)
    assert verdicts.hypothesis[1] == -1  # nothing speaks for the new one: it ships


def test_thin_segments_are_judged_by_level_and_support_bucket():
    random = np.random.default_rng(1)
    entries = [(0, f"thin {n}", 3, random.normal(0.2, 0.1, 12)) for n in range(20)]
    entries += [(0, f"fat {n}", 15, random.normal(-0.2, 0.1, 12)) for n in range(20)]
    entries += [(1, f"cohort {n}", 3, random.normal(-0.2, 0.1, 12)) for n in range(20)]
    level = np.array([0, 0, 0, 0, 1, 1])
    key = np.array(["thin 1", "unseen", "fat 1", "thin 2", "cohort 1", "unseen cohort"])
    support = np.array([5, 1, 6, 21, 3, 40])
    verdicts = decide_segments(GateConfig(), evidence_of(entries), level, key, support)
    assert verdicts.keep.tolist() == [False, False, True, True, True, True]
    assert (verdicts.hypothesis < 0).tolist() == [False, False, False, True, False, True]
    assert {(row["level"], row["tested"]): row["segments"] for row in verdicts.table()} == {
        (0, "support 1 to 5"): 2,
        (0, "support 6 to 20"): 1,
        (1, "support 1 to 5"): 1,
    }


def test_a_bucket_is_tested_between_segments_not_between_rows():
    # One segment's harm, in many rows, says nothing about its bucket's others.
    entries = [(0, "one", 3, np.full(90, 0.5))] + [(0, f"{n}", 3, np.full(90, -0.01)) for n in range(9)]
    evidence = evidence_of(entries)
    verdicts = decide_segments(GateConfig(), evidence, np.zeros(1, int), np.array(["1"]), np.array([3]))
    ratio = evidence.sums.sum() / evidence.rows.sum()
    residual = evidence.sums - ratio * evidence.rows
    error = np.sqrt(10 / 9 * (residual**2).sum()) / evidence.rows.sum()
    assert verdicts.tested.estimate[0] == pytest.approx(ratio)
    assert verdicts.tested.p[0] == pytest.approx(stats.t.sf(ratio / error, 9), abs=0.0025)
    assert verdicts.keep.all()


def test_segments_with_rows_of_their_own_do_not_speak_for_their_bucket():
    random = np.random.default_rng(2)
    entries = [(0, f"large {n}", 3, random.normal(0.3, 0.1, 150)) for n in range(8)]
    verdicts = decide_segments(
        GateConfig(), evidence_of(entries), np.zeros(2, int), np.array(["large 3", "thin"]), np.full(2, 3)
    )
    assert verdicts.keep.tolist() == [False, True]


def test_a_bucket_of_too_few_segments_convicts_nobody():
    entries = [(0, f"{n}", 3, np.full(50, 0.5 + n / 100)) for n in range(4)]
    verdicts = decide_segments(GateConfig(), evidence_of(entries), np.zeros(1, int), np.array(["1"]), np.array([3]))
    assert verdicts.keep.all()
    assert len(verdicts.tested.p) == 0


def test_the_same_key_on_two_levels_is_two_segments():
    entries = [(0, 7, 9, np.full(100, 0.5)), (1, 7, 9, np.full(100, -0.5))]
    verdicts = decide_segments(GateConfig(), evidence_of(entries), np.array([0, 1]), np.array([7, 7]), np.array([9, 9]))
    assert verdicts.keep.tolist() == [False, True]


def test_wrong_convictions_stay_below_the_false_discovery_rate():
    random = np.random.default_rng(3)
    wrong = []
    for _ in range(60):
        harm = np.arange(200) < 40
        rows = random.normal(np.where(harm, 0.15, 0.0)[:, None], 0.4, (200, 120))
        evidence = evidence_of([(0, n, 9, rows[n]) for n in range(200)])
        keep = decide_segments(GateConfig(), evidence, np.zeros(200, int), np.arange(200), np.full(200, 9)).keep
        wrong.append((~keep & ~harm).sum() / max((~keep).sum(), 1))
        assert (~keep & harm).sum() > 30
    assert np.mean(wrong) < 0.1


def test_without_evidence_everything_ships():
    empty = SegmentEvidence(*(np.empty(0, np.int64) for _ in range(4)), np.empty(0), np.empty(0))
    verdicts = decide_segments(GateConfig(), empty, np.array([0, 1]), np.array([4, 5]), np.array([1, 30]))
    assert verdicts.keep.tolist() == [True, True]
    assert verdicts.table() == []


def test_an_empty_bank_is_decided_too():
    evidence = evidence_of([(0, 1, 9, np.full(100, 0.5))])
    none = np.empty(0, np.int64)
    assert decide_segments(GateConfig(), evidence, none, none, none).keep.tolist() == []


def test_a_bank_of_two_hundred_thousand_segments_is_decided_at_once():
    random = np.random.default_rng(0)
    size = 200_000
    rows = random.integers(1, 200, size)
    sums = random.normal(0, 0.1, size) * np.sqrt(rows)
    evidence = SegmentEvidence(
        np.zeros(size, int), np.arange(size), random.integers(1, 60, size), rows, sums, rows * 0.02
    )
    verdicts = decide_segments(GateConfig(), evidence, np.zeros(size, int), np.arange(size)[::-1], np.full(size, 9))
    assert len(verdicts.keep) == size
    assert len(verdicts.table(limit=5)) == 3 + 5


def test_the_table_leads_with_buckets_then_the_most_suspect_segments():
    random = np.random.default_rng(4)
    entries = [(0, n, 3, random.normal(n / 20, 0.3, 120)) for n in range(6)]
    entries += [(0, 100 + n, 3, random.normal(0, 0.3, 10)) for n in range(6)]
    verdicts = decide_segments(GateConfig(), evidence_of(entries), np.zeros(6, int), np.arange(6), np.full(6, 3))
    table = verdicts.table(limit=2)
    assert table[0]["tested"] == "support 1 to 5"
    assert len(table) == 3
    assert table[1]["p"] <= table[2]["p"]
    assert {type(value) for row in table for value in row.values()} == {int, str, float, bool}
