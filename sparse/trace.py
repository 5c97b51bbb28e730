"""Counters of what a decode really did: paths taken, positions attended, selections computed and reused.

Counters are plain integers, kept without touching the device, so that tracing never slows a timed arm noticeably.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

DENSE_PATH = "dense_attention.torch"
SPARSE_PATH = "block_attention.torch"


@dataclass(slots=True)
class Trace:
    """Counters of one decode.

    Attributes:
        paths: calls per path name, for example ``block_attention.torch``; one call per layer and step.
        visible: positions that dense attention would read, summed over layers and steps.
        attended: positions really read per KV head, summed over layers and steps.
        selections: block selections computed.
        reused: draft rows that used the selection of their step's root (METHOD section 5).
    """

    paths: Counter[str] = field(default_factory=Counter)
    visible: int = 0
    attended: int = 0
    selections: int = 0
    reused: int = 0

    def dense(self, length: int) -> None:
        """One layer attended to all ``length`` positions."""
        self.paths[DENSE_PATH] += 1
        self.visible += length
        self.attended += length

    def sparse(self, length: int, attended: int, rows: int) -> None:
        """One layer attended to ``attended`` of ``length`` positions with ``rows`` tokens sharing one selection."""
        self.paths[SPARSE_PATH] += 1
        self.visible += length
        self.attended += attended
        self.selections += 1
        self.reused += rows - 1

    @property
    def density(self) -> float | None:
        """Attended over visible positions; None before any step."""
        return self.attended / self.visible if self.visible else None
