"""Intervals and tests for counts: Wilson, McNemar and Cohen's kappa."""

import math
from collections.abc import Sequence
from statistics import NormalDist

Z95 = NormalDist().inv_cdf(0.975)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval for a proportion (Wilson, 1927)."""
    p = successes / n
    z2 = Z95**2
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n**2)) / (1 + z2 / n)
    return max(0.0, center - half), min(1.0, center + half)


def mcnemar(a: list[bool], b: list[bool]) -> dict:
    """Two models on the same rows: the accuracy difference a - b, its 95 % interval, and McNemar's exact p.

    Only rows on which the models disagree count: under H0 each is a fair coin. The interval is Wald's for
    paired proportions.
    """
    wins = sum(x and not y for x, y in zip(a, b, strict=True))
    losses = sum(y and not x for x, y in zip(a, b, strict=True))
    n = len(a)
    disagreements = wins + losses

    tail = sum(math.comb(disagreements, k) for k in range(min(wins, losses) + 1)) / 2**disagreements
    difference = (wins - losses) / n
    half = Z95 * math.sqrt(max(disagreements - (wins - losses) ** 2 / n, 0)) / n
    return {
        "difference": difference,
        "interval": [difference - half, difference + half],
        "p": min(1.0, 2 * tail),
    }


def kappa(a: Sequence[bool], b: Sequence[bool]) -> float | None:
    """Cohen's kappa of two raters: (agreement - chance) / (1 - chance). None: both always say one thing."""
    n = len(a)
    agreement = sum(x == y for x, y in zip(a, b, strict=True)) / n
    both_yes = sum(a) * sum(b) / n**2
    both_no = (n - sum(a)) * (n - sum(b)) / n**2
    chance = both_yes + both_no
    if chance == 1:
        return None
    return (agreement - chance) / (1 - chance)
