"""What differences can and cannot show: detectable size, p-values, correction over many settings, verdicts.

Two claims can be made about a setting, and each is a test of its own. "Loss" rejects that there is no difference. "No
loss above a margin" must not be read off from the failure to find one, which few examples make easy and a correction
for many settings makes easier still: it rejects that the loss is the margin or more (non-inferiority). Holm's method
corrects each of the two over all settings of one task, data, model and device, so that the chance of any false claim of
that kind among them is 5% at most. A setting for which neither can be claimed is undecided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from harness.evidence import bootstrap
from harness.evidence.rows import Difference, Row

Quantity = Literal["quality", "reference"]
Kind = Literal["loss", "no loss", "undecided"]

ALPHA = 0.05
POWER = 0.8
MARGINS: dict[Quantity, float] = {"quality": 1.0, "reference": 0.02}
"""Losses that would matter: points of a task's first metric, and nats per reference token."""

POINTS = 100.0
"""The most that a metric in points can change on one example."""

NO_SPREAD = 1e-12


def detectable(
    se: float | None, clusters: int, changed: int, *, bounded: bool, effective: int | None = None
) -> float | None:
    """Smallest true difference that a two-sided test at 5% finds with 80% power: (t_0.975 + t_0.80) standard errors.

    With a difference in fewer than two clusters, or the same one in all, the standard error says nothing. A metric in
    points then has the largest mean change that so few changes still cannot exclude, 100 * (1 - 0.05 ** (1 / n)) where
    none of n clusters changed; an unbounded one has None, as has everything with fewer than two clusters. `effective`
    clusters of equal weight are worth as much as these, where weights differ.
    """
    if se is None or clusters < 2:
        return None
    if changed >= 2 and se > NO_SPREAD:
        degrees = (effective or clusters) - 1
        quantiles = (bootstrap.t_quantile(tail, degrees) for tail in (1 - ALPHA / 2, POWER))
        return se * sum(quantiles)
    return POINTS * unseen(_few(changed), clusters) if bounded else None


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


def _few(changed: int) -> int:
    """0 or 1 as they are; where all changed by the same, none differs from the rest."""
    return changed if changed < 2 else 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What may be claimed about one setting among its family, with the corrected p-values of both tests.

    `within` holds where a loss of `margin` or more is excluded; a loss can be real and within the margin.
    """

    kind: Kind
    margin: float
    within: bool
    p_loss: float
    p_margin: float

    def __str__(self) -> str:
        if self.kind == "loss" and self.within:
            return f"loss < {self.margin:g}"
        return f"no loss > {self.margin:g}" if self.kind == "no loss" else self.kind


def verdicts(
    rows: Sequence[Row], quantity: Quantity, margin: float | None = None, alpha: float = ALPHA
) -> dict[str, Verdict]:
    """A verdict by fingerprint for each run whose sparse arm was compared with its dense arm.

    A family are the runs of one task, data, model and device. Runs without sparsity, with forced acceptance, that were
    stopped early, or stored before standard errors were, make no claim and have none.

    Args:
        margin: the least loss that would matter, above 0; MARGINS when left out.
        alpha: bound on the chance of any false claim of a kind in a family.
    """
    limit = MARGINS[quantity] if margin is None else margin
    families: dict[tuple[str, str, str, str], list[tuple[str, Difference]]] = {}
    for row in rows:
        found = row.delta if quantity == "quality" else row.reference_delta
        measured = found.value is not None and found.clusters is not None
        if row.status == "ok" and row.axes and not row.forced and measured:
            family = families.setdefault((row.task, row.data, row.model, row.device), [])
            family.append((row.fingerprint, found))
    told = {}
    for family in families.values():
        losses = holm([p_loss(found) for _, found in family])
        margins = holm([p_of(found, limit) for _, found in family])
        for (name, _), lost, kept in zip(family, losses, margins, strict=True):
            kind: Kind = "loss" if lost <= alpha else "no loss" if kept <= alpha else "undecided"
            told[name] = Verdict(kind, limit, kept <= alpha, lost, kept)
    return told


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) corrected p-values, in the order given; valid whatever the dependence of the tests."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def p_loss(difference: Difference) -> float:
    """Two-sided p-value of no difference; 1 for a gain, and where the spread says nothing (see `detectable`)."""
    value = difference.value
    if value is None or value >= 0 or not _spread(difference):
        return 1.0
    return min(1.0, 2 * _tail(difference, -value, upper=True))


def p_of(difference: Difference, margin: float) -> float:
    """P-value of a loss of `margin` or more, at the level of the two-sided interval: up to 5%, the interval is above.

    Where fewer than two clusters changed it is the chance of so few changes if the loss were `margin`: each changes by
    100 points at most, so that at least a share of margin / 100 would have to. At 5% that is the bound of `detectable`.
    """
    value, clusters = difference.value, difference.clusters
    if value is None or clusters is None or clusters < 2 or difference.mdd is None:
        return 1.0
    if _spread(difference):
        return min(1.0, 2 * _tail(difference, value + margin, upper=False)) if value > -margin else 1.0
    changed = difference.changed or 0
    lost = margin + (min(value, 0.0) if changed >= 2 else 0.0)
    return seen(_few(changed), clusters, min(lost / POINTS, 1.0)) if lost > 0 else 1.0


def _spread(difference: Difference) -> bool:
    return (difference.changed or 0) >= 2 and (difference.se or 0.0) > NO_SPREAD


def _tail(difference: Difference, distance: float, *, upper: bool) -> float:
    """Tail of Student's t beyond a distance above 0, on one side of the difference.

    In units that give the end of the interval its own probability, so that test and interval agree. Where that side is
    the longer one, rare large changes skew it, and its quantiles grow as z / (1 - a * z) as those of the BCa interval
    do, with the `a` that makes this side as much longer as it is.
    """
    degrees = (difference.clusters or 2) - 1
    point = bootstrap.t_quantile(1 - ALPHA / 2, degrees)
    value, unit, skew = difference.value or 0.0, difference.se or 0.0, 0.0
    if difference.ci is not None:
        sides = (value - difference.ci[0], difference.ci[1] - value)
        own, other = sides[::-1] if upper else sides
        skew = max(0.0, (own - other) / (own + other)) / point
        unit = max(unit, own * (1 - skew * point) / point)
    return bootstrap.t_tail(distance / (unit + skew * distance), degrees)
