"""Which adapters ship: convictions against hand arithmetic, and what they mean for segments that no exam has seen."""

import numpy as np
import pytest
from scipy import stats

from tasks.release import segment_gate
from tasks.release.gate import GateConfig
from tasks.release.segment_evidence import SegmentEvidence
from tasks.release.segment_gate import LevelHarm, decide_segments


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


VISIT = 6


def evidence_of(entries) -> SegmentEvidence:
    """From (level, key, support, differences of its rows) per exam and segment, in visits of `VISIT` rows."""
    visits = [
        (level, key, support, rows[start : start + VISIT])
        for level, key, support, rows in entries
        for start in range(0, len(rows), VISIT)
    ]
    level, key, support, rows = zip(*visits, strict=True)
    return SegmentEvidence(
        level=np.array(level),
        key=np.array(key),
        user=np.arange(len(key)),
        support=np.array(support),
        rows=np.array([len(r) for r in rows]),
        sums=np.array([np.sum(r) for r in rows]),
        squares=np.array([np.sum(np.square(r)) for r in rows]),
    )


def keep(evidence: SegmentEvidence, segments) -> list[bool]:
    """Which of a bank's segments, (level, key, support) each, keep their own weights."""
    harm = decide_segments(GateConfig(), evidence).harm(1 + max(level for level, _, _ in segments))
    return [not harm[level].refuses(np.array([str(key)]), np.array([support]))[0] for level, key, support in segments]


def test_a_segment_of_a_small_level_is_judged_by_its_visits_pooled_over_exams():
    random = np.random.default_rng(0)
    good, bad = random.normal(-0.1, 0.3, (2, 90)), random.normal(0.1, 0.3, (2, 90))
    evidence = evidence_of(
        [(0, "good", 9, good[0]), (0, "bad", 9, bad[0]), (0, "bad", 30, bad[1]), (0, "good", 30, good[1])]
    )
    # Nothing speaks for the new one: it ships.
    assert keep(evidence, [(0, "bad", 9), (0, "new", 9), (0, "good", 9)]) == [False, True, True]
    tested = decide_segments(GateConfig(), evidence)
    index = tested.key.tolist().index("bad")
    assert tested.rows.tolist() == [180, 180]
    expected = stats.ttest_1samp(bad.reshape(-1, VISIT).mean(axis=1), 0, alternative="greater")
    assert tested.estimate[index] == pytest.approx(bad.mean())
    assert tested.p[index] == pytest.approx(expected.pvalue, abs=1e-4)
    assert np.isnan(tested.shrunk).all()
    assert tested.segments.tolist() == [1, 1]


def visits_of(true, visits, random):
    """Visits of 12 rows of segments with these true lifts; what moves a visit moves all of its rows."""
    entries = []
    for name, (lift, count) in enumerate(zip(true, visits, strict=True)):
        moved = lift + random.normal(0, 0.2, count)
        entries += [(0, f"{name}", 9, one + random.normal(0, 0.3, 12)) for one in moved]
    level, key, support, rows = zip(*entries, strict=True)
    return SegmentEvidence(
        *(np.array(column) for column in (level, key, key, support)),
        rows=np.full(len(rows), 12),
        sums=np.sum(rows, axis=1),
        squares=np.square(rows).sum(axis=1),
    )


def test_a_segment_of_a_large_level_is_judged_by_its_shrunk_lift():
    """Balanced visits, where the estimates by moments are those of the textbook's analysis of variance."""
    random = np.random.default_rng(7)
    evidence = visits_of(random.normal(-0.1, 0.06, 30), np.full(30, 10), random)
    tested = decide_segments(GateConfig(), evidence)
    order = np.argsort(tested.key.astype(int))
    means = (evidence.sums / 12).reshape(30, 10)
    mean, error = means.mean(axis=1), means.var(axis=1, ddof=1).mean() / 10
    spread = mean.var(ddof=1) - error
    kept = spread / (spread + error)
    shrunk = mean.mean() + kept * (mean - mean.mean())
    p = np.where(shrunk > 0, stats.norm.sf(mean / np.sqrt(error)), 1.0)
    np.testing.assert_allclose(tested.estimate[order], mean, rtol=1e-9)
    np.testing.assert_allclose(tested.shrunk[order], shrunk, rtol=1e-9)
    np.testing.assert_allclose(tested.p[order], p, atol=1e-9)
    assert ((mean > 0) & (shrunk <= 0)).sum() > 0


def test_what_is_known_of_a_level_speaks_for_its_segments():
    """The same visits, among segments that gain and among others that lose."""
    random = np.random.default_rng(8)
    doubtful = visits_of([0.12], [12], random)
    p = []
    for others in (-0.3, 0.3):
        level = visits_of(random.normal(others, 0.1, 40), np.full(40, 12), random)
        joined = SegmentEvidence(
            *(
                np.concatenate([getattr(doubtful, name), getattr(level, name)])
                for name in ("level", "key", "user", "support", "rows", "sums", "squares")
            )
        )
        joined.key[: len(doubtful.key)] = joined.user[: len(doubtful.key)] = "x"
        tested = decide_segments(GateConfig(), joined)
        p.append(tested.p[tested.key.tolist().index("x")])
    assert p[0] == 1.0
    assert p[1] > 0.1  # harm to others convicts nobody


def test_thin_segments_are_judged_by_level_and_support_step():
    random = np.random.default_rng(1)
    entries = [(0, f"thin {n}", 3, random.normal(0.2, 0.1, 12)) for n in range(20)]
    entries += [(0, f"fat {n}", 15, random.normal(-0.2, 0.1, 12)) for n in range(20)]
    entries += [(1, f"cohort {n}", 3, random.normal(-0.2, 0.1, 12)) for n in range(20)]
    evidence = evidence_of(entries)
    bank = [(0, "thin 1", 3), (0, "unseen", 2), (0, "fat 1", 8), (0, "thin 2", 64), (1, "cohort 1", 3), (1, "new", 40)]
    assert keep(evidence, bank) == [False, False, True, True, True, True]
    assert {
        (row["level"], row["tested"]): row["segments"] for row in decide_segments(GateConfig(), evidence).table()
    } == {
        (0, "support 2 to 3"): 20,
        (0, "support 8 to 15"): 20,
        (1, "support 2 to 3"): 20,
    }


def harmful_step():
    """Segments with 8 to 15 support rows are harmed together; three with rows of their own are told apart."""
    random = np.random.default_rng(5)
    entries = [(0, f"some {n}", 12, random.normal(0.2, 0.1, 12)) for n in range(20)]
    entries += [(0, f"few {n}", 3, random.normal(-0.2, 0.1, 12)) for n in range(20)]
    entries += [(0, "helped", 12, random.normal(-0.2, 0.1, 150)), (0, "hurt", 30, random.normal(0.2, 0.1, 150))]
    entries += [(1, "market", 12, random.normal(-0.2, 0.1, 150))]
    return evidence_of(entries)


@pytest.mark.parametrize(
    ("level", "key", "support", "keeps"),
    [
        (0, "new on the night", 8, False),
        (0, "new on the night", 15, False),
        (0, "new on the night", 7, True),
        (0, "new on the night", 16, True),
        (0, "some 3", 12, False),
        (0, "some 3", 16, True),  # grew out of the step since the exam
        (0, "few 3", 3, True),
        (0, "few 3", 8, False),  # grew into it
        (0, "helped", 12, True),  # its own verdict goes first
        (0, "hurt", 12, False),
        (0, "hurt", 30, False),
        (1, "new on the night", 12, True),  # nothing is said about this level
    ],
)
def test_harm_proven_for_a_step_reaches_whatever_ships_with_such_support(level, key, support, keeps):
    assert keep(harmful_step(), [(level, key, support)]) == [keeps]


def test_what_is_proven_is_told_by_level_and_survives_as_json():
    harm = decide_segments(GateConfig(), harmful_step()).harm(3)
    assert harm == (LevelHarm(convicted=("hurt",), steps=((8, 15),), acquitted=("helped",)), LevelHarm(), LevelHarm())
    assert tuple(LevelHarm.model_validate(one.model_dump(mode="json")) for one in harm) == harm
    assert [one.proven for one in harm] == [True, False, False]


def test_acquittals_are_listed_only_where_a_step_is_convicted():
    random = np.random.default_rng(6)
    rows = {"hurt": random.normal(0.2, 0.1, 150), "helped": random.normal(-0.2, 0.1, 150)}
    evidence = evidence_of([(0, name, 12, own) for name, own in rows.items()])
    assert decide_segments(GateConfig(), evidence).harm(1) == (LevelHarm(convicted=("hurt",)),)


def test_the_last_step_has_no_end():
    harm = LevelHarm(steps=((21, None),))
    assert harm.refuses(np.array(["a", "b", "c"]), np.array([20, 21, 10**6])).tolist() == [False, True, True]


def test_a_step_is_tested_between_segments_not_between_rows():
    # One segment's harm, in many rows, says nothing about its step's others.
    entries = [(0, "one", 3, np.full(90, 0.5))] + [(0, f"{n}", 3, np.full(90, -0.01)) for n in range(9)]
    evidence = evidence_of(entries)
    verdicts = decide_segments(GateConfig(), evidence)
    sums = np.array([rows.sum() for _, _, _, rows in entries])
    ratio = sums.sum() / 900
    error = np.sqrt(10 / 9 * ((sums - ratio * 90) ** 2).sum()) / 900
    assert verdicts.estimate[0] == pytest.approx(ratio)
    assert verdicts.p[0] == pytest.approx(stats.t.sf(ratio / error, 9), abs=0.0025)
    assert not verdicts.harmful.any()


def test_segments_with_rows_of_their_own_do_not_speak_for_their_step():
    random = np.random.default_rng(2)
    entries = [(0, f"large {n}", 3, random.normal(0.3, 0.1, 150)) for n in range(8)]
    assert keep(evidence_of(entries), [(0, "large 3", 3), (0, "thin", 3)]) == [False, True]


def test_a_step_of_too_few_segments_convicts_nobody():
    entries = [(0, f"{n}", 3, np.full(50, 0.5 + n / 100)) for n in range(4)]
    assert keep(evidence_of(entries), [(0, "1", 3)]) == [True]
    assert len(decide_segments(GateConfig(), evidence_of(entries)).p) == 0


def test_the_same_key_on_two_levels_is_two_segments():
    entries = [(0, 7, 9, np.full(100, 0.5)), (1, 7, 9, np.full(100, -0.5))]
    assert keep(evidence_of(entries), [(0, 7, 9), (1, 7, 9)]) == [False, True]


@pytest.mark.parametrize("harmed", [0.0, 0.05, 0.2, 0.6])
def test_wrong_convictions_stay_below_the_false_discovery_rate(harmed):
    """Rows of a visit move together; of the others, half are neither better nor worse off, half gain."""
    wrong, found = [], []
    for seed in range(40):
        random = np.random.default_rng(seed)
        share = random.random(200)
        harm = share < harmed
        true = np.where(harm, 0.25, np.where(share < harmed + (1 - harmed) / 2, 0.0, -0.1))
        evidence = visits_of(true, random.integers(9, 15, 200), random)
        (level,) = decide_segments(GateConfig(), evidence).harm(1)
        convicted = np.isin(np.arange(200).astype(str), level.convicted)
        wrong.append((convicted & ~harm).sum() / max(convicted.sum(), 1))
        found.append((convicted & harm).sum() / max(harm.sum(), 1))
    assert np.mean(wrong) < 0.1
    assert harmed == 0 or np.mean(found) > 0.6


def regular(true, visits, rows, noise, support, random, name):
    """As many visits of as many rows of each segment; what is summed is all that is drawn."""
    owner = np.repeat(np.arange(len(true)), visits)
    sums = rows * true[owner] + noise * np.sqrt(rows) * random.normal(size=len(owner))
    within = noise**2 * random.chisquare(rows - 1, len(owner)) if rows > 1 else 0.0
    key = np.char.add(name, owner.astype(str))
    shape = np.ones(len(owner), int)
    return SegmentEvidence(0 * shape, key, key, support * shape, rows * shape, sums, within + sums**2 / rows)


def together(*parts):
    names = ("level", "key", "user", "support", "rows", "sums", "squares")
    return SegmentEvidence(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def test_harm_to_few_with_much_support_is_not_drowned_by_many_with_little():
    """What little support moves is small and quiet; shrunk towards that, harm to the others would be none."""
    random = np.random.default_rng(0)
    true = np.where(np.arange(300) < 15, 0.15, -0.03)
    many = regular(np.zeros(20_000), 2, 2, 0.02, 1, random, "thin")
    (harm,) = decide_segments(GateConfig(), together(many, regular(true, 10, 20, 0.3, 70, random, "thick"))).harm(1)
    hurt = {f"thick{number}" for number in range(15)}
    assert len(hurt & set(harm.convicted)) >= 12
    assert len(set(harm.convicted) - hurt) <= 2


def test_where_hardly_anybody_came_twice_nobody_is_convicted_by_himself():
    for seed in range(30):
        random = np.random.default_rng(seed)
        once = regular(np.zeros(2000), 1, 150, 0.3, 9, random, "once")
        twice = regular(np.zeros(5), 2, 80, 0.3, 9, random, "twice")
        assert not decide_segments(GateConfig(), together(once, twice)).harm(1)[0].convicted


def test_a_users_nights_in_a_market_are_one_visit_of_it():
    """Two users' taste on five nights each are no ten witnesses against a market; where user and segment are one, they
    are five."""
    taste = np.repeat([0.1, 0.12], 5)
    columns = (np.full(10, 40), np.full(10, 60), 60 * taste, 60 * taste**2)
    level, who = np.zeros(10, int), np.repeat(["a", "b"], 5)
    market = SegmentEvidence(level, np.full(10, "market"), who, *columns)
    assert len(decide_segments(GateConfig(), market).p) == 0
    users = SegmentEvidence(level, who, who, *columns)
    assert decide_segments(GateConfig(), users).harm(1)[0].convicted == ("a", "b")


def test_without_evidence_everything_ships():
    empty = SegmentEvidence(*(np.empty(0, np.int64) for _ in range(5)), np.empty(0), np.empty(0))
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
    rows = random.integers(1, 200, 2 * size)
    sums = random.normal(0, 0.1, 2 * size) * np.sqrt(rows)
    names = np.arange(size).astype(str)
    support = np.tile(random.integers(1, 60, size), 2)
    twice = np.tile(names, 2)
    evidence = SegmentEvidence(np.zeros(2 * size, int), twice, twice, support, rows, sums, rows * 0.02)
    verdicts = decide_segments(GateConfig(), evidence)
    assert len(verdicts.table(limit=5)) == 6 + 5
    harm = LevelHarm(convicted=verdicts.harm(1)[0].convicted, steps=((8, 15),), acquitted=tuple(names[::2]))
    refused = harm.refuses(names[::-1], np.full(size, 9))[::-1]
    assert np.array_equal(refused[1::2], np.ones(size // 2, bool))
    assert np.array_equal(refused[::2], np.isin(names[::2], harm.convicted))


def test_the_table_leads_with_steps_then_the_most_suspect_segments():
    random = np.random.default_rng(4)
    entries = [(0, n, 3, random.normal(n / 20, 0.3, 120)) for n in range(6)]
    entries += [(0, 100 + n, 3, random.normal(0, 0.3, 10)) for n in range(6)]
    table = decide_segments(GateConfig(), evidence_of(entries)).table(limit=2)
    assert table[0]["tested"] == "support 2 to 3"
    assert len(table) == 3
    assert table[1]["p"] <= table[2]["p"]
    assert {type(value) for row in table for value in row.values()} == {int, str, float, bool, type(None)}
    assert [row["shrunk"] is None for row in table] == [True, True, True]
