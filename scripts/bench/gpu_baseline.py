"""A strong dense step to compare with: the library's fused attention, plain cache, one CUDA graph for one context.

It knows everything that a captured step may know (context, batch and draft are fixed), so it copies nothing and waits
for nothing. The prefix is read by one fused attention call per layer, query heads and draft rows of a KV head side by
side; the step's own tokens are few and merged by their log-sum-exp. The attention to the prefix and the matrix products
are the library's kernels; what lies between them are separate operators of torch, as in our steps, whose own kernels
are attention, the choice of blocks, and experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparse.tree import Tree


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: Tensor
    ffn_norm: Tensor
    qkv: Tensor
    output: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    gate_up: Tensor
    down: Tensor
    router: Tensor | None
    top_k: int


class FlashStep:
    """A dense verification step over the tensors of a library model (Llama or Qwen3-MoE), before it is adapted.

    Args:
        model: of the library; the step keeps its tensors, so it may be given up afterwards.
        batch: sequences.
        context: positions before the step, the same for all.
        rows: tokens of each sequence.
        tree: of these tokens; None for a chain.

    Attributes:
        keys, values: [layers, batch, kv_heads, context, head_dim], to be filled by the caller.
    """

    @torch.inference_mode()
    def __init__(self, model: Any, batch: int, context: int, rows: int, tree: Tree | None = None) -> None:
        config = model.config
        self._heads, self._kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self._head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // self._heads)
        self._eps, self._batch, self._rows = float(config.rms_norm_eps), batch, rows
        self._embedding = model.model.embed_tokens.weight.detach()
        self._norm, self._head = model.model.norm.weight.detach(), model.lm_head.weight.detach()
        self._layers = [_layer(layer) for layer in model.model.layers]
        device, dtype = self._embedding.device, self._embedding.dtype
        size = (len(self._layers), batch, self._kv_heads, context, self._head_dim)
        self.keys = torch.empty(size, device=device, dtype=dtype)
        self.values = torch.empty(size, device=device, dtype=dtype)
        depths = torch.arange(rows, device=device) if tree is None else tree.depths.to(device)
        cos, sin = model.model.rotary_emb(self._embedding[:1], (context + depths)[None])
        half = self._head_dim // 2
        self._cos = cos[0][None, :, None].to(dtype)
        self._sin = torch.cat((-sin[0, :, :half], sin[0, :, half:]), -1)[None, :, None].to(dtype)
        visible = torch.ones(rows, rows, dtype=torch.bool, device=device).tril()
        if tree is not None:
            visible = tree.visible.to(device)
        hidden = torch.zeros(rows, rows, device=device).masked_fill(~visible, float("-inf"))
        self._mask = hidden.repeat(self._heads // self._kv_heads, 1)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits [batch * rows, vocab] after ``tokens`` [batch * rows], int64, on the device; nothing is stored."""
        hidden = functional.embedding(tokens, self._embedding)
        for number, layer in enumerate(self._layers):
            hidden = hidden + self._attend(number, layer, self._normed(hidden, layer.attention_norm))
            hidden = hidden + _feed_forward(layer, self._normed(hidden, layer.ffn_norm))
        return functional.linear(self._normed(hidden, self._norm), self._head)

    def _attend(self, number: int, layer: _Layer, states: Tensor) -> Tensor:
        batch, rows, heads, kv_heads = self._batch, self._rows, self._heads, self._kv_heads
        joined = functional.linear(states, layer.qkv).view(batch, rows, -1, self._head_dim)
        queries, keys, values = torch.split(joined, [heads, kv_heads, kv_heads], dim=2)
        if layer.query_norm is not None and layer.key_norm is not None:
            queries, keys = self._normed(queries, layer.query_norm), self._normed(keys, layer.key_norm)
        queries, keys = (
            torch.addcmul(one * self._cos, one.roll(self._head_dim // 2, -1), self._sin) for one in (queries, keys)
        )
        grouped = (queries * self._head_dim**-0.5).view(batch, rows, kv_heads, -1, self._head_dim)
        grouped = grouped.permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, self._head_dim)
        before, log = prefix_attention(grouped, self.keys[number], self.values[number])
        scores = (grouped @ keys.permute(0, 2, 3, 1)).float() + self._mask
        own_log = scores.logsumexp(-1)
        own = (scores - own_log[..., None]).exp().to(values.dtype) @ values.transpose(1, 2)
        mixed = torch.lerp(before, own, torch.sigmoid(own_log - log)[..., None].to(own.dtype))
        mixed = mixed.view(batch, kv_heads, -1, rows, self._head_dim).permute(0, 3, 1, 2, 4)
        return functional.linear(mixed.reshape(batch * rows, -1), layer.output)

    def _normed(self, states: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(states, weight.shape, weight, self._eps)


def prefix_attention(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Full attention of scaled queries [batch, heads, n, head_dim] to keys and values [batch, heads, length, head_dim].

    Returns:
        The mixed values [batch, heads, n, head_dim], and the log-sum-exp of the scores [batch, heads, n], fp32.
    """
    if keys.device.type == "cuda":
        found = torch.ops.aten._scaled_dot_product_flash_attention(queries, keys, values, 0.0, False, False, scale=1.0)
    else:
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        found = operator(queries, keys, values, 0.0, False, scale=1.0)
    return found[0], found[1]


def _layer(layer: Any) -> _Layer:
    """Tensors of one decoder layer, the projections of the attention joined, those of a dense FFN too."""
    attention, mlp = layer.self_attn, layer.mlp
    experts = getattr(mlp, "experts", None)
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    if experts is None:
        gate_up, down = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)), mlp.down_proj.weight
    else:
        gate_up, down = experts.gate_up_proj, experts.down_proj
    return _Layer(
        attention_norm=layer.input_layernorm.weight.detach(),
        ffn_norm=layer.post_attention_layernorm.weight.detach(),
        qkv=torch.cat([one.weight for one in (attention.q_proj, attention.k_proj, attention.v_proj)]).detach(),
        output=attention.o_proj.weight.detach(),
        query_norm=None if norms[0] is None else norms[0].weight.detach(),
        key_norm=None if norms[1] is None else norms[1].weight.detach(),
        gate_up=gate_up.detach(),
        down=down.detach(),
        router=None if experts is None else mlp.gate.weight.detach(),
        top_k=0 if experts is None else int(mlp.gate.top_k),
    )


def _feed_forward(layer: _Layer, rows: Tensor) -> Tensor:
    """A dense FFN; or all experts on all rows, since a large tree reads nearly all of them anyway."""
    if layer.router is None:
        gate, up = functional.linear(rows, layer.gate_up).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * up, layer.down)
    shares = functional.linear(rows, layer.router).softmax(-1, dtype=torch.float32)
    best = shares.topk(layer.top_k, dim=-1)
    combine = torch.zeros_like(shares).scatter(1, best.indices, best.values / best.values.sum(-1, keepdim=True))
    gate, up = torch.matmul(rows, layer.gate_up.transpose(1, 2)).chunk(2, dim=-1)
    inner = functional.silu(gate) * up * combine.t()[:, :, None].to(rows.dtype)
    return torch.matmul(inner, layer.down.transpose(1, 2)).sum(0)
