"""Item-kNN by plain Python loops, by its blocks, and by worlds in which the answer is known."""

import numpy as np
import pytest
import torch

from tasks.learning import neighbours
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material, visits_of
from tasks.learning.neighbours import ItemKnn, find_neighbours
from tests.learning.small_rows import FIRST, ladder_of, opposed, table, with_labels

NIGHT = FIRST + 4
KINDS = ("binary", "rating")
NUMBERS = {"most": 3, "shrinkage": 2.0, "mass": 0.3, "user_rows": 25}


@pytest.fixture(scope="module")
def rows():
    """Two objectives with labels missing and unequal weights; users meet items again."""
    world = opposed(nights=6, users=25)
    random = np.random.default_rng(1)
    world = with_labels(world, np.where(random.random(world.labels.shape) < 0.2, np.nan, world.labels))
    object.__setattr__(world, "weights", random.uniform(0.0, 2.0, len(world)).astype(np.float32))
    return world


def knn(rows, ladder=None, kinds=KINDS, **numbers):
    ladder = Ladder(rows, ladder or ladder_of(), "shopper")
    return ItemKnn(ladder, Material(rows), kinds, np.flatnonzero(rows.night < NIGHT), **{**NUMBERS, **numbers})


def tonight(rows):
    return visits_of(rows).of_nights(NIGHT, NIGHT)


class Slow:
    """The same from the columns of the rows, one row at a time."""

    def __init__(self, rows, aim, kind, max_support=128, min_support=1):
        self.rows, self.aim, self.kind = rows, aim, kind
        self.most_support, self.least_support = max_support, min_support

    def expected(self, row, scale, pull):
        score = float(self.rows.statistics[row, self.aim]) + scale * pull
        return 1 / (1 + np.exp(-score)) if self.kind == "binary" else score

    def residual(self, row):
        label = self.rows.labels[row, self.aim]
        return 0.0 if np.isnan(label) else float(label) - self.expected(row, 0.0, 0.0)

    def weight(self, row):
        return 0.0 if np.isnan(self.rows.labels[row, self.aim]) else float(self.rows.weights[row])

    def similar(self, at):
        taken, table = {}, {}
        for row in reversed(at):
            taken.setdefault(self.rows.user[row], []).append(row)
        for user, mine in taken.items():
            for row in mine[: NUMBERS["user_rows"]]:
                if self.weight(row) > 0:
                    entry = table.setdefault(int(self.rows.item[row]), {})
                    entry[user] = entry.get(user, 0.0) + self.weight(row) * self.residual(row)
        every = [value for entry in table.values() for value in entry.values()]
        shrunk = NUMBERS["shrinkage"] * np.mean(np.square(every))
        norm = {item: np.sqrt(sum(v**2 for v in entry.values())) for item, entry in table.items()}
        near = {}
        for item, entry in table.items():
            dots = {o: sum(v * also.get(u, 0.0) for u, v in entry.items()) for o, also in table.items() if o != item}
            found = sorted((-dot / (norm[item] * norm[o] + shrunk), o) for o, dot in dots.items() if dot > 0)
            near[item] = {o: -value for value, o in found[: NUMBERS["most"]]}
        return near

    def pull(self, near, support, item):
        support = support[-self.most_support :]
        if len(support) < self.least_support:
            return 0.0
        shares = [near.get(int(item), {}).get(int(self.rows.item[row]), 0.0) * self.weight(row) for row in support]
        return sum(s * self.residual(row) for s, row in zip(shares, support, strict=True)) / (
            sum(shares) + NUMBERS["mass"]
        )

    def before(self, row):
        """All rows of the row's user that come before it; a night's rows have their order."""
        return [other for other in range(row) if self.rows.user[other] == self.rows.user[row]]

    def scale(self):
        """The root of the penalised gradient, found by halving."""
        earlier = np.flatnonzero(self.rows.night < NIGHT)
        night = self.rows.night[earlier]
        border = max(n for n in np.unique(night) if (night >= n).mean() >= 0.2)
        near = self.similar(earlier[night < border].tolist())
        held = [row for row in earlier[night >= border].tolist() if self.weight(row) > 0]
        pulls = [self.pull(near, self.before(row), self.rows.item[row]) for row in held]

        def slope(scale):
            parts = (
                self.weight(row) * x * (float(self.rows.labels[row, self.aim]) - self.expected(row, scale, x))
                for row, x in zip(held, pulls, strict=True)
            )
            return sum(parts) - scale

        low, high = -100.0, 100.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if slope(middle) > 0 else (low, middle)
        return low


@pytest.mark.parametrize(("k", "limits"), [(0, {}), (5, {}), (4, {"max_support": 7}), (2, {"min_support": 15})])
def test_it_is_what_plain_loops_find(rows, k, limits):
    fitted, visits = knn(rows, ladder_of(**limits)), tonight(rows)
    said = fitted.scores(visits, np.full(len(visits), k)).double().numpy()
    border, query = visits.split(np.full(len(visits), k))
    at, visit = query.flat()
    for aim, kind in enumerate(KINDS):
        slow = Slow(rows, aim, kind, **limits)
        scale = slow.scale()
        assert fitted.scale[aim].item() == pytest.approx(scale, rel=1e-5)
        near = slow.similar(np.flatnonzero(rows.night < NIGHT).tolist())
        pulls = [
            slow.pull(near, list(range(visits.first[v], border[v])), rows.item[row])
            for row, v in zip(at, visit, strict=True)
        ]
        assert np.count_nonzero(pulls) > 20
        expected = rows.statistics[at, aim] + scale * np.array(pulls)
        np.testing.assert_allclose(said[:, aim], expected, atol=2e-5)


def test_blocks_leave_no_trace(rows, monkeypatch):
    visits = tonight(rows)
    whole = knn(rows)
    monkeypatch.setattr(neighbours, "PAIRS", 40)
    pieces = knn(rows)
    for one, other in zip(whole.neighbours, pieces.neighbours, strict=True):
        assert len(one.keys) > 20
        assert torch.equal(one.keys, other.keys)
        torch.testing.assert_close(one.values, other.values, rtol=1e-12, atol=0)
    after = np.full(len(visits), 4)
    torch.testing.assert_close(whole.scores(visits, after), pieces.scores(visits, after), rtol=0, atol=1e-6)


def test_shrunk_cosine_by_hand():
    """Items 1 and 2 agree for both users, 3 is met by one; 0 is unknown. v = (1 + 4 + 1 + 4 + 1) / 5 = 2.2."""
    users, items = torch.tensor([0, 0, 1, 1, 1, 0]), torch.tensor([1, 2, 1, 2, 3, 0])
    residuals = torch.tensor([1.0, 2.0, 1.0, 2.0, -1.0, 9.0])
    found = find_neighbours(users, items, residuals, 2, 4, most=5, shrinkage=1.0)
    assert found.keys.tolist() == [1 * 4 + 2, 2 * 4 + 1]
    expected = (1 * 2 + 1 * 2) / (np.sqrt(2) * np.sqrt(8) + 2.2)
    np.testing.assert_allclose(found.values.numpy(), [expected, expected])
    asked = found.between(torch.tensor([1, 2, 1, 3, 9, 1]), torch.tensor([2, 1, 3, 1, 1, 9]))
    np.testing.assert_allclose(asked.numpy(), [expected, expected, 0, 0, 0, 0])


@pytest.mark.parametrize("nights", [(0,), ()])
def test_a_history_that_cannot_say_how_much_to_trust_says_the_popularity(nights):
    labels = np.array([[1.0, 4.0], [0.0, 2.0], [1.0, 5.0]])
    rows = table([1, 1, 2], [nights[0] if nights else 4] * 2 + [4], item=[1, 2, 1], labels=labels)
    visits = tonight(rows)
    said = knn(rows).scores(visits, np.ones(len(visits), np.int64))
    at = visits.split(np.ones(len(visits), np.int64))[1].flat()[0]
    assert np.array_equal(said.numpy(), rows.statistics[at, :2])


def test_labels_that_are_all_missing_say_nothing(rows):
    silent = with_labels(rows, np.full_like(rows.labels, np.nan))
    visits = tonight(silent)
    said = knn(silent).scores(visits, np.full(len(visits), 3))
    assert np.array_equal(said.numpy(), silent.statistics[visits.split(np.full(len(visits), 3))[1].flat()[0], :2])
