"""Kernels and steps on a GPU in one call: `make gpu-check` or `python -m scripts.bench.gpu_check --help`.

Needs torch, triton and transformers. First every kernel against its reference (a red check ends the call), then the
steps that targets are set for, then the kernels at real sizes; parts that no longer fit the time are left out with a
note. Prints a table of the targets and a JSON line last; rows go to results/gpu/*.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from scripts.bench import gpu_common, gpu_kernels, gpu_ops, gpu_steps, records
from scripts.bench.gpu_common import Deadline, Red

PARTS = ("kernels", "steps", "ops")
_KERNEL_TARGET = 0.7
"""Least share of its bytes-over-bandwidth limit that a kernel should reach."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; returns the exit code (1 after a red check, 2 without a GPU or for bad input)."""
    options = _parser().parse_args(argv)
    parts = options.parts.split(",")
    if unknown := [name for name in parts if name not in PARTS]:
        print(f"gpu-check: --parts={unknown[0]}: is not one of {', '.join(PARTS)}", file=sys.stderr)
        return 2
    if not options.interpret and not torch.cuda.is_available():
        print("gpu-check: no CUDA device is present (--interpret checks the kernels on the CPU)", file=sys.stderr)
        return 2
    try:
        result = _interpreted(options) if options.interpret else _measured(options, parts)
    except Red as red:
        print(red, file=sys.stderr)
        print(json.dumps({"status": "failed", "problems": [str(red)]}))
        return 1
    except ValueError as error:
        print(f"gpu-check: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps({"status": "ok", **result}, separators=(",", ":")))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.gpu_check", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=9, help="time that the call may take (default %(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default %(default)s)")
    parser.add_argument("--cases", default="", help="steps of these architectures only, comma-separated (default all)")
    parser.add_argument("--layers", type=int, help="decoder layers kept, where memory or time are short")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the CSV files")
    parser.add_argument("--interpret", action="store_true", help="kernels at tiny shapes in Triton's interpreter")
    return parser


def _interpreted(options: argparse.Namespace) -> dict[str, Any]:
    """Kernels, and steps where this version has them, on the CPU; nothing is timed. Its bf16 is not a GPU's."""
    os.environ["TRITON_INTERPRET"] = "1"
    cpu = torch.device("cpu")
    found = gpu_kernels.run(cpu, (torch.float16, torch.float32), True, Deadline(options.minutes))
    gpu_steps.check(gpu_steps.TINY, 1, cpu, torch.float32)
    return {"device": "interpreter", "checks": len(found)}


def _measured(options: argparse.Namespace, parts: list[str]) -> dict[str, Any]:
    deadline, place = Deadline(options.minutes), gpu_common.place()
    wanted = [name for name in options.cases.split(",") if name]
    cases = tuple(case for case in gpu_steps.CASES if not wanted or case.arch in wanted)
    if not cases:
        raise ValueError(f"--cases={options.cases}: valid are {', '.join({case.arch: 0 for case in gpu_steps.CASES})}")
    print(f"device       {place.device}, torch {place.torch}, sources {place.git}")
    bandwidth = gpu_common.bandwidth()
    print(f"bandwidth    {bandwidth / 1e9:.0f} GB/s of copies, read and written", flush=True)
    device, told = torch.device("cuda"), {"device": place.device, "bandwidth_gb_s": round(bandwidth / 1e9)}
    result: dict[str, Any] = {**told, "date": place.date, "git": place.git}
    if "kernels" in parts:
        found = gpu_kernels.run(device, (torch.bfloat16, torch.float16), False, deadline)
        result["checks"] = len(found)
        result["cross_checks"] = gpu_kernels.cross_checks(device, torch.bfloat16)
        print(f"dense attention against other kernels: {result['cross_checks']}", flush=True)
    folder = options.results / "gpu"
    steps: list[gpu_steps.Result] = []
    if "steps" in parts:
        steps = gpu_steps.run(cases, options.layers, place, bandwidth, deadline)
        records.append(folder / "steps.csv", [row for one in steps for row in one.rows])
    ops: list[records.OpRow] = []
    if "ops" in parts:
        ops = gpu_ops.run(place, bandwidth, deadline)
        records.append(folder / "ops.csv", ops)
    result["targets"] = _targets(steps, ops)
    return result | {"left_out": deadline.skipped}


def _targets(steps: list[gpu_steps.Result], ops: list[records.OpRow]) -> dict[str, Any]:
    """Print every target beside what was measured; what the last line tells."""
    told: dict[str, Any] = {}
    print("\ntargets")
    for one in steps:
        if one.gain is not None:
            print(f"  {one.text}; dense is: {one.dense}")
            told[one.case.name] = [round(one.gain.median, 3), round(one.limit, 3), one.case.target]
    for row in ops:
        share = row.limit_ms / row.median_ms
        if row.engine == "triton":
            print(f"  {row.op}, {row.shape}: {share:.0%} of its limit, target {_KERNEL_TARGET:.0%}")
        else:
            print(f"  {row.op}, {row.shape}: {share:.0%} of its limit, for comparison")
        told[f"{row.op}, {row.shape}"] = round(share, 3)
    return told


if __name__ == "__main__":
    raise SystemExit(main())
