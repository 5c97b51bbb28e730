"""Mixture-of-experts layers of few rows as CPU kernels; they live in the library of the sparse FFN kernel."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sparse.ops.sparse_ffn import native


def available(dtype: torch.dtype) -> bool:
    """Whether :func:`run` works here for tensors of ``dtype`` on the CPU."""
    return native.TILES in native.variants(dtype)


def routes(probabilities: Tensor) -> bool:
    """Whether :func:`route` works for these probabilities."""
    return probabilities.is_cpu and probabilities.dtype == torch.float32 and native.load() is not None


def route(
    probabilities: Tensor, *, top_k: int, limit: int, normalise: bool, unit: bool, survival: float
) -> tuple[Tensor, list[int]]:
    """Top-k routing with at most ``limit`` distinct experts for all rows, the lost ones substituted (METHOD section 4).

    Args:
        probabilities: [tokens, experts], fp32, on the CPU.
        top_k: experts per token, at most their number.
        limit: distinct experts for all tokens, at least 1; the number of experts sets no limit.
        normalise, unit: as in ``MoeWeights``.
        survival: the n-th token counts survival ** n when experts are ranked.

    Returns:
        ``combine`` [tokens, experts], fp32, and pairs wanted and kept, substituted pairs, experts wanted and run.

    Raises:
        RuntimeError: there is no kernel here.
    """
    loaded = native.load()
    if loaded is None:
        raise RuntimeError("no routing kernel here")
    probabilities = probabilities.contiguous()
    combine = torch.empty_like(probabilities)
    counts = (ctypes.c_int64 * 5)()
    tokens, experts = probabilities.shape
    status = loaded[0].sparse_moe_route(
        probabilities.data_ptr(), tokens, experts, top_k, limit, normalise, unit, survival, combine.data_ptr(), counts
    )
    if status:
        raise MemoryError(f"no memory to route {tokens} tokens")
    return combine, list(counts)


def run(rows: Tensor, combine: Tensor, channels: Tensor, width: int) -> Tensor:
    """Weighted sum of the experts that run, and the shared expert; nothing else is read (METHOD section 4).

    Args:
        rows: [tokens, hidden], bf16, on the CPU.
        combine: [tokens, experts], fp32, zero where an expert does not run for a token.
        channels: [experts * width + shared, 3 * hidden], bf16, contiguous: rows of gate and up and column of down of
            each channel, expert by expert, the shared one last.
        width: channels per routed expert.

    Returns:
        [tokens, hidden], bf16.

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: there is no kernel here.
    """
    tokens, hidden = rows.shape
    experts = combine.shape[1]
    if channels.shape[1] != 3 * hidden or channels.shape[0] < experts * width or combine.shape[0] != tokens:
        raise ValueError(f"shapes do not fit: {tuple(rows.shape)}, {tuple(combine.shape)}, {tuple(channels.shape)}")
    if (rows.dtype, channels.dtype, combine.dtype) != (torch.bfloat16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtypes do not fit: {rows.dtype}, {channels.dtype}, {combine.dtype}")
    loaded = native.load()
    if loaded is None or not available(rows.dtype):
        raise RuntimeError("no expert kernel here")
    rows, combine = rows.contiguous(), combine.contiguous()
    output = torch.empty_like(rows)
    status = loaded[0].sparse_moe_run(
        rows.data_ptr(),
        combine.data_ptr(),
        channels.data_ptr(),
        tokens,
        hidden,
        channels.shape[0],
        experts,
        width,
        output.data_ptr(),
    )
    if status:
        raise MemoryError(f"no memory for {tokens} rows of experts")
    return output
