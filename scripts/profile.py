"""How much every part of a verification step contributes: `python -m scripts.profile --help`.

The redundancy profile is the observation on which sparse verification rests (METHOD section 1): attention heads, KV
blocks, groups of FFN channels and experts are left out one at a time, and the distributions of the draft tokens are
compared with those of the intact step. Writes profile.json, profile.md and figures; prints a JSON line last.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from harness import console, roofline
from harness.engine.cache import KVCache
from harness.engine.calibrating import EVERY_CHANNEL
from harness.engine.model.probe import AttentionView, Probe
from harness.engine.model.step import Step
from harness.engine.model.verification import Verification
from harness.evidence.store import write_text
from scripts import profile_figures, texts
from sparse.budget import BLOCK_SIZES, AttentionBudget, FfnBudget, Sparsity
from sparse.cost import ModelShape
from sparse.ops.block_attention.eager import attention_mass
from sparse.selection import Selection

DECILES = 10
POSITIONS = 20
"""Bins of a block's relative position."""
HELD = (0.5, 0.9, 0.95, 0.99)
"""Shares of the attention mass whose fewest blocks are counted."""
RANKS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
"""Shares of the blocks, strongest first, whose mass is stored."""
_DIGITS = 5

Advance = Callable[[], None]


class Watch(Probe):
    """Keeps what the intact step shows; nothing is changed.

    Args:
        block_size: positions per block.

    Attributes:
        mass: per layer, [kv_heads, groups, whole blocks], fp64, attention mass, mean over the step's tokens.
        combine: per layer with experts, [tokens, experts], share of each expert that runs in its token's routing.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.mass: dict[int, Tensor] = {}
        self.combine: dict[int, Tensor] = {}

    def selection(self, layer: int, view: AttentionView, selection: Selection | None) -> Selection | None:
        """Keep the mass on each block."""
        mass = attention_mass(view.queries, view.keys, view.start, view.length, self._block_size, view.groups)
        self.mass[layer] = mass.view(mass.shape[0], -1, view.groups, mass.shape[-1]).mean(1).double().cpu()
        return selection

    def routed(self, layer: int, probabilities: Tensor, combine: Tensor) -> Tensor:
        """Keep the routing."""
        chosen = probabilities * (combine != 0)
        self.combine[layer] = chosen / chosen.sum(-1, keepdim=True)
        return combine


class WithoutHead(Probe):
    """Zeroes the output of one query head of one layer."""

    def __init__(self, layer: int, head: int) -> None:
        self._layer, self._head = layer, head

    def mixed(self, layer: int, output: Tensor) -> Tensor:
        """The output without the head."""
        if layer != self._layer:
            return output
        output = output.clone()
        output[:, self._head] = 0
        return output


class WithoutBlocks(Probe):
    """Attends to the given blocks in every layer, [kv_heads, kept] each, and to the unfinished tail."""

    def __init__(self, kept: dict[int, Tensor]) -> None:
        self._kept = kept

    def selection(self, layer: int, view: AttentionView, selection: Selection | None) -> Selection | None:
        """The blocks that stay."""
        blocks = self._kept[layer].to(view.keys.device)
        return Selection(blocks, None, blocks.numel())


class WithoutChannels(Probe):
    """Zeroes one of ``groups`` equal groups of the channels of one layer's FFN, or of each of its routed experts.

    Channels are ranked by their largest gate magnitude over the tokens of the step; group 0 is the strongest.
    """

    def __init__(self, layer: int, group: int, groups: int) -> None:
        self._layer, self._group, self._groups = layer, group, groups

    def gated(self, layer: int, activations: Tensor) -> Tensor:
        """The activations without the group."""
        if layer != self._layer:
            return activations
        ranked = activations.abs().amax(0).argsort(descending=True, stable=True)
        return activations.index_fill(1, ranked.tensor_split(self._groups)[self._group], 0)


class WithoutExperts(Probe):
    """Takes the token-expert pairs ``left_out`` [tokens, experts], bool, out of one layer; other weights stay."""

    def __init__(self, layer: int, left_out: Tensor) -> None:
        self._layer, self._left_out = layer, left_out

    def routed(self, layer: int, probabilities: Tensor, combine: Tensor) -> Tensor:
        """The weights of the remaining experts."""
        return combine.masked_fill(self._left_out, 0) if layer == self._layer else combine


class Ablation:
    """One verification step over real text, run again and again with something left out.

    Args:
        step: of the model; with experts its weights need the layout by channel.
        cache: room for the window.
        window: token ids: the context, and behind it the tokens of the step.
        context: tokens of the context.
        block_size: positions per block.

    Attributes:
        watch: what the intact step showed.
    """

    def __init__(self, step: Step, cache: KVCache, window: Sequence[int], context: int, block_size: int) -> None:
        self._step, self._cache, self._context = step, cache, context
        ffn = EVERY_CHANNEL if step.weights.shape.moe_layers else FfnBudget()
        self._sparsity = Sparsity(attention=AttentionBudget(block_size=block_size), ffn=ffn)
        tokens = torch.tensor(window, device=step.weights.device)
        self._tokens = tokens[None, context:]
        self.watch = Watch(block_size)
        cache.truncate(0, 0)
        step.prefill(tokens[:context], cache, chunk=1024)
        self._intact = self._distributions(self.watch)

    def kl(self, probe: Probe) -> float:
        """KL divergence in nats of the step's distributions under ``probe`` from the intact ones, mean over tokens."""
        other = self._distributions(probe)
        return max(0.0, (self._intact.exp() * (self._intact - other)).sum(-1).mean().item())

    def _distributions(self, probe: Probe) -> Tensor:
        """[tokens, vocab], fp64 log-probabilities; the cache is rolled back first."""
        self._cache.truncate(0, self._context)
        run = Verification(self._sparsity, probe=probe)
        logits = self._step.verify(self._tokens, self._cache, run)[0]
        return torch.log_softmax(logits.double(), dim=-1)


def steps_of(shape: ModelShape, groups: int) -> int:
    """Ablations of one window."""
    return shape.layers * (shape.heads + groups) + DECILES + shape.moe_layers * (shape.top_k + shape.experts)


def heads(ablation: Ablation, shape: ModelShape, advance: Advance) -> dict[str, Tensor]:
    """Per layer and query head: ``kl`` without it, and its attention mass outside the first and last block."""
    kl = torch.zeros(shape.layers, shape.heads, dtype=torch.float64)
    for layer in range(shape.layers):
        for head in range(shape.heads):
            kl[layer, head] = ablation.kl(WithoutHead(layer, head))
            advance()
    mass = [ablation.watch.mass[layer].flatten(0, 1)[:, 1:-1].sum(-1) for layer in range(shape.layers)]
    return {"kl": kl, "far_mass": torch.stack(mass)}


def blocks(ablation: Ablation, shape: ModelShape, advance: Advance) -> dict[str, Tensor]:
    """Where the attention mass lies, and what leaving out each decile of the blocks costs.

    Blocks are ranked per layer and KV head by their mass in the intact step. ``on_blocks`` [layers] is the mass on
    whole blocks; relative to it, ``by_rank`` [layers, RANKS] is the mass on the strongest blocks, ``by_position``
    [layers, POSITIONS] that at each relative position, ``holding`` [layers, HELD] the share of the blocks that holds
    a share of the mass. ``decile_kl`` and ``decile_mass`` [DECILES]: left out in all layers at once.
    """
    mass = torch.stack([ablation.watch.mass[layer].mean(1) for layer in range(shape.layers)])
    ranked, order = mass.sort(dim=-1, descending=True, stable=True)
    count, total = mass.shape[-1], mass.sum(-1, keepdim=True)
    cumulative = ranked.cumsum(-1) / total
    kl, weight = torch.zeros(DECILES, dtype=torch.float64), torch.zeros(DECILES, dtype=torch.float64)
    for decile in range(DECILES):
        first, last = count * decile // DECILES, count * (decile + 1) // DECILES
        kept = torch.cat((order[..., :first], order[..., last:]), dim=-1)
        kl[decile] = ablation.kl(WithoutBlocks(dict(enumerate(kept))))
        weight[decile] = ranked[..., first:last].sum(-1).mean()
        advance()
    along = (mass / total).cumsum(-1)
    placed = torch.stack([_at(along, edge / POSITIONS) for edge in range(POSITIONS + 1)], dim=-1).diff(dim=-1)
    needed = [(cumulative < held).sum(-1).add(1).clamp(max=count) / count for held in HELD]
    return {
        "on_blocks": total.mean((1, 2)),
        "by_rank": torch.stack([_at(cumulative, share) for share in RANKS], dim=-1).mean(1),
        "by_position": placed.mean(1),
        "holding": torch.stack(needed, dim=-1).double().mean(1),
        "decile_kl": kl,
        "decile_mass": weight,
    }


def _at(cumulative: Tensor, share: float) -> Tensor:
    """A cumulative curve [..., blocks] at a share of the blocks, linear in between."""
    place = share * cumulative.shape[-1]
    below = int(place)
    padded = torch.nn.functional.pad(cumulative, (1, 0))
    above = min(below + 1, cumulative.shape[-1])
    return padded[..., below] + (place - below) * (padded[..., above] - padded[..., below])


def channels(ablation: Ablation, shape: ModelShape, groups: int, advance: Advance) -> dict[str, Tensor]:
    """Per layer and group of channels, strongest first: ``kl`` without it."""
    kl = torch.zeros(shape.layers, groups, dtype=torch.float64)
    for layer in range(shape.layers):
        for group in range(groups):
            kl[layer, group] = ablation.kl(WithoutChannels(layer, group, groups))
            advance()
    return {"kl": kl}


def experts(ablation: Ablation, shape: ModelShape, advance: Advance) -> dict[str, Tensor]:
    """Per layer with experts: ``rank_kl`` without each token's strongest, second, ... expert, ``rank_weight`` its
    weight, ``expert_kl`` without one expert and ``expert_load`` the share of the tokens that run it."""
    found: dict[str, list[Tensor]] = {"rank_kl": [], "rank_weight": [], "expert_kl": [], "expert_load": []}
    for layer, combine in sorted(ablation.watch.combine.items()):
        ranked = combine.topk(shape.top_k, dim=-1)
        rank_kl = []
        for rank in range(shape.top_k):
            chosen = torch.zeros_like(combine, dtype=torch.bool).scatter_(1, ranked.indices[:, rank : rank + 1], True)
            rank_kl.append(ablation.kl(WithoutExperts(layer, chosen)))
            advance()
        expert_kl = []
        for expert in range(shape.experts):
            used = torch.zeros_like(combine, dtype=torch.bool)
            used[:, expert] = combine[:, expert] != 0
            expert_kl.append(ablation.kl(WithoutExperts(layer, used)) if used.any() else 0.0)
            advance()
        found["rank_kl"].append(torch.tensor(rank_kl, dtype=torch.float64))
        found["rank_weight"].append(ranked.values.double().mean(0).cpu())
        found["expert_kl"].append(torch.tensor(expert_kl, dtype=torch.float64))
        found["expert_load"].append((combine != 0).double().mean(0).cpu())
    return {name: torch.stack(rows) for name, rows in found.items()}


def measure(ablation: Ablation, shape: ModelShape, groups: int, advance: Advance) -> dict[str, dict[str, Tensor]]:
    """All parts of the profile of one window; ``experts`` only where there are some."""
    found = {
        "heads": heads(ablation, shape, advance),
        "blocks": blocks(ablation, shape, advance),
        "channels": channels(ablation, shape, groups, advance),
    }
    return found | ({"experts": experts(ablation, shape, advance)} if shape.moe_layers else {})


def mean_over(parts: Sequence[dict[str, dict[str, Tensor]]]) -> dict[str, dict[str, Any]]:
    """The mean over windows, as plain numbers."""
    return {
        part: {name: _plain(torch.stack([window[part][name] for window in parts]).mean(0)) for name in parts[0][part]}
        for part in parts[0]
    }


def _plain(values: Tensor) -> Any:
    return [_plain(row) for row in values] if values.dim() else float(f"{values.item():.{_DIGITS}g}")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; returns the exit code, 2 for bad input."""
    options = _parser().parse_args(argv)
    begun = time.perf_counter()
    try:
        found, folder = run(options)
    except (ValueError, OSError) as error:
        print(f"profile: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    summary = profile_figures.markdown(found)
    write_text(folder / "profile.json", json.dumps(found, separators=(",", ":")) + "\n")
    write_text(folder / "profile.md", summary)
    written = profile_figures.write(found, folder)
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(summary, markup=False)
    line = {
        "status": "ok",
        "path": str(folder),
        "model": found["model"],
        "contexts": list(found["contexts"]),
        "figures": [file.name for file in written],
        "seconds": round(time.perf_counter() - begun, 1),
    }
    print(json.dumps(line, separators=(",", ":")))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.profile", description=__doc__.partition("\n")[0])
    texts.add_options(parser, dtype="float32")
    parser.add_argument("--contexts", default="512,2048,4096", help="context lengths in tokens (default %(default)s)")
    parser.add_argument("--windows", type=int, default=2, help="windows of text per length (default %(default)s)")
    parser.add_argument("--rows", type=int, default=7, help="tokens of the verification step (default %(default)s)")
    parser.add_argument("--groups", type=int, default=8, help="groups of FFN channels (default %(default)s)")
    parser.add_argument("--block-size", type=int, default=16, choices=BLOCK_SIZES, help="positions per block")
    parser.add_argument("--quick", action="store_true", help="a small one: one window, one context of 512, 4 groups")
    parser.add_argument("--out", type=Path, help="folder to write to (results/profile/<model>)")
    return parser


def run(options: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """Profile as the options say; the content of profile.json, and the folder to write to, which exists.

    Raises:
        ValueError, OSError: bad input, one line.
    """
    if options.quick:
        options.contexts, options.windows, options.groups = "512", 1, 4
    contexts = _contexts(options.contexts, options.block_size)
    for name in ("windows", "rows", "groups"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}={getattr(options, name)}: must be at least 1")
    text, source = texts.read(options.text), texts.find(options)
    if contexts[-1] + options.rows > source.positions:
        raise ValueError(
            f"--contexts={options.contexts}: the model has {source.positions} positions "
            f"(valid: up to {source.positions - options.rows})"
        )
    shape = source.shape
    width = min(shape.ffn, shape.expert_ffn) if shape.moe_layers else shape.ffn
    if options.groups > width:
        raise ValueError(f"--groups={options.groups}: the layers have {width} channels (valid: up to that)")
    folder = options.out or Path("results") / "profile" / source.label
    folder.mkdir(parents=True, exist_ok=True)
    step, found = texts.load(source), dict[str, dict[str, dict[str, Any]]]()
    total = len(contexts) * options.windows * steps_of(shape, options.groups)
    with console.progress("profile", total, 0) as advance:
        for context in contexts:
            windows, remark = texts.cut(source.tokenizer, text, options.windows, context + options.rows)
            if remark is not None:
                console.note(remark)
            cache = step.new_cache(context + options.rows, AttentionBudget(block_size=options.block_size))
            ablations: Iterator[Ablation] = (
                Ablation(step, cache, window, context, options.block_size) for window in windows
            )
            measured = [measure(ablation, shape, options.groups, advance) for ablation in ablations]
            found[str(context)] = mean_over(measured)
    return {
        "version": 1,
        "model": source.label,
        "identity": source.identity,
        "device": roofline.device_text(source.device, torch.get_num_threads()),
        "dtype": str(source.dtype).removeprefix("torch."),
        "text": text.label,
        "text_sha256": text.sha256,
        "windows": options.windows,
        "rows": options.rows,
        "block_size": options.block_size,
        "groups": options.groups,
        "axes": {"by_rank": list(RANKS), "holding": list(HELD)},
        "contexts": found,
    }, folder


def _contexts(text: str, block_size: int) -> list[int]:
    """Context lengths, ascending, each with a block for every decile."""
    try:
        lengths = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise ValueError(f"--contexts={text}: is not a list of whole numbers, such as 512,2048") from error
    if lengths[0] < DECILES * block_size:
        raise ValueError(f"--contexts={text}: must be at least {DECILES * block_size}, {DECILES} blocks")
    return lengths


if __name__ == "__main__":
    sys.exit(main())
