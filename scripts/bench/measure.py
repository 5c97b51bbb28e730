"""Arms that alternate in one process, and what is told of their times. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Arm = Callable[[], object]
Clock = Callable[[], float]
Times = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Spread:
    """Median of repeated measurements with their 10th and 90th percentile, in the unit of the measurements."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10])

    def scaled(self, factor: float) -> Spread:
        """In another unit; ``factor`` is above zero."""
        return Spread(self.median * factor, self.p10 * factor, self.p90 * factor)

    def text(self, digits: int = 2) -> str:
        """``median [p10, p90]``."""
        return f"{self.median:.{digits}f} [{self.p10:.{digits}f}, {self.p90:.{digits}f}]"


def alternate(arms: Mapping[str, Arm], clock: Clock, repeats: int, warmup: int = 2) -> Times:
    """Seconds of each arm, run in turn; the order turns round from round to round.

    Args:
        arms: what to call, by name.
        clock: seconds; waits for the device.
        repeats: timed rounds over all arms.
        warmup: rounds before them.
    """
    times: Times = {name: [] for name in arms}
    for turn in range(warmup + repeats):
        order = list(arms) if turn % 2 == 0 else list(arms)[::-1]
        for name in order:
            start = clock()
            arms[name]()
            seconds = clock() - start
            if turn >= warmup:
                times[name].append(seconds)
    return times


def ratio(times: Mapping[str, Sequence[float]], over: str, under: str) -> Spread:
    """Spread of the round-by-round ratios of two arms: drift of the machine cancels within a round."""
    return Spread.of([a / b for a, b in zip(times[over], times[under], strict=True)])
