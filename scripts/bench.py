"""Times of single steps in one process, arms alternating: `make bench` or `python -m scripts.bench --help`.

Prints the static cost card first, then checks that what is timed is right, then the times beside their
bytes-over-bandwidth limits (METHOD section 7), and a JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import tasks
from harness import roofline
from harness.budgets import required_paths
from harness.engine.cache import KVCache
from harness.engine.decoding import Decoder, StopRule
from harness.engine.drafting.base import NoDrafter
from harness.engine.model import healing, loading
from harness.engine.model.byte_tokenizer import ByteTokenizer
from harness.engine.model.families import adapt
from harness.engine.model.step import Step
from harness.engine.model.verification import Verification
from harness.timing import Clock, make_clock
from scripts.bench_checks import check
from sparse.budget import AttentionBudget, FfnBudget, MoeBudget, ReuseBudget, Sparsity
from sparse.cost import trace_bytes
from tasks.base import TaskSettings


@dataclass(frozen=True, slots=True)
class Bench:
    """What is timed, and with what.

    Attributes:
        library: the library's own model, the same weights; None for random weights.
        step, cache, prompt: our engine with the prompt prefilled.
        draft: draft tokens of a speculative step.
        arms: what is timed: tokens and budgets by name.
        budget: attention budget of the sparse arms.
        clock: the only clock.
        bandwidth: measured, bytes per second.
    """

    library: Any
    step: Step
    cache: KVCache
    prompt: list[int]
    draft: int
    arms: dict[str, tuple[int, Sparsity]]
    budget: AttentionBudget
    clock: Clock
    bandwidth: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code (1 after a red check, 2 for bad input)."""
    options = _parser().parse_args(argv)
    if options.gpu_check:
        options.device, options.arch = "cuda", options.arch or "llama31_8b"
    try:
        bench = prepare(options)
    except (loading.ModelError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    screen = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    _card(bench, options, screen)
    problems = check(bench)
    if problems:
        print("\n".join(problems), file=sys.stderr)
        print(json.dumps({"status": "failed", "problems": problems}))
        return 1
    tokens = "" if bench.library is None else "; greedy tokens equal the library's"
    screen.print(f"checks: block attention and the feed-forward kernels equal their naive references{tokens}")
    times = time_steps(bench, options.repeats)
    result = _steps_report(bench, times, screen)
    if bench.library is not None:
        result |= _loop_report(bench, options, screen)
    if options.profile:
        profile(bench, screen)
    print(json.dumps({"status": "ok", **result}, separators=(",", ":")))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", help="random weights in this public shape instead of SmolLM2")
    parser.add_argument("--layers", type=int, help="decoder layers kept of --arch")
    parser.add_argument("--context", type=int, default=7300, help="prompt tokens (default %(default)s)")
    parser.add_argument("--draft", type=int, default=6, help="draft tokens of a speculative step (default %(default)s)")
    parser.add_argument("--kept", type=int, default=512, help="kept positions per KV head (default %(default)s)")
    parser.add_argument("--block-size", type=int, default=16, help="positions per block (default %(default)s)")
    parser.add_argument("--ffn-keep", type=float, default=2 / 3, help="share of FFN channels kept (default 1024/1536)")
    parser.add_argument("--carved", action="store_true", help="SmolLM2 carved into experts (scripts.carve_moe)")
    parser.add_argument("--union", type=int, default=6, help="routed experts loaded per layer (default %(default)s)")
    parser.add_argument("--anchors", type=int, default=3, help="every n-th layer retrieves (default %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds over all arms (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=12, help="tokens of the decoding loops (default %(default)s)")
    parser.add_argument("--profile", action="store_true", help="also print where the time of each step goes")
    parser.add_argument("--gpu-check", action="store_true", help="the same on a GPU, exit code 2 where there is none")
    return parser


def prepare(options: argparse.Namespace) -> Bench:
    """Load the model twice (the library's and ours) and prefill the prompt.

    Raises:
        harness.engine.model.loading.ModelError, ValueError: bad input, one line.
    """
    device = loading.resolve_device(options.device)
    dtype = loading.resolve_dtype(options.dtype, device)
    threads = torch.get_num_threads()
    least = min(options.context, options.repeats, options.kept, options.union, options.anchors)
    if least < 1 or options.draft < 0 or options.tokens < 2:
        raise ValueError(
            "--context, --repeats, --kept, --union and --anchors must be at least 1, --draft 0, --tokens 2"
        )
    if options.carved and options.arch:
        raise ValueError(f"--arch={options.arch}: --carved times SmolLM2 cut into experts (valid: one of them)")
    if not 0 < options.ffn_keep < 1:
        raise ValueError(f"--ffn-keep={options.ffn_keep}: must be above 0 and below 1")
    budget = AttentionBudget(topk=options.kept // options.block_size, block_size=options.block_size)
    if options.arch:
        config = loading.shape_config(options.arch, options.layers)
        library, model = None, loading.random_model(config, dtype, device, seed=0)
        tokenizer: Any = ByteTokenizer()
    else:
        folder = str(loading.smollm2_folder())
        library = None if options.carved else loading.load_model(folder, dtype, device)
        if options.carved:
            model = healing.load_carved(None, 8, dtype, device, folder)
        else:
            model = loading.load_model(folder, dtype, device)
        tokenizer = loading.load_tokenizer(folder)
    step = Step(adapt(model, packed=True, channels=True))
    capacity = options.context + options.draft + options.tokens + 1
    if capacity > step.weights.positions:
        raise ValueError(f"--context={options.context}: the model has {step.weights.positions} positions")
    if options.context <= options.kept + options.block_size:
        raise ValueError(f"--kept={options.kept} covers --context={options.context}, so nothing would be skipped")
    bench = Bench(
        library=library,
        step=step,
        cache=step.new_cache(capacity, budget),
        prompt=prompt_tokens(tokenizer, options.context),
        draft=options.draft,
        arms=_arms(options, step, budget),
        budget=budget,
        clock=make_clock(device.type),
        bandwidth=roofline.bandwidth(device.type, threads),
    )
    step.prefill(torch.tensor(bench.prompt, device=device), bench.cache, chunk=1024)
    bench.cache.refresh_summaries()
    return bench


def _arms(options: argparse.Namespace, step: Step, budget: AttentionBudget) -> dict[str, tuple[int, Sparsity]]:
    """Dense and sparse steps; every axis that the model has, alone and together."""
    rows, shape = options.draft + 1, step.weights.shape
    reuse = ReuseBudget(anchors=tuple(range(0, shape.layers, options.anchors)))
    axes = {"sparse": Sparsity(budget), "anchors": Sparsity(budget, reuse=reuse)}
    if shape.experts:
        if options.union >= shape.experts:
            raise ValueError(f"--union={options.union}: a layer has {shape.experts} routed experts (valid: below that)")
        axes["experts"] = Sparsity(moe=MoeBudget(union=options.union))
        axes["hybrid"] = Sparsity(budget, moe=MoeBudget(union=options.union), reuse=reuse)
    else:
        ffn = FfnBudget(rule="topk", keep=options.ffn_keep)
        axes["ffn"] = Sparsity(ffn=ffn)
        axes["hybrid"] = Sparsity(budget, ffn, reuse=reuse)
    single = {"dense 1": (1, Sparsity()), f"dense {rows}": (rows, Sparsity()), "sparse 1": (1, Sparsity(budget))}
    return single | {f"{name} {rows}": (rows, sparsity) for name, sparsity in axes.items()}


def prompt_tokens(tokenizer: Any, tokens: int) -> list[int]:
    """Synthetic prose of exactly ``tokens`` tokens."""
    settings = TaskSettings("bundled", (), 0, "plain", 0, (), 0, None, {"context_tokens": 2 * tokens, "depth": None})
    task = tasks.make("needle", settings)
    ids: list[int] = tokenizer.encode(task.prompt(next(iter(task.examples()))).document)
    if len(ids) < tokens:
        ids = ids * -(-tokens // len(ids))
    return ids[:tokens]


Arm = Callable[[], object]


def step_arms(bench: Bench) -> dict[str, Arm]:
    """One call a step."""

    def arm(rows: int, sparsity: Sparsity) -> Arm:
        tokens = torch.tensor([bench.prompt[-rows:]], device=bench.step.weights.device)

        def once() -> Tensor:
            bench.cache.truncate(0, len(bench.prompt))
            return bench.step.verify(tokens, bench.cache, Verification(sparsity))

        return once

    return {name: arm(rows, sparsity) for name, (rows, sparsity) in bench.arms.items()}


def step_bytes(bench: Bench) -> tuple[dict[str, float], dict[str, list[str]]]:
    """Least bytes of one step of every arm, from what a step really chose, and the paths that it took.

    Raises:
        RuntimeError: a mechanism that the arm times never ran.
    """
    found, paths = {}, {}
    for name, (rows, sparsity) in bench.arms.items():
        run = Verification(sparsity)
        bench.cache.truncate(0, len(bench.prompt))
        bench.step.verify(torch.tensor([bench.prompt[-rows:]], device=bench.step.weights.device), bench.cache, run)
        found[name] = trace_bytes(bench.step.weights.shape, sparsity.attention, run.trace)
        paths[name] = [path for path, count in run.trace.paths.items() if count]
        for wanted in required_paths(sparsity):
            if not any(path.startswith(wanted) for path in paths[name]):
                raise RuntimeError(f"{name}: {wanted} never ran")
    return found, paths


def alternate(arms: dict[str, Arm], clock: Clock, repeats: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each arm, run in turn; the order turns round from round to round."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(warmup + repeats):
        order = list(arms) if turn % 2 == 0 else list(reversed(arms))
        for name in order:
            start = clock()
            arms[name]()
            if turn >= warmup:
                times[name].append(clock() - start)
    return times


def time_steps(bench: Bench, repeats: int) -> dict[str, list[float]]:
    """Seconds of every step arm."""
    return alternate(step_arms(bench), bench.clock, repeats)


def ratio(times: dict[str, list[float]], over: str, under: str) -> tuple[float, float, float]:
    """Median of the round-by-round ratios of two arms, with their 10th and 90th percentile."""
    pairs = sorted(a / b for a, b in zip(times[over], times[under], strict=True))
    return statistics.median(pairs), pairs[len(pairs) // 10], pairs[-1 - len(pairs) // 10]


def _card(bench: Bench, options: argparse.Namespace, screen: Console) -> None:
    weights, shape = bench.step.weights, bench.step.weights.shape
    kept = bench.budget.topk or 0
    name = "SmolLM2-135M-Instruct, carved into experts" if options.carved else "SmolLM2-135M-Instruct"
    screen.print(f"model        {options.arch or name}, {weights.dtype}")
    screen.print(f"device       {roofline.device_text(weights.device, torch.get_num_threads())}")
    screen.print(f"bandwidth    {bench.bandwidth / 1e9:.1f} GB/s measured")
    screen.print(f"weights      {shape.weight_bytes / 1e6:.1f} MB read per step")
    screen.print(f"cache        {shape.kv_bytes_per_token / 1e3:.2f} kB per position, {len(bench.prompt)} positions")
    screen.print(f"sparse arms  {kept} blocks of {bench.budget.block_size} per KV head, draft of {bench.draft} tokens")


def _steps_report(bench: Bench, times: dict[str, list[float]], screen: Console) -> dict[str, Any]:
    table = Table(title="one step", title_justify="left")
    for column in ("arm and tokens", "median ms", "p10", "p90", "limit ms", "of limit"):
        table.add_column(column, justify="left" if column.startswith("arm") else "right")
    found: dict[str, Any] = {"context": len(bench.prompt), "bandwidth_gb_s": round(bench.bandwidth / 1e9, 2)}
    read, paths = step_bytes(bench)
    for name, seconds in times.items():
        middle, ordered, limit = statistics.median(seconds), sorted(seconds), read[name] / bench.bandwidth
        low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
        cells = [f"{1e3 * value:.2f}" for value in (middle, low, high, limit)]
        table.add_row(name, *cells, f"{limit / middle:.0%}")
        found[name.replace(" ", "_") + "_ms"] = round(1e3 * middle, 3)
        found[name.replace(" ", "_") + "_limit_ms"] = round(1e3 * limit, 3)
    screen.print(table)
    dense = f"dense {bench.draft + 1}"
    pairs = [(dense, "dense 1"), ("sparse 1", "dense 1")]
    pairs += [(name, dense) for name in times if not name.startswith("dense") and not name.endswith(" 1")]
    for over, under in pairs:
        middle, low, high = ratio(times, over, under)
        limit = read[over] / read[under]
        simulated = any(".simulated" in path for path in paths[over])
        realised = (
            ", simulated"
            if simulated
            else ""
            if limit >= 1
            else f", {(1 - middle) / (1 - limit):.0%} of the saved bytes realised"
        )
        screen.print(f"{over} / {under}: {middle:.3f} [{low:.3f}, {high:.3f}] (limit {limit:.3f}{realised})")
        found[f"{over}/{under}".replace(" ", "_")] = round(middle, 4)
        found[f"{over}/{under}_limit".replace(" ", "_")] = round(limit, 4)
    return found


def _loop_report(bench: Bench, options: argparse.Namespace, screen: Console) -> dict[str, Any]:
    """Tokens per second of our autoregressive loop against the library's generate(), both after the prefill."""
    device, tokens = bench.step.weights.device, options.tokens
    ids = torch.tensor([bench.prompt], device=device)
    with torch.inference_mode():
        past = bench.library(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
    decoder = Decoder(bench.step, bench.cache, stop=StopRule(), clock=bench.clock, prefill_chunk=1024)
    prefix = decoder.prefill(bench.prompt)
    times: dict[str, list[float]] = {"generate": [], "ar": []}
    for turn in range(1 + max(2, options.repeats // 5)):
        copied = deepcopy(past)
        start = bench.clock()
        bench.library.generate(
            ids, past_key_values=copied, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
        generated = bench.clock() - start
        decoded = decoder.decode(prefix, NoDrafter(), Sparsity(), tokens + 1)
        if turn:
            times["generate"].append(generated / tokens)
            times["ar"].append(decoded.seconds / tokens)
    middle, low, high = ratio(times, "generate", "ar")
    rates = {name: 1 / statistics.median(seconds) for name, seconds in times.items()}
    screen.print(f"our ar loop: {rates['ar']:.1f} tokens/s, the library's generate(): {rates['generate']:.1f} tokens/s")
    screen.print(f"ar / generate: {middle:.2f}x [{low:.2f}, {high:.2f}]")
    return {
        "ar_tokens_s": round(rates["ar"], 2),
        "generate_tokens_s": round(rates["generate"], 2),
        "ar/generate": round(middle, 3),
    }


def profile(bench: Bench, screen: Console, top: int = 12) -> None:
    """Where the time of each step goes, by operator."""
    for name, arm in step_arms(bench).items():
        arm()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
            arm()
        screen.print(f"{name}:")
        screen.print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=top), markup=False)


if __name__ == "__main__":
    raise SystemExit(main())
