"""Budgets and selections are those of each sequence alone, whatever runs beside it in a step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from operator import attrgetter
from typing import Any

import pytest

from harness.engine.cache import KVCache
from harness.engine.decoding import Decoded, Decoder, StopRule
from harness.engine.drafting.expansion import Growth
from harness.engine.drafting.lookup import LookupDrafter
from harness.engine.model.families import ModelWeights, adapt
from harness.engine.model.step import Output, Segment, Step
from harness.engine.model.verification import Verification
from sparse.budget import AttentionBudget, Sparsity
from sparse.reuse import SelectionMemory
from tests.engine.tiny import library_model, repetitive_prompt
from tests.methods import METHODS, Method

GROWTHS = {"chain": Growth(4), "tree": Growth(3, 3, 8)}
LENGTHS = (131, 49, 170, 97, 118)  # of the prompts; the second one is too short to leave out a block at first
BATCH, NEW, CAPACITY = 3, 28, 230
BY_LENGTH = Method("budgets by length", Sparsity(AttentionBudget(l0=64, rho=0.5)), None, ("select.blocks",))
NAMED = {method.name: method for method in (*METHODS, BY_LENGTH)}
FAST = {
    "budgets by length": "qwen3_moe",
    "attention weighted query": "llama",
    "reuse anchors": "llama",
    "skipped retrieval": "llama",
    "skipped choice of channels": "llama",
    "ffn top-k, union": "llama",
    "moe union, substitute": "qwen3_moe",
    "hybrid with experts": "mixtral",
}
CASES = [
    pytest.param(name, family, marks=() if FAST.get(name) == family else pytest.mark.slow)
    for name, method in NAMED.items()
    for family in method.families
]


@cache
def weights(family: str) -> ModelWeights:
    """Of the tiny model of a family."""
    return adapt(library_model(family), packed=False, channels=True)


class Watched(Step):
    """A step that remembers which rows of the cache ran together.

    Attributes:
        together: the rows of each step.
    """

    def __init__(self, family: str) -> None:
        super().__init__(weights(family))
        self.together: list[list[int]] = []

    def run(self, segments: Sequence[Segment], cache: KVCache, *others: Any, **named: Any) -> Output:
        """As its parent does."""
        self.together.append([segment.row for segment in segments])
        return super().run(segments, cache, *others, **named)


def decoded(step: Step, name: str, form: str, numbers: Sequence[int], batch: int) -> list[Decoded]:
    """Decodes of the prompts with these numbers, each in a row of its own."""
    sparsity = NAMED[name].active
    store = step.new_cache(CAPACITY, sparsity.attention, len(numbers))
    engine = Decoder(step, store, stop=StopRule(), clock=time.perf_counter, prefill_chunk=64, batch=batch)
    prefixes = [engine.prefill(repetitive_prompt(LENGTHS[number], number), row) for row, number in enumerate(numbers)]
    return engine.decode_all(prefixes, [LookupDrafter(GROWTHS[form], 3) for _ in numbers], sparsity, NEW)


@cache
def alone(name: str, family: str, form: str) -> list[Decoded]:
    """Each prompt in a cache of its own, one at a time."""
    return [decoded(Step(weights(family)), name, form, [number], 1)[0] for number in range(len(LENGTHS))]


def total(counters: Iterable[Counter[int]]) -> Counter[int]:
    """Their sum, without zeros."""
    return sum(counters, Counter[int]())


@pytest.mark.parametrize("form", GROWTHS)
@pytest.mark.parametrize("name, family", CASES)
def test_a_batch_decodes_what_each_sequence_decodes_alone(name: str, family: str, form: str) -> None:
    """Five ragged prompts, three at a time: tokens, drafts and accepted paths, and the work that was chosen."""
    step = Watched(family)
    together = decoded(step, name, form, range(len(LENGTHS)), BATCH)
    singly, trace = alone(name, family, form), together[0].trace
    for one, other in zip(together, singly, strict=True):
        assert one.output == other.output and len(one.output) == NEW
        assert one.transcript == other.transcript
    for path in NAMED[name].paths:
        assert any(taken.startswith(path) for taken in trace.paths), path
    own = ["attended", "visible", "stale"]
    if not NAMED[name].active.shares_nothing:
        own += ["channels", "width", "experts_wanted", "experts_loaded", "pairs"]
    for counter in map(attrgetter, own):
        assert +counter(trace) == total(counter(one.trace) for one in singly)
    assert trace.scored == sum(one.trace.scored for one in singly)
    drafts = [taken.draft for one in together for taken in one.transcript]
    assert any(taken.path for one in together for taken in one.transcript)
    assert any(not draft.is_chain for draft in drafts) == (form == "tree")
    check_that_rows_leave_and_enter(step.together, together)


def check_that_rows_leave_and_enter(steps: list[list[int]], results: list[Decoded]) -> None:
    """The case is worth its name: newcomers run beside rows that began long before."""
    assert len(steps) == results[0].trace.steps
    ran = [[number for number, rows in enumerate(steps) if row in rows] for row in range(len(results))]
    assert [len(numbers) for numbers in ran] == [len(one.step_seconds) for one in results]
    assert all(numbers == list(range(numbers[0], numbers[-1] + 1)) for numbers in ran)
    unfinished = [sum(numbers[-1] >= step for numbers in ran) for step in range(len(steps))]
    assert [len(rows) for rows in steps] == [min(BATCH, count) for count in unfinished]
    assert any(min(ran[row][0] for row in steps[numbers[0]]) < numbers[0] for numbers in ran)


def shared_memory(patch: pytest.MonkeyPatch) -> None:
    """All rows remember one selection."""

    def memory(self: Verification, row: int) -> SelectionMemory:
        return self.memories.setdefault(0, SelectionMemory())

    patch.setattr(Verification, "memory", memory)


def memory_by_place(patch: pytest.MonkeyPatch) -> None:
    """Rows remember by their place in the step, which others held before them."""
    begin, places = Verification.begin, list[int]()

    def note(self: Verification, rows: list[int], tokens: int) -> None:
        places[:] = rows
        begin(self, rows, tokens)

    def memory(self: Verification, row: int) -> SelectionMemory:
        return self.memories.setdefault(places.index(row) if row in places else -1, SelectionMemory())

    patch.setattr(Verification, "begin", note)
    patch.setattr(Verification, "memory", memory)


def one_choice(patch: pytest.MonkeyPatch) -> None:
    """Channels and experts are chosen for all sequences of a step together."""
    patch.setattr(Sparsity, "shares_nothing", property(lambda self: True))


def summaries_of_the_first_row(patch: pytest.MonkeyPatch) -> None:
    """Blocks are scored by the keys of another row."""
    summaries = KVCache.summaries
    patch.setattr(KVCache, "summaries", lambda self, layer, row=0: summaries(self, layer, 0))


def budget_of_the_longest(patch: pytest.MonkeyPatch) -> None:
    """Every row keeps as many blocks as the longest one may."""
    blocks = AttentionBudget.blocks

    def most(self: AttentionBudget, length: int) -> int:
        return min(blocks(self, max(length, *LENGTHS)), length // self.block_size)

    patch.setattr(AttentionBudget, "blocks", most)


@pytest.mark.parametrize(
    "fault, name",
    [
        (shared_memory, "reuse anchors"),
        (shared_memory, "skipped retrieval"),
        (shared_memory, "skipped choice of channels"),
        (memory_by_place, "skipped retrieval"),
        (memory_by_place, "skipped choice of channels"),
        (one_choice, "ffn top-k, union"),
        (one_choice, "moe union, substitute"),
        (summaries_of_the_first_row, "attention weighted query"),
        (budget_of_the_longest, "budgets by length"),
    ],
)
def test_what_rows_wrongly_share_is_found_out(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None], name: str
) -> None:
    family = FAST[name]
    expected = [one.output for one in alone(name, family, "tree")]
    fault(monkeypatch)
    found = decoded(Step(weights(family)), name, "tree", range(len(LENGTHS)), BATCH)
    assert [one.output for one in found] != expected
