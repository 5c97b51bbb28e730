"""Figures from stored results alone, as PNG and PDF: `python -m scripts.plots`."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from harness.evidence.rows import Estimate, Row
from scripts import common

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with every common colour blindness; yellow is left out, too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
COLUMNS = 3
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "savefig.bbox": "tight",
}


def panels(rows: Sequence[Row]) -> dict[tuple[str, str, str, str], list[Row]]:
    """Rows that may be compared, by (task, data, model, device); only those with a sparse and a dense arm."""
    usable = [row for row in rows if row.counted and row.sparse_vs_dense.value is not None]
    grouped = groupby(usable, key=lambda row: (row.task, row.data, row.model, row.device))
    merged: dict[tuple[str, str, str, str], list[Row]] = {}
    for key, members in grouped:
        merged.setdefault(key, []).extend(members)
    return merged


def _styled(draw: Callable[[Sequence[Row]], Figure | None]) -> Callable[[Sequence[Row]], Figure | None]:
    """Draw under STYLE."""

    @wraps(draw)
    def styled(rows: Sequence[Row]) -> Figure | None:
        import matplotlib.pyplot as plt

        with plt.rc_context(STYLE):
            return draw(rows)

    return styled


@_styled
def tradeoff(rows: Sequence[Row]) -> Figure | None:
    """Speed-up over AR against the quality difference to dense: a panel for each task, a point for each setting.

    Bars are 95% intervals. The dashed line is dense verification of the same runs, with the range of its measurements
    where there are several; the star marks its quality. None where no run has both arms.
    """
    grouped = {key: members for key, members in panels(rows).items() if members[0].sparse_vs_ar.value is not None}
    if not grouped:
        return None
    styles = _styles([row for members in grouped.values() for row in members])
    figure, axes = _canvas(len(grouped), height=3.5)
    for axis, (key, members) in zip(axes, grouped.items(), strict=False):
        _dense_lines(axis, members)
        for row in members:
            colour, marker = styles[row.setting]
            _point(axis, row.delta, row.sparse_vs_ar, colour, marker, hollow=row.stale)
        axis.set_title(_title(key, members), loc="left")
        axis.set_xlabel(_quality_label(members))
        axis.margins(x=0.12, y=0.18)
        _at_least_a_point(axis)
    _share_speed_scale(axes)
    for axis in axes[:: _columns(len(axes))]:
        axis.set_ylabel("decoding speed-up over AR")
    _legend(figure, styles, grouped)
    return figure


@_styled
def kept_tokens(rows: Sequence[Row]) -> Figure | None:
    """Speed-up and quality against the context tokens kept per KV head, where a sweep measured several.

    Top: sparse over dense verification with its byte limit; bottom: quality difference. None without such a sweep.
    """
    sweeps = _sweeps(rows)
    if not sweeps:
        return None
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(6.4, 6.6), sharex=True, layout="constrained")
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
    top.plot([], [], color="#555555", linestyle=":", label="limit by bytes read")
    top.plot([], [], color="#555555", linestyle="--", linewidth=1, label="dense verification")
    figure.legend(*top.get_legend_handles_labels(), loc="outside lower center")
    return figure


def _sweeps(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that differ in kept tokens alone, in their order; only where there are several."""
    series: dict[str, list[Row]] = {}
    for (task, data, model, device), members in panels(rows).items():
        for row in members:
            block, others = (row.config.get("attn") or {}).get("block_size"), row.setting.split(", ")[1:]
            label = ", ".join([f"{task} ({data})", f"blocks of {block}", *others, f"n={row.examples}"])
            if row.kept_tokens:
                series.setdefault(f"{label}\n{model} on {device}", []).append(row)
    ordered = {label: sorted(members, key=lambda row: row.kept_tokens or 0) for label, members in series.items()}
    return {label: members for label, members in ordered.items() if len({row.kept_tokens for row in members}) > 1}


def _curve(top: Axes, bottom: Axes, label: str, members: Sequence[Row], index: int) -> None:
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    kept = [float(row.kept_tokens or 0) for row in members]
    style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 6, "capsize": 3, "linewidth": 1.6}
    speeds, deltas = [row.sparse_vs_dense for row in members], [row.delta for row in members]
    top.errorbar(kept, _values(speeds), yerr=_bars(speeds), label=label, **style)
    bottom.errorbar(kept, _values(deltas), yerr=_bars(deltas), **style)
    limits = [(place, row.limit) for place, row in zip(kept, members, strict=True) if row.limit is not None]
    if limits:
        top.plot([place for place, _ in limits], [limit for _, limit in limits], color=colour, linestyle=":")


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each setting, the same in every panel, in order of kept tokens."""
    settings = dict.fromkeys(row.setting for row in sorted(rows, key=lambda row: (row.kept_tokens or 0, row.setting)))
    return {
        name: (COLOURS[index % len(COLOURS)], MARKERS[(index + index // len(COLOURS)) % len(MARKERS)])
        for index, name in enumerate(settings)
    }


def _columns(count: int) -> int:
    """Panels side by side: at most COLUMNS, and four as a square."""
    return 2 if count == 4 else min(count, COLUMNS)


def _canvas(count: int, *, height: float) -> tuple[Figure, list[Axes]]:
    """A grid of `count` axes, at most COLUMNS wide."""
    import matplotlib.pyplot as plt

    wide = _columns(count)
    deep = -(-count // wide)
    size = (max(3.6 * wide + 0.6, 5.0), height * deep + 0.5)
    figure, grid = plt.subplots(deep, wide, figsize=size, squeeze=False, layout="constrained")
    axes = list(grid.flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


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
        xerr=_bars([across]),
        yerr=_bars([up]),
        color=colour,
        marker=marker,
        markersize=7.5,
        markerfacecolor="white" if hollow else colour,
        capsize=2.5,
        elinewidth=1.2,
        linestyle="none",
        zorder=3,
    )


def _values(estimates: Sequence[Estimate]) -> list[float]:
    return [float("nan") if item.value is None else item.value for item in estimates]


def _bars(estimates: Sequence[Estimate]) -> list[list[float]]:
    """[2][n] distances below and above; a missing interval has no length."""
    below, above = [], []
    for item in estimates:
        known = item.value is not None and item.ci is not None
        below.append(max(item.value - item.ci[0], 0.0) if known else 0.0)  # type: ignore[operator, index]
        above.append(max(item.ci[1] - item.value, 0.0) if known else 0.0)  # type: ignore[operator, index]
    return [below, above]


def _title(key: tuple[str, str, str, str], members: Sequence[Row]) -> str:
    task, data, *_ = key
    return f"{task}\n{data}, n={min(row.examples for row in members)}"


def _quality_label(members: Sequence[Row]) -> str:
    """Metric with the value of dense verification (the median of its runs), so that a floor is seen."""
    dense = [value for row in members if (value := row.quality.get("dense")) is not None]
    return f"{members[0].metric}, points against dense" + (f" ({median(dense):.1f})" if dense else "")


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
    figure: Figure, styles: dict[str, tuple[str, str]], grouped: dict[tuple[str, str, str, str], list[Row]]
) -> None:
    from matplotlib.lines import Line2D

    kept = {row.setting: row.kept_tokens for members in grouped.values() for row in members}
    handles = [
        Line2D(
            [],
            [],
            color=colour,
            marker=marker,
            linestyle="none",
            label=f"{name} ({kept[name]} tokens)" if kept[name] else name,
        )
        for name, (colour, marker) in styles.items()
    ]
    handles.append(Line2D([], [], color="#333333", marker="*", linestyle="--", label="dense verification"))
    if any(row.stale for members in grouped.values() for row in members):
        handles.append(
            Line2D(
                [], [], color="#333333", marker="o", markerfacecolor="white", linestyle="none", label="hollow: stale"
            )
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=min(1 + _columns(len(grouped)), len(handles)))
    places = dict.fromkeys(f"{model} on {device}" for _, _, model, device in grouped)
    figure.suptitle("\n".join(places), fontsize=11)


FIGURES = {"tradeoff": tradeoff, "kept_tokens": kept_tokens}


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw every figure that the rows allow and write it to `folder` as PNG and PDF, each atomically."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for name, draw in FIGURES.items():
        figure = draw(rows)
        if figure is None:
            continue
        for suffix, options in (("png", {"dpi": 160}), ("pdf", {"metadata": {"CreationDate": None}})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, **options)
            written.append(_replace(folder / f"{name}.{suffix}", buffer.getvalue()))
        plt.close(figure)
    return written


def _replace(file: Path, content: bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as stream:
        stream.write(content)
    Path(stream.name).chmod(0o644)
    os.replace(stream.name, file)
    return file


def main(argv: Sequence[str] | None = None) -> int:
    """Write the figures; 2 where there is nothing to show."""
    loaded = common.load(common.parser("scripts.plots", "Figures from stored results alone.", "figures"), argv)
    if loaded is None:
        return 2
    arguments, rows = loaded
    written = write(rows, common.out_folder(arguments))
    if not written:
        print("no finished run has both a dense and a sparse arm; run with arms=[ar,dense,sparse]", file=sys.stderr)
        return 2
    for file in written:
        print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
