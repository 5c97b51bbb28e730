"""How far sweeps are, from results/ alone: python -m scripts.status [SWEEP] [--results DIR] [--json].

Without a name, a line for each sweep with the number of its members in each state; with one (its start is enough), a
line for each member. Exit code 0 where every member is done, 1 where one is not, 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.evidence import StoreError, sources_hash
from harness.evidence.sweeps import STATES, MemberState, Sweep, counts, load_sweeps, states

ROOT = Path(__file__).resolve().parents[1]
_WIDTH, _COMMAND = 160, 70


class BadInput(ValueError):
    """What was asked for is not there; one line that names it and what to choose."""


def chosen(results: Path, name: str | None) -> list[Sweep]:
    """The sweeps below `results`, or the one whose title starts with `name`.

    Raises:
        BadInput: there is none, or the name fits several.
        StoreError: a manifest is unreadable.
    """
    found = load_sweeps(results)
    if not found:
        raise BadInput(f"--results={results}: holds no sweep; start one with `python run.py -m key=value,value`")
    if name is None:
        return found
    fitting = [sweep for sweep in found if sweep.title == name] or [
        sweep for sweep in found if sweep.title.startswith(name)
    ]
    if len(fitting) != 1:
        titles = ", ".join(sweep.title for sweep in fitting or found)
        raise BadInput(f"{name}: {'several sweeps start so' if fitting else 'no such sweep'}; choose one of {titles}")
    return fitting


def varied(members: Sequence[MemberState]) -> list[str]:
    """The overrides of each member that not all members share, on one line."""
    shared = set.intersection(*(set(member.overrides) for member in members))
    return [" ".join(text for text in member.overrides if text not in shared) for member in members]


def sweeps_table(found: Sequence[tuple[Sweep, list[MemberState]]]) -> Table:
    """One row for each sweep."""
    table = Table("sweep")
    for state in STATES:
        table.add_column(state, justify="right")
    table.add_column("command")
    for sweep, members in found:
        numbers = (str(count) if count else "" for count in counts(members).values())
        table.add_row(sweep.title, *numbers, Text(textwrap.shorten(sweep.command, _COMMAND, placeholder=" ...")))
    return table


def members_table(members: Sequence[MemberState]) -> Table:
    """One row for each member of a sweep."""
    table = Table("overrides", "run", "state")
    table.add_column("examples", justify="right")
    table.add_column("reason")
    for member, text in zip(members, varied(members), strict=True):
        cells = (text, member.fingerprint or "", member.state, str(member.examples), member.reason or "")
        table.add_row(*map(Text, cells))
    return table


def plain(sweep: Sweep, members: Sequence[MemberState]) -> dict[str, Any]:
    """What --json prints of a sweep."""
    return {
        "sweep": sweep.title,
        "command": sweep.command,
        "counts": counts(members),
        "members": [asdict(member) for member in members],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table or, with --json, one JSON document; returns the exit code."""
    options = argparse.ArgumentParser(prog="python -m scripts.status", description="How far sweeps are.")
    options.add_argument("sweep", nargs="?", default=None, help="a sweep's name, or its start; without, all sweeps")
    options.add_argument("--results", type=Path, default=Path("results"), help="folder that holds sweeps/ (results)")
    options.add_argument("--json", action="store_true", help="print JSON")
    arguments = options.parse_args(argv)
    try:
        sources = sources_hash(ROOT)
        found = [(sweep, states(sweep, sources)) for sweep in chosen(arguments.results, arguments.sweep)]
    except (BadInput, StoreError) as error:
        print(error, file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    if arguments.json:
        shown = [plain(sweep, members) for sweep, members in found]
        print(json.dumps(shown if arguments.sweep is None else shown[0], indent=1, ensure_ascii=False))
    elif arguments.sweep is None:
        console.print(sweeps_table(found))
    else:
        (sweep, members), *_ = found
        console.print(f"{sweep.title}: {sweep.command}", highlight=False, markup=False)
        console.print(members_table(members))
    return 0 if all(member.state == "done" for _, members in found for member in members) else 1


if __name__ == "__main__":
    sys.exit(main())
