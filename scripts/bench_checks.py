"""What must hold before a benchmark prints a time: operators against references, tokens against the library's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from harness.engine.decoding import Decoder, StopRule
from harness.engine.drafting.base import NoDrafter
from sparse.budget import FfnBudget, Sparsity
from sparse.ops.block_attention import eager, naive
from sparse.ops.sparse_ffn import eager as ffn_op
from sparse.scoring import block_scores
from sparse.selection import select_blocks

if TYPE_CHECKING:
    from scripts.bench import Bench

_OPERATOR_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
_TIE = 0.25
"""Gap of two bf16 logits below which another rounding may pick the other token."""


def check(bench: Bench) -> list[str]:
    """Why the times must not be believed; empty when they may be."""
    problems = [*_check_operator(bench), *_check_ffn(bench)]
    return problems + (_check_tokens(bench) if bench.library is not None else [])


def _check_operator(bench: Bench) -> list[str]:
    """Block and dense attention of one layer against the naive reference, random queries."""
    shape, cache, budget = bench.step.weights.shape, bench.cache, bench.budget
    groups, length, whole = shape.heads // shape.kv_heads, cache.lengths[0], cache.whole_blocks()
    keys, values = cache.layer(0)
    rows = min(bench.draft + 1, length - whole * budget.block_size) or 1
    queries = torch.randn(shape.kv_heads, rows * groups, shape.head_dim, device=keys.device).to(keys.dtype)
    queries *= shape.head_dim**-0.5
    whole = (length - rows) // budget.block_size
    scores = block_scores(queries, cache.summaries(0), budget, groups)[:, :whole]
    blocks = select_blocks(scores, budget, budget.topk or 1).blocks
    tail, size = whole * budget.block_size, budget.block_size
    fast = eager.block_attention(
        queries, keys, values, blocks, tail_start=tail, length=length, block_size=size, groups=groups
    )
    dense = eager.dense_attention(queries, keys, values, length, groups)
    plain_keys, plain_values = (part.cpu() for part in cache.prefix(0, 0, length))
    found = []
    for name, output, chosen in (("block", fast, blocks.cpu()), ("dense", dense, None)):
        truth = naive.block_attention(
            queries.cpu(), plain_keys, plain_values, chosen, tail_start=tail, block_size=size, groups=groups
        )
        error = ((output.cpu().double() - truth).norm() / truth.norm()).item()
        if not error < _OPERATOR_TOLERANCE[keys.dtype]:
            found.append(f"{name} attention is off its reference by {error:.1e} of its norm")
    return found


def _check_ffn(bench: Bench) -> list[str]:
    """Chosen channels of the first FFN that is kept by channel, against the naive reference."""
    layer = bench.step.weights.layers[0]
    weights = layer.ffn if layer.moe is None else layer.moe.experts[0]
    if weights is None or weights.channels is None:
        return []
    hidden, width = bench.step.weights.shape.hidden, weights.width
    rows = torch.randn(bench.draft + 1, hidden, device=weights.channels.device).to(weights.channels.dtype)
    activations = ffn_op.activations(rows, weights)
    chosen = ffn_op.select_channels(activations, FfnBudget(rule="topk", keep=0.5), 0)
    up, down = weights.channels[chosen, :hidden].cpu().double(), weights.channels[chosen, hidden:].cpu().double()
    truth = (activations[:, chosen].cpu().double() * (rows.cpu().double() @ up.T)) @ down
    found = ffn_op.sparse_ffn(rows, activations, weights, chosen).cpu().double()
    error = ((found - truth).norm() / truth.norm()).item()
    bad = not error < _OPERATOR_TOLERANCE[weights.channels.dtype] or chosen.numel() != round(width / 2)
    return [f"sparse FFN is off its reference by {error:.1e} of its norm"] if bad else []


def _check_tokens(bench: Bench, tokens: int = 4) -> list[str]:
    """Our greedy tokens against the library's on the same prompt; ties within rounding may differ."""
    device = bench.step.weights.device
    ours = _decode(bench, tokens)
    ids = torch.tensor([bench.prompt + ours[:-1]], device=device)
    with torch.inference_mode():
        logits = bench.library(ids, logits_to_keep=tokens).logits[0].float()
    gaps = [(row.max() - row[token]).item() for row, token in zip(logits, ours, strict=True)]
    return [f"token {number} is {gap:.2f} below the library's best" for number, gap in enumerate(gaps) if gap > _TIE]


def _decode(bench: Bench, tokens: int) -> list[int]:
    decoder = Decoder(bench.step, bench.cache, stop=StopRule(), clock=bench.clock, prefill_chunk=1024)
    prefix = decoder.prefill(bench.prompt)
    return decoder.decode(prefix, NoDrafter(), Sparsity(), tokens).output
