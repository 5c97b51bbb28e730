"""What the verification steps of one decode carry along: budgets, counters, remembered selections, a probe."""

from __future__ import annotations

from dataclasses import dataclass, field

from harness.engine.model.probe import Probe
from sparse.budget import Sparsity
from sparse.reuse import SelectionMemory
from sparse.trace import Trace


@dataclass(slots=True)
class Verification:
    """The state of verification over the steps of one decode; a new decode takes a new one.

    Attributes:
        sparsity: what may be skipped; nothing by default.
        trace: counters of what was done.
        memories: remembered selections, per row of the cache.
        probe: looks into untimed passes, None in timed ones.
        tapped: whether the features of the step's taps are wanted.
        left_out: layers that do not run at all; a drafter's own choice, never that of a verification.
    """

    sparsity: Sparsity = field(default_factory=Sparsity)
    trace: Trace = field(default_factory=Trace)
    memories: dict[int, SelectionMemory] = field(default_factory=dict)
    probe: Probe | None = None
    tapped: bool = True
    left_out: frozenset[int] = frozenset()

    def memory(self, row: int) -> SelectionMemory:
        """What ``row`` of the cache remembers."""
        return self.memories.setdefault(row, SelectionMemory())

    def begin(self, rows: list[int], tokens: int) -> None:
        """A step of ``tokens`` tokens in all, over these rows of the cache, starts."""
        self.trace.begin(tokens)
        for row in rows:
            self.memory(row).begin()
