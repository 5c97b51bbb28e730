"""Total throughput of batches in one process, arms alternating: `python -m scripts.bench_batches --help`.

The same prompts are decoded one after the other and in batches, token by token, with dense and with sparse
verification. Before any time is printed, the batched outputs are compared with the others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from harness import roofline
from harness.engine.decoding import Decoded, Decoder, Prefix, StopRule
from harness.engine.drafting.base import Drafter, NoDrafter
from harness.engine.drafting.expansion import Growth
from harness.engine.drafting.lookup import LookupDrafter
from harness.engine.model import loading
from harness.engine.model.families import adapt
from harness.engine.model.step import Step
from harness.timing import Clock, make_clock
from scripts.bench.measure import Arm, alternate, ratio
from scripts.bench.setting import prompt_tokens
from sparse.budget import AttentionBudget, Sparsity

_LEAST_EQUAL = 0.5
"""Share of equal tokens below which bf16 rounding cannot be the reason; in fp32 all must be equal."""


@dataclass(frozen=True, slots=True)
class Batches:
    """What is timed.

    Attributes:
        decoders: by batch size, over one step and one cache.
        prefixes: the prefilled prompts, one a row.
        drafters: per kind of arm, one a row.
        budgets: per kind of arm.
        tokens: decoded per prompt.
        clock: the only clock.
    """

    decoders: dict[int, Decoder]
    prefixes: list[Prefix]
    drafters: dict[str, list[Drafter]]
    budgets: dict[str, Sparsity]
    tokens: int
    clock: Clock

    def decode(self, kind: str, batch: int) -> list[Decoded]:
        """All prompts by one arm."""
        return self.decoders[batch].decode_all(self.prefixes, self.drafters[kind], self.budgets[kind], self.tokens)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code (1 after a red check, 2 for bad input)."""
    options = _parser().parse_args(argv)
    try:
        bench, card = prepare(options)
    except (loading.ModelError, ValueError) as error:
        print(f"bench_batches: {error}", file=sys.stderr)
        return 2
    screen = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for name, value in card.items():
        screen.print(f"{name:<12} {value}")
    equal = {kind: equal_share(bench, kind, options.batch) for kind in bench.budgets}
    exact = card["dtype"] == "float32"
    red = [kind for kind, share in equal.items() if share < (1 if exact else _LEAST_EQUAL)]
    if red:
        print(f"batches change the output of {', '.join(red)}: {equal}", file=sys.stderr)
        print(json.dumps({"status": "failed", "equal": equal}))
        return 1
    arms: dict[str, Arm] = {
        f"{kind} {batch}": partial(bench.decode, kind, batch) for kind in bench.budgets for batch in (1, options.batch)
    }
    times = alternate(arms, bench.clock, options.repeats, warmup=1)
    produced = {kind: sum(len(one.output) - 1 for one in bench.decode(kind, 1)) for kind in bench.budgets}
    print(json.dumps({"status": "ok", **_report(times, produced, equal, options.batch, screen)}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_batches", description=__doc__.partition("\n")[0])
    parser.add_argument("--context", type=int, default=2000, help="prompt tokens (default %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="sequences in one step, and prompts (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded per prompt (default %(default)s)")
    parser.add_argument("--draft", type=int, default=6, help="draft tokens of prompt lookup (default %(default)s)")
    parser.add_argument("--kept", type=int, default=512, help="kept positions per KV head (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds over all arms (default %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return parser


def prepare(options: argparse.Namespace) -> tuple[Batches, dict[str, Any]]:
    """Load the model and prefill one prompt per row.

    Raises:
        harness.engine.model.loading.ModelError, ValueError: bad input, one line.
    """
    if min(options.context, options.tokens - 1, options.draft, options.repeats, options.batch - 1) < 1:
        raise ValueError("--batch and --tokens must be at least 2, --context, --draft and --repeats at least 1")
    if options.kept < 32 or options.kept % 16:
        raise ValueError(f"--kept={options.kept}: must be a multiple of 16 of at least 32")
    budget = AttentionBudget(topk=options.kept // 16)
    if options.context <= options.kept + budget.block_size:
        raise ValueError(f"--kept={options.kept} covers --context={options.context}, so nothing would be skipped")
    device = loading.resolve_device(options.device)
    dtype = loading.resolve_dtype(options.dtype, device)
    folder = str(loading.smollm2_folder())
    tokenizer = loading.load_tokenizer(folder)
    step = Step(adapt(loading.load_model(folder, dtype, device), packed=True))
    capacity = options.context + options.tokens + options.draft + 1
    if capacity > step.weights.positions:
        raise ValueError(f"--context={options.context}: the model has {step.weights.positions} positions")
    cache, clock = step.new_cache(capacity, budget, options.batch), make_clock(device.type)
    decoders = {
        batch: Decoder(step, cache, stop=StopRule(), clock=clock, prefill_chunk=1024, batch=batch)
        for batch in (1, options.batch)
    }
    text = prompt_tokens(tokenizer, options.context + 97 * options.batch)
    prompts = [text[97 * row : 97 * row + options.context] for row in range(options.batch)]
    growth, rows = Growth(options.draft), range(options.batch)
    bench = Batches(
        decoders=decoders,
        prefixes=[decoders[1].prefill(prompt, row) for row, prompt in enumerate(prompts)],
        drafters={
            "ar": [NoDrafter() for _ in rows],
            "dense": [LookupDrafter(growth, 3) for _ in rows],
            "sparse": [LookupDrafter(growth, 3) for _ in rows],
        },
        budgets={"ar": Sparsity(), "dense": Sparsity(), "sparse": Sparsity(budget)},
        tokens=options.tokens,
        clock=clock,
    )
    return bench, {
        "model": "SmolLM2-135M-Instruct",
        "dtype": str(dtype).removeprefix("torch."),
        "device": roofline.device_text(device, torch.get_num_threads()),
        "prompts": f"{options.batch} of {options.context} tokens, {options.tokens} decoded of each",
        "arms": f"prompt lookup of {options.draft} tokens; sparse keeps {options.kept} positions per KV head",
    }


def equal_share(bench: Batches, kind: str, batch: int) -> float:
    """Share of output tokens that a batch leaves as they are, up to where an output first differs."""
    alone, together = bench.decode(kind, 1), bench.decode(kind, batch)
    same = total = 0
    for one, other in zip(alone, together, strict=True):
        pairs = list(zip(one.output, other.output, strict=False))
        parted = next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
        same, total = same + parted, total + max(len(one.output), len(other.output))
    return same / total


def _report(
    times: dict[str, list[float]], produced: dict[str, int], equal: dict[str, float], batch: int, screen: Console
) -> dict[str, Any]:
    table = Table(title="total throughput", title_justify="left")
    for column in ("arm", "tokens/s at batch 1", f"tokens/s at batch {batch}", "ratio", "p10 to p90", "equal tokens"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    found: dict[str, Any] = {"batch": batch}
    for kind, tokens in produced.items():
        alone, together = (tokens / statistics.median(times[f"{kind} {size}"]) for size in (1, batch))
        spread = ratio(times, f"{kind} 1", f"{kind} {batch}")
        middle, low, high = spread.median, spread.p10, spread.p90
        table.add_row(
            kind, f"{alone:.1f}", f"{together:.1f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}", f"{equal[kind]:.0%}"
        )
        found[kind] = {
            "tokens_s_1": round(alone, 2),
            f"tokens_s_{batch}": round(together, 2),
            "ratio": round(middle, 3),
            "p10": round(low, 3),
            "p90": round(high, 3),
            "equal": round(equal[kind], 4),
        }
    screen.print(table)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
