"""The only clock of the harness."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

Clock = Callable[[], float]
"""Seconds from an arbitrary start; monotonic."""


def make_clock(device_type: str) -> Clock:
    """A clock that waits for the device first, so that queued work is charged to whoever queued it.

    Args:
        device_type: ``cpu`` or ``cuda``.
    """
    if device_type != "cuda":
        return time.perf_counter

    import torch

    def synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronised


class OtherLoad:
    """How much of the processor others use while a run is timed; begins when it is made."""

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float:
        """Processor time of other processes since the beginning over all there was, from 0 to 1."""
        total, busy, own = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return min(1.0, max(0.0, (busy - own) / total)) if total > 0 else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds of processor time since boot: all there was, all that was used, used by this process."""
        machine, mine = psutil.cpu_times(), psutil.Process().cpu_times()
        idle = machine.idle + getattr(machine, "iowait", 0.0)
        return sum(machine) - getattr(machine, "guest", 0.0), sum(machine) - idle, mine.user + mine.system
