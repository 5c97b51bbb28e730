"""What a tracker shows of a run: flat numbers, rows of tables and bins, made from records and summary.json alone.

The keys are those that `scripts.workspace` draws, so a key is written in this file only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.evidence.labels import axes_on, name_of
from harness.evidence.records import Record

EXAMPLES, ARMS, ACCEPTED = "per_example", "arms", "accepted_tokens"
"""Keys of the tables: one row per example and arm, one per arm, one per arm and number of tokens in a step."""
NUMBER = "example/number"
"""Place of an example in the run, from 1: the axis of every example/<arm>/<name>."""
SPEEDUP_AR, SPEEDUP_DENSE = "result/speedup_vs_ar", "result/speedup_vs_dense"
QUALITY, REFERENCE, AGREEMENT, LIMIT = (
    "result/quality_delta", "result/reference_delta", "result/agreement", "result/limit",
)  # fmt: skip

Bins = tuple[NDArray[Any], NDArray[Any]]
"""Counts [bins] and edges [bins + 1]."""

_LONGEST_TAG = 64
_STEP_BINS = 64


def of_arm(arm: str, name: str) -> str:
    """Key of a number that every arm has, as in sparse/acceptance_length."""
    return f"{arm}/{name}"


def accepted_key(arm: str) -> str:
    """Key of the histogram of new tokens per step."""
    return f"histogram/accepted_tokens/{arm}"


def step_key(arm: str) -> str:
    """Key of the histogram of step times in milliseconds."""
    return f"histogram/step_ms/{arm}"


def tags(config: Mapping[str, Any]) -> list[str]:
    """Task, model, drafter and the axes that are sparse; nothing of launcher or machine."""
    names = [name_of(config, group) for group in ("task", "model", "draft") if config.get(group)]
    return [tag[:_LONGEST_TAG] for tag in dict.fromkeys([*names, *(axes_on(config) or ("dense",))]) if tag]


def example_row(record: Record, *, texts: bool) -> dict[str, Any]:
    """One record as a row of numbers; the output itself only where `texts` allows it, its ids never."""
    row: dict[str, Any] = {"example_id": record.example_id, "arm": record.arm}
    row |= {"text": record.text} if texts else {}
    row |= {
        "prompt_tokens": record.prompt_tokens,
        "tokens": record.tokens,
        "steps": record.steps,
        "seconds": record.seconds,
        "tokens_per_second": record.tokens / record.seconds if record.seconds else 0.0,
        "acceptance_length": record.tokens / record.steps if record.steps else 0.0,
    }
    if record.reference.get("tokens"):
        row["reference_logprob"] = record.reference["logprob"] / record.reference["tokens"]
    return row | dict(record.grade)


def headline(summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that runs are compared by, one flat key each; what was not measured is left out.

    Speed-ups are ratios, quality_delta is in points of the task's first metric and reference_delta in nats per token,
    both sparse minus dense; times are milliseconds.
    """
    compare = summary.get("compare") or {}
    metric = next(iter(summary.get("metrics") or compare.get("quality_delta") or ()), "")
    found: dict[str, Any] = {
        SPEEDUP_AR: _at(compare, "sparse_vs_ar", "speedup"),
        SPEEDUP_DENSE: _at(compare, "sparse_vs_dense", "speedup"),
        "result/dense_vs_ar": _at(compare, "dense_vs_ar", "speedup"),
        QUALITY: _at(compare, "quality_delta", metric, "delta"),
        REFERENCE: _at(compare, "reference_delta", "delta"),
        AGREEMENT: _at(compare, "fidelity", "agreement"),
        "result/kl": _at(compare, "fidelity", "kl"),
        LIMIT: _at(summary, "ceiling", "sparse_vs_dense"),
    }
    for arm, block in (summary.get("arms") or {}).items():
        found |= {of_arm(arm, key): value for key, value in _arm(block, metric).items()}
        for name, value in (block.get("components_ms") or {}).items():
            found[of_arm(arm, f"components_ms/{name}")] = value
    return {key: float(value) for key, value in found.items() if _is_number(value)}


def arm_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arms side by side, one row each."""
    metric = next(iter(summary.get("metrics") or ()), "")
    return [{"arm": arm} | _arm(block, metric) for arm, block in (summary.get("arms") or {}).items()]


def accepted_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Steps by the new tokens that they yielded, bonus token included: one row per arm and number."""
    rows = []
    for arm, counts in histograms(summary).items():
        for new, steps in enumerate(counts):
            if new:
                rows.append({"arm": arm, "tokens": new, "steps": steps, "share": steps / max(sum(counts), 1)})
    return rows


def histograms(summary: Mapping[str, Any]) -> dict[str, list[int]]:
    """Steps by new tokens, per arm that made any."""
    arms = (summary.get("arms") or {}).items()
    return {arm: list(counts) for arm, block in arms if sum(counts := block.get("histogram") or ())}


def whole_bins(counts: Sequence[int]) -> Bins:
    """Counts of 0, 1, 2, ..., every number in the middle of its bin."""
    return np.asarray(counts), np.arange(len(counts) + 1) - 0.5


def step_bins(records: Sequence[Record]) -> dict[str, Bins]:
    """Step times in milliseconds per arm, in 64 bins of equal width."""
    times: dict[str, list[float]] = {}
    for record in records:
        times.setdefault(record.arm, []).extend(record.step_ms)
    return {arm: np.histogram(values, bins=_STEP_BINS) for arm, values in times.items() if values}


def shown_summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    """summary.json without the layer by layer traces, which the run's artifact holds."""
    arms = {
        arm: {key: value for key, value in block.items() if key != "trace"}
        for arm, block in (summary.get("arms") or {}).items()
    }
    return {**summary, "arms": arms}


def _arm(block: Mapping[str, Any], metric: str) -> dict[str, Any]:
    density = {f"density/{axis}": value for axis, value in (block.get("density") or {}).items()}
    return {
        "tokens": block.get("tokens"),
        "seconds": block.get("seconds"),
        "steps": block.get("steps"),
        "tokens_per_second": block.get("tokens_per_second"),
        "acceptance_length": _at(block, "acceptance_length", "pooled"),
        "acceptance_length_per_request": _at(block, "acceptance_length", "per_request"),
        "step_ms_p50": _at(block, "step_ms", "p50"),
        "step_ms_p90": _at(block, "step_ms", "p90"),
        "ttft_seconds": block.get("ttft_seconds"),
        "quality": _at(block, "quality", metric),
        "reference_logprob": _at(block, "reference", "logprob"),
        "roofline_fraction": block.get("roofline_fraction"),
        "bytes_per_step": block.get("bytes_per_step"),
    } | density


def _at(block: Any, *keys: str) -> Any:
    for key in keys:
        block = block.get(key) if isinstance(block, Mapping) else None
    return block


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
