"""The trend of a short run's rewards, against scipy's regression and by hand."""

import random

import pytest
from scipy.stats import linregress

from fleet.toy.trial_run import trend_of

pytestmark = pytest.mark.fast


def test_the_slope_counts_in_its_standard_errors() -> None:
    rng = random.Random(0)
    rewards = [0.01 * step + rng.gauss(0, 0.05) for step in range(20)]
    found, oracle = trend_of(rewards), linregress(range(20), rewards)
    assert found.num_errors == pytest.approx(oracle.slope / oracle.stderr)
    assert found.is_rising
    assert found.before == pytest.approx(sum(rewards[:5]) / 5) and found.after == pytest.approx(sum(rewards[-5:]) / 5)


@pytest.mark.parametrize("rewards", [[0.25] * 20, [0.0, 0.1] * 10, [0.3 - 0.01 * step for step in range(20)]])
def test_what_does_not_rise_is_not_rising(rewards: list[float]) -> None:
    assert not trend_of(rewards).is_rising


def test_noise_alone_is_hardly_ever_taken_for_a_rise() -> None:
    rng = random.Random(1)
    assert sum(trend_of([rng.gauss(0.2, 0.05) for _ in range(20)]).is_rising for _ in range(500)) <= 8


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="9 rewards, but two windows of 5 are compared"):
        trend_of([0.1] * 9)
