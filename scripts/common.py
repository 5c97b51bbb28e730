"""What the programs that read results/ share: their options and the rows they select."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.evidence import StoreError, sources_hash
from harness.evidence.rows import Row, collect

ROOT = Path(__file__).resolve().parents[1]


class NothingToShow(RuntimeError):
    """There is no stored run to show; one line that says what to do."""


def parser(program: str, description: str, out: str, *, kind: str = "folder") -> argparse.ArgumentParser:
    """The options of every such program; `out` names what is written below --results by default, a `kind`."""
    options = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    options.add_argument("--results", type=Path, default=Path("results"), help="folder that holds runs/ (results)")
    options.add_argument("--out", type=Path, default=None, help=f"{kind} to write to (<results>/{out})")
    options.add_argument("--task", default="", help="only these tasks, comma-separated: xsum,squad")
    options.add_argument("--experiment", default=None, help="only the runs of this experiment")
    options.set_defaults(folder=out)
    return options


def selected(arguments: argparse.Namespace) -> list[Row]:
    """The rows that the options ask for.

    Raises:
        NothingToShow: no ended run matches.
        StoreError: a stored file is unreadable.
    """
    tasks = [name for name in arguments.task.split(",") if name]
    rows = collect(arguments.results, sources=sources_hash(ROOT), tasks=tasks, experiment=arguments.experiment)
    if not rows:
        chosen = [f"task {arguments.task}"] if tasks else []
        chosen += [f"experiment {arguments.experiment}"] if arguments.experiment else []
        wanted = f" for {' and '.join(chosen)}" if chosen else ""
        raise NothingToShow(f"no finished run{wanted} below {arguments.results / 'runs'}; run `python run.py` first")
    return rows


def out_folder(arguments: argparse.Namespace) -> Path:
    """Where to write."""
    return Path(arguments.out) if arguments.out is not None else Path(arguments.results) / str(arguments.folder)


def load(options: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[Row]] | None:
    """Parse and select; None after one line on standard error where there is nothing to show."""
    arguments = options.parse_args(argv)
    try:
        return arguments, selected(arguments)
    except (NothingToShow, StoreError) as error:
        print(error, file=sys.stderr)
        return None
