"""What the selections of KV blocks look like: between draft tokens, between layers, against the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from harness.evidence.labels import natural
from harness.evidence.rows import Row
from scripts.figures.style import COLOURS, GREY, by_place, longest_contexts, notes, run_title, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUOTED_OVERLAP = 0.8
"""Overlap that the paper reports for draft tokens of one step in most layers (METHOD section 2)."""
_EMPTY = "#bbbbbb"


def array(nested: Any) -> NDArray[np.float64]:
    """Nested lists as numbers; null is not a number."""
    return np.array(nested, dtype=np.float64)


@styled
def overlap(rows: Sequence[Row]) -> Figure | None:
    """Share of a draft token's blocks that a later token of the step selects too, by layer and by distance.

    One run per model and task, that of the longest prompts. Left: one line per distance; right: mean over layers.
    None where no run was observed (METHOD section 2).
    """
    shown = longest_contexts(rows, "overlap")
    if not shown:
        return None
    import matplotlib.pyplot as plt

    deep = len(shown)
    options: Any = {"squeeze": False, "sharey": True, "width_ratios": (2.2, 1), "layout": "constrained"}
    figure: Figure
    figure, grid = plt.subplots(deep, 2, figsize=(9.6, 3.6 * deep + 0.6), **options)
    for (left, right), row in zip(grid, shown, strict=True):
        _overlap_panel(left, right, row)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    notes(figure, shown)
    return figure


def _overlap_panel(left: Axes, right: Axes, row: Row) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    data = array(row.trace("overlap"))
    layers, distances = data.shape
    colours = colormaps["viridis"](np.linspace(0, 0.85, distances))
    counted: list[bool] = [bool(np.isfinite(data[:, step]).any()) for step in range(distances)]
    for step in range(distances):
        if counted[step]:
            label = f"{step + 1} token{'s' if step else ''} apart"
            left.plot(range(layers), data[:, step], color=colours[step], marker="o", markersize=3, label=label)
    means = [float(np.nanmean(data[:, step])) for step in range(distances) if counted[step]]
    steps = [step + 1 for step in range(distances) if counted[step]]
    right.plot(steps, means, color=GREY, linewidth=1.2, zorder=2)
    right.scatter(steps, means, color=colours[counted], s=40, zorder=3)
    for axis in (left, right):
        axis.axhline(QUOTED_OVERLAP, color=COLOURS[1], linestyle="--", linewidth=1, label="0.8, as the paper reports")
        if (read := row.density("attention")) is not None:
            axis.axhline(read, color=GREY, linestyle=":", linewidth=1.2, label="attention density (overlap by chance)")
        axis.set_ylim(0, 1.02)
    left.set_title(run_title(row), loc="left")
    left.set_xlabel("layer")
    left.set_xlim(-0.5, layers - 0.5)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_ylabel("share of blocks selected by both")
    right.set_title("mean over layers", loc="left")
    right.set_xlabel("distance in draft tokens")
    right.set_xticks(steps)


@styled
def similarity(rows: Sequence[Row]) -> Figure | None:
    """Layer by layer Jaccard similarity of the selections of a step's first token, one run per model and task.

    None where no run was observed (METHOD section 2, anchors).
    """
    shown = longest_contexts(rows, "similarity")
    if not shown:
        return None
    import matplotlib.pyplot as plt

    wide = len(shown)
    options: Any = {"squeeze": False, "layout": "constrained"}
    figure: Figure
    figure, grid = plt.subplots(1, wide, figsize=(4.5 * wide + 1.2, 5.5), **options)
    for axis, row in zip(grid[0], shown, strict=True):
        image = _heat(axis, array(row.trace("similarity")), 0.0, 1.0)
        axis.set_title(run_title(row), loc="left", fontsize=9.5)
        axis.set_xlabel("layer")
        axis.invert_yaxis()
    grid[0][0].set_ylabel("layer")
    figure.colorbar(image, ax=list(grid[0]), label="Jaccard similarity of selected blocks", shrink=0.8, pad=0.02)
    notes(figure, shown)
    return figure


@styled
def recall(rows: Sequence[Row]) -> Figure | None:
    """Attention mass that each setting's blocks see, by layer, beside the most that as many blocks could see.

    A line of panels per task, model and machine; rows are settings with their mean over layers at the right. None where
    no run was observed.
    """
    observed = [row for row in rows if row.trace("recall") is not None and row.trace("oracle_recall") is not None]
    grouped = {place: sorted(members, key=_density_order) for place, members in by_place(observed).items()}
    if not grouped:
        return None
    import matplotlib.pyplot as plt

    heights = [len(members) for members in grouped.values()]
    longest = max(len(row.setting) for row in observed)
    size = (9.0 + 0.075 * longest, 0.3 * sum(heights) + 1.25 * len(heights) + 0.4)
    options: Any = {"squeeze": False, "height_ratios": [height + 1.0 for height in heights], "layout": "constrained"}
    figure: Figure
    figure, grid = plt.subplots(len(grouped), 2, figsize=size, **options)
    known = [value for row in observed for value in row.trace("recall") + row.trace("oracle_recall")]
    low = min([0.9, *(float(np.floor(10 * value)) / 10 for value in known if value is not None)])
    for (left, right), ((task, data, model, device), members) in zip(grid, grouped.items(), strict=True):
        for axis, name in ((left, "recall"), (right, "oracle_recall")):
            found = array([row.trace(name) for row in members])
            image = _heat(axis, found, low, 1.0)
            _means(axis, found)
            axis.set_xlabel("layer")
        left.set_yticks(range(len(members)), [row.setting for row in members], fontsize=8.5)
        right.set_yticks(range(len(members)), [""] * len(members))
        left.set_title(f"{task} ({data})\n{model} on {device}", loc="left", pad=20, fontweight="bold")
        for axis, text in ((left, "selected blocks"), (right, "best blocks (oracle)")):
            axis.annotate(text, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points")
    figure.colorbar(image, ax=list(grid.flat), label="recall of attention mass", pad=0.02, aspect=30)
    notes(figure, observed)
    return figure


def _density_order(row: Row) -> tuple[Any, ...]:
    return round(row.density("attention") or 0.0, 3), natural(row.setting)


def _heat(axis: Axes, data: NDArray[np.float64], low: float, high: float) -> Any:
    """A heat map with whole-numbered layers; what was not observed is grey."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    image = axis.imshow(
        np.ma.masked_invalid(data),
        cmap=colormaps["viridis"].with_extremes(bad=_EMPTY),
        vmin=low,
        vmax=high,
        aspect="auto",
        interpolation="nearest",
    )
    axis.grid(visible=False)
    for side in ("top", "right", "bottom", "left"):
        axis.spines[side].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return image


def _means(axis: Axes, data: NDArray[np.float64]) -> None:
    """The mean over layers right of each row."""
    for index, line in enumerate(data):
        if np.isfinite(line).any():
            axis.annotate(
                f"{float(np.nanmean(line)):.3f}",
                (1, index),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
            )
