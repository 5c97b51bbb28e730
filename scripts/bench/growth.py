"""How the cost of a step grows with the context: dense and sparse, beside the byte limits (METHOD section 7).

All contexts lie in one cache, a row each, so that the arms of all contexts alternate in one process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.bench import checks, records
from scripts.bench.drafts import DraftShape
from scripts.bench.measure import Times, alternate, ratio
from scripts.bench.records import StepRow
from scripts.bench.setting import Setting, filled, prefilled
from scripts.bench.steps import Timed, call, row_of, timed
from scripts.figures.growth import figure

FILE = "growth.csv"
_AXES = ("dense", "sparse")


def run(setting: Setting, repeats: int, screen: Console) -> tuple[list[StepRow], dict[str, Any]]:
    """Check and time a step of one token and one of the first longer draft at every context, and print the table.

    Returns:
        The rows for the CSV file, and the growth from the shortest to the longest context for the last line.

    Raises:
        checks.Red: what would be timed is wrong.
        ValueError: fewer than two contexts, or the arms leave out dense or sparse.
    """
    if len(setting.contexts) < 2 or not set(_AXES) <= set(setting.axes):
        raise ValueError("--suite=growth: needs two contexts and the arms dense and sparse")
    contexts = setting.contexts
    source = prefilled(setting)
    caches = {name: filled(setting, name, contexts, source) for name in setting.steps}
    single = {name: filled(setting, name, contexts[:1], source) for name in setting.steps}
    checks.check_cell(setting, contexts[0], 1, single)
    longer = next((shape for shape in setting.shapes if shape.rows > 1), setting.shapes[0])
    shapes = dict.fromkeys((DraftShape("1", 1), longer))
    arms = [
        (row, context, timed(setting, axis, setting.axes[axis], shape, engine, context, 1, caches, row))
        for row, context in enumerate(contexts)
        for shape in shapes
        for axis in _AXES
        for engine in setting.timed
    ]
    calls = {
        f"{context} {arm.name}": call(setting, arm, context, 1, caches[arm.engine], row) for row, context, arm in arms
    }
    times = alternate(calls, setting.clock, repeats)
    rows = [row_of(setting, arm, context, 1, times[f"{context} {arm.name}"]) for _, context, arm in arms]
    return rows, _table([(context, arm) for _, context, arm in arms], contexts, times, rows, screen)


def _table(
    arms: list[tuple[int, Timed]], contexts: tuple[int, ...], times: Times, rows: list[StepRow], screen: Console
) -> dict[str, Any]:
    """Times by context, and the growth from the first to the last beside that of the bytes."""
    table = Table(title="one step, median ms (limit ms)", title_justify="left")
    for column in ("arm", *map(str, contexts), f"{contexts[-1]} / {contexts[0]}", "of the bytes"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    told: dict[str, Any] = {}
    for name in dict.fromkeys(arm.name for _, arm in arms):
        own = [row for (_, arm), row in zip(arms, rows, strict=True) if arm.name == name]
        cells = [f"{row.median_ms:.2f} ({row.limit_ms:.2f})" for row in own]
        spread = ratio(times, f"{contexts[-1]} {name}", f"{contexts[0]} {name}")
        limit = own[-1].bytes / own[0].bytes
        table.add_row(name, *cells, spread.text(3), f"{limit:.3f}")
        told[name] = [round(value, 4) for value in (spread.median, spread.p10, spread.p90, limit)]
    screen.print(table)
    return {"growth": told}


def draw(file: Path, folder: Path) -> dict[str, Any]:
    """The figure from the CSV file alone, as PNG and PDF; of the last call for each device, model and engine.

    Raises:
        RecordError: there is no such file, or it is of another version.
    """
    made = figure(records.latest(records.read(file, StepRow)))
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "pdf"):
        metadata = {"CreationDate": None} if suffix == "pdf" else None
        made.savefig(folder / f"growth.{suffix}", dpi=200, metadata=metadata)
    return {"figure": str(folder / "growth.png")}
