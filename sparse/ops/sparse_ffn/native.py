"""The sparse feed-forward product as a CPU kernel, built by the system's compiler at first use (METHOD section 3).

Without a compiler, or where the result is wrong, the kernel is unavailable.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sparse.ops.native import build

_SOURCES = ("native.cpp", "native.h", "native_bf16.h", "native_choice.h", "native_experts.h", "native_layer.h")
_PORTABLE_FP32, _PORTABLE_BF16 = 0, 1
TILES = 3
"""Number of the bf16 kernel with tile registers; whole layers and experts need it."""

_log = logging.getLogger(__name__)


def _open() -> ctypes.CDLL:
    """The library with the types of its functions."""
    kernels = build.open_library("sparse_ffn", Path(__file__).parent, _SOURCES)
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    kernels.sparse_ffn_run.argtypes = [ctypes.c_int, *[pointer] * 4, *[size] * 4, pointer]
    kernels.sparse_ffn_select.argtypes = [ctypes.c_int, *[pointer] * 2, *[size] * 3, ctypes.c_float, pointer]
    kernels.sparse_ffn_select.restype = size
    kernels.sparse_ffn_layer.argtypes = [*[pointer] * 4, *[size] * 5, ctypes.c_float, *[pointer] * 2]
    kernels.sparse_ffn_layer.restype = size
    kernels.sparse_moe_route.argtypes = [pointer, *[size] * 4, *[ctypes.c_int] * 2, ctypes.c_float, *[pointer] * 2]
    kernels.sparse_moe_run.argtypes = [*[pointer] * 3, *[size] * 5, pointer]
    return kernels


def _call(
    kernels: ctypes.CDLL, variant: int, rows: Tensor, activations: Tensor, channels: Tensor, index: Tensor
) -> Tensor:
    """Runs one kernel on checked, contiguous tensors."""
    output = torch.empty_like(rows)
    count, hidden = rows.shape
    status = kernels.sparse_ffn_run(
        variant,
        rows.data_ptr(),
        activations.data_ptr(),
        channels.data_ptr(),
        index.data_ptr(),
        count,
        hidden,
        channels.shape[0],
        index.shape[0],
        output.data_ptr(),
    )
    if status == 1:
        raise IndexError(f"a channel lies outside 0 to {channels.shape[0] - 1}")
    if status == 2:
        raise RuntimeError(f"FFN kernel {variant} does not run on this CPU")
    if status:
        raise MemoryError(f"no memory for the sums of {count} rows")
    return output


def _is_right(kernels: ctypes.CDLL, variant: int, dtype: torch.dtype) -> bool:
    """Whether a small product of odd sizes agrees with the same in fp64."""
    count, hidden, width = 5, 41, 19
    rows = torch.linspace(-1, 1, count * hidden).sin().view(count, hidden).to(dtype)
    activations = torch.linspace(-2, 3, count * width).view(count, width).to(dtype)
    channels = torch.linspace(0, 99, width * 2 * hidden).cos().view(width, -1).to(dtype)
    index = torch.arange(width - 1, -1, -2)
    found = _call(kernels, variant, rows, activations, channels, index)
    up, down = channels[index].double().view(-1, 2, hidden).unbind(1)
    truth = (activations[:, index].double() * (rows.double() @ up.T)) @ down
    return bool((found.double() - truth).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * truth.norm())


def _layer_is_right(kernels: ctypes.CDLL) -> bool:
    """Whether a small whole layer agrees with its parts in fp64; all of its channels are chosen."""
    count, size = 5, 32
    rows = torch.linspace(-1, 1, count * size).sin().view(count, size).bfloat16()
    gate, up, down = (torch.linspace(0, end, size * size).cos().view(size, size).bfloat16() for end in (50, 70, 90))
    index, output = torch.empty(size + 1, dtype=torch.int64), torch.empty_like(rows)
    channels = torch.cat((up, down), dim=1).contiguous()
    tensors = (rows.data_ptr(), gate.data_ptr(), channels.data_ptr())
    found = kernels.sparse_ffn_layer(
        *tensors, None, count, size, size, count, size, 0.0, index.data_ptr(), output.data_ptr()
    )
    wide = rows.double()
    truth = (torch.nn.functional.silu(wide @ gate.double().T) * (wide @ up.double().T)) @ down.double()
    return found == size and bool((output.double() - truth).norm() < 1e-2 * truth.norm())


@cache
def load() -> tuple[ctypes.CDLL, dict[torch.dtype, tuple[int, ...]]] | None:
    """The library and the kernels that run here by dtype, the fastest last; or None. Builds it where it is missing.

    Called once per process; ``load.cache_clear()`` makes the next call look again.
    """
    if build.switched_off():
        return None
    try:
        kernels = _open()
        best = kernels.sparse_ffn_best()
        variants = {torch.float32: (_PORTABLE_FP32,), torch.bfloat16: tuple(range(_PORTABLE_BF16, best + 1))}
        for dtype, numbers in variants.items():
            if not all(_is_right(kernels, number, dtype) for number in numbers):
                raise RuntimeError(f"it computes wrong results in {dtype}")
        if TILES in variants[torch.bfloat16] and not _layer_is_right(kernels):
            raise RuntimeError("it computes wrong results for a whole layer")
    except (OSError, AttributeError, RuntimeError, subprocess.SubprocessError) as error:
        reason = build.reason(error)
    else:
        return kernels, variants
    _log.warning("the FFN kernel is unavailable, sparse FFNs run with torch operators: %s", reason)
    return None


def variants(dtype: torch.dtype) -> tuple[int, ...]:
    """Numbers of the kernels that run here for ``dtype``, the fastest last: 0 portable fp32, 1 portable bf16, 2 bf16
    dot products, 3 bf16 tiles. Empty where there is none."""
    loaded = load()
    return () if loaded is None else loaded[1].get(dtype, ())


def available(dtype: torch.dtype) -> bool:
    """Whether a kernel runs here for tensors of ``dtype`` on the CPU. The first call may build it (seconds)."""
    return bool(variants(dtype))


def ffn(rows: Tensor, activations: Tensor, channels: Tensor, index: Tensor, variant: int | None = None) -> Tensor:
    """Output of a gated feed-forward network from the chosen channels (METHOD section 3). No gradients.

    Sums are kept in fp32. In bf16 the products of activation and up are rounded once before they meet down.

    Args:
        rows: [n, hidden], bf16 or fp32, on the CPU.
        activations: [n, width], same dtype.
        channels: [width, 2 * hidden], same dtype, contiguous: row of up, column of down.
        index: [c], int64: the chosen channels. Only their rows of ``channels`` are read.
        variant: one of :func:`variants`; None takes the fastest.

    Returns:
        [n, hidden] in the dtype of ``rows``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        IndexError: a channel lies outside the width.
        RuntimeError: no kernel runs here for this dtype.
    """
    width = channels.shape[0]
    if channels.shape[1] != 2 * rows.shape[1] or activations.shape != (rows.shape[0], width) or index.dim() != 1:
        raise ValueError(
            f"shapes do not fit: rows {tuple(rows.shape)}, activations {tuple(activations.shape)}, "
            f"channels {tuple(channels.shape)}, index {tuple(index.shape)}"
        )
    if not rows.dtype == activations.dtype == channels.dtype or index.dtype != torch.int64:
        raise ValueError(f"dtypes do not fit: {rows.dtype}, {activations.dtype}, {channels.dtype}, {index.dtype}")
    if not (rows.is_cpu and activations.is_cpu and channels.is_cpu and index.is_cpu and channels.is_contiguous()):
        raise ValueError("the kernel takes CPU tensors and contiguous channels")
    loaded = load()
    known = () if loaded is None else loaded[1].get(rows.dtype, ())
    if loaded is None or not known or (variant is not None and variant not in known):
        raise RuntimeError(f"no such FFN kernel here for {rows.dtype}")
    chosen = known[-1] if variant is None else variant
    return _call(loaded[0], chosen, rows.contiguous(), activations.contiguous(), channels, index.contiguous())


def select(activations: Tensor, weights: Tensor | None, *, keep: int | None = None, threshold: float = 0.0) -> Tensor:
    """Channels by magnitude in one pass, in ascending order, so that their weights are read in order.

    Args:
        activations: [n, width], bf16 or fp32, on the CPU.
        weights: [n], fp32: magnitudes are the weighted sums over the rows; None takes their maximum.
        keep: number of channels, 1 to width; None keeps magnitudes of at least ``threshold`` instead.

    Returns:
        [c], int64, at least one.

    Raises:
        RuntimeError: no kernel runs here for this dtype.
    """
    loaded = load()
    if loaded is None or activations.dtype not in loaded[1]:
        raise RuntimeError(f"no FFN kernel here for {activations.dtype}")
    count, width = activations.shape
    activations = activations.contiguous()
    chosen = torch.empty(width + 1, dtype=torch.int64)
    found = loaded[0].sparse_ffn_select(
        0 if activations.dtype == torch.float32 else 1,
        activations.data_ptr(),
        None if weights is None else weights.contiguous().data_ptr(),
        count,
        width,
        0 if keep is None else keep,
        threshold,
        chosen.data_ptr(),
    )
    if found < 0:
        raise MemoryError(f"no memory to choose among {width} channels")
    return chosen[:found]


def whole_layer(gate: Tensor) -> bool:
    """Whether :func:`layer` runs here for this gate [width, hidden]."""
    width, hidden = gate.shape
    return gate.is_cpu and TILES in variants(gate.dtype) and width % 32 == 0 and hidden % 32 == 0


def layer(
    rows: Tensor,
    gate: Tensor,
    channels: Tensor,
    weights: Tensor | None,
    *,
    ranked: int,
    keep: int | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Gates, choice and chosen channels in one call (METHOD section 3).

    Args:
        rows: [n, hidden], bf16, on the CPU.
        gate: [width, hidden], bf16, contiguous, for which :func:`whole_layer` holds.
        channels: as in :func:`ffn`.
        weights, keep, threshold: as in :func:`select`; weights is [ranked].
        ranked: the first so many rows say which channels count.

    Returns:
        output [n, hidden], bf16, and the channels, as :func:`select` returns them.

    Raises:
        ValueError: shapes do not fit.
        RuntimeError: no such kernel here.
    """
    loaded = load()
    count, hidden = rows.shape
    width = gate.shape[0]
    if gate.shape[1] != hidden or channels.shape != (width, 2 * hidden) or not 0 < ranked <= count:
        raise ValueError(f"shapes do not fit: {tuple(rows.shape)}, {tuple(gate.shape)}, {tuple(channels.shape)}")
    if loaded is None or rows.dtype != gate.dtype or not whole_layer(gate):
        raise RuntimeError(f"no FFN layer kernel here for {rows.dtype} and {width} channels of {hidden}")
    rows, output = rows.contiguous(), torch.empty_like(rows)
    chosen = torch.empty(width + 1, dtype=torch.int64)
    found = loaded[0].sparse_ffn_layer(
        rows.data_ptr(),
        gate.data_ptr(),
        channels.data_ptr(),
        None if weights is None else weights.contiguous().data_ptr(),
        count,
        hidden,
        width,
        ranked,
        0 if keep is None else keep,
        threshold,
        chosen.data_ptr(),
        output.data_ptr(),
    )
    if found < 0:
        raise MemoryError(f"no memory for {count} rows of {width} channels")
    return output, chosen[:found]
