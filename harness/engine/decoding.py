"""The decoding loop: draft, verify, accept, roll back (METHOD section 1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from harness.engine.acceptance import accept_greedy
from harness.engine.cache import KVCache
from harness.engine.drafting.base import Drafter
from harness.engine.model.step import Step
from sparse.budget import AttentionBudget
from sparse.cost import selector_bytes, step_bytes, step_flops
from sparse.trace import Trace


class TextDecoder(Protocol):
    """The part of a tokenizer that stop strings need."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str:
        """Text of token ids."""


@dataclass(frozen=True, slots=True)
class StopRule:
    """When an answer ends: at an end-of-text token, or once a stop string has appeared.

    Attributes:
        end_ids: tokens that end the text; they are kept as the last output token.
        strings: stop strings.
        decoder: turns ids into text; only used with stop strings.
        lookback: earlier output tokens decoded along, so that a stop string that spans steps is seen.
    """

    end_ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()
    decoder: TextDecoder | None = None
    lookback: int = 8

    def cut(self, output: Sequence[int], new: int) -> int | None:
        """How many tokens of ``output`` stay if the answer ends within its last ``new`` tokens, else None."""
        start = len(output) - new
        for position in range(start, len(output)):
            if output[position] in self.end_ids:
                return position + 1
        if not self.strings or self.decoder is None:
            return None
        first = max(0, start - self.lookback)
        if not self._stops(output[first:]):
            return None
        return next(stop for stop in range(start + 1, len(output) + 1) if self._stops(output[first:stop]))

    def _stops(self, tokens: Sequence[int]) -> bool:
        assert self.decoder is not None
        text = self.decoder.decode(list(tokens), skip_special_tokens=True)
        return any(string in text for string in self.strings)


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prefilled prompt that several arms decode from; the cache is rolled back to it before each.

    Attributes:
        prompt: token ids.
        first: the greedy token after the prompt; its cost belongs to the prefill.
        seconds: wall-clock of the prefill.
        summary_seconds: wall-clock of the block summaries that only sparse arms need.
    """

    prompt: tuple[int, ...]
    first: int
    seconds: float
    summary_seconds: float


@dataclass(slots=True)
class Decoded:
    """What one arm did with one prompt.

    Attributes:
        output: token ids, the prefill's token first.
        seconds: wall-clock of decoding without prefill.
        ttft_seconds: wall-clock to the first token: prefill, and summaries or draft index where the arm needs them.
        histogram: steps by the number of new tokens they yielded (METHOD section 8).
        step_seconds: wall-clock of each step, drafting and acceptance included.
        draft_seconds, accept_seconds: their totals.
        bytes, flops: totals over all steps from the cost model.
        trace: counters.
    """

    output: list[int]
    seconds: float = 0.0
    ttft_seconds: float = 0.0
    histogram: Counter[int] = field(default_factory=Counter)
    step_seconds: list[float] = field(default_factory=list)
    draft_seconds: float = 0.0
    accept_seconds: float = 0.0
    bytes: float = 0.0
    flops: float = 0.0
    trace: Trace = field(default_factory=Trace)


class Decoder:
    """Greedy speculative decoding of one sequence at a time.

    Args:
        step: of the target model.
        cache: large enough for prompt, output and one draft; holds the summaries that sparse arms need.
        stop: when an answer ends.
        clock: seconds, device work included.
        prefill_chunk: tokens per forward pass of the prefill.
    """

    def __init__(
        self, step: Step, cache: KVCache, *, stop: StopRule, clock: Callable[[], float], prefill_chunk: int
    ) -> None:
        self._step = step
        self._cache = cache
        self._stop = stop
        self._clock = clock
        self._chunk = prefill_chunk

    def prefill(self, prompt: Sequence[int]) -> Prefix:
        """Dense prefill of ``prompt``; the start of every arm (one prefill shared by all).

        Raises:
            ValueError: the prompt is empty, or longer than the cache or the model's positions.
        """
        self._cache.truncate(0, 0)
        start = self._clock()
        logits = self._step.prefill(self._tensor(prompt), self._cache, self._chunk)
        first = int(logits.argmax())
        middle = self._clock()
        self._cache.refresh_summaries()
        return Prefix(tuple(prompt), first, middle - start, self._clock() - middle)

    def decode(self, prefix: Prefix, drafter: Drafter, budget: AttentionBudget, max_new_tokens: int) -> Decoded:
        """Decode up to ``max_new_tokens`` tokens after ``prefix``, the prefill's token included.

        Raises:
            ValueError: the cache is too small.
        """
        cache, clock = self._cache, self._clock
        cache.truncate(0, len(prefix.prompt))
        result = Decoded([prefix.first])
        start = clock()
        drafter.reset(prefix.prompt)
        drafter.observe(result.output)
        summaries = 0.0 if budget.is_dense else prefix.summary_seconds
        result.ttft_seconds = prefix.seconds + summaries + (clock() - start)
        finished = self._stop.cut(result.output, 1) is not None
        began = clock()
        while not finished and len(result.output) < max_new_tokens:
            finished = self._one_step(result, drafter, budget, max_new_tokens)
        result.seconds = clock() - began
        return result

    def _one_step(self, result: Decoded, drafter: Drafter, budget: AttentionBudget, max_new_tokens: int) -> bool:
        """One step; returns whether the answer ended."""
        cache, clock = self._cache, self._clock
        begun = clock()
        draft = drafter.propose(max_new_tokens - len(result.output) - 1)
        drafted = clock()
        length = cache.lengths[0]
        visible, attended = result.trace.visible, result.trace.attended
        logits = self._step.verify(self._tensor([result.output[-1], *draft])[None], cache, budget, result.trace)
        choices = logits[0].argmax(-1).tolist()
        verified = clock()
        kept = accept_greedy(draft, choices)
        cache.truncate(0, length + len(kept))
        result.output.extend(kept)
        stop = self._stop.cut(result.output, len(kept))
        if stop is not None:
            kept = kept[: len(kept) - (len(result.output) - stop)]
            del result.output[stop:]
        drafter.observe(kept)
        result.histogram[len(kept)] += 1
        self._account(
            result, budget, len(draft) + 1, length, result.trace.visible - visible, result.trace.attended - attended
        )
        ended = clock()
        result.draft_seconds += drafted - begun
        result.accept_seconds += ended - verified
        result.step_seconds.append(ended - begun)
        return stop is not None

    def _account(
        self, result: Decoded, budget: AttentionBudget, rows: int, length: int, visible: int, attended: int
    ) -> None:
        """Add the step's bytes and FLOPs (METHOD section 7)."""
        shape = self._step.weights.shape
        blocks = length // budget.block_size
        layers = shape.layers - budget.dense_layers if attended < visible else 0
        result.bytes += step_bytes(shape, attended / shape.layers, selector_bytes(shape, budget, layers, blocks))
        result.flops += step_flops(shape, rows, attended / shape.layers)

    def _tensor(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.int64, device=self._step.weights.device)
