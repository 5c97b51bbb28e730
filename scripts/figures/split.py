"""What a speed-up over dense verification is made of: tokens per step times steps per second."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.evidence.rows import Estimate, Row
from scripts.figures.style import COLOURS, GREY, bars, by_place, left_out, named, notes, styled, telling, values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FACTORS = {"tokens_per_step": ("tokens per step", COLOURS[0]), "steps_per_second": ("steps per second", COLOURS[1])}
"""Key of a pair's split -> name and colour of the factor."""

_TICKS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0)
_MOST_TICKS = 7


def factor(row: Row, name: str) -> Estimate:
    """One of FACTORS, sparse over dense; from the arms' totals, without an interval, in runs that do not hold it."""
    found: Estimate = getattr(row.split["sparse_vs_dense"], name)
    if found.value is not None:
        return found
    if name == "tokens_per_step":
        above, below = (row.acceptance_length(arm) for arm in ("sparse", "dense"))
    else:
        above, below = (row.mean_step_ms(arm) for arm in ("dense", "sparse"))
    return Estimate(above / below if above and below else None)


@styled
def split(rows: Sequence[Row]) -> Figure | None:
    """Both factors of the speed-up over dense verification as bars from 1 on a logarithmic scale, with their product.

    On that scale the bars' lengths, those to the left taken as negative, add up to the diamond's place: sparsity
    that loses drafts shows to the left of 1 in the first bar. Bars carry 95% intervals. Of many runs the most telling
    ones. None where no run has both arms.
    """
    usable = [row for row in rows if row.sparse_vs_dense.value and all(factor(row, name).value for name in FACTORS)]
    grouped, missing = telling(by_place(usable), lambda row: row.sparse_vs_dense.value)
    if not grouped:
        return None
    import matplotlib.pyplot as plt

    heights = [len(members) for members in grouped.values()]
    size = (7.4, 0.5 * sum(heights) + 0.9 * len(heights) + 1.0)
    options: Any = {"squeeze": False, "height_ratios": [height + 0.4 for height in heights], "layout": "constrained"}
    figure: Figure
    figure, grid = plt.subplots(len(grouped), 1, figsize=size, sharex=True, **options)
    for axis, ((task, data, model, device), members) in zip(grid[:, 0], grouped.items(), strict=True):
        for index, row in enumerate(members):
            _run(axis, index, row)
        axis.set_title(f"{task} ({data}), n={min(row.examples for row in members)}\n{model} on {device}", loc="left")
        axis.set_yticks(range(len(members)), [textwrap.fill(named(row), 32) for row in members], fontsize=9)
        axis.set_ylim(len(members) - 0.5, -0.5)
        axis.grid(visible=False, axis="y")
    _scale(grid[:, 0], [row for members in grouped.values() for row in members])
    grid[-1, 0].set_xlabel("sparse over dense verification, logarithmic")
    shown = [row for members in grouped.values() for row in members]
    _legend(figure, stale=any(row.stale for row in shown))
    notes(figure, shown, left_out(missing))
    return figure


def _run(axis: Axes, index: int, row: Row) -> None:
    """Two bars and the diamond of one run."""
    from matplotlib.colors import to_rgba

    whiskers: Any = {"ecolor": GREY, "elinewidth": 1, "capsize": 2, "linestyle": "none"}
    for (name, (_, colour)), place in zip(FACTORS.items(), (index - 0.26, index), strict=True):
        found = factor(row, name)
        value = found.value or 1.0
        face = "white" if row.stale else to_rgba(colour, 0.75)
        axis.barh(place, value - 1, 0.24, left=1.0, facecolor=face, edgecolor=colour, linewidth=1.2)
        if found.ci is not None:
            axis.errorbar([value], [place], xerr=bars([found]), **whiskers)
    whole = row.sparse_vs_dense
    style: Any = {"marker": "D", "markersize": 5.5, "color": "black", "markerfacecolor": _face(row)}
    axis.errorbar(values([whole]), [index + 0.27], xerr=bars([whole]), **style, **(whiskers | {"ecolor": "black"}))


def _face(row: Row) -> str:
    return "white" if row.stale else "black"


def _scale(axes: Sequence[Axes], rows: Sequence[Row]) -> None:
    """Logarithmic around 1, as wide as the farthest end of an interval, with few plain numbers."""
    found = [item for row in rows for item in (row.sparse_vs_dense, *(factor(row, name) for name in FACTORS))]
    ends = [end for item in found for end in (item.value, *(item.ci or ())) if end]
    low, high = min([*ends, 0.9]) / 1.05, max([*ends, 1.1]) * 1.05
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    while len(ticks) > _MOST_TICKS:
        middle = ticks.index(1.0)
        ticks = [tick for at, tick in enumerate(ticks) if (at - middle) % 2 == 0]
    for axis in axes:
        axis.axvline(1.0, color=GREY, linewidth=1)
        axis.set_xscale("log")
        axis.set_xlim(low, high)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()


def _legend(figure: Figure, *, stale: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(facecolor=colour, alpha=0.75, label=name) for name, colour in FACTORS.values()]
    handles.append(Line2D([], [], color="black", marker="D", linestyle="none", label="speed-up, their product"))
    if stale:
        handles.append(Patch(facecolor="white", edgecolor=GREY, label="hollow: stale"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), columnspacing=1.2)
