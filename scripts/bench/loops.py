"""Tokens per second of our token-by-token loop against the library's generate(), both after the prefill."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from rich.console import Console

from harness.engine.decoding import Decoder, StopRule
from harness.engine.drafting.base import NoDrafter
from scripts.bench import checks
from scripts.bench.measure import Spread, ratio
from scripts.bench.setting import Setting
from sparse.budget import Sparsity

_PREFILL_CHUNK = 1024


def run(setting: Setting, tokens: int, repeats: int, screen: Console) -> dict[str, Any]:
    """Check against the library, then decode ``tokens`` tokens with every engine in turn.

    Raises:
        checks.Red: our greedy choices are not the library's.
    """
    device, context = setting.weights.device, max(setting.contexts)
    prompt, decoders, prefixes = setting.tokens[:context], {}, {}
    for name in setting.timed:
        cache = setting.steps[name].new_cache(len(setting.tokens), setting.budget)
        decoder = Decoder(
            setting.steps[name], cache, stop=StopRule(), clock=setting.clock, prefill_chunk=_PREFILL_CHUNK
        )
        decoders[name], prefixes[name] = decoder, decoder.prefill(prompt)
        checks.check_library(setting, name, cache, context)
    screen.print("greedy choices equal the library's, up to rounding")
    ids = torch.tensor([prompt], device=device)
    with torch.inference_mode():
        past = setting.library(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
    times: dict[str, list[float]] = {"generate": [], **{f"ar {name}": [] for name in decoders}}
    for turn in range(1 + max(2, repeats // 5)):
        copied = deepcopy(past)
        start = setting.clock()
        setting.library.generate(
            ids, past_key_values=copied, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
        seconds = {"generate": setting.clock() - start}
        for name, decoder in decoders.items():
            seconds[f"ar {name}"] = decoder.decode(prefixes[name], NoDrafter(), Sparsity(), tokens + 1).seconds
        for name, taken in seconds.items():
            if turn:
                times[name].append(taken / tokens)
    found: dict[str, Any] = {}
    for name, rounds in times.items():
        rate = 1 / Spread.of(rounds).median
        found[f"{name} tokens/s"] = round(rate, 2)
        told = ""
        if name != "generate":
            spread = ratio(times, "generate", name)
            found[f"{name} / generate"] = round(spread.median, 3)
            told = f", {spread.text()} times the library's generate()"
        screen.print(f"{name}: {rate:.1f} tokens/s{told}")
    return {"loops": found}
