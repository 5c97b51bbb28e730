"""Which trials no other one beats in both numbers, and the one that is chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scripts.tuning.measure import LEVEL, ONE_SE, Estimate, Table, excess


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen trial's number, and in words by which rule it was chosen."""

    number: int
    rule: str


def pareto(points: Mapping[int, tuple[float, float]]) -> list[int]:
    """Numbers of the trials (speed-up, loss) that no other one beats, fastest first; of equal ones the first."""
    front: list[int] = []
    least = float("inf")
    for number in sorted(points, key=lambda number: (-points[number][0], points[number][1], number)):
        if points[number][1] < least:
            front.append(number)
            least = points[number][1]
    return front


def choose(tables: Mapping[int, Table], default: int, limit: float | None) -> Choice:
    """The fastest trial whose loss surely keeps to the limit.

    "Surely" is at the pessimistic end of a 95% interval, because the best of many settings by point estimate is a lucky
    one more often than not. Without a `limit` the default's own loss is the limit, compared on the same examples. Where
    nothing faster than the default keeps to it surely, an interval of one standard error decides, then the point
    estimate; where none keeps to it at all, the one of least loss is chosen.
    """
    speeds = {number: table.speed().value for number, table in tables.items()}
    losses = {number: table.loss().value for number, table in tables.items()}
    if limit is None:
        name = "at most the default's on the same examples"
    else:
        name = "any size" if math.isinf(limit) else f"at most {limit:.4g}"
    over: dict[int, Estimate] = {}
    for level, words in ((LEVEL, "with 95% confidence"), (ONE_SE, "by one standard error")):
        over = {number: excess(table, tables[default], limit, level=level) for number, table in tables.items()}
        if limit is None:
            over[default] = Estimate(0.0, (0.0, 0.0))
        surely = [number for number, one in over.items() if one.ci is not None and one.ci[1] <= 0]
        if surely and (best := _best(surely, speeds)) != default:
            return Choice(best, f"the fastest with a loss of {name}, {words}")
    nearly = [number for number, one in over.items() if one.value <= 0]
    if nearly:
        return Choice(_best(nearly, speeds), f"the fastest with a loss of {name}, by the point estimate alone")
    least = min(losses, key=lambda number: (losses[number], -speeds[number]))
    return Choice(least, f"the one of least loss: no setting has a loss of {name}")


def _best(numbers: Sequence[int], speeds: Mapping[int, float]) -> int:
    return max(numbers, key=lambda number: (speeds[number], -number))
