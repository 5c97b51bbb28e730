"""The page: everything in one HTML file that asks no network for anything, and says so to the browser."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from harness.evidence.labels import FORCED, SIMULATED
from harness.evidence.rows import Row
from scripts import tables
from scripts.cells import NOTHING, number
from scripts.reporting import charts, overview, runs
from scripts.reporting.drawings import Drawing
from scripts.reporting.examples import Worst, worst
from scripts.reporting.grids import sections
from scripts.reporting.overview import Runs

FOLDER = Path(__file__).parent / "template"
MARKS = {
    "failed": "ended with an error, nothing was measured",
    "invalid": "a switched-on mechanism never ran, an output was empty or a clock was wrong, so numbers are withheld",
    "partial": "ended before all of its examples",
    "stale": "made by other sources than the present ones",
    SIMULATED: "something is masked instead of skipped, so time shows no saving",
    FORCED: "acceptance was chosen, not measured",
    "shared": "timed while others used the machine, so times are unreliable",
}
"""Mark of a row -> what it means to a reader."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the caller asks of the page.

    Attributes:
        title: of the page.
        sources: hash of the present sources.
        texts: whether outputs may be shown.
        examples: of a run to show for each reason.
        unfinished: folders of runs that have not ended.
    """

    title: str
    sources: str
    texts: bool = True
    examples: int = 3
    unfinished: int = 0


def render(rows: Sequence[Row], stored: Runs, drawings: Sequence[Drawing], settings: Settings) -> str:
    """The whole page; the same results give the same bytes.

    Args:
        stored: at least the runs of `rows`, by fingerprint.
    """
    environment, found = _environment(), _worst(rows, stored, settings)
    script = environment.get_template("page.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    columns = runs.columns(rows, stored)
    return environment.get_template("page.html").render(
        settings=settings,
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'",
        rows=rows,
        facts=overview.facts(rows, stored),
        glance=overview.glance(rows, stored),
        origins=overview.origins(rows, stored),
        packages=overview.packages(rows, stored),
        commands=overview.commands(rows, stored),
        trouble=overview.trouble(rows),
        stale=[row for row in rows if row.stale],
        marked=sorted({mark for row in rows for mark in row.marks}),
        sections=sections(rows),
        footnotes=tables.footnotes(rows),
        drawings=drawings,
        columns=columns,
        details=runs.details(rows, stored, columns),
        worst=found,
        without=sum(row.counted for row in rows) - len(found),
    )


def _worst(rows: Sequence[Row], stored: Runs, settings: Settings) -> list[Worst]:
    found = [worst(row, stored[row.fingerprint], most=settings.examples, texts=settings.texts) for row in rows]
    return [item for item in found if item is not None]


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "lines": lambda text: text.split("\n"), "minute": overview.minute}
    environment.globals |= {
        "NOTHING": NOTHING,
        "MARKS": MARKS,
        "TALL": charts.TALL,
        "BAR": charts.BAR,
        "STACK": charts.STACK,
    }
    return environment
