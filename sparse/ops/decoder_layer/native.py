"""Halves of a decoder layer for the few rows of a step as CPU kernels (METHOD sections 1 and 2).

One call runs the halves of as many layers as follow each other: norm, projections, rotation, storing, choice of
blocks, attention and output map; norm and feed-forward network; with no operator dispatched in between. Weights are
packed in the order in which they are read. What a row gets does not depend on the rows beside it: chains of different
lengths agree bit by bit.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparse.ops.decoder_layer import structures
from sparse.ops.native import build

_SOURCES = (
    *("native.cpp", "sparse_half.h", "stages.h", "tiled.h", "portable.h", "team.h", "types.h"),
    *("../sparse_ffn/native.h", "../sparse_ffn/native_bf16.h", "../sparse_ffn/native_choice.h"),
)
_FORMATS = {torch.float32: 0, torch.bfloat16: 1}
PAGE = 256
"""Positions per page of the caches that the kernels read."""
TILE_ROWS = 16
"""Rows are multiplied sixteen at a time; a head's queries are padded to a multiple."""
PROJECT, MIX = 1, 2
"""Parts of the attention half."""

_log = logging.getLogger(__name__)


class PackedLinear:
    """A linear map whose weights are packed for the kernels; callable like any other.

    Args:
        weight: [outputs, inputs], bf16 or fp32, on the CPU.
        bias: [outputs] or None.
        paired: the outputs are two halves, gate and up, whose columns are computed side by side.

    Attributes:
        weights: the packed weights.
        outputs: columns.
        paired: as given; false where the halves are no multiple of 16.
        address: of the structure that the kernels take.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, paired: bool = False) -> None:
        outputs, inputs = weight.shape
        self.outputs, self.inputs, self.dtype = outputs, inputs, weight.dtype
        self.paired = paired and outputs % 32 == 0
        if self.paired:
            grouped = weight.view(2, -1, 16, inputs).transpose(0, 1)
        else:
            grouped = functional.pad(weight, (0, 0, 0, -outputs % 32)).view(-1, 2, 16, inputs)
        groups = grouped.shape[0]
        if weight.dtype == torch.bfloat16:
            grouped = functional.pad(grouped, (0, -inputs % 32)).view(groups, 2, 16, -1, 16, 2)
            self.weights = grouped.permute(0, 3, 1, 4, 2, 5).contiguous()
        else:
            self.weights = grouped.permute(0, 3, 1, 2).contiguous()
        self._bias = None if bias is None else bias.float().contiguous()
        stride, pair = (16, outputs // 2) if self.paired else (32, 16)
        pointers = (self.weights.data_ptr(), None if self._bias is None else self._bias.data_ptr())
        self._matrix = structures.Matrix(*pointers, inputs, outputs, groups, stride, pair)
        self.address = ctypes.addressof(self._matrix)

    def __call__(self, rows: Tensor) -> Tensor:
        return linear(self, rows)


def linear(packed: PackedLinear, rows: Tensor, norm: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """The map's outputs, of RMS-normed rows where ``norm`` is given.

    Args:
        packed: the map.
        rows: [n, inputs] in the map's dtype, on the CPU.
        norm: RMSNorm weight [inputs], or None.
        eps: of the norm.

    Returns:
        [n, outputs].

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if rows.dtype != packed.dtype or rows.dim() != 2 or rows.shape[1] != packed.inputs:
        raise ValueError(f"rows {tuple(rows.shape)} in {rows.dtype} do not fit {packed.inputs} inputs, {packed.dtype}")
    rows = rows.contiguous()
    output = rows.new_empty(rows.shape[0], packed.outputs)
    if not rows.shape[0]:
        return output
    pointer = None if norm is None else norm.data_ptr()
    _check(
        _kernels().decoder_layer_linear(
            _FORMATS[rows.dtype], packed.address, pointer, eps, rows.data_ptr(), rows.shape[0], output.data_ptr()
        )
    )
    return output


class AttentionLayer:
    """What never changes of a layer's attention half: hidden += output(attention(norm(hidden))).

    Args:
        norm: RMSNorm weight [hidden].
        qkv, output: projections; query heads first, then key heads, then value heads.
        query_norm, key_norm: RMSNorm weights of each head [head_dim], or None.
        cos, sin: rotary tables [positions, 1, head_dim]; ``sin`` carries the sign of the rotated half.
        heads, kv_heads: query heads and KV heads.
        eps, scale: of the norms, and of the queries.
        beside_norm: RMSNorm weight [hidden] of the rows that are projected beside the hidden states, which stand before
            them among the inputs of ``qkv``; None where there are none.

    Attributes:
        address: of the structure that the kernels take.

    Raises:
        ValueError: sizes do not fit.
    """

    def __init__(
        self,
        norm: Tensor,
        qkv: PackedLinear,
        output: PackedLinear,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        *,
        heads: int,
        kv_heads: int,
        eps: float,
        scale: float,
        beside_norm: Tensor | None = None,
    ) -> None:
        hidden, head_dim = norm.shape[0], cos.shape[-1]
        inputs = hidden if beside_norm is None else 2 * hidden
        mixed = heads * head_dim
        if (qkv.inputs, qkv.outputs) != (inputs, mixed + 2 * kv_heads * head_dim):
            raise ValueError(f"a projection of {qkv.inputs} to {qkv.outputs} does not fit {hidden} and {heads} heads")
        if (output.inputs, output.outputs) != (mixed, hidden):
            raise ValueError(f"an output map of {output.inputs} to {output.outputs} does not fit {mixed} and {hidden}")
        self._kept = (norm, beside_norm, qkv, output, query_norm, key_norm, cos, sin)
        beside, *norms = (None if one is None else one.data_ptr() for one in (beside_norm, query_norm, key_norm))
        pointers = (norm.data_ptr(), beside, qkv.address, output.address, *norms, cos.data_ptr(), sin.data_ptr())
        self._layer = structures.Attention(*pointers, norm.shape[0], heads, kv_heads, cos.shape[-1], eps, scale)
        self.address = ctypes.addressof(self._layer)


class FeedForwardLayer:
    """A layer's feed-forward half: hidden += down(silu(gate(x)) * up(x)) with x = norm(hidden).

    Args:
        norm: RMSNorm weight [hidden].
        gate_up: paired, gate first.
        down: [width] to [hidden].
        eps: of the norm.

    Attributes:
        address: of the structure that the kernels take.

    Raises:
        ValueError: ``gate_up`` is not paired, or sizes do not fit.
    """

    def __init__(self, norm: Tensor, gate_up: PackedLinear, down: PackedLinear, eps: float) -> None:
        if not gate_up.paired or gate_up.outputs != 2 * down.inputs or gate_up.inputs != down.outputs:
            raise ValueError("the gate and up projections are not packed as a pair that fits the down projection")
        self._kept = (norm, gate_up, down)
        self._layer = structures.FeedForward(norm.data_ptr(), gate_up.address, down.address, eps)
        self.address = ctypes.addressof(self._layer)


class SparseFeedForwardLayer:
    """A layer's feed-forward half with chosen channels: all gates, up and down of the chosen ones (METHOD section 3).

    Args:
        norm: RMSNorm weight [hidden].
        gate: [hidden] to [width], without bias.
        channels: [width, 2 * hidden], contiguous: row of up and column of down of each channel.
        eps: of the norm.

    Attributes:
        address: of the structure that the kernels take.
        width: channels.
    """

    def __init__(self, norm: Tensor, gate: PackedLinear, channels: Tensor, eps: float) -> None:
        self._kept = (norm, gate, channels)
        self.width = channels.shape[0]
        pointers = (norm.data_ptr(), gate.address, channels.data_ptr())
        self._layer = structures.SparseFeedForward(*pointers, norm.shape[0], self.width, eps)
        self.address = ctypes.addressof(self._layer)


class Jobs:
    """Halves of layers waiting to be run together, so that nothing is dispatched in between."""

    def __init__(self) -> None:
        self._jobs: list[Any] = []
        self._kept: list[Any] = []

    def __len__(self) -> int:
        return len(self._jobs)

    def attend(
        self,
        layer: AttentionLayer,
        segments: Any,
        *,
        block_size: int,
        score: str = "mean",
        every_row: bool = False,
        reduce_max: bool = False,
        parts: int = PROJECT | MIX,
        beside: Tensor | None = None,
        keep: Sequence[Any] = (),
    ) -> None:
        """Add an attention half; keys and values enter the cache.

        Args:
            layer: whose.
            segments: array of :data:`structures.Segment`, one per sequence, which own the tokens in order.
            block_size: positions per block, where segments attend to chosen blocks.
            score: of :data:`structures.SCORES`, what the kernel judges blocks by, for segments that have summaries.
            every_row: a block counts by the best score of all tokens, instead of that of the first token or, where the
                segment has ``shares``, of the tokens' sum.
            reduce_max: scores of query heads that share a KV head count by their maximum instead of their mean.
            parts: :data:`PROJECT` leaves the queries in the segments, :data:`MIX` goes on from there.
            beside: [tokens, hidden], contiguous: rows projected beside the hidden states, where the layer has a norm
                for them.
            keep: what the segments point at and must live until the jobs have run.
        """
        self._jobs.append(
            structures.Job(
                attention=layer.address,
                segments=ctypes.addressof(segments),
                beside=None if beside is None else beside.data_ptr(),
                number=len(segments),
                parts=parts,
                block_size=block_size,
                score=structures.SCORES.index(score),
                every_row=every_row,
                reduce_max=reduce_max,
            )
        )
        self._kept.append((layer, segments, beside, keep))

    def feed_forward(self, layer: FeedForwardLayer) -> None:
        """Add a feed-forward half."""
        self._jobs.append(structures.Job(feed_forward=layer.address))
        self._kept.append((layer,))

    def sparse_feed_forward(
        self,
        layer: SparseFeedForwardLayer,
        *,
        ranked: int,
        survival: Tensor | None = None,
        keep: int | None = None,
        threshold: float = 0.0,
    ) -> Tensor:
        """Add a feed-forward half whose channels the kernel chooses.

        Args:
            layer: whose.
            ranked: the first so many tokens say which channels count.
            survival: [ranked], fp32: magnitudes are the sums over these tokens with these weights; None takes their
                maximum.
            keep: number of channels, 1 to width; None keeps magnitudes of at least ``threshold`` instead.
            threshold: smallest magnitude.

        Returns:
            [2 + width], int64: once the jobs have run, the number of chosen channels, then these, ascending.
        """
        chosen = torch.empty(2 + layer.width, dtype=torch.int64)
        survival = None if survival is None else survival.contiguous()
        self._jobs.append(
            structures.Job(
                sparse=layer.address,
                survival=None if survival is None else survival.data_ptr(),
                chosen=chosen.data_ptr(),
                ranked=ranked,
                keep=keep or 0,
                threshold=threshold,
            )
        )
        self._kept.append((layer, survival, chosen))
        return chosen

    def run(self, hidden: Tensor, seconds: Any = None) -> None:
        """Run all of them in their order, and forget them.

        Args:
            hidden: [tokens, hidden], contiguous, changed in place.
            seconds: array of doubles from :func:`structures.stage_seconds` to add to; or None.

        Raises:
            MemoryError: no memory for the working set.
        """
        jobs, kept = (structures.Job * len(self._jobs))(*self._jobs), list(self._kept)
        self._jobs.clear()
        self._kept.clear()
        kernels, pointer = _kernels(), hidden.data_ptr()
        _check(kernels.decoder_layer_run(_FORMATS[hidden.dtype], jobs, len(jobs), hidden.shape[0], pointer, seconds))
        kept.clear()


def fits(head_dim: int, dtype: torch.dtype, page: int) -> bool:
    """Whether the attention kernel handles heads of this size and pages of ``page`` positions."""
    return page == PAGE and head_dim <= 512 and head_dim % (32 if dtype == torch.bfloat16 else 2) == 0


def padded_rows(rows: int) -> int:
    """Rows that a head's queries take in :data:`structures.Segment`.queries, for ``rows`` tokens times query heads."""
    return -(-rows // TILE_ROWS) * TILE_ROWS


def available(dtype: torch.dtype) -> bool:
    """Whether the kernels run here in ``dtype``; the first call may build them (seconds)."""
    return dtype in _formats()


def _kernels() -> ctypes.CDLL:
    loaded = _load()
    if loaded is None:
        raise RuntimeError("no kernels for decoder layers here")
    return loaded


def _check(status: int) -> None:
    if status == 3:
        raise MemoryError("no memory for the working set of a decoder layer")
    if status:
        raise RuntimeError("the kernels for decoder layers do not run on this CPU")


@cache
def _load() -> ctypes.CDLL | None:
    """The library with the types of its functions, or None. Builds it where it is missing."""
    if build.switched_off():
        return None
    try:
        kernels = build.open_library("decoder_layer", Path(__file__).parent, _SOURCES)
        kernels.decoder_layer_run.argtypes = structures.RUN
        kernels.decoder_layer_linear.argtypes = structures.LINEAR
    except (OSError, AttributeError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        _log.warning("the kernels for decoder layers are unavailable, torch runs instead: %s", build.reason(error))
        return None
    return kernels


@cache
def _formats() -> Sequence[torch.dtype]:
    """Formats whose linear map of a small problem is right."""
    if _load() is None:
        return ()
    return tuple(dtype for dtype in _FORMATS if _is_right(dtype))


def _is_right(dtype: torch.dtype) -> bool:
    """Whether linear maps of a few and of many rows, and a feed-forward half, agree with the same in fp64."""
    weight = torch.linspace(-9, 9, 64 * 50).sin().view(64, 50).to(dtype)
    bias, down = torch.linspace(-1, 1, 64).to(dtype), torch.linspace(-5, 5, 50 * 32).cos().view(50, 32).to(dtype)
    hidden = torch.linspace(-3, 3, 20 * 50).cos().view(20, 50).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    try:
        for rows in (5, 20):
            wide = hidden[:rows].double()
            found = PackedLinear(weight, bias)(hidden[:rows]).double()
            if not (found - (truth := wide @ weight.double().T + bias.double())).norm() < tolerance * truth.norm():
                return False
            changed, jobs = hidden[:rows].clone(), Jobs()
            norm = torch.ones(50, dtype=dtype)
            jobs.feed_forward(FeedForwardLayer(norm, PackedLinear(weight, paired=True), PackedLinear(down), 1e-5))
            jobs.run(changed)
            both = functional.rms_norm(wide, (50,), eps=1e-5) @ weight.double().T
            truth = wide + (functional.silu(both[:, :32]) * both[:, 32:]) @ down.double().T
            if not (changed.double() - truth).norm() < tolerance * truth.norm():
                return False
    except RuntimeError:
        return False
    return True
