"""Attention of a verification step: which blocks, and the attention to them (METHOD sections 2 and 5)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from harness.engine.cache import KVCache
from harness.engine.model.probe import AttentionView
from harness.engine.model.verification import Verification
from sparse.budget import AttentionBudget
from sparse.ops.block_attention import eager
from sparse.scoring import block_scores, mass_scores
from sparse.selection import Selection, select_blocks
from sparse.trace import (
    ANCHOR_HIT,
    ANCHOR_MISS,
    DENSE_PATH,
    DRAFT_REUSE,
    LOW_HEADS_PATH,
    ORACLE_PATH,
    SELECT_PATH,
    SPARSE_PATH,
    TORCH,
)
from sparse.tree import Tree


def attend(
    run: Verification,
    layer: int,
    row: int,
    cache: KVCache,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    tree: Tree | None = None,
) -> Tensor:
    """Store the step's keys and values in the cache and attend from its tokens to the cache.

    Args:
        run: budgets, counters and memory.
        layer: its number.
        row: of the cache.
        cache: holds everything before the step.
        queries: [tokens, heads, head_dim], rotated and scaled.
        keys, values: [tokens, kv_heads, head_dim], keys rotated.
        tree: of the tokens; None for a chain.

    Returns:
        [tokens, heads, head_dim].
    """
    trace = run.trace
    (count, heads, head_dim), kv_heads = queries.shape, keys.shape[1]
    groups = heads // kv_heads
    start = cache.lengths[row]
    cache.write(layer, row, start, keys, values)
    stored_keys, stored_values = cache.layer(layer, row)
    grouped = queries.view(count, kv_heads, groups, head_dim).transpose(0, 1)
    grouped = grouped.reshape(kv_heads, count * groups, head_dim)
    length = start + count
    summaries = cache.summaries(layer, row) if start else {}
    view = AttentionView(grouped, stored_keys, stored_values, start, length, groups, summaries, tree)
    trace.lap("attention")
    selection, tail_start = known(run, layer, row, start) or chosen(run, layer, row, view)
    trace.lap("select")
    if run.probe is not None:
        selection = run.probe.selection(layer, replace(view, tail_start=tail_start), selection)
    if selection is None:
        mixed = eager.dense_attention(grouped, stored_keys, stored_values, length, groups, tree)
    else:
        mixed = eager.block_attention(
            grouped,
            stored_keys,
            stored_values,
            selection.blocks,
            tail_start=tail_start,
            length=length,
            block_size=run.sparsity.attention.block_size,
            groups=groups,
            valid=selection.valid,
            tree=tree,
        )
    count_attention(run, layer, TORCH, selection, tail_start, length, count)
    mixed = mixed.view(kv_heads, count, groups, head_dim).transpose(0, 1).reshape(count, heads, head_dim)
    trace.lap("attention")
    return mixed


def scores(budget: AttentionBudget, view: AttentionView) -> Tensor:
    """Block scores of a view by the budget's rule, [kv_heads, whole blocks], fp32."""
    if budget.score == "oracle":
        mass = eager.attention_mass(
            view.queries, view.keys, view.start, view.length, budget.block_size, view.groups, view.tree
        )
        return mass_scores(mass, budget, view.groups, view.tree)
    whole = view.start // budget.block_size
    return block_scores(view.queries, view.summaries, budget, view.groups, view.tree)[:, :whole]


Choice = tuple[Selection | None, int]
"""The blocks to attend to, None for all, and the position from which on everything is visible."""


def known(run: Verification, layer: int, row: int, start: int) -> Choice | None:
    """The choice of a layer that does not retrieve: dense, an anchor's, or its own old one; None where it retrieves.

    Args:
        run: budgets, counters and memory.
        layer: its number.
        row: of the cache.
        start: positions before the step.
    """
    budget, reuse, trace = run.sparsity.attention, run.sparsity.reuse, run.trace
    if not budget.skips(layer, start):
        return None, start // budget.block_size * budget.block_size
    memory = run.memory(row)
    if reuse.skips("retrieval", layer) and (old := memory.old_blocks(layer, reuse.refresh)) is not None:
        trace.skipped("retrieval", old[2])
        return old[0], old[1]
    if not reuse.retrieves(layer):
        if memory.anchor is not None:
            trace.paths[ANCHOR_HIT] += 1
            selection, tail_start = memory.anchor
            return (selection.of_heads(reuse.head_map[layer]) if reuse.head_map else selection), tail_start
        trace.paths[ANCHOR_MISS] += 1
    return None


def chosen(run: Verification, layer: int, row: int, view: AttentionView) -> Choice:
    """The blocks that a retrieving layer chooses from a view."""
    budget, low = run.sparsity.attention, run.sparsity.attention.low(layer)
    if low:
        run.trace.paths[LOW_HEADS_PATH] += 1
    selection = select_blocks(scores(budget, view), budget, budget.blocks(view.start), low)
    return retrieved(run, layer, row, view.start, selection)


def retrieved(run: Verification, layer: int, row: int, start: int, selection: Selection) -> Choice:
    """Count and remember what a retrieving layer chose."""
    budget = run.sparsity.attention
    whole = start // budget.block_size
    run.trace.paths[ORACLE_PATH if budget.score == "oracle" else SELECT_PATH] += 1
    run.trace.scored += whole
    run.memory(row).keep_blocks(layer, selection, whole * budget.block_size)
    return selection, whole * budget.block_size


def count_attention(
    run: Verification, layer: int, how: str, selection: Selection | None, tail_start: int, length: int, rows: int
) -> None:
    """Count what a layer attended to: ``rows`` tokens, over ``length`` positions with their own."""
    trace = run.trace
    if selection is None:
        trace.attention(f"{DENSE_PATH}.{how}", layer, length, length, rows)
        return
    attended = selection.kept * run.sparsity.attention.block_size / selection.blocks.shape[0] + length - tail_start
    trace.attention(f"{SPARSE_PATH}.{how}", layer, length, attended, rows)
    trace.paths[DRAFT_REUSE] += rows - 1
