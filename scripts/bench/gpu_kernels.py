"""Every Triton kernel, and steps in fp32, against references: the lists of checks, and a process that runs them.

A crash of that process costs one check: another one goes on after it. There kernels run in their first configuration,
since tuning them for shapes that are never timed would take minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch

from scripts.bench import gpu_cases, gpu_layers, gpu_steps, records
from scripts.bench.gpu_attention import Absent, AttentionCase, attention, cross_check
from scripts.bench.gpu_common import Red
from scripts.bench.gpu_report import Report, told
from sparse.budget import AttentionBudget
from sparse.ops.tuning import SWITCH

SECONDS = 90.0
"""Most that the checks may take on a GPU."""
_DTYPES = (torch.bfloat16, torch.float16)
EXACT_SECONDS = 60.0
"""Most that the steps in fp32 may take."""
_LEAST_SECONDS = 8.0
"""Not worth another process."""
_DEAD = 70
"""Exit code of a process whose device answers no more."""
Run = Callable[[torch.device, torch.dtype, torch.Generator], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison.

    Attributes:
        name: what is compared.
        kernel: folder below ``sparse/ops`` whose times a red check forbids, or a name of its own.
        run: error and what is allowed.
        every: whether it runs in every number format, and not in the first one alone.
        judged: whether a difference is an error of ours.
    """

    name: str
    kernel: str
    run: Run
    every: bool = False
    judged: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a check gave.

    Attributes:
        name, kernel, judged: of the check; the number format is part of the name.
        error, allowed: as measured; None where it came to no number.
        problem: why it did not, or in what way a result is wrong.
        red: whether the kernel is wrong.
    """

    name: str
    kernel: str
    judged: bool
    error: float | None = None
    allowed: float | None = None
    problem: str = ""
    red: bool = False

    @property
    def text(self) -> str:
        """One line."""
        if self.error is None:
            return f"{self.name}: {self.problem}"
        verdict = " RED" if self.red else ""
        return f"{self.name}: off by {self.error:.1e} (allowed {self.allowed:.0e}){verdict}"


def checks(tiny: bool, dtypes: Sequence[torch.dtype] = _DTYPES) -> list[tuple[Check, torch.dtype]]:
    """All checks, at tiny shapes or at those of a GPU; one of each kernel comes before the rest."""
    listed = list(_tiny() if tiny else _checks())
    return [(check, dtype) for dtype in dtypes for check in listed if check.every or dtype == dtypes[0]]


def exact_checks(archs: tuple[str, ...]) -> list[tuple[Check, torch.dtype]]:
    """Steps of two layers in fp32, where no rounding hides a mistake, of these architectures."""
    return [
        (Check(f"step, {case.name}", case.arch, partial(_step, case)), torch.float32)
        for case in gpu_cases.EXACT
        if case.arch in archs
    ]


def _step(
    case: gpu_cases.Case, device: torch.device, dtype: torch.dtype, _generator: torch.Generator
) -> tuple[float, float]:
    return gpu_steps.check(case, 2, device, dtype), gpu_steps.EXACT


def _attends(case: AttentionCase, every: bool = False) -> Check:
    return Check(case.text, "block_attention", partial(attention, case), every)


def _selects(score: str, query: str, gqa: str, tiny: bool) -> Check:
    budget = AttentionBudget(topk=5, score=score, query=query, gqa=gqa)
    run = partial(gpu_layers.selection, budget, tiny)
    return Check(f"selection, {score}, {query}, {gqa}", "block_selection", run, tiny)


def _ffn(rows: int, hidden: int, width: int, every: bool = False) -> Check:
    run = partial(gpu_layers.ffn, rows, hidden, width)
    return Check(f"sparse FFN, rows {rows}, hidden {hidden}, width {width}", "sparse_ffn", run, every)


def _chooses(rows: int, width: int) -> Check:
    run = partial(gpu_layers.channels_of, rows, width)
    return Check(f"channels, rows {rows}, width {width}", "channels", run)


def _experts(rows: int, experts: int, width: int, hidden: int, every: bool = False) -> Check:
    run = partial(gpu_layers.experts_of, rows, experts, width, hidden)
    return Check(f"experts, rows {rows}, {experts} experts, hidden {hidden}, width {width}", "moe", run, every)


def _routes(tokens: int, experts: int, limit: int | None) -> Check:
    run = partial(gpu_layers.routes, tokens, experts, limit)
    return Check(f"routing, rows {tokens}, {limit or 'all'} of {experts} experts", "routing", run)


def _crosses(library: str, start: int) -> Check:
    run = partial(cross_check, library, start)
    return Check(f"dense attention against {library}", "block_attention", run, judged=library == "SDPA")


def _tiny() -> Iterator[Check]:
    yield _attends(AttentionCase(64, 1, 3, (133, 0, 40), (5, 0, 1), False, 16, 3), True)
    yield _attends(AttentionCase(64, 2, 1, (70,), (4,), True, 16, None, 2), True)
    yield _attends(AttentionCase(64, 1, 2, (133, 17), (2, 3), False, 16, 2, behind=2))
    for how in (("mean", "first", "mean"), ("bound", "weighted", "max"), ("gaussian", "mean", "mean")):
        yield _selects(*how, tiny=True)
    yield _ffn(3, 72, 104, True)
    yield _chooses(3, 100)
    yield _experts(5, 5, 24, 40, True)
    yield _routes(6, 10, 4)


def _checks() -> Iterator[Check]:
    llama = (128, 2, 4)
    yield _attends(AttentionCase(*llama, (1031, 300, 517), (7, 0, 3), False, 16, 11), True)
    yield _selects("mean", "first", "mean", tiny=False)
    yield _attends(AttentionCase(*llama, (1031, 5, 517), (7, 1, 16), False, 16, None))
    yield _experts(60, 40, 96, 520, True)
    yield _ffn(7, 200, 777, True)
    yield _crosses("SDPA", 2000)
    yield _routes(60, 128, 32)
    yield _chooses(7, 14336)
    yield _attends(AttentionCase(128, 1, 8, (1500, 799), (60, 60), True, 32, 9))
    yield _attends(AttentionCase(64, 3, 3, (1031, 300, 517), (7, 0, 3), False, 16, 11))
    yield _attends(AttentionCase(*llama, (1031, 300), (7, 3), False, 16, 11, behind=3))
    yield _selects("bound", "weighted", "max", tiny=False)
    yield _selects("gaussian", "mean", "mean", tiny=False)
    yield _experts(1, 11, 72, 136)
    yield _ffn(61, 4096, 1000)
    yield _ffn(1, 576, 1536)
    yield _routes(7, 64, None)
    yield _attends(AttentionCase(*llama, (2047,), (1,), False, 64, 7, 5))
    yield _attends(AttentionCase(64, 5, 1, (1500, 799), (60, 60), True, 32, 9))
    yield _attends(AttentionCase(64, 3, 3, (1031, 5, 517), (7, 1, 16), False, 16, None))
    yield _attends(AttentionCase(128, 1, 8, (1031, 5, 517), (7, 1, 16), False, 16, None))
    yield _attends(AttentionCase(64, 3, 3, (2047,), (1,), False, 64, 7, 5))
    yield _crosses("flex_attention", 2000)
    yield _crosses("flashinfer", 2000)


def outcome(check: Check, device: torch.device, dtype: torch.dtype, seed: int) -> Outcome:
    """Run one check; nothing that goes wrong in it is raised."""
    name = f"{check.name}, {str(dtype).removeprefix('torch.')}"
    try:
        error, allowed = check.run(device, dtype, torch.Generator().manual_seed(seed))
    except Red as red:
        return Outcome(name, check.kernel, check.judged, problem=str(red), red=True)
    except Absent as absent:
        return Outcome(name, check.kernel, check.judged, problem=str(absent))
    except Exception as problem:
        return Outcome(name, check.kernel, check.judged, problem=told(problem))
    return Outcome(name, check.kernel, check.judged, error, allowed, red=check.judged and not error < allowed)


def note(found: Outcome, report: Report) -> None:
    """Print an outcome, and report what is wrong with it."""
    if found.red:
        report.fail(found.text, found.kernel)
    elif found.judged and found.error is None:
        report.problem(found.text)
    else:
        print(found.text, flush=True)


def here(device: torch.device, dtypes: tuple[torch.dtype, ...], report: Report) -> list[Outcome]:
    """The tiny checks in this process, as far as the time allows."""
    found = []
    for number, (check, dtype) in enumerate(checks(True, dtypes)):
        if report.deadline.allows(check.name, 5):
            found.append(outcome(check, device, dtype, number))
            note(found[-1], report)
    return found


def apart(report: Report, seconds: float = SECONDS, archs: tuple[str, ...] = ()) -> list[Outcome]:
    """Checks in processes of their own on the GPU.

    Args:
        report: of what is wrong.
        seconds: that they may take at most.
        archs: whose steps are compared; empty for the kernels.
    """
    found: list[Outcome] = []
    end, first, total = time.monotonic() + min(seconds, report.deadline.left()), 0, len(_listed(archs))
    while first < total and end - time.monotonic() > _LEAST_SECONDS:
        first = _from(first, end, found, report, archs)
    if first < total:
        report.deadline.note(
            f"{total - first} of {total} checks of {'steps in fp32' if archs else 'kernels'}",
            "the time for them is over",
        )
    return found


def _listed(archs: tuple[str, ...]) -> list[tuple[Check, torch.dtype]]:
    return exact_checks(archs) if archs else checks(False)


def _from(first: int, end: float, found: list[Outcome], report: Report, archs: tuple[str, ...]) -> int:
    """Checks from ``first`` on, in one process until ``end``; the number of the check to go on with."""
    listed = _listed(archs)
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, f"--first={first}", f"--end={end}", f"--steps={','.join(archs)}"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=records.ROOT,
        env={**os.environ, SWITCH: "0"},
    )
    killer = threading.Timer(max(0.0, end - time.monotonic()), process.kill)
    killer.daemon = True
    killer.start()
    report.stops.append(process.kill)
    begun, done = first - 1, first
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            try:
                message = json.loads(line)
                begun = message["begun"]
            except (ValueError, TypeError, KeyError):
                print(line, end="", flush=True)
                continue
            if "outcome" in message:
                found.append(Outcome(**message["outcome"]))
                note(found[-1], report)
                done = begun + 1
    code = process.wait()
    killer.cancel()
    report.stops.remove(process.kill)
    late = time.monotonic() >= end
    if begun < first and code and not late:
        report.problem(f"checks: their process ended with {code} before the first one")
        return len(listed)
    if begun >= done and not late:
        report.problem(f"{listed[begun][0].name}: its process ended with {code}")
        return begun + 1
    return done


def main(argv: Sequence[str] | None = None) -> int:
    """The process that :func:`apart` starts: a JSON line before each check and one with its outcome."""
    parser = argparse.ArgumentParser(prog=f"python -m {__name__}")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--end", type=float, required=True, help="value of time.monotonic() at which it ends")
    parser.add_argument("--steps", default="", help="architectures whose steps are compared, instead of kernels")
    options, device = parser.parse_args(argv), torch.device("cuda")
    archs = tuple(name for name in options.steps.split(",") if name)
    for number, (check, dtype) in enumerate(_listed(archs)):
        if number < options.first:
            continue
        if options.end - time.monotonic() < _LEAST_SECONDS / 2:
            break
        print(json.dumps({"begun": number}), flush=True)
        found = outcome(check, device, dtype, number)
        print(json.dumps({"begun": number, "outcome": asdict(found)}), flush=True)
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return _DEAD
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
