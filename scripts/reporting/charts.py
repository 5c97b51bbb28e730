"""Small bar charts of one run, as places on a canvas that the template draws as SVG."""

from __future__ import annotations

from dataclasses import dataclass

from harness.evidence.rows import Row
from scripts.cells import number
from scripts.figures.components import PARTS, parts_of

ARMS = ("ar", "dense", "sparse", "sparse_ar")
BAR, GAP, TALL = 18, 5, 64
STACK = 560
LAST = 12
"""Steps of more new tokens are counted together, so that a tree's chart stays narrow."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar at x, its height (of TALL), its label below and its share in per cent above."""

    x: float
    height: float
    label: str
    share: str


@dataclass(frozen=True, slots=True)
class Histogram:
    """Steps of an arm by their new tokens; `text` says the same in words."""

    arm: str
    steps: int
    bars: tuple[Bar, ...]
    width: int
    text: str


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a stacked bar: place and width of STACK, its milliseconds and its class in the style sheet."""

    name: str
    x: float
    width: float
    ms: float


@dataclass(frozen=True, slots=True)
class Stack:
    """Component times of an arm's mean step."""

    arm: str
    total: float
    segments: tuple[Segment, ...]


def histograms(row: Row) -> list[Histogram]:
    """One chart for each arm that took steps."""
    return [_histogram(arm, row.histogram(arm)) for arm in ARMS if sum(row.histogram(arm))]


def _histogram(arm: str, counts: tuple[int, ...]) -> Histogram:
    first = 0 if counts[0] else 1
    shown = [(str(new), count) for new, count in enumerate(counts[:LAST]) if new >= first]
    if len(counts) > LAST:
        shown.append((f"{LAST}+", sum(counts[LAST:])))
    steps, most = sum(counts), max(count for _, count in shown)
    bars = tuple(
        Bar(GAP + index * (BAR + GAP), TALL * count / most, label, number(100 * count / steps, 0) if count else "")
        for index, (label, count) in enumerate(shown)
    )
    told = ", ".join(f"{label}: {count}" for label, count in shown if count)
    return Histogram(arm, steps, bars, GAP + len(bars) * (BAR + GAP), f"{arm}, steps by new tokens: {told}")


def stacks(row: Row) -> list[Stack]:
    """A stacked bar for each arm whose step was timed, on one scale; none where nothing but the whole is known."""
    parts = {arm: parts_of(row, arm) for arm in ARMS}
    parts = {arm: found for arm, found in parts.items() if len(found) > 1}
    longest = max((sum(found.values()) for found in parts.values()), default=0.0)
    stacked = []
    for arm, found in parts.items():
        segments, x = [], 0.0
        for name, ms in found.items():
            width = STACK * ms / longest
            segments.append(Segment(name, round(x, 2), round(width, 2), ms))
            x += width
        stacked.append(Stack(arm, sum(found.values()), tuple(segments)))
    return stacked


def components(stacked: list[Stack]) -> list[tuple[str, list[float | None]]]:
    """The same as a table: component and its milliseconds in each arm, in the order in which they are stacked."""
    times = [{segment.name: segment.ms for segment in stack.segments} for stack in stacked]
    return [(name, [arm.get(name) for arm in times]) for name in PARTS if any(name in arm for arm in times)]
