"""Mixture-of-experts layers with torch operators: the CPU path and the fall-back everywhere else.

A step of few tokens is bound by reading weights, so each expert of the union runs once, on all tokens, and the
element-wise part and the sums run once for all experts; a zero weight takes out the tokens that did not ask for it.
Many small experts lie side by side as one network: a kernel reads the union of it, and without one all is computed.
Prefill is bound by arithmetic: there the token-expert pairs are sorted by expert, and each expert runs on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparse.ops.moe import native
from sparse.ops.weights import FfnWeights, MoeWeights

PATH = "moe"
DENSE_PATH = "dense_moe.torch"
_FEW_ROWS = 16
"""Most tokens for which an expert runs on all of them."""
_FUSED_SHARE = 0.45
"""Share of the experts above which one product over all of them is faster than one product per expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedMoeWeights(MoeWeights):
    """A layer of many small experts that are also stored side by side, for steps that run most of them.

    Attributes:
        fused: the channels of all routed experts, expert by expert and equally many of each, then those of the shared
            one, as one network.
        channels: [fused channels, 3 * hidden], the same by channel: rows of gate and up and column of down.
    """

    fused: FfnWeights
    channels: Tensor


def path(weights: MoeWeights, union: int, rows: int) -> str:
    """Counter of a sparse call without a callback: how it runs ``union`` experts for ``rows`` tokens.

    ``simulated`` where the weights of the experts outside the union are read all the same.
    """
    form = _form(weights, union, rows)
    return f"{PATH}.simulated" if form == "fused" and union < len(weights.experts) else f"{PATH}.{form}"


def _form(weights: MoeWeights, union: int, rows: int) -> str:
    """How a call without a callback runs: one product over all experts (``fused``), a kernel that reads the union
    (``native``), or each expert of the union on ``all_rows`` or on its own (``by_expert``)."""
    few = rows <= _FEW_ROWS
    if isinstance(weights, FusedMoeWeights):
        channels = weights.channels
        if few and union < len(weights.experts) and channels.is_cpu and native.available(channels.dtype):
            return "native"
        if union > _FUSED_SHARE * len(weights.experts):
            return "fused"
    return "all_rows" if few else "by_expert"


def moe(
    rows: Tensor,
    combine: Tensor,
    weights: MoeWeights,
    expert: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """Weighted sum of the experts of each token, and the shared expert with weight 1 (METHOD section 4).

    An expert that no token runs is not touched, unless :func:`path` says simulated. Weights are applied before the down
    projection where that saves work, so experts must not have a bias there.

    Args:
        rows: [tokens, hidden].
        combine: [tokens, experts], fp32, zero where an expert does not run for a token.
        weights: of the layer.
        expert: replaces the computation of a routed expert: its number and the rows [n, hidden] of its tokens, in
            their order, to [n, hidden]. The shared expert is then left to the caller.

    Returns:
        [tokens, hidden] in the dtype of ``rows``.
    """
    used = (combine != 0).any(0).nonzero().view(-1)
    form = _form(weights, used.numel(), rows.shape[0]) if expert is None else "by_expert"
    if isinstance(weights, FusedMoeWeights) and form == "fused":
        return _fused(rows, combine, weights)
    if isinstance(weights, FusedMoeWeights) and form == "native":
        return native.run(rows, combine, weights.channels, weights.experts[0].width)
    if used.numel() == 0:
        output = torch.zeros_like(rows)
    elif form == "all_rows":
        output = _on_all_rows(rows, combine, weights, used)
    else:
        output = _by_expert(rows, combine, weights, expert)
    return output if weights.shared is None or expert is not None else output + _ffn(rows, weights.shared)


def _gated(both: Tensor) -> Tensor:
    """silu(gate) * up of a fused projection [..., 2 * width]."""
    gate, up = both.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def _ffn(rows: Tensor, weights: FfnWeights) -> Tensor:
    return weights.down(_gated(weights.gate_up(rows)))


def _fused(rows: Tensor, combine: Tensor, weights: FusedMoeWeights) -> Tensor:
    """All experts as one network; each routed expert's activations are scaled by its weight."""
    activations = _gated(weights.fused.gate_up(rows))
    experts, width = len(weights.experts), weights.experts[0].width
    activations[:, : experts * width].view(-1, experts, width).mul_(combine[:, :, None])
    return weights.fused.down(activations)


def _on_all_rows(rows: Tensor, combine: Tensor, weights: MoeWeights, used: Tensor) -> Tensor:
    """Each used expert on all rows; one element-wise pass and one sum for all of them."""
    experts = [weights.experts[number] for number in used.tolist()]
    activations = _gated(torch.stack([expert.gate_up(rows) for expert in experts]))
    activations.mul_(combine[:, used].t()[:, :, None])
    return torch.stack([expert.down(own) for expert, own in zip(experts, activations, strict=True)]).sum(0)


def _by_expert(
    rows: Tensor, combine: Tensor, weights: MoeWeights, expert: Callable[[int, Tensor], Tensor] | None
) -> Tensor:
    """Each used expert on its own rows; a token's results lie side by side and are summed in fp32."""
    runs = combine != 0
    numbers, tokens = runs.t().nonzero(as_tuple=True)
    place = (runs.cumsum(1) - 1)[tokens, numbers]
    counts = runs.sum(0).tolist()
    results = []
    for number, own in enumerate(torch.split(rows.index_select(0, tokens), counts)):
        if own.shape[0]:
            results.append(_ffn(own, weights.experts[number]) if expert is None else expert(number, own))
    weighted = torch.cat(results) * combine[tokens, numbers][:, None]
    summands = weighted.new_zeros(rows.shape[0], int(place.max()) + 1, rows.shape[1])
    summands[tokens, place] = weighted
    return summands.sum(1).to(rows.dtype)
