"""Relaxed acceptance: draft tokens that are likely enough under the target are kept (lossy)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from random import Random

import torch
from torch import Tensor

from harness.engine.acceptance import Accepted, chances_of, check_opinions
from harness.engine.drafting.draft import Draft
from harness.engine.sampling import Sampling, distribution, draw


@dataclass(frozen=True, slots=True)
class Typicality:
    """The target's distributions with their thresholds of typical acceptance; sliced by token.

    Attributes:
        probabilities: [tokens, vocab], fp32.
        thresholds: of each token.
    """

    probabilities: Tensor
    thresholds: Sequence[float]

    def __getitem__(self, tokens: slice) -> Typicality:
        return Typicality(self.probabilities[tokens], self.thresholds[tokens])


class Typical:
    """Typical acceptance (Medusa, arXiv 2401.10774): a draft token is good enough if the target finds it likely.

    Lossy: the output follows neither the target's distribution nor its greedy path, and depends on the drafter.

    Args:
        sampling: of the target; probabilities and entropies are those after it.
        epsilon: probability above which a token is always accepted; Medusa's code takes 0.09.
        delta: share of exp(-entropy) above which a token is accepted; Medusa's code takes sqrt(epsilon).
        greedy_bonus: whether the bonus token is the most probable one, as published, or drawn.

    Raises:
        ValueError: epsilon outside (0, 1], delta not positive.
    """

    def __init__(self, sampling: Sampling, epsilon: float, delta: float, greedy_bonus: bool = True) -> None:
        if not (0 < epsilon <= 1 and delta > 0):
            raise ValueError(f"epsilon={epsilon} must lie in (0, 1] and delta={delta} above 0")
        self.sampling = sampling
        self.epsilon = epsilon
        self.delta = delta
        self.greedy_bonus = greedy_bonus

    def judge(self, logits: Tensor) -> Typicality:
        """Distributions and thresholds, min(epsilon, delta * exp(-entropy)) with the entropy in nats."""
        probabilities = distribution(logits, self.sampling)
        entropy = torch.special.entr(probabilities).sum(-1)
        thresholds: list[float] = (self.delta * torch.exp(-entropy)).clamp(max=self.epsilon).tolist()
        return Typicality(probabilities, thresholds)

    def accept(self, draft: Draft, judged: Typicality, random: Random) -> Accepted:
        """:func:`accept_typical`."""
        return accept_typical(draft, judged.probabilities, judged.thresholds, None if self.greedy_bonus else random)


class TopkMatch:
    """A draft token is good enough if it is among the target's ``k`` most probable ones; a lossy reference.

    Args:
        k: 1 is :class:`Greedy`, at equal logits too.

    Raises:
        ValueError: k below one.
    """

    def __init__(self, k: int) -> None:
        if k < 1:
            raise ValueError(f"k={k} must be at least 1")
        self.k = k

    def judge(self, logits: Tensor) -> list[list[int]]:
        """Of each token the target's ``k`` most probable next ones, best first; the greedy choice leads."""
        largest = logits.topk(min(self.k, logits.shape[-1])).indices
        both: list[list[int]] = torch.cat((logits.argmax(-1, keepdim=True), largest), dim=-1).tolist()
        return [[first, *(token for token in others if token != first)][: self.k] for first, *others in both]

    def accept(self, draft: Draft, judged: Sequence[Sequence[int]], random: Random) -> Accepted:
        """:func:`accept_topk_match`; draws nothing."""
        return accept_topk_match(draft, judged)


def accept_typical(
    draft: Draft, probabilities: Tensor, thresholds: Sequence[float], random: Random | None = None
) -> Accepted:
    """The longest path of tokens whose probability lies above the threshold; of equally long ones the likeliest.

    Medusa takes the first token of every step greedily and keeps it without asking; here that is the bonus token of the
    step before, the root of the draft, so at least one token is kept and everything below the root has to be typical.

    Args:
        draft: may be empty.
        probabilities: [1 + len(draft), vocab], fp32: the target's distribution after the root and after each token.
        thresholds: after the root and after each token.
        random: draws the bonus token; None for the most probable one.

    Raises:
        ValueError: ``probabilities`` or ``thresholds`` do not fit the draft.
    """
    check_opinions(draft, probabilities.shape[0])
    check_opinions(draft, len(thresholds))
    chances = chances_of(draft, probabilities) if draft.tokens else []
    typical = [
        log(chance) if chance > thresholds[parent + 1] else None
        for chance, parent in zip(chances, draft.parents, strict=True)
    ]
    path = longest_path(draft, typical)
    row = probabilities[path[-1] + 1 if path else 0]
    return Accepted(path, int(row.argmax()) if random is None else draw(row, random))


def accept_topk_match(draft: Draft, choices: Sequence[Sequence[int]]) -> Accepted:
    """The longest path of tokens that are among the target's choices; of equally long ones that of better ranks.

    Args:
        draft: may be empty.
        choices: after the root and after each token the target's most probable tokens, best first; the bonus token is
            the best.

    Raises:
        ValueError: ``choices`` does not fit the draft.
    """
    check_opinions(draft, len(choices))
    ranked = [
        -float(choices[parent + 1].index(token)) if token in choices[parent + 1] else None
        for token, parent in zip(draft.tokens, draft.parents, strict=True)
    ]
    path = longest_path(draft, ranked)
    return Accepted(path, choices[path[-1] + 1 if path else 0][0])


def longest_path(draft: Draft, merits: Sequence[float | None]) -> tuple[int, ...]:
    """The longest path from the root over acceptable tokens, by their numbers; empty if no child of the root is one.

    Args:
        draft: may be empty.
        merits: of each token; None where it is not acceptable. Among equally long paths the greatest sum wins, then
            the one that ends first in the draft.
    """
    best, end = (0, 0.0), -1
    reached: list[tuple[int, float] | None] = []
    for node, (parent, merit) in enumerate(zip(draft.parents, merits, strict=True)):
        before = (0, 0.0) if parent < 0 else reached[parent]
        here = None if before is None or merit is None else (before[0] + 1, before[1] + merit)
        reached.append(here)
        if here is not None and (end < 0 or here > best):
            best, end = here, node
    path: list[int] = []
    while end >= 0:
        path.append(end)
        end = draft.parents[end]
    return tuple(reversed(path))
