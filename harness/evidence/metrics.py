"""From records to the numbers of summary.json: arms, comparisons, paths, ceiling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from statistics import median
from typing import Any

import numpy as np

from harness.evidence import bootstrap
from harness.evidence.differences import quality_delta, reference_block, reference_delta, speedup
from harness.evidence.records import Record, complete
from harness.evidence.traces import fidelity_block, trace_block

COMPONENTS = ("draft", "select", "attention", "ffn", "moe", "linear", "head", "accept")
PAIRS = (("sparse", "ar"), ("sparse", "dense"), ("dense", "ar"))
OPTIONAL_PAIRS = (("sparse_ar", "ar"),)


def summarise(
    records: Sequence[Record],
    *,
    arms: Sequence[str],
    metrics: Sequence[str],
    bandwidth: float | None = None,
    rate: float | None = None,
    peak_memory: Mapping[str, int | None] | None = None,
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
    greedy: bool = True,
) -> dict[str, Any]:
    """The measured part of summary.json (DESIGN section 4) over the examples that every arm finished.

    Args:
        records: any order; examples that lack an arm are left out.
        metrics: names of the grades in points (0 to 100), the primary one first.
        bandwidth: memory bandwidth of the device in bytes per second; None leaves the roofline fraction null.
        rate: floating-point operations per second of its matrix products; None leaves arithmetic out of the limit.
        peak_memory: bytes per arm.
        greedy: whether every arm keeps the target's greedy tokens; else outputs part by chance or by the rule, and
            where they part says nothing.
    Returns:
        `examples`, `metrics`, `arms`, `compare`, `paths`, `ceiling`, `prompt_tokens`.
    Raises:
        ValueError: the arms of one example saw different prompts.
    """
    examples = complete(list(records), tuple(arms))
    _check_prompts(examples)
    by_arm = {arm: [rows[arm] for rows in examples.values()] for arm in arms}
    blocks = {
        arm: arm_block(rows, metrics, bandwidth=bandwidth, rate=rate, peak_memory=(peak_memory or {}).get(arm))
        for arm, rows in by_arm.items()
        if rows
    }
    paths: Counter[str] = Counter()
    for rows in by_arm.values():
        for record in rows:
            paths.update(record.paths)
    prompts = [next(iter(rows.values())).prompt_tokens for rows in examples.values()]
    return {
        "examples": len(examples),
        "metrics": list(metrics),
        "arms": blocks,
        "compare": compare_block(by_arm, metrics, resamples=resamples, seed=seed, greedy=greedy),
        "paths": dict(sorted(paths.items())),
        "ceiling": ceiling(blocks),
        "prompt_tokens": {"median": median(prompts), "max": max(prompts)} if prompts else {"median": None, "max": None},
    }


def _check_prompts(examples: Mapping[str, Mapping[str, Record]]) -> None:
    for key, rows in examples.items():
        if len({record.prompt_sha for record in rows.values()}) > 1:
            raise ValueError(f"example {key!r}: the arms were given different prompts, their results are not paired")


def arm_block(
    rows: Sequence[Record],
    metrics: Sequence[str],
    *,
    bandwidth: float | None = None,
    rate: float | None = None,
    peak_memory: int | None = None,
) -> dict[str, Any]:
    """One arm's entry under `arms`; `rows` holds one record per example and is not empty.

    `tokens` and `seconds` cover decoding only, `ttft_seconds` is the median over examples, means per step are weighted
    by steps, fields of mechanisms that record nothing are null. `roofline_fraction` is the least time of the mean step,
    drafting included, over the time it took, and `roofline_bound` says which side sets that limit (METHOD section 7).
    """
    tokens, steps = sum(row.tokens for row in rows), sum(row.steps for row in rows)
    seconds = sum(row.seconds for row in rows)
    step_ms = np.array([value for row in rows for value in row.step_ms])
    step_bytes, step_flops = _per_step(rows, "bytes_per_step"), _per_step(rows, "flops_per_step")
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": _ratio(tokens, seconds),
        "steps": steps,
        "ttft_seconds": median(row.ttft_seconds for row in rows),
        "acceptance_length": acceptance_length(rows),
        "histogram": pooled_histogram(rows),
        "quality": {name: float(np.mean([row.grade[name] for row in rows])) for name in metrics},
        "reference": reference_block(rows),
        "step_ms": {
            "p50": float(np.percentile(step_ms, 50)) if len(step_ms) else None,
            "p90": float(np.percentile(step_ms, 90)) if len(step_ms) else None,
        },
        "components_ms": _components(rows, steps),
        "draft": _drafting(rows, seconds),
        "bytes_per_step": step_bytes,
        "flops_per_step": step_flops,
        "density": {axis: _density(rows, axis) for axis in ("attention", "ffn", "experts")},
        "trace": trace_block(rows),
        **roofline(step_bytes, step_flops, _ratio(seconds, steps), bandwidth, rate),
        "peak_memory_bytes": peak_memory,
    }


def roofline(
    moved: float | None, flops: float | None, seconds: float | None, bandwidth: float | None, rate: float | None
) -> dict[str, Any]:
    """Least time of a step over its time, and which side sets it: `bandwidth` or `compute`; nulls where unknown.

    Args:
        moved, flops, seconds: of a step.
        bandwidth, rate: of the device, per second.
    """
    if not (moved and seconds and bandwidth):
        return {"roofline_fraction": None, "roofline_bound": None}
    moving, computing = moved / bandwidth, flops / rate if flops and rate else 0.0
    side = "bandwidth" if moving >= computing else "compute"
    return {"roofline_fraction": max(moving, computing) / seconds, "roofline_bound": side}


def acceptance_length(rows: Sequence[Record]) -> dict[str, float | None]:
    """New tokens per target pass, bonus included: over all steps, and the mean of the requests' own means."""
    own = [row.tokens / row.steps for row in rows if row.steps]
    return {
        "pooled": _ratio(sum(row.tokens for row in rows), sum(row.steps for row in rows)),
        "per_request": sum(own) / len(own) if own else None,
    }


def pooled_histogram(rows: Sequence[Record]) -> list[int]:
    """Element-wise sum of the records' histograms, as long as the longest."""
    return [sum(counts) for counts in zip_longest(*(row.histogram for row in rows), fillvalue=0)]


def _components(rows: Sequence[Record], steps: int) -> dict[str, float | None]:
    parts: dict[str, float | None] = dict.fromkeys(COMPONENTS)
    if steps:
        parts["draft"] = 1e3 * sum(row.draft_seconds for row in rows) / steps
        parts["accept"] = 1e3 * sum(row.accept_seconds for row in rows) / steps
        for name in {name for row in rows for name in row.component_seconds}:
            parts[name] = 1e3 * sum(row.component_seconds.get(name, 0.0) for row in rows) / steps
    return parts


def _drafting(rows: Sequence[Record], seconds: float) -> dict[str, float | None]:
    """Draft tokens per step, the share of them that was accepted, and the share of the time that drafting took.

    Draft tokens of a tree compete, so that their accepted share says less than that of a chain.
    """
    drafted, steps = sum(row.drafted for row in rows), sum(row.steps for row in rows)
    return {
        "tokens_per_step": _ratio(drafted, steps),
        "accepted": _ratio(sum(row.tokens for row in rows) - steps, drafted),
        "time_share": _ratio(sum(row.draft_seconds for row in rows), seconds),
    }


def _density(rows: Sequence[Record], axis: str) -> float | None:
    known = [(row.density[axis], row.steps) for row in rows if row.density.get(axis) is not None and row.steps]
    return _ratio(sum(value * steps for value, steps in known), sum(steps for _, steps in known))  # type: ignore[operator, misc]


def _per_step(rows: Sequence[Record], name: str) -> float | None:
    """Mean of a per-step field, weighted by steps, over the records that have it."""
    known = [(getattr(row, name), row.steps) for row in rows if getattr(row, name) is not None and row.steps]
    return _ratio(sum(value * steps for value, steps in known), sum(steps for _, steps in known))


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None


def compare_block(
    by_arm: Mapping[str, Sequence[Record]],
    metrics: Sequence[str],
    *,
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
    greedy: bool = True,
) -> dict[str, Any]:
    """The entry `compare`: speed-ups, quality deltas (sparse less dense), noise floor (dense less ar) and fidelity.

    All are paired by example. A pair is null where one of its arms was not run.
    """
    result: dict[str, Any] = {}
    for arm, base in PAIRS + tuple(pair for pair in OPTIONAL_PAIRS if by_arm.get(pair[0])):
        result[f"{arm}_vs_{base}"] = speedup(by_arm.get(arm, ()), by_arm.get(base, ()), resamples=resamples, seed=seed)
    sparse, dense, ar = (by_arm.get(arm, ()) for arm in ("sparse", "dense", "ar"))
    result["quality_delta"] = {
        name: quality_delta(sparse, dense, name, resamples=resamples, seed=seed) for name in metrics
    }
    result["reference_delta"] = reference_delta(sparse, dense, resamples=resamples, seed=seed)
    result["noise_floor"] = {
        "quality": {name: quality_delta(dense, ar, name, resamples=resamples, seed=seed) for name in metrics},
        "reference": reference_delta(dense, ar, resamples=resamples, seed=seed),
    }
    result["fidelity"] = {
        **fidelity_block(sparse, resamples=resamples, seed=seed),
        "first_divergence": divergence(sparse, dense, "sparse") if greedy else None,
        "noise_floor": divergence(dense, ar, "dense") if greedy else None,
    }
    return result


def divergence(rows: Sequence[Record], base: Sequence[Record], name: str) -> dict[str, float | None] | None:
    """Where outputs part: {name: median index of the first differing token, null if none differ, identical: share}."""
    if not rows or not base:
        return None
    places = [first_difference(a.output_ids, b.output_ids) for a, b in zip(rows, base, strict=True)]
    parted = [place for place in places if place is not None]
    return {name: median(parted) if parted else None, "identical": 1.0 - len(parted) / len(places)}


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first token that differs, or the shorter length where one is a prefix; None when equal."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))


def ceiling(blocks: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Largest speed-up that memory traffic allows: bytes of a dense step over bytes of a sparse step (METHOD 7)."""
    dense, sparse = (blocks.get(arm, {}).get("bytes_per_step") for arm in ("dense", "sparse"))
    return {"sparse_vs_dense": dense / sparse if dense and sparse else None}
