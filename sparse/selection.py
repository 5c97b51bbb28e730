"""From block scores to the blocks a step attends to (METHOD section 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse.budget import AttentionBudget


@dataclass(frozen=True, slots=True)
class Selection:
    """The blocks that each KV head of a layer attends to.

    Attributes:
        blocks: [kv_heads, k], int64, in no particular order, the valid ones at most once per head.
        valid: [kv_heads, k], bool, or None where all are; the others stand for nothing and point at a block that is
            read anyway. The valid ones of a head stand first.
        kept: valid blocks over all KV heads.
    """

    blocks: Tensor
    valid: Tensor | None
    kept: int

    def of_heads(self, heads: tuple[int, ...]) -> Selection:
        """The selection in which KV head i takes the blocks of head ``heads[i]``."""
        if heads == tuple(range(self.blocks.shape[0])):
            return self
        valid = None if self.valid is None else self.valid[list(heads)]
        blocks = self.blocks[list(heads)]
        return Selection(blocks, valid, blocks.numel() if valid is None else int(valid.sum()))

    def mask(self, blocks: int) -> Tensor:
        """[kv_heads, blocks], bool: which blocks each KV head attends to."""
        chosen = torch.zeros(self.blocks.shape[0], blocks, dtype=torch.bool, device=self.blocks.device)
        if self.valid is None:
            return chosen.scatter_(1, self.blocks, True)
        for head, (picked, valid) in enumerate(zip(self.blocks, self.valid, strict=True)):
            chosen[head, picked[valid]] = True
        return chosen


def select_blocks(scores: Tensor, budget: AttentionBudget, keep: int, low: tuple[int, ...] = ()) -> Selection:
    """The best ``keep`` blocks per KV head, sink and window blocks always among them.

    Args:
        scores: [kv_heads, blocks], fp32, overwritten at the forced blocks.
        budget: sinks, window, and whether the heads share their budgets.
        keep: blocks per KV head, below the number of blocks.
        low: KV heads that keep the forced blocks only (one block where nothing is forced).

    Returns:
        ``keep`` blocks per head; with pooled budgets kv_heads * keep blocks over all heads, ranked by each head's
        softmax over its blocks.

    Raises:
        ValueError: ``keep`` is below the forced blocks or not below the number of blocks.
    """
    heads, blocks = scores.shape
    if not max(1, budget.fixed) <= keep < blocks:
        raise ValueError(f"nothing to select: {keep} of {blocks} blocks, {budget.fixed} of them forced")
    pooled = budget.heads == "pooled"
    if pooled:
        scores = torch.softmax(scores, dim=-1)
    if budget.sinks:
        scores[:, : budget.sinks] = float("inf")
    if budget.window:
        scores[:, blocks - budget.window :] = float("inf")
    if pooled:
        return _pooled(scores, keep, low, max(1, budget.fixed))
    chosen = scores.topk(keep, dim=-1, sorted=bool(low))
    if not low:
        return Selection(chosen.indices, None, heads * keep)
    counts = torch.full((heads,), keep, device=scores.device)
    counts[list(low)] = max(1, budget.fixed)
    valid = torch.arange(keep, device=scores.device)[None] < counts[:, None]
    kept = (heads - len(low)) * keep + len(low) * max(1, budget.fixed)
    return Selection(chosen.indices.where(valid, chosen.indices[:, :1]), valid, kept)


def _pooled(scores: Tensor, keep: int, low: tuple[int, ...], least: int) -> Selection:
    """The best blocks over all heads of the layer, at least ``least`` of each head."""
    heads, blocks = scores.shape
    first = scores.topk(least, dim=-1).indices
    scores = scores.scatter(1, first, float("inf"))
    total = (heads - len(low)) * keep + len(low) * least
    if low:
        others = torch.ones_like(scores, dtype=torch.bool).scatter_(1, first, False)
        lowered = torch.zeros(heads, 1, dtype=torch.bool, device=scores.device)
        lowered[list(low)] = True
        scores = scores.masked_fill(others & lowered, float("-inf"))
    flat = scores.view(-1).topk(min(total, heads * blocks)).indices
    chosen = torch.zeros(heads * blocks, dtype=torch.bool, device=scores.device).scatter_(0, flat, True)
    chosen = chosen.view(heads, blocks)
    counts = chosen.sum(1)
    order = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
    valid = torch.arange(order.shape[1], device=scores.device)[None] < counts[:, None]
    return Selection(order.where(valid, order[:, :1]), valid, total)
