"""Several axes at once beside each of them alone: what a hybrid saves, and what it costs in fidelity and quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.evidence.labels import GROUPS, flatten, identity, name_of
from harness.evidence.rows import Row
from scripts import cells
from scripts.cells import ARROW, NOTHING, Column, Grid, change, estimate, lines, number

TITLE = ": hybrids"
LEGEND = (
    "Each setting with several sparse axes, and below it each of them alone with the same values and everything else "
    "equal; blocks taken over from anchor layers need block selection, so they stand with attention. A dash was not "
    "measured. Density: what a sparse step reads of what a dense one reads. Agreement: tokens of the dense output for "
    "which the sparse step's most probable token is the same. log p: mean log-probability of the reference answer, in "
    "nats per token. Step: median time of a sparse step over that of a dense one, in brackets the least that its bytes "
    "allow. Differences are sparse less dense; detects: the smallest true difference that would have been found."
)
NAMES = {"attention": "attention", "ffn": "FFN", "experts": "experts", "reuse": "reuse"}
_APART = (*GROUPS.values(), "calibration", "file_hashes")


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a hybrid's axes and the run that has them alone, None where none was made."""

    axes: tuple[str, ...]
    row: Row | None

    @property
    def name(self) -> str:
        return " with ".join(NAMES[axis] for axis in self.axes)


def hybrids(rows: Sequence[Row]) -> list[tuple[Row, tuple[Part, ...]]]:
    """Every counted run with two or more axes, and its parts in the order of METHOD sections 2 to 5."""
    made: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = _key(row, row.axes)
        if row.counted and (key not in made or made[key].start < row.start):
            made[key] = row
    return [
        (row, tuple(Part(axes, made.get(_key(row, axes))) for axes in _parts(row)))
        for row in rows
        if row.counted and len(row.axes) > 1
    ]


def _parts(row: Row) -> list[tuple[str, ...]]:
    """Axes that can be on alone; anchors are with attention, where that is not the whole hybrid."""
    anchored = "reuse" in row.axes and name_of(row.config, "reuse") != "skips"
    alone = [(axis,) for axis in row.axes if not (axis == "reuse" and anchored)]
    pair = ("attention", "reuse")
    return alone + ([pair] if anchored and set(pair) < set(row.axes) else [])


def _key(row: Row, axes: Sequence[str]) -> tuple[str, ...]:
    """The same for runs that share the settings of these axes and everything but the sparse axes."""
    settings = {axis: row.config.get(GROUPS[axis]) for axis in axes}
    told = flatten({axis: group if isinstance(group, Mapping) else {"name": group} for axis, group in settings.items()})
    alike = sorted((key, str(value)) for key, value in told.items())
    return (row.model, row.device, *axes, repr(alike), identity(row.config, _APART))


def _densities(row: Row) -> str:
    told = [(name, row.density(axis)) for axis, name in NAMES.items() if axis in row.axes]
    return lines(*(f"{name} {number(value)}" for name, value in told if value is not None)) or NOTHING


def _agreement(row: Row) -> str:
    return cells.percent(row.agreement.value)


def _limit(row: Row) -> str:
    return lines(number(row.time_ratio), f"({number(row.byte_ratio)})") if row.time_ratio is not None else NOTHING


_NUMBERS = (
    Column("density", _densities, right=False),
    Column(f"AL dense\n{ARROW} sparse", lambda row: change(row.acceptance_length("dense"), row.acceptance)),
    Column("step\n(byte\nlimit)", _limit),
    Column("sparse\n/ dense", lambda row: cells.speedup(row, "sparse_vs_dense")),
    Column("sparse\n/ AR", lambda row: estimate(row.sparse_vs_ar)),
    Column("agree-\nment", _agreement),
    Column("quality\ndifference", lambda row: cells.difference(row.delta)),
    Column("log p\ndifference", lambda row: cells.difference(row.reference_delta, 3), optional=True),
)
_COMPACT = (_NUMBERS[2], _NUMBERS[3], _NUMBERS[5], _NUMBERS[6])


def grids(rows: Sequence[Row], *, compact: bool = False) -> list[Grid]:
    """One table for each model and device with hybrids: a row for each, followed by a row for each part."""
    places: dict[tuple[str, str], list[tuple[Row, tuple[Part, ...]]]] = {}
    for row, parts in sorted(hybrids(rows), key=lambda found: (found[0].model, found[0].device)):
        places.setdefault((row.model, row.device), []).append((row, parts))
    return [_grid(f"{model} on {device}{TITLE}", found, compact) for (model, device), found in places.items()]


def _grid(title: str, found: Sequence[tuple[Row, tuple[Part, ...]]], compact: bool) -> Grid:
    measured = [row for row, _ in found]
    columns = [column for column in (_COMPACT if compact else _NUMBERS) if column.shown(measured)]
    body: list[tuple[str, ...]] = []
    ends = []
    for row, parts in found:
        body.append(_line(row, row.task, lines(row.setting, *row.marks), columns, compact))
        for part in parts:
            name = f"{part.name} alone"
            told = lines(name, *part.row.marks) if part.row else f"{name}\n(not measured)"
            body.append(_line(part.row, "", told, columns, compact))
        ends.append(len(body) - 1)
    header = ("task\nsetting",) if compact else ("task", "setting", "n")
    right = {index + len(header) for index, column in enumerate(columns) if column.right}
    right |= set() if compact else {2}
    names = (*header, *(column.name for column in columns))
    return Grid(title, names, tuple(body), frozenset(right), frozenset(ends[:-1]))


def _line(row: Row | None, task: str, setting: str, columns: Sequence[Column], compact: bool) -> tuple[str, ...]:
    values = tuple(NOTHING if row is None else column.cell(row) for column in columns)
    if compact:
        return (lines(task, setting), *values)
    return (task, setting, NOTHING if row is None else str(row.examples), *values)


def table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The same as plain numbers: a mapping for each hybrid and for each measured axis, which names its hybrid."""
    told = []
    for row, parts in hybrids(rows):
        told.append(_values(row, row, "all"))
        told += [_values(part.row, row, part.name) for part in parts if part.row is not None]
    return [cells.plain(values) for values in told]


def _values(row: Row, hybrid: Row, part: str) -> dict[str, Any]:
    return {
        "hybrid": hybrid.fingerprint,
        "part": part,
        **cells.described(row),
        **{group: name_of(row.config, group) for group in GROUPS.values()},
        "examples": row.examples,
        **{f"density_{axis}": row.density(axis) for axis in ("attention", "ffn", "experts")},
        **{f"acceptance_length_{arm}": row.acceptance_length(arm) for arm in ("dense", "sparse")},
        "step_time_ratio": row.time_ratio,
        "byte_limit": row.byte_ratio,
        **cells.bounds("sparse_vs_dense", row.sparse_vs_dense),
        **cells.bounds("sparse_vs_ar", row.sparse_vs_ar),
        **cells.bounds("agreement", row.agreement),
        "metric": row.metric,
        **cells.detectable("quality_difference", row.delta),
        **cells.detectable("reference_difference", row.reference_delta),
    }
