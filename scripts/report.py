"""One self-contained page from stored results alone: `python -m scripts.report`, or `make report`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.evidence import load_runs, sources_hash
from harness.evidence.labels import name_of
from harness.evidence.store import write_text
from scripts import common
from scripts.reporting.drawings import drawings
from scripts.reporting.page import Settings, render

FILE = "report.html"
EXAMPLES = 3


def _parser() -> argparse.ArgumentParser:
    about = "One self-contained HTML page from stored results alone."
    options = common.parser("scripts.report", about, FILE, kind="file")
    options.add_argument("--title", default="", help="of the page (Sparse verification: <results>)")
    options.add_argument(
        "--examples", type=int, default=EXAMPLES, help=f"worst examples of each run, for each reason ({EXAMPLES})"
    )
    options.add_argument(
        "--without-texts", action="store_true", help="no outputs: grades and places alone, for data that is not yours"
    )
    return options


def _unfinished(arguments: argparse.Namespace) -> int:
    """Folders of runs that have not ended; of an experiment none are counted."""
    if arguments.experiment:
        return 0
    tasks = [name for name in arguments.task.split(",") if name]
    open_runs = [run for run in load_runs(arguments.results) if run.summary is None]
    return sum(not tasks or name_of(run.config, "task") in tasks for run in open_runs)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; 2 where there is nothing to show or an option is wrong."""
    loaded = common.load(_parser(), argv)
    if loaded is None:
        return 2
    arguments, rows = loaded
    out: Path = common.out_folder(arguments)
    if arguments.examples < 0:
        print(f"--examples {arguments.examples} is no number of examples; give 0 or more", file=sys.stderr)
        return 2
    if out.is_dir():
        print(f"--out {out} is a folder; name a file such as {out / FILE}", file=sys.stderr)
        return 2
    settings = Settings(
        title=arguments.title or f"Sparse verification: {arguments.results.resolve().name}",
        sources=sources_hash(common.ROOT),
        texts=not arguments.without_texts,
        examples=arguments.examples,
        unfinished=_unfinished(arguments),
    )
    stored = {run.fingerprint: run for run in load_runs(arguments.results)}
    write_text(out, render(rows, stored, drawings(rows), settings))
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
