"""Predictions beside stored measurements: the part of `python -m scripts.predict` behind --check."""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from harness.engine.model.shapes import SHAPES
from scripts.predict import DEVICES, DTYPES, combined, device_peaks, public_shape, seconds
from sparse.cost import ModelShape, Peaks, StepPlan, plan_costs, total

_SMOLLM2 = "smollm2_135m"
_AXES = {
    "dense": (),
    "sparse": ("attention",),
    "anchors": ("attention",),
    "ffn": ("ffn",),
    "experts": ("experts",),
    "hybrid": ("attention", "ffn", "experts"),
}
"""What each arm of scripts.bench leaves out."""
_OLD_DEFAULTS = {"kept": "512", "block-size": "16", "anchors": "3", "ffn-keep": str(2 / 3)}
"""Of the options of scripts.bench, for files that store only its command."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One stored step.

    Attributes:
        place: device in words, where it was measured.
        arch, dtype: of the model; ``arch`` is a name in SHAPES.
        layers: decoder layers of the model that ran, None for all.
        engine: how it was executed, with whatever else tells the steps of one file apart.
        arm: dense, sparse, ...
        plan: the step.
        ms: median.
        bandwidth: of the machine, measured with the step, bytes per second; None if it was not stored.
        bytes: least bytes that were counted on the real step; None if they were not stored.
    """

    place: str
    arch: str
    dtype: str
    layers: int | None
    engine: str
    arm: str
    plan: StepPlan
    ms: float
    bandwidth: float | None
    bytes: float | None

    @property
    def setting(self) -> tuple[Any, ...]:
        """What must be equal for two arms to be compared."""
        plan = self.plan
        return (
            self.place, self.arch, self.dtype, self.layers or 0, self.engine, plan.context, plan.batch, plan.rows,
        )  # fmt: skip


def run(files: Sequence[Path], options: argparse.Namespace, screen: Console) -> dict[str, Any]:
    """Print every stored step beside its prediction, and the ratios sparse/dense; what the last line tells.

    Args:
        files: CSV and JSON files of scripts.bench and scripts.bench_batches.
        options: of scripts.predict; --ffn-keep, --union and --anchors describe the arms whose settings a file does not
            store, --device gives the peaks where a file does not.
        screen: to print on.

    Raises:
        ValueError: a file of another kind, or no step in any.
        OSError: a file cannot be read.
    """
    steps = [step for file in files for step in read(file, options)]
    if not steps:
        raise ValueError(f"--check={','.join(map(str, files))}: no step whose arm and model are known")
    known = {step.place: step.bandwidth for step in steps if step.bandwidth is not None}
    table = Table(title="predicted at the limit, and measured", title_justify="left")
    for name in ("step", "arm", "predicted ms", "measured ms", "of limit", "bytes predicted / counted", "bound by"):
        table.add_column(name, justify="left" if name in ("step", "arm", "bound by") else "right")
    told: list[dict[str, Any]] = []
    for step in steps:
        shape = public_shape(step.arch, DTYPES[step.dtype], step.layers)
        peaks = _peaks(step, known, options)
        costs = plan_costs(shape, step.plan)
        least, whole = 1e3 * seconds(costs, peaks), total(costs.values())
        counted = None if step.bytes is None else whole.bytes / step.bytes
        cells = [
            f"{least:.3f}",
            f"{step.ms:.3f}",
            f"{least / step.ms:.0%}",
            "" if counted is None else f"{counted:.3f}",
        ]
        table.add_row(_text(step), step.arm, *cells, peaks.binds(whole))
        told.append({"step": step, "predicted": least})
    screen.print(table)
    ratios = _ratios(told, screen)
    screen.print("limit of arithmetic: data sheet of a named GPU; elsewhere only bytes count")
    return {
        "steps": len(told),
        "of_limit": {
            f"{_text(one['step'])} {one['step'].arm}": round(one["predicted"] / one["step"].ms, 4) for one in told
        },
        "ratios": ratios,
    }


def _ratios(told: Sequence[Mapping[str, Any]], screen: Console) -> dict[str, Any]:
    """Every other arm over the dense one of the same setting; the last of several measurements counts."""
    table = Table(title="arm / dense", title_justify="left")
    for name in ("step", "arm", "predicted", "measured", "of the saving realised"):
        table.add_column(name, justify="left" if name in ("step", "arm") else "right")
    found: dict[str, Any] = {}
    ordered = sorted(told, key=lambda one: one["step"].setting)
    for _, group in groupby(ordered, key=lambda one: one["step"].setting):
        by_arm = {(one["step"].arm, one["step"].plan.kept): one for one in group}
        dense = by_arm.pop(("dense", None), None)
        if dense is None:
            continue
        for (name, kept), one in by_arm.items():
            arm = name if kept is None else f"{name} {kept}"
            predicted, measured = one["predicted"] / dense["predicted"], one["step"].ms / dense["step"].ms
            realised = f"{(1 - measured) / (1 - predicted):.0%}" if predicted < 0.99 else ""
            table.add_row(_text(one["step"]), arm, f"{predicted:.3f}", f"{measured:.3f}", realised)
            found[f"{_text(one['step'])} {arm}"] = {"predicted": round(predicted, 4), "measured": round(measured, 4)}
    if found:
        screen.print(table)
    return found


def _text(step: Measured) -> str:
    plan = step.plan
    layers = "" if step.layers is None else f" {step.layers} layers"
    return f"{step.arch}{layers} {step.dtype} {step.engine}, {plan.batch} x {plan.context}, {plan.rows} tokens".replace(
        " ,", ","
    )


def _peaks(step: Measured, known: Mapping[str, float], options: argparse.Namespace) -> Peaks:
    """Bandwidth as measured with the step or elsewhere on its machine; the rate of a data sheet where there is one."""
    named = next((name for name in DEVICES if name in step.place.lower().replace(" ", "")), None)
    bandwidth = step.bandwidth or known.get(step.place)
    if bandwidth is None:
        return device_peaks(named or options.device, step.dtype)[0]
    return Peaks(bandwidth, device_peaks(named, step.dtype)[0].rate if named else float("inf"))


def read(file: Path, options: argparse.Namespace) -> list[Measured]:
    """The steps that a file holds and whose arm and model are known.

    Raises:
        ValueError: neither a table nor a result of the benchmarks.
        OSError: it cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".csv":
            rows = list(csv.DictReader(text.splitlines()))
            return [step for row in rows if (step := _of_row(row, options)) is not None]
        stored = json.loads(text)
        return _of_batches(stored) if "batch" in stored else _of_bench(stored)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"--check={file}: is no file of steps that scripts.bench wrote ({error!r})") from error


def _of_row(row: Mapping[str, str], options: argparse.Namespace) -> Measured | None:
    """A row of steps.csv; None where the model has no public shape or the arm is not described."""
    name, _, rest = row["arch"].partition(", ")
    arch = _SMOLLM2 if name.lower().startswith("smollm2-135m") else name
    cut = re.match(r"(\d+) of \d+ layers", rest)
    shape = public_shape(arch, DTYPES[row["dtype"]]) if arch in SHAPES else None
    if shape is None or (rest and cut is None):
        return None
    arm, moved, limit = row["arm"], float(row["bytes"]), float(row["limit_ms"])
    dense = StepPlan(int(row["batch"]), int(row["context"]), int(row["rows"]), block_size=options.block_size)
    plan = _sparse_plan(shape, dense, arm, int(row["kept"] or 0), options.anchors, options.ffn_keep, options.union)
    if plan is None:
        return None
    engine = f"{row['engine']} {row['tree']}"
    layers = int(cut[1]) if cut else None
    bandwidth = moved / limit * 1e3 if limit else None
    return Measured(
        row["device"], arch, row["dtype"], layers, engine, arm, plan, float(row["median_ms"]), bandwidth, moved
    )


def _sparse_plan(
    shape: ModelShape, dense: StepPlan, arm: str, kept: int, anchors: int, keep: float, union: float
) -> StepPlan | None:
    """The step of an arm; None where it leaves out something that nobody described."""
    every = anchors if arm in ("anchors", "hybrid") else 1
    axes = {
        "attention": {"kept": kept, "every": every} if kept else None,
        "ffn": {"keep": keep} if keep < 1 else None,
        "experts": {"union": max(1.0, union * shape.experts)} if union < 1 else None,
    }
    wanted = [name for name in _AXES.get(arm, (arm,)) if name != ("ffn" if shape.experts else "experts")]
    if any(axes.get(name) is None for name in wanted) or (not wanted and arm != "dense"):
        return None
    return combined(dense, {name: axes[name] or {} for name in wanted})


def _of_bench(stored: Mapping[str, Any]) -> list[Measured]:
    """A last line of an earlier scripts.bench on SmolLM2 and the command that printed it."""
    result = stored["result"]
    given = dict(re.findall(r"--([a-z-]+)[ =]([^\s-]\S*)", stored["command"]))
    if "arch" in given or "--carved" in stored["command"]:
        return []
    told = _OLD_DEFAULTS | given
    shape = public_shape(_SMOLLM2, 2)
    steps = []
    for key, value in result.items():
        found = re.fullmatch(r"([a-z]+)_(\d+)_ms", key)
        if found is None:
            continue
        dense = StepPlan(1, int(result["context"]), int(found[2]), block_size=int(told["block-size"]))
        settings = int(told["kept"]), int(told["anchors"]), float(told["ffn-keep"]), 1.0
        plan = _sparse_plan(shape, dense, found[1], *settings)
        if plan is not None:
            bandwidth, limit = 1e9 * float(result["bandwidth_gb_s"]), float(result[f"{found[1]}_{found[2]}_limit_ms"])
            steps.append(
                Measured(
                    stored["device"], _SMOLLM2, given.get("dtype", "bfloat16"), None, "eager", found[1], plan,
                    float(value), bandwidth, bandwidth * limit / 1e3,
                )
            )  # fmt: skip
    return steps


def _of_batches(stored: Mapping[str, Any]) -> list[Measured]:
    """A result of scripts.bench_batches: its autoregressive arm, whose steps give one token a sequence. Positions are
    those in the middle of the decode; prompts and loop are part of the time."""
    context = int(stored["context"]) + int(stored["tokens"]) // 2
    found = []
    for batch in (1, int(stored["batch"])):
        milliseconds = 1e3 * batch / float(stored["ar"][f"tokens_s_{batch}"])
        plan = StepPlan(batch, context, 1)
        found.append(
            Measured(stored["device"], _SMOLLM2, stored["dtype"], None, "loop", "dense", plan, milliseconds, None, None)
        )
    return found
