"""Peaks of the device at hand, measured: the limit that every step time is shown beside (METHOD section 7).

What is measured is kept on disk per processor, number of threads and version of torch, next to converted weights; but
not what was measured while others used the processor.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from harness.engine.model.loading import cache_dir
from harness.timing import Clock, OtherLoad, make_clock
from sparse.cost import Peaks

_PROBE_BYTES = 1 << 28
_REPEATS = 7
_QUEUED = 8
"""Copies or products in a row on a GPU, so that launching them hides behind the work."""
_LONGEST = 0.1
"""Seconds of a matrix product after which no larger one is tried."""
_LARGEST = 8192
_QUIET = 0.1
"""Share of the processor that others may use before what is measured on it is not kept on disk."""
_known: dict[str, float] = {}


def peaks(device_type: str, threads: int, dtype: torch.dtype, *, anew: bool = False) -> Peaks:
    """Bandwidth and matrix rate of the device.

    Args:
        device_type: ``cpu`` or ``cuda``.
        threads: CPU threads in use; part of the key only.
        dtype: of the matrices.
        anew: measure again and replace what is kept.
    """
    return Peaks(bandwidth(device_type, threads, anew=anew), matrix_rate(device_type, threads, dtype, anew=anew))


def bandwidth(device_type: str, threads: int, *, anew: bool = False) -> float:
    """Bytes per second that plain reads or copies reach; the better of the two, best of a few tries.

    Args:
        device_type, threads, anew: as in :func:`peaks`.
    """
    return _kept("bandwidth", device_type, threads, lambda: _measured_bandwidth(device_type), anew)


def matrix_rate(device_type: str, threads: int, dtype: torch.dtype, *, anew: bool = False) -> float:
    """Floating-point operations per second that products of large square matrices reach, best of a few tries.

    Args:
        device_type, threads, dtype, anew: as in :func:`peaks`.
    """
    name = f"products in {str(dtype).removeprefix('torch.')}"
    return _kept(name, device_type, threads, lambda: _measured_rate(device_type, dtype), anew)


def device_text(device: torch.device, threads: int) -> str:
    """What a run computes on, in words, without the machine's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {threads} threads"


def _kept(quantity: str, device_type: str, threads: int, measure: Callable[[], float], anew: bool) -> float:
    """A measured quantity: of this process, else from disk, else measured now. A file that is damaged, or that cannot
    be written, does not matter."""
    name = device_text(torch.device(device_type), threads)
    key = json.dumps({"device": name, "quantity": quantity, "torch": torch.__version__})
    file = cache_dir() / "peaks" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    where = str(file)
    if where not in _known or anew:
        stored, load = None if anew else _read(file, key), OtherLoad()
        _known[where] = measure() if stored is None else stored
        if stored is None and (device_type != "cpu" or load.share() <= _QUIET):
            _write(file, key, _known[where])
    return _known[where]


def _read(file: Path, key: str) -> float | None:
    try:
        entry = json.loads(file.read_text(encoding="utf-8"))
        value = float(entry["value"]) if entry["key"] == json.loads(key) else 0.0
    except (OSError, KeyError, TypeError, ValueError):
        return None
    return value if 0 < value < float("inf") else None


def _write(file: Path, key: str, value: float) -> None:
    """Atomic, so that processes that measure at once leave one whole file."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as stream:
            json.dump({"key": json.loads(key), "value": value}, stream)
        os.replace(stream.name, file)
    except OSError:
        return


def _measured_bandwidth(device_type: str) -> float:
    source = torch.ones(_PROBE_BYTES // 4, device=device_type)
    target = torch.empty_like(source)
    clock, best = make_clock(device_type), 0.0
    for _ in range(_REPEATS):
        for moved, work in ((source.nbytes, source.sum), (2 * source.nbytes, lambda: target.copy_(source))):
            best = max(best, moved / _seconds(work, clock, device_type))
    return best


def _measured_rate(device_type: str, dtype: torch.dtype) -> float:
    """Sizes grow until a product takes long enough: small ones say little, and slow dtypes must not take minutes."""
    clock, best, size = make_clock(device_type), 0.0, 512
    while size <= _LARGEST:
        left = torch.ones(size, size, dtype=dtype, device=device_type)
        right = torch.ones(size, size, dtype=dtype, device=device_type)
        work = _product(left, right)
        work()
        fastest = min(_seconds(work, clock, device_type) for _ in range(3))
        best = max(best, 2 * size**3 / fastest)
        if fastest > _LONGEST / 8:
            break
        size *= 2
    return best


def _product(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    return lambda: left @ right


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return " ".join(next(named, platform.processor() or platform.machine()).split())


def _seconds(work: Callable[[], object], clock: Clock, device_type: str) -> float:
    """Seconds of one call."""
    times = _QUEUED if device_type == "cuda" else 1
    start = clock()
    for _ in range(times):
        work()
    return (clock() - start) / times
