"""How long a run will take, before it starts: the cost model over its own prompts (METHOD section 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from statistics import median
from typing import Any

from harness import build, exclusive, roofline
from harness.budgets import SPARSE_ARMS
from harness.build import DRAFTING_ARMS, Plan
from harness.evidence import RunLocked, RunStore
from harness.schema import Config
from sparse.cost import Peaks, StepPlan, plan_costs, prefill_cost, total
from tasks.prompting import Prepared

STEP_SHARE = 0.5
"""Share of its limit that a step reaches, drafting included: 0.4 to 0.75 on CPUs (results/LOG.md)."""
PREFILL_SHARE = 0.5
"""Share of its limit that a prefill reaches on CPUs (results/LOG.md)."""
ACCEPTANCE = 1.7
"""New tokens of a step with drafts, as prompt lookup reaches on the tasks here."""
OBSERVED = 6.0
"""Time of a replay that observes selections over that of one that does not."""
START = 6.0
"""Seconds to load and pack a small model."""


_FORESEEN: dict[str, float] = {}
"""What the dry runs of this process would keep prefilled: weights and prompt -> bytes, used longest ago first."""


def foresee(config: Config, plain: Mapping[str, Any], sources: str) -> dict[str, Any]:
    """What a run would do: {fingerprint, examples, missing (not stored yet), prompt_tokens (most), expected_seconds}.

    Args:
        config: of the run.
        plain: as `build.resolved` gives it.
        sources: hash of the present sources; what others made counts as missing unless stale=keep.
    Raises:
        ConfigError, tasks.base.TaskError: as the run itself would.
    """
    plan = build.plan(config)
    store = RunStore(config.results_dir, plain, config.arms)
    missing = _missing(plan, store, sources)
    with exclusive.alone(build.resource(plan.device), True, lambda: None):
        peaks = roofline.peaks(plan.device.type, plan.threads, plan.dtype)
    return {
        "fingerprint": store.fingerprint,
        "examples": len(plan.prepared),
        "missing": len(missing),
        "prompt_tokens": max(len(item.ids) for item in plan.prepared),
        "expected_seconds": round(expected_seconds(plan, peaks, missing, _FORESEEN), 1),
    }


def _missing(plan: Plan, store: RunStore, sources: str) -> list[Prepared]:
    config = plan.config
    if store.reusable(sources, rerun=config.rerun, stale=config.stale):
        return []
    if config.rerun or not store.path.exists() or store.state(sources) not in ("interrupted", "failed"):
        return plan.prepared
    with suppress(RunLocked), store:
        done = store.done()
        return [item for item in plan.prepared if item.example.id not in done]
    return plan.prepared


def expected_seconds(
    plan: Plan, peaks: Peaks, missing: Sequence[Prepared], kept: dict[str, float] | None = None
) -> float:
    """Seconds that the missing examples of a run take, roughly, if every answer is as long as it may be.

    Args:
        plan: of the run.
        peaks: of its device.
        missing: prompts that are not stored yet.
        kept: what this process has prefilled by then, see _FORESEEN; `missing` are added, within the run's memory.
    """
    if not missing:
        return 0.0
    kept = {} if kept is None else kept
    seconds, warm = START, median(len(item.ids) for item in missing)
    for item in missing:
        seconds += _example(plan, peaks, len(item.ids), prefill=not _keep(plan, item, kept))
    return seconds + plan.config.engine.warmup * _prefill(plan, peaks, round(warm))


def _keep(plan: Plan, item: Prepared, kept: dict[str, float]) -> bool:
    """Whether a prompt was kept before; it is from now on, as `harness.engine.prefills.PrefillStore` would."""
    limit, key = build.prefill_limit(plan), f"{build.prefill_identity(plan)} {item.sha}"
    size = float(plan.shape.kv_bytes_per_token * len(item.ids))
    before = kept.pop(key, None) is not None
    while kept and sum(kept.values()) + size > limit:
        del kept[next(iter(kept))]
    if size <= limit:
        kept[key] = size
    return before


def _example(plan: Plan, peaks: Peaks, prompt: int, *, prefill: bool) -> float:
    tokens, analysis = plan.config.task.max_new_tokens, plan.config.analysis
    step = {arm: _step(plan, peaks, arm, prompt) for arm in plan.config.arms}
    steps = {arm: tokens / (ACCEPTANCE if arm in DRAFTING_ARMS else 1.0) for arm in plan.config.arms}
    seconds = sum(steps[arm] * step[arm] for arm in step)
    if analysis != "none":
        seconds += sum(tokens / (1 + plan.depth * (arm in DRAFTING_ARMS)) * step[arm] for arm in step)
        if {"dense", "sparse"} <= set(step):
            slow = OBSERVED if analysis == "full" and not plan.budgets["sparse"].attention.is_dense else 1.0
            seconds += steps["dense"] * (step["dense"] + slow * step["sparse"])
    return seconds + (_prefill(plan, peaks, prompt) if prefill else 0.0)


def _step(plan: Plan, peaks: Peaks, arm: str, context: int) -> float:
    """A verification step, or one of token by token decoding."""
    attention = plan.budgets[arm].attention
    kept = None
    if arm in SPARSE_ARMS and not attention.is_dense:
        kept = attention.blocks(context) * attention.block_size
    rows = 1 + plan.depth if arm in DRAFTING_ARMS else 1
    work = StepPlan(context=context, rows=rows, kept=kept, block_size=attention.block_size)
    return peaks.seconds(total(plan_costs(plan.shape, work).values())) / STEP_SHARE


def _prefill(plan: Plan, peaks: Peaks, prompt: int) -> float:
    cost = prefill_cost(plan.shape, 0, prompt, plan.config.engine.prefill_chunk)
    return peaks.seconds(cost) / PREFILL_SHARE
