"""The truth for block selection: one sequence, KV head and query head at a time, in fp64. Slow on purpose."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparse.budget import AttentionBudget


def scores(queries: Tensor, summaries: Mapping[str, Tensor], budget: AttentionBudget, weights: Tensor) -> Tensor:
    """Score of each block of one sequence and KV head (METHOD section 2).

    Args:
        queries: [rows, groups, head_dim], of the query heads that share the KV head.
        summaries: the summaries that the score reads, each [head_dim, blocks].
        budget: score (``mean``, ``bound`` or ``gaussian``) and GQA switches.
        weights: [rows]: how much each row's query counts.

    Returns:
        [blocks] in fp64.
    """
    of_heads = []
    for query in (queries.double() * weights.double()[:, None, None]).sum(0):
        blocks = {name: summary.double() for name, summary in summaries.items()}
        if budget.score == "bound":
            of_heads.append(torch.maximum(query[:, None] * blocks["min"], query[:, None] * blocks["max"]).sum(0))
        elif budget.score == "gaussian":
            of_heads.append(query @ blocks["mean"] + query.square() @ blocks["variance"] / 2)
        else:
            of_heads.append(query @ blocks["mean"])
    stacked = torch.stack(of_heads)
    return stacked.mean(0) if budget.gqa == "mean" else stacked.amax(0)


def select(
    queries: Tensor,
    summaries: Mapping[str, Tensor],
    budget: AttentionBudget,
    *,
    offsets: Tensor,
    starts: Tensor,
    keep: Tensor,
    weights: Tensor,
) -> list[list[list[int]]]:
    """The chosen blocks in ascending order, by sequence and KV head (METHOD section 2).

    Args:
        queries: [tokens, heads, head_dim]; sequence b owns the rows offsets[b] to offsets[b + 1].
        summaries: each [batch, kv_heads, head_dim, capacity]; of sequence b the first starts[b] // block_size count.
        budget: score, GQA, sinks, window and block size.
        offsets: [batch + 1]; a sequence without rows keeps no block.
        starts: [batch]: positions before the step.
        keep: [batch]: blocks wanted per KV head; all of them where there are not more.
        weights: [tokens]: how much each token's query counts.
    """
    batch, kv_heads, head_dim = next(iter(summaries.values())).shape[:3]
    groups = queries.shape[1] // kv_heads
    chosen: list[list[list[int]]] = []
    for sequence in range(batch):
        rows = slice(int(offsets[sequence]), int(offsets[sequence + 1]))
        whole = int(starts[sequence]) // budget.block_size
        wanted = min(int(keep[sequence]), whole) if rows.stop > rows.start else 0
        of_heads = queries[rows].view(rows.stop - rows.start, kv_heads, groups, head_dim)
        chosen.append([])
        for head in range(kv_heads):
            blocks = {name: summary[sequence, head, :, :whole] for name, summary in summaries.items()}
            ranked = scores(of_heads[:, head], blocks, budget, weights[rows])
            ranked[: budget.sinks] = float("inf")
            ranked[max(0, whole - budget.window) :] = float("inf")
            order = ranked.argsort(descending=True, stable=True)
            chosen[-1].append(sorted(order[:wanted].tolist()))
    return chosen
