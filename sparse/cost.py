"""Bytes and FLOPs of a verification step from shapes and the selection really made (METHOD section 7).

The counts are the least traffic a step needs: each weight, key and value once. A measured time beside
bytes / bandwidth says how far an implementation is from its limit.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparse.budget import AttentionBudget


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a dense decoder-only transformer.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim, ffn, vocab: the usual sizes.
        itemsize: bytes per weight and per cached key or value.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    itemsize: int

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's linear maps."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.ffn

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights that one step reads: the layers and the output head."""
        return self.itemsize * (self.layers * self.layer_weights + self.hidden * self.vocab)

    @property
    def kv_bytes_per_token(self) -> int:
        """Cache bytes of one position over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.itemsize


def selector_bytes(shape: ModelShape, budget: AttentionBudget, layers: int, blocks: int) -> int:
    """Bytes that scoring reads: the block summaries of ``layers`` layers."""
    per_block = len(budget.summaries) * shape.kv_heads * shape.head_dim * shape.itemsize
    return layers * blocks * per_block


def step_bytes(shape: ModelShape, attended: float, selector: int = 0) -> float:
    """Least bytes of one step.

    Args:
        shape: the model.
        attended: positions read per layer, averaged over the layers.
        selector: bytes of the selector, from :func:`selector_bytes`.
    """
    return shape.weight_bytes + shape.kv_bytes_per_token * attended + selector


def step_flops(shape: ModelShape, rows: int, attended: float) -> float:
    """Floating-point operations of one step of ``rows`` tokens that attend to ``attended`` positions per layer."""
    linear = 2 * rows * (shape.layers * shape.layer_weights + shape.hidden * shape.vocab)
    attention = 4 * rows * shape.layers * shape.heads * shape.head_dim * attended
    return float(linear + attention)
