"""A sweep while it runs: what the process that starts it tells its members, and what they report back.

Members may run in other processes or on other machines, so they are told through one environment variable, which the
launcher sets for each, and answer through the sweep's journal (`harness.evidence.sweeps`). Knows neither Hydra nor
torch.
"""

import base64
import json
import os
import re
import shlex
import sys
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from harness.evidence import sweeps
from harness.evidence.provenance import clean_argv, sources_hash
from harness.evidence.store import fingerprint
from harness.schema import Config, ConfigError

ROOT = Path(__file__).resolve().parent.parent
VARIABLE = "SPARSE_VERIFICATION_SWEEP"
_FAILED = 1
_LOCAL = ("basic", "joblib", "submitit_local")


@dataclass(frozen=True, slots=True)
class Announcement:
    """What members know of their sweep. `stderr` tells a worker whether its lines reach the same terminal or file."""

    title: str
    members: int
    argv: list[str]
    folder: str
    results_dir: str
    call: str
    stderr: list[int]


_started: Announcement | None = None


def begin(typed: Sequence[list[str]], configs: Sequence[Config], settings: Any) -> str:
    """Check the sweep as a whole and write its manifest, before the first member runs.

    Args:
        typed: the overrides of each member.
        configs: the configuration of each.
        settings: Hydra's own, for the launcher.

    Returns:
        The override by which Hydra hands `VARIABLE` to the members; empty in a dry run, which leaves no manifest.

    Raises:
        ConfigError: a member, or the sweep as a whole, cannot run.
    """
    global _started
    launcher, results_dir = settings.runtime.choices["hydra/launcher"], _results_dir(configs)
    if launcher != "basic" and settings.launcher.get("n_jobs") != 1:
        _check_side_by_side(configs, launcher)
    if all(config.dry_run for config in configs):
        return f"+hydra.job.env_set.{VARIABLE}=''"
    members = [
        sweeps.Member(tuple(clean_argv(["", *overrides])[1:]), _expected(config, launcher))
        for overrides, config in zip(typed, configs, strict=True)
    ]
    command = shlex.join(["python", *clean_argv(sys.argv)])
    try:
        sweep = sweeps.write(results_dir, _name(typed, configs), command, members, sources_hash(ROOT))
    except OSError as error:
        raise ConfigError(f"results_dir={results_dir}: {error.strerror}; choose another folder") from error
    _started = Announcement(
        title=sweep.title,
        members=len(members),
        argv=sys.argv,
        folder=os.getcwd(),
        results_dir=str(Path(results_dir).absolute()),
        call=uuid.uuid4().hex[:8],
        stderr=_stderr(),
    )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    path = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    # processes of the launchers import harness from any folder
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys((str(ROOT), *path)))
    told = base64.urlsafe_b64encode(json.dumps(asdict(_started)).encode()).decode()
    return f"+hydra.job.env_set.{VARIABLE}='{told}'"


def current() -> Announcement | None:
    """The sweep that this process runs a member of, None outside of one."""
    told = os.environ.get(VARIABLE)
    return Announcement(**json.loads(base64.urlsafe_b64decode(told))) if told else None


def command() -> list[str]:
    """The command line that was typed, also in processes that a launcher started."""
    sweep = current()
    return sys.argv if sweep is None else sweep.argv


def enter() -> None:
    """Go to the folder where the command was typed: workers of a cluster that was there before start elsewhere.

    Raises:
        ConfigError: this machine does not have that folder.
    """
    sweep = current()
    if sweep is not None:
        try:
            os.chdir(sweep.folder)
        except OSError as error:
            raise ConfigError(
                f"results_dir={sweep.results_dir}: {sweep.folder} is not on this machine ({error.strerror}); "
                "workers need the same folders as the machine that starts the sweep"
            ) from error


def arrive(config: Config, number: int | None) -> str:
    """The place of a member for the progress bar; keeps its fingerprint where that is another on this machine.

    number: from 0, None outside of a sweep.
    """
    sweep = current()
    if sweep is None or number is None:
        return ""
    mark = _identity(config)
    if mark != _manifest(sweep).members[number].fingerprint:
        sweeps.record(config.results_dir, sweep.title, {"member": number, "fingerprint": mark})
    return f"{number + 1}/{sweep.members} "


def failed(number: int, line: str, code: int) -> None:
    """Keep the line of a failed member, for the end of the sweep and for scripts.status."""
    sweep = current()
    if sweep is not None:
        event = {"member": number, "error": line, "code": code, "call": sweep.call, "seen": _stderr() == sweep.stderr}
        sweeps.record(sweep.results_dir, sweep.title, event)


def finish(code: int) -> int:
    """Print how the sweep that this process started stands, and the lines of members that could not; the exit code.

    Args:
        code: the exit code so far.
    """
    global _started
    started, _started = _started, None
    if started is None:
        return code
    sweep = _manifest(started)
    found = sweeps.states(sweep, sources_hash(ROOT))
    for event in sweeps.events(sweep.results_dir, sweep.title):
        if event.get("call") == started.call and not event["seen"]:
            print(f"[{' '.join(sweep.members[event['member']].overrides)}] {event['error']}", file=sys.stderr)
    counted = sweeps.counts(found)
    words = {"done": "ok", "running": "running elsewhere"}
    told = [f"{count} {words.get(state, state)}" for state, count in counted.items() if count]
    print(f"sweep {sweep.title}: {', '.join(told)} of {len(found)}", file=sys.stderr)
    return _FAILED if counted["failed"] or counted["invalid"] else code


def _manifest(sweep: Announcement) -> sweeps.Sweep:
    return sweeps.load(sweep.results_dir, sweep.title)


def _identity(config: Config) -> str:
    return fingerprint(import_module("harness.build").resolved(config))


def _expected(config: Config, launcher: str) -> str | None:
    """The fingerprint here; None where only another machine has what the configuration asks for."""
    try:
        return _identity(config)
    except ConfigError:
        if launcher in _LOCAL:
            raise
        return None


def _results_dir(configs: Sequence[Config]) -> str:
    folders = list(dict.fromkeys(config.results_dir for config in configs))
    if len(folders) > 1:
        raise ConfigError(f"results_dir={','.join(folders)}: a sweep has one folder; choose results_dir={folders[0]}")
    return folders[0]


def _check_side_by_side(configs: Sequence[Config], launcher: str) -> None:
    """Refuse members that would crowd the cores; say what becomes of timings."""
    chosen = f"hydra/launcher={launcher}"
    if any(config.exclusive for config in configs):
        print(
            f"{chosen}: members on one machine take turns; exclusive=false runs them side by side, for quality alone: "
            "timings are then marked shared",
            file=sys.stderr,
        )
    elif launcher != "submitit_slurm" and any(config.engine.threads is None for config in configs):
        raise ConfigError(
            f"engine.threads=null: with {chosen} and exclusive=false every worker would take all cores; set "
            "engine.threads to the cores of one worker, as in engine.threads=1"
        )


def _name(typed: Sequence[list[str]], configs: Sequence[Config]) -> str:
    """The experiments' names, else the tasks', joined and fit for a file."""
    names = []
    for overrides, config in zip(typed, configs, strict=True):
        chosen = dict(text.lstrip("+").split("=", 1) for text in overrides if "=" in text)
        names.append(chosen.get("experiment") or config.task.name)
    return re.sub(r"[^\w.+-]", "_", "-".join(dict.fromkeys(names)))[:48]


def _stderr() -> list[int]:
    """Device and file number of standard error."""
    try:
        found = os.fstat(2)
    except OSError:
        return []
    return [found.st_dev, found.st_ino]
