"""Made-up records, configurations and run folders for the tests of evidence, tables and plots."""

import random
from pathlib import Path
from typing import Any

from harness.evidence import Record, RunStore, build_summary, provenance

ARMS = ("ar", "dense", "sparse")
STEP_MS = {"ar": 20.0, "dense": 30.0, "sparse": 22.0}
STEP_BYTES = {"ar": 4.0e8, "dense": 4.4e8, "sparse": 3.0e8}


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
        "attention_density": 0.25 if arm == "sparse" else 1.0,
        "bytes_per_step": STEP_BYTES.get(arm, 4e8),
        "flops_per_step": 1.0e9,
    }
    return Record(**(values | changes))


def example(name: str, arms: tuple[str, ...] = ARMS, *, seed: int = 0, gain: float = 1.3) -> list[Record]:
    """One example with every arm, its numbers drawn from `seed` and `name`."""
    rng = random.Random(f"{seed}/{name}")
    rows = []
    base = rng.uniform(10, 30)
    cost = {"ar": 0.02, "dense": 0.03, "sparse": 0.03 / gain, "sparse_ar": 0.02 / gain}
    for arm in arms:
        histogram = (0, 24) if arm in ("ar", "sparse_ar") else (0, rng.randint(6, 10), 4, 2, 1)
        steps, slow = sum(histogram), rng.uniform(0.9, 1.1)
        grade = {"rougeL": base + (rng.gauss(0, 1.5) if arm.startswith("sparse") else 0.0), "rouge1": base + 8}
        ids = list(range(sum(n * c for n, c in enumerate(histogram)) + 1))
        if arm.startswith("sparse") and rng.random() < 0.5:
            ids[-1] += 7
        rows.append(
            record(name, arm, histogram=histogram, grade=grade, output_ids=tuple(ids), seconds=steps * cost[arm] * slow)
        )
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
    **changes: Any,
) -> RunStore:
    """Write one whole run folder and return its closed store."""
    settings = settings or config()
    proven = proof(**changes)
    with RunStore(results, settings, arms) as store:
        store.begin(proven, rerun=True)
        for index in range(examples):
            store.append(example(f"e{index}", arms, seed=seed, gain=gain))
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
        )
        store.finish(summary, provenance.finished(proven))
    return store
