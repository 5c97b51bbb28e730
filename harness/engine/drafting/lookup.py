"""Prompt lookup: drafts copied from behind an earlier occurrence of the last n-gram."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from harness.engine.drafting.draft import Draft


class LookupDrafter:
    """Chain drafts from an incremental n-gram index over prompt and output.

    The index maps every n-gram of 1 to ``max_ngram`` tokens to the position after its latest earlier occurrence. Each
    new token adds ``max_ngram`` entries; nothing is ever scanned again. The prompt's index is kept apart from the
    output's, so that a reset to the same prompt only drops the latter.

    Args:
        k: draft tokens per step at most.
        max_ngram: longest n-gram looked up; longer matches win over shorter ones.

    Raises:
        ValueError: k or max_ngram below one.
    """

    def __init__(self, k: int, max_ngram: int) -> None:
        if k < 1 or max_ngram < 1:
            raise ValueError(f"k={k} and max_ngram={max_ngram} must be at least 1")
        self._k = k
        self._max_ngram = max_ngram
        self._prompt: tuple[int, ...] = ()
        self._tokens: list[int] = []
        self._prompt_index: dict[tuple[int, ...], int] = {}
        self._output_index: dict[tuple[int, ...], int] = {}

    def reset(self, prompt: Sequence[int], features: Tensor | None = None, seed: int = 0) -> None:
        """Start over after ``prompt``; its index is built once and reused while the prompt stays the same."""
        if tuple(prompt) != self._prompt:
            self._prompt = tuple(prompt)
            self._tokens = []
            self._prompt_index = {}
            for token in self._prompt:
                self._append(token, self._prompt_index)
        self._tokens = list(self._prompt)
        self._output_index = {}

    def observe(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        """Append tokens of the output."""
        for token in tokens:
            self._append(token, self._output_index)

    def propose(self, limit: int) -> Draft:
        """The tokens that followed the latest earlier occurrence of the longest known suffix."""
        count = min(self._k, limit)
        if count < 1:
            return Draft()
        for size in range(min(self._max_ngram, len(self._tokens)), 0, -1):
            suffix = tuple(self._tokens[-size:])
            start = self._output_index.get(suffix, self._prompt_index.get(suffix))
            if start is not None:
                return Draft.chain(self._copy(start, count))
        return Draft()

    def _copy(self, start: int, count: int) -> list[int]:
        """``count`` tokens from ``start`` on; past the end the copy goes on with itself (a repeating period)."""
        draft = self._tokens[start : start + count]
        period = len(self._tokens) - start
        while len(draft) < count:
            draft.append(draft[len(draft) - period])
        return draft

    def _append(self, token: int, index: dict[tuple[int, ...], int]) -> None:
        """Index the n-grams that end before ``token``: only now do they have a continuation."""
        end = len(self._tokens)
        for size in range(1, min(self._max_ngram, end) + 1):
            index[tuple(self._tokens[end - size : end])] = end
        self._tokens.append(token)
