"""What the parts of the GPU check share: failures that others survive, times by device events, errors, CSV places."""

from __future__ import annotations

import gc
import importlib.metadata
import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from scripts.bench import records
from scripts.bench.gpu_report import Report, told
from scripts.bench.measure import Arm, Spread, Times

PAGE = 256
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of a kernel against its reference in fp64, as :func:`error_of` measures it."""
_cuda: Any = torch.cuda
_PROBE_BYTES = 1 << 32
_REPLAYS = 15
_HOLD = 4_000_000
"""Cycles, about two milliseconds, for which the device is held back so that a launch is queued before it is timed."""
_LEAST_MS = 2.0
_MOST_ROUNDS = 500


class Red(RuntimeError):
    """A check that failed: no time may be printed after it."""


class Lost(RuntimeError):
    """The device answers this process no more, as after an illegal memory access."""


@contextmanager
def surviving(report: Report, what: str, *suspects: str) -> Iterator[None]:
    """Whatever goes wrong within is reported, memory is given back, and the caller goes on.

    Args:
        report: where it goes.
        what: name of what is run.
        suspects: kernels or architectures whose times a red check forbids.

    Raises:
        Lost: going on has no sense in this process.
    """
    try:
        yield
    except Red as red:
        report.fail(str(red), *suspects)
    except torch.cuda.OutOfMemoryError:
        report.deadline.note(what, "out of memory (--layers N times fewer layers)")
    except Exception as error:
        traceback.print_exc()
        report.problem(f"{what}: {told(error)}")
    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise Lost(f"the device is lost after {what}: {told(error)}") from error


def place() -> records.Place:
    """Device and versions for the CSV rows."""
    versions = [str(torch.__version__)]
    for name in ("triton", "transformers"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return records.place(name, torch.get_num_threads(), ", ".join(versions))


def bandwidth() -> float:
    """Bytes per second that copies on the device reach, reads and writes counted; median of a few."""
    source = torch.rand(_PROBE_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    spread = Spread.of([one / 4 for one in event_ms(lambda: [target.copy_(source) for _ in range(4)], 7)])
    return 2 * source.nbytes / (1e-3 * spread.median)


def event_ms(call: Arm, repeats: int, warmup: int = 2) -> list[float]:
    """Milliseconds of each call on the device, between two events; the time of its launch is hidden."""
    found = []
    for turn in range(warmup + repeats):
        begin, end = _event(), _event()
        torch.cuda.synchronize()
        _cuda._sleep(_HOLD)
        begin.record()
        call()
        end.record()
        end.synchronize()
        if turn >= warmup:
            found.append(begin.elapsed_time(end))
    return found


def _event() -> Any:
    return _cuda.Event(enable_timing=True)


def alternate_ms(arms: Mapping[str, Arm], repeats: int) -> Times:
    """As :func:`scripts.bench.measure.alternate`, in milliseconds by events."""
    times: Times = {name: [] for name in arms}
    for turn in range(2 + repeats):
        order = list(arms) if turn % 2 == 0 else list(arms)[::-1]
        for name in order:
            taken = event_ms(arms[name], 1, warmup=0)
            if turn >= 2:
                times[name] += taken
    return times


def clock() -> float:
    """Seconds of the host, once the device has done everything."""
    torch.cuda.synchronize()
    return time.perf_counter()


def captured(call: Arm) -> Arm:
    """``call`` as a CUDA graph, after runs that compile and tune what it launches.

    The graph's memory lives as long as the returned function.
    """
    side: Any = _cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def rotated_ms(calls: Sequence[Callable[[], object]]) -> Spread:
    """Milliseconds of one call on the device: all of them in one graph, round after round until it holds 2 ms of work.

    Args:
        calls: the same work on different inputs, which rotate through the cache.
    """

    def rounds(count: int) -> Arm:
        def everything() -> None:
            for _ in range(count):
                for call in calls:
                    call()

        return captured(everything)

    once = Spread.of(event_ms(rounds(1), 5)).median
    count = min(_MOST_ROUNDS, math.ceil(_LEAST_MS / max(once, 1e-3)))
    return Spread.of([one / (count * len(calls)) for one in event_ms(rounds(count), _REPLAYS)])


def cache_bytes() -> int:
    """Size of the device's L2 cache."""
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def sets(read: float, most: int = 16) -> int:
    """How many input sets of ``read`` bytes exceed the L2 cache four times; at least two, at most ``most``."""
    return max(2, min(most, int(4 * cache_bytes() / max(read, 1.0)) + 1))


def random_of(size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal values that ``dtype`` can hold."""
    return torch.randn(size, generator=generator).to(dtype)


def error_of(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; infinite where there is a NaN."""
    truth = truth.double().cpu()
    error = float((found.double().cpu() - truth).norm() / truth.norm())
    return error if math.isfinite(error) else float("inf")
