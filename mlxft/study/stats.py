"""How sure a figure is: standard errors clustered by row, and a paired bootstrap of differences. Pure numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
RESAMPLES = 9999
_CHUNK = 1 << 22  # indices drawn at one time


class Figure(NamedTuple):
    """A mean over `n` rows and its standard error, NaN where one row leaves it unknown."""

    value: float
    se: float
    n: int


class Interval(NamedTuple):
    """A difference and the interval around it that holds the true one with the wanted confidence."""

    difference: float
    low: float
    high: float


def mean(values: Sequence[float] | Floats, weights: Sequence[float] | Floats | None = None) -> Figure:
    """A (weighted) mean, with its standard error clustered by row.

    Args:
        values: (n,) a row's own mean.
        weights: (n,) what it counts, such as its tokens; by default each row counts 1, and the error is the usual one,
            the sample's standard deviation over the root of n. With weights it is that of a ratio of two sums over
            rows (Cochran 1977, 6.3): tokens of one row depend on each other, rows do not.
    """
    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    n, total = len(x), float(w.sum())
    value = float((w * x).sum() / total)
    if n < 2:
        return Figure(value, math.nan, n)
    squares = float(((w * (x - value)) ** 2).sum())
    return Figure(value, math.sqrt(squares * n / (n - 1)) / total, n)


def bootstrap(
    a: Sequence[float] | Floats,
    b: Sequence[float] | Floats,
    weights: Sequence[float] | Floats | None = None,
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """The (weighted) mean of `a - b`, with its BCa bootstrap interval (Efron 1987) over rows.

    A row's two values stay together, so what rows have in common drops out. Draws and interval are those of
    scipy.stats.bootstrap with method="BCa" and the same seed.

    Args:
        a, b: (n,) values of the same rows.
        weights: (n,) what a row counts; by default 1.
    """
    d = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    w = np.ones_like(d) if weights is None else np.asarray(weights, dtype=np.float64)
    sums, n = w * d, len(d)
    value = float(sums.sum() / w.sum())
    if n < 2:
        return Interval(value, math.nan, math.nan)
    if np.ptp(d) == 0:  # every resample is the same
        return Interval(value, value, value)
    rng, found = np.random.default_rng(seed), []
    step = max(1, _CHUNK // n)
    for start in range(0, resamples, step):
        at = rng.integers(0, n, (min(step, resamples - start), n))
        found.append(sums[at].sum(axis=1) / w[at].sum(axis=1))
    means = np.concatenate(found)
    # A row left out at a time: how the mean's spread depends on the mean itself.
    left = (sums.sum() - sums) / (w.sum() - w)
    low, high = np.quantile(means, _bca(means, value, left, confidence))
    return Interval(value, float(low), float(high))


def _bca(means: Floats, value: float, left: Floats, confidence: float) -> tuple[float, float]:
    """The two quantiles of the resampled means that bound the interval: corrected for bias and for acceleration."""
    normal, count = NormalDist(), len(means)
    # Half of the ties count: scores of 0 and 1 have many.
    share = float((means < value).sum() + (means <= value).sum()) / (2 * count)
    alpha = (1 - confidence) / 2
    if not 0 < share < 1:  # the value lies outside of all resamples: nothing to correct by
        return alpha, 1 - alpha
    bias = normal.inv_cdf(share)
    apart = left.mean() - left
    squares = float((apart**2).sum())
    # Each difference is a row's, so the sum of their cubes over the root of their squares' cube is of order n ** -0.5.
    acceleration = float((apart**3).sum()) / (6 * squares**1.5) if squares else 0.0
    ends = []
    for z in (normal.inv_cdf(alpha), normal.inv_cdf(1 - alpha)):
        ends.append(normal.cdf(bias + (bias + z) / (1 - acceleration * (bias + z))))
    return ends[0], ends[1]
