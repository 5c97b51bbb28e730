"""The truth for sparse feed-forward networks: every channel in fp64, the dropped ones masked. Slow on purpose."""

from __future__ import annotations

from torch import Tensor


def ffn(rows: Tensor, gate: Tensor, up: Tensor, down: Tensor, mask: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)) over the kept channels only (METHOD section 3).

    Args:
        rows: [n, hidden].
        gate, up: [width, hidden].
        down: [hidden, width].
        mask: [n, width], bool: the channels that each row keeps.

    Returns:
        [n, hidden] in fp64.
    """
    gated = rows.double() @ gate.double().T
    activations = gated / (1 + (-gated).exp())
    inner = (activations * (rows.double() @ up.double().T)).masked_fill(~mask, 0.0)
    return inner @ down.double().T
