"""Bytes and FLOPs of verification steps from shapes and the selections really made (METHOD section 7).

The counts are the least traffic that steps need: each weight, key and value once. A measured time beside
bytes / bandwidth says how far an implementation is from its limit.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparse.budget import AttentionBudget
from sparse.trace import Trace


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder-only transformer.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim, vocab: the usual sizes.
        ffn: channels of a dense FFN layer.
        itemsize: bytes per weight and per cached key or value.
        experts: routed experts of an MoE layer; 0 in a dense model, as all that follow.
        top_k: routed experts per token.
        expert_ffn: channels of a routed expert.
        shared_ffn: channels of the shared experts together.
        moe_layers: layers with routed experts; the others have a dense FFN.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    itemsize: int
    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    moe_layers: int = 0

    @property
    def fixed_weights(self) -> int:
        """Weights that every step reads whatever is sparse: attention projections, routers and the output head."""
        attention = self.layers * self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + self.hidden * (self.moe_layers * self.experts + self.vocab)

    @property
    def channels(self) -> int:
        """FFN channels of the whole model, all experts included."""
        moe = self.moe_layers * (self.experts * self.expert_ffn + self.shared_ffn)
        return (self.layers - self.moe_layers) * self.ffn + moe

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights but the embedding."""
        return self.itemsize * (self.fixed_weights + 3 * self.hidden * self.channels)

    @property
    def kv_bytes_per_token(self) -> int:
        """Cache bytes of one position over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.itemsize


def trace_bytes(shape: ModelShape, budget: AttentionBudget, trace: Trace) -> float:
    """Least bytes that the traced steps read.

    Args:
        shape: the model.
        budget: says which summaries, or for the oracle which keys, the selector reads.
        trace: of all steps.
    """
    per_position = shape.kv_heads * shape.head_dim
    scored = budget.block_size if budget.score == "oracle" else len(budget.summaries)
    elements = trace.steps * shape.fixed_weights
    elements += 2 * per_position * trace.attended.total() + scored * per_position * trace.scored
    elements += shape.hidden * (trace.gates + 2 * trace.channels.total())
    return float(shape.itemsize * elements)


def trace_flops(shape: ModelShape, trace: Trace) -> float:
    """Floating-point operations of the traced steps, selection left out."""
    linear = trace.rows * shape.fixed_weights + shape.hidden * (trace.gate_products + 2 * trace.channel_products)
    return float(2 * linear + 4 * shape.heads * shape.head_dim * trace.attention_products)
