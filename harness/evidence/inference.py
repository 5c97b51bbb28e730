"""What differences can and cannot show: detectable size, p-values, correction over many settings, verdicts."""

from __future__ import annotations

from harness.evidence import bootstrap

ALPHA = 0.05
POWER = 0.8
POINTS = 100.0
"""The most that a metric in points can change on one example."""

NO_SPREAD = 1e-12


def detectable(se: float | None, clusters: int, changed: int, *, bounded: bool) -> float | None:
    """Smallest true difference that a two-sided test at 5% finds with 80% power: (t_0.975 + t_0.80) standard errors.

    With a difference in fewer than two clusters, or the same one in all, the standard error says nothing. A metric in
    points then has the largest mean change that so few changes still cannot exclude, 100 * (1 - 0.05 ** (1 / n)) where
    none of n clusters changed; an unbounded one has None, as has everything with fewer than two clusters.
    """
    if se is None or clusters < 2:
        return None
    if changed >= 2 and se > NO_SPREAD:
        quantiles = (bootstrap.t_quantile(tail, clusters - 1) for tail in (1 - ALPHA / 2, POWER))
        return se * sum(quantiles)
    return POINTS * unseen(min(changed, 1), clusters) if bounded else None


def unseen(changed: int, clusters: int) -> float:
    """Largest share of changing clusters of which so few (0 or 1) of `clusters` are seen with a probability of 5%."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if seen(changed, clusters, middle) > ALPHA else (low, middle)
    return high


def seen(changed: int, clusters: int, share: float) -> float:
    """Probability that at most `changed` (0 or 1) of `clusters` change where each does with a chance of `share`."""
    none = (1 - share) ** clusters
    return none + changed * clusters * share * (1 - share) ** (clusters - 1)
