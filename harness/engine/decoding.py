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
from harness.engine.model.probe import Probe
from harness.engine.model.step import Step
from harness.engine.model.verification import Verification
from sparse.budget import Sparsity
from sparse.cost import trace_bytes, trace_flops
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
        transcript: each step's draft and the number of tokens that it added to ``output``.
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
    transcript: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    trace: Trace = field(default_factory=Trace)


class Decoder:
    """Greedy speculative decoding of one sequence at a time.

    Args:
        step: of the target model.
        cache: large enough for prompt, output and one draft; holds the summaries that sparse arms need.
        stop: when an answer ends.
        clock: seconds, device work included; on the CPU it also times the components of each step.
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
        self._component_clock = clock if step.weights.device.type == "cpu" else None

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

    def decode(self, prefix: Prefix, drafter: Drafter, sparsity: Sparsity, max_new_tokens: int) -> Decoded:
        """Decode up to ``max_new_tokens`` tokens after ``prefix``, the prefill's token included.

        Raises:
            ValueError: the cache is too small.
        """
        cache, clock = self._cache, self._clock
        cache.truncate(0, len(prefix.prompt))
        run = Verification(sparsity, Trace(clock=self._component_clock))
        result = Decoded([prefix.first], trace=run.trace)
        start = clock()
        drafter.reset(prefix.prompt)
        drafter.observe(result.output)
        summaries = prefix.summary_seconds if sparsity.attention.summaries else 0.0
        result.ttft_seconds = prefix.seconds + summaries + (clock() - start)
        finished = self._stop.cut(result.output, 1) is not None
        began = clock()
        while not finished and len(result.output) < max_new_tokens:
            finished = self._one_step(result, drafter, run, max_new_tokens)
        result.seconds = clock() - began
        shape = self._step.weights.shape
        result.bytes = trace_bytes(shape, sparsity.attention, run.trace)
        result.flops = trace_flops(shape, run.trace)
        return result

    def replay(self, prefix: Prefix, decoded: Decoded, sparsity: Sparsity, probe: Probe | None = None) -> list[Tensor]:
        """Run the steps of ``decoded`` again under ``sparsity``, each with the same draft and from the same tokens.

        The cache holds what these steps themselves wrote, as in a decode that happened to keep the same tokens. Not
        timed. Teacher-forced fidelity compares two replays (METHOD section 8).

        Args:
            prefix: as for ``decoded``; the cache must still hold it.
            decoded: a decode after ``prefix``.
            sparsity: budgets of the replay.
            probe: looks into every step.

        Returns:
            Per step the logits after the last accepted token and each draft token, [rows, vocab].
        """
        cache = self._cache
        cache.truncate(0, len(prefix.prompt))
        run = Verification(sparsity, probe=probe)
        logits, position = [], 0
        for draft, kept in decoded.transcript:
            length = cache.lengths[0]
            tokens = self._tensor([decoded.output[position], *draft])
            logits.append(self._step.verify(tokens[None], cache, run)[0])
            cache.truncate(0, length + kept)
            position += kept
        return logits

    def _one_step(self, result: Decoded, drafter: Drafter, run: Verification, max_new_tokens: int) -> bool:
        """One step; returns whether the answer ended."""
        cache, clock = self._cache, self._clock
        begun = clock()
        draft = drafter.propose(max_new_tokens - len(result.output) - 1)
        drafted = clock()
        length = cache.lengths[0]
        logits = self._step.verify(self._tensor([result.output[-1], *draft])[None], cache, run)
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
        result.transcript.append((tuple(draft), len(kept)))
        ended = clock()
        result.draft_seconds += drafted - begun
        result.accept_seconds += ended - verified
        result.step_seconds.append(ended - begun)
        return stop is not None

    def _tensor(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.int64, device=self._step.weights.device)
