"""Times of single steps, operators and decoding loops in one process, arms alternating: `make bench`.

Prints the static cost card first, then checks that what is timed is right, then the times beside their
bytes-over-bandwidth limits (METHOD section 7), and a JSON line last. Rows go to results/bench/*.csv.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from harness import exclusive
from harness.engine.model import loading
from harness.fields import ConfigError
from scripts.bench import checks, growth, loops, ops, peers, records, setting, steps
from tasks.base import TaskError

SUITES = ("ops", "steps", "loops", "growth", "peers")
_DEFAULTS = ("ops", "steps", "loops")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns the exit code (1 after a red check, 2 for bad input)."""
    options = parser().parse_args(argv)
    screen = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    try:
        with exclusive.alone("cpu", True, lambda: screen.print("waiting until another run on this machine has ended")):
            result = run(options, screen)
    except checks.Red as red:
        print(red, file=sys.stderr)
        print(json.dumps({"status": "failed", "problems": red.problems}))
        return 1
    except (loading.ModelError, ConfigError, TaskError, records.RecordError, ValueError) as error:
        print(f"bench: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps({"status": "ok", **result}, separators=(",", ":")))
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m scripts.bench", description=__doc__.partition("\n")[0])
    what = made.add_argument_group("what is timed")
    what.add_argument("--suite", help=f"comma-separated: {', '.join(SUITES)} (default {','.join(_DEFAULTS)})")
    what.add_argument("--peers", action="store_true", help="only the peers: what a user would pick instead")
    what.add_argument("--contexts", help="positions before the step (default 7300; growth: 2048,4096,6144,8100)")
    what.add_argument("--drafts", default="1,7,chain16,tree60", help="tokens of a step (default %(default)s)")
    what.add_argument("--batches", default="1", help="sequences in a step (default %(default)s)")
    what.add_argument(
        "--engine", default="compiled", help="eager, compiled, cuda_graph; several alternate (default compiled)"
    )
    what.add_argument("--arms", default="all", help="dense, sparse, anchors, ffn, experts, hybrid (default all)")
    model = made.add_argument_group("model")
    model.add_argument("--arch", help="random weights in this public shape instead of SmolLM2")
    model.add_argument("--layers", type=int, help="decoder layers kept of --arch; then only times per layer count")
    model.add_argument("--positions", type=int, help="longest sequence of --arch, where its published one is shorter")
    model.add_argument("--carved", action="store_true", help="SmolLM2 carved into experts (scripts.carve_moe)")
    model.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    model.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    sparse = made.add_argument_group("sparse arms")
    sparse.add_argument("--kept", type=int, default=512, help="kept positions per KV head (default %(default)s)")
    sparse.add_argument("--block-size", type=int, default=16, help="positions per block (default %(default)s)")
    sparse.add_argument("--ffn-keep", type=float, default=2 / 3, help="share of FFN channels kept (default 1024/1536)")
    sparse.add_argument("--union", type=int, default=6, help="routed experts loaded per layer (default %(default)s)")
    sparse.add_argument("--anchors", type=int, default=3, help="every n-th layer retrieves (default %(default)s)")
    decoding = made.add_argument_group("decoding loops and peers")
    decoding.add_argument("--tokens", type=int, default=24, help="tokens decoded (default %(default)s)")
    decoding.add_argument("--draft", default="lookup", choices=peers.DRAFTS, help="drafter of dense and sparse")
    decoding.add_argument("--data-file", type=Path, help="prompts for --peers: JSONL as of task=squad_long")
    decoding.add_argument("--prompts", type=int, default=1, help="prompts of --peers (default %(default)s)")
    how = made.add_argument_group("how")
    how.add_argument("--repeats", type=int, default=15, help="timed rounds over all arms (default %(default)s)")
    how.add_argument("--results", type=Path, default=Path("results"), help="folder of the CSV files (default results)")
    how.add_argument("--redraw", action="store_true", help="only draw growth again, from its CSV file")
    return made


def run(options: argparse.Namespace, screen: Console) -> dict[str, Any]:
    """Every suite that was asked for; what the last line tells.

    Raises:
        checks.Red: a check failed.
        ValueError: bad input, one line.
    """
    suites = _suites(options)
    folder = options.results / "bench"
    if options.redraw:
        return growth.draw(folder / growth.FILE, options.results / "figures")
    if "peers" in suites:
        return peers.run(options, screen)
    made = setting.prepare(options)
    card(made, screen)
    found: dict[str, Any] = {"model": made.arch, "dtype": made.dtype, "device": made.place.device}
    if "growth" in suites:
        rows, told = growth.run(made, options.repeats, screen)
        records.append(folder / growth.FILE, rows)
        return found | told | growth.draw(folder / growth.FILE, options.results / "figures")
    if "ops" in suites:
        timed = ops.run(made, options.repeats, screen)
        records.append(folder / "ops.csv", timed)
        found["ops_ms"] = {f"{row.op} {row.shape} {row.engine}": round(row.median_ms, 4) for row in timed}
    if "steps" in suites:
        rows, ratios = steps.run(made, options.repeats, screen)
        records.append(folder / "steps.csv", rows)
        found["steps_ms"] = {
            f"{row.context} {row.batch} {row.arm} {row.tree} {row.rows} {row.engine}": round(row.median_ms, 3)
            for row in rows
        }
        found["ratios"] = ratios
    if "loops" in suites and made.library is not None:
        found |= loops.run(made, options.tokens, options.repeats, screen)
    return found


def _suites(options: argparse.Namespace) -> tuple[str, ...]:
    """The suites, checked; fills in the contexts that they have when none are given."""
    usual = ("peers",) if options.peers else _DEFAULTS
    suites = usual if options.suite is None else tuple(options.suite.split(","))
    for name in suites:
        if name not in SUITES:
            raise ValueError(f"--suite={name}: is not one of {', '.join(SUITES)}")
    for alone in ("growth", "peers"):
        if alone in suites and len(suites) > 1:
            raise ValueError(f"--suite={','.join(suites)}: {alone} runs alone")
    if options.redraw and suites != ("growth",):
        raise ValueError("--redraw: only --suite growth has a figure")
    if options.contexts is None:
        options.contexts = "2048,4096,6144,8100" if "growth" in suites else "7300"
    return suites


def card(made: setting.Setting, screen: Console) -> None:
    """What a step must read at least, known before anything is timed."""
    weights, shape, budget = made.weights, made.weights.shape, made.budget
    cache = shape.kv_bytes_per_token
    screen.print(f"model        {made.arch}, {made.dtype}, engines {', '.join(made.timed)}")
    screen.print(f"device       {made.place.device}, torch {made.place.torch}, sources {made.place.git}")
    screen.print(f"bandwidth    {made.bandwidth / 1e9:.1f} GB/s measured")
    screen.print(f"weights      {shape.weight_bytes / 1e6:.1f} MB in all, embedding left out")
    for context in made.contexts:
        ceiling = made.bandwidth / (_read(made) + cache * context)
        screen.print(
            f"cache        {cache / 1e3:.2f} kB a position, {cache * context / 1e6:.1f} MB at {context}: at most "
            f"{ceiling:.1f} tokens/s one by one"
        )
    screen.print(f"sparse arms  {budget.topk} blocks of {budget.block_size} per KV head, {weights.positions} positions")
    screen.print(f"drafts       {checks.shapes_text(made.shapes)}; batches {', '.join(map(str, made.batches))}")


def _read(made: setting.Setting) -> float:
    """Bytes of the weights that one token reads: of the experts only those that it is routed to."""
    shape = made.weights.shape
    if not shape.experts:
        return float(shape.weight_bytes)
    idle = shape.moe_layers * (shape.experts - shape.top_k) * shape.expert_ffn
    return float(shape.weight_bytes - 3 * shape.itemsize * shape.hidden * idle)
