"""Tables from stored results alone, on the screen and as Markdown and LaTeX: `python -m scripts.tables`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.evidence.labels import TIMES
from harness.evidence.rows import Row
from harness.evidence.store import write_table, write_text
from scripts import budget_table, cells, common, draft_table, hybrid_table, results_table
from scripts.cells import NOTHING, Grid, lines

QUOTED = (
    "Reference: as quoted by a public summary of arXiv 2512.21911, with other models, drafters and machines; "
    "not verified. Ours: speed-up of decoding over AR, quality in points against dense verification. "
    "Cells that were not measured stay empty."
)
LEGEND = results_table.LEGEND
UNSTATED = "not stated"
SCREEN_WIDTH = 160
WIDE = 145


@dataclass(frozen=True, slots=True)
class Reference:
    """One quoted row of METHOD section 6."""

    label: str
    task: str
    model: str
    speculative: str
    sparse: str
    gain: str
    quality: str


REFERENCES = (
    Reference("summarisation, XSum", "xsum", "LLaMA-7B", "1.8", "2.4", "+33%", f"{cells.MINUS}0.2% ROUGE"),
    Reference("question answering, SQuAD", "squad", "MoE-GLaM-1.2B", "2.1", "2.9", "+38%", f"{cells.MINUS}0.1% EM"),
    Reference("maths, MATH", "math", "LLaMA-13B", "1.6", "2.2", "+38%", f"{cells.MINUS}0.3% accuracy"),
)


def results_grids(rows: Sequence[Row], *, compact: bool = False) -> list[Grid]:
    """Speed and quality of every run (see `results_table`)."""
    return results_table.grids(rows, compact=compact)


def reference_grid(rows: Sequence[Row], *, compact: bool = False) -> Grid:
    """The paper-shaped table: what was quoted and, below each row, every setting of that task that was measured.

    Runs of forced acceptance are left out: their speed-up follows from a number that was chosen. `compact` stacks the
    columns that say what was measured.
    """
    what: tuple[str, ...] = ("task", "source", "model", "machine", "data and setting")
    header = ("speculative\n/ AR", "sparse\n/ AR", "gain", "quality")
    body: list[tuple[str, ...]] = []
    ends = []
    for quoted in REFERENCES:
        ratios = [f"{value}{TIMES}" for value in (quoted.speculative, quoted.sparse)]
        body.append((quoted.label, "quoted", quoted.model, UNSTATED, NOTHING, *ratios, quoted.gain, quoted.quality))
        measured = [row for row in rows if row.task_name == quoted.task and not row.forced]
        body += [_measured(row) for row in measured] or [("", "not measured", *[NOTHING] * 7)]
        ends.append(len(body) - 1)
    if compact:
        body = [(lines(*(part for part in line[:5] if part not in (NOTHING, UNSTATED))), *line[5:]) for line in body]
        what = ("source",)
    right = frozenset(range(len(what), len(what) + 3))
    title = "Reference as quoted beside what was measured"
    return Grid(title, (*what, *header), tuple(body), right, frozenset(ends[:-1]))


def _measured(row: Row) -> tuple[str, ...]:
    marks = f" ({', '.join(row.marks)})" if row.marks else ""
    gain = row.sparse_vs_dense.value
    return (
        "",
        f"measured{marks}",
        row.model,
        row.device,
        f"{row.data}, n={row.examples}\n{row.setting}",
        cells.estimate(row.dense_vs_ar, unit=TIMES),
        cells.estimate(row.sparse_vs_ar, unit=TIMES),
        NOTHING if gain is None else f"{cells.number(100 * (gain - 1), 0, sign=True)}%",
        cells.difference(row.delta, unit=f" {row.metric}"),
    )


def reference_numbers(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The same as plain numbers; what was quoted as it stands, a mapping for each line."""
    told: list[dict[str, Any]] = []
    for quoted in REFERENCES:
        told.append(
            {
                "reference": quoted.label,
                "source": "quoted",
                "model": quoted.model,
                "dense_vs_ar": quoted.speculative,
                "sparse_vs_ar": quoted.sparse,
                "gain": quoted.gain.replace(cells.MINUS, "-"),
                "quality": quoted.quality.replace(cells.MINUS, "-"),
            }
        )
        told += [_measured_numbers(quoted, row) for row in rows if row.task_name == quoted.task and not row.forced]
    keys = dict.fromkeys(key for line in told for key in line)
    return [{key: line.get(key) for key in keys} for line in told]


def _measured_numbers(quoted: Reference, row: Row) -> dict[str, Any]:
    gain = row.sparse_vs_dense.value
    numbers = {
        "reference": quoted.label,
        "source": "measured",
        **cells.described(row),
        "examples": row.examples,
        **cells.bounds("dense_vs_ar", row.dense_vs_ar),
        **cells.bounds("sparse_vs_ar", row.sparse_vs_ar),
        "gain": None if gain is None else 100 * (gain - 1),
        "quality": row.metric,
        **cells.detectable("quality_difference", row.delta),
    }
    return cells.plain(numbers)


def footnotes(rows: Sequence[Row]) -> list[str]:
    """What the marks mean, with the reason of every run whose numbers are withheld and the runs' notes."""
    lines = [f"{row.task}, {row.setting}: {row.status}, {row.reason}" for row in rows if row.reason]
    lines += _cautions(rows)
    if any(row.stale for row in rows):
        lines.append("stale: made by other sources than the present ones; run again to refresh.")
    return lines + list(dict.fromkeys(f"{row.task}: {note}" for row in rows for note in row.notes))


def _cautions(rows: Sequence[Row]) -> list[str]:
    """What carved, simulated, shared and forced runs do not say."""
    told = [cells.CARVED] if any(row.carved for row in rows) else []
    told += [cells.SIMULATED_NOTE] if any(row.simulated for row in rows) else []
    told += [cells.SHARED_NOTE] if not all(row.exclusive for row in rows) else []
    return told + draft_table.cautions(rows)


def render(grid: Grid) -> Table:
    """A grid for the screen."""
    table = Table(
        title=grid.title, box=SIMPLE, title_justify="left", title_style="bold", pad_edge=False, padding=(0, 1, 0, 0)
    )
    for index, name in enumerate(grid.header):
        right = index in grid.right
        table.add_column(name, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for index, line in enumerate(grid.rows):
        table.add_row(*(Text(cell) for cell in line), end_section=index in grid.sections)
    return table


def show(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print the result tables, the paper-shaped table where a task of it was measured, and what the columns mean."""
    console = console or Console(width=None if sys.stdout.isatty() else SCREEN_WIDTH, highlight=False)
    compact = console.width < WIDE
    blocks = [("", results_grids(rows, compact=compact), LEGEND)]
    if any(row.counted for row in rows):
        blocks.append(("", budget_table.grids(rows, compact=compact), budget_table.LEGEND))
    blocks.append(("", hybrid_table.grids(rows, compact=compact), hybrid_table.LEGEND))
    blocks.append((draft_table.HEAD, draft_table.screen_grids(rows, compact=compact), draft_table.LEGEND))
    for head, grids, legend in blocks:
        if grids:
            console.print(Text(head))
            for grid in grids:
                console.print(render(grid))
            console.print(Text(legend, style="dim"))
    for line in footnotes(rows):
        console.print(Text(line, style="yellow"))
    if any(row.task_name == quoted.task for row in rows for quoted in REFERENCES):
        console.print()
        console.print(render(reference_grid(rows, compact=compact)))
        console.print(Text(QUOTED, style="dim"))


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write results, budgets and reference to `folder`, each as .md, .tex and .csv and atomically.

    Where there are hybrids or drafters to compare, hybrid.* and drafters.* too.
    """
    quoted, sources = reference_grid(rows), [QUOTED, *_cautions([row for row in rows if not row.forced])]
    notes = footnotes(rows)
    texts = _texts("results", results_grids(rows), [LEGEND, *notes])
    texts |= _texts("budgets", budget_table.grids(rows), [budget_table.LEGEND, *notes])
    texts |= _texts("reference", [quoted], sources)
    plain = {"results": results_table.table(rows), "budgets": budget_table.table(rows)}
    plain["reference"] = reference_numbers(rows)
    mixed = hybrid_table.grids(rows)
    if mixed:
        texts |= _texts("hybrid", mixed, [hybrid_table.LEGEND, *notes])
        plain["hybrid"] = hybrid_table.table(rows)
    drafters = draft_table.grids(rows)
    if drafters:
        texts |= _texts("drafters", drafters, [draft_table.LEGEND, *notes], head=draft_table.HEAD)
        plain["drafters"] = draft_table.table(rows)
    for name, text in texts.items():
        write_text(folder / name, text)
    for name, numbers in plain.items():
        write_table(folder / f"{name}.csv", numbers)
    return [folder / name for name in (*texts, *(f"{name}.csv" for name in plain))]


def _texts(name: str, grids: Sequence[Grid], notes: Sequence[str], *, head: str = "") -> dict[str, str]:
    """The Markdown and the LaTeX file of some tables and their notes; `head` goes above, in LaTeX before the notes."""
    preamble = "% needs \\usepackage{booktabs,graphicx}\n"
    above = [head] if head else []
    texts = [*(f"{text}\n" for text in above), *(cells.markdown(grid) for grid in grids)]
    return {
        f"{name}.md": "\n".join([*texts, *(f"{note}\n" for note in notes)]),
        f"{name}.tex": preamble
        + "\n".join(cells.latex(grid, [*above, *notes] if grid is grids[-1] else ()) for grid in grids),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print and write the tables; 2 where there is nothing to show."""
    loaded = common.load(common.parser("scripts.tables", "Tables from stored results alone.", "tables"), argv)
    if loaded is None:
        return 2
    arguments, rows = loaded
    show(rows)
    for file in write(rows, common.out_folder(arguments)):
        print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
