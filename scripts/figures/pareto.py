"""Speed-up against each kind of loss, with the Pareto front of the settings and the noise floor of dense arms."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from harness.evidence.labels import SIMULATED
from harness.evidence.rows import Estimate, Row
from scripts.figures import beside
from scripts.figures.front import front
from scripts.figures.style import COLOURS, GREY, PALE, Place, bars, by_place, named, notes, styled, values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

MOST_PLACES = 6
_PANEL = (2.75, 2.75)
_KEY_LINE = 0.18
_LETTERS = 12.5
"""Letters of the key to an inch of its width."""

_FLOOR = "#009E73"
_STAIR = 4.0


@dataclass(frozen=True, slots=True)
class Loss:
    """One way of losing: less is better, nothing lost is 0.

    Attributes:
        name: of the axis.
        of: what a setting loses against dense verification.
        floor: what dense verification loses against AR, though it should lose nothing.
    """

    name: str
    of: Callable[[Row], Estimate]
    floor: Callable[[Row], Estimate]


def _missing_to(whole: float, item: Estimate, factor: float = 1.0) -> Estimate:
    """What is missing to `whole`, in units of which `factor` make one of the item's, with its interval."""
    if item.value is None:
        return Estimate()
    interval = None if item.ci is None else (factor * (whole - item.ci[1]), factor * (whole - item.ci[0]))
    return Estimate(factor * (whole - item.value), interval)


LOSSES = (
    Loss("tokens unlike dense's, %", lambda row: _missing_to(1.0, row.agreement, 100.0), lambda row: Estimate()),
    Loss(
        "log-probability of the\nreference lost, nats per token",
        lambda row: _missing_to(0.0, row.reference_delta),
        lambda row: _missing_to(0.0, row.reference_floor),
    ),
    Loss(
        "{metric} lost,\npoints against dense",
        lambda row: _missing_to(0.0, row.delta),
        lambda row: _missing_to(0.0, row.floor),
    ),
)


@dataclass(frozen=True, slots=True)
class Panel:
    """The settings of one place with one loss.

    Attributes:
        rows: those with both numbers.
        speed: speed-up over AR, or over dense verification where that was measured in more settings.
        best: indices of the rows on the front, by growing loss; neither simulated ones nor those of forced acceptance.
    """

    loss: Loss
    rows: tuple[Row, ...]
    speed: Callable[[Row], Estimate]
    best: tuple[int, ...]


def over_ar(row: Row) -> Estimate:
    """Decoding speed-up of sparse verification over AR."""
    return row.sparse_vs_ar


def over_dense(row: Row) -> Estimate:
    """Decoding speed-up of sparse over dense verification."""
    return row.sparse_vs_dense


def panels_of(members: Sequence[Row]) -> list[Panel]:
    """A panel for every loss that two settings or more were measured with."""
    usable = [row for row in members if not row.forced]
    speed = max((over_ar, over_dense), key=lambda base: sum(base(row).value is not None for row in usable))
    found = []
    for loss in LOSSES:
        rows = [row for row in usable if loss.of(row).value is not None and speed(row).value is not None]
        if len(rows) > 1:
            points = [(None if row.simulated else loss.of(row).value, speed(row).value) for row in rows]
            found.append(Panel(loss, tuple(rows), speed, tuple(front(points))))
    return found


@styled
def pareto(rows: Sequence[Row]) -> Figure | None:
    """Speed-up against what is lost: a line of panels per task, model and device, a panel per loss (METHOD section 6).

    Numbered points make the Pareto front of their panel and are named below it; pale ones are dominated. Bars are 95%
    intervals. None where no task has two settings to compare.
    """
    grouped = {place: found for place, members in by_place(rows).items() if (found := panels_of(members))}
    ranked = sorted(grouped, key=lambda place: -max(len(panel.rows) for panel in grouped[place]))
    kept = {place: grouped[place] for place in grouped if place in ranked[:MOST_PLACES]}
    if not kept:
        return None
    import matplotlib.pyplot as plt

    wide = max(len(found) for found in kept.values())
    width = max(_PANEL[0] * wide + 0.3, 3.6)
    keys = {place: _key(found, width) for place, found in kept.items()}
    titles = {place: _title(place, found, width) for place, found in kept.items()}
    lines = [sum(_lines(text) for _, text in keys[place]) + _lines(titles[place]) for place in kept]
    across = 2 if wide == 1 and len(kept) > 1 else 1
    heights = [_PANEL[1] + 0.3 + _KEY_LINE * max(lines[at : at + across]) for at in range(0, len(lines), across)]
    size = (max(width * across, 5.0), sum(heights) + 0.75)
    figure: Figure = plt.figure(figsize=size, layout="constrained")
    parts = list(figure.subfigures(len(heights), across, squeeze=False, height_ratios=heights).flat)
    drawn = []
    for part, (place, found) in zip(parts, kept.items(), strict=False):
        axes = part.subplots(1, wide, squeeze=False, sharey=True)[0]
        for unused in axes[len(found) :]:
            unused.remove()
        for axis, panel in zip(axes, found, strict=False):
            _draw(axis, panel)
            drawn.append((axis, panel, _numbers(found)))
        axes[0].set_ylabel("decoding speed-up\nover AR" if found[0].speed is over_ar else "speed-up over\ndense")
        _name(part, titles[place], keys[place])
    shown = list({row.fingerprint: row for found in kept.values() for panel in found for row in panel.rows}.values())
    _legend(figure, shown, any(_floor(panel) for found in kept.values() for panel in found))
    missing = [f"left out for lack of room: {place[0]}, {place[2]}" for place in grouped if place not in kept]
    notes(figure, shown, missing)
    figure.draw_without_rendering()
    for axis, panel, numbers in drawn:
        _number(axis, panel, numbers)
    return figure


def _numbers(found: Sequence[Panel]) -> dict[str, int]:
    """Fingerprint -> number, of the runs on the front of a panel of this place, by growing speed-up."""
    best = {panel.rows[index].fingerprint: panel.rows[index] for panel in found for index in panel.best}
    ordered = sorted(best.values(), key=lambda row: found[0].speed(row).value or 0.0)
    return {row.fingerprint: number for number, row in enumerate(ordered, start=1)}


def _key(found: Sequence[Panel], width: float) -> list[tuple[int, str]]:
    """Number and name of each setting on a front of this place."""
    rows = {row.fingerprint: row for panel in found for row in panel.rows}
    wrap = int(_LETTERS * (width - 0.6))
    return [(number, textwrap.fill(named(rows[name]), wrap)) for name, number in _numbers(found).items()]


def _draw(axis: Axes, panel: Panel) -> None:
    """Points with their intervals, the staircase, dense verification and the noise floor."""
    for index, row in enumerate(panel.rows):
        _point(axis, panel.loss.of(row), panel.speed(row), on_front=index in panel.best, row=row)
    best = [panel.rows[index] for index in panel.best]
    across, up = values([panel.loss.of(row) for row in best]), values([panel.speed(row) for row in best])
    dense = [value for row in panel.rows if (value := row.dense_vs_ar.value) is not None]
    height = median(dense) if dense and panel.speed is over_ar else 1.0
    if dense or panel.speed is over_dense:
        axis.axhline(height, color=GREY, linestyle="--", linewidth=1.2, zorder=1)
    if panel.speed is over_ar:
        axis.axhline(1.0, color=PALE, linewidth=1, zorder=1)
    axis.axvline(0.0, color=PALE, linewidth=1, zorder=1)
    floor = _floor(panel)
    if floor is not None:
        axis.axvspan(*floor, color=_FLOOR, alpha=0.12, linewidth=0, zorder=0)
    axis.margins(x=0.1, y=0.12)
    if best:
        right = axis.get_xlim()[1]
        stairs: Any = {"color": COLOURS[0], "linewidth": _STAIR, "alpha": 0.3, "zorder": 2, "solid_capstyle": "butt"}
        axis.plot([*across, right], [*up, up[-1]], drawstyle="steps-post", **stairs)
        axis.set_xlim(right=right)
    axis.locator_params(axis="x", nbins=5)
    axis.set_xlabel(panel.loss.name.format(metric=panel.rows[0].metric))


def _floor(panel: Panel) -> tuple[float, float] | None:
    """The widest interval of dense verification's own loss against AR among the runs."""
    found = [item.ci for row in panel.rows if (item := panel.loss.floor(row)).ci is not None]
    return (min(low for low, _ in found), max(high for _, high in found)) if found else None


def _point(axis: Axes, across: Estimate, up: Estimate, *, on_front: bool, row: Row) -> None:
    colour = COLOURS[0] if on_front else PALE
    axis.errorbar(
        values([across]),
        values([up]),
        xerr=bars([across]),
        yerr=bars([up]),
        color=colour,
        marker="X" if row.simulated else "o",
        markersize=6,
        markerfacecolor="white" if row.stale else colour,
        elinewidth=1.0 if on_front else 0.7,
        capsize=2 if on_front else 0,
        linestyle="none",
        zorder=4 if on_front else 3,
    )


def _number(axis: Axes, panel: Panel, numbers: dict[str, int]) -> None:
    """The numbers of the settings on this panel's front, beside them."""
    places = {row.fingerprint: (panel.loss.of(row).value, panel.speed(row).value) for row in panel.rows}
    best = [panel.rows[index].fingerprint for index in panel.best]
    others: Any = [place for name, place in places.items() if name not in best]
    points: Any = [places[name] for name in best]
    beside.label(axis, points, [str(numbers[name]) for name in best], others)


def _title(place: Place, found: Sequence[Panel], width: float) -> str:
    """Task, data, examples, model and machine in lines that fit."""
    task, data, model, device = place
    examples = min(row.examples for panel in found for row in panel.rows)
    wrap = int(_LETTERS * width)
    return "\n".join(textwrap.fill(text, wrap) for text in (f"{task} ({data}), n={examples}", f"{model} on {device}"))


def _lines(text: str) -> int:
    return text.count("\n") + 1


def _name(part: SubFigure, title: str, key: Sequence[tuple[int, str]]) -> None:
    """The title above the panels, the settings of the front below."""
    from matplotlib.lines import Line2D

    part.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    options: Any = {"color": COLOURS[0], "linestyle": "none", "markersize": 7}
    handles = [Line2D([], [], marker=f"${number}$", label=text, **options) for number, text in key]
    part.legend(handles=handles, loc="outside lower left", fontsize=9, labelspacing=0.25, handletextpad=0.2)


def _legend(figure: Figure, rows: Sequence[Row], floor: bool) -> None:
    """What points, lines and bands stand for."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    dot: Any = {"marker": "o", "linestyle": "none"}
    handles: list[Any] = [
        (Line2D([], [], color=COLOURS[0], linewidth=_STAIR, alpha=0.3), Line2D([], [], color=COLOURS[0], **dot)),
        Line2D([], [], color=PALE, label="dominated", **dot),
        Line2D([], [], color=GREY, linestyle="--", label="dense verification"),
    ]
    if floor:
        handles.append(Patch(color=_FLOOR, alpha=0.15, label="noise floor, dense against AR"))
    if any(row.simulated for row in rows):
        handles.append(Line2D([], [], color=PALE, marker="X", linestyle="none", label=SIMULATED))
    if any(row.stale for row in rows):
        handles.append(Line2D([], [], color=GREY, markerfacecolor="white", label="hollow: stale", **dot))
    names = ["Pareto front", *(handle.get_label() for handle in handles[1:])]
    wide = max(1, min(len(handles), int(figure.get_figwidth() / 1.9)))
    figure.legend(handles, names, loc="outside lower center", ncols=wide, fontsize=9.5)
