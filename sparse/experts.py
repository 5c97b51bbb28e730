"""From router logits to the experts that each token of a step runs (METHOD section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse.budget import MoeBudget
from sparse.ops.moe import native, routing
from sparse.ops.weights import MoeWeights
from sparse.tree import Tree, survival_weights

_FEW_ROWS = 64
"""Most tokens that the routing kernel takes: it runs on one core."""


@dataclass(frozen=True, slots=True)
class Restriction:
    """What a budget did to the routing of one layer and step, in token-expert pairs and in distinct experts.

    ``kept == wanted - skipped - dropped + freed``: a substituted expert takes the place of a lost one.

    Attributes:
        wanted: pairs of dense routing.
        kept: pairs that run.
        skipped: pairs that the rule took out, before any of them was freed.
        substituted: pairs that replace a pair outside the union budget.
        dropped: pairs outside the union budget without a replacement.
        freed: skipped pairs that run after all, because their expert is loaded anyway.
        union_dense: distinct experts of dense routing.
        union: distinct experts that run, so that their weights are read.
    """

    wanted: int
    kept: int
    skipped: int
    substituted: int
    dropped: int
    freed: int
    union_dense: int
    union: int


def probabilities(logits: Tensor) -> Tensor:
    """Softmax over the experts.

    Args:
        logits: [tokens, experts], any floating dtype.

    Returns:
        [tokens, experts], fp32, never exactly zero: a chosen expert is told from an idle one by its weight.
    """
    return torch.softmax(logits, dim=-1, dtype=torch.float32).clamp_min(torch.finfo(torch.float32).tiny)


def route(probabilities: Tensor, weights: MoeWeights) -> Tensor:
    """The model's own top-k routing.

    Args:
        probabilities: [tokens, experts], fp32, from :func:`probabilities`.
        weights: top_k, and how the weights of the chosen experts count.

    Returns:
        ``combine`` [tokens, experts], fp32, zero where an expert does not run for a token.
    """
    if probabilities.shape[0] <= _FEW_ROWS and native.routes(probabilities):
        return _native(probabilities, weights, probabilities.shape[1], 1.0)[0]
    return routing.route(probabilities, top_k=weights.top_k, normalise=weights.normalise, unit=weights.unit)


def restrict(
    probabilities: Tensor, weights: MoeWeights, budget: MoeBudget, layer: int, tree: Tree | None = None
) -> tuple[Tensor, Restriction]:
    """Routing under a budget: the rule per token, the budget on the union, then what is loaded anyway.

    The weights of a token's remaining experts are scaled to the sum that its dense top-k has; unit models count each
    remaining expert 1. Every token keeps at least one expert.

    Args:
        probabilities: [tokens, experts], fp32, from :func:`probabilities`; the tokens of one sequence, root first.
        weights: top_k, and how the weights of the chosen experts count.
        budget: what may be skipped.
        layer: decoder layer, for calibrated medians.
        tree: of the tokens, whose depth says how likely they survive; None for a chain.

    Returns:
        ``combine`` as in :func:`route`, and the counters.
    """
    plain = budget.rule == "dense" and budget.outside == "substitute"
    if plain and tree is None and budget.union is not None and native.routes(probabilities):
        limit = min(budget.union, probabilities.shape[1])
        combine, (wanted, kept, substituted, union_dense, union) = _native(
            probabilities, weights, limit, budget.survival
        )
        return combine, Restriction(wanted, kept, 0, substituted, wanted - kept, 0, union_dense, union)
    top = probabilities.topk(weights.top_k, dim=-1)
    dense = routing.mark(probabilities, top.indices)
    rule = routing.mark(probabilities, top.indices, _kept_by_rule(top.values, budget, layer))
    runs, inside = rule, rule
    if budget.union is not None and budget.union < probabilities.shape[1]:
        survival = survival_weights(probabilities.shape[0], budget.survival, probabilities.device, tree)
        loaded = routing.best_union(
            probabilities, dense, rule, limit=budget.union, normalise=weights.normalise, survival=survival
        )
        inside = rule & loaded
        runs = routing.inside_union(probabilities, rule, loaded, outside=budget.outside, top_k=weights.top_k)
    final = runs | (dense & runs.any(0)) if budget.free_loaded else runs
    masks = torch.stack((rule, inside, runs, final, dense))
    by_rule, remaining, running, kept, wanted = masks.sum((1, 2)).tolist()
    union, union_dense = masks[3:].any(1).sum(1).tolist()
    restriction = Restriction(
        wanted=wanted,
        kept=kept,
        skipped=wanted - by_rule,
        substituted=running - remaining,
        dropped=by_rule - running,
        freed=kept - running,
        union_dense=union_dense,
        union=union,
    )
    return routing.weigh(probabilities, final, dense, normalise=weights.normalise, unit=weights.unit), restriction


def _native(
    probabilities: Tensor, weights: MoeWeights, limit: int, survival: float
) -> tuple[Tensor, tuple[int, int, int, int, int]]:
    """Routing by the CPU kernel: ``combine``; pairs wanted, kept and substituted, experts wanted and run."""
    combine, counts = native.route(
        probabilities,
        top_k=weights.top_k,
        limit=limit,
        normalise=weights.normalise,
        unit=weights.unit,
        survival=survival,
    )
    wanted, kept, substituted, union_dense, union = counts
    return combine, (wanted, kept, substituted, union_dense, union)


def _kept_by_rule(values: Tensor, budget: MoeBudget, layer: int) -> Tensor | None:
    """Which of a token's experts, strongest first, the rule keeps: [tokens, top_k], bool; None for all of them."""
    top_k = values.shape[1]
    place = torch.arange(top_k, device=values.device)
    if budget.rule == "topk":
        return (place < budget.k).expand_as(values)
    share = values / values.sum(-1, keepdim=True)
    if budget.rule == "topp":
        return (share.cumsum(-1) - share < budget.p) | (place == 0)
    if budget.rule == "floor":
        return (share >= budget.weight_floor) | (place == 0)
    if budget.rule == "median_ratio" and top_k > 1:
        most = min(budget.m_max, top_k - 1)
        lowest = share.flip(-1).cumsum(-1)[:, :most]
        below = lowest < torch.tensor(budget.betas[layer][:most], dtype=share.dtype, device=share.device)
        skipped = (below * (place[:most] + 1)).amax(-1, keepdim=True)
        return place < top_k - skipped
    return None
