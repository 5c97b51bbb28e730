"""Result folders: fingerprints, locks, records that survive kill -9, and what is finished.

Layout (DESIGN section 4): <results_dir>/runs/<fingerprint>/{config.yaml, provenance.json, records.jsonl, summary.json}.
Examples are appended whole, all arms in one write that is flushed to disk; every other file is replaced atomically.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any, Literal

import yaml

from harness.evidence.provenance import portable, sources_hash
from harness.evidence.records import Record, RecordError

__all__ = ["RunLocked", "RunStore", "StoreError", "StoredRun", "fingerprint", "load_runs", "sources_hash"]

FINGERPRINT_VERSION = 1
NOT_IDENTITY = ("track", "results_dir", "rerun", "stale", "hydra", "prefill_memory_gb", "dry_run")
_TEMPORARY = ".tmp"
_PATIENCE, _PAUSE = 10, 0.05
"""How often, and after how many seconds, a held run is tried again: who only looks at a lock holds it for a moment."""
CARRIED = ("start", "other_load", "kept_prefills")
"""Facts that hold for all examples of a run, also for those that an earlier call finished."""
State = Literal["new", "finished", "interrupted", "stale", "failed"]
Action = Literal["reuse", "resume", "start"]


class StoreError(RuntimeError):
    """A results folder cannot be used; one line that names the file and what to do."""


class RunLocked(StoreError):
    """Another process is working on the same fingerprint."""


def fingerprint(config: Mapping[str, Any]) -> str:
    """16 hex digits over everything in the resolved configuration that changes outputs or timings.

    Data files and local model folders count by name and content, so moving them keeps the fingerprint and editing them
    changes it. Where a run is logged or stored does not count.
    """
    kept = {key: value for key, value in portable(config).items() if key not in NOT_IDENTITY}
    text = json.dumps([FINGERPRINT_VERSION, kept], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class StoredRun:
    """One run folder, read back. `summary` is None while a run is in progress or after it was killed."""

    fingerprint: str
    path: Path
    config: dict[str, Any]
    provenance: dict[str, Any]
    summary: dict[str, Any] | None

    def stale(self, sources: str) -> bool:
        """Whether other sources than `sources` (see `sources_hash`) made this run."""
        return self.provenance.get("sources") != sources


class RunStore:
    """The folder of one run, held by one process.

        with RunStore(results_dir, config, arms) as store:
            action = store.begin(provenance, rerun=False, stale="rerun")

    `begin` says `reuse` (finished: read `summary()`), `resume` (go on with the examples not in `done()`) or `start`.

    Raises:
        RunLocked: on entering, where another process holds the run.
    """

    def __init__(self, results_dir: Path | str, config: Mapping[str, Any], arms: Sequence[str]) -> None:
        self.config = portable(config)
        self.fingerprint = fingerprint(config)
        self.arms = tuple(arms)
        self.results_dir = Path(results_dir)
        self.path = self.results_dir / "runs" / self.fingerprint
        self._lock: IO[str] | None = None
        self._records: list[Record] | None = None

    def __enter__(self) -> RunStore:
        self.path.mkdir(parents=True, exist_ok=True)
        lock = (self.path / "lock").open("a")
        if not _taken(lock):
            lock.close()
            raise RunLocked(
                f"run {self.fingerprint} is in use by another process; wait for it or choose another results_dir"
            )
        self._lock = lock
        remove_leftovers(self.path)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._lock.close()
            self._lock = None

    def state(self, sources: str) -> State:
        """What the folder holds, for a program whose sources hash is `sources`.

        `finished` covers the statuses ok and invalid; `partial` and a missing summary are `interrupted`; anything that
        other sources made is `stale`.
        """
        return state_of(self.path, sources)

    def reusable(self, sources: str, *, rerun: bool = False, stale: str = "rerun") -> bool:
        """Whether `begin` would take the stored run as it is; changes nothing."""
        state = self.state(sources)
        done = (self.summary() or {}).get("status") in ("ok", "invalid")
        return not rerun and (state == "finished" or (state == "stale" and done and stale == "keep"))

    def begin(self, provenance: Mapping[str, Any], *, rerun: bool = False, stale: str = "rerun") -> Action:
        """Decide what to do and make the folder ready for it.

        A finished run is reused unless `rerun`, an interrupted or failed one resumed. A stale run starts afresh; with
        stale="keep" a finished one is reused as it is, while an unfinished one still starts afresh, since its examples
        would mix two programs. An unfinished run of another device or thread count starts afresh too: it would mix
        timings.
        """
        sources = str(provenance["sources"])
        if self.reusable(sources, rerun=rerun, stale=stale):
            return "reuse"
        state, stored = self.state(sources), read_json(self.path / "provenance.json") or {}
        same_machine = all(stored.get(key) == provenance.get(key) for key in ("device", "threads"))
        resume = state in ("interrupted", "failed") and same_machine
        if not resume:
            # The provenance goes first: without it the folder counts as new, wherever a kill cuts this short.
            (self.path / "provenance.json").unlink(missing_ok=True)
        (self.path / "summary.json").unlink(missing_ok=True)
        if not resume:
            (self.path / "records.jsonl").unlink(missing_ok=True)
            self._records = None
        write_text(self.path / "config.yaml", yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))
        first = {key: stored[key] for key in CARRIED if resume and key in stored}
        self.write_json("provenance.json", {**provenance, **first})
        return "resume" if resume and self.records() else "start"

    def carried(self) -> dict[str, Any]:
        """What the stored provenance says of the examples that earlier calls finished; CARRIED."""
        stored = read_json(self.path / "provenance.json") or {}
        return {key: stored[key] for key in CARRIED if key in stored}

    def records(self) -> list[Record]:
        """Records of the complete examples, in file order; a torn or incomplete tail is cut off the file."""
        if self._records is None:
            self._records = self._read_and_cut()
        return list(self._records)

    def done(self) -> set[str]:
        """Ids of the examples that every arm finished."""
        return {record.example_id for record in self.records()}

    def append(self, examples: Sequence[Record]) -> None:
        """Store one example or several, one record for each arm, in a single flushed write.

        Args:
            examples: the records of an example side by side.

        Raises:
            ValueError: an example does not have every arm once, is stored already, or holds a NaN.
        """
        self.records()
        stored = self.done()
        for name, rows in groupby(examples, key=lambda row: row.example_id):
            arms = sorted(row.arm for row in rows)
            if arms != sorted(self.arms):
                raise ValueError(f"one whole example of arms {self.arms} expected, got {name!r} with {arms}")
            if name in stored:
                raise ValueError(f"example {name!r} is stored already")
            stored.add(name)
        text = "".join(json.dumps(row.to_json(), ensure_ascii=False, allow_nan=False) + "\n" for row in examples)
        with (self.path / "records.jsonl").open("ab") as stream:
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())
        assert self._records is not None
        self._records.extend(examples)

    def summary(self) -> dict[str, Any] | None:
        """The stored summary, or None."""
        return read_json(self.path / "summary.json")

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Replace one JSON file of the run atomically."""
        write_text(self.path / name, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def finish(self, summary: Mapping[str, Any], provenance: Mapping[str, Any] | None = None) -> None:
        """Store the provenance with its end, then the summary, which makes the run count as ended."""
        if provenance is not None:
            stored = read_json(self.path / "provenance.json") or {}
            self.write_json("provenance.json", {**provenance, "start": stored.get("start", provenance.get("start"))})
        self.write_json("summary.json", summary)

    def _read_and_cut(self) -> list[Record]:
        """Read up to the last whole example and truncate the file there; only the tail can be damaged by a kill."""
        file = self.path / "records.jsonl"
        if not file.exists():
            return []
        content, end = file.read_bytes(), 0
        kept: list[Record] = []
        pending: list[Record] = []
        for line, stop in _lines(content):
            try:
                record = Record.from_json(json.loads(line))
            except (json.JSONDecodeError, UnicodeDecodeError, RecordError, AttributeError):
                break
            if pending and pending[0].example_id != record.example_id:
                break
            pending.append(record)
            if len(pending) == len(self.arms):
                if sorted(row.arm for row in pending) != sorted(self.arms):
                    break
                kept, pending, end = kept + pending, [], stop
        if end < len(content):
            with file.open("r+b") as stream:
                stream.truncate(end)
                os.fsync(stream.fileno())
        return kept


def _lines(content: bytes) -> Iterator[tuple[bytes, int]]:
    """Whole lines with the offset behind each; an unterminated last line is left out."""
    start = 0
    while (stop := content.find(b"\n", start)) >= 0:
        yield content[start:stop], stop + 1
        start = stop + 1


def _taken(lock: IO[str]) -> bool:
    """Whether this process holds the lock now; tries for half a second."""
    for attempt in range(_PATIENCE):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            time.sleep(_PAUSE if attempt < _PATIENCE - 1 else 0)
    return False


def is_held(folder: Path) -> bool:
    """Whether a process works on the run in this folder; creates nothing."""
    try:
        with (folder / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def state_of(folder: Path, sources: str) -> State:
    """`RunStore.state` of the run in this folder."""
    summary, provenance = read_json(folder / "summary.json"), read_json(folder / "provenance.json")
    if provenance is None:
        return "new"
    if provenance.get("sources") != sources:
        return "stale"
    status = (summary or {}).get("status")
    if status == "failed":
        return "failed"
    return "finished" if status in ("ok", "invalid") else "interrupted"


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Remove what killed writers of `name`, or of any file, left in `folder`; call it under the lock of its writers."""
    for file in folder.glob(f".{name}*{_TEMPORARY}"):
        file.unlink(missing_ok=True)


def load_runs(results_dir: Path | str) -> list[StoredRun]:
    """Every run below `results_dir`, oldest first; folders without a configuration or provenance are passed over.

    Raises:
        StoreError: a file of a run is not readable as what it should be.
    """
    runs = []
    for folder in sorted(path for path in (Path(results_dir) / "runs").glob("*") if path.is_dir()):
        provenance = read_json(folder / "provenance.json")
        if provenance is None or not (folder / "config.yaml").exists():
            continue
        try:
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        except yaml.YAMLError:
            raise StoreError(f"{folder / 'config.yaml'} is not YAML; remove the folder and run it again") from None
        summary = read_json(folder / "summary.json")
        runs.append(StoredRun(folder.name, folder, config or {}, provenance, summary))
    return sorted(runs, key=lambda run: (str(run.provenance.get("start")), run.fingerprint))


def read_json(file: Path) -> dict[str, Any] | None:
    """One JSON object, or None where there is no file.

    Raises:
        StoreError: the file holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError):
        content = None
    if not isinstance(content, dict):
        raise StoreError(f"{file} is not a JSON object; remove its folder and run it again")
    return content


def write_text(file: Path, text: str) -> None:
    """Write through a temporary file in the same folder and a rename, both flushed to disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=_TEMPORARY)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def folder_lock(folder: Path, name: str) -> Iterator[None]:
    """Wait for and hold an advisory lock file in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)


def write_table(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Atomically write rows as CSV, the columns of the first row; nothing becomes an empty cell."""
    buffer = io.StringIO()
    if rows:
        writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_text(file, buffer.getvalue())
