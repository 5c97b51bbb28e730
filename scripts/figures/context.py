"""Speed-up against the length of the context, with the limit that bytes set."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from harness.evidence.labels import natural
from harness.evidence.rows import Estimate, Row
from scripts.figures.style import GREY, PALE, bars, mark, notes, series_of, styled, values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LENGTH_KEYS = ("task.context_tokens", "task.bucket", "task.min_prompt_tokens", "task.max_prompt_tokens")
"""What the runs of a line may differ in: all that makes a task's prompts longer or shorter."""

MOST_LINES = 7
MOST_PLACES = 4
_LEGEND_LINE = 0.2
Home = tuple[str, str, str, str]


def series(rows: Sequence[Row]) -> dict[Home, list[list[Row]]]:
    """Runs that differ in LENGTH_KEYS alone, by growing prompts, under task, data, model and device."""
    usable = [row for row in rows if row.sparse_vs_dense.value is not None]
    found: dict[Home, list[list[Row]]] = {_home(row): [] for row in usable}
    for line in series_of(usable, LENGTH_KEYS, lambda row: row.prompt_tokens):
        found[_home(line[0])].append(line)
    return {home: lines for home, lines in found.items() if lines}


def _home(row: Row) -> Home:
    return row.task_name, row.data, row.model, row.device


@styled
def context(rows: Sequence[Row]) -> Figure | None:
    """Speed-up over dense verification, and over AR, against the median prompt: a line for each setting.

    Dotted lines are the limit by bytes read (METHOD section 7), dashed ones dense verification; bars are 95% intervals.
    None where no two runs differ in the length of their prompts alone.
    """
    every = series(rows)
    longest = sorted(every, key=lambda home: -max(len(line) for line in every[home]))[:MOST_PLACES]
    shown = {home: _most(every[home]) for home in every if home in longest}
    if not shown:
        return None
    import matplotlib.pyplot as plt

    members = [row for lines in shown.values() for line in lines for row in line]
    wide = 2 if any(row.sparse_vs_ar.value is not None for row in members) else 1
    size = (3.7 * wide + 0.6, 3.5 * len(shown) + 0.3)
    figure: Figure
    figure, grid = plt.subplots(len(shown), wide, figsize=size, squeeze=False, layout="constrained")
    names = sorted({line[0].setting for lines in shown.values() for line in lines}, key=natural)
    for axes, (home, lines) in zip(grid, shown.items(), strict=True):
        _over_dense(axes[0], lines, names)
        if wide == 2:
            _over_ar(axes[1], lines, names)
        task, data, model, device = home
        least = min(row.examples for line in lines for row in line)
        axes[0].set_title(f"{task} ({data}), n={least}\n{model} on {device}", loc="left")
        for axis in axes:
            _across(axis, lines)
    _legend(figure, names, members)
    notes(figure, members, _missing(every, shown))
    return figure


def _most(lines: Sequence[list[Row]]) -> list[list[Row]]:
    """The lines of most points, in their order."""
    kept = sorted(lines, key=lambda line: -len(line))[:MOST_LINES]
    return [line for line in lines if any(line is one for one in kept)]


def _missing(every: dict[Home, list[list[Row]]], shown: dict[Home, list[list[Row]]]) -> list[str]:
    """What there is no room for."""
    told = []
    for home, lines in every.items():
        rest = [line[0].setting for line in lines if home not in shown or not any(line is one for one in shown[home])]
        told += [f"left out for lack of room: {home[0]}, {home[2]}: {'; '.join(rest)}"] if rest else []
    return told


def _line(axis: Axes, line: Sequence[Row], found: Sequence[Estimate], colour: str, marker: str) -> None:
    places, heights = _places(line), values(found)
    axis.errorbar(places, heights, yerr=bars(found), color=colour, linewidth=1.5, capsize=2.5, elinewidth=1.1)
    for x, y, row in zip(places, heights, line, strict=True):
        face = "white" if row.stale else colour
        axis.plot([x], [y], color=colour, marker=marker, markersize=6, markerfacecolor=face)


def _places(line: Sequence[Row]) -> list[float]:
    return [float("nan") if row.prompt_tokens is None else row.prompt_tokens for row in line]


def _over_dense(axis: Axes, lines: Sequence[list[Row]], names: Sequence[str]) -> None:
    for line in lines:
        colour, marker = mark(names.index(line[0].setting))
        _line(axis, line, [row.sparse_vs_dense for row in line], colour, marker)
        limits = [float("nan") if row.limit is None else row.limit for row in line]
        axis.plot(_places(line), limits, color=colour, linestyle=":", linewidth=1.5)
    axis.axhline(1.0, color=GREY, linestyle="--", linewidth=1.1)
    axis.set_ylabel("speed-up over dense")


def _over_ar(axis: Axes, lines: Sequence[list[Row]], names: Sequence[str]) -> None:
    """Sparse verification's lines, and one of dense verification, the median of the runs with the same prompts."""
    dense: dict[float, list[float]] = {}
    for line in lines:
        if all(row.sparse_vs_ar.value is None for row in line):
            continue
        colour, marker = mark(names.index(line[0].setting))
        _line(axis, line, [row.sparse_vs_ar for row in line], colour, marker)
        for row in line:
            if row.prompt_tokens is not None and row.dense_vs_ar.value is not None:
                dense.setdefault(row.prompt_tokens, []).append(row.dense_vs_ar.value)
    places = sorted(dense)
    axis.plot(places, [median(dense[place]) for place in places], color=GREY, linestyle="--", linewidth=1.3)
    axis.axhline(1.0, color=PALE, linewidth=1)
    axis.set_ylabel("speed-up over AR")


def _across(axis: Axes, lines: Sequence[list[Row]]) -> None:
    """Powers of two that are among the prompts' lengths or near their ends."""
    places = [row.prompt_tokens for line in lines for row in line if row.prompt_tokens]
    axis.set_xscale("log", base=2)
    low, high = min(places) / 1.2, max(places) * 1.2
    ticks = [2**power for power in range(4, 25) if low <= 2**power <= high]
    ticks = ticks if len(ticks) > 1 else sorted({round(place) for place in places})
    axis.set_xlim(low, high)
    axis.set_xticks(ticks, [f"{tick / 1024:g}k" if tick % 1024 == 0 else f"{tick}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("prompt tokens (median)")


def _legend(figure: Figure, names: Sequence[str], rows: Sequence[Row]) -> None:
    from matplotlib.lines import Line2D

    wrap = int(10.5 * figure.get_figwidth())
    handles = []
    for index, name in enumerate(names):
        colour, marker = mark(index)
        handles.append(Line2D([], [], color=colour, marker=marker, label=textwrap.fill(name, wrap)))
    handles.append(Line2D([], [], color=GREY, linestyle=":", label="limit by bytes read"))
    handles.append(Line2D([], [], color=GREY, linestyle="--", label="dense verification"))
    if any(row.stale for row in rows):
        hollow: Any = {"marker": "o", "markerfacecolor": "white", "linestyle": "none"}
        handles.append(Line2D([], [], color=GREY, label="hollow: stale", **hollow))
    longest = max(len(line) for name in names for line in textwrap.wrap(name, wrap))
    wide = max(1, min(3, int(figure.get_figwidth() / (0.075 * max(longest, 20) + 0.6))))
    figure.set_figheight(figure.get_figheight() + _LEGEND_LINE * -(-len(handles) // wide))
    figure.legend(handles=handles, loc="outside lower center", ncols=wide)
