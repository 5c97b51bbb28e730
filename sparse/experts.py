"""From router logits to the experts that each token of a step runs (METHOD section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse.budget import MoeBudget
from sparse.ops.moe import native
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
    dense = _mark(probabilities, probabilities.topk(weights.top_k, dim=-1).indices)
    if weights.unit:
        return dense.to(probabilities.dtype)
    chosen = probabilities * dense
    return chosen / chosen.sum(-1, keepdim=True) if weights.normalise else chosen


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
    dense = _mark(probabilities, top.indices)
    rule = _mark(probabilities, top.indices, _kept_by_rule(top.values, budget, layer))
    runs, inside = rule, rule
    if budget.union is not None and budget.union < probabilities.shape[1]:
        loaded = _loaded(probabilities, dense, rule, weights, budget, tree)
        inside = rule & loaded
        runs = _inside_union(probabilities, rule, inside, loaded, budget.outside, weights.top_k)
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
    return _weigh(probabilities, final, dense, weights), restriction


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


def _mark(probabilities: Tensor, experts: Tensor, keep: Tensor | None = None) -> Tensor:
    """[tokens, experts], bool: true at ``experts`` [tokens, k] where ``keep`` [tokens, k] is (None: everywhere)."""
    marked = torch.zeros_like(probabilities, dtype=torch.bool)
    return marked.scatter_(1, experts, True) if keep is None else marked.scatter_(1, experts, keep)


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


def _loaded(
    probabilities: Tensor, dense: Tensor, rule: Tensor, weights: MoeWeights, budget: MoeBudget, tree: Tree | None
) -> Tensor:
    """[experts], bool: the best ``budget.union`` of the experts that a token still wants."""
    assert budget.union is not None
    survival = survival_weights(probabilities.shape[0], budget.survival, probabilities.device, tree)[:, None]
    if weights.normalise:
        survival = survival / (probabilities * dense).sum(-1, keepdim=True)
    wanted = rule.any(0)
    score = (probabilities * rule * survival).sum(0).masked_fill_(~wanted, -1.0)
    best = torch.zeros_like(wanted).scatter_(0, score.topk(budget.union).indices, True)
    return best & wanted


def _inside_union(
    probabilities: Tensor, rule: Tensor, inside: Tensor, loaded: Tensor, outside: str, top_k: int
) -> Tensor:
    """Pairs that run when only ``loaded`` experts [experts] may: those inside, and the substitutes of the others."""
    target = rule.sum(-1) if outside == "substitute" else inside.sum(-1).clamp_min(1)
    preference = probabilities.masked_fill(~loaded, -1.0).masked_fill_(inside, 2.0)
    best = preference.topk(min(top_k, preference.shape[1]), dim=-1)
    place = torch.arange(best.indices.shape[1], device=target.device)
    return _mark(probabilities, best.indices, (place < target[:, None]) & (best.values > 0))


def _weigh(probabilities: Tensor, runs: Tensor, dense: Tensor, weights: MoeWeights) -> Tensor:
    """``combine`` of the pairs that run, scaled to the sum of the token's dense top-k."""
    if weights.unit:
        return runs.to(probabilities.dtype)
    chosen = probabilities * runs
    total = chosen.sum(-1, keepdim=True)
    return chosen / total if weights.normalise else chosen * ((probabilities * dense).sum(-1, keepdim=True) / total)
