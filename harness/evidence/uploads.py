"""W&B runs that were stored offline: which there are, and handing them to W&B's own command. Imports no wandb."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def stored_runs(results_dir: Path | str, *, everything: bool = False) -> list[Path]:
    """Folders of the offline W&B runs that were not uploaded yet, oldest first.

    Args:
        everything: also those that carry W&B's mark of a finished upload, and those that ran online.
    """
    pattern = "*run-*" if everything else "offline-run-*"
    folders = {file.parent for file in (Path(results_dir) / "wandb").glob(f"{pattern}/*.wandb")}
    return sorted((run for run in folders if everything or not is_uploaded(run)), key=_started)


def _started(run: Path) -> str:
    """What orders run folders by time: their name is [offline-]run-<date>_<time>-<id>."""
    return run.name.removeprefix("offline-")


def is_uploaded(run: Path) -> bool:
    """Whether W&B has marked the run as uploaded."""
    return any(run.glob("*.wandb.synced"))


def upload(run: Path, *, seconds: float, again: bool = False) -> str | None:
    """Upload one stored run by W&B's own command; None, or one line that says why it failed.

    Args:
        seconds: after which an upload counts as failed; W&B itself would go on trying.
        again: also where the run is marked as uploaded or ran online.
    """
    more = ["--include-synced", "--include-online"] if again else []
    command = [sys.executable, "-m", "wandb", "sync", *more, str(run)]
    folder = run.resolve().parent
    places = {
        "WANDB_DIR": str(folder.parent),
        "WANDB_CACHE_DIR": str(folder / "cache"),
        "WANDB_DATA_DIR": str(folder / "data"),
    }
    environment = places | {key: value for key, value in os.environ.items() if key != "WANDB_MODE"}
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return f"no end after {seconds:g} s; the next call tries again"
    if done.returncode == 0 and is_uploaded(run):
        return None
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    if lines:
        return lines[-1].removeprefix("wandb: ").strip()
    return f"exit code {done.returncode}, but W&B left no mark of an upload"
