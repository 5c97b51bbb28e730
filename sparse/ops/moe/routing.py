"""Routing that never leaves the device: fixed shapes, no count read back, fit for a CUDA graph (METHOD section 4).

All masks are [tokens, experts], bool, and say which token-expert pairs run.
"""

from __future__ import annotations

import torch
from torch import Tensor


def route(
    probabilities: Tensor,
    *,
    top_k: int,
    normalise: bool,
    unit: bool,
    limit: int | None = None,
    survival: Tensor | None = None,
    outside: str = "substitute",
) -> Tensor:
    """Top-k routing, on request of all tokens to at most ``limit`` distinct experts.

    Equal to :func:`sparse.experts.restrict` with the budget ``union=limit`` and no rule per token, without counters.

    Args:
        probabilities: [tokens, experts], fp32, none of them zero, as :func:`sparse.experts.probabilities` gives them.
        top_k: experts per token, at most their number.
        normalise, unit: as in :class:`sparse.ops.weights.MoeWeights`.
        limit: most distinct experts for all tokens, ranked by their summed weight, equal ones by number; None sets
            no limit.
        survival: [tokens], fp32, how much each token counts in that ranking; None if all count alike.
        outside: as in :class:`sparse.budget.MoeBudget`.

    Returns:
        ``combine`` [tokens, experts], fp32, zero where an expert does not run for a token; every token runs one at
        least.

    Raises:
        ValueError: ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} leaves no expert")
    dense = mark(probabilities, probabilities.topk(top_k, dim=-1).indices)
    runs = dense
    if limit is not None and limit < probabilities.shape[1]:
        loaded = best_union(probabilities, dense, dense, limit=limit, normalise=normalise, survival=survival)
        runs = inside_union(probabilities, dense, loaded, outside=outside, top_k=top_k)
    return weigh(probabilities, runs, dense, normalise=normalise, unit=unit)


def mark(probabilities: Tensor, experts: Tensor, keep: Tensor | None = None) -> Tensor:
    """The mask that is true at ``experts`` [tokens, k] where ``keep`` [tokens, k], bool, is (None: everywhere)."""
    marked = torch.zeros_like(probabilities, dtype=torch.bool)
    return marked.scatter_(1, experts, True) if keep is None else marked.scatter_(1, experts, keep)


def best_union(
    probabilities: Tensor, dense: Tensor, wanted: Tensor, *, limit: int, normalise: bool, survival: Tensor | None
) -> Tensor:
    """The at most ``limit`` experts that are loaded: those of the largest summed weight among the wanted ones.

    Equal sums are common, with one expert a token always: they rank by the expert's number, and each weight is
    normalised before it is scaled, so that rounding does not tell apart what is equal.

    Args:
        probabilities: [tokens, experts], fp32.
        dense: mask of dense top-k routing, whose sum normalises a token's weights.
        wanted: mask of the pairs that a token still wants.
        limit: most experts, at most their number.
        normalise: weights of a token count in shares of its dense ones.
        survival: [tokens], fp32, how much each token counts; None if all count alike.

    Returns:
        [experts], bool.
    """
    weights = probabilities * wanted
    if normalise:
        weights = weights / (probabilities * dense).sum(-1, keepdim=True)
    if survival is not None:
        weights = weights * survival[:, None]
    anyone = wanted.any(0)
    ranked = weights.sum(0).masked_fill_(~anyone, -1.0).argsort(descending=True, stable=True)
    return torch.zeros_like(anyone).scatter_(0, ranked[:limit], True) & anyone


def inside_union(probabilities: Tensor, wanted: Tensor, loaded: Tensor, *, outside: str, top_k: int) -> Tensor:
    """The pairs that run when only ``loaded`` experts [experts] may: the wanted ones inside, and what replaces others.

    Args:
        probabilities: [tokens, experts], fp32, none of them zero.
        wanted: mask, at most ``top_k`` experts a token.
        loaded: [experts], bool.
        outside: ``substitute`` a token's lost experts by its best loaded ones, or ``drop`` them, where a token that
            loses all of them keeps its best loaded one.
        top_k: experts per token.

    Returns:
        The mask.
    """
    inside = wanted & loaded
    target = wanted.sum(-1) if outside == "substitute" else inside.sum(-1).clamp_min(1)
    preference = probabilities.masked_fill(~loaded, -1.0).masked_fill_(inside, 2.0)
    best = preference.topk(top_k, dim=-1)
    place = torch.arange(top_k, device=target.device)
    return mark(probabilities, best.indices, (place < target[:, None]) & (best.values > 0))


def weigh(probabilities: Tensor, runs: Tensor, dense: Tensor, *, normalise: bool, unit: bool) -> Tensor:
    """``combine`` of the pairs that run, scaled to the sum of the token's dense top-k.

    Args:
        probabilities: [tokens, experts], fp32.
        runs: mask, at least one expert a token.
        dense: mask of dense top-k routing.
        normalise, unit: as in :func:`route`.

    Returns:
        [tokens, experts], fp32.
    """
    if unit:
        return runs.to(probabilities.dtype)
    chosen = probabilities * runs
    total = chosen.sum(-1, keepdim=True)
    return chosen / total if normalise else chosen * ((probabilities * dense).sum(-1, keepdim=True) / total)
