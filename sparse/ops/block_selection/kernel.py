"""Block selection as Triton kernels: scores in parallel over tiles of blocks, then the choice per KV head.

Nothing waits for the device, so a whole step with its selections can be captured in a CUDA graph.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse.budget import AttentionBudget
from sparse.ops.ranking.kernel import MOST_KEYS, largest, ordered_bits

_SUMMARIES = {"mean": ("mean", "mean"), "bound": ("max", "min"), "gaussian": ("mean", "variance")}
_QUERIES = ("first", "mean", "weighted")
_ROWS = 8  # query rows that are summed at a time
_TILE = 32  # blocks of one program: many short programs, for a summary is read once and soon


@triton.jit
def _score(
    queries,
    weights,
    offsets,
    starts,
    first,
    second,
    scores,
    capacity,
    query_token,
    query_head,
    query_dim,
    first_batch,
    first_head,
    first_dim,
    first_block,
    second_batch,
    second_head,
    second_dim,
    second_block,
    DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SCORE: tl.constexpr,
    MAXIMUM: tl.constexpr,
    ROOT: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP_LANES: tl.constexpr,
    DIM_LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Scores [batch, kv_heads, capacity], fp32, of one tile of blocks: a . first + b . second with a and b made from
    the weighted sum of the rows' queries. Both parts are linear in a and b, so the mean over query heads is theirs.

    Whole tiles are loaded, so that loads stay wide; blocks that do not count get scores that are not stored.
    """
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    whole = tl.load(starts + batch) // BLOCK_SIZE
    if tl.program_id(0) * TILE < whole:
        block = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
        row, group, dim = tl.arange(0, ROWS), tl.arange(0, GROUP_LANES), tl.arange(0, DIM_LANES)
        begin, end = tl.load(offsets + batch), tl.load(offsets + batch + 1)
        if ROOT:
            end = tl.minimum(end, begin + 1)
        query_lanes = (head * GROUPS + group)[:, None] * query_head + dim[None, :] * query_dim
        real = (group < GROUPS)[:, None] & (dim < DIM)[None, :]
        query = tl.zeros([GROUP_LANES, DIM_LANES], tl.float32)
        for start in range(begin, end, ROWS):
            token = (start + row).to(tl.int64)
            weight = tl.load(weights + token, mask=token < end, other=0.0)
            tile = tl.load(
                queries + token[:, None, None] * query_token + query_lanes[None, :, :],
                mask=(token < end)[:, None, None] & real[None, :, :],
                other=0.0,
            )
            query += tl.sum(tile.to(tl.float32) * weight[:, None, None], axis=0)

        inside = (dim < DIM)[:, None] & (block < capacity)[None, :]
        lanes = batch * first_batch + head * first_head + dim[:, None] * first_dim + block[None, :] * first_block
        one = tl.load(first + lanes, mask=inside, other=0.0).to(tl.float32)
        a = tl.maximum(query, 0.0) if SCORE == "bound" else query
        b = tl.minimum(query, 0.0) if SCORE == "bound" else query * query * 0.5
        two = one
        if SCORE != "mean":
            lanes = batch * second_batch + head * second_head
            lanes += dim[:, None] * second_dim + block[None, :] * second_block
            two = tl.load(second + lanes, mask=inside, other=0.0).to(tl.float32)
        if MAXIMUM:
            score = tl.full([TILE], float("-inf"), tl.float32)
            for member in range(GROUPS):
                own = (group == member)[:, None]
                of_head = tl.sum(tl.sum(tl.where(own, a, 0.0), axis=0)[:, None] * one, axis=0)
                if SCORE != "mean":
                    of_head += tl.sum(tl.sum(tl.where(own, b, 0.0), axis=0)[:, None] * two, axis=0)
                score = tl.maximum(score, of_head)
        else:
            score = tl.sum((tl.sum(a, axis=0) / GROUPS)[:, None] * one, axis=0)
            if SCORE != "mean":
                score += tl.sum((tl.sum(b, axis=0) / GROUPS)[:, None] * two, axis=0)
        row_of_scores = scores + (batch * tl.num_programs(1) + head) * capacity
        tl.store(row_of_scores + block, score, mask=block < whole)


@triton.jit
def _choose(
    scores,
    offsets,
    starts,
    keep,
    blocks,
    kept,
    capacity,
    most,
    BLOCK_SIZE: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    LANES: tl.constexpr,
):
    """The chosen blocks of one sequence and KV head, ascending, and how many they are; zeros after them."""
    head, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = batch * tl.num_programs(0) + head
    block = tl.arange(0, LANES)
    whole = tl.load(starts + batch) // BLOCK_SIZE
    rows = tl.load(offsets + batch + 1) - tl.load(offsets + batch)
    wanted = tl.minimum(tl.minimum(tl.load(keep + batch), most), whole).to(tl.int32)
    wanted = tl.where(rows > 0, tl.maximum(wanted, 0), 0)
    keys = ordered_bits(tl.load(scores + at * capacity + block, mask=block < whole, other=0.0))
    keys = tl.where((block < SINKS) | (block >= whole - WINDOW), 0xFFFFFFFF, keys)
    keys = tl.where(block < whole, keys, 0)
    chosen, slots = largest(keys, wanted, 0, 16)
    tl.store(blocks + at * most + slots, block, mask=chosen)
    tl.store(blocks + at * most + block, tl.zeros([LANES], tl.int32), mask=(block >= wanted) & (block < most))
    tl.store(kept + at, wanted)


def _check(queries: Tensor, summaries: Mapping[str, Tensor], budget: AttentionBudget, most: int) -> None:
    """Refuses what these kernels do not do."""
    supported = {
        "score": (budget.score, tuple(_SUMMARIES)),
        "query": (budget.query, _QUERIES),
        "heads": (budget.heads, ("per_head",)),
    }
    for name, (value, known) in supported.items():
        if value not in known:
            raise ValueError(f"{name}={value!r}: the block selection kernel supports {known}")
    if budget.low_heads:
        raise ValueError("low_heads: the block selection kernel gives every KV head the same budget")
    missing = [name for name in _SUMMARIES[budget.score] if name not in summaries]
    if missing:
        raise ValueError(f"score={budget.score!r} reads the summaries {missing}, which are missing")
    for name in _SUMMARIES[budget.score]:
        _, kv_heads, head_dim, capacity = summaries[name].shape
        if queries.shape[2] != head_dim or queries.shape[1] % kv_heads:
            raise ValueError(f"queries {tuple(queries.shape)} do not fit {name} {tuple(summaries[name].shape)}")
        if max(capacity, most) > MOST_KEYS:
            raise ValueError(f"{max(capacity, most)} blocks: the block selection kernel ranks up to {MOST_KEYS}")
    if most < 1:
        raise ValueError(f"most={most} is below one block")


def select(
    queries: Tensor,
    summaries: Mapping[str, Tensor],
    budget: AttentionBudget,
    *,
    offsets: Tensor,
    starts: Tensor,
    keep: Tensor,
    most: int,
    weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """The blocks that each KV head of each sequence attends to (METHOD section 2). No gradients, no wait.

    Scores are those of :func:`sparse.scoring.block_scores`, with products and sums in fp32; ties go to the lower block.

    Args:
        queries: [tokens, heads, head_dim], fp32, bf16 or fp16, any strides, rotated and scaled; sequence b owns the
            rows offsets[b] to offsets[b + 1], the root of its draft first.
        summaries: name to [batch, kv_heads, head_dim, capacity], any strides; of sequence b only the first
            starts[b] // block_size blocks count; only the summaries that the score needs are read.
        budget: score (``mean``, ``bound``, ``gaussian``), query (``first``, ``mean``, ``weighted``), GQA, sinks, window
            and block size; heads ``per_head``.
        offsets: [batch + 1], int32. A sequence without rows keeps no block.
        starts: [batch], int32: positions before the step.
        keep: [batch], int32: blocks wanted per KV head, at least sinks + window; sequences with no more whole blocks
            take them all.
        most: upper bound of ``keep``.
        weights: [tokens], fp32: how much each token's query counts; only the roots' are read for ``query="first"``.

    Returns:
        blocks [batch, kv_heads, most], int32, ascending, zeros after the chosen ones; kept [batch, kv_heads], int32:
        how many are chosen.

    Raises:
        ValueError: a switch these kernels do not support, a missing summary, or sizes that do not fit.
    """
    _check(queries, summaries, budget, most)
    first, second = (summaries[name] for name in _SUMMARIES[budget.score])
    batch, kv_heads, head_dim, capacity = first.shape
    groups = queries.shape[1] // kv_heads
    scores = torch.empty(batch, kv_heads, capacity, dtype=torch.float32, device=queries.device)
    blocks = torch.empty(batch, kv_heads, most, dtype=torch.int32, device=queries.device)
    kept = torch.empty(batch, kv_heads, dtype=torch.int32, device=queries.device)
    _score[(triton.cdiv(capacity, _TILE), kv_heads, batch)](
        queries,
        weights,
        offsets,
        starts,
        first,
        second,
        scores,
        capacity,
        *queries.stride(),
        *first.stride(),
        *second.stride(),
        DIM=head_dim,
        GROUPS=groups,
        BLOCK_SIZE=budget.block_size,
        SCORE=budget.score,
        MAXIMUM=budget.gqa == "max",
        ROOT=budget.query == "first",
        ROWS=1 if budget.query == "first" else _ROWS,
        GROUP_LANES=triton.next_power_of_2(groups),
        DIM_LANES=triton.next_power_of_2(head_dim),
        TILE=_TILE,
        num_warps=4,
    )
    lanes = triton.next_power_of_2(max(capacity, most, 32))
    _choose[(kv_heads, batch)](
        scores,
        offsets,
        starts,
        keep,
        blocks,
        kept,
        capacity,
        most,
        BLOCK_SIZE=budget.block_size,
        SINKS=budget.sinks,
        WINDOW=budget.window,
        LANES=lanes,
        num_warps=min(16, max(1, lanes // 256)),
    )
    return blocks, kept
