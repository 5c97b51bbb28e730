"""The truth for mixture-of-experts layers: token by token and expert by expert in fp64. Slow and obvious on purpose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Matrices:
    """Plain weights of one expert: ``gate`` and ``up`` [width, hidden], ``down`` [hidden, width]."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def apply(self, row: Tensor) -> Tensor:
        """down(silu(gate(x)) * up(x)) of one row [hidden], in fp64."""
        row = row.double()
        return self.down.double() @ (functional.silu(self.gate.double() @ row) * (self.up.double() @ row))


def moe(rows: Tensor, combine: Tensor, experts: list[Matrices], shared: Matrices | None = None) -> Tensor:
    """Weighted sum of the experts of each token, and the shared expert with weight 1 (METHOD section 4).

    Args:
        rows: [tokens, hidden].
        combine: [tokens, experts], zero where an expert does not run for a token.
        experts: one per column of ``combine``.
        shared: an expert that runs for every token, or None.

    Returns:
        [tokens, hidden] in fp64.
    """
    output = torch.zeros(rows.shape, dtype=torch.float64)
    for token in range(rows.shape[0]):
        if shared is not None:
            output[token] += shared.apply(rows[token])
        for number, expert in enumerate(experts):
            weight = float(combine[token, number])
            if weight != 0:
                output[token] += weight * expert.apply(rows[token])
    return output
