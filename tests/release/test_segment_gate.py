"""Which adapters ship: convictions against hand arithmetic, and what they mean for segments that no exam has seen."""

import numpy as np
import pytest
from scipy import stats

from tasks.release import segment_gate
from tasks.release.gate import GateConfig
from tasks.release.segment_gate import LevelHarm, SegmentEvidence, decide_segments


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


def keep(evidence: SegmentEvidence, segments) -> list[bool]:
    """Which of a bank's segments, (level, key, support) each, keep their own weights."""
    harm = decide_segments(GateConfig(), evidence).harm(1 + max(level for level, _, _ in segments))
    return [not harm[level].refuses(np.array([str(key)]), np.array([support]))[0] for level, key, support in segments]


def test_a_segment_with_rows_of_its_own_is_judged_by_them_pooled_over_exams():
    random = np.random.default_rng(0)
    good, bad = random.normal(-0.1, 0.3, (2, 80)), random.normal(0.1, 0.3, (2, 80))
    evidence = evidence_of(
        [(0, "good", 9, good[0]), (0, "bad", 9, bad[0]), (0, "bad", 30, bad[1]), (0, "good", 30, good[1])]
    )
    # Nothing speaks for the new one: it ships.
    assert keep(evidence, [(0, "bad", 9), (0, "new", 9), (0, "good", 9)]) == [False, True, True]
    tested = decide_segments(GateConfig(), evidence)
    index = tested.key.tolist().index("bad")
    assert tested.rows.tolist() == [160, 160]
    expected = stats.ttest_1samp(bad.ravel(), 0, alternative="greater")
    assert tested.estimate[index] == pytest.approx(bad.mean())
    assert tested.p[index] == pytest.approx(expected.pvalue, abs=1e-4)
    assert tested.segments.tolist() == [1, 1]


def test_thin_segments_are_judged_by_level_and_support_bucket():
    random = np.random.default_rng(1)
    entries = [(0, f"thin {n}", 3, random.normal(0.2, 0.1, 12)) for n in range(20)]
    entries += [(0, f"fat {n}", 15, random.normal(-0.2, 0.1, 12)) for n in range(20)]
    entries += [(1, f"cohort {n}", 3, random.normal(-0.2, 0.1, 12)) for n in range(20)]
    evidence = evidence_of(entries)
    bank = [(0, "thin 1", 5), (0, "unseen", 1), (0, "fat 1", 6), (0, "thin 2", 21), (1, "cohort 1", 3), (1, "new", 40)]
    assert keep(evidence, bank) == [False, False, True, True, True, True]
    assert {
        (row["level"], row["tested"]): row["segments"] for row in decide_segments(GateConfig(), evidence).table()
    } == {
        (0, "support 1 to 5"): 20,
        (0, "support 6 to 20"): 20,
        (1, "support 1 to 5"): 20,
    }


def harmful_bucket():
    """Segments with 6 to 20 support rows are harmed together; three with rows of their own are told apart."""
    random = np.random.default_rng(5)
    entries = [(0, f"some {n}", 12, random.normal(0.2, 0.1, 12)) for n in range(20)]
    entries += [(0, f"few {n}", 3, random.normal(-0.2, 0.1, 12)) for n in range(20)]
    entries += [(0, "helped", 12, random.normal(-0.2, 0.1, 150)), (0, "hurt", 30, random.normal(0.2, 0.1, 150))]
    entries += [(1, "market", 12, random.normal(-0.2, 0.1, 150))]
    return evidence_of(entries)


@pytest.mark.parametrize(
    ("level", "key", "support", "keeps"),
    [
        (0, "new on the night", 6, False),
        (0, "new on the night", 20, False),
        (0, "new on the night", 5, True),
        (0, "new on the night", 21, True),
        (0, "some 3", 12, False),
        (0, "some 3", 21, True),  # grew out of the bucket since the exam
        (0, "few 3", 5, True),
        (0, "few 3", 6, False),  # grew into it
        (0, "helped", 12, True),  # its own verdict goes first
        (0, "hurt", 12, False),
        (0, "hurt", 30, False),
        (1, "new on the night", 12, True),  # nothing is said about this level
    ],
)
def test_harm_proven_for_a_bucket_reaches_whatever_ships_with_such_support(level, key, support, keeps):
    assert keep(harmful_bucket(), [(level, key, support)]) == [keeps]


def test_what_is_proven_is_told_by_level_and_survives_as_json():
    harm = decide_segments(GateConfig(), harmful_bucket()).harm(3)
    assert harm == (LevelHarm(convicted=("hurt",), buckets=((6, 20),), acquitted=("helped",)), LevelHarm(), LevelHarm())
    assert tuple(LevelHarm.model_validate(one.model_dump(mode="json")) for one in harm) == harm
    assert [one.proven for one in harm] == [True, False, False]


def test_acquittals_are_listed_only_where_a_bucket_is_convicted():
    random = np.random.default_rng(6)
    rows = {"hurt": random.normal(0.2, 0.1, 150), "helped": random.normal(-0.2, 0.1, 150)}
    evidence = evidence_of([(0, name, 12, own) for name, own in rows.items()])
    assert decide_segments(GateConfig(), evidence).harm(1) == (LevelHarm(convicted=("hurt",)),)


def test_the_last_bucket_has_no_end():
    harm = LevelHarm(buckets=((21, None),))
    assert harm.refuses(np.array(["a", "b", "c"]), np.array([20, 21, 10**6])).tolist() == [False, True, True]


def test_a_bucket_is_tested_between_segments_not_between_rows():
    # One segment's harm, in many rows, says nothing about its bucket's others.
    entries = [(0, "one", 3, np.full(90, 0.5))] + [(0, f"{n}", 3, np.full(90, -0.01)) for n in range(9)]
    evidence = evidence_of(entries)
    verdicts = decide_segments(GateConfig(), evidence)
    ratio = evidence.sums.sum() / evidence.rows.sum()
    residual = evidence.sums - ratio * evidence.rows
    error = np.sqrt(10 / 9 * (residual**2).sum()) / evidence.rows.sum()
    assert verdicts.estimate[0] == pytest.approx(ratio)
    assert verdicts.p[0] == pytest.approx(stats.t.sf(ratio / error, 9), abs=0.0025)
    assert not verdicts.harmful.any()


def test_segments_with_rows_of_their_own_do_not_speak_for_their_bucket():
    random = np.random.default_rng(2)
    entries = [(0, f"large {n}", 3, random.normal(0.3, 0.1, 150)) for n in range(8)]
    assert keep(evidence_of(entries), [(0, "large 3", 3), (0, "thin", 3)]) == [False, True]


def test_a_bucket_of_too_few_segments_convicts_nobody():
    entries = [(0, f"{n}", 3, np.full(50, 0.5 + n / 100)) for n in range(4)]
    assert keep(evidence_of(entries), [(0, "1", 3)]) == [True]
    assert len(decide_segments(GateConfig(), evidence_of(entries)).p) == 0


def test_the_same_key_on_two_levels_is_two_segments():
    entries = [(0, 7, 9, np.full(100, 0.5)), (1, 7, 9, np.full(100, -0.5))]
    assert keep(evidence_of(entries), [(0, 7, 9), (1, 7, 9)]) == [False, True]


def test_wrong_convictions_stay_below_the_false_discovery_rate():
    random = np.random.default_rng(3)
    wrong = []
    for _ in range(60):
        harm = np.arange(200) < 40
        rows = random.normal(np.where(harm, 0.15, 0.0)[:, None], 0.4, (200, 120))
        evidence = evidence_of([(0, n, 9, rows[n]) for n in range(200)])
        convicted = np.isin(np.arange(200).astype(str), decide_segments(GateConfig(), evidence).harm(1)[0].convicted)
        wrong.append((convicted & ~harm).sum() / max(convicted.sum(), 1))
        assert (convicted & harm).sum() > 30
    assert np.mean(wrong) < 0.1


def test_without_evidence_everything_ships():
    empty = SegmentEvidence(*(np.empty(0, np.int64) for _ in range(4)), np.empty(0), np.empty(0))
    verdicts = decide_segments(GateConfig(), empty)
    assert verdicts.harm(2) == (LevelHarm(), LevelHarm())
    assert verdicts.table() == []
    assert keep(empty, [(0, 4, 1), (1, 5, 30)]) == [True, True]


def test_an_empty_bank_is_decided_too():
    evidence = evidence_of([(0, 1, 9, np.full(100, 0.5))])
    (harm,) = decide_segments(GateConfig(), evidence).harm(1)
    assert harm.refuses(np.zeros(0, str), np.zeros(0, int)).tolist() == []


def test_a_bank_of_two_hundred_thousand_segments_is_decided_at_once():
    random = np.random.default_rng(0)
    size = 200_000
    rows = random.integers(1, 200, size)
    sums = random.normal(0, 0.1, size) * np.sqrt(rows)
    names = np.arange(size).astype(str)
    evidence = SegmentEvidence(np.zeros(size, int), names, random.integers(1, 60, size), rows, sums, rows * 0.02)
    verdicts = decide_segments(GateConfig(), evidence)
    assert len(verdicts.table(limit=5)) == 3 + 5
    harm = LevelHarm(convicted=verdicts.harm(1)[0].convicted, buckets=((6, 20),), acquitted=tuple(names[::2]))
    refused = harm.refuses(names[::-1], np.full(size, 9))[::-1]
    assert np.array_equal(refused[1::2], np.ones(size // 2, bool))
    assert np.array_equal(refused[::2], np.isin(names[::2], harm.convicted))


def test_the_table_leads_with_buckets_then_the_most_suspect_segments():
    random = np.random.default_rng(4)
    entries = [(0, n, 3, random.normal(n / 20, 0.3, 120)) for n in range(6)]
    entries += [(0, 100 + n, 3, random.normal(0, 0.3, 10)) for n in range(6)]
    table = decide_segments(GateConfig(), evidence_of(entries)).table(limit=2)
    assert table[0]["tested"] == "support 1 to 5"
    assert len(table) == 3
    assert table[1]["p"] <= table[2]["p"]
    assert {type(value) for row in table for value in row.values()} == {int, str, float, bool}
