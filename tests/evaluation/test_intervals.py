"""Figures and their intervals against hand-worked values, published examples, SciPy and brute force."""

import itertools
import math
import random

import pytest
from scipy.stats import binomtest

from fleet.evaluation.intervals import exactly, paired_difference, pass_at_k, share

pytestmark = pytest.mark.fast


# hits, n, then Wilson's ends worked by hand: (p + z²/2n ∓ z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.959964
@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775328),  # z² / (n + z²) = 3.841459 / 13.841459
        (10, 10, 0.7224672, 1.0),
        (5, 10, 0.2365931, 0.7634069),
        (1, 1, 0.2065493, 1.0),  # 1 / (1 + z²)
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17, 857, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_of_known_cases(hits: int, n: int, low: float, high: float) -> None:
    estimate = share(hits, n)
    assert estimate.value == hits / n and estimate.n == n
    assert estimate.ci95 == pytest.approx((low, high), abs=6e-5)


def test_wilson_is_scipys() -> None:
    for n in (1, 2, 7, 64, 1000):
        for hits in {0, 1, n // 3, n // 2, n - 1, n}:
            theirs = binomtest(hits, n).proportion_ci(0.95, method="wilson")
            assert share(hits, n).ci95 == pytest.approx((theirs.low, theirs.high), abs=1e-6)


def test_of_nothing_nothing_is_known() -> None:
    assert share(0, 0).as_json() == {"value": None, "ci95": [0.0, 1.0], "n": 0}
    assert exactly(0.25, 8).as_json() == {"value": 0.25, "ci95": [0.25, 0.25], "n": 8}


@pytest.mark.parametrize(("hits", "n"), [(-1, 4), (5, 4), (math.nan, 4)])
def test_impossible_shares_are_refused(hits: float, n: int) -> None:
    with pytest.raises(ValueError, match="wanted 0 to 4"):
        share(hits, n)


# samples, right, k: 1 - C(samples - right, k) / C(samples, k)
@pytest.mark.parametrize(
    ("num_samples", "num_right", "k", "expected"),
    [(4, 1, 1, 0.25), (5, 2, 2, 0.7), (5, 0, 5, 0.0), (5, 5, 1, 1.0), (4, 1, 4, 1.0), (10, 3, 5, 1 - 21 / 252)],
)
def test_pass_at_k_of_known_cases(num_samples: int, num_right: int, k: int, expected: float) -> None:
    assert pass_at_k(num_samples, num_right, k) == pytest.approx(expected)


def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples() -> None:
    for num_samples in range(1, 7):
        for num_right in range(num_samples + 1):
            is_right = [place < num_right for place in range(num_samples)]
            for k in range(1, num_samples + 1):
                choices = list(itertools.combinations(is_right, k))
                expected = sum(any(choice) for choice in choices) / len(choices)
                assert pass_at_k(num_samples, num_right, k) == pytest.approx(expected)


@pytest.mark.parametrize(("num_samples", "num_right", "k"), [(4, 1, 5), (4, 1, 0), (0, 0, 1), (4, 5, 1), (4, -1, 1)])
def test_impossible_pass_at_k_is_refused(num_samples: int, num_right: int, k: int) -> None:
    with pytest.raises(ValueError, match="wanted|needs 1 <= k <= samples"):
        pass_at_k(num_samples, num_right, k)


def rights(both: int, only_first: int, only_second: int, neither: int) -> tuple[list[bool], list[bool]]:
    counts = (both, only_first, only_second, neither)
    pairs = [(True, True), (True, False), (False, True), (False, False)]
    shown = [pair for pair, count in zip(pairs, counts, strict=True) for _ in range(count)]
    return [first for first, _ in shown], [second for _, second in shown]


@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),  # Newcombe 1998, Statistics in Medicine 17, 2635: method 10 on his example
        ((0, 0, 0, 50), -0.0713, 0.0713),  # by hand: no correlation, and Wilson's upper end of 0 of 50 to both sides
    ],
)
def test_paired_interval_of_known_cases(cells: tuple[int, int, int, int], low: float, high: float) -> None:
    result = paired_difference(*rights(*cells))
    assert result.value == pytest.approx((cells[1] - cells[2]) / sum(cells))
    assert (result.only_model_right, result.only_baseline_right, result.n) == (cells[1], cells[2], sum(cells))
    assert result.ci95 == pytest.approx((low, high), abs=6e-5)


def test_paired_interval_covers_the_truth_as_often_as_it_says() -> None:
    # 30 % both right, 25 % only the first, 10 % only the second: the difference is 0.15
    rng, covered = random.Random(0), 0
    for _ in range(1000):
        drawn = rng.choices(["both", "first", "second", "neither"], [0.30, 0.25, 0.10, 0.35], k=60)
        low, high = paired_difference(
            [who in ("both", "first") for who in drawn], [who in ("both", "second") for who in drawn]
        ).ci95
        covered += low <= 0.15 <= high
    assert 0.93 <= covered / 1000 <= 0.98


def test_mcnemar_is_a_fair_coins_test() -> None:
    for only_first, only_second in [(0, 0), (1, 0), (5, 0), (12, 2), (7, 7), (300, 250)]:
        p_value = paired_difference(*rights(3, only_first, only_second, 4)).p_value
        tosses = only_first + only_second
        assert p_value == pytest.approx(binomtest(only_first, tosses).pvalue if tosses else 1.0)
    # 5 of 5 tosses: 2 / 32
    assert paired_difference(*rights(0, 5, 0, 0)).p_value == pytest.approx(0.0625)


def test_pairs_of_unequal_number_are_refused() -> None:
    with pytest.raises(ValueError):
        paired_difference([True], [True, False])
    assert paired_difference([], []).value is None
