"""Two drafters as one: a cheap one where it is sure, else another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from harness.engine.drafting.base import Drafter, spent
from harness.engine.drafting.draft import Draft
from sparse.cost import Cost


class MatchingDrafter(Drafter, Protocol):
    """A drafter that copies what followed an earlier occurrence of the sequence's end."""

    @property
    def match(self) -> int:
        """Tokens of that end, of the last proposal; 0 if there was none."""


class CombinedDrafter:
    """The first drafter's draft where its match is long enough, else the second's, or both in one tree.

    The second one is not asked where the first one is sure, so a model's time is saved there. Where the second one has
    no idea, a draft from a short match is better than none. Both see the whole sequence.

    Args:
        first: asked at every step.
        second: asked where the first one's match is short.
        min_match: matched tokens that are enough.
        join: where the match is short, verify both drafts at once; only for drafts whose tokens were chosen, not drawn.

    Raises:
        ValueError: min_match below one.
    """

    def __init__(self, first: MatchingDrafter, second: Drafter, min_match: int, join: bool = False) -> None:
        if min_match < 1:
            raise ValueError(f"min_match={min_match} must be at least 1")
        self._first = first
        self._second = second
        self._min_match = min_match
        self._join = join

    @property
    def reads_features(self) -> bool:
        """Whether one of them reads hidden states of the target."""
        return any(getattr(part, "reads_features", False) for part in (self._first, self._second))

    @property
    def reads_blocks(self) -> bool:
        """Whether one of them chooses blocks of the target's cache."""
        return any(getattr(part, "reads_blocks", False) for part in (self._first, self._second))

    @property
    def spent(self) -> Cost:
        """Least work of both since the last reset."""
        return spent(self._first) + spent(self._second)

    def reset(self, prompt: Sequence[int], features: Tensor | None = None, seed: int = 0) -> None:
        """Start a new sequence with both."""
        self._first.reset(prompt, features, seed)
        self._second.reset(prompt, features, seed)

    def observe(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        """Tell both."""
        self._first.observe(tokens, features)
        self._second.observe(tokens, features)

    def propose(self, limit: int) -> Draft:
        """The draft of one of them, or of both."""
        draft = self._first.propose(limit)
        if len(draft) and self._first.match >= self._min_match:
            return draft
        other = self._second.propose(limit)
        return joined(draft, other) if self._join else other or draft


def joined(first: Draft, second: Draft) -> Draft:
    """Both drafts in one tree; a path that both have stands in it once, with the higher confidence.

    Args:
        first: its tokens stand first among siblings.
        second: follows.

    Raises:
        ValueError: tokens were drawn, or acceptance is forced; joined they would no longer be what they claim.
    """
    if any(draft.proposals is not None or draft.forced is not None for draft in (first, second)):
        raise ValueError("only drafts of chosen tokens with real acceptance can be joined")
    if not len(first) or not len(second):
        return first if len(first) else second
    tokens, parents, confidence = list(first.tokens), list(first.parents), list(first.confidence)
    places = {(parent, token): place for place, (parent, token) in enumerate(zip(parents, tokens, strict=True))}
    moved: list[int] = []
    for token, old, chance in zip(second.tokens, second.parents, second.confidence, strict=True):
        parent = -1 if old < 0 else moved[old]
        place = places.setdefault((parent, token), len(tokens))
        moved.append(place)
        if place == len(tokens):
            tokens.append(token)
            parents.append(parent)
            confidence.append(chance)
        else:
            confidence[place] = max(confidence[place], chance)
    return Draft(tuple(tokens), tuple(parents), tuple(confidence))
