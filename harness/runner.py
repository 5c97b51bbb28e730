"""One run: arms in turn on the same examples, grading, storing, logging (DESIGN sections 3 and 4)."""

from __future__ import annotations

import resource
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from harness import build, console, roofline
from harness.build import Engine, Plan
from harness.engine.analysis import SelectionAnalysis
from harness.engine.decoding import Decoded, Prefix
from harness.engine.fidelity import compare
from harness.evidence import Record, RunStore, StoreError, build_summary, last_line, provenance, rows, tracking
from harness.schema import Config, ConfigError, WandbOffline
from harness.timing import OtherLoad
from sparse.budget import Sparsity
from sparse.trace import AXES
from tasks.grading import cut_at_stop
from tasks.prompting import Prepared

ROOT = Path(__file__).resolve().parent.parent
_WARMUP_TOKENS = 8
_QUIET = 0.1
"""Share of the processor that others may use before a run's timings are called unreliable."""


class RunFailed(RuntimeError):
    """A run that is stored as failed or invalid; the message is one line."""


def run(config: Config, member: str = "") -> float | None:
    """Run one configuration, or take it from the store if it is finished there.

    Prints a table of the arms and, last, the compact JSON line of DESIGN section 4.

    Args:
        config: resolved and validated.
        member: the place in a sweep, for the progress bar.

    Returns:
        The speed-up of the sparse arm over the dense one, what a sweeper maximises; None without these arms.

    Raises:
        ConfigError, tasks.base.TaskError: bad input, found before any compute and before anything is stored.
        RunFailed: the run broke or its measurements must not be believed; it is stored as such.
    """
    plain = build.resolved(config)
    facts = _provenance(config, plain)
    try:
        with RunStore(config.results_dir, plain, config.arms) as store:
            summary = _summary(config, plain, store, facts, member)
            console.show(summary)
            rows.write_overview(config.results_dir, sources=facts["sources"])
    except StoreError as error:
        raise ConfigError(f"results_dir={config.results_dir}: {error}") from error
    print(last_line(summary), flush=True)
    if summary["status"] not in ("ok", "partial"):
        raise RunFailed(f"run {summary['fingerprint']} is {summary['status']}: {summary['reason']}")
    compared = (summary["compare"] or {}).get("sparse_vs_dense") or {}
    speedup = compared.get("speedup")
    return None if speedup is None else float(speedup)


def _provenance(config: Config, plain: dict[str, Any]) -> dict[str, Any]:
    """Where a run that starts now comes from."""
    threads = build.thread_count(config)
    device = roofline.device_text(torch.device(plain["model"]["device"]), threads)
    return provenance.collect(ROOT, argv=sys.argv, device=device, threads=threads, experiment=_group(config))


def _summary(
    config: Config, plain: dict[str, Any], store: RunStore, facts: dict[str, Any], member: str
) -> dict[str, Any]:
    """The summary of a finished run: from the store, or by running it."""
    if store.reusable(facts["sources"], rerun=config.rerun, stale=config.stale):
        summary = store.summary()
        assert summary is not None
        console.note(f"run {store.fingerprint} is finished and taken from the store (rerun=true runs it again)")
        return summary
    plan = build.plan(config)
    store.begin(facts, rerun=config.rerun, stale=config.stale)
    try:
        summary = _measure(plan, plain, store, facts, member)
    except KeyboardInterrupt:
        store.finish(_describe(plan, store, facts, status="partial", reason="interrupted"), provenance.finished(facts))
        raise
    except (ConfigError, StoreError):
        raise
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        summary = _describe(plan, store, facts, status="failed", reason=reason)
    store.finish(summary, provenance.finished(facts))
    return summary


def _group(config: Config) -> str | None:
    return config.track.group if isinstance(config.track, WandbOffline) else None


def _measure(plan: Plan, plain: dict[str, Any], store: RunStore, facts: dict[str, Any], member: str) -> dict[str, Any]:
    """Decode, grade and store every example that is missing; the tracker is closed whatever happens."""
    config = plan.config
    done = store.done()
    missing = [(number, item) for number, item in enumerate(plan.prepared) if item.example.id not in done]
    tracker = _tracker(config)
    summary: dict[str, Any] | None = None
    try:
        tracker.start(plain, store.path, f"{config.task.name}-{store.fingerprint}", _group(config))
    except tracking.TrackingError as error:
        raise ConfigError(f"track={config.track.name}: {error}") from error
    try:
        if missing:
            engine = build.load(plan)
            _warm_up(plan, engine)
            load = OtherLoad()
            with console.progress(f"{member}{config.task.name}", len(plan.prepared), len(done)) as advance:
                for number, item in missing:
                    records = _example(plan, engine, item, number)
                    store.append(records)
                    for record in records:
                        tracker.log_example(_row(record))
                    advance()
            facts["other_load"] = round(load.share(), 3)
        summary = _describe(plan, store, facts)
    finally:
        tracker.finish(summary)
    return summary


def _tracker(config: Config) -> tracking.Tracker:
    track = config.track
    if not isinstance(track, WandbOffline):
        return tracking.make("none", results_dir=config.results_dir, project="")
    mode: tracking.Mode = "online" if track.name == "wandb" else "offline"
    entity = getattr(track, "entity", None)
    return tracking.make(mode, results_dir=config.results_dir, project=track.project, entity=entity)


def _warm_up(plan: Plan, engine: Engine) -> None:
    """Run every arm briefly on the first prompts, so that no arm pays for first calls."""
    for item in plan.prepared[: plan.config.engine.warmup]:
        prefix = engine.decoder.prefill(item.ids)
        for arm in plan.config.arms:
            tokens = min(_WARMUP_TOKENS, plan.config.task.max_new_tokens)
            engine.decoder.decode(prefix, engine.drafters[arm], plan.budgets[arm], tokens)


def _example(plan: Plan, engine: Engine, item: Prepared, number: int) -> list[Record]:
    """One example by every arm; the order turns round from example to example (A B C, C B A, ...)."""
    prefix = engine.decoder.prefill(item.ids)
    arms = plan.config.arms
    order = arms if number % 2 == 0 else tuple(reversed(arms))
    decoded = {arm: _decode(plan, engine, prefix, arm) for arm in order}
    extra = _analyse(plan, engine, prefix, decoded) if plan.config.analysis else {}
    return [_record(plan, item, arm, decoded[arm], extra.get(arm, {})) for arm in arms]


def _decode(plan: Plan, engine: Engine, prefix: Prefix, arm: str) -> Decoded:
    return engine.decoder.decode(prefix, engine.drafters[arm], plan.budgets[arm], plan.config.task.max_new_tokens)


def _analyse(plan: Plan, engine: Engine, prefix: Prefix, decoded: dict[str, Decoded]) -> dict[str, dict[str, Any]]:
    """Fidelity and selections of the drafting sparse arm on the dense arm's trajectory; untimed."""
    if not {"dense", "sparse"} <= set(decoded) or not decoded["dense"].transcript:
        return {}
    sparsity, truth = plan.budgets["sparse"], decoded["dense"]
    probe = None if sparsity.attention.is_dense else SelectionAnalysis(sparsity.attention, plan.shape.layers)
    dense = engine.decoder.replay(prefix, truth, Sparsity())
    sparse = engine.decoder.replay(prefix, truth, sparsity, probe)
    found: dict[str, Any] = {"fidelity": asdict(compare(dense, sparse, truth))}
    if probe is not None:
        found["selections"] = probe.means()
    return {"sparse": found}


def _record(plan: Plan, item: Prepared, arm: str, decoded: Decoded, extra: dict[str, Any]) -> Record:
    text = cut_at_stop(plan.tokenizer.decode(decoded.output, skip_special_tokens=True), plan.task.stop)
    steps, trace = len(decoded.step_seconds), decoded.trace
    longest = max(decoded.histogram, default=0)
    layers = plan.shape.layers
    return Record(
        example_id=item.example.id,
        arm=arm,
        output_ids=tuple(decoded.output),
        text=text,
        grade=plan.task.grade(item.example, text),
        seconds=decoded.seconds,
        ttft_seconds=decoded.ttft_seconds,
        steps=steps,
        histogram=tuple(decoded.histogram[new] for new in range(longest + 1)),
        paths=dict(trace.paths),
        prompt_sha=item.sha,
        prompt_tokens=len(item.ids),
        truncated_tokens=item.truncated_tokens,
        cluster=item.example.cluster,
        step_ms=tuple(round(1e3 * seconds, 4) for seconds in decoded.step_seconds),
        draft_seconds=decoded.draft_seconds,
        accept_seconds=decoded.accept_seconds,
        component_seconds=dict(trace.seconds),
        density={axis: trace.density(axis) for axis in AXES},
        layer_density={axis: trace.densities(axis, layers) for axis in AXES},
        unique_experts=[count / steps for _, count in sorted(trace.experts_loaded.items())] if steps else [],
        pairs=dict(trace.pairs),
        stale={str(age): count for age, count in sorted(trace.stale.items())},
        bytes_per_step=decoded.bytes / steps if steps else None,
        flops_per_step=decoded.flops / steps if steps else None,
        **extra,
    )


def _row(record: Record) -> dict[str, Any]:
    """What the tracker shows of a record: no token ids, no per-step lists."""
    shown: dict[str, Any] = {
        "example_id": record.example_id,
        "arm": record.arm,
        "text": record.text,
        "prompt_tokens": record.prompt_tokens,
        "tokens": record.tokens,
        "steps": record.steps,
        "seconds": record.seconds,
        "tokens_per_second": record.tokens / record.seconds if record.seconds else 0.0,
        "acceptance_length": record.tokens / record.steps if record.steps else 0.0,
    }
    return shown | record.grade


def _describe(
    plan: Plan, store: RunStore, facts: dict[str, Any], status: str = "ok", reason: str | None = None
) -> dict[str, Any]:
    """The summary of what the store holds now."""
    cut = [item for item in plan.prepared if item.truncated_tokens]
    notes = [f"{len(cut)} of {len(plan.prepared)} prompts lost the middle of their document"] if cut else []
    if plan.config.task.source == "bundled":
        notes.append("bundled or synthetic examples written for this project")
    if facts.get("other_load", 0) > _QUIET:
        notes.append(f"other processes used {facts['other_load']:.0%} of the CPU meanwhile: timings are unreliable")
    return build_summary(
        fingerprint=store.fingerprint,
        task=plan.task.name,
        model=str(plan.config.model.name),
        device=facts["device"],
        records=store.records(),
        arms=plan.config.arms,
        metrics=plan.task.metrics,
        status=status,
        reason=reason,
        required_paths=plan.required_paths,
        bandwidth=roofline.bandwidth(plan.device.type, plan.threads),
        peak_memory=dict.fromkeys(plan.config.arms, _peak_memory(plan.device)),
        notes=notes,
        seed=plan.config.seed,
    )


def _peak_memory(device: torch.device) -> int:
    """Peak bytes of this process: device memory on CUDA, resident memory on the CPU; the arms share one process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
