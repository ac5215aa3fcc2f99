"""Two models on the same questions: shares, errors and intervals, and a test of the difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959964  # standard errors on each side of a 95 % confidence interval
RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A figure and the limits of its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Share of right answers of one model beside the base model's.

    Attributes:
        share, share_se: share of right answers, and its standard error
        base, base_se: the same for the base model
        only_base, only_this: questions that only one of the two models got right
        p_value: McNemar's exact test, two-sided: probability of a split as uneven by chance
        loss, loss_se: base - share, and its standard error from the paired answers
    """

    share: float
    share_se: float
    base: float
    base_se: float
    only_base: int
    only_this: int
    p_value: float
    loss: float
    loss_se: float

    @classmethod
    def of(cls, right: Sequence[bool], base_right: Sequence[bool]) -> Comparison:
        """Comparison from the marks of both models, question by question."""
        n = len(right)
        share, base = sum(right) / n, sum(base_right) / n
        only_base = sum(b and not a for a, b in zip(right, base_right, strict=True))
        only_this = sum(a and not b for a, b in zip(right, base_right, strict=True))
        return cls(
            share,
            standard_error(share, n),
            base,
            standard_error(base, n),
            only_base,
            only_this,
            mcnemar(only_base, only_this),
            base - share,
            math.sqrt(((only_base + only_this) / n - (base - share) ** 2) / max(n - 1, 1)),
        )


@dataclass(frozen=True)
class MeanLoss:
    """Mean over tasks of the accuracy lost against the base model, as a share.

    Attributes:
        tasks: number of tasks, each with the same weight
        loss: the mean
        low, high: its 95 % confidence interval, from the standard errors of the tasks
    """

    tasks: int
    loss: float
    low: float
    high: float

    @classmethod
    def of(cls, comparisons: Sequence[Comparison]) -> MeanLoss:
        """Mean of one comparison per task."""
        n = len(comparisons)
        loss = sum(c.loss for c in comparisons) / n
        margin = 1.96 * math.sqrt(sum(c.loss_se**2 for c in comparisons)) / n
        return cls(n, loss, loss - margin, loss + margin)


def standard_error(share: float, count: int) -> float:
    """Standard error of a share among `count` independent answers."""
    return math.sqrt(share * (1 - share) / max(count - 1, 1))


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of a split, if each of its questions were a fair coin toss."""
    n = only_first + only_second
    tail = sum(math.comb(n, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / (1 << n))


def share(marks: Sequence[bool]) -> Estimate:
    """Share of the marks that are true, with Wilson's score interval."""
    n, found = len(marks), sum(marks) / len(marks)
    centre = (found + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(found * (1 - found) / n + Z95**2 / (4 * n**2))
    return Estimate(found, max(centre - half, 0.0), min(centre + half, 1.0))


def share_difference(marks: Sequence[bool], others: Sequence[bool]) -> Estimate:
    """Share of `marks` less that of `others`, paired.

    The interval is Newcombe's (1998, method 10): Wilson's limits of both shares, combined by the
    correlation of the pairs. It keeps its width if the pairs hardly differ.
    """
    n, first, second = len(marks), share(marks), share(others)
    both = sum(a and b for a, b in zip(marks, others, strict=True))
    neither = n - sum(a or b for a, b in zip(marks, others))
    only_first, only_second = sum(marks) - both, sum(others) - both
    excess = both * neither - only_first * only_second
    if excess > 0:
        excess = max(excess - n / 2, 0)
    scale = math.sqrt(math.prod((sum(marks), n - sum(marks), sum(others), n - sum(others))))
    phi = excess / scale if scale else 0.0

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    found = first.value - second.value
    below = distance(first.value - first.low, second.high - second.value)
    above = distance(first.high - first.value, second.value - second.low)
    return Estimate(found, found - below, found + above)


def mean(values: Sequence[float]) -> Estimate:
    """Mean of the values, with the percentile interval of a bootstrap; its seed is fixed."""
    import numpy

    given = numpy.asarray(values, dtype=float)
    drawn = numpy.random.default_rng(0).integers(len(given), size=(RESAMPLES, len(given)))
    low, high = numpy.quantile(given[drawn].mean(axis=1), (0.025, 0.975))
    return Estimate(float(given.mean()), float(low), float(high))
