"""What must hold before a benchmark prints a time: operators against references, engines and drafts against each other.

Every comparison is by the norm of the difference over the norm of the truth; a NaN never passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harness.engine.cache import KVCache
from harness.engine.model.step import Segment
from harness.engine.model.verification import Verification
from sparse.budget import FfnBudget, Sparsity
from sparse.ops.block_attention import eager, naive
from sparse.ops.sparse_ffn import eager as ffn_op
from sparse.scoring import block_scores
from sparse.selection import select_blocks

if TYPE_CHECKING:
    from scripts.bench.drafts import DraftShape
    from scripts.bench.setting import Setting

OPERATOR_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of one operator on random queries."""
_STEP_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Of the logits of the median token: rounding grows over the layers."""
_CHANNEL_TOLERANCE = 0.1
"""The same where 16-bit magnitudes choose channels: many are equal at the edge of a budget, and rounding chooses a
twentieth of the channels or less, which moves a layer's output by up to 0.11 of its norm."""
_CHANGED, _MOST_TOKENS = 0.2, 0.8
"""What so many of the tokens must stay below, though their blocks or channels may have changed places."""
_ALONE = 5
"""Layers that are compared alone, spread evenly, where choices let whole steps part."""
_TIE = 0.25
"""Gap of two bf16 logits below which another rounding may pick the other token."""


class Red(RuntimeError):
    """Why the times must not be believed, one line each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def error(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; NaN where either has one."""
    truth = truth.double().cpu()
    return float((found.double().cpu() - truth).norm() / truth.norm())


def check_cell(setting: Setting, context: int, batch: int, caches: dict[str, KVCache]) -> None:
    """Operators, drafts and engines of one context and batch size.

    Raises:
        Red: something is off.
    """
    reference = caches[next(iter(setting.steps))]
    problems = [*_operators(setting, reference), *_ffn(setting), *_drafts(setting, context, reference)]
    problems += _engines(setting, context, batch, caches)
    if problems:
        raise Red(problems)


def check_library(setting: Setting, engine: str, cache: KVCache, context: int, tokens: int = 8) -> None:
    """Greedy choices of a dense step against the library's on the same text; ties within rounding may differ.

    Raises:
        Red: a token lies below the library's best by more than rounding.
    """
    ids = setting.tokens[: context + tokens]
    segment = Segment(0, ids[context:])
    ours = setting.run(engine, cache, [segment], Verification()).argmax(-1)
    with torch.inference_mode():
        inputs = torch.tensor([ids], device=setting.weights.device)
        logits = setting.library(inputs, logits_to_keep=tokens).logits[0].float()
    gaps = (logits.amax(-1) - logits.gather(1, ours[:, None])[:, 0]).tolist()
    found = [f"token {number} is {gap:.2f} below the library's best" for number, gap in enumerate(gaps) if gap > _TIE]
    if found:
        raise Red(found)


def check_output(library: Any, prompt: Sequence[int], output: Sequence[int], name: str) -> list[str]:
    """Whether each token of a greedy ``output`` is the library's choice after the tokens before it, up to rounding.

    After a tie that rounding decides the texts differ, so tokens are compared on the arm's own text.
    """
    with torch.inference_mode():
        inputs = torch.tensor([[*prompt, *output]], device=library.device)
        logits = library(inputs, logits_to_keep=len(output) + 1).logits[0, :-1].float()
    own = torch.tensor(output, device=library.device)
    gaps = (logits.amax(-1) - logits.gather(1, own[:, None])[:, 0]).tolist()
    return [f"{name}: token {n} is {gap:.2f} below the library's best" for n, gap in enumerate(gaps) if gap > _TIE]


def _operators(setting: Setting, cache: KVCache) -> list[str]:
    """Block and dense attention of the first layer against the naive reference, random queries."""
    shape, budget = setting.weights.shape, setting.budget
    groups, length = shape.heads // shape.kv_heads, cache.lengths[0]
    rows = min(7, length % budget.block_size or budget.block_size)
    whole = (length - rows) // budget.block_size
    tail, size = whole * budget.block_size, budget.block_size
    keys, values = cache.layer(0)
    queries = torch.randn(shape.kv_heads, rows * groups, shape.head_dim, device=keys.device).to(keys.dtype)
    queries *= shape.head_dim**-0.5
    scores = block_scores(queries, cache.summaries(0), budget, groups)[:, :whole]
    blocks = select_blocks(scores, budget, budget.topk or 1).blocks
    plain_keys, plain_values = (part.cpu() for part in cache.prefix(0, 0, length))
    fast = {
        "block": eager.block_attention(
            queries, keys, values, blocks, tail_start=tail, length=length, block_size=size, groups=groups
        ),
        "dense": eager.dense_attention(queries, keys, values, length, groups),
    }
    found = []
    for name, output in fast.items():
        chosen = blocks.cpu() if name == "block" else None
        truth = naive.block_attention(
            queries.cpu(), plain_keys, plain_values, chosen, tail_start=tail, block_size=size, groups=groups
        )
        found += _off(f"{name} attention", error(output, truth), OPERATOR_TOLERANCE[keys.dtype])
    return found


def _ffn(setting: Setting) -> list[str]:
    """Chosen channels of the first FFN that is kept by channel, against the naive reference."""
    layer = setting.weights.layers[0]
    weights = layer.ffn if layer.moe is None else layer.moe.experts[0]
    if weights is None or weights.channels is None:
        return []
    hidden, channels = setting.weights.shape.hidden, weights.channels
    rows = torch.randn(7, hidden, device=channels.device).to(channels.dtype)
    activations = ffn_op.activations(rows, weights)
    chosen = ffn_op.select_channels(activations, FfnBudget(rule="topk", keep=0.5), 0)
    up, down = channels[chosen, :hidden].double(), channels[chosen, hidden:].double()
    truth = (activations[:, chosen].double() * (rows.double() @ up.T)) @ down
    output = ffn_op.sparse_ffn(rows, activations, weights, chosen)
    return _off("sparse FFN", error(output, truth), OPERATOR_TOLERANCE[channels.dtype])


def _drafts(setting: Setting, context: int, cache: KVCache) -> list[str]:
    """Dense steps of several tokens against one after the other, by the last token; a tree by its longest path."""
    found, tolerance = [], _STEP_TOLERANCE[setting.weights.dtype]
    for shape in setting.shapes:
        if shape.rows == 1:
            continue
        segment, path = setting.segments(context, 1, shape)[0], shape.path()
        together = setting.run(next(iter(setting.steps)), cache, [segment], Verification())[path[-1]]
        step = setting.steps[next(iter(setting.steps))]
        alone = torch.empty(0)
        for token in path:
            alone = step.run([Segment(0, [segment.tokens[token]])], cache).logits[0]
        cache.truncate(0, context)
        found += _off(f"dense {shape.name}: the last token", error(together, alone), tolerance)
    return found


def _engines(setting: Setting, context: int, batch: int, caches: dict[str, KVCache]) -> list[str]:
    """Every timed arm of every engine against the reference: by its tokens, as :func:`_parted` says."""
    first, *others = setting.steps
    found: list[str] = []
    for shape, (axis, sparsity), name in product(setting.shapes, setting.axes.items(), others):
        segments, distances = setting.segments(context, batch, shape), []
        for left_out in _left_out(setting, sparsity):
            truth, own = (
                setting.run(engine, caches[engine], segments, Verification(sparsity, left_out=left_out)).double()
                for engine in (first, name)
            )
            distances.append((own - truth).norm(dim=-1) / truth.norm(dim=-1))
        allowed = _STEP_TOLERANCE[setting.weights.dtype]
        if setting.weights.dtype is not torch.float32 and not sparsity.ffn.is_dense:
            allowed = _CHANNEL_TOLERANCE
        found += _parted(f"{axis} {shape.name} {name}", torch.cat(distances), allowed)
    return found


def _left_out(setting: Setting, sparsity: Sparsity) -> list[frozenset[int]]:
    """Layers to leave out in each comparison: none; where something is chosen in 16 bits, all but one.

    There a rounding moves a block, channel or expert over the edge of its budget, and over many layers the outputs of
    two right implementations part; in fp32 they do not.
    """
    layers = setting.weights.shape.layers
    if setting.weights.dtype is torch.float32 or (sparsity == Sparsity() and not setting.weights.shape.experts):
        return [frozenset()]
    alone = sorted({layer * (layers - 1) // (_ALONE - 1) for layer in range(_ALONE)})
    return [frozenset(range(layers)) - {layer} for layer in alone]


def _parted(what: str, distances: Tensor, allowed: float) -> list[str]:
    """Whether the median token is off by more than rounding, or many by more than a changed choice explains."""
    middle, most = float(distances.median()), float(distances.sort().values[int(_MOST_TOKENS * len(distances))])
    if middle < allowed and most < _CHANGED and bool(distances.isfinite().all()):
        return []
    return [f"{what}: the median token is off the reference by {middle:.1e} of its norm, a fifth by {most:.1e} or more"]


def _off(what: str, difference: float, tolerance: float) -> list[str]:
    return [] if difference < tolerance else [f"{what} off the reference by {difference:.1e} of its norm"]


def shapes_text(shapes: tuple[DraftShape, ...]) -> str:
    """Draft shapes as the card shows them."""
    return ", ".join(f"{shape.name} ({shape.kind})" for shape in shapes)
