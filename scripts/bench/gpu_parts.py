"""The parts of a GPU check in their order, and the table of targets."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from scripts.bench import gpu_cases, gpu_common, gpu_kernels, gpu_ops, gpu_steps
from scripts.bench.gpu_common import Lost, surviving
from scripts.bench.gpu_report import Report


def check(options: argparse.Namespace) -> None:
    """Refuse options that cannot be served.

    Raises:
        ValueError: no GPU, or an unknown architecture.
    """
    if not options.interpret and not torch.cuda.is_available():
        raise ValueError("no CUDA device is present (--interpret checks the kernels on the CPU)")
    known = list(dict.fromkeys(case.arch for case in gpu_cases.CASES))
    if unknown := [name for name in options.cases.split(",") if name and name not in known]:
        raise ValueError(f"--cases={unknown[0]}: valid are {', '.join(known)}")


def interpreted(options: argparse.Namespace, report: Report) -> None:
    """Kernels and small steps on the CPU in Triton's interpreter; nothing is timed. Its bf16 is not a GPU's."""
    cpu = torch.device("cpu")
    found = gpu_kernels.here(cpu, (torch.float16, torch.float32), report)
    for case in gpu_cases.TINY:
        with surviving(report, case.name):
            gpu_steps.check(case, 1, cpu, torch.float32)
    report.add(device="interpreter", checks=len(found))


def measured(options: argparse.Namespace, report: Report) -> None:
    """Everything that ``options`` ask for, on the GPU."""
    place = gpu_common.place()
    wanted = options.cases.split(",") if options.cases else []
    cases = tuple(case for case in gpu_cases.CASES if not wanted or case.arch in wanted)
    report.add(device=place.device, torch=place.torch, date=place.date, git=place.git)
    print(f"device       {place.device}, torch {place.torch}, sources {place.git}", flush=True)
    bandwidth = gpu_common.bandwidth()
    torch.cuda.empty_cache()
    report.add(bandwidth_gb_s=round(bandwidth / 1e9))
    print(f"bandwidth    {bandwidth / 1e9:.0f} GB/s of copies, read and written", flush=True)
    if "kernels" in options.parts:
        with surviving(report, "kernel checks"):
            _kernels(report)
    folder = options.results / "gpu"
    steps: list[gpu_cases.Result] = []
    ops: list[gpu_ops.Timed] = []
    try:
        if "steps" in options.parts:
            with surviving(report, "steps in fp32"):
                archs = tuple({case.arch: 0 for case in cases})
                exact = gpu_kernels.apart(report, gpu_kernels.EXACT_SECONDS, archs)
                report.add(exact_steps=sum(one.error is not None for one in exact))
            file = folder / "steps.csv"
            for result in gpu_steps.run(cases, options.layers, place, bandwidth, file, report):
                steps.append(result)
        if "ops" in options.parts:
            for one in gpu_ops.run(place, bandwidth, folder / "ops.csv", report):
                ops.append(one)
                report.add(ops=_shares(ops))
    except Lost as lost:
        report.problem(str(lost))
    print("\ntargets", flush=True)
    for line in [*(one.text for one in steps), *(one.text for one in ops)]:
        print(f"  {line}", flush=True)


def _kernels(report: Report) -> None:
    """The kernel checks, and what they say about other libraries."""
    found = gpu_kernels.apart(report)
    report.add(
        checks=sum(one.judged and one.error is not None and not one.red for one in found),
        red=sorted(report.red),
        cross_checks={
            one.name.partition("against ")[2]: one.problem if one.error is None else f"{one.error:.1e}"
            for one in found
            if "against " in one.name
        },
    )


def _shares(ops: list[gpu_ops.Timed]) -> dict[str, Any]:
    """Microseconds of each operator, and its share of its limit where that means something."""
    return {
        f"{one.row.op}, {one.row.shape}": [
            round(1e3 * one.row.median_ms, 1),
            round(one.share, 3) if one.judged else None,
        ]
        for one in ops
    }
