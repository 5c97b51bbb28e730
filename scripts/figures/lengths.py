"""Acceptance length against density: how many drafts survive a verification that reads less."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from harness.evidence.rows import Estimate, Row
from scripts.figures.axis_curves import ACROSS, Curve, curves, density_scale
from scripts.figures.split import factor
from scripts.figures.style import COLOURS, GREY, MARKERS, bars, canvas, columns, notes, styled, values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEAST_RANGE = 0.4
_WRAP = 40
_LEGEND_LINE = 0.17
_BELOW = 0.42
"""Inches from the x axis to what is below its label."""


def length(row: Row) -> Estimate:
    """New tokens per step of sparse verification; its interval is that of the ratio to dense, times dense's length."""
    dense, ratio = row.acceptance_length("dense"), factor(row, "tokens_per_step")
    interval = None if dense is None or ratio.ci is None else (dense * ratio.ci[0], dense * ratio.ci[1])
    return Estimate(row.acceptance, interval)


@styled
def acceptance_density(rows: Sequence[Row]) -> Figure | None:
    """Acceptance length of sparse verification against what it reads, a panel for each axis that was swept.

    A line joins runs that differ in the swept budget alone; dashed lines are dense verification of the same runs. Bars
    are 95% intervals, paired with dense. None where no budget was swept.
    """
    found = [curve for curve in curves(rows) if any(row.acceptance is not None for row in curve.rows)]
    if not found:
        return None
    across = [name for name in ACROSS if any(curve.column == name for curve in found)]
    own = {name: [curve for curve in found if curve.column == name] for name in across}
    variants = {name: list(dict.fromkeys(_label(curve) for curve in own[name])) for name in across}
    deepest = max(sum(text.count("\n") + 1 for text in told) for told in variants.values())
    figure, axes = canvas(len(across), height=3.1 + _LEGEND_LINE * deepest)
    places = list(dict.fromkeys(curve.place for curve in found))
    for axis, name in zip(axes, across, strict=True):
        for curve in own[name]:
            marker = MARKERS[variants[name].index(_label(curve)) % len(MARKERS)]
            _draw(axis, curve, COLOURS[places.index(curve.place) % len(COLOURS)], marker)
        axis.set_title(name, loc="left", fontweight="bold")
        density_scale(axis, name, own[name])
        _variants(axis, variants[name])
    _share_scale(axes)
    for axis in axes[:: columns(len(axes))]:
        axis.set_ylabel("acceptance length,\nnew tokens per step")
    shown = [row for curve in found for row in curve.rows]
    _legend(figure, places, stale=any(row.stale for row in shown))
    notes(figure, shown)
    return figure


def _label(curve: Curve) -> str:
    return textwrap.fill(curve.variant, _WRAP)


def _draw(axis: Axes, curve: Curve, colour: str, marker: str) -> None:
    lengths = [length(row) for row in curve.rows]
    style: dict[str, Any] = {"color": colour, "linewidth": 1.4, "capsize": 2, "elinewidth": 1}
    axis.errorbar(curve.across, values(lengths), yerr=bars(lengths), label=None, **style)
    for x, y, row in zip(curve.across, values(lengths), curve.rows, strict=True):
        face = "white" if row.stale else colour
        axis.plot([x], [y], color=colour, marker=marker, markersize=5.5, markerfacecolor=face)
    dense = [value for row in curve.rows if (value := row.acceptance_length("dense")) is not None]
    if dense:
        axis.axhline(median(dense), color=colour, linestyle="--", linewidth=1.1)


def _variants(axis: Axes, names: Sequence[str]) -> None:
    """What the markers of a panel stand for, below its axis."""
    from matplotlib.lines import Line2D
    from matplotlib.transforms import ScaledTranslation

    handles = [
        Line2D([], [], color=GREY, marker=MARKERS[index % len(MARKERS)], markersize=5.5, label=name)
        for index, name in enumerate(names)
    ]
    below = axis.transAxes + ScaledTranslation(0, -_BELOW, axis.figure.dpi_scale_trans)
    options: Any = {"bbox_to_anchor": (0.5, 0.0), "bbox_transform": below, "fontsize": 8.5, "handlelength": 1.6}
    axis.legend(handles=handles, loc="upper center", **options)


def _share_scale(axes: Sequence[Axes]) -> None:
    """One scale for all panels, wide enough that a hundredth of a token looks like one."""
    low = min(axis.get_ylim()[0] for axis in axes)
    high = max(axis.get_ylim()[1] for axis in axes)
    spare = max(0.0, _LEAST_RANGE - (high - low)) / 2
    for axis in axes:
        axis.set_ylim(low - spare, high + spare)


def _legend(figure: Figure, places: Sequence[str], *, stale: bool) -> None:
    from matplotlib.lines import Line2D

    wide = int(11 * figure.get_figwidth())
    handles = [
        Line2D([], [], color=COLOURS[index % len(COLOURS)], linewidth=2.5, label=textwrap.fill(place, wide))
        for index, place in enumerate(places)
    ]
    handles.append(Line2D([], [], color=GREY, linestyle="--", label="dense verification"))
    if stale:
        hollow: Any = {"marker": "o", "markerfacecolor": "white", "linestyle": "none"}
        handles.append(Line2D([], [], color=GREY, label="hollow: stale", **hollow))
    lines = sum(str(handle.get_label()).count("\n") + 1 for handle in handles)
    figure.set_figheight(figure.get_figheight() + 0.2 * lines)
    figure.legend(handles=handles, loc="outside lower center")
