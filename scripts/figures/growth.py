"""Step times against the context, dense and sparse, beside their byte limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from scripts.figures.style import GREY, STYLE, canvas, legend_columns, mark

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from scripts.bench.records import StepRow


def figure(rows: Sequence[StepRow]) -> Figure:
    """A panel for each device, model, engine and number of tokens; median with the 10th to 90th percentile.

    Dotted lines are the least bytes of the step over the measured bandwidth.

    Args:
        rows: of one call for each device, model, number format and engine; at least one.
    """
    import matplotlib.pyplot as plt

    panels: dict[tuple[str, ...], list[StepRow]] = {}
    for row in sorted(rows, key=lambda row: (row.device, row.arch, row.engine, row.rows, row.context)):
        panels.setdefault((row.device, row.arch, row.dtype, row.engine, str(row.rows)), []).append(row)
    with plt.rc_context(STYLE):
        made, axes = canvas(len(panels), height=3.4)
        for axis, members in zip(axes, panels.values(), strict=True):
            _panel(axis, members)
        handles, labels = axes[0].get_legend_handles_labels()
        known = dict(zip(labels, handles, strict=True))
        for axis in axes[1:]:
            known |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        shown = list(known.values())
        made.legend(shown, list(known), loc="outside lower center", ncols=legend_columns(made, shown))
    return made


def _panel(axis: Axes, members: Sequence[StepRow]) -> None:
    first = members[0]
    for index, arm in enumerate(dict.fromkeys(row.arm for row in members)):
        own = [row for row in members if row.arm == arm]
        colour, marker = mark(index)
        places, middle = [row.context for row in own], [row.median_ms for row in own]
        below = [max(0.0, row.median_ms - row.p10_ms) for row in own]
        above = [max(0.0, row.p90_ms - row.median_ms) for row in own]
        label = f"{arm}, {own[0].kept} positions per KV head" if own[0].kept else arm
        axis.errorbar(
            places, middle, yerr=[below, above], label=label, color=colour, marker=marker, markersize=5, capsize=2.5
        )
        axis.plot(places, [row.limit_ms for row in own], color=colour, linestyle=":", linewidth=1.2)
    axis.plot([], [], color=GREY, linestyle=":", linewidth=1.2, label="limit by bytes read")
    axis.set_ylim(bottom=0)
    axis.set_xticks(sorted({row.context for row in members}))
    axis.set_xlabel("positions before the step")
    axis.set_ylabel("one step [ms]")
    tokens = f"{first.rows} token{'s' * (first.rows > 1)}, {first.engine}"
    axis.set_title(f"{tokens}\n{first.arch}, {first.dtype}\n{first.device}", loc="left", fontsize=9)
