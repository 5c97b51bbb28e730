"""Scores of KV blocks for a step's queries, from block summaries (METHOD section 2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparse.budget import AttentionBudget
from sparse.tree import Tree, survival_weights

SUMMARIES = ("mean", "min", "max", "variance")


def summarise_blocks(keys: Tensor, block_size: int, name: str) -> Tensor:
    """Summary of each block of keys.

    Args:
        keys: [..., head_dim, positions], positions a multiple of ``block_size``.
        block_size: positions per block.
        name: ``mean``, ``min``, ``max`` or ``variance`` (over the block's positions, not corrected for their number).

    Returns:
        [..., head_dim, blocks] in the dtype of ``keys``; mean and variance are accumulated in fp32.

    Raises:
        ValueError: an unknown summary.
    """
    blocks = keys.reshape(*keys.shape[:-1], -1, block_size)
    if name == "mean":
        return blocks.mean(-1, dtype=torch.float32).to(keys.dtype)
    if name == "variance":
        return blocks.float().var(-1, correction=0).to(keys.dtype)
    if name == "min":
        return blocks.amin(-1)
    if name == "max":
        return blocks.amax(-1)
    raise ValueError(f"summary {name!r} is not one of {SUMMARIES}")


def block_scores(
    queries: Tensor, summaries: Mapping[str, Tensor], budget: AttentionBudget, groups: int, tree: Tree | None = None
) -> Tensor:
    """One score per KV head and block (METHOD section 2: score, query and GQA reduction).

    Args:
        queries: [kv_heads, rows * groups, head_dim]; the ``groups`` query heads of a row stand together.
        summaries: the summaries that ``budget.summaries`` names, each [kv_heads, head_dim, blocks].
        budget: score (``mean``, ``bound`` or ``gaussian``), query and GQA switches.
        groups: query heads per KV head.
        tree: of the step's tokens, for weighted queries; None for a chain.

    Returns:
        [kv_heads, blocks], fp32. Only their order within a KV head has a meaning.
    """
    heads, _, head_dim = queries.shape
    if budget.query == "first":
        queries = queries[:, :groups]
    elif budget.query in ("mean", "weighted"):
        queries = _over_rows(queries.view(heads, -1, groups, head_dim), budget, tree)
    if budget.score == "mean":
        if budget.gqa == "mean" and budget.query != "max":
            return torch.bmm(queries.mean(1, keepdim=True), summaries["mean"]).squeeze(1).float()
        scores = torch.bmm(queries, summaries["mean"])
    elif budget.score == "gaussian":
        scores = torch.bmm(queries, summaries["mean"]) + torch.bmm(queries.square(), summaries["variance"]) / 2
    else:
        scores = torch.bmm(queries.clamp(min=0), summaries["max"]) + torch.bmm(queries.clamp(max=0), summaries["min"])
    scores = scores.float()
    if budget.query == "max":
        scores = scores.view(heads, -1, groups, scores.shape[-1]).amax(1)
    return scores.mean(1) if budget.gqa == "mean" else scores.amax(1)


def mass_scores(mass: Tensor, budget: AttentionBudget, groups: int, tree: Tree | None = None) -> Tensor:
    """Block scores from attention mass, the oracle (METHOD section 2).

    Args:
        mass: [kv_heads, rows * groups, blocks], share of each row's attention, from ``attention_mass``.
        budget: query and GQA switches.
        groups: query heads per KV head.
        tree: as in :func:`block_scores`.

    Returns:
        [kv_heads, blocks], fp32.
    """
    heads, _, blocks = mass.shape
    rows = mass.float().view(heads, -1, groups, blocks)
    if budget.query == "first":
        scores = rows[:, 0]
    else:
        scores = rows.amax(1) if budget.query == "max" else _over_rows(rows, budget, tree)
    return scores.mean(1) if budget.gqa == "mean" else scores.amax(1)


def _over_rows(values: Tensor, budget: AttentionBudget, tree: Tree | None) -> Tensor:
    """Mean of [heads, rows, ...] over the rows, a row at depth n counting survival ** n for ``weighted`` queries."""
    if budget.query == "mean":
        return values.mean(1)
    weights = survival_weights(values.shape[1], budget.survival, values.device, tree)
    return torch.einsum("r,hr...->h...", weights.to(values.dtype), values)
