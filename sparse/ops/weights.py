"""Weights of feed-forward and mixture-of-experts layers, as the operators take them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

LinearMap = Callable[[Tensor], Tensor]
"""[rows, inputs] to [rows, outputs]."""


@dataclass(frozen=True, slots=True)
class FfnWeights:
    """A gated feed-forward network, down(silu(gate(x)) * up(x)); an expert is one too.

    Attributes:
        width: channels.
        gate_up: fused gate and up projection, gate first: [rows, hidden] to [rows, 2 * width].
        down: down projection: [rows, width] to [rows, hidden].
        gate: gate projection alone, or None where only the dense path was prepared.
        channels: [width, 2 * hidden], each channel's row of up and column of down side by side, so that a chosen
            channel is one contiguous read; or None where only the dense path was prepared.
        gate_rows: [width, hidden], the gate projection's weights for kernels that compute a whole layer, or None.
    """

    width: int
    gate_up: LinearMap
    down: LinearMap
    gate: LinearMap | None = None
    channels: Tensor | None = None
    gate_rows: Tensor | None = None


@dataclass(frozen=True, slots=True)
class MoeWeights:
    """A mixture-of-experts layer.

    Attributes:
        router: [rows, hidden] to [rows, experts], logits.
        experts: routed experts.
        shared: an expert that always runs, with weight 1; or None.
        top_k: routed experts per token.
        normalise: the weights of a token's experts are divided by their sum.
        unit: every chosen expert counts 1, whatever its weight; the weights only rank (carved models).
        stacked: weights of the routed experts for kernels on a GPU, gate and up [experts, 2 * width, hidden], gate
            first, and down [experts, hidden, width]; or None.
    """

    router: LinearMap
    experts: tuple[FfnWeights, ...]
    shared: FfnWeights | None
    top_k: int
    normalise: bool
    unit: bool = False
    stacked: tuple[Tensor, Tensor] | None = None
