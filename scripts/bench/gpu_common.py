"""What the parts of the GPU check share: the time that is left, times by device events, CSV places. torch alone."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from scripts.bench import records
from scripts.bench.measure import Arm, Spread, Times

_cuda: Any = torch.cuda
_PROBE_BYTES = 1 << 32
_REPLAYS = 15


class Red(RuntimeError):
    """A check that failed: no time may be printed after it."""


class Deadline:
    """The time that a call may take; parts that no longer fit are left out with a note.

    Args:
        minutes: from now on.
    """

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes
        self.skipped: list[str] = []

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def allows(self, what: str, seconds: float) -> bool:
        """Whether ``seconds`` are left; otherwise ``what`` is noted as left out."""
        if self.left() >= seconds:
            return True
        self.note(what, f"needs about {seconds:.0f} s, {max(0.0, self.left()):.0f} s are left")
        return False

    def note(self, what: str, why: str) -> None:
        """Say that ``what`` is left out."""
        self.skipped.append(f"{what}: {why}")
        print(f"left out: {what}: {why}", flush=True)


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
    """Milliseconds between two events around each call."""
    found = []
    for turn in range(warmup + repeats):
        begin, end = _event(), _event()
        torch.cuda.synchronize()
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
    """Milliseconds of one call, all of them in one graph: launches cost nothing, and inputs rotate through the cache.

    Args:
        calls: the same work on different inputs, together several times the size of the L2 cache.
    """

    def everything() -> list[object]:
        return [call() for call in calls]

    return Spread.of([one / len(calls) for one in event_ms(captured(everything), _REPLAYS)])


def sets(read: float, most: int = 16) -> int:
    """How many input sets of ``read`` bytes exceed the L2 cache four times; at least two."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return max(2, min(most, int(4 * properties.L2_cache_size / max(read, 1.0)) + 1))
