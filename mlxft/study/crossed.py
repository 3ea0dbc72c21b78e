"""A mean over rows and seeds, and how sure it is when both were drawn: a few of many rows, a few of many seeds."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from mlxft.study.stats import Floats


class Estimate(NamedTuple):
    """A mean, its standard error, and the interval that holds the true one with the wanted confidence; NaN: unknown."""

    value: float
    se: float
    low: float
    high: float


def crossed(scores: Floats, confidence: float = 0.95, bounds: tuple[float, float] | None = None) -> Estimate:
    """The mean of scores in which every seed meets every row.

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
    # Mean squares of rows and of seeds; where the seeds differ by no more than chance, rows are all there is.
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
    """The quantile of Student's t, for shares above one half and at least one degree of freedom."""
    # With t = tan(angle) * root of df the density is a power of a cosine, smooth over a finite interval.
    angles = np.linspace(0.0, math.pi / 2, 20001)
    density = np.cos(angles) ** (df - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = float(np.interp(2 * share - 1, mass / mass[-1], angles))
    return math.tan(angle) * math.sqrt(df)
