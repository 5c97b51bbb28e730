"""The exactness ladder on tiny models (DESIGN section 5, steps 1, 2 and 5)."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from harness.engine.decoding import StopRule
from harness.engine.drafting.base import Drafter, NoDrafter
from harness.engine.drafting.draft import Draft
from harness.engine.drafting.expansion import Growth
from harness.engine.drafting.lookup import LookupDrafter
from harness.engine.model.families import FAMILIES
from sparse.budget import AttentionBudget, Sparsity
from tests.engine.tiny import VOCAB, decoder, library_model, repetitive_prompt

DENSE = Sparsity()
NEW = 40
GENERATE = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


class WrongDrafter(NoDrafter):
    """Always proposes the same tokens, nearly always wrong ones."""

    def propose(self, limit: int) -> Draft:
        return Draft.chain([3, 3, 3][:limit])


class OracleDrafter(NoDrafter):
    """Proposes a known continuation."""

    def __init__(self, prompt: int, continuation: Sequence[int]) -> None:
        self.known, self.start, self.seen = list(continuation), prompt, 0

    def reset(self, prompt: Sequence[int], features: Tensor | None = None, seed: int = 0) -> None:
        self.seen = 0

    def observe(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        self.seen += len(tokens)

    def propose(self, limit: int) -> Draft:
        return Draft.chain(self.known[self.seen : self.seen + min(6, limit)])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_drafter_gives_the_tokens_of_generate(family: str) -> None:
    prompt = repetitive_prompt(310)
    with torch.inference_mode():
        ids = library_model(family).generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), **GENERATE
        )
    expected = ids[0, len(prompt) :].tolist()
    engine = decoder(family)
    prefix = engine.prefill(prompt)
    drafters: list[Drafter] = [NoDrafter(), LookupDrafter(Growth(6), 3), WrongDrafter(), OracleDrafter(310, expected)]
    steps = []
    for drafter in drafters:
        decoded = engine.decode(prefix, drafter, DENSE, NEW)
        assert decoded.output == expected
        assert sum(new * count for new, count in decoded.histogram.items()) == NEW - 1
        assert sum(decoded.histogram.values()) == len(decoded.step_seconds)
        steps.append(len(decoded.step_seconds))
    assert len(set(expected)) > 4, "a continuation that repeats one token tests nothing"
    assert steps[0] == NEW - 1 and steps[3] == -(-(NEW - 1) // 7)


def test_sparse_arms_leave_the_prefix_untouched() -> None:
    """One prefill serves all arms in any order: a sparse arm in between changes nothing for dense ones."""
    budget = Sparsity(AttentionBudget(topk=3))
    engine, prompt = decoder(budget=budget), repetitive_prompt(400)
    prefix = engine.prefill(prompt)
    dense = engine.decode(prefix, NoDrafter(), DENSE, NEW)
    sparse = engine.decode(prefix, LookupDrafter(Growth(6), 3), budget, NEW)
    again = engine.decode(prefix, NoDrafter(), DENSE, NEW)
    sparse_again = engine.decode(prefix, LookupDrafter(Growth(6), 3), budget, NEW)
    assert again.output == dense.output and sparse_again.output == sparse.output
    assert sparse.output != dense.output


def test_sparse_counters_say_what_was_attended() -> None:
    budget = Sparsity(AttentionBudget(topk=4, block_size=16, dense_layers=1))
    engine, prompt = decoder(budget=budget), repetitive_prompt(300)
    decoded = engine.decode(engine.prefill(prompt), NoDrafter(), budget, 2)
    length, tail = 301, 301 - 18 * 16
    trace = decoded.trace
    assert +trace.paths == {
        "dense_attention.torch": 1,
        "block_attention.torch": 2,
        "select.blocks": 2,
        "dense_ffn.torch": 3,
    }
    kept = 4 * 16 + tail
    assert dict(trace.visible) == {0: length, 1: length, 2: length}
    assert dict(trace.attended) == {0: length, 1: kept, 2: kept}
    assert trace.scored == 2 * 18 and trace.densities("attention", 3) == [1, kept / length, kept / length]
    assert set(trace.seconds) == {"linear", "attention", "select", "ffn", "head"}
    assert 0 < trace.seconds.total() <= sum(decoded.step_seconds)
    dense = engine.decode(engine.prefill(prompt), NoDrafter(), DENSE, 2)
    assert dense.trace.density("attention") == 1 and decoded.bytes < dense.bytes and decoded.flops < dense.flops


def test_draft_rows_share_one_selection() -> None:
    budget = Sparsity(AttentionBudget(topk=4))
    engine, prompt = decoder(budget=budget), repetitive_prompt(300)
    decoded = engine.decode(engine.prefill(prompt), WrongDrafter(), budget, 5)
    layers, steps = 3, len(decoded.step_seconds)
    assert decoded.trace.paths["select.blocks"] == layers * steps
    proposed = sum(min(3, 5 - 1 - done - 1) for done in range(steps))
    assert decoded.trace.paths["reuse.draft_tokens"] == layers * proposed


def test_short_contexts_stay_dense() -> None:
    budget = Sparsity(AttentionBudget(topk=8))
    engine, prompt = decoder(budget=budget), repetitive_prompt(100)
    decoded = engine.decode(engine.prefill(prompt), NoDrafter(), budget, 6)
    assert set(decoded.trace.paths) == {"dense_attention.torch", "dense_ffn.torch"}


class Letters:
    """Decodes token ids to letters."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(chr(97 + token) for token in token_ids)


def test_stop_rules_cut_at_the_first_stop() -> None:
    rule = StopRule(end_ids=frozenset({25}), strings=("bc", "xyz"), decoder=Letters())
    assert rule.cut([0, 4, 5], 2) is None
    assert rule.cut([0, 25, 5], 2) == 2
    assert rule.cut([0, 1, 2, 7], 3) == 3
    assert rule.cut([7, 1, 2, 7], 2) == 3, "a stop string that began in an earlier step"
    assert rule.cut([1, 23, 24, 25], 1) == 4


def test_answers_end_alike_in_every_arm() -> None:
    prompt = repetitive_prompt(310)
    endless = decoder()
    free = endless.decode(endless.prefill(prompt), NoDrafter(), DENSE, NEW).output
    end = free[NEW // 2]
    stop = StopRule(end_ids=frozenset({end}))
    engine = decoder(stop=stop)
    prefix = engine.prefill(prompt)
    expected = free[: free.index(end) + 1]
    for drafter in (NoDrafter(), LookupDrafter(Growth(6), 3), OracleDrafter(310, free)):
        decoded = engine.decode(prefix, drafter, DENSE, NEW)
        assert decoded.output == expected
        assert sum(new * count for new, count in decoded.histogram.items()) == len(expected) - 1


def test_one_token_answers_need_no_step() -> None:
    engine = decoder()
    decoded = engine.decode(engine.prefill(repetitive_prompt(50)), NoDrafter(), DENSE, 1)
    assert len(decoded.output) == 1 and decoded.step_seconds == [] and decoded.output[0] < VOCAB
