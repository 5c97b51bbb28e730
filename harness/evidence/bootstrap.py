"""Paired, clustered bootstrap intervals for statistics of totals.

Every statistic here is a function of column totals over clusters (tokens and seconds of two arms, or summed differences
and a count), so a resample is one row of multinomial counts times the table of cluster totals.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
Interval = tuple[float, float]

RESAMPLES = 4000
_NORMAL = NormalDist()


def ratio_of_rates(totals: Floats) -> Floats:
    """[..., 4] totals (tokens, seconds, baseline tokens, baseline seconds) -> [...] ratio of the two throughputs."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (totals[..., 0] / totals[..., 1]) / (totals[..., 2] / totals[..., 3])


def mean_difference(totals: Floats) -> Floats:
    """[..., 2] totals (summed differences, examples) -> [...] mean difference."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return totals[..., 0] / totals[..., 1]


def cluster_totals(columns: Floats, clusters: list[str]) -> Floats:
    """Sum rows [examples, columns] by cluster name -> [clusters, columns], in the order of first appearance."""
    place = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
    totals = np.zeros((len(place), columns.shape[1]))
    np.add.at(totals, [place[name] for name in clusters], columns)
    return totals


def interval(
    totals: Floats, statistic: Statistic, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval | None:
    """Two-sided BCa interval, widened for few clusters; percentile where the correction is degenerate.

    BCa after Efron (1987), the acceleration from the jackknife over clusters. A bootstrap of n clusters is too narrow
    by about sqrt((n - 1) / n) and by normal instead of t quantiles; the nominal tails are widened for that, as
    Hesterberg (2015, "What teachers should know about the bootstrap") does for percentile intervals, with n the
    `effective` number of clusters.

    Args:
        totals: [clusters, columns], the last of them a cluster's weight: a count, tokens or seconds.
        statistic: maps [..., columns] to [...].
    Returns:
        (low, high), or None with fewer than two clusters or where the statistic is undefined.
    """
    count = len(totals)
    if count < 2:
        return None
    observed = float(statistic(totals.sum(axis=0)))
    draws = _resampled(totals, statistic, resamples, seed)
    if not np.isfinite(observed) or len(draws) < resamples // 2:
        return None
    low, high = _tails(level, effective(totals[:, -1]))
    corrected = _bca_tails(totals, statistic, observed, draws, low, high)
    bounds = np.quantile(draws, corrected if corrected is not None else (low, high))
    return float(bounds[0]), float(bounds[1])


def effective(weights: Floats) -> int:
    """How many clusters of equal weight are worth as much as these, at least 2: (sum w)^2 / sum w^2, rounded.

    After Carter, Schnepel and Steigerwald (2017): a few large clusters among many small ones are few clusters.
    """
    squares = float(np.sum(weights**2))
    return max(2, round(float(weights.sum()) ** 2 / squares)) if squares > 0 else len(weights)


def _resampled(totals: Floats, statistic: Statistic, resamples: int, seed: int) -> Floats:
    """[resamples] values of the statistic; resamples where it is undefined are left out."""
    count = len(totals)
    rng = np.random.default_rng(seed)
    chunk = max(1, min(resamples, 2_000_000 // count))
    parts = []
    for start in range(0, resamples, chunk):
        weights = rng.multinomial(count, np.full(count, 1.0 / count), size=min(chunk, resamples - start))
        parts.append(statistic(weights @ totals))
    values = np.concatenate(parts)
    return values[np.isfinite(values)]


def _bca_tails(
    totals: Floats, statistic: Statistic, observed: float, draws: Floats, low: float, high: float
) -> tuple[float, float] | None:
    """Bias- and skew-corrected tail probabilities, or None where they are undefined."""
    below = float(np.mean(draws < observed) + 0.5 * np.mean(draws == observed))
    left_out = statistic(totals.sum(axis=0) - totals)
    if not 0.0 < below < 1.0 or not np.all(np.isfinite(left_out)):
        return None
    spread = left_out.mean() - left_out
    scale = float(np.sum(spread**2)) ** 1.5
    if scale <= 1e-300:
        return None
    skew = float(np.sum(spread**3)) / (6.0 * scale)
    bias = _NORMAL.inv_cdf(below)
    corrected = []
    for tail in (low, high):
        shifted = bias + _NORMAL.inv_cdf(tail)
        if skew * shifted >= 1.0:
            return None
        corrected.append(_NORMAL.cdf(bias + shifted / (1.0 - skew * shifted)))
    return corrected[0], corrected[1]


@lru_cache(maxsize=256)
def _tails(level: float, count: int) -> tuple[float, float]:
    """Nominal tail probabilities for `count` clusters, kept inside what a float can invert."""
    widened = -float(np.sqrt(count / (count - 1))) * t_quantile(0.5 + level / 2, count - 1)
    low = min(max(_NORMAL.cdf(widened), 1e-9), 0.5)
    return low, 1.0 - low


def standard_error(totals: Floats) -> float | None:
    """Cluster-robust standard error of the ratio of the first two column totals; None with fewer than two clusters.

    Linearised: each cluster's residual is its first column less the ratio times its second; n / (n - 1) for n clusters.
    """
    count = len(totals)
    if count < 2:
        return None
    above, below = totals[:, 0].sum(), totals[:, 1].sum()
    residuals = totals[:, 0] - above / below * totals[:, 1]
    return float(np.sqrt(count / (count - 1) * np.sum(residuals**2)) / abs(below))


@lru_cache(maxsize=1024)
def t_quantile(probability: float, degrees: int) -> float:
    """Quantile (probability of at least one half) of Student's t."""
    theta, area = _t_areas(degrees)
    return float(np.sqrt(degrees) * np.tan(np.interp(2 * probability - 1, area, theta)))


def t_tail(value: float, degrees: int) -> float:
    """Probability that Student's t exceeds `value`."""
    theta, area = _t_areas(degrees)
    inner = float(np.interp(np.arctan(abs(value) / np.sqrt(degrees)), theta, area))
    return (1.0 - inner) / 2 if value >= 0 else (1.0 + inner) / 2


@lru_cache(maxsize=256)
def _t_areas(degrees: int) -> tuple[Floats, Floats]:
    """Angles atan(x / sqrt(degrees)) from 0 to pi / 2, and the probability that |t| is below each of them."""
    theta = np.linspace(0.0, np.pi / 2, 20001)
    density = np.cos(theta) ** (degrees - 1)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return theta, area / area[-1]
