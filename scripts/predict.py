"""Step times and speed-ups that a device's peaks allow, without a model: `python -m scripts.predict --help`.

The arithmetic of METHOD section 7 for any public architecture: bytes and FLOPs of every component of a dense and of a
sparse step, the time at the device's limit, and what each axis alone and all together could gain. `--check` puts the
same arithmetic beside stored measurements. A prediction is a limit, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from harness import roofline
from harness.engine.model.loading import resolve_device
from harness.engine.model.shapes import SHAPES
from sparse.budget import BLOCK_SIZES
from sparse.cost import (
    Cost,
    HeadShape,
    ModelShape,
    Peaks,
    StepPlan,
    expected_union,
    plan_costs,
    total,
)

DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}
LOOKUP, EAGLE = "lookup", "eagle3"
_HEAD_VOCAB = 32000
"""Tokens that published EAGLE-3 heads of large vocabularies propose (arXiv 2503.01840 and its checkpoints)."""


@dataclass(frozen=True, slots=True)
class Datasheet:
    """Peak numbers as a vendor states them: bytes per second, dense FLOP/s in 16 and in 32 bits, and where from."""

    bandwidth: float
    half: float
    single: float
    source: str


DEVICES = {
    "h200": Datasheet(4.8e12, 989.5e12, 67e12, "NVIDIA H200 data sheet, SXM (half of the rates with sparsity)"),
    "h100": Datasheet(3.35e12, 989.5e12, 67e12, "NVIDIA H100 data sheet, SXM (half of the rates with sparsity)"),
    "a100": Datasheet(2.039e12, 312e12, 19.5e12, "NVIDIA A100 data sheet, SXM, 80 GB"),
    "rtx4090": Datasheet(1.008e12, 165.2e12, 82.6e12, "NVIDIA Ada architecture white paper, sums in fp32"),
    "l40s": Datasheet(0.864e12, 362.05e12, 91.6e12, "NVIDIA L40S data sheet"),
}
HERE = "here"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the prediction or the check, and a JSON line last; 2 after bad input."""
    options = parser().parse_args(argv)
    screen = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    try:
        result = run(options, screen)
    except (ValueError, OSError) as error:
        print(f"predict: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps({"status": "ok", **result}, separators=(",", ":")))
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m scripts.predict", description=__doc__.partition("\n")[0])
    what = made.add_argument_group("step")
    what.add_argument("--arch", default="llama31_8b", help=f"{', '.join(SHAPES)} (default %(default)s)")
    what.add_argument("--layers", type=int, help="decoder layers kept of --arch")
    what.add_argument("--dtype", default="bfloat16", choices=tuple(DTYPES))
    what.add_argument("--batch", type=int, default=1, help="sequences in a step (default %(default)s)")
    what.add_argument("--context", type=int, default=8192, help="positions before the step (default %(default)s)")
    what.add_argument("--draft", type=int, default=6, help="draft tokens of a sequence, tree or chain (default 6)")
    sparse = made.add_argument_group("what is left out")
    sparse.add_argument("--kept", type=int, help="positions kept per KV head (default 1024; 0 keeps all)")
    sparse.add_argument("--density", type=float, help="instead of --kept: share of the context kept")
    sparse.add_argument("--block-size", type=int, default=16, choices=BLOCK_SIZES)
    sparse.add_argument("--anchors", type=int, default=1, help="every n-th layer retrieves (default %(default)s)")
    sparse.add_argument("--ffn-keep", type=float, default=1.0, help="share of FFN channels kept (default %(default)s)")
    sparse.add_argument("--union", type=float, default=1.0, help="share of a layer's experts loaded (default 1)")
    sparse.add_argument("--skew", type=float, default=0.0, help="of the routing: 0 uniform, else Zipf's exponent")
    time = made.add_argument_group("time")
    time.add_argument("--device", default="h200", help=f"{', '.join(DEVICES)}, or {HERE}: measured (default h200)")
    time.add_argument("--measure", action="store_true", help=f"with --device {HERE}: measure again")
    time.add_argument("--efficiency", type=float, default=1.0, help="share of the peaks that is reached (default 1)")
    time.add_argument("--acceptance", type=float, default=3.0, help="new tokens per step, bonus included (default 3)")
    time.add_argument("--drafter", default=LOOKUP, help=f"{LOOKUP}, {EAGLE}, or an architecture (default {LOOKUP})")
    time.add_argument("--depth", type=int, help="drafting passes of a step (default: one a draft token)")
    out = made.add_argument_group("output")
    out.add_argument("--figure", type=Path, help="write where each axis pays to this file, as PNG and PDF")
    out.add_argument("--check", type=Path, nargs="+", help="CSV and JSON files of results/bench: predicted, measured")
    return made


def public_shape(arch: str, itemsize: int, layers: int | None = None) -> ModelShape:
    """Sizes of a public architecture.

    Args:
        arch: a name in SHAPES.
        itemsize: bytes per weight.
        layers: decoder layers kept; all by default.

    Raises:
        ValueError: unknown, or with fewer layers than asked for.
    """
    if arch not in SHAPES:
        raise ValueError(f"--arch={arch}: unknown architecture (valid: {', '.join(SHAPES)})")
    values = SHAPES[arch]
    heads, most = values["num_attention_heads"], values["num_hidden_layers"]
    kept = most if layers is None else layers
    if not 1 <= kept <= most:
        raise ValueError(f"--layers={layers}: {arch} has {most} layers (valid: 1 up to that)")
    experts = values.get("num_experts") or values.get("num_local_experts") or 0
    return ModelShape(
        layers=kept,
        hidden=values["hidden_size"],
        heads=heads,
        kv_heads=values["num_key_value_heads"],
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        ffn=values["intermediate_size"],
        vocab=values["vocab_size"],
        itemsize=itemsize,
        experts=experts,
        top_k=values["num_experts_per_tok"] if experts else 0,
        expert_ffn=(values.get("moe_intermediate_size") or values["intermediate_size"]) if experts else 0,
        moe_layers=kept if experts else 0,
    )


def device_peaks(device: str, dtype: str, *, measure: bool = False) -> tuple[Peaks, str]:
    """Peaks of a named device, or of this one, and where they come from.

    Raises:
        ValueError: an unknown name.
    """
    if device == HERE:
        place, threads = resolve_device("auto"), torch.get_num_threads()
        found = roofline.peaks(place.type, threads, getattr(torch, dtype), anew=measure)
        return found, f"measured, {roofline.device_text(place, threads)}"
    if device not in DEVICES:
        raise ValueError(f"--device={device}: unknown device (valid: {', '.join(DEVICES)}, {HERE})")
    sheet = DEVICES[device]
    return Peaks(sheet.bandwidth, sheet.single if dtype == "float32" else sheet.half), sheet.source


def run(options: argparse.Namespace, screen: Console) -> dict[str, Any]:
    """What was asked for; the content of the last line.

    Raises:
        ValueError: bad input, one line.
        OSError: a file cannot be read or written.
    """
    if options.check:
        from scripts import predict_check

        return predict_check.run(options.check, options, screen)
    _validate(options)
    shape = public_shape(options.arch, DTYPES[options.dtype], options.layers)
    found, source = device_peaks(options.device, options.dtype, measure=options.measure)
    peaks = Peaks(found.bandwidth * options.efficiency, found.rate * options.efficiency)
    plan, axes = plans(shape, options)
    drafting = draft_cost(shape, options)
    _card(shape, plan, options, peaks, source, screen)
    sparse = combined(plan, axes)
    arms = {
        name: plan_costs(shape, one) | {"draft": drafting} for name, one in {"dense": plan, "sparse": sparse}.items()
    }
    _components(arms, peaks, screen)
    result = {"arch": options.arch, "device": options.device, "batch": plan.batch, "context": plan.context}
    result |= {"rows": plan.rows} | _gains(shape, plan, axes, arms, peaks, options.acceptance, screen)
    if options.figure is not None:
        from scripts.figures import predict as drawing

        result["figure"] = drawing.write(
            shape, plan, sparse, peaks, f"{options.arch}, {options.device}", options.figure
        )
    return result


def _validate(options: argparse.Namespace) -> None:
    least = {"batch": 1, "context": 1, "draft": 0, "anchors": 1, "acceptance": 1, "skew": 0}
    for name, low in least.items():
        if getattr(options, name) < low:
            raise ValueError(f"--{name}={getattr(options, name)}: must be at least {low}")
    for name in ("ffn_keep", "union", "efficiency", "density"):
        value = getattr(options, name)
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"--{name.replace('_', '-')}={value}: must be above 0 and at most 1")
    if options.acceptance > 1 + options.draft:
        raise ValueError(f"--acceptance={options.acceptance}: {options.draft} draft tokens give at most one more")
    if options.kept is not None and options.density is not None:
        raise ValueError(f"--density={options.density}: --kept={options.kept} says the same (valid: one of them)")
    if options.kept is not None and options.kept < 0:
        raise ValueError(f"--kept={options.kept}: must be at least 0")
    if options.depth is not None and not 0 <= options.depth <= options.draft:
        raise ValueError(f"--depth={options.depth}: must lie between 0 and --draft={options.draft}")


def plans(shape: ModelShape, options: argparse.Namespace) -> tuple[StepPlan, dict[str, dict[str, Any]]]:
    """The dense step, and for each axis that is on the fields of a plan that it changes.

    Raises:
        ValueError: experts of a model without any.
    """
    size = options.block_size
    dense = StepPlan(options.batch, options.context, 1 + options.draft, block_size=size, skew=options.skew)
    wanted = 1024 if options.kept is None else options.kept
    if options.density is not None:
        wanted = round(options.density * options.context)
    kept = max(2 * size, wanted // size * size)
    axes: dict[str, dict[str, Any]] = {}
    if wanted and replace(dense, kept=kept).selects:
        axes["attention"] = {"kept": kept, "every": options.anchors}
    if options.ffn_keep < 1:
        axes["ffn"] = {"keep": options.ffn_keep}
    if options.union < 1:
        if not shape.experts:
            raise ValueError(f"--union={options.union}: {options.arch} has no experts (valid: 1)")
        axes["experts"] = {"union": max(1.0, options.union * shape.experts)}
    return dense, axes


def combined(plan: StepPlan, axes: Mapping[str, Mapping[str, Any]]) -> StepPlan:
    """The step under all these axes."""
    for changes in axes.values():
        plan = replace(plan, **changes)
    return plan


def draft_cost(shape: ModelShape, options: argparse.Namespace) -> Cost:
    """Drafting of one step, all sequences together.

    A head or model runs once per level of the draft, each pass on an even share of its tokens; the first one, on the
    last accepted token, gives the first level. Lookup costs no weights.

    Raises:
        ValueError: an unknown drafter.
    """
    passes = int(options.draft if options.depth is None else options.depth)
    if options.drafter == LOOKUP or not passes:
        return Cost()
    rows = max(1, round(options.draft / passes))
    if options.drafter != EAGLE:
        if options.drafter not in SHAPES:
            raise ValueError(f"--drafter={options.drafter}: unknown (valid: {LOOKUP}, {EAGLE}, {', '.join(SHAPES)})")
        model = public_shape(options.drafter, shape.itemsize)
        once = total(plan_costs(model, StepPlan(options.batch, options.context, rows)).values())
        return once * passes
    head = HeadShape(
        hidden=shape.hidden,
        features=3 * shape.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        ffn=shape.ffn,
        vocab=min(_HEAD_VOCAB, shape.vocab),
        itemsize=shape.itemsize,
    )
    one, alone = head.run(rows, options.context + rows), head.run(0, 0)
    batched = alone + Cost(one.bytes - alone.bytes, one.flops) * int(options.batch)
    return batched * passes + Cost(shape.itemsize * 3 * shape.hidden**2)


def seconds(costs: Mapping[str, Cost], peaks: Peaks) -> float:
    """Least time of a step: its components run one after the other, each against the side that binds it."""
    return sum(peaks.seconds(cost) for cost in costs.values())


def _card(
    shape: ModelShape, plan: StepPlan, options: argparse.Namespace, peaks: Peaks, source: str, screen: Console
) -> None:
    screen.print(f"model        {options.arch}, {options.dtype}, {shape.weight_bytes / 1e9:.2f} GB of weights")
    screen.print(f"cache        {shape.kv_bytes_per_token / 1024:.0f} KiB a position over all layers")
    share = "" if options.efficiency == 1 else f", {options.efficiency:.0%} of"
    screen.print(f"device       {options.device}{share} {source}")
    screen.print(f"peaks        {peaks.bandwidth / 1e9:.0f} GB/s, {peaks.rate / 1e12:.2f} TFLOP/s")
    screen.print(f"step         batch {plan.batch}, context {plan.context}, {plan.rows} tokens of each sequence")
    if shape.experts:
        tokens, routing = plan.batch * plan.rows, f"Zipf's exponent {options.skew}" if options.skew else "uniform"
        union = expected_union(shape.experts, shape.top_k, tokens, options.skew)
        screen.print(
            f"experts      {tokens} independent tokens want {union:.1f} of {shape.experts} ({routing} routing)"
        )


def _components(arms: Mapping[str, Mapping[str, Cost]], peaks: Peaks, screen: Console) -> None:
    table = Table(title="least work and time of one step", title_justify="left")
    table.add_column("component")
    for arm in arms:
        for name in (f"{arm} MB", "GFLOP", "ms", "bound by"):
            table.add_column(name, justify="left" if name == "bound by" else "right")
    names = [name for name in next(iter(arms.values())) if any(costs[name] != Cost() for costs in arms.values())]
    for name in names:
        cells = []
        for costs in arms.values():
            cells += _cells(costs[name], peaks.seconds(costs[name]), peaks.binds(costs[name]))
        table.add_row(name, *cells, end_section=name == names[-1])
    whole = [_cells(total(costs.values()), seconds(costs, peaks), "") for costs in arms.values()]
    table.add_row("together", *(cell for cells in whole for cell in cells))
    screen.print(table)


def _cells(cost: Cost, least: float, side: str) -> list[str]:
    if cost == Cost():
        return ["", "", "", ""]
    return [f"{cost.bytes / 1e6:.1f}", f"{cost.flops / 1e9:.2f}", f"{1e3 * least:.4f}", side]


def _gains(
    shape: ModelShape,
    plan: StepPlan,
    axes: Mapping[str, Mapping[str, Any]],
    arms: Mapping[str, Mapping[str, Cost]],
    peaks: Peaks,
    acceptance: float,
    screen: Console,
) -> dict[str, Any]:
    """Speed-up limits of each axis alone and of all together: of the verification, and end to end with drafting."""
    one = seconds(plan_costs(shape, replace(plan, rows=1)), peaks)
    drafting = peaks.seconds(arms["dense"]["draft"])
    dense = seconds(arms["dense"], peaks)
    table = Table(title=f"speed-up limits, {acceptance:g} new tokens a step", title_justify="left")
    for name in ("axis", "step ms", "verification / dense", "decoding / dense", "decoding / AR"):
        table.add_column(name, justify="left" if name == "axis" else "right")
    told = {"dense": plan} | {name: replace(plan, **changes) for name, changes in axes.items()}
    if len(axes) > 1:
        told["all together"] = combined(plan, axes)
    found: dict[str, Any] = {"ar_ms": round(1e3 * one, 5), "draft_ms": round(1e3 * drafting, 5), "axes": {}}
    for name, each in told.items():
        step = seconds(plan_costs(shape, each), peaks) + drafting
        ratios = ((dense - drafting) / (step - drafting), dense / step, acceptance * one / step)
        table.add_row(name, f"{1e3 * step:.4f}", *(f"{value:.2f}" for value in ratios))
        labels = ("verification_vs_dense", "decoding_vs_dense", "decoding_vs_ar")
        rounded = {label: round(value, 4) for label, value in zip(labels, ratios, strict=True)}
        found["axes"][name.replace(" ", "_")] = {"step_ms": round(1e3 * step, 5), **rounded}
    screen.print(table)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
