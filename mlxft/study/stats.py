"""Statistics: bootstrap intervals, paired tests, and crossed designs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats64 = npt.NDArray[np.float64]
RESAMPLES = 9999
_CHUNK = 1 << 22  # indices that are drawn at once


class Figure(NamedTuple):
    """A mean over `n` rows and its standard error, NaN for a single row."""

    value: float
    se: float
    n: int


class Interval(NamedTuple):
    """A difference and its confidence interval."""

    difference: float
    low: float
    high: float


def mean(values: Sequence[float] | Floats64, weights: Sequence[float] | Floats64 | None = None) -> Figure:
    """Return a (weighted) mean with its standard error, clustered by row.

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


def wilson(share: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of a share of n trials (Wilson 1927), which is right for few of them, too."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return max(0.0, low), min(1.0, high)


def bootstrap(
    a: Sequence[float] | Floats64,
    b: Sequence[float] | Floats64,
    weights: Sequence[float] | Floats64 | None = None,
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """Return the (weighted) mean of `a - b` with its BCa bootstrap interval (Efron 1987) over rows.

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
    # The jackknife: how the mean's spread depends on the mean.
    left = (sums.sum() - sums) / (w.sum() - w)
    low, high = np.quantile(means, _bca(means, value, left, confidence))
    return Interval(value, float(low), float(high))


def _bca(means: Floats64, value: float, left: Floats64, confidence: float) -> tuple[float, float]:
    """Return the quantiles of the resampled means that bound the interval, corrected for bias and acceleration."""
    normal, count = NormalDist(), len(means)
    # Ties count half: scores of 0 and 1 have many.
    share = float((means < value).sum() + (means <= value).sum()) / (2 * count)
    alpha = (1 - confidence) / 2
    if not 0 < share < 1:  # the value is outside all resamples: no correction
        return alpha, 1 - alpha
    bias = normal.inv_cdf(share)
    apart = left.mean() - left
    squares = float((apart**2).sum())
    # Each difference is a row's, so the sum of their cubes over the root of their squares' cube is of order n ** -0.5.
    acceleration = float((apart**3).sum()) / (6 * squares**1.5) if squares else 0.0
    shifted = (bias + normal.inv_cdf(alpha), bias + normal.inv_cdf(1 - alpha))
    low, high = (normal.cdf(bias + z / (1 - acceleration * z)) for z in shifted)
    return low, high


# --- crossed ----------------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A mean, its standard error and its confidence interval; NaN: unknown."""

    value: float
    se: float
    low: float
    high: float


def crossed(scores: Floats64, confidence: float = 0.95, bounds: tuple[float, float] | None = None) -> Estimate:
    """Return the mean of scores where every seed has every row.

    The variance of the mean is that of two crossed random effects (Searle, Casella and McCulloch 1992, 4.4): rows and
    seeds each bring their own, and what is left is spread over both. Degrees of freedom are Satterthwaite's.

    Args:
        scores: (S, N), a score for each of N rows by each of S seeds.
        bounds: that scores have, which the interval keeps to.
    """
    seeds, rows = scores.shape
    value = float(scores.mean())
    if rows < 2:
        return Estimate(value, math.nan, math.nan, math.nan)
    by_row, by_seed = scores.mean(axis=0), scores.mean(axis=1)
    # Mean squares of rows and seeds; where seeds differ by chance only, rows are the only source of variance.
    of_rows, df = seeds * float(by_row.var(ddof=1)), float(rows - 1)
    total = of_rows
    if seeds > 1:
        rest = scores - by_row - by_seed[:, None] + value
        left = float((rest**2).sum()) / ((seeds - 1) * (rows - 1))
        of_seeds = rows * float(by_seed.var(ddof=1))
        if of_seeds > left:
            total = of_rows + of_seeds - left
            parts = of_rows**2 / (rows - 1) + of_seeds**2 / (seeds - 1) + left**2 / ((seeds - 1) * (rows - 1))
            df = total**2 / parts
    se = math.sqrt(total / (seeds * rows))
    half = t_quantile((1 + confidence) / 2, max(1.0, df)) * se
    low, high = bounds or (-math.inf, math.inf)
    return Estimate(value, se, max(low, value - half), min(high, value + half))


def t_quantile(share: float, df: float) -> float:
    """Return a quantile of Student's t, for shares above one half and at least one degree of freedom."""
    # With t = tan(angle) * root of df the density is a power of a cosine, smooth over a finite interval.
    angles = np.linspace(0.0, math.pi / 2, 20001)
    density = np.cos(angles) ** (df - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = float(np.interp(2 * share - 1, mass / mass[-1], angles))
    return math.tan(angle) * math.sqrt(df)
