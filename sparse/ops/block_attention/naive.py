"""The truth for block attention: full scores, a mask, one softmax in fp64. Slow and obvious on purpose."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse.tree import Tree


def visible_positions(
    blocks: Tensor | None,
    tail_start: int,
    length: int,
    block_size: int,
    rows: int,
    valid: Tensor | None = None,
    tree: Tree | None = None,
) -> Tensor:
    """Which positions each row of a step may see.

    Args:
        blocks: selected block indices [kv_heads, k], or None for all whole blocks.
        tail_start: first position after the whole blocks; from here on everything is visible, causally.
        length: positions in the cache, the step's own ``rows`` included at the end.
        block_size: positions per block.
        rows: tokens of the step.
        valid: [kv_heads, k], bool: entries of ``blocks`` that count; None for all.
        tree: of the step's tokens: each sees its ancestors and itself; None for a chain.

    Returns:
        Boolean mask [kv_heads or 1, rows, length].
    """
    heads = 1 if blocks is None else blocks.shape[0]
    visible = torch.full((heads, length), blocks is None)
    if blocks is not None:
        for head in range(heads):
            for block in (blocks[head] if valid is None else blocks[head][valid[head]]).tolist():
                visible[head, block * block_size : (block + 1) * block_size] = True
    visible[:, tail_start:] = True
    causal = torch.arange(length)[None, :] <= torch.arange(length - rows, length)[:, None]
    if tree is not None:
        causal[:, length - rows :] = tree.visible
    return visible[:, None, :] & causal[None]


def block_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: Tensor | None,
    *,
    tail_start: int,
    block_size: int,
    groups: int,
    valid: Tensor | None = None,
    tree: Tree | None = None,
) -> Tensor:
    """Attention over the visible positions only (METHOD section 2).

    Args:
        queries: [kv_heads, rows * groups, head_dim], already scaled; the groups of a row stand together.
        keys, values: [kv_heads, length, head_dim], the step's own rows last.
        blocks, tail_start, block_size, valid, tree: as in :func:`visible_positions`.
        groups: query heads per KV head.

    Returns:
        [kv_heads, rows * groups, head_dim] in fp64.
    """
    rows = queries.shape[1] // groups
    visible = visible_positions(blocks, tail_start, keys.shape[1], block_size, rows, valid, tree)
    visible = visible.repeat_interleave(groups, dim=1)
    scores = queries.double() @ keys.double().transpose(1, 2)
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ values.double()
