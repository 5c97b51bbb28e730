"""Made-up records, configurations and run folders for the tests of evidence, tables and plots."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.evidence import Record, RunStore, build_summary, provenance
from harness.evidence.rows import SPEEDUPS

ARMS = ("ar", "dense", "sparse")
STEP_MS = {"ar": 20.0, "dense": 30.0, "sparse": 22.0}
STEP_BYTES = {"ar": 4.0e8, "dense": 4.4e8, "sparse": 3.0e8}
LAYERS = 6
DISTANCES = 6
EXPERTS = 16
TRAFFIC = {"attention": 0.38, "ffn": 0.28, "experts": 0.42}
SHARES = {"draft": 0.02, "linear": 0.2, "head": 0.2, "accept": 0.02}


def record(example: str = "e0", arm: str = "ar", *, histogram: tuple[int, ...] = (0, 3), **changes: Any) -> Record:
    """A record whose parts agree with each other; `changes` overrides any field."""
    steps = sum(histogram)
    tokens = sum(new * count for new, count in enumerate(histogram))
    values: dict[str, Any] = {
        "example_id": example,
        "arm": arm,
        "output_ids": tuple(range(tokens + 1)),
        "text": f"text of {example}",
        "grade": {"rougeL": 20.0, "rouge1": 30.0},
        "seconds": steps * STEP_MS.get(arm, 25.0) / 1e3,
        "ttft_seconds": 0.5,
        "steps": steps,
        "histogram": histogram,
        "paths": {"block_attention.torch": steps * 30} if arm == "sparse" else {"attention.dense": steps * 30},
        "prompt_sha": f"sha-{example}",
        "prompt_tokens": 1000,
        "truncated_tokens": 0,
        "cluster": "",
        "step_ms": (STEP_MS.get(arm, 25.0),) * steps,
        "draft_seconds": steps * 0.001,
        "accept_seconds": steps * 0.0005,
        "density": {"attention": 0.25 if arm == "sparse" else 1.0},
        "bytes_per_step": STEP_BYTES.get(arm, 4e8),
        "flops_per_step": 1.0e9,
    }
    return Record(**(values | changes))


def densities(settings: Mapping[str, Any], prompt: int = 1000) -> dict[str, float | None]:
    """What the settings would read per axis of a prompt; experts are those of a carved model."""
    attn, ffn, moe = (settings.get(group) or {} for group in ("attn", "ffn", "moe"))
    kept = prompt
    if attn.get("budget") == "piecewise":
        kept = min(prompt, attn["l0"] + attn["rho"] * max(prompt - attn["l0"], 0))
    elif attn.get("topk"):
        kept = min(prompt, attn["topk"] * attn["block_size"])
    channels = ffn.get("keep") or 1 - ffn.get("sparsity", 4 * ffn.get("tau", 0.0))
    experts = min(1.0, (moe.get("union") or EXPERTS) / EXPERTS)
    carved = settings["model"].get("kind") == "carved_moe"
    return {"attention": kept / prompt, "ffn": channels, "experts": experts if carved else None}


def _cost(density: Mapping[str, float | None]) -> float:
    """Bytes of a step over those of a dense one."""
    return 1.0 - sum(share * (1 - read) for axis, share in TRAFFIC.items() if (read := density[axis]) is not None)


def _observed(density: float, layers: int, steps: int, rng: random.Random) -> dict[str, Any]:
    """Selections whose similarity falls with distance in tokens and in layers, as `SelectionAnalysis` returns them."""

    def near(value: float) -> float:
        return round(min(1.0, max(0.0, value + rng.uniform(-0.02, 0.02))), 4)

    depth = [layer / max(layers - 1, 1) for layer in range(layers)]
    span = range(layers)
    return {
        "overlap": [[near(0.75 + 0.2 * at - 0.03 * step) for step in range(DISTANCES)] for at in depth],
        "recall": [near(0.75 + 0.2 * density + 0.04 * at) for at in depth],
        "oracle_recall": [near(0.85 + 0.14 * density) for _ in depth],
        "similarity": [
            [1.0 if a == b else near((0.3 + 0.5 * depth[min(a, b)]) * 0.9 ** abs(a - b)) for b in span] for a in span
        ],
        "overlap_pairs": [[9.0] * DISTANCES for _ in depth],
        "observed": [3.0 for _ in depth],
        "steps": max(1, steps // 4),
    }


def traced(
    settings: Mapping[str, Any], arm: str, steps: int, seconds: float, *, layers: int, prompt: int, rng: random.Random
) -> dict[str, Any]:
    """Fields of a record that say what an arm read and chose; an observed replay for the sparse arm."""
    density = densities(settings, prompt)
    whole = {axis: None if read is None else 1.0 for axis, read in density.items()}
    read = density if arm.startswith("sparse") else whole
    busy = {"attention": 0.25 + 0.1 * (read["attention"] or 0), "ffn" if read["experts"] is None else "moe": 0.2}
    selecting = (settings.get("attn") or {}).get("topk") is not None and arm.startswith("sparse")
    changes: dict[str, Any] = {
        "density": dict(read),
        "layer_density": {axis: [value] * layers for axis, value in read.items()},
        "component_seconds": {name: seconds * share for name, share in (SHARES | busy).items()}
        | ({"select": 0.05 * seconds} if selecting else {}),
        "bytes_per_step": STEP_BYTES["dense"] * _cost(read),
        "prompt_tokens": prompt,
    }
    if read["experts"] is not None:
        wanted = steps * layers * 60
        changes["unique_experts"] = [EXPERTS * read["experts"]] * layers
        changes["pairs"] = {"wanted": wanted, "kept": int(wanted * read["experts"])}
    if selecting:
        every = (settings.get("reuse") or {}).get("every", 1)
        made = len(range(0, layers, every)) * steps
        changes["paths"] = {"block_attention.torch": steps * layers, "select.blocks": made}
        changes["paths"] |= {"reuse.anchor": steps * layers - made} if every > 1 else {}
    if arm == "sparse":
        tokens, lost = steps * 2, 1 - min(value for value in read.values() if value is not None)
        agreeing = sum(rng.random() > 0.15 * lost for _ in range(tokens))
        flips = sum(rng.random() < 0.1 * lost for _ in range(steps))
        changes["fidelity"] = dict(tokens=tokens, agreeing=agreeing, kl=0.1 * lost * tokens, steps=steps, flips=flips)
        if selecting:
            changes["selections"] = _observed(read["attention"] or 1.0, layers, steps, rng)
    return changes


def example(
    name: str,
    arms: tuple[str, ...] = ARMS,
    *,
    seed: int = 0,
    gain: float = 1.3,
    settings: Mapping[str, Any] | None = None,
    layers: int = LAYERS,
    prompt: int = 1000,
    histograms: Mapping[str, tuple[int, ...]] | None = None,
) -> list[Record]:
    """One example with every arm, its numbers drawn from `seed` and `name`; traced where `settings` are given.

    `histograms` sets those of its arms; of a step of arms with drafts, a tenth is drafting, six tokens each.
    """
    rng, extra, scoring = (random.Random(f"{seed}/{name}{part}") for part in ("", "/traced", "/reference"))
    rows = []
    base, scored = rng.uniform(10, 30), scoring.randint(20, 60)
    cost = {"ar": 0.02, "dense": 0.03, "sparse": 0.03 / gain, "sparse_ar": 0.02 / gain}
    for arm in arms:
        drafts = arm not in ("ar", "sparse_ar")
        histogram = (0, rng.randint(6, 10), 4, 2, 1) if drafts else (0, 24)
        histogram = (histograms or {}).get(arm, histogram)
        steps, slow = sum(histogram), rng.uniform(0.9, 1.1)
        grade = {"rougeL": base + (rng.gauss(0, 1.5) if arm.startswith("sparse") else 0.0), "rouge1": base + 8}
        ids = list(range(sum(n * c for n, c in enumerate(histogram)) + 1))
        if arm.startswith("sparse") and rng.random() < 0.5:
            ids[-1] += 7
        changes: dict[str, Any] = {"histogram": histogram, "grade": grade, "output_ids": tuple(ids)}
        lost = {"sparse": 0.02}.get(arm, 0.0) + scoring.gauss(0, 0.004)
        changes["reference"] = {"tokens": scored, "logprob": -scored * (base / 10 + lost)}
        changes["seconds"] = seconds = steps * cost[arm] * slow
        changes["step_ms"] = (1e3 * cost[arm] * slow,) * steps
        changes |= {"drafted": 6 * steps, "draft_seconds": 0.1 * seconds} if drafts else {"draft_seconds": 0.0}
        if settings is not None:
            changes |= traced(settings, arm, steps, seconds, layers=layers, prompt=prompt, rng=extra)
        rows.append(record(name, arm, **changes))
    return rows


def config(
    task: str = "xsum", *, topk: int = 16, k: int = 6, name: str = "SmolLM2-135M-Instruct", **extra: Any
) -> dict[str, Any]:
    """A resolved configuration with the groups of DESIGN."""
    return {
        "task": {"name": task, "source": "bundled", "data_files": [], "limit": 8, **extra},
        "model": {"name": name, "kind": "smollm2", "dtype": "bfloat16"},
        "draft": {"name": "lookup", "k": k, "max_ngram": 3},
        "attn": {"name": "block_topk", "topk": topk, "block_size": 32, "sinks": 1, "window": 2},
        "ffn": {"name": "dense"},
        "track": {"name": "none"},
        "arms": list(ARMS),
        "seed": 0,
        "results_dir": "results",
        "rerun": False,
        "stale": "rerun",
    }


def growing(name: str, depth: int = 6, topk: int = 1, **changes: Any) -> dict[str, Any]:
    """The settings of a drafter with what every drafter has."""
    return {
        "name": name,
        "depth": depth,
        "topk": topk,
        "total": None,
        "adaptive": "never",
        "min_confidence": 0.3,
    } | changes


def proof(sources: str = "abc", **changes: Any) -> dict[str, Any]:
    """A provenance without looking at the machine."""
    return {
        "git": {"sha": None, "dirty": None},
        "sources": sources,
        "device": "CPU, 2 threads",
        "threads": 2,
        "argv": ["run.py"],
        "experiment": None,
        "start": provenance.now(),
        "end": None,
    } | changes


def stored_run(
    results: Path,
    settings: dict[str, Any] | None = None,
    *,
    examples: int = 6,
    gain: float = 1.3,
    status: str = "ok",
    reason: str | None = None,
    required: dict[str, list[str]] | None = None,
    arms: tuple[str, ...] = ARMS,
    seed: int = 0,
    layers: int = LAYERS,
    prompt: int = 1000,
    traces: bool = True,
    histograms: Sequence[Mapping[str, tuple[int, ...]]] = (),
    exclusive: bool = True,
    **changes: Any,
) -> RunStore:
    """Write one whole run folder and return its closed store; without `traces` as runs were before there were any.

    `histograms` are those of the first examples, by arm.
    """
    settings = settings or config()
    proven = proof(**changes)
    with RunStore(results, settings, arms) as store:
        store.begin(proven, rerun=True)
        for index in range(examples):
            told: dict[str, Any] = {"settings": settings if traces else None, "layers": layers, "prompt": prompt}
            told["histograms"] = histograms[index] if index < len(histograms) else None
            store.append(example(f"e{index}", arms, seed=seed, gain=gain, **told))
        summary = build_summary(
            fingerprint=store.fingerprint,
            task=settings["task"]["name"],
            model=settings["model"]["name"],
            device=proven["device"],
            records=store.records(),
            arms=arms,
            metrics=("rougeL", "rouge1"),
            status=status,
            reason=reason,
            required_paths=required,
            resamples=400,
            exclusive=exclusive,
        )
        if not traces:
            _forget(summary)
        store.finish(summary, provenance.finished(proven))
    return store


def _forget(summary: dict[str, Any]) -> None:
    """Take out what summaries did not hold before traces, drafts, references and factors of speed-ups."""
    for block in summary["arms"].values():
        del block["trace"], block["draft"], block["reference"]
    compare = summary["compare"]
    del summary["exclusive"], compare["reference_delta"], compare["noise_floor"]
    for name, block in compare.items():
        if name in SPEEDUPS:
            del block["tokens_per_step"], block["steps_per_second"]
    compare["quality_delta"] = {
        name: {key: block[key] for key in ("delta", "ci95")} for name, block in compare["quality_delta"].items()
    }
    for key in ("agreement_ci95", "tokens"):
        summary["compare"]["fidelity"].pop(key, None)
