"""The one decoder layer of an EAGLE-3 head (arXiv 2503.01840) and its sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.engine.model.linear import make_linear
from sparse.ops.weights import LinearMap

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Scaled, rotated queries [..., n, heads, head_dim], rotated keys and values [..., n, kv_heads, head_dim] to the
mixed values [..., n, heads, head_dim]."""


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    """How Llama 3.1 stretches its rotary embedding: slow rates are divided by ``factor``, fast ones stay.

    Attributes:
        factor: what slow rates are divided by.
        low, high: turns within ``original`` positions, below which a rate is slow and above which it is fast.
        original: positions before stretching.
    """

    factor: float
    low: float
    high: float
    original: float

    def stretched(self, rates: Tensor) -> Tensor:
        """Rates in radians per position to those of the longer context, same shape."""
        turns = rates * (self.original / (2 * math.pi))
        share = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return rates * (share + (1 - share) / self.factor)


@dataclass(frozen=True, slots=True)
class Eagle3Shape:
    """Sizes of a head.

    Attributes:
        hidden: width of the head's states and of the token embeddings that it reads.
        features: width of the target features, three target layers side by side.
        heads, kv_heads, head_dim, ffn: of the decoder layer.
        vocab: of the target.
        draft_vocab: tokens that the head can propose.
        eps: of the norms.
        theta: base of the rotary embedding.
        rope: how the rotary embedding is stretched, if it is.
    """

    hidden: int
    features: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    draft_vocab: int
    eps: float = 1e-5
    theta: float = 10000.0
    rope: Llama3Rope | None = None


class PackedLinear(nn.Linear):
    """A linear map without bias that can run over packed weights.

    Args:
        inputs, outputs: widths.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self._packed: LinearMap | None = None

    def pack(self) -> None:
        """From now on use a packed copy of the weight, where packing is supported."""
        self._packed = make_linear(self.weight, packed=True)

    @property
    def map(self) -> LinearMap | None:
        """The map over the packed copy, None where there is none."""
        return self._packed

    def train(self, mode: bool = True) -> Self:
        """As in torch; the packed copy goes where the weight may change."""
        self._packed = None if mode else self._packed
        return super().train(mode)

    def forward(self, rows: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        if self._packed is None:
            return super().forward(rows)
        return self._packed(rows.reshape(-1, rows.shape[-1])).view(*rows.shape[:-1], -1)


class Norm(nn.Module):
    """Root mean square norm of the last dimension (arXiv 1910.07467).

    Args:
        size: of that dimension.
        eps: added to the mean square.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps = eps

    def forward(self, states: Tensor) -> Tensor:
        """[..., size] to the same shape."""
        return functional.rms_norm(states, self.weight.shape, self.weight, self._eps)


class _Attention(nn.Module):
    def __init__(self, shape: Eagle3Shape) -> None:
        super().__init__()
        self._shape = shape
        both, queries, keys = 2 * shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = PackedLinear(both, queries)
        self.k_proj = PackedLinear(both, keys)
        self.v_proj = PackedLinear(both, keys)
        self.o_proj = PackedLinear(queries, shape.hidden)

    def keys_values(self, both: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        size = self._shape.head_dim
        keys, values = self.k_proj(both).unflatten(-1, (-1, size)), self.v_proj(both).unflatten(-1, (-1, size))
        return _rotated(keys, cos, sin), values

    def forward(self, both: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        size = self._shape.head_dim
        queries = self.q_proj(both).unflatten(-1, (-1, size))
        mixed = attend(_rotated(queries, cos, sin) * size**-0.5, *self.keys_values(both, cos, sin))
        output: Tensor = self.o_proj(mixed.flatten(-2))
        return output


class _FeedForward(nn.Module):
    def __init__(self, shape: Eagle3Shape) -> None:
        super().__init__()
        self.gate_proj = PackedLinear(shape.hidden, shape.ffn)
        self.up_proj = PackedLinear(shape.hidden, shape.ffn)
        self.down_proj = PackedLinear(shape.ffn, shape.hidden)

    def forward(self, states: Tensor) -> Tensor:
        output: Tensor = self.down_proj(functional.silu(self.gate_proj(states)) * self.up_proj(states))
        return output


class Layer(nn.Module):
    """Attention over (token, state) pairs, then the feed-forward block, each added to the states.

    Args:
        shape: sizes.
    """

    def __init__(self, shape: Eagle3Shape) -> None:
        super().__init__()
        self.self_attn = _Attention(shape)
        self.mlp = _FeedForward(shape)
        self.input_layernorm = Norm(shape.hidden, shape.eps)
        self.hidden_norm = Norm(shape.hidden, shape.eps)
        self.post_attention_layernorm = Norm(shape.hidden, shape.eps)

    def both(self, embeddings: Tensor, states: Tensor) -> Tensor:
        """What attention reads of a pair: both parts [..., hidden], each normed, side by side, [..., 2 * hidden]."""
        return torch.cat((self.input_layernorm(embeddings), self.hidden_norm(states)), dim=-1)

    def forward(self, embeddings: Tensor, states: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """See ``Eagle3Head.forward``."""
        states = states + self.self_attn(self.both(embeddings, states), cos, sin, attend)
        output: Tensor = states + self.mlp(self.post_attention_layernorm(states))
        return output


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [..., n, heads, head_dim]."""
    return states * cos + states.roll(states.shape[-1] // 2, -1) * sin
