"""What each setting reads, what that costs in fidelity and how much of it shows in time: a table of all axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.evidence.labels import GROUPS, name_of
from harness.evidence.rows import Estimate, Row
from scripts.cells import (
    NOTHING,
    Column,
    Grid,
    bounds,
    change,
    described,
    detectable,
    difference,
    estimate,
    grids_of,
    lines,
    number,
    percent,
    plain,
)

TITLE = ": density, fidelity and time of a step"
LEGEND = (
    "Density: what a sparse step reads of what a dense one reads, per axis. Agreement: tokens of the dense output for "
    "which the sparse step's most probable token is the same, teacher forced, with 95% interval; KL to dense in nats "
    "per token; flips: steps whose draft would be accepted to another length. AL: new tokens per verification. Step: "
    "median milliseconds. Byte limit: bytes of a sparse step over bytes of a dense one, the least that the time ratio "
    "could be. Realised: share of the saved bytes that shows in step time; a dash where less than 1% is saved or the "
    "run is simulated. Select: mean milliseconds of a sparse step spent on choosing blocks. detects: the "
    "smallest true difference that would have been found with 80% power."
)
_DENSITIES = {"attention": "attn", "ffn": "ffn", "experts": "experts"}


def _agreement(row: Row) -> str:
    if row.agreement.value is None:
        return NOTHING
    around = row.agreement.ci
    scaled = Estimate(100 * row.agreement.value, (100 * around[0], 100 * around[1]) if around else None)
    return estimate(scaled, 1)


def _select(row: Row) -> float | None:
    return row.components_ms("sparse").get("select")


def _density(axis: str, title: str) -> Column:
    return Column(f"density\n{title}", lambda row: number(row.density(axis)), optional=True)


def _densities(row: Row) -> str:
    told = [(title, row.density(axis)) for axis, title in _DENSITIES.items()]
    return lines(*(f"{title} {number(value)}" for title, value in told if value is not None)) or NOTHING


_TIMES = (
    Column("step ms\ndense\n\u2192 sparse", lambda row: change(row.step_ms("dense"), row.step_ms("sparse"), 1)),
    Column("step time\nsparse\n/ dense", lambda row: number(row.time_ratio)),
    Column("byte\nlimit", lambda row: number(row.byte_ratio)),
    Column("realised", lambda row: percent(row.realised, 0)),
)
_ACCEPTED = Column(
    "AL dense\n\u2192 sparse", lambda row: change(row.acceptance_length("dense"), row.acceptance_length("sparse"))
)
_QUALITY = Column("quality\ndifference", lambda row: difference(row.delta))

FULL = (
    Column("task", lambda row: row.task, right=False),
    Column("setting", lambda row: row.setting, right=False),
    *(_density(axis, title) for axis, title in _DENSITIES.items()),
    Column("agreement\n%", _agreement),
    Column("KL", lambda row: number(row.kl, 4)),
    Column("flips", lambda row: percent(row.accept_flips)),
    _ACCEPTED,
    *_TIMES,
    Column("select\nms", lambda row: number(_select(row))),
    _QUALITY,
    Column("mark", lambda row: "\n".join(row.marks), right=False, optional=True),
)
COMPACT = (
    Column(
        "task\nsetting\ndensity", lambda row: lines(row.task, row.setting, *row.marks, _densities(row)), right=False
    ),
    Column("agreement\n%, KL", lambda row: lines(_agreement(row), number(row.kl, 4))),
    _ACCEPTED,
    _TIMES[0],
    Column(
        "step time\nbyte limit\nrealised",
        lambda row: lines(number(row.time_ratio), number(row.byte_ratio), percent(row.realised, 0)),
    ),
    _QUALITY,
)


def grids(rows: Sequence[Row], *, compact: bool = False) -> list[Grid]:
    """One table for each model and device, a row for each run; what was not measured is a dash."""
    return grids_of(rows, COMPACT if compact else FULL, TITLE)


def table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The same as plain numbers, one mapping for each run; empty where nothing was measured."""
    return [plain(_values(row)) for row in rows]


def _values(row: Row) -> dict[str, Any]:
    return {
        **described(row),
        **{group: name_of(row.config, group) for group in GROUPS.values()},
        "examples": row.examples,
        **{f"density_{axis}": row.density(axis) for axis in _DENSITIES},
        "layers_retrieving": row.retrieving,
        **bounds("agreement", row.agreement),
        "kl": row.kl,
        "accept_flips": row.accept_flips,
        **{f"acceptance_length_{arm}": row.acceptance_length(arm) for arm in ("dense", "sparse")},
        **{f"step_ms_median_{arm}": row.step_ms(arm) for arm in ("dense", "sparse")},
        **{f"step_ms_mean_{arm}": row.mean_step_ms(arm) for arm in ("dense", "sparse")},
        "step_time_ratio": row.time_ratio,
        "byte_limit": row.byte_ratio,
        "realised": row.realised,
        "select_ms": _select(row),
        "metric": row.metric,
        **detectable("quality_difference", row.delta),
        **detectable("reference_difference", row.reference_delta),
    }
