"""What each axis of sparsity costs and gains over its density: one column per axis, and one for several together."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.evidence.labels import BUDGET_KEYS
from harness.evidence.rows import Estimate, Row
from scripts.figures.style import COLOURS, GREY, MARKERS, bars, notes, series_of, styled, values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACROSS: dict[str, tuple[str, Callable[[Row], float | None]]] = {
    "attention": ("share of the context read", lambda row: row.density("attention")),
    "ffn": ("share of the channels read", lambda row: row.density("ffn")),
    "experts": ("share of the experts run", lambda row: row.density("experts")),
    "reuse": ("share of the layers that retrieve", lambda row: row.retrieving),
    "hybrid": ("share of a step's bytes read", lambda row: row.byte_ratio),
}
"""Column -> what its x axis says, and where a run stands on it."""

UP: dict[str, Callable[[Row], Estimate]] = {
    "agreement with\ndense, %": lambda row: _scaled(row.agreement, 100.0),
    "KL to dense,\nnats per token": lambda row: Estimate(row.kl),
    "acceptance length": lambda row: Estimate(row.acceptance),
    "step time,\nsparse / dense": lambda row: Estimate(row.time_ratio),
    "quality, points\nagainst dense": lambda row: row.delta,
}
"""Line of panels -> its numbers."""

_KL, _LENGTH, _TIME, _QUALITY = list(UP)[1:]
_TICKS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_WIDE_RANGE = 5
_VARIANT_WIDTH = 30


@dataclass(frozen=True, slots=True)
class Curve:
    """Runs that differ in one budget alone, ordered along ``column``'s x axis.

    Attributes:
        column: key of ACROSS.
        variant: their setting, the swept number left open.
        place: task, data, model and device.
    """

    column: str
    variant: str
    place: str
    rows: tuple[Row, ...]

    @property
    def across(self) -> list[float]:
        """Where each run stands on the x axis."""
        return [found for row in self.rows if (found := ACROSS[self.column][1](row)) is not None]


def curves(rows: Sequence[Row]) -> list[Curve]:
    """All curves of at least two points, each once: the sweeps of every budget key (METHOD sections 2 to 5)."""
    usable = [row for row in rows if row.counted and row.axes and row.arms.get("sparse")]
    found: dict[tuple[str, ...], Curve] = {}
    for axis, keys in BUDGET_KEYS.items():
        for pool, left_out in _pools(usable, axis, keys):
            for column in (axis, "hybrid"):
                members = [row for row in pool if _column(row, axis) == column]
                for line in series_of(members, left_out, ACROSS[column][1]):
                    curve = Curve(column, _variant(line), _place(line[0]), tuple(line))
                    found.setdefault((column, *sorted(row.fingerprint for row in line)), curve)
    return list(found.values())


def _pools(rows: Sequence[Row], axis: str, keys: Sequence[str]) -> list[tuple[list[Row], tuple[str, ...]]]:
    """Candidates of one line and the keys in which they may differ.

    Anchors form a line per way of choosing them, which ends at the run that retrieves in every layer.
    """
    if axis != "reuse":
        return [(list(rows), (key,)) for key in keys]
    kinds: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if (row.config.get("reuse") or {}).get("name") == "anchors":
            kinds.setdefault(_kind(row), []).append(row)
    none = [row for row in rows if "reuse" not in row.axes and "attention" in row.axes]
    return [([*members, *none], ("reuse", "calibration")) for members in kinds.values()]


def _kind(row: Row) -> tuple[str, str]:
    reuse = row.config["reuse"]
    return str(reuse.get("anchors")), str(reuse.get("head_map"))


def _column(row: Row, axis: str) -> str:
    """Where a sweep of `axis` shows this run: alone, or as a hybrid."""
    alone = {"attention", "reuse"} if axis == "reuse" else {axis}
    return axis if set(row.axes) <= alone else "hybrid"


def _place(row: Row) -> str:
    return f"{row.task} ({row.data}), n={row.examples}, {row.model} on {row.device}"


def _variant(line: Sequence[Row]) -> str:
    """The settings of a line as one: what they share at both ends, an ellipsis between."""
    most = max(len(row.axes) for row in line)
    settings = list(dict.fromkeys(row.setting for row in line if len(row.axes) == most))
    if len(settings) == 1:
        return settings[0]
    head = re.sub(r"[\d.,]+$", "", _shared_start(settings))
    tails = [setting[len(head) :][::-1] for setting in settings]
    return f"{head}\u2026{re.sub(r'^[0-9.,]+', '', _shared_start(tails)[::-1])}"


def _shared_start(texts: Sequence[str]) -> str:
    """The longest text that all of them begin with."""
    equal = takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in equal)


@styled
def axes(rows: Sequence[Row]) -> Figure | None:
    """Agreement, KL, acceptance length, step time with its byte limit, and quality against density, axis by axis.

    Colours are tasks and models, markers settings; only runs that differ in the swept budget alone are joined. Bars are
    95% intervals. None where no budget was swept.
    """
    found = curves(rows)
    if not found:
        return None
    import matplotlib.pyplot as plt

    across = [name for name in ACROSS if any(curve.column == name for curve in found)]
    up = [name for name in UP if any(UP[name](row).value is not None for curve in found for row in curve.rows)]
    size = (max(2.9 * len(across) + 1.0, 6.0), 1.9 * len(up) + 1.6)
    options: Any = {"squeeze": False, "sharex": "col", "sharey": "row", "layout": "constrained"}
    figure: Figure
    figure, grid = plt.subplots(len(up), len(across), figsize=size, **options)
    places = list(dict.fromkeys(curve.place for curve in found))
    for index, column in enumerate(across):
        own = [curve for curve in found if curve.column == column]
        variants = list(dict.fromkeys(curve.variant for curve in own))
        for axis, name in zip(grid[:, index], up, strict=True):
            for curve in own:
                colour = COLOURS[places.index(curve.place) % len(COLOURS)]
                _draw(axis, curve, name, colour, MARKERS[variants.index(curve.variant) % len(MARKERS)])
        grid[0, index].set_title(column, loc="left", fontweight="bold")
        density_scale(grid[-1, index], column, own)
        _variants(grid[-1, index], variants)
    for axis, name in zip(grid[:, 0], up, strict=True):
        axis.set_ylabel(name)
        _y_axis(grid[up.index(name)], name, found)
    shown = [row for curve in found for row in curve.rows]
    _legend(figure, places, any(row.simulated for row in shown))
    notes(figure, shown)
    return figure


def _draw(axis: Axes, curve: Curve, name: str, colour: str, marker: str) -> None:
    """One curve of one panel, with the dense arm or the byte limit where there is such a thing."""
    estimates = [UP[name](row) for row in curve.rows]
    if all(item.value is None for item in estimates):
        return
    axis.errorbar(
        curve.across,
        values(estimates),
        yerr=bars(estimates),
        color=colour,
        marker=marker,
        markersize=5,
        markerfacecolor="white" if curve.rows[0].simulated else colour,
        capsize=2,
        elinewidth=1,
        linewidth=1.4,
    )
    if name == _TIME:
        limits = [float("nan") if row.byte_ratio is None else row.byte_ratio for row in curve.rows]
        axis.plot(curve.across, limits, color=colour, linestyle=":", linewidth=1.3)
    dense = [length for row in curve.rows if (length := row.acceptance_length("dense")) is not None]
    if name == _LENGTH and dense:
        axis.axhline(median(dense), color=colour, linestyle="--", linewidth=1)
    if name in (_TIME, _QUALITY):
        axis.axhline(1.0 if name == _TIME else 0.0, color=GREY, linestyle="--", linewidth=1)


def density_scale(axis: Axes, column: str, own: Sequence[Curve]) -> None:
    """Label the x axis of a column of ACROSS; logarithmic with plain numbers where budgets span a wide range."""
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel(ACROSS[column][0])
    places = [place for curve in own for place in curve.across]
    low, high = min(places), max(places)
    if low > 0 and high / low > _WIDE_RANGE:
        axis.set_xscale("log")
        axis.set_xlim(low / 1.25, high * 1.25)
        ticks = [tick for tick in _TICKS if low / 1.25 <= tick <= high * 1.25]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    else:
        axis.margins(x=0.08)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=5))


def _y_axis(panels: Sequence[Axes], name: str, found: Sequence[Curve]) -> None:
    """KL on a logarithmic scale where it spans a wide range."""
    spread = [value for curve in found for row in curve.rows if (value := UP[name](row).value) is not None]
    if name == _KL and min(spread) > 0 and max(spread) / min(spread) > _WIDE_RANGE:
        for axis in panels:
            axis.set_yscale("log")
            axis.minorticks_off()
        low, high = np.log10(min(spread)), np.log10(max(spread))
        ticks = [base * 10.0**power for power in range(-7, 3) for base in (1, 2, 5)]
        near = [tick for tick in ticks if low - 0.15 <= np.log10(tick) <= high + 0.15]
        panels[0].set_yticks(near, [f"{tick:g}" for tick in near])


def _variants(axis: Axes, variants: Sequence[str]) -> None:
    """What the markers of a column stand for, below it."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=GREY, marker=MARKERS[index % len(MARKERS)], label=textwrap.fill(name, _VARIANT_WIDTH))
        for index, name in enumerate(variants)
    ]
    axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.32), fontsize=8.5, handlelength=1.6)


def _legend(figure: Figure, places: Sequence[str], simulated: bool) -> None:
    """Colours and line styles, for the whole figure."""
    from matplotlib.lines import Line2D

    wide = int(10 * figure.get_figwidth())
    handles = [
        Line2D([], [], color=COLOURS[index % len(COLOURS)], linewidth=2.5, label=textwrap.fill(place, wide))
        for index, place in enumerate(places)
    ]
    handles.append(Line2D([], [], color=GREY, linestyle=":", label="limit by bytes read"))
    handles.append(Line2D([], [], color=GREY, linestyle="--", label="dense verification"))
    if simulated:
        hollow = Line2D([], [], color=GREY, marker="o", markerfacecolor="white", linestyle="none")
        hollow.set_label("hollow: simulated")
        handles.append(hollow)
    figure.legend(handles=handles, loc="outside lower center")


def _scaled(item: Estimate, factor: float) -> Estimate:
    if item.value is None:
        return item
    return Estimate(item.value * factor, (item.ci[0] * factor, item.ci[1] * factor) if item.ci else None)
