"""What the sparse arm chose and how close it stayed to dense: the summary's `trace` and `fidelity` blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.evidence import bootstrap
from harness.evidence.records import Record

MEANS = {"overlap": "overlap_pairs", "recall": "observed", "oracle_recall": "observed", "similarity": "steps"}
"""What is averaged over examples, and the count that weighs it."""


def fidelity_block(rows: Sequence[Record], *, resamples: int = bootstrap.RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """Agreement with dense on its own trajectory, teacher forced, pooled over tokens (METHOD section 8).

    Returns:
        `agreement` (share of tokens whose most probable token is the dense one) with `agreement_ci95`, `kl` (nats per
        token), `accept_flips` (share of steps whose draft would have been accepted to another length; null unless
        acceptance is greedy), `tokens`;
        nulls where nothing was replayed.
    """
    known = [row for row in rows if row.fidelity.get("tokens")]
    counted = all(row.fidelity["flips"] is not None for row in known)
    if not known:
        return dict.fromkeys(("agreement", "agreement_ci95", "kl", "accept_flips", "tokens"))
    columns = np.array([[row.fidelity["agreeing"], row.fidelity["tokens"]] for row in known], dtype=np.float64)
    totals = bootstrap.cluster_totals(columns, [row.group for row in known])
    bounds = bootstrap.interval(totals, bootstrap.mean_difference, resamples=resamples, seed=seed)
    sums = {
        name: sum(row.fidelity[name] or 0 for row in known) for name in ("tokens", "agreeing", "kl", "steps", "flips")
    }
    return {
        "agreement": sums["agreeing"] / sums["tokens"],
        "agreement_ci95": list(bounds) if bounds else None,
        "kl": sums["kl"] / sums["tokens"],
        "accept_flips": sums["flips"] / sums["steps"] if counted else None,
        "tokens": sums["tokens"],
    }


def trace_block(rows: Sequence[Record]) -> dict[str, Any]:
    """What one arm read and chose, means over its steps (METHOD sections 2 to 5).

    Returns:
        `layer_density` {axis: [layers]}; `unique_experts` per step, [MoE layers]; `pairs` and `stale` as counts;
        `reuse` {counter: calls}; and of the observed steps `overlap` [layers][distances], `recall` and
        `oracle_recall` [layers], `similarity` [layers][layers]. Null or empty where nothing was recorded.
    """
    stepped = [row for row in rows if row.steps]
    axes = dict.fromkeys(axis for row in stepped for axis in row.layer_density)
    observed = [row.selections for row in stepped if any(row.selections.get("observed") or ())]
    reuse: Counter[str] = Counter()
    for row in stepped:
        reuse.update({path: count for path, count in row.paths.items() if path.startswith("reuse.")})
    return {
        "layer_density": {
            axis: _mean([(row.layer_density[axis], row.steps) for row in stepped if axis in row.layer_density])
            for axis in axes
        },
        "unique_experts": _mean([(row.unique_experts, row.steps) for row in stepped if row.unique_experts]),
        "pairs": _counts([row.pairs for row in stepped]),
        "stale": _counts([row.stale for row in stepped]),
        "reuse": dict(sorted(reuse.items())),
        **{name: _mean([(found[name], found[weight]) for found in observed]) for name, weight in MEANS.items()},
    }


def _counts(maps: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for counts in maps:
        total.update(counts)
    return dict(total)


def _mean(weighted: Sequence[tuple[Any, Any]]) -> Any:
    """Element-wise mean of equally shaped nested lists; a weight is a number or has one for each element. Nulls do not
    count."""
    if not weighted:
        return None
    values = np.array([np.array(value, dtype=np.float64) for value, _ in weighted])
    weights = np.array([weight for _, weight in weighted], dtype=np.float64)
    weights = weights.reshape(*weights.shape, *[1] * (values.ndim - weights.ndim)) * np.isfinite(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        return _plain(np.nansum(values * np.where(weights > 0, weights, 0), axis=0) / weights.sum(axis=0))


def _plain(values: NDArray[np.float64]) -> Any:
    if values.ndim > 1:
        return [_plain(row) for row in values]
    return [None if not np.isfinite(value) else round(float(value), 5) for value in values]
