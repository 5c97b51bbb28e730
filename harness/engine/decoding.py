"""The decoding loop: draft, verify, accept, roll back (METHOD section 1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Protocol

import torch
from torch import Tensor

from harness.engine.acceptance import Accepted, Greedy, Rule
from harness.engine.cache import KVCache
from harness.engine.drafting.base import Drafter, spent
from harness.engine.drafting.draft import Draft
from harness.engine.model.probe import Probe
from harness.engine.model.step import Segment, Step
from harness.engine.model.verification import Verification
from harness.engine.prefills import Prefilled, Prefills, PrefillStore
from sparse.budget import Sparsity
from sparse.cost import Cost, total, trace_costs
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
    """A prefilled prompt that several arms decode from; its row of the cache is rolled back to it before each.

    Attributes:
        prompt: token ids.
        row: of the cache.
        seed: of everything that decoding this prompt draws.
        first: the token after the prompt; its cost belongs to the prefill.
        logits: [vocab], that it was picked from.
        features: of all prompt tokens, where the step has taps.
        seconds: wall-clock of the prefill.
        summary_seconds: wall-clock of the block summaries that arms need which choose blocks, be it for drafting.
    """

    prompt: tuple[int, ...]
    row: int
    seed: int
    first: int
    logits: Tensor
    features: Tensor | None
    seconds: float
    summary_seconds: float


@dataclass(frozen=True, slots=True)
class StepTaken:
    """One step of a decode, as far as a replay needs it.

    Attributes:
        draft: what was proposed.
        path: accepted draft tokens.
        kept: tokens that the step added to the output; an answer's end may cut the path.
    """

    draft: Draft
    path: tuple[int, ...]
    kept: int

    @property
    def rows(self) -> list[int]:
        """The step's tokens that stayed in the sequence, as numbers from 0, the root, on; ``kept`` of them."""
        return [0, *(node + 1 for node in self.path)][: self.kept]


@dataclass(slots=True)
class Decoded:
    """What one arm did with one prompt.

    Sequences that are decoded together share the time of each step evenly, and the traffic of all of them by their
    numbers of steps, so that sums over sequences are wall-clock and traffic. Bytes per step of such a sequence are its
    share, while ``step_seconds`` are the whole steps that it took part in.

    Attributes:
        output: token ids, the prefill's token first.
        seconds: wall-clock of decoding, this sequence's share; without the prefill that all arms share, with what the
            drafter alone does with the prompt.
        ttft_seconds: wall-clock to the first token: prefill, and block summaries where the arm needs them.
        histogram: steps by the number of new tokens they yielded (METHOD section 8).
        step_seconds: wall-clock of each step, drafting and acceptance included.
        draft_seconds, accept_seconds: this sequence's share of their totals, both parts of ``seconds``.
        costs: this sequence's share of the least work of each component (``sparse.cost.COMPONENTS``), and under
            ``draft`` that of its drafter's passes, what the drafter alone does with the prompt included.
        transcript: each step.
        trace: counters of all sequences that were decoded together.
        leads: whether this is the first of these sequences that took a step, so that sums over sequences count
            ``trace`` once.
        share: this sequence's part of all steps of the sequences that were decoded together.
    """

    output: list[int]
    seconds: float = 0.0
    ttft_seconds: float = 0.0
    histogram: Counter[int] = field(default_factory=Counter)
    step_seconds: list[float] = field(default_factory=list)
    draft_seconds: float = 0.0
    accept_seconds: float = 0.0
    costs: dict[str, Cost] = field(default_factory=dict)
    transcript: list[StepTaken] = field(default_factory=list)
    trace: Trace = field(default_factory=Trace)
    leads: bool = True
    share: float = 1.0

    @property
    def bytes(self) -> float:
        """Least bytes of all components together."""
        return total(self.costs.values()).bytes

    @property
    def flops(self) -> float:
        """Least floating-point operations of all components together."""
        return total(self.costs.values()).flops


@dataclass(slots=True)
class _Sequence:
    """A prompt while it is decoded; ``prepared`` is what the drafter took for the prompt, in seconds."""

    prefix: Prefix
    drafter: Drafter
    result: Decoded
    random: Random
    prepared: float
    finished: bool
    draft: Draft = field(default_factory=Draft)


class Decoder:
    """Speculative decoding of one sequence or several at a time.

    Args:
        step: of the target model.
        cache: large enough for prompt, output and one draft; holds the summaries that sparse arms need.
        stop: when an answer ends.
        clock: seconds, device work included; on the CPU it also times the components of each step.
        prefill_chunk: tokens per forward pass of the prefill.
        rule: how drafts are accepted.
        batch: sequences that run in one step at most; at most the rows of the cache.
        prefills: prompts that were prefilled before, by decoders over the same weights; none are kept without it.
    """

    def __init__(
        self,
        step: Step,
        cache: KVCache,
        *,
        stop: StopRule,
        clock: Callable[[], float],
        prefill_chunk: int,
        rule: Rule | None = None,
        batch: int = 1,
        prefills: Prefills | None = None,
    ) -> None:
        self._step = step
        self._cache = cache
        self._stop = stop
        self._clock = clock
        self._chunk = prefill_chunk
        self._rule = rule or Greedy()
        self._batch = batch
        self._prefills = prefills or Prefills(PrefillStore())
        self._component_clock = clock if step.weights.device.type == "cpu" else None

    def prefill(self, prompt: Sequence[int], row: int = 0, seed: int = 0) -> Prefix:
        """Dense prefill of ``prompt``; the start of every arm (one prefill shared by all).

        Args:
            prompt: token ids.
            row: of the cache; what it held is forgotten.
            seed: of everything that decoding this prompt draws.

        Raises:
            ValueError: the prompt is empty, or longer than the cache or the model's positions.
        """
        self._cache.truncate(row, 0)
        done = self._prefills.restore(prompt, self._cache, row)
        if done is None:
            start = self._clock()
            tokens = torch.tensor(prompt, dtype=torch.int64, device=self._step.weights.device)
            output = self._step.prefill(tokens, self._cache, self._chunk, row)
            done = Prefilled(output.logits, output.features, self._clock() - start)
            self._prefills.keep(prompt, self._cache, row, done)
        first = self._rule.accept(Draft(), self._rule.judge(done.logits[None]), Random(f"{seed} prefill")).bonus
        start = self._clock()
        self._cache.refresh_summaries(row)
        summary_seconds = self._clock() - start
        return Prefix(tuple(prompt), row, seed, first, done.logits, done.features, done.seconds, summary_seconds)

    def decode(self, prefix: Prefix, drafter: Drafter, sparsity: Sparsity, max_new_tokens: int) -> Decoded:
        """:meth:`decode_all` of one prompt."""
        return self.decode_all([prefix], [drafter], sparsity, max_new_tokens)[0]

    def decode_all(
        self, prefixes: Sequence[Prefix], drafters: Sequence[Drafter], sparsity: Sparsity, max_new_tokens: int
    ) -> list[Decoded]:
        """Decode up to ``max_new_tokens`` tokens after each prefix, the prefill's token included.

        As many sequences as the decoder's batch allows run together; when one has finished, the next one enters.

        Args:
            prefixes: each in its own row of the cache.
            drafters: one per prefix.
            sparsity: budgets of all of them.
            max_new_tokens: of each.

        Raises:
            ValueError: the cache is too small.
        """
        clock = self._clock
        tapped = any(getattr(drafter, "reads_features", False) for drafter in drafters)
        run = Verification(sparsity, Trace(clock=self._component_clock), tapped=tapped)
        sequences = [self._start(prefix, drafter, run) for prefix, drafter in zip(prefixes, drafters, strict=True)]
        waiting = [one for one in sequences if not one.finished and max_new_tokens > 1]
        active: list[_Sequence] = []
        began = clock()
        while waiting or active:
            free = self._batch - len(active)
            active, waiting = active + waiting[:free], waiting[free:]
            self._one_step(active, run, max_new_tokens)
            active = [one for one in active if not one.finished]
        self._share(sequences, clock() - began, run)
        return [one.result for one in sequences]

    def _start(self, prefix: Prefix, drafter: Drafter, run: Verification) -> _Sequence:
        """Roll the row back to the prompt and tell the drafter."""
        self._cache.truncate(prefix.row, len(prefix.prompt))
        result = Decoded([prefix.first], trace=run.trace, leads=False)
        chooses = bool(run.sparsity.attention.summaries) or getattr(drafter, "reads_blocks", False)
        result.ttft_seconds = prefix.seconds + (prefix.summary_seconds if chooses else 0.0)
        start = self._clock()
        features = prefix.features
        drafter.reset(prefix.prompt, None if features is None else features[:-1], prefix.seed)
        drafter.observe(result.output, None if features is None else features[-1:])
        prepared = self._clock() - start
        finished = self._stop.cut(result.output, 1) is not None
        return _Sequence(prefix, drafter, result, Random(f"{prefix.seed} decode"), prepared, finished)

    def _share(self, sequences: list[_Sequence], seconds: float, run: Verification) -> None:
        """Give each sequence its share of what all of them took together."""
        shape, trace = self._step.weights.shape, run.trace
        results = [one.result for one in sequences]
        taken = sum(result.seconds for result in results)
        steps = sum(len(result.step_seconds) for result in results)
        costs = trace_costs(shape, run.sparsity.attention, trace)
        for one in sequences:
            result = one.result
            result.seconds = one.prepared + result.seconds * (seconds / taken if taken else 0.0)
            result.draft_seconds += one.prepared
            result.share = len(result.step_seconds) / steps if steps else 0.0
            result.costs = {name: cost * result.share for name, cost in costs.items()} | {"draft": spent(one.drafter)}
        next((result for result in results if result.step_seconds), results[0]).leads = True

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
        cache, row = self._cache, prefix.row
        cache.truncate(row, len(prefix.prompt))
        run = Verification(sparsity, probe=probe)
        logits, position = [], 0
        for taken in decoded.transcript:
            length = cache.lengths[row]
            segment = self._segment(row, decoded.output[position], taken.draft)
            logits.append(self._step.run([segment], cache, run).logits)
            cache.compact(row, length, taken.rows)
            position += taken.kept
        return logits

    def _one_step(self, active: list[_Sequence], run: Verification, max_new_tokens: int) -> None:
        """Draft, verify and accept for all active sequences."""
        cache, clock = self._cache, self._clock
        begun = clock()
        for one in active:
            one.draft = one.drafter.propose(max_new_tokens - len(one.result.output) - 1)
        drafted = clock()
        lengths = [cache.lengths[one.prefix.row] for one in active]
        segments = [self._segment(one.prefix.row, one.result.output[-1], one.draft) for one in active]
        output = self._step.run(segments, cache, run)
        verified = clock()
        judged = self._rule.judge(output.logits)
        place = 0
        for one, length in zip(active, lengths, strict=True):
            own = slice(place, place + 1 + len(one.draft))
            features = None if output.features is None else output.features[own]
            self._accept(one, length, judged[own], features, max_new_tokens)
            place = own.stop
        ended = clock()
        for one in active:
            result = one.result
            result.draft_seconds += (drafted - begun) / len(active)
            result.accept_seconds += (ended - verified) / len(active)
            result.seconds += (ended - begun) / len(active)
            result.step_seconds.append(ended - begun)

    def _accept(self, one: _Sequence, length: int, judged: Any, features: Tensor | None, max_new_tokens: int) -> None:
        """Keep what the rule accepts of one sequence's draft."""
        result, draft = one.result, one.draft
        forced = draft.forced
        accepted = Accepted(*forced) if forced else self._rule.accept(draft, judged, one.random)
        kept, rows = accepted.tokens(draft), [0, *(node + 1 for node in accepted.path)]
        self._cache.compact(one.prefix.row, length, rows)
        result.output.extend(kept)
        stop = self._stop.cut(result.output, len(kept))
        if stop is not None:
            kept = kept[: len(kept) - (len(result.output) - stop)]
            del result.output[stop:]
        one.drafter.observe(kept, None if features is None else features[rows[: len(kept)]])
        one.finished = stop is not None or len(result.output) >= max_new_tokens
        result.histogram[len(kept)] += 1
        result.transcript.append(StepTaken(replace(draft, proposals=None), accepted.path, len(kept)))

    def _segment(self, row: int, root: int, draft: Draft) -> Segment:
        return Segment(row, [root, *draft.tokens], draft.tree(self._step.weights.device))
