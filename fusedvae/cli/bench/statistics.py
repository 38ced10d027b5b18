"""What a set of timings says: medians, quartiles, and how sure a ratio is.

Medians, because the times of a program have a long tail to one side. Intervals by the bootstrap (Efron & Tibshirani
1993, percentile method), because the distribution of a ratio of medians has no simple form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


class Summary(NamedTuple):
    """The middle of some times, and of their lower and upper half."""

    median: float
    q1: float
    q3: float

    @property
    def spread(self) -> float:
        """The distance between the quartiles, as a part of the median."""
        return (self.q3 - self.q1) / self.median


class Estimate(NamedTuple):
    """A value and the interval in which it lies with a probability of 95 %."""

    value: float
    low: float
    high: float


def summary(times: Sequence[float]) -> Summary:
    q1, median, q3 = np.quantile(np.asarray(times, dtype=np.float64), [0.25, 0.5, 0.75])
    return Summary(float(median), float(q1), float(q3))


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Estimate:
    """The ratio of two medians, of times taken in the same rounds: rounds are drawn again, in pairs."""
    top, bottom = (np.asarray(times, dtype=np.float64) for times in (numerator, denominator))
    if top.shape != bottom.shape:
        raise ValueError(f"denominator: expected times of {len(top)} rounds, got {len(bottom)}")
    rounds = _draws(len(top))
    ratios = np.median(top[rounds], axis=1) / np.median(bottom[rounds], axis=1)
    return _estimate(float(np.median(top) / np.median(bottom)), ratios)


def change(
    old: Sequence[float],
    new: Sequence[float],
    old_controls: Sequence[Sequence[float]],
    new_controls: Sequence[Sequence[float]],
) -> Estimate:
    """How many times as long something takes than it took, once the change of the machine itself is taken out.

    The machine's change is the geometric mean of that of the controls: work that is the same now as before, and was
    timed in the same rounds. Without controls the machine counts as unchanged.
    """
    old_rounds, new_rounds = _draws(len(old)), _draws(len(new))

    def logarithm(times: Sequence[float], rounds: np.ndarray) -> np.ndarray:
        """Of the median: first the one observed, then those of the resamples."""
        values = np.asarray(times, dtype=np.float64)
        return np.log(np.concatenate([[np.median(values)], np.median(values[rounds], axis=1)]))

    changes = logarithm(new, new_rounds) - logarithm(old, old_rounds)
    drifts = [
        logarithm(after, new_rounds) - logarithm(before, old_rounds)
        for before, after in zip(old_controls, new_controls, strict=True)
    ]
    if drifts:
        changes = changes - np.mean(drifts, axis=0)
    changes = np.exp(changes)
    return _estimate(float(changes[0]), changes[1:])


def _draws(rounds: int) -> np.ndarray:
    """The rounds of each resample. The seed is fixed: the same times have the same interval."""
    return np.random.default_rng(0).integers(0, rounds, (RESAMPLES, rounds))


def _estimate(value: float, resampled: np.ndarray) -> Estimate:
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    # The bootstrap's quantiles of few rounds may leave out the very value observed.
    return Estimate(value, min(float(low), value), max(float(high), value))
