"""Linear maps of the step: plain, or with weights packed once for our kernels or the CPU's matrix library."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from sparse.ops.decoder_layer import native
from sparse.ops.weights import LinearMap

_PACK_ROWS = 8
"""Row count that packing is tuned for: a verification step of a short chain."""


@cache
def packing_supported(dtype: torch.dtype) -> bool:
    """Whether this build of torch offers packed CPU weights for ``dtype`` and computes them right.

    The operators are private to torch, so they are tried on a small product instead of trusted by version.
    """
    if dtype is not torch.bfloat16 or not torch._C._has_mkldnn:
        return False
    weight = torch.linspace(-1, 1, 64 * 32).view(64, 32).to(dtype)
    rows = torch.linspace(-1, 1, 3 * 32).view(3, 32).to(dtype)
    try:
        packed = pack(weight, None)(rows)
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
    expected = rows.float() @ weight.float().T
    return bool(((packed.float() - expected).norm() / expected.norm()).item() < 1e-2)


def pack(weight: Tensor, bias: Tensor | None) -> LinearMap:
    """Linear map over a packed copy of ``weight`` [outputs, inputs]."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_ROWS)
    operator = torch.ops.mkldnn._linear_pointwise.default

    def packed_linear(rows: Tensor) -> Tensor:
        output: Tensor = operator(rows, packed, bias, "none", [], "")
        return output

    return packed_linear


def plain(weight: Tensor, bias: Tensor | None) -> LinearMap:
    """Linear map over ``weight`` [outputs, inputs] as it is."""

    def plain_linear(rows: Tensor) -> Tensor:
        return functional.linear(rows, weight, bias)

    return plain_linear


def make_linear(weight: Tensor, bias: Tensor | None = None, *, packed: bool = False, paired: bool = False) -> LinearMap:
    """A linear map that no longer refers to the module it came from.

    Args:
        weight: [outputs, inputs].
        bias: [outputs] or None.
        packed: pack the weight for our kernels, or where these do not run for torch's matrix library, where it
            supports that; elsewhere the plain product runs.
        paired: the outputs are gate and up, which our kernels then compute side by side.
    """
    weight = weight.detach()
    bias = None if bias is None else bias.detach()
    if packed and weight.device.type == "cpu":
        if native.available(weight.dtype):
            return native.PackedLinear(weight, bias, paired=paired)
        if packing_supported(weight.dtype):
            return pack(weight, bias)
    return plain(weight.contiguous(), bias)
