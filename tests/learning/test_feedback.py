"""Feedback solved in a graph's operators, against the solver of the bank and against systems solved in double."""

from itertools import product

import pytest
import torch

from tasks.learning.adapters import SMALLEST_PRECISION
from tasks.learning.feedback import adapted
from tasks.learning.positive import inverse
from tasks.learning.solvers import solve

KINDS = ("binary", "rating")


def rows(count: int, width: int, requests: int = 6, seed: int = 0, spread: float = 0.5) -> list[torch.Tensor]:
    """Logits, features, labels, parents and own weights; the first feature is the constant."""
    torch.manual_seed(seed)
    features = torch.randn(requests, count, width) * torch.logspace(-spread, spread, width)
    features[..., 0] = 1.0
    logits = torch.randn(requests, count, 2)
    taste = torch.randn(requests, width, 2) * 0.5
    means = logits + features @ taste
    labels = torch.stack([(torch.sigmoid(means[..., 0]) > torch.rand(requests, count)).float(), means[..., 1]], dim=-1)
    parent, own = (torch.randn(requests, 2, width) * 0.2 for _ in range(2))
    return [logits, features, labels, parent, own]


def batched(logits, features, labels, parent, precision, steps, dtype=torch.float64):
    """What the bank's solver gives for the same rows; in double, if nothing else is said."""
    rows_of = (features, logits + features @ parent.mT, labels, torch.ones_like(logits[..., 0]), precision)
    return parent + solve(*(part.to(dtype) for part in rows_of), KINDS, steps).float()


def asked(width: int, seed: int = 1) -> torch.Tensor:
    """Rows that are to be scored, as far apart as those of the feedback."""
    torch.manual_seed(seed)
    queries = torch.randn(6, 30, width) * torch.logspace(-0.5, 0.5, width)
    queries[..., 0] = 1.0
    return queries


def apart(one: torch.Tensor, exact: torch.Tensor, single: torch.Tensor, queries: torch.Tensor) -> bool:
    """Whether scores are those of exact weights to 1e-4, or to four times what the bank's single precision is off."""
    off = [_difference(weights, exact, queries) for weights in (one, single)]
    return off[0] < max(1e-4, 4 * off[1])


def _difference(one: torch.Tensor, other: torch.Tensor, queries: torch.Tensor) -> float:
    """Largest difference of scores: of a probability, and of a rating beside 1 + itself."""
    left, right = queries @ one.mT, queries @ other.mT
    chance = (torch.sigmoid(left[..., 0]) - torch.sigmoid(right[..., 0])).abs().max()
    rating = ((left[..., 1] - right[..., 1]).abs() / (1 + right[..., 1].abs())).max()
    return float(max(chance, rating))


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(("count", "width", "most"), [(1, 8, 20), (5, 8, 20), (20, 8, 20), (20, 32, 20), (7, 1, 9)])
@pytest.mark.parametrize("held", [SMALLEST_PRECISION, 4.0])
def test_it_equals_the_solver_of_the_bank(count, width, most, steps, held):
    logits, features, labels, parent, own = rows(count, width)
    precision = torch.full((2, width), held)
    found = adapted(logits, features, labels, parent, own, precision, KINDS, steps, most)
    assert apart(found, *exact(logits, features, labels, parent, precision, steps), asked(width))


def exact(*given):
    """The weights that double gives, and how far the bank's own precision is from them in scores."""
    expected = batched(*given)
    return expected, batched(*given, dtype=torch.float32)


def test_rows_that_are_alike_and_rows_that_are_certain_are_solved_as_well():
    logits, features, labels, parent, own = rows(12, 16)
    features[:, 4:] = features[:, :1]  # nine times the same row, with labels that disagree
    logits[0] = 40.0  # the sigmoid is 1 to the bit, and labels say otherwise
    labels[0, :, 0] = 0.0
    for held, most in product((SMALLEST_PRECISION, 0.1, 4.0), (12, 20)):
        precision = torch.full((2, 16), held)
        found = adapted(logits, features, labels, parent, own, precision, KINDS, 2, most)
        assert torch.isfinite(found).all()
        assert apart(found, *exact(logits, features, labels, parent, precision, 2), asked(16))


def test_without_rows_the_own_weights_serve_to_the_bit():
    logits, features, labels, parent, own = rows(3, 8)
    precision = torch.ones(2, 8)
    none = adapted(*(part[:, :0] for part in (logits, features, labels)), parent, own, precision, KINDS, 2, 5)
    assert torch.equal(none, own)
    unlabelled = torch.full_like(labels, torch.nan)
    assert torch.equal(adapted(logits, features, unlabelled, parent, own, precision, KINDS, 2, 5), own)


def test_a_missing_label_is_missing_to_its_objective_alone():
    logits, features, labels, parent, own = rows(6, 8)
    precision = torch.ones(2, 8)
    labels[0, :, 0], labels[1, 3, 1] = torch.nan, torch.nan
    found = adapted(logits, features, labels, parent, own, precision, KINDS, 2, 6)
    assert torch.equal(found[0, 0], parent[0, 0])
    kept = [0, 1, 2, 4, 5]
    fewer = adapted(*(part[:, kept] for part in (logits, features, labels)), parent, own, precision, KINDS, 2, 6)
    torch.testing.assert_close(found[1, 1], fewer[1, 1], rtol=1e-5, atol=1e-5)


def test_order_padding_and_company_change_nothing():
    logits, features, labels, parent, own = rows(6, 8)
    precision = torch.ones(2, 8)
    plain = adapted(logits, features, labels, parent, own, precision, KINDS, 2, 6)
    turned = adapted(*(part.flip(1) for part in (logits, features, labels)), parent, own, precision, KINDS, 2, 9)
    torch.testing.assert_close(turned, plain, rtol=1e-4, atol=1e-5)
    alone = adapted(*(part[2:3] for part in (logits, features, labels, parent, own)), precision, KINDS, 2, 6)
    torch.testing.assert_close(alone[0], plain[2], rtol=1e-5, atol=1e-5)


def test_of_more_rows_the_first_count():
    logits, features, labels, parent, own = rows(9, 8)
    precision = torch.ones(2, 8)
    all_of_them = adapted(logits, features, labels, parent, own, precision, KINDS, 2, 4)
    first = adapted(*(part[:, :4] for part in (logits, features, labels)), parent, own, precision, KINDS, 2, 4)
    assert torch.equal(all_of_them, first)


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_pivots_give_the_inverse(size):
    torch.manual_seed(size)
    root = torch.randn(5, size, 2 * size, dtype=torch.float64) * torch.logspace(-2, 2, size).double()[:, None]
    systems = root @ root.mT
    torch.testing.assert_close(inverse(systems), torch.linalg.inv(systems), rtol=1e-8, atol=1e-8)


def test_singular_systems_give_numbers():
    for system in (torch.ones(3, 3), torch.zeros(3, 3)):
        assert torch.isfinite(inverse(system)).all()
