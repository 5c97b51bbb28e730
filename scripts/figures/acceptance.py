"""How many tokens a step yields by drafter: acceptance length, and the steps by their new tokens."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.evidence.labels import NO_DRAFTS
from harness.evidence.rows import Row
from scripts.draft_table import ARMS, cautions, compared, shares
from scripts.figures.style import COLOURS, GREY, Place, by_place, left_out, notes, styled, telling

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LAST = 6
"""New tokens from which on steps are counted together."""

SHADES = ("#ffffd9", "#d6efb3", "#8cd1bb", "#41a6c2", "#2263a8", "#0c2350")
"""Fill of the steps with 1, 2, ... new tokens: darker is more, in every common colour blindness too."""

_MARKS = {"dense": (COLOURS[0], "o", -0.19), "sparse": (COLOURS[1], "s", 0.19)}
_LABEL_WIDTH = 30
_TICK: Any = {"marker": "|", "markersize": 11, "markeredgewidth": 1.8, "linestyle": "none"}
_NUMBER = 0.16
"""Room for the number right of the longest, as a share of the range."""

_LEAST_TOLD = 0.085
_DARK = 5


@styled
def acceptance(rows: Sequence[Row]) -> Figure | None:
    """Acceptance length of each drafter on the left, its histogram as stacked shares on the right (METHOD section 8).

    A pair of panels for each task, model and device; dense above sparse. Vertical ticks are the mean of the requests'
    own means. Where there is one drafter, its settings are shown instead. Of many runs the most telling ones. None
    without a run with drafts.
    """
    grouped, missing = telling(_grouped(rows), lambda row: row.acceptance)
    if not grouped:
        return None
    import matplotlib.pyplot as plt

    names = {place: _names(members) for place, members in grouped.items()}
    deepest = max(name.count("\n") + 1 for told in names.values() for name in told)
    heights = [len(members) for members in grouped.values()]
    size = (10.4, max(0.44, 0.17 * deepest) * sum(heights) + 0.85 * len(heights) + 1.0)
    ratios = {"height_ratios": [height + 0.4 for height in heights], "width_ratios": [1.0, 1.2]}
    options: Any = {"squeeze": False, "layout": "constrained", "sharex": "col", **ratios}
    figure: Figure
    figure, grid = plt.subplots(len(grouped), 2, figsize=size, **options)
    for (left, right), (place, members) in zip(grid, grouped.items(), strict=True):
        for index, row in enumerate(members):
            for arm in ARMS:
                _lengths(left, row, arm, index)
                _bar(right, row, arm, index)
        _lines(left, right, names[place])
        task, data, model, device = place
        left.set_title(f"{task} ({data}), n={min(row.examples for row in members)}\n{model} on {device}", loc="left")
    grid[-1, 0].set_xlabel("acceptance length: new tokens per step")
    low, high = _range(grid[:, 0])
    grid[-1, 0].set_xlim(low, high + _NUMBER * (high - low))
    grid[-1, 1].set_xlabel("share of steps by their new tokens, %")
    grid[-1, 1].set_xlim(0, 100)
    shown = [row for members in grouped.values() for row in members]
    notes(figure, shown, [*cautions(shown), *left_out(missing)])
    _legends(figure)
    return figure


def _range(axes: Sequence[Axes]) -> tuple[float, float]:
    """The lengths that are shown, from 1 on at most."""
    found: list[float] = [x for axis in axes for line in axis.lines for x in np.asarray(line.get_xdata()).tolist()]
    return min([1.0, *found]), max([1.5, *found])


def _grouped(rows: Sequence[Row]) -> dict[Place, list[Row]]:
    """Drafters where several are compared, else the settings of the one there is."""
    found = compared(rows)
    usable = [row for row in rows if row.drafting.drafter != NO_DRAFTS and all(row.histogram(arm) for arm in ARMS)]
    return by_place(usable) | found


def _lengths(axis: Axes, row: Row, arm: str, index: int) -> None:
    """An arm's acceptance length as a mark with its number, and the mean over requests as a tick."""
    colour, marker, offset = _MARKS[arm]
    pooled, own = row.acceptance_length(arm), row.request_acceptance_length(arm)
    if pooled is None or own is None:
        return
    height = index + offset
    axis.plot([own], [height], color=colour, **_TICK)
    axis.plot([pooled], [height], color=colour, marker=marker, markersize=6, linestyle="none", label=arm)
    place: Any = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "fontsize": 8.5, "color": colour}
    axis.annotate(f"{pooled:.2f}", (max(pooled, own), height), **place)


def _bar(axis: Axes, row: Row, arm: str, index: int) -> None:
    """An arm's steps as one bar of 100 per cent, with the shares that have room for their number."""
    colour, marker, offset = _MARKS[arm]
    start, height = 0.0, index + offset
    inside: Any = {"ha": "center", "va": "center_baseline", "fontsize": 8}
    found = shares(row.histogram(arm), LAST)
    for name, share in found.items():
        new = int(name.rstrip("+"))
        shade = SHADES[max(new, 1) - 1]
        axis.barh(height, 100 * share, 0.36, left=100 * start, color=shade, edgecolor=GREY, linewidth=0.5)
        if share >= _LEAST_TOLD:
            ink = "white" if new >= _DARK else "black"
            axis.text(100 * (start + share / 2), height, f"{100 * share:.0f}", color=ink, **inside)
        start += share
    if found:
        axis.plot([102], [height], color=colour, marker=marker, markersize=5, linestyle="none", clip_on=False)


def _lines(left: Axes, right: Axes, names: Sequence[str]) -> None:
    """The drafters from top to bottom, named on the left alone."""
    for axis in (left, right):
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.grid(visible=False, axis="y")
    left.set_yticks(range(len(names)), names, fontsize=9)
    right.set_yticks([])
    left.margins(x=0.16)


def _names(members: Sequence[Row]) -> list[str]:
    """What tells each run from the others of its panel, with the marks that this does not say already."""
    several = len({row.setting for row in members}) > 1
    names = []
    for row in members:
        text = ", ".join(part for part in row.drafting if part)
        lines = textwrap.wrap(text, _LABEL_WIDTH) + (textwrap.wrap(row.setting, _LABEL_WIDTH) if several else [])
        marks = [mark for mark in row.marks if mark.split()[0] not in " ".join(lines)]
        names.append("\n".join(lines + ([f"[{', '.join(marks)}]"] if marks else [])))
    return names


def _legends(figure: Figure) -> None:
    """Arms above the lengths, shades above the histograms."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    arms: list[Any] = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", label=arm)
        for arm, (colour, marker, _) in _MARKS.items()
    ]
    arms.append(Line2D([], [], color=GREY, label="mean of the requests' own", **_TICK))
    names = ["1 new token", *(str(new) for new in range(2, LAST)), f"{LAST}+"]
    shades = [Patch(facecolor=shade, edgecolor=GREY, label=name) for shade, name in zip(SHADES, names, strict=True)]
    figure.legend(handles=arms, loc="outside upper left", ncols=len(arms), columnspacing=1.2, handletextpad=0.3)
    figure.legend(handles=shades, loc="outside upper right", ncols=LAST, columnspacing=1.2, handlelength=1.4)
