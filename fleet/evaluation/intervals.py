"""Figures with their uncertainty: shares with Wilson intervals, pass@k, and the paired difference of two policies.

Plain arithmetic on counts, so that every figure of an evaluation can be checked by hand.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

Z95 = 1.959963984540054  # the normal distribution's 97.5 % point


@dataclass(frozen=True)
class Estimate:
    """A share in [0, 1] of `n` independent trials with its 95 % interval; `value` is None with n = 0."""

    value: float | None
    ci95: tuple[float, float]
    n: int

    def as_json(self) -> dict[str, Any]:
        """{"value", "ci95": [low, high], "n"}, and the fields of a subclass."""
        return asdict(self) | {"ci95": list(self.ci95)}

    def interval(self, to: str) -> str:
        """The interval in percent, its ends joined by `to`; empty for an exact value.

        >>> Estimate(0.5, (0.45, 0.5512), 64).interval(" to ")
        '45.0 to 55.1'
        """
        low, high = self.ci95
        return "" if low == high else f"{100 * low:.1f}{to}{100 * high:.1f}"


@dataclass(frozen=True)
class PairedDifference(Estimate):
    """The share that a model gets right minus a baseline's, on the same `n` trials."""

    p_value: float  # of McNemar's exact test that both are right equally often
    only_model_right: int
    only_baseline_right: int


def share(num_hits: float, n: int) -> Estimate:
    """num_hits of n as a share with Wilson's score interval.

    num_hits: 0 to n; may be a sum of n numbers in [0, 1], such as pass@k of n episodes. Such numbers vary less than
    zeros and ones, so the interval is then wider than it need be. Raises ValueError outside 0 to n.
    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22, 1927.

    >>> share(7, 10)
    Estimate(value=0.7, ci95=(0.3967781, 0.8922087), n=10)
    """
    if not 0 <= num_hits <= n:
        raise ValueError(f"{num_hits} hits of {n}, but wanted 0 to {n}")
    if n == 0:
        return Estimate(None, (0.0, 1.0), 0)
    low, high = _wilson(num_hits / n, n)
    return Estimate(num_hits / n, (round(low, 7), round(high, 7)), n)


def exactly(value: float, n: int) -> Estimate:
    """A share that is known without uncertainty, such as chance."""
    return Estimate(value, (value, value), n)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Probability that at least one of k samples is right, estimated without bias from num_samples >= k of them.

    1 - C(num_samples - num_right, k) / C(num_samples, k). Raises ValueError unless 1 <= k <= num_samples and
    0 <= num_right <= num_samples. Source: "Evaluating Large Language Models Trained on Code", arXiv 2107.03374, eq. 1.

    >>> pass_at_k(5, 2, 2)
    0.7
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k={k} with {num_samples} samples, but pass@k needs 1 <= k <= samples; draw more or lower k")
    if not 0 <= num_right <= num_samples:
        raise ValueError(f"{num_right} right of {num_samples} samples, but wanted 0 to {num_samples}")
    return 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def paired_difference(model_right: Sequence[bool], baseline_right: Sequence[bool]) -> PairedDifference:
    """The share that a model gets right minus its baseline's, on the same trials in the same order.

    The interval is Newcombe's hybrid of Wilson intervals, which allows for the correlation of the two.
    Raises ValueError for unequal lengths. Sources: Newcombe, "Improved confidence intervals for the difference between
    binomial proportions based on paired data", Statistics in Medicine 17, 1998, method 10; McNemar, Psychometrika 12,
    1947.
    """
    both = sum(a and b for a, b in zip(model_right, baseline_right, strict=True))
    only_model, only_baseline = sum(model_right) - both, sum(baseline_right) - both
    n = len(model_right)
    if n == 0:
        return PairedDifference(None, (-1.0, 1.0), 0, 1.0, 0, 0)
    first, second = sum(model_right) / n, sum(baseline_right) / n
    (low_1, high_1), (low_2, high_2) = _wilson(first, n), _wilson(second, n)
    correlation = _correlation(both, only_model, only_baseline, n - both - only_model - only_baseline)
    difference = first - second
    down = _hybrid(first - low_1, high_2 - second, correlation)
    up = _hybrid(high_1 - first, second - low_2, correlation)
    interval = (round(difference - down, 7), round(difference + up, 7))
    return PairedDifference(difference, interval, n, _mcnemar(only_model, only_baseline), only_model, only_baseline)


def _wilson(value: float, n: int) -> tuple[float, float]:
    centre = value + Z95**2 / (2 * n)
    half_width = Z95 * math.sqrt(value * (1 - value) / n + Z95**2 / (4 * n**2))
    scale = 1 + Z95**2 / n
    # rounding may leave the ends just outside
    return max(0.0, (centre - half_width) / scale), min(1.0, (centre + half_width) / scale)


def _hybrid(first: float, second: float, correlation: float) -> float:
    return math.sqrt(max(0.0, first**2 - 2 * correlation * first * second + second**2))


def _correlation(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Newcombe's phi: the correlation, with its numerator corrected for continuity where it is positive."""
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if margins == 0:
        return 0.0
    determinant = both * neither - only_first * only_second
    n = both + only_first + only_second + neither
    corrected = max(determinant - n / 2, 0) if determinant > 0 else determinant
    return corrected / math.sqrt(margins)


def _mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value: the trials on which the two differ are fair coin tosses."""
    tosses = only_first + only_second
    tail = sum(math.comb(tosses, heads) for heads in range(min(only_first, only_second) + 1))
    # whole numbers until the end: 2**tosses overflows a float beyond 1,023
    return min(1.0, 2 * tail / 2**tosses)
