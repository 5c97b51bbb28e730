"""When a trial is stopped before its last example. Optuna prunes studies of one objective only, so the rule is ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from harness.evidence.records import Record
from scripts.tuning.measure import ONE_SE, Measure, Table, against, excess

LEAST_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Bar:
    """What a trial is held against: the finished trials of the front by number, the default, and the limit of the loss.

    Without a limit the default's loss is the limit.
    """

    rivals: Mapping[int, Table]
    default: Table
    limit: float | None


def hopeless(table: Table, bar: Bar) -> str | None:
    """Why a trial need not go on, None where it should.

    Judged at the optimistic end of an interval of one standard error, widened for few clusters: the loss is above the
    limit, or one rival is faster and loses no more, both on the same examples. Nothing is said before LEAST_EXAMPLES
    examples of two clusters.
    """
    if len(table) < LEAST_EXAMPLES:
        return None
    over = excess(table, bar.default, bar.limit)
    if over.ci is not None and over.ci[0] > 0:
        name = "the default's" if bar.limit is None else f"the limit of {bar.limit:.4g}"
        return f"after {len(table)} examples its loss is {over.value:.4g} above {name}, at best {over.ci[0]:.4g}"
    for number, rival in bar.rivals.items():
        speed, lost = against(table, rival, level=ONE_SE)
        if speed.ci is not None and lost.ci is not None and speed.ci[1] < 1 and lost.ci[0] >= 0:
            return (
                f"after {len(table)} examples it is {speed.value:.2f} times as fast as trial {number}, at best "
                f"{speed.ci[1]:.2f}, and loses {lost.value:.4g} more, at best {lost.ci[0]:.4g}"
            )
    return None


def watcher(measure: Measure, bar: Bar, examples: int) -> Callable[[Sequence[Record]], str | None]:
    """What harness.runner asks after each wave; a run whose `examples` are all there is never stopped."""

    def watch(records: Sequence[Record]) -> str | None:
        table = measure.table(records)
        return hopeless(table, bar) if len(table) < examples else None

    return watch
