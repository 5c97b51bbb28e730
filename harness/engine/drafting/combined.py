"""Two drafters as one: a cheap one where it is sure, else another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from harness.engine.drafting.base import Drafter
from harness.engine.drafting.draft import Draft


class MatchingDrafter(Drafter, Protocol):
    """A drafter that copies what followed an earlier occurrence of the sequence's end."""

    @property
    def match(self) -> int:
        """Tokens of that end, of the last proposal; 0 if there was none."""


class CombinedDrafter:
    """The first drafter's draft where its match is long enough, else the second's; both see the whole sequence.

    The second one is not asked where the first one is sure, so a model's time is saved there. Where the second one has
    no idea, a draft from a short match is better than none.

    Args:
        first: asked at every step.
        second: asked where the first one's match is short.
        min_match: matched tokens that are enough.

    Raises:
        ValueError: min_match below one.
    """

    def __init__(self, first: MatchingDrafter, second: Drafter, min_match: int) -> None:
        if min_match < 1:
            raise ValueError(f"min_match={min_match} must be at least 1")
        self._first = first
        self._second = second
        self._min_match = min_match

    def reset(self, prompt: Sequence[int], features: Tensor | None = None, seed: int = 0) -> None:
        """Start a new sequence with both."""
        self._first.reset(prompt, features, seed)
        self._second.reset(prompt, features, seed)

    def observe(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        """Tell both."""
        self._first.observe(tokens, features)
        self._second.observe(tokens, features)

    def propose(self, limit: int) -> Draft:
        """The draft of one of them."""
        draft = self._first.propose(limit)
        if len(draft) and self._first.match >= self._min_match:
            return draft
        return self._second.propose(limit) or draft
