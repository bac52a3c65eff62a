"""Metrics against scikit-learn, hand arithmetic and plain loops."""

import numpy as np
import pytest
from sklearn import metrics as reference

from tasks.errors import TrainingDiverged
from tasks.learning import metrics, summaries

SEEDS = range(8)


def night(seed: int, rows: int = 400, users: int = 30, levels: int = 12):
    """Random rows with many tied scores, some users with one class, some labels missing."""
    random = np.random.default_rng(seed)
    user = random.integers(0, users, rows) * 7 + 3
    label = (random.random(rows) < (user % 5) / 4).astype(np.float32)
    label[random.random(rows) < 0.1] = np.nan
    score = (random.integers(1, levels, rows) / levels).astype(np.float32)
    tie = random.permutation(rows).astype(np.uint64)
    return label, score, user, tie


def of_user(key, label, score, user, tie):
    mine = (user == key) & ~np.isnan(label)
    return label[mine], score[mine], tie[mine]


@pytest.mark.parametrize("seed", SEEDS)
def test_log_loss_equals_scikit_learn(seed):
    label, score, _, _ = night(seed)
    known = ~np.isnan(label)
    rows = metrics.log_loss(label, score)
    assert np.array_equal(np.isnan(rows), ~known)
    assert rows[known].mean() == pytest.approx(
        reference.log_loss(label[known], score[known].astype(np.float64)), abs=1e-12
    )


def test_log_loss_of_certain_and_wrong_is_large_but_finite():
    rows = metrics.log_loss(np.array([1.0, 0.0, 1.0, 0.0]), np.array([0.0, 1.0, 1.0, 0.0]))
    assert rows == pytest.approx([-np.log(1e-7), -np.log(1e-7), 1e-7, 1e-7], rel=1e-6)


def test_log_loss_of_a_saturated_float32_sigmoid_is_finite():
    assert np.isfinite(metrics.log_loss(np.zeros(1, np.float32), np.ones(1, np.float32))).all()


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_prediction_that_is_not_finite_is_named_and_counted(broken):
    label, score = np.array([1.0, 0.0, np.nan]), np.array([0.5, broken, 0.5])
    for figure in (metrics.log_loss, metrics.squared_error, metrics.calibration_error, metrics.decisions, metrics.auc):
        with pytest.raises(TrainingDiverged, match="1 of 2 predictions are not finite"):
            figure(label, score)


def test_a_prediction_that_is_not_finite_is_ignored_where_there_is_no_label():
    assert metrics.auc(np.array([1.0, 0.0, np.nan]), np.array([0.9, 0.1, np.nan])) == 1.0
    assert np.isnan(metrics.log_loss(np.array([np.nan]), np.array([np.nan]))).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_auc_of_each_user_equals_scikit_learn_ties_included(seed):
    rows = night(seed)
    result = metrics.auc_by_user(*rows[:3])
    both = [key for key in np.unique(rows[2]) if len(np.unique(of_user(key, *rows)[0])) == 2]
    assert result.users.tolist() == both
    expected = [reference.roc_auc_score(*of_user(key, *rows)[:2]) for key in both]
    assert result.values == pytest.approx(expected, abs=1e-12)
    assert result.mean == pytest.approx(np.mean(expected), abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_auc_over_all_rows_equals_scikit_learn(seed):
    label, score, _, _ = night(seed)
    known = ~np.isnan(label)
    assert metrics.auc(label, score) == pytest.approx(reference.roc_auc_score(label[known], score[known]), abs=1e-12)


def test_auc_leaves_out_users_of_one_class():
    result = metrics.auc_by_user(np.array([1.0, 1, 0, 0]), np.array([0.1, 0.2, 0.3, 0.4]), np.array([1, 1, 2, 2]))
    assert len(result.users) == 0
    assert np.isnan(result.mean)


def test_auc_of_scores_all_tied_is_one_half():
    assert metrics.auc(np.array([1.0, 0, 0, 1, 0]), np.full(5, 0.3)) == 0.5


def test_auc_of_a_million_rows_keeps_exact_ranks():
    random = np.random.default_rng(0)
    label, score = (random.random(1_000_000) < 0.01).astype(np.float32), random.random(1_000_000).astype(np.float32)
    assert metrics.auc(label, score) == pytest.approx(reference.roc_auc_score(label, score), abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_ndcg_of_each_user_equals_scikit_learn_where_scores_differ(seed):
    label, score, user, tie = night(seed)
    score = score + tie.astype(np.float64) * 1e-6
    rows = (label, score, user, tie)
    result = metrics.ndcg_by_user(*rows)
    some = [key for key in np.unique(user) if (of_user(key, *rows)[0] == 1).any()]
    assert result.users.tolist() == some

    def expected(key):
        labels, scores, _ = of_user(key, *rows)
        return reference.ndcg_score(labels[None], scores[None], k=10) if len(labels) > 1 else 1.0

    assert result.values == pytest.approx([expected(key) for key in some], abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_ndcg_breaks_ties_by_the_digest_and_never_by_label_or_row_order(seed):
    label, score, user, tie = night(seed, levels=3)
    result = metrics.ndcg_by_user(label, score, user, tie)
    shuffle = np.random.default_rng(seed).permutation(len(label))
    assert np.array_equal(
        metrics.ndcg_by_user(label[shuffle], score[shuffle], user[shuffle], tie[shuffle]).values, result.values
    )

    def by_hand(key):
        labels, scores, ties = of_user(key, label, score, user, tie)
        ranked = [y for _, _, y in sorted(zip(-scores, ties, labels, strict=True))][:10]
        best = sorted(labels, reverse=True)[:10]
        gain = [sum(y / np.log2(rank + 2) for rank, y in enumerate(order)) for order in (ranked, best)]
        return gain[0] / gain[1]

    assert result.values == pytest.approx([by_hand(key) for key in result.users], abs=1e-12)


def test_ndcg_by_hand_with_the_only_positive_at_rank_eleven_is_zero():
    label = np.zeros(12)
    label[10] = 1
    result = metrics.ndcg_by_user(label, -np.arange(12.0), np.zeros(12), np.arange(12))
    assert result.values.tolist() == [0.0]


def test_ndcg_leaves_out_users_without_a_positive():
    result = metrics.ndcg_by_user(np.array([0.0, 1.0]), np.ones(2), np.array([1, 2]), np.arange(2))
    assert (result.users.tolist(), result.values.tolist()) == ([2], [1.0])


@pytest.mark.parametrize("seed", SEEDS)
def test_calibration_error_equals_a_loop_over_bins_where_scores_differ(seed):
    label, score, _, tie = night(seed, rows=300)
    score = score + tie.astype(np.float64) * 1e-6
    known = ~np.isnan(label)
    order = np.argsort(score[known])
    y, p = label[known][order], score[known][order]
    bins = np.arange(len(y)) * 15 // len(y)
    expected = sum(abs((p[bins == b] - y[bins == b]).sum()) for b in range(15)) / len(y)
    assert metrics.calibration_error(label, score) == pytest.approx(expected, abs=1e-12)


def test_calibration_error_of_a_constant_is_its_bias_whatever_the_order_of_rows():
    label = np.array([1.0] * 30 + [0.0] * 70)
    assert metrics.calibration_error(label, np.full(100, 0.5)) == pytest.approx(0.2)
    assert metrics.calibration_error(label[::-1], np.full(100, 0.5)) == pytest.approx(0.2)


def test_calibration_error_of_the_true_probabilities_vanishes_with_rows():
    random = np.random.default_rng(0)
    p = random.random(200_000)
    assert metrics.calibration_error((random.random(200_000) < p).astype(np.float64), p) < 0.005


@pytest.mark.parametrize("seed", SEEDS)
def test_decisions_equal_scikit_learn(seed):
    label, score, _, _ = night(seed)
    known = ~np.isnan(label)
    y, called = label[known], score[known] >= 0.5
    result = metrics.decisions(label, score)
    assert result.accuracy == pytest.approx(reference.accuracy_score(y, called))
    assert result.precision == pytest.approx(reference.precision_score(y, called))
    assert result.recall == pytest.approx(reference.recall_score(y, called))
    assert result.f1 == pytest.approx(reference.f1_score(y, called))


def test_precision_is_undefined_where_nothing_is_called_and_f1_is_zero():
    result = metrics.decisions(np.array([1.0, 0.0]), np.array([0.1, 0.1]))
    assert np.isnan(result.precision)
    assert (result.accuracy, result.recall, result.f1) == (0.5, 0.0, 0.0)


def test_recall_and_f1_are_undefined_where_nothing_is_positive_nor_called():
    result = metrics.decisions(np.zeros(2), np.array([0.1, 0.1]))
    assert np.isnan([result.recall, result.f1]).all()
    assert result.accuracy == 1.0


@pytest.mark.parametrize("seed", SEEDS)
def test_rating_errors_equal_scikit_learn(seed):
    _, score, user, _ = night(seed)
    stars = np.random.default_rng(seed).integers(1, 6, len(score)).astype(np.float32)
    stars[::9] = np.nan
    known = ~np.isnan(stars)
    mae = metrics.mean_absolute_error(stars, score)
    rmse = metrics.root_mean_squared_error(stars, score)
    assert mae == pytest.approx(reference.mean_absolute_error(stars[known], score[known]), rel=1e-6)
    assert rmse == pytest.approx(reference.root_mean_squared_error(stars[known], score[known]), rel=1e-6)
    assert np.nanmean(metrics.squared_error(stars, score)) == pytest.approx(rmse**2)
    assert summaries.rating_summary(stars, score, user)["rows"] == known.sum()


def test_fitness_is_the_ratio_of_summed_losses_over_rows_both_have():
    after, before = np.array([1.0, 2.0, np.nan, 7.0]), np.array([2.0, 4.0, 5.0, np.nan])
    assert metrics.adaptation_fitness(after, before) == 0.5
    assert metrics.adaptation_fitness(before, before) == 1.0
    assert np.isnan(metrics.adaptation_fitness(np.zeros(2), np.zeros(2)))


@pytest.mark.parametrize("label", [np.empty(0), np.full(3, np.nan)], ids=["no rows", "no labels"])
def test_without_labelled_rows_every_figure_is_none_and_every_count_zero(label):
    score, user = np.full(len(label), 0.5), np.arange(len(label))
    summary = summaries.binary_summary(label, score, user, user)
    counts = {name for name in summary if name == "rows" or name.endswith("users")}
    assert {summary[name] for name in counts} == {0}
    assert {summary[name] for name in summary.keys() - counts} == {None}
    assert summaries.rating_summary(label, score, user) == {"rows": 0, "users": 0, "mae": None, "rmse": None}


def test_the_summary_says_what_its_parts_say():
    label, score, user, tie = night(0)
    summary = summaries.binary_summary(label, score, user, tie)
    assert summary["log_loss"] == pytest.approx(np.nanmean(metrics.log_loss(label, score)))
    assert summary["auc"] == metrics.auc_by_user(label, score, user).mean
    assert summary["ndcg_at_10"] == metrics.ndcg_by_user(label, score, user, tie).mean
    assert summary["calibration_error"] == metrics.calibration_error(label, score)
    assert summary["f1"] == metrics.decisions(label, score).f1


def test_users_may_be_strings():
    label, score, user, _ = night(1)
    names = np.char.add("user ", user.astype(str))
    assert sorted(metrics.auc_by_user(label, score, names).values) == pytest.approx(
        sorted(metrics.auc_by_user(label, score, user).values)
    )
