"""Where the time of a step goes, dense and sparse."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.evidence.rows import Row
from scripts.figures.style import by_place, left_out, legend_columns, named, notes, styled, telling

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ARMS = ("dense", "sparse")
OTHER = "other"
PARTS = {
    "draft": "#999999",
    "select": "#D55E00",
    "attention": "#0072B2",
    "ffn": "#009E73",
    "moe": "#CC79A7",
    "linear": "#E69F00",
    "head": "#56B4E9",
    "accept": "#333333",
    OTHER: "#dddddd",
}
_VERIFYING = ("select", "attention", "ffn", "moe", "linear", "head")


def parts_of(row: Row, arm: str) -> dict[str, float]:
    """Mean milliseconds per step and component, in the order of PARTS; ``other`` is what no component claims."""
    timed = row.components_ms(arm)
    whole = row.mean_step_ms(arm) or 0.0
    parts = {name: timed[name] for name in PARTS if timed.get(name)}
    rest = whole - sum(parts.values())
    return parts | ({OTHER: rest} if rest > 0 else {})


def is_timed(row: Row) -> bool:
    """Whether the verification of both arms was split into components."""
    return all(any(row.components_ms(arm).get(name) for name in _VERIFYING) for arm in ARMS)


@styled
def components(rows: Sequence[Row]) -> Figure | None:
    """Stacked component times of the mean step, a dense and a sparse bar per run; a panel per task, model and machine.

    Of many runs the most telling ones. None where no run was timed by component.
    """
    grouped, missing = telling(by_place([row for row in rows if is_timed(row)]), _saving)
    if not grouped:
        return None
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    heights = [len(members) for members in grouped.values()]
    size = (9.6, 0.38 * sum(heights) + 1.15 * len(heights) + 0.8)
    options: Any = {"squeeze": False, "height_ratios": [height + 0.6 for height in heights], "layout": "constrained"}
    figure: Figure
    figure, grid = plt.subplots(len(grouped), 1, figsize=size, **options)
    for axis, ((task, data, model, device), members) in zip(grid[:, 0], grouped.items(), strict=True):
        _bars(axis, members)
        axis.set_title(f"{task} ({data}), n={min(row.examples for row in members)}\n{model} on {device}", loc="left")
    grid[-1, 0].set_xlabel("mean step in milliseconds")
    shown = [row for members in grouped.values() for row in members]
    seen = {name for row in shown for arm in ARMS for name in parts_of(row, arm)}
    handles = [Patch(color=colour, label=name) for name, colour in PARTS.items() if name in seen]
    figure.legend(handles=handles, loc="outside lower center", ncols=legend_columns(figure, handles))
    notes(figure, shown, left_out(missing))
    return figure


def _saving(row: Row) -> float | None:
    """How much shorter the sparse step is."""
    dense, sparse = (row.mean_step_ms(arm) for arm in ARMS)
    return dense / sparse if dense and sparse else None


def _bars(axis: Axes, members: Sequence[Row]) -> None:
    """Two bars per run, dense above sparse, with their lengths at the end."""
    for index, row in enumerate(members):
        for arm, offset in zip(ARMS, (-0.19, 0.19), strict=True):
            left = 0.0
            for name, value in parts_of(row, arm).items():
                axis.barh(index + offset, value, 0.34, left=left, color=PARTS[name])
                left += value
            text = f"{arm} {left:.1f}"
            axis.annotate(
                text, (left, index + offset), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5
            )
    axis.set_yticks(range(len(members)), [textwrap.fill(named(row), 44) for row in members], fontsize=9)
    axis.set_ylim(len(members) - 0.5, -0.5)
    axis.grid(visible=False, axis="y")
    axis.margins(x=0.14)
