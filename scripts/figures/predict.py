"""Where each axis pays: speed-up limits of one step at a device's peaks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.figures.style import GREY, STYLE, canvas, mark
from sparse.cost import ModelShape, Peaks, StepPlan, plan_costs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CONTEXTS = (2048, 4096, 8192, 16384, 32768, 65536)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
TREES = (1, 2, 4, 8, 16, 32, 60, 128)
SHARES = (0.125, 0.25, 0.5)
_KEPT = 1024
"""Positions kept where the step itself keeps all."""


def gain(shape: ModelShape, dense: StepPlan, sparse: StepPlan, peaks: Peaks) -> float:
    """Least time of one step over that of another."""
    before, after = (sum(peaks.seconds(cost) for cost in plan_costs(shape, plan).values()) for plan in (dense, sparse))
    return before / after


def figure(shape: ModelShape, dense: StepPlan, sparse: StepPlan, peaks: Peaks, title: str) -> Figure:
    """Sparse attention over context and batch; for a model with experts also their budget over the tree.

    Args:
        shape: the model.
        dense, sparse: the steps that the panels vary; positions kept and retrieving layers are those of ``sparse``.
        peaks: of the device.
        title: names model and device.
    """
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        made, axes = canvas(2 if shape.experts else 1, height=3.9)
        _attention(axes[0], shape, dense, sparse, peaks)
        if shape.experts:
            _experts(axes[1], shape, dense, peaks)
        made.suptitle(f"{title}: limits at its peaks, not measured", fontsize=11, x=0.02, ha="left")
    return made


def write(shape: ModelShape, dense: StepPlan, sparse: StepPlan, peaks: Peaks, title: str, file: Path) -> str:
    """Draw :func:`figure` to ``file`` with the suffixes .png and .pdf; the name of the first."""
    import matplotlib

    matplotlib.use("Agg")
    made = figure(shape, dense, sparse, peaks, title)
    file.parent.mkdir(parents=True, exist_ok=True)
    name = file.name.removesuffix(".png").removesuffix(".pdf")
    made.savefig(file.with_name(f"{name}.png"), dpi=160, bbox_inches="tight")
    made.savefig(file.with_name(f"{name}.pdf"), bbox_inches="tight", metadata={"CreationDate": None})
    return str(file.with_name(f"{name}.png"))


def _attention(axis: Axes, shape: ModelShape, dense: StepPlan, sparse: StepPlan, peaks: Peaks) -> None:
    """One cell for each context and batch; the number is written into it, so that colour is not needed."""
    from matplotlib.colors import LogNorm

    kept = sparse.kept or _KEPT
    cells = []
    for batch in BATCHES:
        line = []
        for context in CONTEXTS:
            plan = replace(dense, batch=batch, context=context)
            line.append(gain(shape, plan, replace(plan, kept=kept, every=sparse.every), peaks))
        cells.append(line)
    highest = max(max(line) for line in cells)
    axis.imshow(cells, cmap="cividis", norm=LogNorm(1, max(highest, 1.01)), aspect="auto", origin="lower")
    for row, line in enumerate(cells):
        for column, value in enumerate(line):
            colour = "white" if value < highest**0.55 else "black"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
    axis.grid(False)
    axis.set_xticks(range(len(CONTEXTS)), [f"{context // 1024}k" for context in CONTEXTS])
    axis.set_yticks(range(len(BATCHES)), [str(batch) for batch in BATCHES])
    axis.set_xlabel("positions before the step")
    axis.set_ylabel("sequences in the step")
    axis.set_title(f"{kept} positions per KV head, {dense.rows} tokens a sequence\ndense / sparse step", loc="left")


def _experts(axis: Axes, shape: ModelShape, dense: StepPlan, peaks: Peaks) -> None:
    for index, share in enumerate(SHARES):
        union = share * shape.experts
        plans = [replace(dense, rows=1 + tree) for tree in TREES]
        colour, marker = mark(index)
        axis.plot(
            TREES,
            [gain(shape, plan, replace(plan, union=union), peaks) for plan in plans],
            color=colour,
            marker=marker,
            markersize=5,
            label=f"{union:.0f} of {shape.experts} experts",
        )
    axis.axhline(1, color=GREY, linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xticks(TREES, [str(tree) for tree in TREES])
    axis.minorticks_off()
    axis.set_xlabel("draft tokens of a sequence")
    axis.set_ylabel("dense / sparse step")
    routing = f"Zipf {dense.skew:g}" if dense.skew else "uniform"
    axis.set_title(
        f"budget on the union of experts, {routing} routing\nbatch {dense.batch}, {dense.context} positions", loc="left"
    )
    axis.legend(loc="upper left")
