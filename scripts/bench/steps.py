"""Times of whole steps: every context, batch, draft shape, arm and engine, beside their byte limits (METHOD 7)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.nn import functional

from harness.budgets import required_paths
from harness.engine.cache import KVCache
from harness.engine.model.verification import Verification
from scripts.bench import checks
from scripts.bench.drafts import DraftShape
from scripts.bench.measure import Arm, Spread, Times, alternate, ratio
from scripts.bench.records import StepRow
from scripts.bench.setting import REFERENCE, Setting, cells
from sparse.budget import Sparsity
from sparse.cost import trace_bytes, trace_flops

HEAD = "head"
"""Arm of the output head alone, timed where layers are missing, so that a layer's own time can be told."""


@dataclass(frozen=True, slots=True)
class Timed:
    """One arm of a cell: what runs, and the least that it reads and computes.

    Attributes:
        axis: what may be skipped, by name.
        shape: of the draft.
        engine: how it is executed.
        bytes, flops: of one step.
        simulated: whether what it leaves out was read all the same.
    """

    axis: str
    shape: DraftShape
    engine: str
    bytes: float
    flops: float
    simulated: bool

    @property
    def name(self) -> str:
        """As reports show it."""
        return f"{self.axis} {self.shape.name} {self.engine}"


def run(setting: Setting, repeats: int, screen: Console) -> tuple[list[StepRow], dict[str, Any]]:
    """Check and time every cell and print its tables.

    Returns:
        The rows for the CSV file, and the ratios for the last line.

    Raises:
        checks.Red: what would be timed is wrong, or a mechanism never ran; nothing of its cell is printed.
    """
    rows: list[StepRow] = []
    ratios: dict[str, Any] = {}
    for context, batch, caches in cells(setting):
        checks.check_cell(setting, context, batch, caches)
        arms = list(_arms(setting, context, batch, caches))
        calls: dict[str, Arm] = {arm.name: call(setting, arm, context, batch, caches[arm.engine]) for arm in arms}
        if setting.cut:
            calls[HEAD] = _head(setting, batch)
        times = alternate(calls, setting.clock, repeats)
        made = [row_of(setting, arm, context, batch, times[arm.name]) for arm in arms]
        _table(setting, arms, made, times, screen)
        ratios[f"context {context}, batch {batch}"] = _ratios(arms, times, screen)
        rows += made
    return rows, ratios


def _arms(setting: Setting, context: int, batch: int, caches: dict[str, KVCache]) -> Iterator[Timed]:
    """Dense and sparse with every draft shape, the other axes with the first draft of more than one token."""
    usual = next((shape for shape in setting.shapes if shape.rows > 1), setting.shapes[0])
    for shape in setting.shapes:
        for axis, sparsity in setting.axes.items():
            if axis in ("dense", "sparse") or shape is usual:
                for engine in setting.timed:
                    yield timed(setting, axis, sparsity, shape, engine, context, batch, caches)


def timed(
    setting: Setting,
    axis: str,
    sparsity: Sparsity,
    shape: DraftShape,
    engine: str,
    context: int,
    batch: int,
    caches: dict[str, KVCache],
    row: int | None = None,
) -> Timed:
    """One arm with its cost, counted on a step of the reference; with ``row`` that row of the cache alone.

    Raises:
        checks.Red: a mechanism that the arm times never ran.
    """
    costs, paths = {}, {}
    for name in dict.fromkeys((REFERENCE, engine)):
        run = Verification(sparsity)
        segments = setting.segments(context, batch, shape)
        if row is not None:
            segments = [replace(segments[0], row=row)]
        setting.run(name, caches[name], segments, run)
        told = setting.weights.shape, sparsity.attention, run.trace
        costs[name] = trace_bytes(*told), trace_flops(*told)
        paths[name] = [path for path, count in run.trace.paths.items() if count]
        for wanted in required_paths(sparsity):
            if not any(path.startswith(wanted) for path in paths[name]):
                raise checks.Red([f"{axis} {shape.name} {name}: {wanted} never ran"])
    read, flops = costs[REFERENCE]
    return Timed(axis, shape, engine, read, flops, any(".simulated" in path for path in paths[engine]))


def call(setting: Setting, arm: Timed, context: int, batch: int, cache: KVCache, row: int | None = None) -> Arm:
    """One step of an arm, and the cache as it was."""
    segments = setting.segments(context, batch, arm.shape)
    if row is not None:
        segments = [replace(segments[0], row=row)]
    sparsity = setting.axes[arm.axis]
    return lambda: setting.run(arm.engine, cache, segments, Verification(sparsity))


def _head(setting: Setting, batch: int) -> Arm:
    """The output head on as many tokens as the first draft shape has."""
    weights = setting.weights
    hidden = weights.embedding[: batch * setting.shapes[0].rows]
    return lambda: weights.head(functional.rms_norm(hidden, weights.norm.shape, weights.norm, weights.eps))


def row_of(setting: Setting, arm: Timed, context: int, batch: int, seconds: list[float]) -> StepRow:
    """A row of the CSV file from the seconds of an arm."""
    spread, sparse = Spread.of(seconds).scaled(1e3), not setting.axes[arm.axis].attention.is_dense
    budget = setting.budget
    return StepRow(
        arch=setting.arch,
        dtype=setting.dtype,
        engine=arm.engine,
        context=context,
        batch=batch,
        rows=arm.shape.rows,
        tree=arm.shape.kind,
        kept=(budget.topk or 0) * budget.block_size if sparse else 0,
        arm=arm.axis,
        median_ms=spread.median,
        p10_ms=spread.p10,
        p90_ms=spread.p90,
        limit_ms=1e3 * arm.bytes / setting.bandwidth,
        bytes=arm.bytes,
        flops=arm.flops,
        **asdict(setting.place),
    )


def _table(setting: Setting, arms: list[Timed], rows: list[StepRow], times: Times, screen: Console) -> None:
    first = rows[0]
    what = f"one step of {setting.arch} and the head, not the model's" if setting.cut else "one step"
    table = Table(title=f"{what}: context {first.context}, batch {first.batch}", title_justify="left")
    names = ["arm", "draft", "engine", "median ms", "p10", "p90", "limit ms", "of limit"]
    for column in [*names, "ms per layer"] if setting.cut else names:
        table.add_column(column, justify="left" if column in names[:3] else "right")
    head = 1e3 * Spread.of(times[HEAD]).median if setting.cut else 0.0
    for arm, row in zip(arms, rows, strict=True):
        numbers = [f"{value:.2f}" for value in (row.median_ms, row.p10_ms, row.p90_ms, row.limit_ms)]
        layer = [f"{(row.median_ms - head) / setting.weights.shape.layers:.2f}"] if setting.cut else []
        share = f"{row.limit_ms / row.median_ms:.0%}"
        table.add_row(row.arm, arm.shape.name, row.engine, *numbers, share, *layer)
    screen.print(table)


def _ratios(arms: list[Timed], times: Times, screen: Console) -> dict[str, Any]:
    """Dense drafts over one token, every other arm over the dense one of its shape, engines over the reference."""
    known = {arm.name: arm for arm in arms}
    found: dict[str, Any] = {}
    for arm in arms:
        single = next((one for one in arms if one.shape.rows == 1 and one.engine == arm.engine), None)
        under = None
        if arm.axis != "dense":
            under = known.get(f"dense {arm.shape.name} {arm.engine}")
        elif single is not None and single.axis == "dense":
            under = single
        if under is not None and under is not arm:
            found |= _compared(arm, under, times, screen)
        other = known.get(f"{arm.axis} {arm.shape.name} {REFERENCE}")
        if other is not None and arm.engine != REFERENCE:
            found |= _compared(arm, other, times, screen)
    return found


def _compared(over: Timed, under: Timed, times: Times, screen: Console) -> dict[str, Any]:
    """One ratio, with what the bytes allow."""
    spread, limit = ratio(times, over.name, under.name), over.bytes / under.bytes
    told = f"limit {limit:.3f}"
    if over.simulated:
        told += ", simulated"
    elif limit < 1:
        told += f", {(1 - spread.median) / (1 - limit):.0%} of the saved bytes realised"
    screen.print(f"{over.name} / {under.name}: {spread.text(3)} ({told})")
    return {
        f"{over.name} / {under.name}": [round(value, 4) for value in (spread.median, spread.p10, spread.p90, limit)]
    }
