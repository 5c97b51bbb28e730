"""The sparse feed-forward network as Triton kernels: choice of the channels and product over them (METHOD section 3).

Nothing waits for the device, so a whole step can be captured in a CUDA graph; its first call, which may tune, must come
before the capture. Sums are kept in fp32 and are the same in every run.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse.ops.ranking.kernel import MOST_KEYS, largest
from sparse.ops.tuning import tuned

_LOWEST_BITS = {torch.float32: (0, 16), torch.bfloat16: (16, 8), torch.float16: (12, 10)}
"""Of a non-negative number of this type as fp32: the lowest bit that may be set, and the pairs of bits from there."""
_MOST_ROWS = 64  # rows of one tile: beyond, the weights are read once per tile
_PROGRAMS = 264  # wanted at once: two for each of the 132 multiprocessors of an H200
_LEAST_SHARE = 128  # channels of one split at least
_REDUCED = 1024  # elements of one program that sums the splits
_MAGNITUDES = 128  # channels of one program that measures them


def _config(warps: int, stages: int, **sizes: int) -> Any:
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


_FACTORS = [
    _config(4, 3, TILE=32, DEPTH=64),
    _config(4, 4, TILE=32, DEPTH=128),
    _config(4, 3, TILE=64, DEPTH=128),
    _config(4, 4, TILE=64, DEPTH=64),
    _config(8, 4, TILE=128, DEPTH=64),
    _config(4, 3, TILE=32, DEPTH=256),
    _config(4, 4, TILE=16, DEPTH=256),
    _config(2, 5, TILE=16, DEPTH=128),
]
_DOWN = [
    _config(4, 3, TILE=64, DEPTH=32),
    _config(4, 4, TILE=64, DEPTH=64),
    _config(4, 3, TILE=64, DEPTH=128),
    _config(4, 4, TILE=128, DEPTH=32),
    _config(4, 3, TILE=128, DEPTH=64),
    _config(8, 3, TILE=256, DEPTH=32),
    _config(4, 5, TILE=64, DEPTH=32),
    _config(8, 4, TILE=128, DEPTH=64),
]


@tuned(_FACTORS, key=["HIDDEN", "ROWS", "BUCKET"])
@triton.jit
def _factors(
    rows,
    activations,
    channels,
    index,
    count,
    factors,
    n,
    limit,
    factor_stride,
    row_stride,
    activation_stride,
    channel_stride,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BUCKET: tl.constexpr,
    COUNTED: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """activations * (rows @ up.T) of a tile of the chosen channels: [n, factor_stride], zero up to a multiple of 16."""
    chosen = limit
    if COUNTED:
        chosen = tl.minimum(limit, tl.load(count))
    if tl.program_id(0) * TILE < chosen:
        lane = tl.program_id(0) * TILE + tl.arange(0, TILE)
        row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        depth = tl.arange(0, DEPTH)
        channel = tl.load(index + lane, mask=lane < chosen, other=0).to(tl.int64)
        left = rows + row[:, None] * row_stride + depth[None, :]
        right = channels + channel[:, None] * channel_stride + depth[None, :]
        total = tl.zeros([ROWS, TILE], tl.float32)
        for start in range(0, HIDDEN, DEPTH):
            inside = (start + depth < HIDDEN)[None, :]
            x = tl.load(left + start, mask=(row < n)[:, None] & inside, other=0.0)
            up = tl.load(right + start, mask=(lane < chosen)[:, None] & inside, other=0.0)
            total = tl.dot(x, tl.trans(up), total, input_precision=PRECISION)
        real = (row < n)[:, None] & (lane < chosen)[None, :]
        active = tl.load(activations + row[:, None] * activation_stride + channel[None, :], mask=real, other=0.0)
        found = (total * active.to(tl.float32)).to(factors.dtype.element_ty)
        room = (row < n)[:, None] & (lane < factor_stride)[None, :]
        tl.store(factors + row[:, None] * factor_stride + lane[None, :], found, mask=room)


@tuned(_DOWN, key=["HIDDEN", "ROWS", "BUCKET"])
@triton.jit
def _down(
    factors,
    channels,
    index,
    count,
    partial,
    n,
    limit,
    factor_stride,
    channel_stride,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BUCKET: tl.constexpr,
    COUNTED: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """factors @ down of a tile of hidden over one split of the chosen channels: partial [splits, n, HIDDEN]."""
    chosen = limit
    if COUNTED:
        chosen = tl.minimum(limit, tl.load(count))
    share = tl.cdiv(tl.cdiv(chosen, tl.num_programs(1)), DEPTH) * DEPTH
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, chosen)
    whole = tl.cdiv(chosen, 16) * 16  # so that loads of factors stay wide
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = (tl.program_id(2) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    depth = tl.arange(0, DEPTH)
    total = tl.zeros([ROWS, TILE], tl.float32)
    for start in range(begin, end, DEPTH):
        lane = start + depth
        inside = lane < chosen
        channel = tl.load(index + lane, mask=inside, other=0).to(tl.int64)
        factor = tl.load(
            factors + row[:, None] * factor_stride + lane[None, :],
            mask=(row < n)[:, None] & (lane < whole)[None, :],
            other=0.0,
        )
        down = tl.load(
            channels + channel[:, None] * channel_stride + (HIDDEN + column)[None, :],
            mask=inside[:, None] & (column < HIDDEN)[None, :],
            other=0.0,
        )
        total = tl.dot(factor, down, total, input_precision=PRECISION)
    at = (tl.program_id(1) * n + row)[:, None] * HIDDEN + column[None, :]
    real = (row < n)[:, None] & (column < HIDDEN)[None, :]
    tl.store(partial + at, total.to(partial.dtype.element_ty), mask=real)


@triton.jit
def _sum_splits(partial, output, size, splits, TILE: tl.constexpr):
    """output [size] = sum of partial [splits, size], in the order of the splits."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float32)
    for split in range(splits):
        total += tl.load(partial + at + split * size, mask=at < size, other=0.0)
    tl.store(output + at, total.to(output.dtype.element_ty), mask=at < size)


@triton.jit
def _measure(
    activations,
    weights,
    magnitudes,
    n,
    width,
    stride,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """magnitudes [width], fp32: the largest |activation| of the rows, or their sum by weight."""
    lane = tl.program_id(0) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, n, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        real = (row < n)[:, None] & (lane < width)[None, :]
        tile = tl.load(activations + row[:, None] * stride + lane[None, :], mask=real, other=0.0)
        tile = tl.abs(tile.to(tl.float32))
        if WEIGHTED:
            weight = tl.load(weights + row, mask=row < n, other=0.0)
            total += tl.sum(tile * weight[:, None], axis=0)
        else:
            total = tl.maximum(total, tl.max(tile, axis=0))
    tl.store(magnitudes + lane, total, mask=lane < width)


@triton.jit
def _choose(
    magnitudes,
    index,
    count,
    width,
    keep,
    threshold,
    BY_THRESHOLD: tl.constexpr,
    LOWEST: tl.constexpr,
    PASSES: tl.constexpr,
    LANES: tl.constexpr,
):
    """The ``keep`` largest magnitudes, or those from the threshold on and at least one; zeros after these."""
    lane = tl.arange(0, LANES)
    found = tl.load(magnitudes + lane, mask=lane < width, other=0.0)
    wanted = keep
    if BY_THRESHOLD:
        reached = (found >= threshold) & (lane < width)
        wanted = tl.maximum(tl.sum(reached.to(tl.int32), axis=0), 1)
        tl.store(count, wanted)
        tl.store(index + lane, tl.zeros([LANES], tl.int64), mask=(lane >= wanted) & (lane < width))
    chosen, slots = largest(found.to(tl.uint32, bitcast=True), wanted, LOWEST, PASSES)
    tl.store(index + slots, lane.to(tl.int64), mask=chosen)


def _check(rows: Tensor, activations: Tensor, channels: Tensor, index: Tensor, count: Tensor | None) -> None:
    """Refuses tensors that do not fit together."""
    width, both = channels.shape
    if both != 2 * rows.shape[1] or activations.shape != (rows.shape[0], width) or index.dim() != 1:
        raise ValueError(
            f"shapes do not fit: rows {tuple(rows.shape)}, activations {tuple(activations.shape)}, "
            f"channels {tuple(channels.shape)}, index {tuple(index.shape)}"
        )
    if not rows.dtype == activations.dtype == channels.dtype or rows.dtype not in _LOWEST_BITS:
        raise ValueError(f"dtypes do not fit: {rows.dtype}, {activations.dtype}, {channels.dtype}")
    if index.dtype != torch.int64 or (count is not None and (count.dtype != torch.int32 or count.numel() != 1)):
        raise ValueError("index must be int64, count one int32")
    if any(tensor.stride(-1) != 1 for tensor in (rows, activations, channels, index) if tensor.numel()):
        raise ValueError("the kernels take tensors whose last dimension is contiguous")


def ffn(rows: Tensor, activations: Tensor, channels: Tensor, index: Tensor, count: Tensor | None = None) -> Tensor:
    """Output of a gated feed-forward network from the chosen channels (METHOD section 3). No gradients, no wait.

    Rows of up and columns of down of the chosen channels are read once per 64 rows; the others are not read. Products
    of activation and up are rounded once to the dtype of ``rows`` before they meet down, as on the CPU.

    Args:
        rows: [n, hidden], bf16, fp16 or fp32.
        activations: [n, width], same dtype.
        channels: [width, 2 * hidden], same dtype: row of up, column of down.
        index: [c], int64: the chosen channels, each below ``width``; that is not checked, it would need a wait.
        count: [1], int32, on the device: only the first so many of ``index`` count; None for all.

    Returns:
        [n, hidden] in the dtype of ``rows``.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    _check(rows, activations, channels, index, count)
    (n, hidden), limit = rows.shape, index.shape[0]
    if n == 0 or limit == 0:
        return torch.zeros_like(rows)
    tile_rows = min(_MOST_ROWS, max(16, triton.next_power_of_2(n)))
    row_tiles = triton.cdiv(n, tile_rows)
    splits = max(1, min(limit // _LEAST_SHARE, _PROGRAMS // (triton.cdiv(hidden, 64) * row_tiles)))
    factors = torch.empty(n, triton.cdiv(limit, 16) * 16, dtype=rows.dtype, device=rows.device)
    output = torch.empty(n, hidden, dtype=rows.dtype, device=rows.device)
    partial = output
    if splits > 1:
        partial = torch.empty(splits, n, hidden, dtype=torch.float32, device=rows.device)
    counted = index if count is None else count
    sizes = {
        "HIDDEN": hidden,
        "ROWS": tile_rows,
        "BUCKET": triton.next_power_of_2(limit),
        "COUNTED": count is not None,
        "PRECISION": "ieee" if rows.dtype == torch.float32 else "tf32",
    }
    strides = (factors.stride(0), rows.stride(0), activations.stride(0), channels.stride(0))
    _factors[lambda meta: (triton.cdiv(limit, meta["TILE"]), row_tiles)](
        rows, activations, channels, index, counted, factors, n, limit, *strides, **sizes
    )
    _down[lambda meta: (triton.cdiv(hidden, meta["TILE"]), splits, row_tiles)](
        factors, channels, index, counted, partial, n, limit, strides[0], strides[3], **sizes
    )
    if splits > 1:
        _sum_splits[(triton.cdiv(n * hidden, _REDUCED),)](partial, output, n * hidden, splits, TILE=_REDUCED)
    return output


def _ranked(
    activations: Tensor, weights: Tensor | None, index: Tensor, count: Tensor | None, keep: int, threshold: float
) -> None:
    """Fills ``index``, and ``count`` where the threshold decides."""
    n, width = activations.shape
    if not n or not 0 < width <= MOST_KEYS:
        raise ValueError(f"activations {tuple(activations.shape)}: at least one row and 1 to {MOST_KEYS} channels")
    if activations.dtype not in _LOWEST_BITS or activations.stride(1) != 1:
        raise ValueError("activations must be bf16, fp16 or fp32, each row contiguous")
    if weights is not None and (weights.shape != (n,) or weights.dtype != torch.float32):
        raise ValueError(f"weights must be {n} numbers in fp32, not {tuple(weights.shape)} in {weights.dtype}")
    magnitudes = torch.empty(width, dtype=torch.float32, device=activations.device)
    weighted = weights is not None
    _measure[(triton.cdiv(width, _MAGNITUDES),)](
        activations,
        magnitudes if weights is None else weights,
        magnitudes,
        n,
        width,
        activations.stride(0),
        WEIGHTED=weighted,
        ROWS=min(32, triton.next_power_of_2(n)),
        TILE=_MAGNITUDES,
        num_warps=4,
    )
    lowest, passes = _LOWEST_BITS[torch.float32 if weighted else activations.dtype]
    lanes = triton.next_power_of_2(max(width, 32))
    _choose[(1,)](
        magnitudes,
        index,
        index if count is None else count,
        width,
        keep,
        threshold,
        BY_THRESHOLD=count is not None,
        LOWEST=lowest,
        PASSES=passes,
        LANES=lanes,
        num_warps=min(16, max(1, lanes // 256)),
    )


def choose(activations: Tensor, keep: int, weights: Tensor | None = None) -> Tensor:
    """The channels of the largest magnitudes, shared by all rows (METHOD section 3, top-k). No wait.

    Args:
        activations: [n, width], bf16, fp16 or fp32, n at least 1, width at most 32768.
        keep: channels to choose, 1 to width.
        weights: [n], fp32, not negative: the magnitudes are the weighted sums of |activation| over the rows; None takes
            the largest.

    Returns:
        [keep], int64, ascending; of equal magnitudes the lower channels are taken.

    Raises:
        ValueError: sizes, dtypes or strides do not fit.
    """
    if not 0 < keep <= activations.shape[1]:
        raise ValueError(f"keep={keep} of {activations.shape[1]} channels")
    index = torch.empty(keep, dtype=torch.int64, device=activations.device)
    _ranked(activations, weights, index, None, keep, 0.0)
    return index


def choose_above(activations: Tensor, threshold: float, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The channels whose magnitude is at least ``threshold`` (METHOD section 3, threshold and quantile). No wait.

    Args:
        activations, weights: as in :func:`choose`.
        threshold: compared in fp32. Where no magnitude reaches it, the largest one is taken.

    Returns:
        index [width], int64, ascending, zeros after the chosen ones; count [1], int32: how many are chosen. For
        :func:`ffn`.

    Raises:
        ValueError: sizes, dtypes or strides do not fit.
    """
    index = torch.empty(activations.shape[1], dtype=torch.int64, device=activations.device)
    count = torch.empty(1, dtype=torch.int32, device=activations.device)
    _ranked(activations, weights, index, count, 0, threshold)
    return index, count
