"""Dense and block attention of a step's rows with torch operators: the CPU path and the fall-back everywhere else.

The cache is paged: keys [pages, kv_heads, head_dim, page], values [pages, kv_heads, page, head_dim]. Any prefix of
pages is one contiguous tensor, which the matrix products of oneDNN need to run without copying the cache first, and
the many small products share the cores evenly. Keys lie transposed inside a page: products of few rows with many
positions run faster so, and a block is a run of ``block_size`` elements that index_select still gathers, so one copy
of the keys serves the dense and the sparse path. All rows of a KV head (draft tokens times query heads) are the rows
of one product: the cache is read once per step and never repeated per query head.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sparse.tree import Tree


@lru_cache(maxsize=64)
def _causal_tail(rows: int, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive causal mask [rows * groups, rows] over the step's own tokens."""
    mask = torch.full((rows, rows), float("-inf"), dtype=dtype, device=device).triu(1)
    return mask.repeat_interleave(groups, dim=0)


def _weights(scores: Tensor, groups: int, tree: Tree | None) -> Tensor:
    """Softmax of scores [kv_heads, rows * groups, positions], masked over the last ``rows`` positions."""
    rows = scores.shape[1] // groups
    if tree is not None:
        scores[:, :, -rows:] += tree.mask(groups, scores.dtype)
    elif rows > 1:
        scores[:, :, -rows:] += _causal_tail(rows, groups, scores.dtype, scores.device)
    return torch.softmax(scores, dim=-1)


def dense_attention(
    queries: Tensor, keys: Tensor, values: Tensor, length: int, groups: int, tree: Tree | None = None
) -> Tensor:
    """Attention of the step's rows to all positions; among the step's own tokens causal, or along the tree.

    Args:
        queries: [kv_heads, rows * groups, head_dim], already scaled; the groups of a row stand together.
        keys: [pages, kv_heads, head_dim, page], contiguous.
        values: [pages, kv_heads, page, head_dim], contiguous.
        length: positions to attend to, the step's own rows last.
        groups: query heads per KV head.
        tree: of the step's tokens; None for a chain.

    Returns:
        [kv_heads, rows * groups, head_dim] in the dtype of ``queries``.
    """
    _, heads, head_dim, page = keys.shape
    rows = queries.shape[1]
    full, rest = divmod(length, page)
    split = full * page
    weights = _weights(_scores(queries, keys, length), groups, tree)
    if not full:
        return torch.bmm(weights, values[full, :, :rest])
    paged = weights[:, :, :split].view(heads, rows, full, page).permute(2, 0, 1, 3).reshape(-1, rows, page)
    partial = torch.bmm(paged, values[:full].view(-1, page, head_dim)).view(full, heads, rows, head_dim)
    output: Tensor = partial.sum(0)
    if rest:
        output += torch.bmm(weights[:, :, split:], values[full, :, :rest])
    return output


def _scores(queries: Tensor, keys: Tensor, length: int) -> Tensor:
    """Products of the rows with the first ``length`` keys, [kv_heads, rows * groups, length]."""
    _, heads, head_dim, page = keys.shape
    rows = queries.shape[1]
    full, rest = divmod(length, page)
    split = full * page
    scores = queries.new_empty(heads, rows, length)
    if full:
        repeated = queries.expand(full, heads, rows, head_dim).reshape(-1, rows, head_dim)
        products = torch.bmm(repeated, keys[:full].view(-1, head_dim, page)).view(full, heads, rows, page)
        scores[:, :, :split].view(heads, rows, full, page).copy_(products.permute(1, 2, 0, 3))
    if rest:
        scores[:, :, split:] = torch.bmm(queries, keys[full, :, :, :rest])
    return scores


def attention_mass(
    queries: Tensor, keys: Tensor, start: int, length: int, block_size: int, groups: int, tree: Tree | None = None
) -> Tensor:
    """Share of each row's dense attention that falls on each whole block before the step (METHOD section 2, oracle).

    Args:
        queries, keys, length, groups, tree: as in :func:`dense_attention`.
        start: positions before the step.
        block_size: positions per block.

    Returns:
        [kv_heads, rows * groups, start // block_size], fp32; what is missing to one lies after the last whole block.
    """
    weights = _weights(_scores(queries, keys, length).float(), groups, tree)
    whole = start // block_size * block_size
    return weights[:, :, :whole].reshape(*weights.shape[:2], -1, block_size).sum(-1)


@lru_cache(maxsize=16)
def _block_offsets(
    pages: int, heads: int, head_dim: int, per_page: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row numbers of blocks in the flat cache: per block and per (head, channel) for keys, the same for values."""
    block = torch.arange(pages * per_page, device=device)
    page, inside = block // per_page, block % per_page
    key_base = page * (heads * head_dim * per_page) + inside
    value_base = page * (heads * per_page) + inside
    key_head = torch.arange(heads * head_dim, device=device).view(heads, head_dim, 1) * per_page
    value_head = torch.arange(heads, device=device)[:, None] * per_page
    return key_base, key_head, value_base, value_head


def gather_blocks(keys: Tensor, values: Tensor, blocks: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The selected blocks side by side; other blocks are not read.

    Args:
        keys, values: paged as in :func:`dense_attention`, page a multiple of ``block_size``.
        blocks: [kv_heads, k], int64.
        block_size: positions per block.

    Returns:
        keys [kv_heads, head_dim, k * block_size] and values [kv_heads, k * block_size, head_dim].
    """
    pages, heads, head_dim, page = keys.shape
    key_base, key_head, value_base, value_head = _block_offsets(pages, heads, head_dim, page // block_size, keys.device)
    key_rows = (key_base[blocks][:, None, :] + key_head).view(-1)
    value_rows = (value_base[blocks] + value_head).view(-1)
    picked_keys = keys.reshape(-1, block_size).index_select(0, key_rows).view(heads, head_dim, -1)
    picked_values = values.view(-1, block_size * head_dim).index_select(0, value_rows).view(heads, -1, head_dim)
    return picked_keys, picked_values


def block_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: Tensor,
    *,
    tail_start: int,
    length: int,
    block_size: int,
    groups: int,
    valid: Tensor | None = None,
    tree: Tree | None = None,
) -> Tensor:
    """Attention to the selected blocks and to everything from ``tail_start`` on (METHOD section 2).

    One selection serves all rows of the step (inter-draft-token reuse), so each selected block is read once.

    Args:
        queries: [kv_heads, rows * groups, head_dim], already scaled; the groups of a row stand together.
        keys, values: paged as in :func:`dense_attention`.
        blocks: selected block indices [kv_heads, k], all below ``tail_start // block_size``.
        tail_start: first position after the whole blocks; from here on everything is visible, causally or by the tree.
        length: positions in the cache, the step's own rows last.
        block_size: positions per block, a divisor of the page.
        groups: query heads per KV head.
        valid: [kv_heads, k], bool: entries of ``blocks`` that count; None for all.
        tree: of the step's tokens; None for a chain.

    Returns:
        [kv_heads, rows * groups, head_dim] in the dtype of ``queries``.
    """
    page = keys.shape[-1]
    picked_keys, picked_values = gather_blocks(keys, values, blocks, block_size)
    key_parts, value_parts = [picked_keys], [picked_values]
    for number in range(tail_start // page, (length - 1) // page + 1):
        inside = slice(max(tail_start - number * page, 0), min(length - number * page, page))
        key_parts.append(keys[number, :, :, inside])
        value_parts.append(values[number, :, inside])
    scores = torch.bmm(queries, torch.cat(key_parts, dim=2))
    if valid is not None:
        hidden = ~valid.repeat_interleave(block_size, dim=1)
        scores[:, :, : hidden.shape[1]].masked_fill_(hidden[:, None], float("-inf"))
    weights = _weights(scores, groups, tree)
    return torch.bmm(weights, torch.cat(value_parts, dim=1))
