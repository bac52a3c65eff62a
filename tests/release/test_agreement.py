"""What a variant costs, against arithmetic by hand, and when that is little enough."""

from pathlib import Path

import numpy as np
import pytest

from tasks.data.contract import ObjectiveConfig
from tasks.release import agreement
from tasks.release.agreement import LARGEST_DIFFERENCE, Agreement, compared, in_common, judged
from tasks.release.export_config import ExportConfig
from tasks.release.manifest_parts import Variant
from tasks.release.variants import SLACK, parity_of

LIKED = ObjectiveConfig(name="liked", column="liked", kind="binary")
STARS = ObjectiveConfig(name="stars", column="stars", kind="rating")
USERS = np.repeat([f"user {number}" for number in range(40)], 25)


def night(seed: int, noise: float, spoil: float = 0.0) -> agreement.Compared:
    """A thousand rows of 40 users whose labels follow fp32's probabilities; the variant's logits are noisy."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=len(USERS))
    plain = 1 / (1 + np.exp(-logits))
    labels = (random.random(len(USERS)) < plain).astype(np.float32)
    other = 1 / (1 + np.exp(-(logits * (1 - spoil) + noise * random.normal(size=len(USERS)))))
    return compared(LIKED, USERS, labels, plain.astype(np.float32), other.astype(np.float32), 0.9)


def verdict(*nights: agreement.Compared, parity: float | None = 1e-3, **limits: float) -> tuple[str, str]:
    return judged(ExportConfig(variants=("int8",), **limits), parity, [(LIKED, agreement.agreement(LIKED, nights))])


def test_changes_are_paired_by_row_and_by_user():
    """Two users, by hand: one pair of a's is in the wrong order now, half a pair of b's is tied."""
    users = np.array(["a", "a", "b", "b", "b"])
    labels = np.float32([1, 0, 1, 0, np.nan])
    plain, other = np.float32([0.8, 0.4, 0.7, 0.6, 0.5]), np.float32([0.3, 0.4, 0.6, 0.6, 0.9])
    found = compared(LIKED, users, labels, plain, other, None)
    expected = [np.log(0.8) - np.log(0.3), np.log(0.7) - np.log(0.6)]
    np.testing.assert_allclose(found.loss.sums[:, 0], expected, rtol=1e-6)
    assert found.loss.rows.tolist() == [2, 2]
    assert found.auc.sums[:, 0].tolist() == [1.0, 0.5]
    assert found.largest == pytest.approx(0.5)


def test_a_ratings_error_is_told_in_its_labels_variance():
    labels, plain = np.float32([10, 30, 20]), np.float32([12, 30, 20])
    found = compared(STARS, np.array(["a", "a", "b"]), labels, plain, np.float32([14, 30, 20]), None)
    np.testing.assert_allclose(found.loss.sums[:, 0], [(16 - 4) / (200 / 3), 0], rtol=1e-6)
    assert len(found.auc.users) == 0
    assert found.largest == pytest.approx(2 / 13)


def test_lists_share_what_is_in_both():
    plain = np.float32([[9, 8, 7, 6], [1, 2, 3, 4]])
    other = np.float32([[9, 6, 7, 8], [4, 3, 2, 1]])
    assert in_common(plain, other, length=2) == (1 + 0) / 4
    assert in_common(plain, plain) == 1.0
    assert in_common(plain[:, :0], other[:, :0]) is None


def test_a_variant_passes_once_enough_nights_show_that_it_costs_little():
    """A noise of a hundredth of a logit costs 1e-5 of log-loss; of one night alone AUC cannot tell a thousandth."""
    nights = [night(seed, 0.01) for seed in range(60)]
    assert verdict(nights[0])[0] == "failed"
    assert "40 users do not show" in verdict(*[night(seed, 0.1) for seed in range(3)])[1]
    assert verdict(*nights)[0] == "passed"


def test_a_variant_that_costs_more_than_the_limit_fails_and_says_how_much():
    assert "log-loss worse by" in (why := verdict(*[night(seed, 0.0, spoil=0.3) for seed in range(7)])[1])
    assert "costs more" in why
    outcome, why = verdict(*[night(seed, 0.5) for seed in range(7)], max_log_loss_rise=0.1)
    assert outcome == "failed"
    assert "AUC worse by" in why
    assert "costs more" in why


def test_limits_are_the_configs():
    nights = [night(seed, 0.1) for seed in range(10)]
    assert verdict(*nights)[0] == "failed"
    assert verdict(*nights, max_auc_loss=0.02, max_log_loss_rise=0.01)[0] == "passed"


@pytest.mark.parametrize("parity", [None, LARGEST_DIFFERENCE * 1.01])
def test_a_variant_that_answers_golden_requests_badly_fails_whatever_it_costs(parity: float | None):
    nights = [night(seed, 0.001) for seed in range(60)]
    assert verdict(*nights)[0] == "passed"
    assert verdict(*nights, parity=parity)[0] == "failed"


def test_scores_that_are_not_finite_fail():
    users, half = np.array(["a", "b"]), np.float32([0.5, 0.5])
    broken = compared(LIKED, users, np.float32([1, 0]), half, np.float32([np.nan, 0.5]), None)
    assert broken.largest == np.inf
    assert verdict(broken, *[night(seed, 0.001) for seed in range(60)]) == (
        "failed",
        "it gives scores that are not finite",
    )


def test_a_night_can_be_written_and_read(tmp_path: Path):
    found = {("int8", "liked"): night(0, 0.1), ("fp16", "liked"): night(1, 0.01)}
    agreement.save(found, tmp_path / "compared.parquet")
    for (variant, objective), one in found.items():
        read = agreement.load(tmp_path / "compared.parquet", variant, objective, one.lists, one.largest)
        for own, again in ((one.loss, read.loss), (one.auc, read.auc)):
            assert (own.users == again.users).all()
            np.testing.assert_array_equal(own.sums, again.sums)
            np.testing.assert_array_equal(own.rows, again.rows)


def test_what_a_manifest_tells_is_json():
    import json

    told: Agreement = agreement.agreement(LIKED, [night(0, 0.1)])
    assert set(json.loads(json.dumps(told.as_json(), allow_nan=False))) == {
        *("objective", "log_loss_rise", "auc_loss", "top_10_in_common", "largest_difference"),
    }


def test_a_verdict_is_taken_over_while_the_golden_requests_are_answered_as_closely():
    """Of whom it is, what was measured anew, and why it fails: limits by hand."""
    first, second = "a" * 64, "b" * 64
    judged_one = Variant(("score_int8.onnx",), "CPU", parity_of("int8", 0.003), {"nights": 4}, "passed", "close")
    limit = 0.003 + SLACK["int8"]
    assert judged_one.parity["tolerance"] == limit
    near = agreement.taken_over(judged_one, first, parity_of("int8", limit), same=True)
    assert (near.verdict, near.files, near.provider) == ("passed", ("score_int8.onnx",), "CPU")
    assert near.why == "as release aaaaaaaaaaaa was judged, but for segments that fell back since: close"
    assert near.agreement == {"nights": 4, "release": first}
    assert near.parity == {"largest": limit, "tolerance": limit + SLACK["int8"]}
    again = agreement.taken_over(near, second, parity_of("int8", 0.001), same=True)
    assert (again.verdict, again.why, again.agreement) == (near.verdict, near.why, near.agreement)
    for apart, same, why in (
        (0.0032, True, "a golden request is answered 0.0032 off, limit 0.0031, which release aaaaaaaaaaaa keeps"),
        (None, True, "it gives scores that are not finite"),
        (0.001, False, "release aaaaaaaaaaaa was judged with another base or recipe"),
    ):
        failed = agreement.taken_over(judged_one, first, parity_of("int8", apart), same=same)
        assert (failed.verdict, failed.why, failed.agreement["release"]) == ("failed", why, first)
        assert agreement.taken_over(failed, second, parity_of("int8", 0.0), same=True).why == why
    lost = Variant((), "CPU", {"tolerance": 0.01}, {}, "failed", "it lost too much")
    found = agreement.taken_over(lost, first, parity_of("int8", 0.0), same=True)
    assert (found.verdict, found.why.split(": ")[1]) == ("failed", "it lost too much")
