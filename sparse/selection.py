"""From block scores to the blocks a step attends to (METHOD section 2)."""

from __future__ import annotations

from torch import Tensor

from sparse.budget import AttentionBudget


def select_blocks(scores: Tensor, budget: AttentionBudget) -> Tensor:
    """The ``topk`` best blocks per KV head, sink and window blocks always among them.

    Args:
        scores: [kv_heads, blocks], overwritten at the forced blocks.
        budget: with ``budget.topk`` < blocks.

    Returns:
        Block indices [kv_heads, topk], int64, in no particular order, each at most once per head.

    Raises:
        ValueError: the budget is dense or not below the number of blocks, so there is nothing to select.
    """
    blocks = scores.shape[-1]
    if budget.topk is None or budget.topk >= blocks:
        raise ValueError(f"nothing to select: topk={budget.topk} of {blocks} blocks")
    if budget.sinks:
        scores[:, : budget.sinks] = float("inf")
    if budget.window:
        scores[:, blocks - budget.window :] = float("inf")
    return scores.topk(budget.topk, dim=-1, sorted=False).indices
