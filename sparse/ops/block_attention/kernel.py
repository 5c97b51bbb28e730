"""Triton kernel: attention of a step's rows to chosen KV blocks or to all positions, split over KV (METHOD section 2).

A program serves one KV head of one sequence, up to 128 query rows and one share of the positions. The rows are draft
tokens times the query heads of the KV head, packed side by side, so a selected block is read once for all of them.
Above 128 rows there are several tiles and the cache is read once per tile, by programs that run next to each other.
What a sequence sees is one list of positions: its selected blocks one after the other, then the tail (the unfinished
block and the step's own rows). Each split takes an equal share of the list and leaves a softmax of its own with its
log-sum-exp; a second kernel merges the shares, as Flash-Decoding does. A single split writes the result directly.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse.ops.tuning import tuned

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (16, 32, 64, 128, 256)
BLOCK_SIZES = (16, 32, 64, 128)
MAX_TILE = 128
"""Rows of a tile: above it the fp32 sums of head size 128 no longer fit the registers of a multiprocessor."""
MIN_STEP = 64
"""Positions that one step of the online softmax covers at least, gathered from several blocks."""
MAX_SPLITS = 64
SPLIT_POSITIONS = 256
"""Positions below which a share is not worth its own merge."""
PROGRAMS_PER_MULTIPROCESSOR = 2
MULTIPROCESSORS = 132
CONFIGS = [
    triton.Config({}, num_warps=warps, num_stages=stages)
    for warps, stages in ((4, 2), (4, 3), (4, 4), (8, 2), (8, 3), (2, 3))
]


def _fitting(configs, arguments, **meta):
    """Configurations whose warps hold the tile's sums in registers: large tiles spill with two warps."""
    values = {**arguments, **meta}
    size = values["TILE"] * values["HEAD_DIM"]
    return [config for config in configs if config.num_warps * 4096 >= size or config.num_warps == 8]


@triton.jit
def _attend(query, keys, values, live, seen, best, total, sums):
    """One step of the online softmax over a run of positions.

    keys [head_dim, positions] and values [positions, head_dim] are pointers, read where ``live`` [positions]; a row
    sees what ``seen`` [rows or 1, positions] says. The maximum, the total and the sums are fp32, the maximum in log2.
    """
    key = tl.load(keys, mask=live[None, :], other=0.0)
    scores = tl.dot(query, key, input_precision="ieee") * 1.4426950408889634
    scores = tl.where(seen, scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, 1))
    anchor = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.exp2(scores - anchor[:, None])
    decay = tl.exp2(best - anchor)
    value = tl.load(values, mask=live[:, None], other=0.0)
    sums = tl.dot(weights.to(value.dtype), value, sums * decay[:, None], input_precision="ieee")
    return new_best, total * decay + tl.sum(weights, 1), sums


@tuned(CONFIGS, key=["TILE", "HEAD_DIM", "BLOCK", "SPARSE"], prune=_fitting)
@triton.jit(do_not_specialize=["tokens", "tiles", "most_blocks", "share"])
def _attend_splits(
    queries, keys, values, output, sums_out, logs_out, offsets, starts, blocks, kept, tails, visible,
    query_token, query_head, query_dim, key_batch, key_page, key_head, key_dim, key_inside,
    value_batch, value_page, value_head, value_inside, value_dim, visible_token, visible_column,
    tokens, batch, kv_heads, tiles, most_blocks, share,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    STEP: tl.constexpr, SPARSE: tl.constexpr, COUNTED: tl.constexpr, TAILS: tl.constexpr, MASKED: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """One (sequence, KV head, row tile) and one share of its positions; strides are in elements."""
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % kv_heads
    sequence = tl.program_id(0) // tiles // kv_heads
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    heads = kv_heads * GROUPS

    first_token = tl.load(offsets + sequence)
    rows = tl.load(offsets + sequence + 1) - first_token
    start = tl.load(starts + sequence)
    row = tile * TILE + tl.arange(0, TILE)
    used = row < rows * GROUPS
    own = row // GROUPS
    token = (first_token + own).to(tl.int64)
    query_number = head * GROUPS + row % GROUPS
    dim = tl.arange(0, HEAD_DIM)
    query_at = token * query_token + query_number.to(tl.int64) * query_head
    query = tl.load(queries + query_at[:, None] + dim[None, :] * query_dim, mask=used[:, None], other=0.0)

    if SPARSE:
        count = most_blocks
        if COUNTED:
            count = tl.minimum(tl.load(kept + sequence * kv_heads + head), most_blocks)
        tail = start // BLOCK * BLOCK
        if TAILS:
            tail = tl.load(tails + sequence)
        chosen = count * BLOCK
    else:
        tail = start // STEP * STEP
        chosen = tail
    end = start + rows
    chosen_steps = tl.cdiv(chosen, STEP)
    steps = chosen_steps + tl.cdiv(end - tail, STEP)
    per_split = tl.cdiv(steps, splits)
    begin = split * per_split
    stop = tl.minimum(begin + per_split, steps)
    stop = tl.where(tile * TILE < rows * GROUPS, stop, begin)

    key_base = keys + sequence.to(tl.int64) * key_batch + head.to(tl.int64) * key_head + dim[:, None] * key_dim
    value_base = values + sequence.to(tl.int64) * value_batch + head.to(tl.int64) * value_head
    value_base += dim[None, :] * value_dim
    place = tl.arange(0, STEP)
    best = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    sums = tl.zeros([TILE, HEAD_DIM], tl.float32)

    for step in range(begin, tl.minimum(stop, chosen_steps)):
        if SPARSE:
            slot = step * (STEP // BLOCK) + place // BLOCK
            live = slot < count
            table = blocks + (sequence * kv_heads + head).to(tl.int64) * most_blocks
            position = tl.load(table + slot, mask=live, other=0).to(tl.int64) * BLOCK + place % BLOCK
            page = tl.max_constancy(position // PAGE, BLOCK)
            inside = tl.max_contiguous(tl.multiple_of(position % PAGE, BLOCK), BLOCK)
        else:
            position = (step * STEP + place).to(tl.int64)
            live = position < chosen
            page = position // PAGE
            inside = position % PAGE
        key_at = key_base + (page * key_page + inside * key_inside)[None, :]
        value_at = value_base + (page * value_page + inside * value_inside)[:, None]
        best, total, sums = _attend(query, key_at, value_at, live, live[None, :], best, total, sums)

    for step in range(tl.maximum(begin, chosen_steps), stop):
        position = ((step - chosen_steps) * STEP + place + tail).to(tl.int64)
        live = position < end
        column = position - start
        if MASKED:
            mask_at = visible + token[:, None] * visible_token + column[None, :] * visible_column
            drafted = used[:, None] & (live & (column >= 0))[None, :]
            seen = live[None, :] & ((column < 0)[None, :] | (tl.load(mask_at, mask=drafted, other=0) != 0))
        else:
            seen = live[None, :] & (column[None, :] <= own[:, None])
        page = position // PAGE
        inside = position % PAGE
        key_at = key_base + (page * key_page + inside * key_inside)[None, :]
        value_at = value_base + (page * value_page + inside * value_inside)[:, None]
        best, total, sums = _attend(query, key_at, value_at, live, seen, best, total, sums)

    divisor = tl.where(total == 0.0, 1.0, total)
    sums = sums / divisor[:, None]
    out_at = token * heads + query_number
    if SPLIT:
        out_at = out_at * splits + split
        tl.store(logs_out + out_at, best + tl.log2(divisor), mask=used)
        tl.store(sums_out + out_at[:, None] * HEAD_DIM + dim[None, :], sums, mask=used[:, None])
    else:
        where = output + out_at[:, None] * HEAD_DIM + dim[None, :]
        tl.store(where, sums.to(output.dtype.element_ty), mask=used[:, None])
        for chunk in range(tile * TILE, share * GROUPS, tiles * TILE):
            extra = chunk + tl.arange(0, TILE)
            spare = (tl.load(offsets + batch) + sequence * share + extra // GROUPS).to(tl.int64)
            unowned = (extra < share * GROUPS) & (spare < tokens)
            where = output + (spare * heads + head * GROUPS + extra % GROUPS)[:, None] * HEAD_DIM + dim[None, :]
            tl.store(where, tl.zeros([TILE, HEAD_DIM], output.dtype.element_ty), mask=unowned[:, None])


@triton.jit
def _merge_splits(
    sums, logs, output, offsets, batch, heads, splits, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """The splits of one token and query head weighed by their log-sum-exp; zeros for tokens of no sequence."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, HEAD_DIM)
    owned = tl.load(offsets + batch).to(tl.int64) * heads
    live = split < tl.where(row < owned, splits, 0)
    log = tl.load(logs + row * splits + split, mask=live, other=float("-inf"))
    best = tl.max(log, 0)
    weights = tl.exp2(log - tl.where(best == float("-inf"), 0.0, best))
    at = sums + (row * splits + split)[:, None] * HEAD_DIM + dim[None, :]
    merged = tl.sum(tl.load(at, mask=live[:, None], other=0.0) * weights[:, None], 0)
    total = tl.sum(weights, 0)
    merged = merged / tl.where(total == 0.0, 1.0, total)
    tl.store(output + row * HEAD_DIM + dim, merged.to(output.dtype.element_ty))


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU, asked for once; elsewhere, in the interpreter, those of an H200."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def splits_for(positions: int, programs: int, device: torch.device) -> int:
    """Shares into which the positions of a sequence are split so that all multiprocessors have work.

    Args:
        positions: upper bound of the positions that a sequence reads.
        programs: of one split: sequences times KV heads times row tiles.
        device: of the tensors.

    Returns:
        1 to 64; a share holds 256 positions or more.
    """
    filling = PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(device) // programs
    return max(1, min(filling, positions // SPLIT_POSITIONS, MAX_SPLITS))


def attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    offsets: Tensor,
    starts: Tensor,
    most_rows: int,
    block_size: int = 16,
    blocks: Tensor | None = None,
    kept: Tensor | None = None,
    tails: Tensor | None = None,
    visible: Tensor | None = None,
    longest: int | None = None,
    splits: int | None = None,
) -> Tensor:
    """Attention of a ragged batch of steps to selected blocks, or to everything (METHOD section 2).

    The keys and values of the step's own rows are already in the cache. Nothing but the selected blocks and the tail is
    read. Nothing waits for the device: the launch depends on shapes and host integers alone and can be captured.

    Args:
        queries: [tokens, heads, head_dim], rotated and scaled; bf16, fp16 or fp32, like keys and values.
        keys: [batch, pages, kv_heads, head_dim, page], any strides.
        values: [batch, pages, kv_heads, page, head_dim], any strides.
        offsets: [batch + 1], int32: sequence b owns the tokens ``offsets[b]`` to ``offsets[b + 1]``, perhaps none.
        starts: [batch], int32: positions before the step, whose rows follow in the cache.
        most_rows: upper bound of the tokens of one sequence.
        block_size: positions per block: 16, 32, 64 or 128, a divisor of the page.
        blocks: selected block indices [batch, kv_heads, k], int32 or int64, all below the tail; None for dense
            attention.
        kept: [batch, kv_heads], int32: only the first so many of ``blocks`` count; None for all.
        tails: [batch], int32: first position after the whole blocks that the selection knew, from which on everything
            before the step is visible; None for the last whole block.
        visible: [tokens, most_rows], bool: whether a token sees the n-th token of its sequence; None for a chain.
        longest: upper bound of the positions of a sequence in dense attention; None for the capacity. It only tells
            into how many splits the work is cut.
        splits: shares of the positions; None for what fills the device.

    Returns:
        [tokens, heads, head_dim] in the dtype of ``queries``; zeros for tokens after the last offset.

    Raises:
        ValueError: sizes that do not fit together or are not supported.
    """
    tokens, heads, head_dim = queries.shape
    batch, pages, kv_heads, _, page = keys.shape
    _check(queries, keys, values, block_size, blocks)
    groups = heads // kv_heads
    most = 0 if blocks is None else blocks.shape[-1]
    positions = most * block_size if blocks is not None else longest or pages * page
    step = max(MIN_STEP, block_size)
    tiles = triton.cdiv(most_rows * groups, MAX_TILE)
    tile = max(16, triton.next_power_of_2(triton.cdiv(most_rows * groups, tiles)))
    programs = batch * kv_heads * tiles
    if splits is None:
        splits = splits_for(positions, programs, queries.device)
    output = torch.empty_like(queries, memory_format=torch.contiguous_format)
    if not tokens:
        return output
    sums, logs = output, output
    if splits > 1:
        logs = torch.empty(tokens, heads, splits, dtype=torch.float32, device=queries.device)
        sums = torch.empty(tokens, heads, splits, head_dim, dtype=torch.float32, device=queries.device)
    table = offsets if blocks is None else blocks.contiguous()
    counts = offsets if kept is None else kept.contiguous()
    mask = offsets if visible is None else visible.view(torch.uint8)
    _attend_splits[programs, splits](
        queries, keys, values, output, sums, logs, offsets, starts, table, counts,
        offsets if tails is None else tails, mask,
        *queries.stride(), *keys.stride(), *values.stride(), *(mask.stride() if visible is not None else (0, 0)),
        tokens, batch, kv_heads, tiles, most, triton.cdiv(tokens, batch),
        GROUPS=groups, HEAD_DIM=head_dim, PAGE=page, BLOCK=block_size, TILE=tile, STEP=step,
        SPARSE=blocks is not None, COUNTED=kept is not None, TAILS=tails is not None, MASKED=visible is not None,
        SPLIT=splits > 1,
    )  # fmt: skip
    if splits > 1:
        _merge_splits[(tokens * heads,)](
            sums, logs, output, offsets, batch, heads, splits,
            HEAD_DIM=head_dim, SPLITS=triton.next_power_of_2(splits),
        )  # fmt: skip
    return output


def _check(queries: Tensor, keys: Tensor, values: Tensor, block_size: int, blocks: Tensor | None) -> None:
    """Refuse sizes and dtypes that the kernel was not written for."""
    heads, head_dim = queries.shape[1:]
    batch, pages, kv_heads, key_dim, page = keys.shape
    if key_dim != head_dim or tuple(values.shape) != (batch, pages, kv_heads, page, head_dim):
        raise ValueError(f"queries {tuple(queries.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)}")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads do not share {kv_heads} KV heads evenly")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim={head_dim} is not one of {HEAD_DIMS}")
    if queries.dtype not in DTYPES or keys.dtype != queries.dtype or values.dtype != queries.dtype:
        raise ValueError(
            f"dtypes {queries.dtype}, {keys.dtype} and {values.dtype} are not one and the same of {DTYPES}"
        )
    if block_size not in BLOCK_SIZES or page % block_size:
        raise ValueError(f"block_size={block_size} is not one of {BLOCK_SIZES} that divides the page of {page}")
    if blocks is not None and tuple(blocks.shape[:2]) != (batch, kv_heads):
        raise ValueError(f"blocks {tuple(blocks.shape)} for {batch} sequences of {kv_heads} KV heads")
