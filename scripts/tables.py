"""Tables from stored results alone, on the screen and as Markdown and LaTeX: `python -m scripts.tables`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.evidence.labels import TIMES
from harness.evidence.rows import Row
from harness.evidence.store import write_table, write_text
from scripts import budget_table, cells, common, draft_table
from scripts.cells import ARROW, NOTHING, Column, Grid, grids_of, lines

LEGEND = (
    "Ratios are decoding throughputs (prefill left out) with 95% intervals over examples (BCa bootstrap, by cluster). "
    "limit: the most sparse/dense could be, bytes of a dense step over bytes of a sparse step. "
    "of peak: least time of a step on this machine's measured peaks over its time, dense above sparse; c where "
    "arithmetic sets that limit instead of memory traffic. "
    "AL: new tokens per verification of the sparse arm. "
    "same: outputs identical to dense and median token where they part; in brackets the noise floor, dense against AR."
)
QUOTED = (
    "Reference: as quoted by a public summary of arXiv 2512.21911, with other models, drafters and machines; "
    "not verified. Ours: speed-up of decoding over AR, quality in points against dense verification. "
    "Cells that were not measured stay empty."
)
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


FULL = (
    Column("task\ndata", lambda row: lines(row.task, f"({row.data})"), right=False),
    Column("setting", lambda row: lines(row.setting, _kept(row)), right=False),
    Column("n", lambda row: str(row.examples)),
    Column("prompt\ntokens", lambda row: cells.number(row.prompt_tokens, 0)),
    Column("AL", lambda row: cells.number(row.acceptance)),
    Column("AR\ntok/s", lambda row: cells.number(row.tokens_per_second.get("ar"), 1)),
    Column("dense\n/ AR", lambda row: cells.estimate(row.dense_vs_ar)),
    Column("sparse\n/ AR", lambda row: cells.estimate(row.sparse_vs_ar)),
    Column("sparse\n/ dense", lambda row: cells.estimate(row.sparse_vs_dense)),
    Column("limit", lambda row: cells.number(row.limit)),
    Column("of\npeak", lambda row: lines(*(_of_peak(row, arm) for arm in ("dense", "sparse"))), optional=True),
    Column("sparse AR\n/ AR", lambda row: cells.estimate(row.sparse_ar_vs_ar), optional=True),
    Column(f"quality dense {ARROW} sparse\nand difference", lambda row: _quality(row), right=False),
    Column("same\n(floor)", cells.same, right=False),
    Column("mark", lambda row: "\n".join(row.marks), right=False, optional=True),
)
COMPACT = (
    Column("task\nsetting", lambda row: lines(row.task, row.setting, *row.marks), right=False),
    Column("n\nprompt", lambda row: lines(str(row.examples), cells.number(row.prompt_tokens, 0))),
    Column("AL", lambda row: cells.number(row.acceptance)),
    *FULL[6:10],
    Column(
        f"quality dense\n{ARROW} sparse\nand difference", lambda row: _quality(row).replace(" ", "\n", 1), right=False
    ),
)


def results_grids(rows: Sequence[Row], columns: Sequence[Column] = FULL) -> list[Grid]:
    """One table for each model and device, a row for each task and setting."""
    return grids_of(rows, columns)


def _kept(row: Row) -> str:
    return f"({row.kept_tokens} tokens)" if row.kept_tokens is not None else ""


def _of_peak(row: Row, arm: str) -> str:
    fraction = row.roofline(arm)
    if fraction is None:
        return ""
    return f"{100 * fraction:.0f}%" + (" c" if row.bound(arm) == "compute" else "")


def _quality(row: Row) -> str:
    values = cells.quality(row)
    difference = cells.estimate(row.delta, 1, sign=True).replace("\n", " ")
    return values if difference == NOTHING else f"{values}\n{difference}"


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
        cells.estimate(row.delta, 1, sign=True, unit=f" {row.metric}"),
    )


def footnotes(rows: Sequence[Row]) -> list[str]:
    """What the marks mean, with the reason of every run whose numbers are withheld and the runs' notes."""
    lines = [f"{row.task}, {row.setting}: {row.status}, {row.reason}" for row in rows if row.reason]
    lines += _cautions(rows)
    if any(row.stale for row in rows):
        lines.append("stale: made by other sources than the present ones; run again to refresh.")
    return lines + list(dict.fromkeys(f"{row.task}: {note}" for row in rows for note in row.notes))


def _cautions(rows: Sequence[Row]) -> list[str]:
    """What carved, simulated and forced runs do not say."""
    told = [cells.CARVED] if any(row.carved for row in rows) else []
    told += [cells.SIMULATED_NOTE] if any(row.simulated for row in rows) else []
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
    for grid in results_grids(rows, COMPACT if compact else FULL):
        console.print(render(grid))
    console.print(Text(LEGEND, style="dim"))
    if any(row.counted for row in rows):
        console.print()
        for grid in budget_table.grids(rows, compact=compact):
            console.print(render(grid))
        console.print(Text(budget_table.LEGEND, style="dim"))
    drafters = draft_table.screen_grids(rows, compact=compact)
    if drafters:
        console.print()
        console.print(Text(draft_table.HEAD))
        for grid in drafters:
            console.print(render(grid))
        console.print(Text(draft_table.LEGEND, style="dim"))
    for line in footnotes(rows):
        console.print(Text(line, style="yellow"))
    if any(row.task_name == quoted.task for row in rows for quoted in REFERENCES):
        console.print()
        console.print(render(reference_grid(rows, compact=compact)))
        console.print(Text(QUOTED, style="dim"))


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write results, budgets and reference as .md and .tex, and budgets.csv, to `folder`, each atomically.

    Where there are drafters to compare, drafters.md, .tex and .csv too.
    """
    quoted, sources = reference_grid(rows), [QUOTED, *_cautions([row for row in rows if not row.forced])]
    notes = footnotes(rows)
    texts = _texts("results", results_grids(rows), [LEGEND, *notes])
    texts |= _texts("budgets", budget_table.grids(rows), [budget_table.LEGEND, *notes])
    texts |= _texts("reference", [quoted], sources)
    plain = {"budgets.csv": budget_table.table(rows)}
    drafters = draft_table.grids(rows)
    if drafters:
        texts |= _texts("drafters", drafters, [draft_table.LEGEND, *notes], head=draft_table.HEAD)
        plain["drafters.csv"] = draft_table.table(rows)
    for name, text in texts.items():
        write_text(folder / name, text)
    for name, numbers in plain.items():
        write_table(folder / name, numbers)
    return [folder / name for name in (*texts, *plain)]


def _texts(name: str, grids: Sequence[Grid], notes: Sequence[str], *, head: str = "") -> dict[str, str]:
    """The Markdown and the LaTeX file of some tables and their notes; `head` goes above, in LaTeX before the notes."""
    preamble = "% needs \\usepackage{booktabs,graphicx}\n"
    above = [head] if head else []
    texts = [*(f"{text}\n" for text in above), *(cells.markdown(grid) for grid in grids)]
    return {
        f"{name}.md": "\n".join([*texts, *(f"{note}\n" for note in notes)]),
        f"{name}.tex": preamble + "\n".join(cells.latex(grid, [*above, *notes]) for grid in grids),
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
