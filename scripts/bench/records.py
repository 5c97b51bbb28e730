"""Rows of results/bench/*.csv and results/gpu/*.csv: what was measured, on what, with what. No torch."""

from __future__ import annotations

import csv
import io
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

ROOT = Path(__file__).resolve().parents[2]


class RecordError(ValueError):
    """A CSV file that cannot be extended or read; one line that names the file."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where and with what something was measured.

    Attributes:
        device: in words.
        threads: of the CPU.
        torch: version.
        date: UTC, the same for all rows of one call, so that it names the call.
        git: commit, with a plus where files differ from it; without git, a hash of the sources.
    """

    device: str
    threads: int
    torch: str
    date: str
    git: str


@dataclass(frozen=True, slots=True)
class StepRow:
    """One arm of one step.

    Attributes:
        arch: the model; with fewer layers than it has, these are named.
        engine: how the step is executed.
        context: positions before the step.
        batch: sequences in the step.
        rows: tokens of each sequence, the last accepted one included.
        tree: ``chain``, or how the draft branches.
        kept: positions kept per KV head, 0 in steps that attend to all.
        arm: what may be skipped.
        median_ms, p10_ms, p90_ms: milliseconds of the whole step.
        limit_ms: bytes over the device's bandwidth.
        bytes, flops: least traffic and operations of the step (METHOD section 7).
    """

    device: str
    arch: str
    dtype: str
    engine: str
    context: int
    batch: int
    rows: int
    tree: str
    kept: int
    arm: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    limit_ms: float
    bytes: float
    flops: float
    threads: int
    torch: str
    date: str
    git: str


@dataclass(frozen=True, slots=True)
class OpRow:
    """One operator: as :class:`StepRow`, with its name and the sizes that it was timed at."""

    device: str
    arch: str
    dtype: str
    engine: str
    op: str
    shape: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    limit_ms: float
    bytes: float
    flops: float
    threads: int
    torch: str
    date: str
    git: str


R = TypeVar("R", StepRow, OpRow)


def place(device: str, threads: int, torch: str) -> Place:
    """The place of a call that starts now."""
    return Place(device, threads, torch, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), revision(ROOT))


def revision(root: Path) -> str:
    """Short commit of ``root``, with a plus where tracked files differ; without git, the hash of its sources, or
    ``unknown`` where a package for that is missing too."""
    try:
        found = [
            subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True, timeout=20).stdout
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return _hashed(root)
    return found[0].strip() + ("+" if found[1].strip() else "")


def _hashed(root: Path) -> str:
    try:
        from harness.evidence.provenance import sources_hash
    except ImportError:
        return "unknown"
    return f"sources {sources_hash(root)}"


def append(file: Path, rows: Sequence[StepRow] | Sequence[OpRow]) -> None:
    """Add rows to a CSV file, in one write; a new file gets a header.

    Raises:
        RecordError: the file has other columns.
    """
    if not rows:
        return
    names = [field.name for field in fields(rows[0])]
    file.parent.mkdir(parents=True, exist_ok=True)
    known = _header(file)
    if known is not None and known != names:
        raise RecordError(f"{file}: has other columns than this version writes; move it away")
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    if known is None:
        writer.writeheader()
    writer.writerows(_shown(asdict(row)) for row in rows)
    with file.open("a", encoding="utf-8", newline="") as stream:
        stream.write(text.getvalue())


def read(file: Path, kind: type[R]) -> list[R]:
    """The rows of a CSV file.

    Raises:
        RecordError: there is no such file, it has other columns, or a value is of another type.
    """
    types = get_type_hints(kind)
    if _header(file) is None:
        raise RecordError(f"{file}: there is no such file; `python -m scripts.bench` writes it")
    if _header(file) != list(types):
        raise RecordError(f"{file}: has other columns than this version reads")
    with file.open(encoding="utf-8", newline="") as stream:
        try:
            return [kind(**{name: types[name](value) for name, value in row.items()}) for row in csv.DictReader(stream)]
        except (TypeError, ValueError) as error:
            raise RecordError(f"{file}: {error}") from error


def latest(rows: Sequence[R]) -> list[R]:
    """The rows of the last call for every device, architecture, number format and engine."""

    def key(row: R) -> tuple[str, ...]:
        return row.device, row.arch, row.dtype, row.engine

    last: dict[tuple[str, ...], str] = {}
    for row in rows:
        last[key(row)] = max(row.date, last.get(key(row), ""))
    return [row for row in rows if row.date == last[key(row)]]


def _header(file: Path) -> list[str] | None:
    """Column names; None where there is no file or it is empty."""
    if not file.is_file() or not file.stat().st_size:
        return None
    with file.open(encoding="utf-8", newline="") as stream:
        return next(csv.reader(stream))


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds with four decimals, bytes and operations as whole numbers."""
    found = {}
    for name, value in row.items():
        if isinstance(value, float):
            value = f"{value:.0f}" if name in ("bytes", "flops") else f"{value:.4f}"
        found[name] = value
    return found
