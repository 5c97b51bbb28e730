"""The Pareto front: which settings no other one beats in loss and in speed-up at once."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan


def front(points: Sequence[tuple[float | None, float | None]]) -> list[int]:
    """Indices of the points that no other dominates, by growing loss.

    A point dominates another where it has no more loss and no less gain, and differs in one of them; equal points
    stand on the front together. Points that lack a number, or have one that is not a number, are never on it.

    Args:
        points: (loss, gain) of each setting, less of the first and more of the second being better.
    """
    known = [
        (loss, gain, index)
        for index, (loss, gain) in enumerate(points)
        if loss is not None and gain is not None and not (isnan(loss) or isnan(gain))
    ]
    best: list[tuple[float, float, int]] = []
    for loss, gain, index in sorted(known, key=lambda point: (point[0], -point[1], point[2])):
        if not best or gain > best[-1][1] or (loss, gain) == best[-1][:2]:
            best.append((loss, gain, index))
    return [index for _, _, index in best]
