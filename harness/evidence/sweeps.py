"""Sweeps: which members a command has, and how far each of them is, from results/ alone.

Files: <results_dir>/sweeps/<name>-<id>.json, the manifest, written before the first member starts and replaced
atomically; beside it <name>-<id>.jsonl, one line appended by every member that failed, or that has another fingerprint
on the machine where it ran than on the one where the sweep was started.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from harness.evidence.provenance import scrub
from harness.evidence.store import StoreError, folder_lock, is_held, read_json, remove_leftovers, state_of, write_text

__all__ = [
    "STATES",
    "Member",
    "MemberState",
    "Sweep",
    "counts",
    "events",
    "load",
    "load_sweeps",
    "record",
    "states",
    "write",
]

MemberStatus = Literal["done", "running", "interrupted", "failed", "invalid", "stale", "missing"]
STATES: tuple[MemberStatus, ...] = get_args(MemberStatus)


@dataclass(frozen=True, slots=True)
class Member:
    """One setting of a sweep. Its fingerprint is None where only the machine that runs it can know it."""

    overrides: tuple[str, ...]
    fingerprint: str | None


@dataclass(frozen=True, slots=True)
class Sweep:
    """One manifest, read back; `title` is the file's name and W&B's group."""

    results_dir: Path
    name: str
    id: str
    command: str
    members: tuple[Member, ...]
    sources: str

    @property
    def title(self) -> str:
        return f"{self.name}-{self.id}"


@dataclass(frozen=True, slots=True)
class MemberState:
    """How far a member is. `examples`: stored examples, all arms of each; `reason`: why it failed or stopped."""

    overrides: tuple[str, ...]
    fingerprint: str | None
    state: MemberStatus
    reason: str | None
    examples: int


def write(results_dir: Path | str, name: str, command: str, members: Sequence[Member], sources: str) -> Sweep:
    """Write the manifest; the same members give the same file, whatever command names them.

    Args:
        name: of the experiment or the task.
        sources: hash of the sources, see `sources_hash`.
    """
    known = [member.fingerprint or list(member.overrides) for member in members]
    mark = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:8]
    sweep = Sweep(Path(results_dir), name, mark, command, tuple(members), sources)
    content = {key: value for key, value in asdict(sweep).items() if key != "results_dir"}
    with folder_lock(_folder(results_dir), ".sweeps.lock"):
        remove_leftovers(_folder(results_dir))
        write_text(_file(sweep, "json"), json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return sweep


def record(results_dir: Path | str, title: str, event: Mapping[str, Any]) -> None:
    """Append one event of a member to the sweep's journal in a single write; paths keep their last part.

    Args:
        event: {"member": its number from 0} and {"fingerprint"} or {"error", ...}.
    """
    told = {key: scrub(value) if isinstance(value, str) else value for key, value in event.items()}
    line = json.dumps(told, ensure_ascii=False) + "\n"
    file = os.open(_folder(results_dir) / f"{title}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def events(results_dir: Path | str, title: str) -> list[dict[str, Any]]:
    """The sweep's journal, oldest first; damaged lines are passed over."""
    try:
        lines = (_folder(results_dir) / f"{title}.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict) and isinstance(event.get("member"), int):
            found.append(event)
    return found


def load_sweeps(results_dir: Path | str) -> list[Sweep]:
    """Every sweep below `results_dir` by title, members with the fingerprint that they had where they ran.

    Raises:
        StoreError: a manifest is unreadable.
    """
    return [load(results_dir, file.stem) for file in sorted(_folder(results_dir).glob("*.json"))]


def load(results_dir: Path | str, title: str) -> Sweep:
    """One sweep by its title.

    Raises:
        StoreError: its manifest is unreadable or not there.
    """
    file = _folder(results_dir) / f"{title}.json"
    moved = {event["member"]: event["fingerprint"] for event in events(results_dir, title) if "fingerprint" in event}
    try:
        content = read_json(file) or {}
        members = tuple(
            Member(tuple(member["overrides"]), moved.get(number, member["fingerprint"]))
            for number, member in enumerate(content["members"])
        )
        name, mark, command, sources = (str(content[key]) for key in ("name", "id", "command", "sources"))
        return Sweep(Path(results_dir), name, mark, command, members, sources)
    except (KeyError, TypeError):
        raise StoreError(f"{file} is not the manifest of a sweep; remove it and run the sweep again") from None


def states(sweep: Sweep, sources: str) -> list[MemberState]:
    """How far each member is, for a program whose sources hash is `sources`.

    Raises:
        StoreError: a file of a run is unreadable.
    """
    errors = {
        event["member"]: str(event["error"]) for event in events(sweep.results_dir, sweep.title) if "error" in event
    }
    return [_state(sweep, member, errors.get(number), sources) for number, member in enumerate(sweep.members)]


def counts(found: Sequence[MemberState]) -> dict[MemberStatus, int]:
    """Number of members in each state, all states in their order."""
    counted = Counter(member.state for member in found)
    return {state: counted[state] for state in STATES}


def _folder(results_dir: Path | str) -> Path:
    return Path(results_dir) / "sweeps"


def _file(sweep: Sweep, suffix: str) -> Path:
    return _folder(sweep.results_dir) / f"{sweep.title}.{suffix}"


def _state(sweep: Sweep, member: Member, error: str | None, sources: str) -> MemberState:
    if member.fingerprint is None:
        return MemberState(member.overrides, None, "missing", error, 0)
    folder = sweep.results_dir / "runs" / member.fingerprint
    held = is_held(folder)
    stored, summary = state_of(folder, sources), read_json(folder / "summary.json") or {}
    state: MemberStatus
    if held:
        state = "running"
    elif stored == "finished":
        state = "invalid" if summary.get("status") == "invalid" else "done"
    else:
        state = "missing" if stored == "new" else stored
    reason = error if state == "missing" else summary.get("reason")
    return MemberState(member.overrides, member.fingerprint, state, reason, _examples(folder))


def _examples(folder: Path) -> int:
    """Examples in the records, the one included that a kill may have cut."""
    names = set()
    try:
        with (folder / "records.jsonl").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.endswith("\n"):
                    names.add(json.loads(line)["example_id"])
    except FileNotFoundError:
        return 0
    except (json.JSONDecodeError, KeyError, TypeError):
        pass
    return len(names)
