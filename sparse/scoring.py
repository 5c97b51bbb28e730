"""Scores of KV blocks for a step's queries, from block summaries (METHOD section 2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparse.budget import AttentionBudget

SUMMARIES = ("mean", "min", "max")


def summarise_blocks(keys: Tensor, block_size: int, name: str) -> Tensor:
    """Summary of each block of keys.

    Args:
        keys: [..., head_dim, positions], positions a multiple of ``block_size``.
        block_size: positions per block.
        name: ``mean``, ``min`` or ``max``.

    Returns:
        [..., head_dim, blocks] in the dtype of ``keys``; the mean is accumulated in fp32.

    Raises:
        ValueError: an unknown summary.
    """
    blocks = keys.reshape(*keys.shape[:-1], -1, block_size)
    if name == "mean":
        return blocks.mean(-1, dtype=torch.float32).to(keys.dtype)
    if name == "min":
        return blocks.amin(-1)
    if name == "max":
        return blocks.amax(-1)
    raise ValueError(f"summary {name!r} is not one of {SUMMARIES}")


def block_scores(queries: Tensor, summaries: Mapping[str, Tensor], budget: AttentionBudget, groups: int) -> Tensor:
    """One score per KV head and block (METHOD section 2: score, query and GQA reduction).

    Args:
        queries: [kv_heads, rows * groups, head_dim]; the ``groups`` query heads of a row stand together.
        summaries: the summaries that ``budget.summaries`` names, each [kv_heads, head_dim, blocks].
        budget: score, query and GQA switches.
        groups: query heads per KV head.

    Returns:
        [kv_heads, blocks], fp32. Only their order within a KV head has a meaning.
    """
    heads, _, head_dim = queries.shape
    if budget.query == "first":
        queries = queries[:, :groups]
    elif budget.query == "mean":
        queries = queries.view(heads, -1, groups, head_dim).mean(1)
    if budget.score == "mean":
        if budget.gqa == "mean" and budget.query != "max":
            return torch.bmm(queries.mean(1, keepdim=True), summaries["mean"]).squeeze(1).float()
        scores = torch.bmm(queries, summaries["mean"])
    else:
        scores = torch.bmm(queries.clamp(min=0), summaries["max"]) + torch.bmm(queries.clamp(max=0), summaries["min"])
    scores = scores.float()
    if budget.query == "max":
        scores = scores.view(heads, -1, groups, scores.shape[-1]).amax(1)
    return scores.mean(1) if budget.gqa == "mean" else scores.amax(1)
