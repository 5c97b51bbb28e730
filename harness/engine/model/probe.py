"""Where an untimed pass looks into the step, or changes it: for analysis, calibration and ablation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparse.selection import Selection
from sparse.tree import Tree


@dataclass(frozen=True, slots=True)
class AttentionView:
    """One layer's attention of one row of the batch.

    Attributes:
        queries: [kv_heads, rows * groups, head_dim], scaled; the groups of a draft row stand together.
        keys, values: paged as in :mod:`sparse.ops.block_attention.eager`.
        start: positions before the step.
        length: positions with the step's own tokens.
        groups: query heads per KV head.
        summaries: block summaries by name, each [kv_heads, head_dim, blocks].
        tree: of the step's tokens; None for a chain.
        tail_start: position from which on everything is visible whatever is selected; an old selection has an old one.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    start: int
    length: int
    groups: int
    summaries: dict[str, Tensor]
    tree: Tree | None = None
    tail_start: int = 0


class Probe:
    """Every method is called once per layer and step and returns what the step goes on with; by itself a no-op."""

    def selection(self, layer: int, view: AttentionView, selection: Selection | None) -> Selection | None:
        """The blocks to attend to, None for all of them."""
        return selection

    def mixed(self, layer: int, output: Tensor) -> Tensor:
        """Attention output before the output projection, [tokens, heads, head_dim]."""
        return output

    def gated(self, layer: int, activations: Tensor) -> Tensor:
        """silu(gate(x)) of a dense FFN layer, [tokens, width]."""
        return activations

    def routed(self, layer: int, probabilities: Tensor, combine: Tensor) -> Tensor:
        """Weights of the routed experts, [tokens, experts], zero where an expert does not run."""
        return combine
