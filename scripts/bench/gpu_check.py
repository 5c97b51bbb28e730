"""Kernels and steps on a GPU in one call: `make gpu-check` or `python -m scripts.bench.gpu_check --help`.

Needs torch, triton and transformers. First every kernel against its reference, then the steps that targets are set for,
then the kernels at real sizes. What fails or no longer fits the time is noted and the rest goes on; nothing is timed
that had a red check. The last line is JSON, whatever happens; rows go to results/gpu/*.csv as they are measured.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.bench.gpu_report import SPARE, Deadline, Report, told, watchdog

_STARTED = time.monotonic()
"""Of the process, as torch is imported later."""
PARTS = ("kernels", "steps", "ops")
_LIBRARIES = ("torch", "triton", "transformers")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts.

    Returns:
        The exit code: 0; 1 after a red check or where something could not be run; 2 without a GPU or a library, or for
        bad input.
    """
    started = _STARTED if argv is None else time.monotonic()
    options = _parser().parse_args(argv)
    options.parts = options.parts.split(",")
    if unknown := [name for name in options.parts if name not in PARTS]:
        return _refused(f"--parts={unknown[0]}: is not one of {', '.join(PARTS)}")
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        parts = _imported()
        parts.check(options)
    except (ImportError, ValueError) as error:
        return _refused(str(error))
    report = Report(
        Deadline(options.minutes, started, 2 * SPARE), None if options.interpret else options.results / "gpu/check.json"
    )
    timer = watchdog(report, started + 60 * options.minutes - SPARE - time.monotonic())
    try:
        (parts.interpreted if options.interpret else parts.measured)(options, report)
    except Exception as error:
        traceback.print_exc()
        report.problem(told(error))
    finally:
        timer.cancel()
        report.tell()
    return 1 if report.problems else 0


def _refused(text: str) -> int:
    print(f"gpu-check: {' '.join(text.split())}", file=sys.stderr)
    return 2


def _imported() -> Any:
    """The module that runs the parts, with all that it needs.

    Raises:
        ImportError: a library cannot be imported; says which and why.
    """
    for name in (*_LIBRARIES, "scripts.bench.gpu_parts"):
        try:
            found = importlib.import_module(name)
        except Exception as error:  # a broken library raises anything
            raise ImportError(f"{sys.executable} cannot import {name}: {type(error).__name__}: {error}") from error
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.gpu_check", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8, help="time that the call may take (default %(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default %(default)s)")
    parser.add_argument("--cases", default="", help="steps of these architectures only, comma-separated (default all)")
    parser.add_argument("--layers", type=int, help="decoder layers timed, where memory or time are short")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the CSV files")
    parser.add_argument("--interpret", action="store_true", help="kernels at tiny shapes in Triton's interpreter")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
