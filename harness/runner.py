"""One run: arms in turn on the same examples, grading, storing, logging (DESIGN sections 3 and 4)."""

from __future__ import annotations

import hashlib
import json
import resource
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from harness import build, console, exclusive, roofline, sweeping
from harness.build import Engine, Plan
from harness.engine.analysis import SelectionAnalysis
from harness.engine.decoding import Decoded, Prefix
from harness.engine.drafting.base import NoDrafter
from harness.engine.fidelity import compare, forced, log_probability
from harness.estimate import foresee
from harness.evidence import Record, RunStore, StoreError, build_summary, last_line, provenance, rows, tracking
from harness.evidence.store import RunLocked
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


Watch = Callable[[Sequence[Record]], str | None]
"""Sees all records after each wave; a text that it returns ends the run early, with that reason."""


def run(config: Config, member: str = "", *, watch: Watch | None = None) -> float | None:
    """Run one configuration, or take it from the store if it is finished there.

    Prints a table of the arms and, last, the compact JSON line of DESIGN section 4.

    Args:
        config: resolved and validated.
        member: the place in a sweep, for the progress bar.
        watch: may end the run early; it is then stored as partial, and a later call goes on with it.

    Returns:
        The speed-up of the sparse arm over the dense one, what a sweeper maximises; None without these arms, or in a
        dry run, which prints the seconds that it expects as its last line.

    Raises:
        ConfigError, tasks.base.TaskError: bad input, found before any compute and before anything is stored.
        RunLocked: another process is working on the same configuration.
        RunFailed: the run broke or its measurements must not be believed; it is stored as such.
    """
    plain = build.resolved(config)
    if config.dry_run:
        print(json.dumps(foresee(config, plain, provenance.sources_hash(ROOT)), separators=(",", ":")), flush=True)
        return None
    facts = _provenance(config, plain)
    try:
        with RunStore(config.results_dir, plain, config.arms) as store:
            summary = _summary(config, plain, store, facts, member, watch)
            console.show(summary)
            rows.write_overview(config.results_dir, sources=facts["sources"])
    except RunLocked:
        raise
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
    return provenance.collect(ROOT, argv=sweeping.command(), device=device, threads=threads, experiment=_group(config))


def _summary(
    config: Config, plain: dict[str, Any], store: RunStore, facts: dict[str, Any], member: str, watch: Watch | None
) -> dict[str, Any]:
    """The summary of a finished run: from the store, or by running it."""
    if store.reusable(facts["sources"], rerun=config.rerun, stale=config.stale):
        summary = store.summary()
        assert summary is not None
        console.note(f"run {store.fingerprint} is finished and taken from the store (rerun=true runs it again)")
        return summary
    plan = build.plan(config)
    tracker = _tracker(config, plain, store)
    told: dict[str, Any] | None = None
    try:
        store.begin(facts, rerun=config.rerun, stale=config.stale)
        facts |= store.carried()
        told = summary = _stored(plan, store, facts, member, watch, tracker)
    finally:
        tracker.finish(told, store.records() if told else ())
    return summary


def _stored(
    plan: Plan, store: RunStore, facts: dict[str, Any], member: str, watch: Watch | None, tracker: tracking.Tracker
) -> dict[str, Any]:
    """Measure and store the summary, whatever happens: before anything is uploaded, which may fail or hang."""
    try:
        summary = _measure(plan, store, facts, member, watch, tracker)
    except KeyboardInterrupt:
        if store.records():
            told = _describe(plan, store, facts, status="partial", reason="interrupted")
            store.finish(told, provenance.finished(facts))
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
    """Name that joins the runs of a sweep: as configured, else the sweep's."""
    sweep = sweeping.current()
    given = config.track.group if isinstance(config.track, WandbOffline) else None
    return given or (sweep.title if sweep else None)


def _measure(
    plan: Plan, store: RunStore, facts: dict[str, Any], member: str, watch: Watch | None, tracker: tracking.Tracker
) -> dict[str, Any]:
    """Decode, grade and store every example that is missing."""
    with exclusive.alone(build.resource(plan.device), plan.config.exclusive, _waiting):
        ended = _decode(plan, store, facts, member, watch, tracker)
    return _describe(plan, store, facts, status="partial" if ended else "ok", reason=ended)


def _decode(
    plan: Plan, store: RunStore, facts: dict[str, Any], member: str, watch: Watch | None, tracker: tracking.Tracker
) -> str | None:
    """Decode the missing examples; the reason where `watch` ended the run early."""
    done, ended = store.done(), None
    missing = [(number, item) for number, item in enumerate(plan.prepared) if item.example.id not in done]
    peaks = roofline.peaks(plan.device.type, plan.threads, plan.dtype)
    facts["peaks"] = {"bandwidth": peaks.bandwidth, "rate": peaks.rate}
    if not missing:
        return None
    engine, before = build.load(plan), {key: facts.get(key) or 0 for key in ("other_load", "kept_prefills")}
    _warm_up(plan, engine)
    engine.prefills.hits, load = 0, OtherLoad()
    with console.progress(f"{member}{plan.config.task.name}", len(plan.prepared), len(done)) as advance:
        for start in range(0, len(missing), plan.wave):
            items = missing[start : start + plan.wave]
            records = _wave(plan, engine, [item for _, item in items], items[0][0] // plan.wave)
            store.append(records)
            facts["other_load"] = max(before["other_load"], round(load.share(), 3))
            facts["kept_prefills"] = before["kept_prefills"] + engine.prefills.hits
            store.write_json("provenance.json", facts)
            for record in records:
                tracker.log_example(record)
            for _ in items:
                advance()
            ended = watch(store.records()) if watch and start + plan.wave < len(missing) else None
            if ended:
                break
    return ended


def _waiting() -> None:
    console.note("waiting until another run on this machine has ended (exclusive=false shares it)")


def _tracker(config: Config, plain: dict[str, Any], store: RunStore) -> tracking.Tracker:
    """The tracker of the run, started: before the store is touched, so that a missing login costs nothing."""
    track = config.track
    if not isinstance(track, WandbOffline):
        return tracking.make("none", results_dir=config.results_dir, project="")
    tracker = tracking.make(
        "online" if track.name == "wandb" else "offline",
        results_dir=config.results_dir,
        project=track.project,
        entity=getattr(track, "entity", None),
        texts=track.texts,
    )
    try:
        tracker.start(plain, store.path, f"{config.task.name}-{store.fingerprint}", _group(config))
    except tracking.TrackingError as error:
        raise ConfigError(f"track={track.name}: {error}") from error
    return tracker


def _warm_up(plan: Plan, engine: Engine) -> None:
    """Run every arm briefly on the first prompts, so that no arm pays for first calls."""
    decoder, tokens = engine.decoder, min(_WARMUP_TOKENS, plan.config.task.max_new_tokens)
    for start in range(0, min(plan.config.engine.warmup, len(plan.prepared))):
        items = plan.prepared[start : start + plan.wave]
        # Backwards, so that no drafter knows a timed prompt already.
        prefixes = [decoder.prefill(item.ids[::-1], row) for row, item in enumerate(items)]
        _tell_replays(engine, prefixes, tokens)
        for arm in plan.config.arms:
            decoder.decode_all(prefixes, engine.drafters[arm][: len(items)], plan.budgets[arm], tokens)


def _wave(plan: Plan, engine: Engine, items: list[Prepared], number: int) -> list[Record]:
    """The examples of a wave by every arm; the order turns round from wave to wave (A B C, C B A, ...)."""
    config, decoder = plan.config, engine.decoder
    prefixes = [decoder.prefill(item.ids, row, _seed(config, item)) for row, item in enumerate(items)]
    tokens = config.task.max_new_tokens
    _tell_replays(engine, prefixes, tokens)
    order = config.arms if number % 2 == 0 else tuple(reversed(config.arms))
    decoded = {
        arm: decoder.decode_all(prefixes, engine.drafters[arm][: len(items)], plan.budgets[arm], tokens)
        for arm in order
    }
    wave = items[0].example.id if config.engine.batch_size > 1 else ""
    records = []
    for row, item in enumerate(items):
        own = {arm: decoded[arm][row] for arm in config.arms}
        extra = _analyse(plan, engine, prefixes[row], item, own) if config.analysis != "none" else {}
        records += [_record(plan, item, arm, own[arm], wave, extra.get(arm, {})) for arm in config.arms]
    return records


def _seed(config: Config, item: Prepared) -> int:
    """Seed of what an example draws: independent of the other examples and of where a run was interrupted."""
    mark = hashlib.sha256(f"{config.seed} {item.example.id}".encode()).digest()
    return int.from_bytes(mark[:6], "big")


def _tell_replays(engine: Engine, prefixes: list[Prefix], tokens: int) -> None:
    """Decode the continuations that replaying drafters need, untimed."""
    for prefix in prefixes if engine.replays else ():
        truth = engine.decoder.decode(prefix, NoDrafter(), Sparsity(), tokens).output
        for drafter in engine.replays[prefix.row]:
            drafter.expect(truth)


def _analyse(
    plan: Plan, engine: Engine, prefix: Prefix, item: Prepared, decoded: dict[str, Decoded]
) -> dict[str, dict[str, Any]]:
    """Untimed: how probable the reference answer is to each arm, and how close the drafting sparse arm stays to dense.

    Fidelity and selections are those on the dense arm's trajectory.
    """
    found: dict[str, dict[str, Any]] = {arm: {} for arm in decoded}
    if target := item.target[: plan.config.task.max_new_tokens]:
        for arm in decoded:
            steps = forced(target, plan.depth if arm in build.DRAFTING_ARMS else 0)
            logits = engine.decoder.replay(prefix, steps, plan.budgets[arm])
            total = log_probability(target, prefix.logits, logits)
            found[arm]["reference"] = {"tokens": len(target), "logprob": total}
    if not {"dense", "sparse"} <= set(decoded) or not decoded["dense"].transcript:
        return found
    sparsity, truth = plan.budgets["sparse"], decoded["dense"]
    chooses = plan.config.analysis == "full" and not sparsity.attention.is_dense
    probe = SelectionAnalysis(sparsity.attention, plan.shape.layers) if chooses else None
    dense = engine.decoder.replay(prefix, truth, Sparsity())
    sparse = engine.decoder.replay(prefix, truth, sparsity, probe)
    found["sparse"]["fidelity"] = asdict(compare(dense, sparse, truth, _deterministic(plan.config)))
    if probe is not None:
        found["sparse"]["selections"] = probe.means()
    return found


def _deterministic(config: Config) -> bool:
    """Whether every arm keeps the target's greedy tokens, so that outputs and acceptances may be compared."""
    return config.decode.name == "greedy" and not getattr(config.draft, "forced", False)


def _record(plan: Plan, item: Prepared, arm: str, decoded: Decoded, wave: str, extra: dict[str, Any]) -> Record:
    text = cut_at_stop(plan.tokenizer.decode(decoded.output, skip_special_tokens=True), plan.task.stop)
    steps, trace = len(decoded.step_seconds), decoded.trace
    longest = max(decoded.histogram, default=0)
    layers = plan.shape.layers
    share = decoded.share
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
        paths=dict(trace.paths) if decoded.leads else {},
        prompt_sha=item.sha,
        prompt_tokens=len(item.ids),
        truncated_tokens=item.truncated_tokens,
        cluster=item.example.cluster,
        wave=wave,
        drafted=sum(len(taken.draft) for taken in decoded.transcript),
        step_ms=tuple(round(1e3 * seconds, 4) for seconds in decoded.step_seconds),
        draft_seconds=decoded.draft_seconds,
        accept_seconds=decoded.accept_seconds,
        component_seconds={name: seconds * share for name, seconds in trace.seconds.items()},
        density={axis: trace.density(axis) for axis in AXES},
        layer_density={axis: trace.densities(axis, layers) for axis in AXES},
        unique_experts=[count / trace.steps for _, count in sorted(trace.experts_loaded.items())] if steps else [],
        pairs=dict(trace.pairs) if decoded.leads else {},
        stale={str(age): count for age, count in sorted(trace.stale.items())} if decoded.leads else {},
        bytes_per_step=decoded.bytes / steps if steps else None,
        flops_per_step=decoded.flops / steps if steps else None,
        **extra,
    )


def _describe(
    plan: Plan, store: RunStore, facts: dict[str, Any], status: str = "ok", reason: str | None = None
) -> dict[str, Any]:
    """The summary of what the store holds now."""
    peaks = facts.get("peaks", {})
    cut = [item for item in plan.prepared if item.truncated_tokens]
    notes = [f"{len(cut)} of {len(plan.prepared)} prompts lost the middle of their document"] if cut else []
    if plan.config.task.source == "bundled":
        notes.append("bundled or synthetic examples written for this project")
    if getattr(plan.config.draft, "forced", False):
        notes.append(
            "acceptance was chosen, not measured: outputs, quality and fidelity of the drafting arms mean nothing"
        )
    if kept := facts.get("kept_prefills", 0):
        notes.append(
            f"{kept} prompts were prefilled by an earlier run of the same process: times to first token are its"
        )
    if not plan.config.exclusive:
        notes.append("exclusive=false: other runs may have used the machine meanwhile, timings are unreliable")
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
        bandwidth=peaks.get("bandwidth"),
        rate=peaks.get("rate"),
        peak_memory=dict.fromkeys(plan.config.arms, _peak_memory(plan.device)),
        notes=notes,
        seed=plan.config.seed,
        greedy=_deterministic(plan.config),
        exclusive=plan.config.exclusive and facts.get("other_load", 0) <= _QUIET,
    )


def _peak_memory(device: torch.device) -> int:
    """Peak bytes of this process: device memory on CUDA, resident memory on the CPU; the arms share one process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
