"""summary.json and the last line of standard output (DESIGN section 4)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from harness.evidence import metrics as measures
from harness.evidence.bootstrap import RESAMPLES
from harness.evidence.provenance import scrub
from harness.evidence.records import Record, complete

VERSION = 1
STATUSES = ("ok", "failed", "invalid", "partial")


def problems(
    records: Sequence[Record], *, arms: Sequence[str], required_paths: Mapping[str, Sequence[str]] | None = None
) -> list[str]:
    """Why these measurements must not be believed, one line each; empty when they may be.

    Args:
        required_paths: per arm, prefixes of path counters of which each must have counted at least once.
    """
    rows = [row for example in complete(list(records), tuple(arms)).values() for row in example.values()]
    found = [line for row in rows for line in _record_problems(row)]
    for arm, prefixes in (required_paths or {}).items():
        taken = {path for row in rows if row.arm == arm for path, count in row.paths.items() if count}
        if any(row.arm == arm and row.steps for row in rows):
            missing = [prefix for prefix in prefixes if not any(path.startswith(prefix) for path in taken)]
            found += [f"{arm}: {prefix} is switched on but never ran" for prefix in missing]
    for arm in arms:
        if rows and not any(row.text.strip() for row in rows if row.arm == arm):
            found.append(f"{arm}: every output text is empty")
    return found


def _record_problems(row: Record) -> list[str]:
    where, found = f"{row.arm}: example {row.example_id}", []
    if not row.output_ids:
        found.append(f"{where}: the output is empty")
    clocks = (row.seconds, row.ttft_seconds, row.draft_seconds, row.accept_seconds, *row.step_ms)
    if min(clocks) < 0 or (row.tokens > 0 and row.seconds == 0):
        found.append(f"{where}: a clock went backwards or stood still")
    if sum(row.histogram) != row.steps or (row.output_ids and row.tokens != len(row.output_ids) - 1):
        found.append(f"{where}: {row.tokens} tokens in {sum(row.histogram)} counted steps do not add up")
    return found


def build_summary(
    *,
    fingerprint: str,
    task: str,
    model: str,
    device: str,
    records: Sequence[Record],
    arms: Sequence[str],
    metrics: Sequence[str],
    status: str = "ok",
    reason: str | None = None,
    required_paths: Mapping[str, Sequence[str]] | None = None,
    bandwidth: float | None = None,
    rate: float | None = None,
    peak_memory: Mapping[str, int | None] | None = None,
    notes: Sequence[str] = (),
    seed: int = 0,
    resamples: int = RESAMPLES,
    greedy: bool = True,
    exclusive: bool = True,
) -> dict[str, Any]:
    """The whole of summary.json.

    A run given as ok or partial becomes `invalid` when `problems` finds any. A failed run keeps no measurement, an
    invalid one keeps its arms for diagnosis but claims no comparison. Texts are scrubbed of paths.

    Args:
        exclusive: whether nothing else used the machine, so that timings may be believed.
    Raises:
        ValueError: unknown status, or arms that saw different prompts.
    """
    if status not in STATUSES:
        raise ValueError(f"status={status!r} is unknown, choose one of {', '.join(STATUSES)}")
    if status in ("ok", "partial"):
        doubts = problems(records, arms=arms, required_paths=required_paths)
        if not complete(list(records), tuple(arms)):
            doubts.append("no example was finished by every arm")
        if doubts:
            more = f" (and {len(doubts) - 1} more)" if len(doubts) > 1 else ""
            status, reason = "invalid", doubts[0] + more
    kept = [] if status == "failed" else records
    measured = measures.summarise(
        kept,
        arms=arms,
        metrics=metrics,
        bandwidth=bandwidth,
        rate=rate,
        peak_memory=peak_memory,
        resamples=resamples,
        seed=seed,
        greedy=greedy,
    )
    if status == "invalid":
        measured["compare"] = measures.compare_block({}, metrics)
    head = {
        "version": VERSION,
        "fingerprint": fingerprint,
        "status": status,
        "reason": scrub(reason) if reason else None,
        "task": task,
        "model": scrub(model),
        "device": scrub(device),
        "exclusive": exclusive,
    }
    return head | measured | {"notes": [scrub(note) for note in notes]}


def last_line(summary: Mapping[str, Any], path: str | None = None) -> str:
    """The compact JSON line that ends standard output; null where an arm is missing.

    Args:
        path: results folder of the run as it may be shown; runs/<fingerprint> when left out.
    """
    compare = summary.get("compare") or {}
    sparse = (summary.get("arms") or {}).get("sparse") or {}
    names = summary.get("metrics") or list(compare.get("quality_delta") or {})
    delta = (compare.get("quality_delta") or {}).get(names[0]) if names else None
    row = {
        "fingerprint": summary["fingerprint"],
        "status": summary["status"],
        "speedup_vs_ar": (compare.get("sparse_vs_ar") or {}).get("speedup"),
        "speedup_vs_dense": (compare.get("sparse_vs_dense") or {}).get("speedup"),
        "acceptance_length": (sparse.get("acceptance_length") or {}).get("pooled"),
        "quality_delta": (delta or {}).get("delta"),
        "path": path if path is not None else f"runs/{summary['fingerprint']}",
    }
    return json.dumps(
        {key: round(v, 6) if isinstance(v, float) else v for key, v in row.items()}, separators=(",", ":")
    )
