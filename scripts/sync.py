"""Uploads what was tracked offline, and the tables and figures, to W&B: `python -m scripts.sync` (docs/tracking.md)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.evidence import tracking, uploads
from harness.evidence.tracking import TrackingError


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="python -m scripts.sync",
        description="Uploads the offline W&B runs of a results folder. Exit codes: 1 an upload failed, 2 bad input.",
    )
    options.add_argument("--results", type=Path, default=Path("results"), help="folder that holds wandb/ (results)")
    options.add_argument("--dry-run", action="store_true", help="say what would be uploaded; no network, no login")
    options.add_argument("--all", action="store_true", help="also what was uploaded before, and runs that ran online")
    options.add_argument("--timeout", type=float, default=600, help="seconds for one run, then it failed (600)")
    report = options.add_argument_group("tables and figures")
    report.add_argument("--report", action="store_true", help="first log the tables and figures as a run of their own")
    report.add_argument("--project", default="sparse-verification", help="W&B project of that run")
    report.add_argument("--group", default=None, help="W&B group of that run, usually the name of the sweep")
    report.add_argument("--offline", action="store_true", help="write that run below <results>/wandb, upload nothing")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """One line per run. 1 where an upload failed, 2 for bad input: no folder, no login, no tables."""
    arguments = parser().parse_args(argv)
    try:
        if not arguments.results.is_dir():
            raise TrackingError(f"--results={arguments.results} is no folder; name one that holds runs/ and wandb/")
        if arguments.timeout <= 0:
            raise TrackingError(f"--timeout={arguments.timeout:g} is not above 0; 600 seconds is the default")
        if not (arguments.dry_run or arguments.offline):
            tracking.require_login()
        if arguments.report:
            _report(arguments)
        return 0 if arguments.offline else _upload(arguments)
    except TrackingError as error:
        print(error, file=sys.stderr)
        return 2


def _report(arguments: argparse.Namespace) -> None:
    """Log the tables and figures offline; they are uploaded with the rest."""
    if arguments.dry_run:
        files = tracking.result_files(arguments.results)
        print(f"would log {len(files)} tables and figures to {arguments.project}")
        return
    count = tracking.log_results(arguments.results, "offline", project=arguments.project, group=arguments.group)
    print(f"logged {count} tables and figures to {arguments.project}", flush=True)


def _upload(arguments: argparse.Namespace) -> int:
    runs = uploads.stored_runs(arguments.results, everything=arguments.all)
    if not runs:
        print(f"nothing to upload below {arguments.results / 'wandb'}")
    failed = 0
    for run in runs:
        if arguments.dry_run:
            print(f"would upload {run.name}")
            continue
        reason = uploads.upload(run, seconds=arguments.timeout, again=arguments.all)
        print(f"uploaded {run.name}" if reason is None else f"failed {run.name}: {reason}", flush=True)
        failed += reason is not None
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
