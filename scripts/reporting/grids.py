"""The tables of `scripts.tables` with what must be read beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.evidence.rows import Row
from scripts import budget_table, draft_table, tables
from scripts.cells import Grid


@dataclass(frozen=True, slots=True)
class Section:
    """Tables under one heading: `above` says what is counted, `legend` what the columns mean."""

    anchor: str
    title: str
    grids: tuple[Grid, ...]
    legend: str
    above: str = ""


def sections(rows: Sequence[Row]) -> list[Section]:
    """Every table that the rows allow, the paper-shaped one first."""
    found = [
        Section("reference", "Reference beside measured", (tables.reference_grid(rows),), tables.QUOTED),
        Section("results", "Results", tuple(tables.results_grids(rows)), tables.LEGEND),
        Section("budgets", "Density, fidelity and time", tuple(budget_table.grids(rows)), budget_table.LEGEND),
        Section("drafters", "Drafters", tuple(draft_table.grids(rows)), draft_table.LEGEND, draft_table.HEAD),
    ]
    return [section for section in found if section.grids]
