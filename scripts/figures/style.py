"""What the figures share: colours, sizes, panels, labels of runs and the notes below."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import wraps
from statistics import median
from typing import TYPE_CHECKING, Any

from harness.evidence.labels import SIMULATED, identity
from harness.evidence.rows import Estimate, Row
from scripts.cells import CARVED, SIMULATED_NOTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with every common colour blindness; yellow is left out, too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#555555"
PALE = "#b0b0b0"
COLUMNS = 3
MOST_RUNS = 16
"""Runs that a figure with a line for each of them shows at most."""

MOST_NAMED = 8
NOTE_SIZE = 8.5
NOTE_LINE = 0.15
"""Height of a line of notes in inches."""
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
}
Place = tuple[str, str, str, str]


def styled(draw: Callable[[Sequence[Row]], Figure | None]) -> Callable[[Sequence[Row]], Figure | None]:
    """Draw under STYLE."""

    @wraps(draw)
    def inner(rows: Sequence[Row]) -> Figure | None:
        import matplotlib.pyplot as plt

        with plt.rc_context(STYLE):
            return draw(rows)

    return inner


def by_place(rows: Sequence[Row]) -> dict[Place, list[Row]]:
    """Rows that count, by (task, data, model, device): only within these may they be compared."""
    merged: dict[Place, list[Row]] = {}
    for row in rows:
        if row.counted:
            merged.setdefault((row.task, row.data, row.model, row.device), []).append(row)
    return merged


def columns(count: int) -> int:
    """Panels side by side: at most COLUMNS, and four as a square."""
    return 2 if count == 4 else min(count, COLUMNS)


def canvas(count: int, *, height: float) -> tuple[Figure, list[Axes]]:
    """A grid of `count` axes, at most COLUMNS wide."""
    import matplotlib.pyplot as plt

    wide = columns(count)
    deep = -(-count // wide)
    size = (max(3.6 * wide + 0.6, 5.0), height * deep + 0.5)
    figure, grid = plt.subplots(deep, wide, figsize=size, squeeze=False, layout="constrained")
    axes = list(grid.flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def values(estimates: Sequence[Estimate]) -> list[float]:
    """The values; not a number where there is none."""
    return [float("nan") if item.value is None else item.value for item in estimates]


def bars(estimates: Sequence[Estimate]) -> list[list[float]]:
    """[2][n] distances below and above; a missing interval has no length."""
    below, above = [], []
    for item in estimates:
        known = item.value is not None and item.ci is not None
        below.append(max(item.value - item.ci[0], 0.0) if known else 0.0)  # type: ignore[operator, index]
        above.append(max(item.ci[1] - item.value, 0.0) if known else 0.0)  # type: ignore[operator, index]
    return [below, above]


def mark(index: int) -> tuple[str, str]:
    """Colour and marker of the index-th series; pairs repeat late."""
    return COLOURS[index % len(COLOURS)], MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]


def series_of(rows: Sequence[Row], keys: Collection[str], place: Callable[[Row], float | None]) -> list[list[Row]]:
    """Lines of a figure: rows of one model and device whose configurations differ in ``keys`` alone, by ``place``.

    Only lines of at least two places; of two runs of one setting the one of the present sources, then the later.
    """
    lines: dict[tuple[str, ...], dict[float, Row]] = {}
    for row in sorted(rows, key=lambda row: (not row.stale, row.start)):
        where = place(row)
        if row.counted and where is not None:
            home = (row.model, row.device, identity(row.config, keys))
            lines.setdefault(home, {})[where] = row
    return [[line[where] for where in sorted(line)] for line in lines.values() if len(line) > 1]


def legend_columns(figure: Figure, handles: Sequence[Any]) -> int:
    """Columns that fit below the figure, by the longest label."""
    longest = max(len(handle.get_label()) for handle in handles)
    return max(1, min(len(handles), int(figure.get_figwidth() / (0.08 * longest + 0.65))))


def quality_label(members: Sequence[Row]) -> str:
    """Metric with the value of dense verification (the median of its runs), so that a floor is seen."""
    dense = [value for row in members if (value := row.quality.get("dense")) is not None]
    return f"{members[0].metric}, points against dense" + (f" ({median(dense):.1f})" if dense else "")


def run_title(row: Row) -> str:
    """Which run a panel shows, in three lines."""
    prompt = f"prompts of {row.prompt_tokens:.0f} tokens" if row.prompt_tokens is not None else "prompts"
    return (
        f"{row.task}, {row.setting}\n{prompt}, n={row.examples}, run {row.fingerprint[:8]}\n{row.model}, {row.device}"
    )


def longest_contexts(rows: Sequence[Row], block: str, most: int = COLUMNS) -> list[Row]:
    """The run of each model and task that shows `block` best, those of the longest prompts first.

    A run of the present sources before a stale one, then the longest prompts, then attention alone before a hybrid; of
    the runs that are equal in all this, the one of middle density.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.counted and row.trace(block) is not None:
            groups.setdefault((row.model, row.task_name), []).append(row)
    found = []
    for members in groups.values():
        best = min(_rank(row) for row in members)
        equal = [row for row in members if _rank(row) == best]
        equal.sort(key=lambda row: (row.density("attention") or 0.0, row.fingerprint))
        found.append(equal[(len(equal) - 1) // 2])
    return sorted(found, key=_rank)[:most]


def _rank(row: Row) -> tuple[bool, float, bool, int]:
    return row.stale, -(row.prompt_tokens or 0.0), row.simulated, len(row.axes)


def telling(
    grouped: Mapping[Place, Sequence[Row]], worth: Callable[[Row], float | None]
) -> tuple[dict[Place, list[Row]], list[Row]]:
    """At most MOST_RUNS runs of all places together (two of each place at least), and the ones that are left out.

    Runs of the present sources before stale ones and measured before simulated; of each combination of axes in turn
    the run of the most `worth`, of the least, of the second most and so on. The order of the rows is kept.
    """
    sizes = [len(members) for members in grouped.values()]
    each = max(
        (most for most in range(2, MOST_RUNS + 1) if sum(min(size, most) for size in sizes) <= MOST_RUNS), default=2
    )
    shown: dict[Place, list[Row]] = {}
    missing: list[Row] = []
    for place, members in grouped.items():
        chosen = _by_turns(members, worth)[:each]
        shown[place] = [row for row in members if any(row is one for one in chosen)]
        missing += [row for row in members if not any(row is one for one in chosen)]
    return shown, missing


def _by_turns(members: Sequence[Row], worth: Callable[[Row], float | None]) -> list[Row]:
    kinds: dict[tuple[bool, bool, tuple[str, ...]], list[Row]] = {}
    for row in sorted(members, key=lambda row: -(worth(row) or 0.0)):
        kinds.setdefault((row.stale, row.simulated, row.axes), []).append(row)
    ranked = []
    for kind, own in kinds.items():
        ends = [own[turn // 2] if turn % 2 == 0 else own[-1 - turn // 2] for turn in range(len(own))]
        ranked += [(kind[:2], turn, len(kind[2]), row) for turn, row in enumerate(ends)]
    return [row for *_, row in sorted(ranked, key=lambda entry: entry[:3])]


def left_out(rows: Sequence[Row]) -> list[str]:
    """A note for each task, on the runs that a figure has no room for."""
    told: dict[str, list[str]] = {}
    for row in rows:
        told.setdefault(f"{row.task}, {row.model}", []).append(row.setting)
    found = []
    for place, settings in told.items():
        names = "; ".join(settings[:MOST_NAMED])
        more = f"; and {len(settings) - MOST_NAMED} more" if len(settings) > MOST_NAMED else ""
        found.append(f"left out for lack of room: {place}: {names}{more}")
    return found


def named(row: Row) -> str:
    """A run's setting with the marks that it does not tell already."""
    marks = [mark for mark in row.marks if mark != SIMULATED]
    return f"{row.setting} [{', '.join(marks)}]" if marks else row.setting


def notes(figure: Figure, rows: Sequence[Row], more: Sequence[str] = ()) -> None:
    """Below the panels: what carved and simulated runs among `rows` do not say, then `more`; the figure grows by it."""
    told = [CARVED] if any(row.carved for row in rows) else []
    told += [SIMULATED_NOTE] if any(row.simulated for row in rows) else []
    told += more
    lines = [line for note in told for line in textwrap.wrap(note, int(13 * figure.get_figwidth()))]
    if not lines:
        return
    from matplotlib.font_manager import FontProperties

    figure.set_figheight(figure.get_figheight() + NOTE_LINE * len(lines))
    if figure.legends:
        figure.legends[0].set_title("\n".join(lines), prop=FontProperties(size=NOTE_SIZE))
        figure.legends[0].set_alignment("left")
    else:
        figure.supxlabel("\n".join(lines), fontsize=NOTE_SIZE, x=0.02, ha="left")
