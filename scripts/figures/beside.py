"""Short labels beside points, where they cover neither each other nor the points."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import cos, pi, sin
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Box = tuple[float, float, float, float]
_RADII = (12.0, 15.0, 20.0, 28.0, 38.0)
_ANGLES = tuple(turn * pi / 8 for turn in (2, 6, 14, 10, 0, 8, 4, 12, 1, 7, 15, 9, 3, 5, 13, 11))
_POINT = 4.0
_WIDE = 0.68
_AIR = 2.0
_LEADER = 13.0


def label(
    axis: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str], others: Sequence[tuple[float, float]] = ()
) -> None:
    """Write each text beside its point, as near as nothing else is there, with a thin line where that is not near.

    The layout of the figure must be done: places are looked for on the drawn axes.

    Args:
        points: of the texts, in data units.
        others: more points that should stay free.
    """
    from matplotlib.patheffects import withStroke

    size, scale = 8.5, axis.figure.dpi / 72
    corners = axis.transAxes.transform([(0, 0), (1, 1)]) / scale
    inside: Box = (*corners[0], *corners[1])
    places = [tuple(axis.transData.transform(point) / scale) for point in points]
    shut = [_around(*place) for place in [*places, *(axis.transData.transform(point) / scale for point in others)]]
    taken: list[Box] = []
    for place, point, text in zip(places, points, texts, strict=True):
        wide, high = _WIDE * size * len(text) + _AIR, size + _AIR
        offset = _free(place, wide, high, inside, taken, shut)
        taken.append(_box(place, offset, wide, high))
        options: Any = {"fontsize": size, "fontweight": "bold", "ha": "center", "va": "center_baseline", "zorder": 6}
        options["path_effects"] = [withStroke(linewidth=2.5, foreground="white")]
        if max(abs(offset[0]), abs(offset[1])) > _LEADER:
            options["arrowprops"] = {"arrowstyle": "-", "linewidth": 0.6, "color": "#555555", "shrinkA": 4}
        axis.annotate(text, point, xytext=offset, textcoords="offset points", **options)


def _free(
    place: Sequence[float], wide: float, high: float, inside: Box, taken: Sequence[Box], shut: Sequence[Box]
) -> tuple[float, float]:
    """The nearest offset in points whose box lies in the axes and off other labels, and covers the fewest points."""
    best, least = (_RADII[0], _RADII[0]), float("inf")
    for rank, (radius, angle) in enumerate(product(_RADII, _ANGLES)):
        offset = ((radius + max(wide - high, 0.0) / 2) * cos(angle), radius * sin(angle))
        box = _box(place, offset, wide, high)
        out = box[0] < inside[0] or box[1] < inside[1] or box[2] > inside[2] or box[3] > inside[3]
        cost = rank + 50.0 * sum(_meet(box, other) for other in shut)
        cost += 1000.0 * (sum(_meet(box, other) for other in taken) + out)
        if cost < least:
            best, least = offset, cost
    return best


def _around(x: float, y: float) -> Box:
    return x - _POINT, y - _POINT, x + _POINT, y + _POINT


def _box(place: Sequence[float], offset: tuple[float, float], wide: float, high: float) -> Box:
    x, y = place[0] + offset[0], place[1] + offset[1]
    return x - wide / 2, y - high / 2, x + wide / 2, y + high / 2


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
