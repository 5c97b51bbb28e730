"""Prompt lookup: drafts copied from behind earlier occurrences of the last n-gram."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from harness.engine.drafting.draft import Draft
from harness.engine.drafting.expansion import Growth, Pace
from harness.engine.drafting.pace import prune

Index = dict[tuple[int, ...], int]
"""The position after the latest occurrence of each n-gram."""


class LookupDrafter:
    """Drafts from an incremental n-gram index over prompt and output.

    The index maps every n-gram of 1 to ``max_ngram`` tokens to the position after its latest earlier occurrence, and
    each such position to that of the occurrence before it. Each new token adds ``max_ngram`` entries; nothing is ever
    scanned again. The prompt's index is kept apart from the output's, so that a reset to the same prompt only drops the
    latter.

    A chain copies what followed the latest occurrence of the longest known n-gram. A tree merges up to ``topk``
    different continuations, those of longer n-grams first and of these the latest first, and keeps the tokens of the
    highest survival; it looks at the ``2 * topk`` latest occurrences of each n-gram, as many continue alike.

    Confidence is counted on the sequence itself, see :class:`Odds`.

    Args:
        growth: limits of the draft; chains where ``topk`` is 1.
        max_ngram: longest n-gram looked up.
        pace: when a further token does not pay; None drafts all that ``growth`` allows.

    Attributes:
        match: tokens of the longest n-gram found for the last proposal; 0 if there was none.

    Raises:
        ValueError: max_ngram below one.
    """

    def __init__(self, growth: Growth, max_ngram: int, pace: Pace | None = None) -> None:
        if max_ngram < 1:
            raise ValueError(f"max_ngram={max_ngram} must be at least 1")
        self._growth = growth
        self._max_ngram = max_ngram
        self._pace = pace
        self._prompt: tuple[int, ...] = ()
        self._tokens: list[int] = []
        self._prompt_index: Index = {}
        self._output_index: Index = {}
        self._earlier: list[list[int]] = [[] for _ in range(max_ngram)]
        self._odds = Odds()
        self.match = 0

    def reset(self, prompt: Sequence[int], features: Tensor | None = None, seed: int = 0) -> None:
        """Start over after ``prompt``; its index is built once and reused while the prompt stays the same."""
        if tuple(prompt) != self._prompt:
            self._prompt = tuple(prompt)
            self._tokens = []
            self._prompt_index, self._output_index = {}, {}
            self._earlier = [[] for _ in range(self._max_ngram)]
            for token in self._prompt:
                self._append(token, self._prompt_index)
        self._tokens = list(self._prompt)
        self._output_index = {}
        for earlier in self._earlier:
            del earlier[len(self._prompt) :]
        self._odds = Odds()
        self.match = 0

    def observe(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        """Append tokens of the output; they also tell which tokens of the last proposal were right."""
        self._odds.settle(tokens)
        for token in tokens:
            self._append(token, self._output_index)

    def propose(self, limit: int) -> Draft:
        """What followed the latest earlier occurrences of the longest known n-grams."""
        self.match = 0
        count = min(self._growth.depth, limit)
        if count < 1:
            return Draft()
        tokens, parents, agreed = list[int](), list[int](), list[int]()
        children: dict[tuple[int, int], int] = {}
        paths = 0
        for size, start in self._occurrences():
            self.match = self.match or size
            place, known = -1, len(tokens)
            for level, token in enumerate(self._copy(start, count)):
                node = children.setdefault((place, token), len(tokens))
                if node == len(tokens):
                    tokens.append(token)
                    parents.append(place)
                    agreed.append(size + level)
                place = node
            paths += len(tokens) > known
            if paths == self._growth.topk:
                break
        return prune(self._odds.rate(tokens, parents, agreed), self._pace, self._growth.size)

    def _occurrences(self) -> Iterator[tuple[int, int]]:
        """Sizes of the n-grams that end the sequence and positions after them: longest first, then latest first."""
        for size in range(min(self._max_ngram, len(self._tokens)), 0, -1):
            suffix = tuple(self._tokens[-size:])
            start = self._output_index.get(suffix) or self._prompt_index.get(suffix, 0)
            for _ in range(2 * self._growth.topk):
                if not start:
                    break
                yield size, start
                start = self._earlier[size - 1][start]

    def _copy(self, start: int, count: int) -> list[int]:
        """``count`` tokens from ``start`` on; past the end the copy goes on with itself (a repeating period)."""
        draft = self._tokens[start : start + count]
        period = len(self._tokens) - start
        while len(draft) < count:
            draft.append(draft[len(draft) - period])
        return draft

    def _append(self, token: int, index: Index) -> None:
        """Index the n-grams that end before ``token``: only now do they have a continuation."""
        end = len(self._tokens)
        for size, earlier in enumerate(self._earlier, 1):
            before = 0
            if size <= end:
                ngram = tuple(self._tokens[end - size :])
                before = self._output_index.get(ngram) or self._prompt_index.get(ngram, 0)
                index[ngram] = end
            earlier.append(before)
        self._tokens.append(token)


_LONGEST = 8
"""Longer agreements are counted together with those of as many tokens."""


class Odds:
    """Chance that a looked-up token is accepted once its parent is, counted over one sequence's own proposals.

    Tokens are counted by how many tokens agree before them, those of the n-gram and of the path, and apart from that by
    whether they are their parent's first child. Before anything is seen, a first child behind ``n`` tokens counts as
    accepted ``n`` times out of ``n + 2``, a further child once out of ten times: near what the greedy continuations of
    SmolLM2 accept (0.25 behind one token, 0.5 behind two, 0.8 behind eight; 0.05 to 0.2).
    """

    def __init__(self) -> None:
        self._accepted: dict[tuple[int, bool], int] = {}
        self._tried: dict[tuple[int, bool], int] = {}
        self._pending: dict[int, list[tuple[int, int, tuple[int, bool]]]] = {}

    def rate(self, tokens: Sequence[int], parents: Sequence[int], agreed: Sequence[int]) -> Draft:
        """A draft with these tokens, remembered until the next tokens of the sequence settle it.

        Args:
            tokens, parents: of the draft.
            agreed: of each token, the tokens before it that agree with those before its original.
        """
        self._pending = {}
        confidence = []
        for node, (token, parent, length) in enumerate(zip(tokens, parents, agreed, strict=True)):
            siblings = self._pending.setdefault(parent, [])
            kind = (min(length, _LONGEST), not siblings)
            siblings.append((token, node, kind))
            confidence.append(self._chance(kind))
        return Draft(tuple(tokens), tuple(parents), tuple(confidence))

    def settle(self, tokens: Sequence[int]) -> None:
        """Count which tokens of the last draft were right, given the tokens that follow the sequence."""
        place = -1
        for token in tokens:
            right = None
            for proposed, node, kind in self._pending.get(place, ()):
                self._tried[kind] = self._tried.get(kind, 0) + 1
                if proposed == token:
                    self._accepted[kind] = self._accepted.get(kind, 0) + 1
                    right = node
            if right is None:
                break
            place = right
        self._pending = {}

    def _chance(self, kind: tuple[int, bool]) -> float:
        length, first = kind
        accepted, tried = (length, length + 2) if first else (1, 10)
        return (self._accepted.get(kind, 0) + accepted) / (self._tried.get(kind, 0) + tried)
