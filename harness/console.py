"""What a person sees of a run: a progress bar on a terminal, a table at the end, notes on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


def note(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int, done: int) -> Iterator[Callable[[], None]]:
    """A progress bar over examples on standard error; silent where that is not a terminal.

    Yields:
        A function to call after each example.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    screen = Console(stderr=True)
    with Progress(*columns, console=screen, disable=not screen.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=total, completed=done)
        yield lambda: bar.advance(task)


def show(summary: Mapping[str, Any]) -> None:
    """Print the arms of a run as a table, and its reason and notes below."""
    title = f"{summary['task']} - {summary['model']} - {summary['device']} - {summary['examples']} examples"
    table = Table(title=f"{title} - {summary['status']}", title_justify="left")
    names = list(summary["metrics"])
    for column in (
        "arm",
        "tokens/s",
        "acceptance length",
        "step ms",
        "read: attention",
        "ffn",
        "experts",
        "of limit",
        *names,
    ):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm, values in summary["arms"].items():
        table.add_row(arm, *_cells(values), *(_number(values["quality"].get(name), 1) for name in names))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for name, compared in (summary["compare"] or {}).items():
        if isinstance(compared, Mapping) and compared.get("speedup") is not None:
            low_high = compared.get("ci95")
            interval = f" [{low_high[0]:.2f}, {low_high[1]:.2f}]" if low_high else ""
            console.print(f"{name.replace('_', ' ')}: {compared['speedup']:.2f}x{interval}", highlight=False)
    fidelity = (summary["compare"] or {}).get("fidelity") or {}
    if fidelity.get("agreement") is not None:
        flips = fidelity["accept_flips"]
        other = "" if flips is None else f", {flips:.1%} of the steps accept another length"
        console.print(
            f"fidelity on the dense trajectory: agreement {fidelity['agreement']:.3f}, KL {fidelity['kl']:.4f} nats"
            f"{other} ({fidelity['tokens']:.0f} tokens)",
            highlight=False,
        )
    for line in filter(None, [summary["reason"], *summary["notes"]]):
        console.print(str(line), highlight=False, markup=False)


def _cells(values: Mapping[str, Any]) -> list[str]:
    return [
        _number(values["tokens_per_second"], 1),
        _number((values["acceptance_length"] or {}).get("pooled"), 2),
        _number((values["step_ms"] or {}).get("p50"), 1),
        *(_number((values["density"] or {}).get(axis), 2) for axis in ("attention", "ffn", "experts")),
        _number(values["roofline_fraction"], 2),
    ]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
