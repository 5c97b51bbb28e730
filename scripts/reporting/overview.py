"""What was run, on what, when, with what outcome, and how to run it again."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from harness.evidence import StoredRun
from harness.evidence.provenance import scrub
from harness.evidence.rows import Row
from scripts.cells import NOTHING, Grid, lines, number
from scripts.figures.style import by_place

Runs = Mapping[str, StoredRun]
"""The stored runs by fingerprint."""

TROUBLE = ("failed", "invalid", "partial")
_SHA = 10


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of the head of the page."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Command:
    """A command line and the runs that it made."""

    text: str
    commit: str
    runs: tuple[Row, ...]


def facts(rows: Sequence[Row], runs: Runs) -> list[Fact]:
    """The page in a few lines: runs, examples, tasks, models, machines, dates, sources and other load."""
    stored = [runs[row.fingerprint] for row in rows]
    states = Counter(row.status for row in rows)
    told = [f"{count} {status}" for status, count in states.most_common()]
    stale = sum(row.stale for row in rows)
    sizes = [row.examples for row in rows if row.counted]
    found = [
        Fact("Runs", str(len(rows)), ", ".join(told + ([f"{stale} stale"] if stale else []))),
        Fact("Examples a run", span(sizes, 0), f"median {median(sizes):.0f}" if sizes else ""),
        Fact("Tasks", ", ".join(dict.fromkeys(row.task for row in rows)), ", ".join(_unique(row.data for row in rows))),
        Fact("Models", ", ".join(_unique(row.model for row in rows))),
        Fact("Machine", "; ".join(_unique(row.device for row in rows))),
        Fact("When (UTC)", _when(stored)[0], f"last ended {_when(stored)[1]}"),
        Fact("Commit", ", ".join(_unique(commit(run) for run in stored)), _sources(stored)),
    ]
    loads = [float(load) for run in stored if (load := run.provenance.get("other_load")) is not None]
    if loads:
        note = "share of the CPU that other processes used while a run was timed"
        found.append(Fact("Other load", f"{100 * median(loads):.0f}% median, {100 * max(loads):.0f}% at most", note))
    return found


def _when(stored: Sequence[StoredRun]) -> tuple[str, str]:
    starts = sorted(str(run.provenance["start"]) for run in stored if run.provenance.get("start"))
    ends = sorted(str(run.provenance["end"]) for run in stored if run.provenance.get("end"))
    return minute(starts[0]) if starts else NOTHING, minute(ends[-1]) if ends else NOTHING


def _sources(stored: Sequence[StoredRun]) -> str:
    return "sources: " + ", ".join(_unique(str(run.provenance.get("sources")) for run in stored))


def minute(stamp: str) -> str:
    """An ISO 8601 time to the minute."""
    return stamp[:16].replace("T", " ")


def commit(run: StoredRun) -> str:
    """Commit and whether files differed from it, in words."""
    git = run.provenance.get("git") or {}
    if not git.get("sha"):
        return "no commit known"
    return str(git["sha"])[:_SHA] + (" with changes" if git.get("dirty") else "")


def origins(rows: Sequence[Row], runs: Runs) -> Grid:
    """One line for each machine, version and state of the sources that runs were made with."""
    grouped: dict[tuple[str, ...], list[StoredRun]] = {}
    for row in rows:
        run = runs[row.fingerprint]
        proven = run.provenance
        where = (
            str(proven.get("device")),
            str(proven.get("threads") if proven.get("threads") is not None else NOTHING),
            f"{proven.get('platform') or NOTHING}\nPython {proven.get('python') or NOTHING}",
            commit(run),
            str(proven.get("sources")) + (" (stale)" if row.stale else ""),
        )
        grouped.setdefault(where, []).append(run)
    body = tuple((*where, str(len(members)), *_when(members)) for where, members in grouped.items())
    header = ("machine", "threads", "platform", "commit", "hash of the sources", "runs", "first start", "last end")
    return Grid("Machines and sources", header, body, frozenset({1, 5}))


def packages(rows: Sequence[Row], runs: Runs) -> list[tuple[str, str]]:
    """Packages with every version that runs were made with."""
    seen: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, version in (runs[row.fingerprint].provenance.get("packages") or {}).items():
            seen.setdefault(str(name), {})[str(version)] = None
    return [(name, ", ".join(versions)) for name, versions in sorted(seen.items())]


def glance(rows: Sequence[Row], runs: Runs) -> Grid:
    """Ranges over all settings of a task and model; ratios without simulated and forced runs, fidelity with them.

    Columns of which nothing is known are left out.
    """
    places = by_place([row for row in rows if not row.forced])
    several = len({device for *_, device in places}) > 1
    told = [
        {"task": f"{task}\n({data})", "model": lines(model, device if several else "")} | _ranges(members, runs)
        for (task, data, model, device), members in places.items()
    ]
    header = [name for name in told[0] if any(line[name] != NOTHING for line in told)] if told else []
    body = tuple(tuple(line[name] for name in header) for line in told)
    title = "Ranges over the settings of each task and model"
    return Grid(title, tuple(header), body, frozenset(range(2, len(header))))


def _ranges(members: Sequence[Row], runs: Runs) -> dict[str, str]:
    timed = [row for row in members if not row.simulated]
    delta = _range(members, lambda row: row.delta.value, 1, sign=True)
    told = [quality_difference(row, runs[row.fingerprint]).get("mdd") for row in members]
    detectable = [value for value in told if value is not None]
    return {
        "runs": str(len(members)),
        "examples\na run": span([row.examples for row in members], 0),
        "prompt\ntokens": _range(members, lambda row: row.prompt_tokens, 0),
        "dense\n/ AR": _range(timed, lambda row: row.dense_vs_ar.value),
        "sparse\n/ AR": _range(timed, lambda row: row.sparse_vs_ar.value),
        "sparse\n/ dense": _range(timed, lambda row: row.sparse_vs_dense.value),
        "agreement\n%": _range(members, lambda row: row.agreement.value, 1, scale=100.0),
        "quality\ndifference": delta if delta == NOTHING else f"{delta}\n{members[0].metric}",
        "detectable\n(median)": f"\u00b1{median(detectable):.1f}" if detectable else NOTHING,
        "log-prob of\nreference": _range(
            members, lambda row: reference_difference(row, runs[row.fingerprint]).get("delta"), 4, sign=True
        ),
        "floor: dense\nsame as AR, %": _range(
            members, lambda row: (row.noise_floor or {}).get("identical"), 0, scale=100.0
        ),
    }


def quality_difference(row: Row, run: StoredRun) -> Mapping[str, Any]:
    """Sparse less dense in the primary metric as it is stored; empty where numbers are withheld or there are none."""
    return (_compare(row, run).get("quality_delta") or {}).get(row.metric) or {}


def quality_floor(row: Row, run: StoredRun) -> Mapping[str, Any]:
    """The same of dense less AR."""
    return ((_compare(row, run).get("noise_floor") or {}).get("quality") or {}).get(row.metric) or {}


def reference_difference(row: Row, run: StoredRun) -> Mapping[str, Any]:
    """Log-probability of the reference, sparse less dense, in nats per token."""
    return _compare(row, run).get("reference_delta") or {}


def _compare(row: Row, run: StoredRun) -> Mapping[str, Any]:
    return ((run.summary or {}).get("compare") or {}) if row.counted else {}


def _range(
    rows: Sequence[Row],
    value: Callable[[Row], float | None],
    digits: int = 2,
    *,
    sign: bool = False,
    scale: float = 1.0,
) -> str:
    return span([scale * known for row in rows if (known := value(row)) is not None], digits, sign=sign)


def span(values: Sequence[float], digits: int, *, sign: bool = False) -> str:
    """The least and the greatest value, or the one there is."""
    if not values:
        return NOTHING
    low, high = (number(value, digits, sign=sign) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def commands(rows: Sequence[Row], runs: Runs) -> list[Command]:
    """The command lines that made the runs, each once and quoted for a shell, in the order of their first run."""
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.start):
        run = runs[row.fingerprint]
        argv = [scrub(str(word)) for word in run.provenance.get("argv") or ()]
        if argv:
            grouped.setdefault((shlex.join(["python", *argv]), commit(run)), []).append(row)
    return [Command(text, made, tuple(members)) for (text, made), members in grouped.items()]


def trouble(rows: Sequence[Row]) -> list[Row]:
    """Runs that failed, are invalid or ended early, these last."""
    return sorted((row for row in rows if row.status in TROUBLE), key=lambda row: TROUBLE.index(row.status))


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
