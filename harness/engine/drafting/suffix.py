"""Suffix decoding: drafts from what followed the longest suffix that occurred before (arXiv 2411.04975)."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush, nlargest
from itertools import count

from torch import Tensor

from harness.engine.drafting.automaton import Follower, Place, SuffixAutomaton
from harness.engine.drafting.draft import Draft
from harness.engine.drafting.expansion import Growth, Pace

_DOUBT = 2.0
"""Occurrences of something else that a context of one token is credited with, one of n tokens with an n-th of it. With
2, a follower seen once counts n / (n + 2): near what the greedy continuations of SmolLM2 accept (0.25 behind one token
that agrees, 0.5 behind two, 0.8 behind eight)."""


class SharedHistory:
    """Earlier outputs of a run, for the drafters of one arm.

    What a drafter finds here depends on the examples before, so on their order and on where a run was resumed. An
    output is never offered to its own prompt, which a warm-up or another pass may bring again.

    Args:
        max_match: tokens of the longest match, as of the drafters.

    Raises:
        ValueError: max_match below one.
    """

    def __init__(self, max_match: int) -> None:
        if max_match < 1:
            raise ValueError(f"max_match={max_match} must be at least 1")
        self._longest = max_match + 1
        self._outputs: dict[int, tuple[int, ...]] = {}
        self.automaton = SuffixAutomaton(self._longest)

    def add(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Remember what followed ``prompt``; replaces what was remembered of the same prompt."""
        self.forget(prompt)
        self._outputs[hash(tuple(prompt))] = tuple(output)
        self._append(output)

    def forget(self, prompt: Sequence[int]) -> None:
        """Drop what followed ``prompt``; costs a rebuild if there is anything."""
        if self._outputs.pop(hash(tuple(prompt)), None) is not None:
            self.automaton = SuffixAutomaton(self._longest)
            for output in self._outputs.values():
                self._append(output)

    def _append(self, output: Sequence[int]) -> None:
        """Outputs end with a negative token of their own each, so that no match runs from one to the next."""
        for token in output:
            self.automaton.extend(token)
        self.automaton.extend(-1 - self.automaton.size)


class SuffixDrafter:
    """Drafts from a suffix automaton over prompt and output.

    The context of a token is the longest suffix of the sequence and the path before it, of at most ``max_match``
    tokens, that something follows in the text. What followed it most often comes first, the latest among equals; its
    confidence is its share of all that followed, shrunk where little was seen behind a short context. A better match
    allows a longer draft: ``factor`` tokens per matched token.

    The prompt's automaton is built once; a reset to the same prompt takes back the output only.

    Args:
        growth: limits of the draft; chains where ``topk`` is 1, else trees grown by falling survival.
        max_match: tokens of the longest suffix looked up.
        factor: tokens on a path at most per matched token.
        earlier: outputs of earlier sequences; they are used where they match longer than the sequence itself.
        pace: when a further token does not pay; None drafts all that ``growth`` allows.

    Attributes:
        match: matched tokens of the last proposal; 0 if there was none.

    Raises:
        ValueError: max_match below one, or no positive factor.
    """

    def __init__(
        self,
        growth: Growth,
        max_match: int,
        factor: float,
        earlier: SharedHistory | None = None,
        pace: Pace | None = None,
    ) -> None:
        if max_match < 1 or factor <= 0:
            raise ValueError(f"max_match={max_match} must be at least 1 and factor={factor} positive")
        self._growth = growth
        self._max_match = max_match
        self._factor = factor
        self._earlier = earlier
        self._pace = pace
        self._prompt: tuple[int, ...] = ()
        self._tokens: list[int] = []
        self._automaton = SuffixAutomaton(max_match + 1)
        self._automaton.checkpoint()
        self.match = 0

    def reset(self, prompt: Sequence[int], features: Tensor | None = None, seed: int = 0) -> None:
        """Start over after ``prompt``; the output before goes to the earlier ones."""
        output, new = self._tokens[len(self._prompt) :], tuple(prompt)
        if new == self._prompt:
            self._automaton.rollback()
        else:
            if self._earlier is not None and output:
                self._earlier.add(self._prompt, output)
            self._prompt = new
            self._automaton = SuffixAutomaton(self._max_match + 1)
            for token in new:
                self._automaton.extend(token)
            self._automaton.checkpoint()
        if self._earlier is not None:
            self._earlier.forget(new)
        self._tokens = list(new)
        self.match = 0

    def observe(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        """Append tokens of the output."""
        self._tokens.extend(tokens)
        for token in tokens:
            self._automaton.extend(token)

    def propose(self, limit: int) -> Draft:
        """The most frequent continuations of the longest suffix that occurred before."""
        self.match = 0
        if limit < 1:
            return Draft()
        automaton, place = self._longest_match()
        self.match = place.length
        depth = min(self._growth.depth, limit, int(self._factor * place.length))
        return self._grow(automaton, place, depth) if depth > 0 else Draft()

    def _longest_match(self) -> tuple[SuffixAutomaton, Place]:
        """The text that knows more of the sequence's end, and what it knows."""
        own = self._automaton.suffix()
        if self._earlier is not None:
            other = self._earlier.automaton
            found, _, _ = self._followers(other, other.match(self._tokens[-self._max_match :]))
            if found.length > own.length:
                return other, found
        return self._automaton, self._cut(self._automaton, own)

    def _grow(self, automaton: SuffixAutomaton, root: Place, depth: int) -> Draft:
        """Take the open token of the highest survival again and again; its own followers become open in turn."""
        growth, pace, order = self._growth, self._pace, count()
        tokens, parents, confidences = list[int](), list[int](), list[float]()
        open_tokens: list[tuple[float, int, float, int, int, int, Place]] = []
        grown, expected = [0] * (depth + 1), 0.0

        def offer(parent: int, level: int, survival: float, place: Place) -> None:
            context, followers, total = self._followers(automaton, place)
            for found in followers:
                chance = found.times / (total + _DOUBT / context.length)
                after = Place(found.state, context.length + 1)
                entry = (-survival * chance, next(order), chance, found.token, parent, level, after)
                heappush(open_tokens, entry)

        offer(-1, 1, 1.0, root)
        while open_tokens and len(tokens) < growth.size:
            negative, _, chance, token, parent, level, place = heappop(open_tokens)
            if pace is not None and not pace.goes_on(-negative, expected, len(tokens)):
                break
            tokens.append(token)
            parents.append(parent)
            confidences.append(chance)
            expected -= negative
            if level < depth and grown[level] < growth.topk:
                grown[level] += 1
                offer(len(tokens) - 1, level + 1, -negative, place)
        return Draft(tuple(tokens), tuple(parents), tuple(confidences))

    def _followers(self, automaton: SuffixAutomaton, place: Place) -> tuple[Place, list[Follower], int]:
        """The context that something follows, the tokens that do so most often, and how often any did."""
        place, followers = self._cut(automaton, place), list[Follower]()
        while place.state > 0:
            followers = [found for found in automaton.followers(place) if found.token >= 0]
            if followers:
                break
            place = automaton.shorten(place)
        total = sum(found.times for found in followers)
        if self._growth.topk == 1:
            return place, [max(followers)] if followers else [], total
        return place, nlargest(self._growth.topk, followers), total

    def _cut(self, automaton: SuffixAutomaton, place: Place) -> Place:
        """The last ``max_match`` tokens of a string."""
        return automaton.trim(Place(place.state, min(place.length, self._max_match)))
