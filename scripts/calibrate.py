"""What sparse verification needs to know of a model, measured on text: `python -m scripts.calibrate --help`.

Dense verification, teacher forced, several windows of text: similarity of the layers' block selections, attention mass
that a selection recovers in other layers, contribution of each KV head, gate magnitudes, routing weights (METHOD
sections 2 to 4). Writes the file that `calibration=FILE` takes, prints the anchor layers that it would give, and a JSON
line last.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from harness import console, roofline
from harness.calibration import RULES, Calibration
from harness.engine.calibrating import Tables, calibrate
from scripts import texts
from sparse.budget import BLOCK_SIZES, AttentionBudget

THETAS = {"jaccard": (0.3, 0.4, 0.5, 0.6, 0.7), "mass": (0.85, 0.9, 0.94, 0.97, 1.0)}
"""Thresholds of the printed table."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; returns the exit code, 2 for bad input."""
    options = _parser().parse_args(argv)
    try:
        made, seconds = run(options)
    except (ValueError, OSError) as error:
        print(f"calibrate: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    screen = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    screen.print(anchor_table(made))
    screen.print(f"wrote {made.path}")
    line = {
        "status": "ok",
        "path": made.path,
        "model": made.identity["model"],
        "tokens": made.tokens,
        "layers": made.layers,
        "anchors": {rule: [len(made.anchors(theta, rule, 0)) for theta in THETAS[rule]] for rule in RULES},
        "seconds": round(seconds, 1),
    }
    print(json.dumps(line, separators=(",", ":")))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.calibrate", description=__doc__.partition("\n")[0])
    texts.add_options(parser, dtype="auto")
    parser.add_argument("--windows", type=int, default=4, help="windows of text (default %(default)s)")
    parser.add_argument("--context", type=int, default=4096, help="tokens prefilled per window (default %(default)s)")
    parser.add_argument("--steps", type=int, default=16, help="steps per window (default %(default)s)")
    parser.add_argument("--rows", type=int, default=7, help="tokens per verification step (default %(default)s)")
    parser.add_argument("--topk", type=int, default=32, help="blocks selected per KV head (default %(default)s)")
    parser.add_argument("--block-size", type=int, default=16, choices=BLOCK_SIZES, help="positions per block")
    parser.add_argument("--out", type=Path, help="file to write (results/calibration/<model>.json)")
    return parser


def run(options: argparse.Namespace) -> tuple[Calibration, float]:
    """Calibrate as the options say and write the file; the calibration, and the seconds that the measurement took.

    Raises:
        ValueError, OSError: bad input, one line.
    """
    for name in ("windows", "context", "steps", "rows", "topk"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}={getattr(options, name)}: must be at least 1")
    budget = AttentionBudget(topk=options.topk, block_size=options.block_size)
    if not budget.skips(0, options.context):
        raise ValueError(
            f"--topk={options.topk}: {options.context} positions have {options.context // options.block_size} blocks "
            "of --block-size, so nothing would be left out (valid: fewer)"
        )
    text = texts.read(options.text)
    source = texts.find(options)
    length = options.context + options.steps * options.rows
    if length > source.positions:
        room = source.positions - options.steps * options.rows
        raise ValueError(
            f"--context={options.context}: the model has {source.positions} positions (valid: up to {room})"
        )
    out = options.out or Path("results") / "calibration" / f"{source.label}.json"
    if out.is_dir():
        raise ValueError(f"--out={out}: is a folder (valid: a file)")
    out.parent.mkdir(parents=True, exist_ok=True)
    windows, remark = texts.cut(source.tokenizer, text, options.windows, length)
    if remark is not None:
        console.note(remark)
    step = texts.load(source)
    console.note(
        f"calibrating {source.label}, {str(source.dtype).removeprefix('torch.')}, "
        f"{roofline.device_text(source.device, torch.get_num_threads())}, "
        f"{options.windows} windows of {length} tokens of {text.label}"
    )
    cache, begun = step.new_cache(length, budget), time.perf_counter()
    with console.progress("calibrate", options.windows * options.steps, 0) as advance:
        tables = calibrate(
            step,
            cache,
            windows,
            budget,
            context=options.context,
            rows=options.rows,
            seed=options.seed,
            advance=advance,
        )
    seconds = time.perf_counter() - begun
    shape = step.weights.shape
    made = calibration(tables, source.identity, text, (shape.layers, shape.kv_heads), budget, len(windows) * length)
    made.save(out)
    return Calibration.load(out), seconds


def calibration(
    tables: Tables,
    identity: dict[str, str | None],
    text: texts.Text,
    sizes: tuple[int, int],
    budget: AttentionBudget,
    tokens: int,
) -> Calibration:
    """The content of the file: ``sizes`` are the model's layers and KV heads, ``tokens`` those of all windows."""
    assert budget.topk is not None
    return Calibration(
        identity=identity,
        text_sha256=text.sha256,
        tokens=tokens,
        layers=sizes[0],
        kv_heads=sizes[1],
        block_size=budget.block_size,
        topk=budget.topk,
        jaccard=tables.jaccard,
        recovered_mass=tables.recovered_mass,
        head_map=tables.head_map,
        head_contribution=tables.head_contribution,
        ffn_quantiles=tables.ffn_quantiles,
        moe_beta=tables.moe_beta,
    )


def anchor_table(made: Calibration) -> Table:
    """The anchor layers that each threshold gives by each rule, from layer 0 on."""
    table = Table(title=f"anchor layers of {made.layers}", title_justify="left")
    for column in ("rule", "theta", "anchors", "share"):
        table.add_column(column)
    for rule in RULES:
        for theta in THETAS[rule]:
            found = made.anchors(theta, rule, 0)
            table.add_row(rule, f"{theta}", ", ".join(map(str, found)), f"{len(found) / made.layers:.0%}")
    return table


if __name__ == "__main__":
    sys.exit(main())
