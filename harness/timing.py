"""The only clock of the harness."""

from __future__ import annotations

import time
from collections.abc import Callable

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
