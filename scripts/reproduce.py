"""Everything behind the project's results in one command: `python -m scripts.reproduce --scale small --data DIR`.

Says first how long it will take. Runs that are finished are not run again, so the same command goes on after a crash.
Afterwards tables, figures and the report are drawn from what is stored.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from harness.engine.model.carving import default_path
from harness.engine.model.eagle3 import WEIGHTS
from harness.engine.model.loading import cache_dir
from harness.evidence import provenance
from harness.evidence.store import write_text
from scripts.common import ROOT
from scripts.reproducing.stages import SCALES, Data, DataError, Stage, command, stages

BAD_INPUT, INTERRUPTED = 2, 130
TAKEN = 0.55
"""Share that stages took of the time in which every answer is as long as it may be: results/small/reproduce.json."""


@dataclass(frozen=True, slots=True)
class Foreseen:
    """What a stage will do: its members, examples that are not stored yet, and seconds."""

    members: int
    missing: int
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """Foresee, run, draw; 0 where all went well, 1 where a stage failed, 2 for bad input."""
    options = _parser().parse_args(argv)
    results = options.results or Path("results") / options.scale
    more = [*options.overrides, f"results_dir={results}"]
    try:
        data = _data(options)
        head = cache_dir() / "eagle3" / options.model / WEIGHTS[0]
        found = stages(options.scale, data, options.model, default_path(), head, options.train)
    except DataError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return BAD_INPUT
    found = [one for one in found if one.makes is None or not one.makes.exists()]
    foreseen = _foresee(found, more)
    if foreseen is None:
        return BAD_INPUT
    _show(found, foreseen)
    if options.estimate:
        return 0
    code = _run(found, foreseen, more, results, options.scale)
    return max(code, _draw(results, without_texts=data.folder is not None or data.source == "hub"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.reproduce", description=__doc__.partition("\n")[0])
    parser.add_argument("--scale", choices=SCALES, default="smoke", help="how much is run (%(default)s)")
    parser.add_argument("--data", type=Path, help="folder with the tasks' files; without it the bundled samples")
    parser.add_argument("--source", choices=("bundled", "hub"), default="bundled", help="where there is no --data")
    parser.add_argument("--train", nargs="+", type=Path, default=[], help="texts for the EAGLE-3 head of scale=full")
    parser.add_argument("--model", default="smollm2", help="choice of the model group (%(default)s)")
    parser.add_argument("--results", type=Path, help="folder to write to (results/<scale>)")
    parser.add_argument("--estimate", action="store_true", help="say how long it would take, and stop")
    parser.add_argument("overrides", nargs="*", help="further overrides of every run, as in track=none")
    return parser


def _data(options: argparse.Namespace) -> Data:
    """Raises DataError where the folder, or a text, is not there."""
    if absent := [str(file) for file in options.train if not file.exists()]:
        raise DataError(f"--train {absent[0]}: no such file")
    if options.data is not None and not options.data.is_dir():
        raise DataError(f"--data {options.data}: no such folder")
    return Data(options.source, options.data)


def _foresee(found: Sequence[Stage], more: Sequence[str]) -> list[Foreseen | None] | None:
    """A dry run of every stage, None for one that waits for what another makes; None after the line of a bad one."""
    told: list[Foreseen | None] = []
    made = False
    with Console(stderr=True).status("estimating"):
        for one in found:
            if not one.overrides:
                told.append(Foreseen(0, 0, one.seconds))
                made = True
                continue
            shown = io.StringIO()
            with contextlib.redirect_stdout(shown):
                code = in_process([*one.overrides, *more, "dry_run=true"], quiet=made)
            if code and not made:
                return None
            lines = [line for line in shown.getvalue().splitlines() if line.startswith("{")]
            told.append(None if code else _total([json.loads(line) for line in lines]))
    return told


def in_process(overrides: Sequence[str], *, quiet: bool = False) -> int:
    """The exit code of run.py with these overrides, run in this process: stages share prefilled prompts.

    Args:
        quiet: swallow standard error: what an earlier stage makes may still be missing.
    """
    errors = contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext()
    before = sys.argv
    sys.argv = [str(ROOT / "run.py"), *overrides]
    try:
        with errors:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        sys.argv = before
    return 0


def _total(members: Sequence[Mapping[str, Any]]) -> Foreseen:
    seconds = sum(float(member["expected_seconds"]) for member in members)
    return Foreseen(len(members), sum(int(member["missing"]) for member in members), TAKEN * seconds)


def _show(found: Sequence[Stage], foreseen: Sequence[Foreseen | None]) -> None:
    """The stages and how long each is expected to take, on the screen before anything starts."""
    table = Table(title="to be run", title_justify="left")
    for name in ("stage", "what", "members", "examples", "minutes"):
        table.add_column(name, justify="left" if name in ("stage", "what") else "right")
    for one, will in zip(found, foreseen, strict=True):
        counts = (str(will.members), str(will.missing)) if will and one.overrides else ("", "")
        table.add_row(one.name, one.what, *counts, f"{will.seconds / 60:.1f}" if will else "not known yet")
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    unknown = sum(will is None for will in foreseen)
    more = f", and {unknown} stages that wait for others" if unknown else ""
    print(f"expected: {sum(will.seconds for will in foreseen if will) / 60:.0f} minutes{more}", flush=True)


def _run(
    found: Sequence[Stage], foreseen: Sequence[Foreseen | None], more: Sequence[str], results: Path, scale: str
) -> int:
    """All stages, one after the other; a failed one does not stop the others. Writes <results>/reproduce.json."""
    code, told, start = 0, [], time.monotonic()
    for one, will in zip(found, foreseen, strict=True):
        began = time.monotonic()
        print(f"{one.name}: {one.what}", flush=True)
        ended = in_process([*one.overrides, *more]) if one.overrides else _module(one.module)
        code = max(code, int(ended != 0))
        row = {"stage": one.name, "command": provenance.scrub(command(one, more)), "exit_code": ended}
        row["expected_seconds"] = round(will.seconds) if will else None
        told.append({**row, "seconds": round(time.monotonic() - began)})
        record = {"scale": scale, "stages": told, "seconds": round(time.monotonic() - start)}
        write_text(results / "reproduce.json", json.dumps(record | _origin(), indent=1) + "\n")
        if ended in (INTERRUPTED, -signal.SIGINT):
            raise SystemExit(INTERRUPTED)
    return code


def _origin() -> dict[str, Any]:
    return {"git": provenance.git_state(ROOT), "sources": provenance.sources_hash(ROOT), "end": provenance.now()}


def _draw(results: Path, *, without_texts: bool) -> int:
    """Tables, figures and the report of what is stored."""
    code = 0
    for name, more in (("plots", ()), ("tables", ()), ("report", ("--without-texts",) if without_texts else ())):
        code = max(code, int(_module([f"scripts.{name}", "--results", str(results), *more]) != 0))
    return code


def _module(words: Sequence[str]) -> int:
    """The exit code of another program of this project, in a process of its own."""
    return subprocess.run([sys.executable, "-m", *words], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
