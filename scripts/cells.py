"""Cells of the tables: numbers as text, and text as Markdown or LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any
from unicodedata import category, normalize

from harness.evidence.labels import TIMES
from harness.evidence.rows import Difference, Estimate, Row

NOTHING = "\u2013"
MINUS = "\u2212"
ARROW = "\u2192"
CARVED = (
    "carved_moe: a dense model cut into experts without training; it orders policies, its quality says nothing about "
    "trained MoEs"
)
SHARED_NOTE = "shared: other work ran on the same cores: its times are unreliable, quality and fidelity are not"
SIMULATED_NOTE = (
    "simulated: something is masked instead of skipped, or read that a method would not read; fidelity is measured, "
    "time and bytes show no saving"
)

_PAGE = 20
_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    NOTHING: "--",
    MINUS: "$-$",
    TIMES: r"$\times$",
    ARROW: r"$\to$",
    "\u0394": r"$\Delta$",
    "\u2265": r"$\geq$",
    "\u2026": r"\ldots{}",
}


@dataclass(frozen=True, slots=True)
class Grid:
    """A table as text. Cells may hold line breaks, which Markdown does not keep; a rule follows each of `sections`."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[int] = frozenset()
    sections: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table of runs; an optional one is left out where it is empty in every row."""

    name: str
    cell: Callable[[Row], str]
    right: bool = True
    optional: bool = False

    def shown(self, rows: Sequence[Row]) -> bool:
        """Whether a table of these rows has the column."""
        return not self.optional or any(self.cell(row).strip(NOTHING) for row in rows)


def grids_of(rows: Sequence[Row], columns: Sequence[Column], title: str = "") -> list[Grid]:
    """One table for each model and device, a row for each run; `title` follows their names."""
    ordered = sorted(rows, key=lambda row: (row.model, row.device))
    grids = []
    for (model, device), group in groupby(ordered, key=lambda row: (row.model, row.device)):
        members = list(group)
        kept = [column for column in columns if column.shown(members)]
        body = tuple(tuple(column.cell(row) for column in kept) for row in members)
        right = frozenset(index for index, column in enumerate(kept) if column.right)
        sections = frozenset(i for i, (row, after) in enumerate(pairwise(members)) if row.task != after.task)
        grids.append(Grid(f"{model} on {device}{title}", tuple(column.name for column in kept), body, right, sections))
    return grids


def lines(*parts: str) -> str:
    """The parts that say something, one a line."""
    return "\n".join(part for part in parts if part)


def number(value: float | None, digits: int = 2, *, sign: bool = False) -> str:
    """A fixed number of digits, a true minus, a plus where `sign` asks for it, a dash for nothing."""
    if value is None:
        return NOTHING
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def estimate(value: Estimate, digits: int = 2, *, sign: bool = False, unit: str = "") -> str:
    """Value with its unit and, on a second line, its 95% interval."""
    if value.value is None:
        return NOTHING
    text = number(value.value, digits, sign=sign) + unit
    if value.ci is None:
        return text
    low, high = (number(bound, digits, sign=sign) for bound in value.ci)
    return f"{text}\n[{low}, {high}]"


def speedup(row: Row, name: str) -> str:
    """A speed-up with its interval and, on a third line, its factors: tokens per step and steps per second."""
    text = estimate(getattr(row, name))
    factors = row.split.get(name)
    if factors is None or factors.tokens_per_step.value is None or factors.steps_per_second.value is None:
        return text
    return f"{text}\n= {number(factors.tokens_per_step.value)}{TIMES}{number(factors.steps_per_second.value)}"


def difference(value: Difference, digits: int = 1, *, unit: str = "") -> str:
    """A difference with its interval and, on a third line, the smallest one that would have been detected."""
    text = estimate(value, digits, sign=True, unit=unit)
    return text if value.value is None or value.mdd is None else f"{text}\ndetects {number(value.mdd, digits)}"


def bounds(name: str, value: Estimate) -> dict[str, float | None]:
    """An estimate as plain numbers: name, name_low, name_high."""
    low, high = value.ci or (None, None)
    return {name: value.value, f"{name}_low": low, f"{name}_high": high}


def detectable(name: str, value: Difference) -> dict[str, float | None]:
    """A difference as plain numbers, with standard error, clusters and detectable difference."""
    rest = {"se": value.se, "clusters": value.clusters, "changed": value.changed, "mdd": value.mdd}
    return bounds(name, value) | {f"{name}_{key}": number for key, number in rest.items()}


def described(row: Row) -> dict[str, Any]:
    """Which run it is, as every CSV file says it."""
    return {
        "fingerprint": row.fingerprint,
        "task": row.task,
        "data": row.data,
        "model": row.model,
        "device": row.device,
        "setting": row.setting,
        "marks": ", ".join(row.marks),
    }


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of a CSV file with six digits."""
    return {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in values.items()}


def share(block: Mapping[str, float | None] | None) -> str:
    """Share of identical outputs in per cent."""
    value = (block or {}).get("identical")
    return NOTHING if value is None else f"{100 * value:.0f}%"


def place(block: Mapping[str, float | None] | None, arm: str) -> str:
    """Median index of the first differing token."""
    value = (block or {}).get(arm)
    return NOTHING if value is None else f"{value:.0f}"


def same(row: Row) -> str:
    """Identical outputs of sparse against dense and, in brackets, the noise floor; then where outputs part."""
    if row.divergence is None and row.noise_floor is None:
        return NOTHING
    return (
        f"{share(row.divergence)} ({share(row.noise_floor)})\n"
        f"at {place(row.divergence, 'sparse')} ({place(row.noise_floor, 'dense')})"
    )


def percent(value: float | None, digits: int = 1) -> str:
    """A share in per cent."""
    return NOTHING if value is None else f"{number(100 * value, digits)}%"


def change(before: float | None, after: float | None, digits: int = 2) -> str:
    """From the dense arm's number to the sparse arm's, on two lines."""
    values = [number(value, digits) for value in (before, after)]
    return NOTHING if values == [NOTHING, NOTHING] else f"{values[0]}\n{ARROW} {values[1]}"


def quality(row: Row) -> str:
    """Metric, dense value to sparse value."""
    values = [number(row.quality.get(arm), 1) for arm in ("dense", "sparse")]
    return NOTHING if values == [NOTHING, NOTHING] else f"{row.metric} {values[0]} {ARROW} {values[1]}"


def markdown(grid: Grid) -> str:
    """A GitHub-flavoured table under its title."""
    rule = ["---:" if index in grid.right else "---" for index in range(len(grid.header))]
    lines = [grid.header, tuple(rule), *grid.rows]
    body = "\n".join(
        "| " + " | ".join(" ".join(cell.split("\n")).replace("|", "\\|") for cell in line) + " |" for line in lines
    )
    return f"### {grid.title}\n\n{body}\n" if grid.title else f"{body}\n"


def escape(text: str) -> str:
    """Text that LaTeX prints as it stands, in ASCII: a letter that has none is told by its base, or else as ?."""
    return "".join(_LATEX.get(letter) or _ascii(letter) for letter in text)


def _ascii(letter: str) -> str:
    if letter.isspace():
        return " "
    plain = "".join(_LATEX.get(part, part) for part in normalize("NFKD", letter) if " " <= part <= "~")
    return plain or ("" if category(letter) in ("Mn", "Cf") else "?")


def latex(grid: Grid, notes: Sequence[str] = ()) -> str:
    """A `table*` in booktabs style, scaled to the text width, the notes below (needs booktabs and graphicx).

    More rows than fit on a page go on in further ones.
    """
    parts = [range(start, min(start + _PAGE, len(grid.rows))) for start in range(0, max(len(grid.rows), 1), _PAGE)]
    captions = [grid.title, *[f"{grid.title} (continued)"] * (len(parts) - 1)]
    told = [*[()] * (len(parts) - 1), tuple(notes)]
    return "\n".join(_latex_table(grid, *part) for part in zip(parts, captions, told, strict=True))


def _latex_table(grid: Grid, shown: range, caption: str, notes: Sequence[str]) -> str:
    columns = "".join("r" if index in grid.right else "l" for index in range(len(grid.header)))
    body = []
    for index in shown:
        body.append(_latex_line(grid, grid.rows[index]))
        body += [r"\midrule"] if index in grid.sections and index != shown[-1] else []
    return "\n".join(
        [
            r"\begin{table*}",
            r"\centering",
            rf"\caption{{{escape(caption)}}}",
            r"\resizebox{\textwidth}{!}{%",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            _latex_line(grid, grid.header, "b"),
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            *(rf"\par\smallskip{{\footnotesize {escape(note)}}}" for note in notes),
            r"\end{table*}",
            "",
        ]
    )


def _latex_line(grid: Grid, cells: Sequence[str], place: str = "t") -> str:
    return " & ".join(_latex_cell(cell, index in grid.right, place) for index, cell in enumerate(cells)) + r" \\"


def _latex_cell(cell: str, right: bool, place: str) -> str:
    """Lines stacked; a leading bracket is wrapped, as it would be read as an option of the line end before it."""
    parts = [escape(part) for part in cell.split("\n")]
    parts = [f"{{{part}}}" if part.startswith("[") else part for part in parts]
    stacked, side = r"\\".join(parts), "r" if right else "l"
    return stacked if len(parts) == 1 else rf"\begin{{tabular}}[{place}]{{@{{}}{side}@{{}}}}{stacked}\end{{tabular}}"
