"""Speculative sampling: drafts are accepted at random so that the target's distribution stays as it is (lossless)."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from harness.engine.acceptance import Accepted, chances_of, check_opinions
from harness.engine.drafting.draft import Draft
from harness.engine.sampling import Sampling, distribution, draw


class Sampled:
    """Lossless speculative sampling: the output is distributed as if the target had drawn every token.

    With empty drafts it is plain sampling, the autoregressive arm.

    Args:
        sampling: of the target. Drawn drafts are accepted more often when the drafter samples alike, but need not.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling

    def judge(self, logits: Tensor) -> Tensor:
        """The target's distributions, [tokens, vocab], fp32."""
        return distribution(logits, self.sampling)

    def accept(self, draft: Draft, judged: Tensor, random: Random) -> Accepted:
        """:func:`accept_sampled`."""
        return accept_sampled(draft, judged, random)


def accept_sampled(draft: Draft, probabilities: Tensor, random: Random) -> Accepted:
    """Speculative sampling down a chain or a tree, without changing the target's distribution.

    The children of a node are tried in their order until one is accepted, and so on below that one. A rejection leaves
    the part of the target's distribution that the child could not serve; the next child is tried against that, and the
    bonus token is drawn from what is left in the end. For chains this is arXiv 2211.17192 and 2302.01318, for trees the
    recursive rejection sampling of SpecInfer (arXiv 2305.09781) and EAGLE, with siblings drawn without putting back.

    It is lossless if neither drafter nor target shares random numbers with ``random``, and, for drawn drafts, if no
    child is left out of the draft, or moved, because of which token it is.

    Args:
        draft: may be empty; ``proposals`` on the device of ``probabilities``.
        probabilities: [1 + len(draft), vocab], fp32: the target's distribution after the root and after each token.
        random: gives one uniform number per child tried and one for the bonus token.

    Returns:
        Between 1 and 1 + depth new tokens (METHOD section 1).

    Raises:
        ValueError: ``probabilities`` or ``proposals`` do not fit the draft or each other.
    """
    check_opinions(draft, probabilities.shape[0])
    if not draft.tokens:
        return Accepted((), draw(probabilities[0], random))
    proposals, families = draft.proposals, draft.children()
    if proposals is not None and proposals.shape != probabilities.shape:
        raise ValueError(f"proposals of shape {[*proposals.shape]} for a target of {[*probabilities.shape]}")
    chances = chances_of(draft, probabilities)
    proposed = None if proposals is None else chances_of(draft, proposals)
    path: list[int] = []
    place = -1
    while True:
        left, children = probabilities[place + 1], families[place + 1]
        if proposals is None or proposed is None:
            found, left = _try_chosen(children, draft.tokens, chances, left, random)
        else:
            found, left = _try_drawn(children, draft.tokens, chances, proposed, left, proposals[place + 1], random)
        if found is None:
            return Accepted(tuple(path), draw(left, random))
        path.append(found)
        place = found


def _try_chosen(
    children: Sequence[int], tokens: Sequence[int], chances: Sequence[float], target: Tensor, random: Random
) -> tuple[int | None, Tensor]:
    """The accepted one of children that were chosen, not drawn: each is a point mass, so a rejection only takes its
    token out of ``target`` [vocab]. Without one, what is left of ``target``, not normalised."""
    mass = 1.0
    rejected: list[int] = []
    for child in children:
        if tokens[child] in rejected:
            continue
        if random.random() * mass < chances[child]:
            return child, target
        mass -= chances[child]
        rejected.append(tokens[child])
    if not rejected:
        return None, target
    left = target.index_fill(0, torch.tensor(rejected, device=target.device), 0)
    rounded_away = mass < 1e-3 and not bool(left.any())
    return None, target if rounded_away else left


def _try_drawn(
    children: Sequence[int],
    tokens: Sequence[int],
    chances: Sequence[float],
    proposed: Sequence[float],
    target: Tensor,
    proposal: Tensor,
    random: Random,
) -> tuple[int | None, Tensor]:
    """The accepted one of children that were drawn from ``proposal`` [vocab] without putting back.

    Without one, what is left of ``target`` [vocab], not normalised. The masses of what is left of both are summed anew
    after each rejection, in fp64: a difference to 1 would be mostly rounding where a sharp proposal leaves little. A
    child that the proposal cannot have drawn is passed over.
    """
    target_mass, proposal_mass = 1.0, 1.0
    rejected: list[int] = []
    for child in children:
        token = tokens[child]
        if proposed[child] <= 0 or token in rejected:
            continue
        if rejected:
            proposal[rejected[-1]] = 0
            proposal_mass = float(proposal.sum())
        chance = float(target[token]) if rejected else chances[child]
        if random.random() * proposed[child] * target_mass < chance * proposal_mass:
            return child, target
        if not rejected:
            target, proposal = target.double(), proposal.to(torch.float64, copy=True)
        residual = torch.sub(target, proposal, alpha=target_mass / proposal_mass).clamp_(min=0)
        residual_mass = float(residual.sum())
        if residual_mass > 0:  # else both are the same but for rounding
            target, target_mass = residual, residual_mass
        rejected.append(token)
    return None, target
