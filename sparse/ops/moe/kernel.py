"""Mixture-of-experts layers of few rows as Triton kernels: each expert of the union is read once (METHOD section 4).

The numbers of the union's experts are gathered on the device, so grids depend on host integers only: a program whose
slot lies behind the union returns at once. Weights stand on the left of each product and rows on the right, because a
verification step has fewer rows than the matrix units want on the left. Every expert runs on all rows of a tile, and a
weight of zero takes out those that did not ask for it: reading weights leaves time for that arithmetic.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse.ops.tuning import interpreted, tuned

_MOST_ROWS = 64
"""Rows of a tile; more rows take several, and each of them reads the weights again."""
_MOST_ROUTED = 256
"""Experts that the routing kernel takes: it holds all pairs of two of them in its registers."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_INTERPRETED = tl.constexpr(interpreted())
_INTERPRETED_CORES = 4
"""Stands for the multiprocessors of a GPU in the interpreter: enough for sums to be split."""


def moe(rows: Tensor, combine: Tensor, gate_up: Tensor, down: Tensor, *, limit: int | None = None) -> Tensor:
    """Weighted sum of the experts of each row (METHOD section 4); capturable in a CUDA graph after one call.

    Weights of experts outside the union, those that run for no row, are not read. Sums have a fixed order, given
    shapes, the union and the tuned block sizes, so equal inputs give equal bits.

    Args:
        rows: [n, hidden], bf16, fp16 or fp32; meant for few rows, as every expert runs on all of them.
        combine: [n, experts], fp32, zero where an expert does not run for a row.
        gate_up: [experts, 2 * width, hidden] in the dtype of ``rows``, gate first; unit stride in ``hidden``.
        down: [experts, hidden, width], likewise; unit stride in ``width``.
        limit: upper bound of the union, at most ``experts`` (the default). It sets the size of the grid; experts of
            the union behind the first ``limit`` are left out, because checking that would wait for the device.

    Returns:
        [n, hidden] in the dtype of ``rows``; sums are in fp32, activations are rounded to that dtype in between.

    Raises:
        ValueError: shapes, dtypes, strides or the limit do not fit.
    """
    limit = combine.shape[-1] if limit is None else limit
    _check(rows, combine, gate_up, down, limit)
    if rows.shape[0] == 0:
        return torch.empty_like(rows)
    rows, combine = rows.contiguous(), combine.contiguous()
    (tokens, experts), width = combine.shape, down.shape[2]
    tile = min(max(triton.next_power_of_2(tokens), 16), _MOST_ROWS)
    row_tiles = triton.cdiv(tokens, tile)
    union = torch.empty(limit, dtype=torch.int32, device=rows.device)
    count = torch.empty(1, dtype=torch.int32, device=rows.device)
    _gather_union[(1,)](
        combine, union, count, tokens, limit, EXPERTS=experts, SPAN=triton.next_power_of_2(experts), ROWS=tile
    )
    activations = torch.empty(tokens, limit, width, dtype=rows.dtype, device=rows.device)
    activate, blocks = _chosen(_activate, rows.dtype)
    sizes = {"EXPERTS": experts, "HIDDEN": rows.shape[1], "WIDTH": width, "ROWS": tile}
    strides = gate_up.stride()[:2]
    activate[lambda meta: (row_tiles, triton.cdiv(width, meta["CHANNELS"]), limit)](
        rows, combine, gate_up, union, count, activations, tokens, limit, *strides, **sizes, **blocks
    )
    return _down(activations, down, union, count, tile)


def _down(activations: Tensor, down: Tensor, union: Tensor, count: Tensor, tile: int) -> Tensor:
    """The down projections of ``activations`` [n, limit, width], summed over the union: [n, hidden]."""
    (tokens, limit, width), hidden = activations.shape, down.shape[1]
    row_tiles, cores = triton.cdiv(tokens, tile), _cores(down.device)

    def shares(meta: Mapping[str, Any]) -> int:
        """Programs that share the sum of one tile of the output, so that all tiles together fill the device."""
        tiles = row_tiles * triton.cdiv(hidden, meta["COLUMNS"])
        return int(max(1, min(meta["PER_CORE"] * cores // tiles, limit * triton.cdiv(width, meta["DEPTH"]))))

    project, blocks = _chosen(_project, down.dtype)
    most = max(shares(choice) for choice in ([blocks] if blocks else [config.kwargs for config in project.configs]))
    partial = torch.empty(most, tokens, hidden, dtype=torch.float32, device=down.device)
    sizes, strides = {"HIDDEN": hidden, "WIDTH": width, "ROWS": tile}, down.stride()[:2]
    project[lambda meta: (row_tiles, triton.cdiv(hidden, meta["COLUMNS"]), shares(meta))](
        activations, down, union, count, partial, tokens, limit, *strides, **sizes, **blocks
    )
    output = torch.empty(tokens, hidden, dtype=down.dtype, device=down.device)
    size, span = output.numel(), 512
    _add[(triton.cdiv(size, span),)](partial, output, size, shares(blocks or project.best_config.kwargs), SPAN=span)
    return output


def _check(rows: Tensor, combine: Tensor, gate_up: Tensor, down: Tensor, limit: int) -> None:
    """Raise ValueError where the arguments of :func:`moe` do not fit together."""
    if rows.ndim != 2 or combine.ndim != 2 or gate_up.ndim != 3 or down.ndim != 3:
        raise ValueError("rows and combine must have 2 dimensions, gate_up and down 3")
    (tokens, hidden), experts, width = rows.shape, combine.shape[1], down.shape[2]
    shapes = [tuple(tensor.shape) for tensor in (combine, gate_up, down)]
    if shapes != [(tokens, experts), (experts, 2 * width, hidden), (experts, hidden, width)]:
        raise ValueError(f"combine, gate_up and down of shapes {shapes} do not fit {tokens} rows of {hidden}")
    if rows.dtype not in _DTYPES or {gate_up.dtype, down.dtype} != {rows.dtype} or combine.dtype != torch.float32:
        raise ValueError(f"dtypes do not fit: {[x.dtype for x in (rows, combine, gate_up, down)]}")
    if gate_up.stride(2) != 1 or down.stride(2) != 1:
        raise ValueError("gate_up and down must have unit stride in their last dimension")
    if not 1 <= limit <= experts:
        raise ValueError(f"limit={limit} is not between 1 and {experts} experts")


def route(
    probabilities: Tensor,
    *,
    top_k: int,
    normalise: bool,
    unit: bool,
    limit: int | None = None,
    survival: Tensor | None = None,
) -> Tensor:
    """:func:`sparse.ops.moe.routing.route` with substitution in a single launch, for one verification step.

    Args:
        probabilities: [tokens, experts], fp32, positive; at most 64 tokens and 256 experts. Equal ones rank by number.
        top_k, normalise, unit, limit, survival: as there.

    Returns:
        ``combine`` [tokens, experts], fp32.

    Raises:
        ValueError: too many tokens or experts, another dtype, or a limit below 1.
    """
    tokens, experts = probabilities.shape
    limit = experts if limit is None else limit
    if tokens > _MOST_ROWS or experts > _MOST_ROUTED or probabilities.dtype != torch.float32:
        raise ValueError(f"{tuple(probabilities.shape)} of {probabilities.dtype} is not fp32 of at most 64 by 256")
    if limit < 1:
        raise ValueError(f"limit={limit} leaves no expert")
    probabilities = probabilities.contiguous()
    combine = torch.empty_like(probabilities)
    if tokens:
        _route[(1,)](
            probabilities,
            probabilities if survival is None else survival.contiguous(),
            combine,
            tokens,
            limit,
            EXPERTS=experts,
            SPAN=triton.next_power_of_2(experts),
            ROWS=triton.next_power_of_2(tokens),
            TOP_K=top_k,
            NORMALISE=normalise,
            UNIT=unit,
            RESTRICTED=limit < experts,
            WEIGHTED=survival is not None,
            num_warps=16,
        )
    return combine


def _chosen(kernel: Any, dtype: torch.dtype) -> tuple[Any, dict[str, int]]:
    """What to launch, and the block sizes to pass: fp32 serves comparisons, and large blocks of it compile slowly."""
    return (kernel.fn, _FP32_BLOCKS[kernel]) if dtype == torch.float32 else (kernel, {})


@lru_cache(maxsize=16)
def _cores(device: torch.device) -> int:
    """Multiprocessors of the device."""
    if device.type != "cuda":
        return _INTERPRETED_CORES
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@triton.jit
def _dot(left, right, total):
    """left @ right + total in fp32. The interpreter knows no products of bf16, so there the inputs are widened."""
    if _INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def _gather_union(combine, union, count, tokens, limit, EXPERTS: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr):
    """The numbers of the experts that run for some row, ascending, and how many; one program."""
    expert = tl.arange(0, SPAN)
    used = tl.zeros([SPAN], dtype=tl.int32)
    for first in range(0, tokens, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < tokens)[:, None] & (expert < EXPERTS)[None, :]
        weights = tl.load(combine + row.to(tl.int64)[:, None] * EXPERTS + expert[None, :], mask=inside, other=0.0)
        used = tl.maximum(used, tl.max((weights != 0).to(tl.int32), axis=0))
    place = tl.cumsum(used, axis=0) - used
    tl.store(union + place, expert, mask=(used != 0) & (place < limit))
    tl.store(count, tl.minimum(tl.sum(used, axis=0), limit))


@tuned(
    [
        triton.Config({"CHANNELS": 64, "DEPTH": 64}, num_warps=4, num_stages=3),
        triton.Config({"CHANNELS": 64, "DEPTH": 64}, num_warps=4, num_stages=4),
        triton.Config({"CHANNELS": 64, "DEPTH": 128}, num_warps=4, num_stages=2),
        triton.Config({"CHANNELS": 64, "DEPTH": 128}, num_warps=4, num_stages=3),
        triton.Config({"CHANNELS": 128, "DEPTH": 64}, num_warps=8, num_stages=3),
        triton.Config({"CHANNELS": 128, "DEPTH": 64}, num_warps=8, num_stages=4),
        triton.Config({"CHANNELS": 128, "DEPTH": 64}, num_warps=4, num_stages=4),
    ],
    key=["limit", "HIDDEN", "WIDTH", "ROWS"],
)
@triton.jit
def _activate(
    rows,
    combine,
    gate_up,
    union,
    count,
    activations,
    tokens,
    limit,
    expert_stride,
    channel_stride,
    EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """silu(gate) * up * weight of one expert's tile of channels for a tile of rows, as [rows, limit, width]."""
    slot = tl.program_id(2)
    if slot >= tl.load(count):
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    depth = tl.arange(0, DEPTH)
    real, valid = row < tokens, channel < WIDTH
    expert = tl.load(union + slot).to(tl.int64)
    row_at = rows + row.to(tl.int64)[None, :] * HIDDEN + depth[:, None]
    gate_at = gate_up + expert * expert_stride + channel.to(tl.int64)[:, None] * channel_stride + depth[None, :]
    up_at = gate_at + tl.cast(channel_stride, tl.int64) * WIDTH
    gate = tl.zeros([CHANNELS, ROWS], dtype=tl.float32)
    up = tl.zeros([CHANNELS, ROWS], dtype=tl.float32)
    for first in range(0, HIDDEN, DEPTH):
        within = first + depth < HIDDEN
        inputs = tl.load(row_at + first, mask=within[:, None] & real[None, :], other=0.0)
        gate_rows = tl.load(gate_at + first, mask=valid[:, None] & within[None, :], other=0.0)
        up_rows = tl.load(up_at + first, mask=valid[:, None] & within[None, :], other=0.0)
        gate = _dot(gate_rows, inputs, gate)
        up = _dot(up_rows, inputs, up)
    weight = tl.load(combine + row.to(tl.int64) * EXPERTS + expert, mask=real, other=0.0)[None, :]
    values = tl.where(weight != 0, gate * tl.sigmoid(gate) * up * weight, 0.0)
    out = activations + (row.to(tl.int64)[None, :] * limit + slot) * WIDTH + channel[:, None]
    tl.store(out, values.to(activations.dtype.element_ty), mask=valid[:, None] & real[None, :])


@tuned(
    [
        triton.Config({"COLUMNS": 64, "DEPTH": 64, "PER_CORE": 2}, num_warps=4, num_stages=4),
        triton.Config({"COLUMNS": 64, "DEPTH": 64, "PER_CORE": 3}, num_warps=4, num_stages=4),
        triton.Config({"COLUMNS": 64, "DEPTH": 128, "PER_CORE": 1}, num_warps=4, num_stages=4),
        triton.Config({"COLUMNS": 64, "DEPTH": 128, "PER_CORE": 2}, num_warps=4, num_stages=3),
        triton.Config({"COLUMNS": 128, "DEPTH": 64, "PER_CORE": 1}, num_warps=4, num_stages=5),
        triton.Config({"COLUMNS": 128, "DEPTH": 64, "PER_CORE": 2}, num_warps=4, num_stages=4),
        triton.Config({"COLUMNS": 256, "DEPTH": 64, "PER_CORE": 1}, num_warps=8, num_stages=4),
    ],
    key=["limit", "HIDDEN", "WIDTH", "ROWS"],
)
@triton.jit
def _project(
    activations,
    down,
    union,
    count,
    partial,
    tokens,
    limit,
    expert_stride,
    column_stride,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PER_CORE: tl.constexpr,
):
    """One share of a tile of the output, as [shares, rows, hidden]: the union's channels are dealt out evenly."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    share = tl.program_id(2)
    depth = tl.arange(0, DEPTH)
    real, valid = row < tokens, column < HIDDEN
    per_expert: tl.constexpr = (WIDTH + DEPTH - 1) // DEPTH
    steps = tl.load(count) * per_expert
    row_at = activations + row.to(tl.int64)[None, :] * limit * WIDTH
    column_at = down + column.to(tl.int64)[:, None] * column_stride
    total = tl.zeros([COLUMNS, ROWS], dtype=tl.float32)
    first, last = steps * share // tl.num_programs(2), steps * (share + 1) // tl.num_programs(2)
    expert = tl.load(union + first // per_expert, mask=first < last, other=0).to(tl.int64)
    for step in range(first, last):
        slot = step // per_expert
        channel = step % per_expert * DEPTH + depth
        within = channel < WIDTH
        column_mask = valid[:, None] & within[None, :]
        inputs = tl.load(row_at + (slot * WIDTH + channel)[:, None], mask=within[:, None] & real[None, :], other=0.0)
        columns = tl.load(column_at + expert * expert_stride + channel[None, :], mask=column_mask, other=0.0)
        total = _dot(columns, inputs, total)
        expert = tl.load(union + (step + 1) // per_expert, mask=step + 1 < last, other=0).to(tl.int64)
    out = partial + (share.to(tl.int64) * tokens + row)[None, :] * HIDDEN + column[:, None]
    tl.store(out, total, mask=valid[:, None] & real[None, :])


@triton.jit
def _add(partial, output, size, shares, SPAN: tl.constexpr):
    """The sum of the shares, in their order."""
    at = tl.program_id(0).to(tl.int64) * SPAN + tl.arange(0, SPAN)
    inside = at < size
    total = tl.zeros([SPAN], dtype=tl.float32)
    for share in range(0, shares):
        total += tl.load(partial + tl.cast(share, tl.int64) * size + at, mask=inside, other=0.0)
    tl.store(output + at, total.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _best(values, expert, TOP_K: tl.constexpr):
    """The mask of the ``TOP_K`` largest of each row of ``values`` [rows, span], none of which is below -1."""
    chosen = tl.zeros(values.shape, dtype=tl.int1)
    for _ in range(TOP_K):
        hit = expert[None, :] == tl.argmax(tl.where(chosen, -2.0, values), axis=1)[:, None]
        chosen = chosen | hit
    return chosen


@triton.jit
def _route(
    probabilities,
    survival,
    combine,
    tokens,
    limit,
    EXPERTS: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALISE: tl.constexpr,
    UNIT: tl.constexpr,
    RESTRICTED: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """One program: every token's best experts, the best experts of all of them, every token's best among these."""
    row, expert = tl.arange(0, ROWS), tl.arange(0, SPAN)
    real = row < tokens
    inside = real[:, None] & (expert < EXPERTS)[None, :]
    at = row[:, None] * EXPERTS + expert[None, :]
    values = tl.load(probabilities + at, mask=inside, other=-1.0)
    dense = _best(values, expert, TOP_K) & inside
    sums = tl.where(real, tl.sum(tl.where(dense, values, 0.0), axis=1), 1.0)[:, None]
    runs = dense
    if RESTRICTED:
        scores = tl.where(dense, values, 0.0)
        if NORMALISE:
            scores = scores / sums
        if WEIGHTED:
            scores = scores * tl.load(survival + row, mask=real, other=0.0)[:, None]
        wanted = tl.max(dense.to(tl.int32), axis=0) > 0
        score = tl.where(wanted, tl.sum(scores, axis=0), -1.0)
        earlier = (score[:, None] == score[None, :]) & (expert[:, None] < expert[None, :])
        ahead = tl.sum(((score[:, None] > score[None, :]) | earlier).to(tl.int32), axis=0)
        loaded = (wanted & (ahead < limit))[None, :]
        preference = tl.where(loaded, tl.where(dense, 2.0, values), -1.0)
        runs = _best(preference, expert, TOP_K) & loaded & inside
    chosen = tl.where(runs, 1.0 if UNIT else values, 0.0)
    if not UNIT:
        total = tl.where(real, tl.sum(chosen, axis=1), 1.0)[:, None]
        chosen = chosen / total if NORMALISE else chosen * (sums / total)
    tl.store(combine + at, chosen, mask=inside)


_FP32_BLOCKS = {
    _activate: {"CHANNELS": 64, "DEPTH": 16},
    _project: {"COLUMNS": 64, "DEPTH": 16, "PER_CORE": 2},
}
