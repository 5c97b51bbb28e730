"""Peaks of the device at hand, measured: the limit that every step time is shown beside (METHOD section 7)."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from harness.timing import Clock, make_clock

_PROBE_BYTES = 1 << 28
_REPEATS = 7


@cache
def bandwidth(device_type: str, threads: int) -> float:
    """Bytes per second that plain reads or copies reach; the better of the two, best of a few tries.

    Args:
        device_type: ``cpu`` or ``cuda``.
        threads: CPU threads in use; part of the key only.
    """
    source = torch.ones(_PROBE_BYTES // 4, device=device_type)
    target = torch.empty_like(source)
    clock, best = make_clock(device_type), 0.0
    for _ in range(_REPEATS):
        for moved, work in ((source.nbytes, source.sum), (2 * source.nbytes, lambda: target.copy_(source))):
            best = max(best, moved / _seconds(work, clock))
    return best


def device_text(device: torch.device, threads: int) -> str:
    """What a run computes on, in words, without the machine's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {threads} threads"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return " ".join(next(named, platform.processor() or platform.machine()).split())


def _seconds(work: Callable[[], object], clock: Clock) -> float:
    start = clock()
    work()
    return clock() - start
