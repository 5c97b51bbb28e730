"""Paired comparisons of two arms: speed-ups with their factors, and quality with what could have been detected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from harness.evidence import bootstrap
from harness.evidence.inference import detectable
from harness.evidence.records import Record

KEYS = ("delta", "ci95", "se", "clusters", "changed", "mdd")
"""Of every difference in summary.json; `changed` counts the clusters in which any example differs."""

_SAME = 1e-9


def speedup(
    rows: Sequence[Record], base: Sequence[Record], *, resamples: int = bootstrap.RESAMPLES, seed: int = 0
) -> dict[str, Any] | None:
    """Ratio of pooled decode throughputs (tokens per second) with its 95% interval; null without either arm.

    `tokens_per_step` and `steps_per_second` are the ratios of its two factors: their product is the speed-up.
    """
    if not rows or not base:
        return None
    groups = timed_together(rows)

    def ratio(above: str, below: str) -> tuple[float | None, list[float] | None]:
        columns = [[getattr(row, name) for row in pair for name in (above, below)] for pair in paired]
        return _ratio(np.array(columns, dtype=np.float64), groups, resamples, seed)

    paired = list(zip(rows, base, strict=True))
    value, bounds = ratio("tokens", "seconds")
    result: dict[str, Any] = {"speedup": value, "ci95": bounds}
    for name, above, below in (("tokens_per_step", "tokens", "steps"), ("steps_per_second", "steps", "seconds")):
        factor, around = ratio(above, below)
        result[name] = {"ratio": factor, "ci95": around}
    return result


def _ratio(
    columns: bootstrap.Floats, groups: list[str], resamples: int, seed: int
) -> tuple[float | None, list[float] | None]:
    totals = bootstrap.cluster_totals(columns, groups)
    value = float(bootstrap.ratio_of_rates(totals.sum(axis=0)))
    if not np.isfinite(value):
        return None, None
    bounds = bootstrap.interval(totals, bootstrap.ratio_of_rates, resamples=resamples, seed=seed)
    return value, list(bounds) if bounds else None


def timed_together(rows: Sequence[Record]) -> list[str]:
    """A label per record: records of one cluster or of one wave, linked directly or through others, have the same."""
    label = {row.group: row.group for row in rows}

    def of(group: str) -> str:
        while label[group] != group:
            group = label[group]
        return group

    first: dict[str, str] = {}
    for row in rows:
        if row.wave:
            label[of(row.group)] = of(first.setdefault(row.wave, row.group))
    return [of(row.group) for row in rows]


def quality_delta(
    rows: Sequence[Record], base: Sequence[Record], metric: str, *, resamples: int = bootstrap.RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Mean paired difference in points as a mapping of KEYS; nulls without either arm.

    With one cluster the difference has no interval, standard error or detectable difference.
    """
    pairs = list(zip(rows, base, strict=True)) if rows and base else []
    columns = [[a.grade[metric] - b.grade[metric], 1.0] for a, b in pairs]
    return difference(columns, [a.group for a, _ in pairs], resamples=resamples, seed=seed, bounded=True)


def reference_block(rows: Sequence[Record]) -> dict[str, float] | None:
    """Mean log-probability of the reference under one arm in nats per token, pooled over tokens; null without any."""
    known = [row.reference for row in rows if row.reference.get("tokens")]
    tokens = sum(found["tokens"] for found in known)
    return {"logprob": sum(found["logprob"] for found in known) / tokens, "tokens": tokens} if known else None


def reference_delta(
    rows: Sequence[Record], base: Sequence[Record], *, resamples: int = bootstrap.RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Difference of `reference_block` in nats per token as a mapping of KEYS, over the examples that both arms scored.

    Raises:
        ValueError: the arms scored different numbers of tokens of one example.
    """
    pairs = list(zip(rows, base, strict=True)) if rows and base else []
    pairs = [(a, b) for a, b in pairs if a.reference.get("tokens") and b.reference.get("tokens")]
    for a, b in pairs:
        if a.reference["tokens"] != b.reference["tokens"]:
            raise ValueError(f"example {a.example_id!r}: {a.arm} and {b.arm} scored references of different lengths")
    columns = [[a.reference["logprob"] - b.reference["logprob"], a.reference["tokens"]] for a, b in pairs]
    return difference(columns, [a.group for a, _ in pairs], resamples=resamples, seed=seed, bounded=False)


def difference(
    columns: Sequence[Sequence[float]],
    clusters: list[str],
    *,
    bounded: bool,
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """A mapping of KEYS from paired examples; nulls without any.

    Args:
        columns: [examples, 2], the summed difference of an example and its weight: 1, or its tokens.
        clusters: the name of each example's cluster.
        bounded: whether it is in points, which change by 100 at most.
    """
    if not columns:
        return dict.fromkeys(KEYS)
    table = np.array([[*row, abs(row[0]) > _SAME] for row in columns], dtype=np.float64)
    totals = bootstrap.cluster_totals(table, clusters)
    value = float(bootstrap.mean_difference(totals.sum(axis=0)))
    bounds = bootstrap.interval(totals[:, :2], bootstrap.mean_difference, resamples=resamples, seed=seed)
    se, count, changed = bootstrap.standard_error(totals), len(totals), int(np.sum(totals[:, 2] > 0))
    worth = bootstrap.effective(totals[:, 1])
    return {
        "delta": value,
        "ci95": _widened(value, bounds, se, worth),
        "se": se,
        "clusters": count,
        "changed": changed,
        "mdd": detectable(se, count, changed, bounded=bounded, effective=worth),
    }


def _widened(value: float, bounds: bootstrap.Interval | None, se: float | None, clusters: int) -> list[float] | None:
    """BCa bounds, moved out to those of Student's t where they lie further in.

    Most differences of outputs are zero and a few are large: from a few dozen such values BCa estimates a skew that is
    not there, and excludes zero without cause in 7 to 8% of the cases.
    """
    if bounds is None or se is None:
        return None
    reach = bootstrap.t_quantile(0.975, clusters - 1) * se
    return [min(bounds[0], value - reach), max(bounds[1], value + reach)]
