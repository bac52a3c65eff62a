"""Shrunk values: nearer to the truth than what was measured, and honest about how near."""

import numpy as np
import pytest

from tasks.release.shrinkage import shrink


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.5])
def test_shrunk_lifts_are_nearer_to_the_truth_and_say_how_near(spread: float) -> None:
    """True values with a known spread, measured with as little or as much noise as segments have rows."""
    random = np.random.default_rng(3)
    true = 0.1 + spread * random.normal(size=4000)
    variance = 0.5 / random.integers(1, 200, len(true))
    mean = true + np.sqrt(variance) * random.normal(size=len(true))
    shrunk, deviation = shrink(mean, variance)
    error = shrunk - true
    assert np.mean(error**2) < np.mean((mean - true) ** 2)
    # No estimate can do better than that of the prior that drew them.
    best = 0.1 + (mean - 0.1) * spread**2 / (spread**2 + variance)
    assert np.mean(error**2) <= 1.02 * np.mean((best - true) ** 2) + 1e-4
    if spread > 0:
        assert np.mean(np.abs(error) < 1.96 * deviation) == pytest.approx(0.95, abs=0.015)


def test_without_noise_the_measured_is_the_truth() -> None:
    for mean in (np.zeros(1000), np.full(1000, -0.01), np.linspace(-1, 1, 10)):
        shrunk, deviation = shrink(mean, np.zeros(len(mean)))
        np.testing.assert_array_equal(shrunk, mean)
        assert not deviation.any()
    shrunk, deviation = shrink(np.array([-1.0, 0.0, 1.0]), np.array([0.0, 0.1, 0.1]))
    assert np.isfinite(shrunk).all()
    assert shrunk[0] == pytest.approx(-1, abs=1e-6)
    assert deviation[0] < 1e-3
