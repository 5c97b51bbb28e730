"""Speed-up against quality, and both against the tokens kept: what attention sparsity gains and costs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from harness.evidence.labels import SIMULATED, natural
from harness.evidence.rows import Estimate, Row
from scripts.figures.style import (
    Place,
    bars,
    by_place,
    canvas,
    columns,
    legend_columns,
    mark,
    notes,
    quality_label,
    series_of,
    styled,
    values,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MOST_SETTINGS = 16
LEGEND_LINE = 0.22


def panels(rows: Sequence[Row]) -> dict[Place, list[Row]]:
    """Rows that may be compared, by place; only those with a sparse and a dense arm."""
    return by_place([row for row in rows if row.sparse_vs_dense.value is not None])


@styled
def tradeoff(rows: Sequence[Row]) -> Figure | None:
    """Speed-up over AR against the quality difference to dense: a panel for each task, a point for each setting.

    Bars are 95% intervals. The dashed line is dense verification of the same runs, with the range of its measurements
    where there are several; the star marks its quality. None where no run has both arms.
    """
    grouped = panels([row for row in rows if row.sparse_vs_ar.value is not None])
    if not grouped:
        return None
    styles = _styles([row for members in grouped.values() for row in members])
    figure, axes = canvas(len(grouped), height=3.5)
    one_place = len({key[2:] for key in grouped}) == 1
    for axis, (key, members) in zip(axes, grouped.items(), strict=False):
        _dense_lines(axis, members)
        for row in members:
            colour, marker = styles[_style_name(row, styles)]
            _point(axis, row.delta, row.sparse_vs_ar, colour, marker, hollow=row.stale)
        axis.set_title(_title(key, members, one_place), loc="left")
        axis.set_xlabel(quality_label(members))
        axis.margins(x=0.12, y=0.18)
        _at_least_a_point(axis)
    _share_speed_scale(axes)
    for axis in axes[:: columns(len(axes))]:
        axis.set_ylabel("decoding speed-up over AR")
    _legend(figure, styles, [row for members in grouped.values() for row in members], grouped)
    notes(figure, [row for members in grouped.values() for row in members])
    return figure


@styled
def kept_tokens(rows: Sequence[Row]) -> Figure | None:
    """Speed-up and quality against the context tokens kept per KV head, where a sweep measured several.

    Top: sparse over dense verification with its byte limit; bottom: quality difference. None without such a sweep.
    """
    sweeps = _sweeps(rows)
    if not sweeps:
        return None
    import matplotlib.pyplot as plt

    size = (6.4, 6.1 + 0.55 * len(sweeps))
    figure, (top, bottom) = plt.subplots(2, 1, figsize=size, sharex=True, layout="constrained")
    for index, (label, members) in enumerate(sweeps.items()):
        _curve(top, bottom, label, members, index)
    top.axhline(1.0, color="#555555", linewidth=1, linestyle="--")
    bottom.axhline(0.0, color="#555555", linewidth=1, linestyle="--")
    ticks = sorted({row.kept_tokens for members in sweeps.values() for row in members if row.kept_tokens})
    bottom.set_xscale("log", base=2)
    bottom.set_xticks(ticks, [str(tick) for tick in ticks])
    bottom.minorticks_off()
    bottom.set_xlabel("context tokens kept per KV head (attn.topk \u00d7 attn.block_size)")
    top.set_ylabel("decoding speed-up over dense")
    bottom.set_ylabel("quality, points against dense")
    low, high = bottom.get_ylim()
    bottom.set_ylim(min(low, -1.0), max(high, 1.0))
    top.plot([], [], color="#555555", linestyle=":", label="limit by bytes read")
    top.plot([], [], color="#555555", linestyle="--", linewidth=1, label="dense verification")
    figure.legend(*top.get_legend_handles_labels(), loc="outside lower center")
    notes(figure, [row for members in sweeps.values() for row in members])
    return figure


def _sweeps(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that differ in kept tokens alone, in their order; only where there are several."""
    found = [row for members in panels(rows).values() for row in members if row.kept_tokens]
    series: dict[str, list[Row]] = {}
    for line in series_of(found, ("attn.topk",), lambda row: float(row.kept_tokens or 0)):
        first = line[0]
        block, others = (first.config.get("attn") or {}).get("block_size"), first.setting.split(", ")[1:]
        label = ", ".join([f"{first.task} ({first.data})", f"blocks of {block}", *others, f"n={first.examples}"])
        text = f"{textwrap.fill(label, 66)}\n{first.model} on {first.device}"
        series[text if text not in series else f"{text}, run {first.fingerprint[:8]}"] = line
    return series


def _curve(top: Axes, bottom: Axes, label: str, members: Sequence[Row], index: int) -> None:
    colour, marker = mark(index)
    kept = [float(row.kept_tokens or 0) for row in members]
    style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 6, "capsize": 3, "linewidth": 1.6}
    speeds, deltas = [row.sparse_vs_dense for row in members], [row.delta for row in members]
    top.errorbar(kept, values(speeds), yerr=bars(speeds), label=label, **style)
    bottom.errorbar(kept, values(deltas), yerr=bars(deltas), **style)
    limits = [(place, row.limit) for place, row in zip(kept, members, strict=True) if row.limit is not None]
    if limits:
        top.plot([place for place, _ in limits], [limit for _, limit in limits], color=colour, linestyle=":")


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each setting, the same in every panel, in order of kept tokens.

    Where there are more settings than a legend can tell apart, of each combination of axes.
    """
    ordered = sorted(rows, key=lambda row: (row.kept_tokens or 0, natural(row.setting)))
    names = list(dict.fromkeys(row.setting for row in ordered))
    if len(names) > MOST_SETTINGS:
        names = sorted({_axes_name(row) for row in ordered}, key=lambda name: (name.count("+"), name))
    return {name: mark(index) for index, name in enumerate(names)}


def _style_name(row: Row, styles: Mapping[str, tuple[str, str]]) -> str:
    return row.setting if row.setting in styles else _axes_name(row)


def _axes_name(row: Row) -> str:
    return " + ".join(row.axes) + (f" ({SIMULATED})" if row.simulated else "")


def _dense_lines(axis: Axes, members: Sequence[Row]) -> None:
    """Dense verification as a line at its speed-up with the runs' range as a band, AR at 1, and no loss of quality."""
    dense = [row.dense_vs_ar.value for row in members if row.dense_vs_ar.value is not None]
    if dense:
        middle = median(dense)
        axis.axhline(middle, color="#333333", linestyle="--", linewidth=1.2)
        if max(dense) > min(dense):
            axis.axhspan(min(dense), max(dense), color="#333333", alpha=0.08, linewidth=0)
        axis.plot([0], [middle], marker="*", markersize=11, color="#333333", linestyle="none")
        _note(axis, f"dense {middle:.2f}", middle, above=middle >= 1)
    axis.axhline(1.0, color="#999999", linewidth=1)
    axis.axvline(0.0, color="#999999", linewidth=1)
    _note(axis, "AR", 1.0, above=bool(dense) and median(dense) < 1)


def _note(axis: Axes, text: str, height: float, *, above: bool) -> None:
    """A small label right of the axes at a height in data units; above and below keep two close ones apart."""
    axis.annotate(
        text,
        (1, height),
        xycoords=("axes fraction", "data"),
        xytext=(3, 0),
        textcoords="offset points",
        va="bottom" if above else "top",
        fontsize=8.5,
        color="#333333",
    )


def _point(axis: Axes, across: Estimate, up: Estimate, colour: str, marker: str, *, hollow: bool) -> None:
    if across.value is None or up.value is None:
        return
    axis.errorbar(
        [across.value],
        [up.value],
        xerr=bars([across]),
        yerr=bars([up]),
        color=colour,
        marker=marker,
        markersize=7.5,
        markerfacecolor="white" if hollow else colour,
        capsize=2.5,
        elinewidth=1.2,
        linestyle="none",
        zorder=3,
    )


def _title(key: Place, members: Sequence[Row], one_place: bool) -> str:
    task, data, model, _ = key
    where = "" if one_place else f"{model}\n"
    return f"{task}\n{where}{data}, n={min(row.examples for row in members)}"


def _at_least_a_point(axis: Axes) -> None:
    """Widen the quality scale to one point on both sides, so that no difference looks like none."""
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, -1.0), max(high, 1.0))


def _share_speed_scale(axes: Sequence[Axes]) -> None:
    low = min(axis.get_ylim()[0] for axis in axes)
    high = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(low, high)


def _legend(
    figure: Figure, styles: Mapping[str, tuple[str, str]], rows: Sequence[Row], places: Iterable[Place]
) -> None:
    """The settings below the panels, which keep their size; models and machines above."""
    from matplotlib.lines import Line2D

    kept = {_style_name(row, styles): row.kept_tokens for row in rows if row.setting in styles}
    handles = []
    for name, (colour, marker) in styles.items():
        label = f"{name} ({kept[name]} tokens)" if kept.get(name) else name
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="none", label=label))
    handles.append(Line2D([], [], color="#333333", marker="*", linestyle="--", label="dense verification"))
    if any(row.stale for row in rows):
        hollow = Line2D([], [], color="#333333", marker="o", markerfacecolor="white", linestyle="none")
        hollow.set_label("hollow: stale")
        handles.append(hollow)
    wide = legend_columns(figure, handles)
    figure.set_figheight(figure.get_figheight() + max(0, -(-len(handles) // wide) - 2) * LEGEND_LINE)
    figure.legend(handles=handles, loc="outside lower center", ncols=wide)
    figure.suptitle("\n".join(dict.fromkeys(f"{model} on {device}" for _, _, model, device in places)), fontsize=11)
