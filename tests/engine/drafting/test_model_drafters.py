"""Drafters that run a model, on tiny ones: exactness, what they leave in caches, what they run."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.engine.cache import KVCache
from harness.engine.decoding import Decoded, Decoder, StopRule
from harness.engine.drafting.base import Drafter, NoDrafter
from harness.engine.drafting.draft import Draft
from harness.engine.drafting.expansion import Growth, room
from harness.engine.drafting.model import ModelDrafter
from harness.engine.drafting.selfsparse import SelfSparseDrafter
from harness.engine.model.families import adapt
from harness.engine.model.step import Output, Segment, Step
from harness.engine.model.verification import Verification
from harness.engine.sampling import Sampling, distribution
from sparse.budget import AttentionBudget, Sparsity
from sparse.scoring import summarise_blocks
from tests.engine.tiny import VOCAB, library_model, repetitive_prompt

PROMPT, OTHER = repetitive_prompt(203, seed=1), repetitive_prompt(150, seed=2)
CHAIN, TREE = Growth(4), Growth(4, 3, 10)
SPARSE = Sparsity(AttentionBudget(topk=4))
NEW = 40


class Counting(Step):
    """Remembers how many tokens each pass ran."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.runs: list[int] = []
        self.prefills: list[int] = []

    def run(
        self, segments: Sequence[Segment], cache: KVCache, run: Verification | None = None, last: int | None = None
    ) -> Output:
        self.runs.append(sum(len(segment.tokens) for segment in segments))
        return super().run(segments, cache, run, last)

    def prefill(self, tokens: Tensor, cache: KVCache, chunk: int, row: int = 0) -> Output:
        self.prefills.append(len(tokens))
        return super().prefill(tokens, cache, chunk, row)


def counting(seed: int = 0, **changes: Any) -> Counting:
    return Counting(adapt(library_model("llama", seed, **changes), packed=False, channels=True))


def decoder_of(step: Step, stop: StopRule | None = None, rows: int = 1) -> tuple[Decoder, KVCache]:
    cache = step.new_cache(700, SPARSE.attention, rows)
    rule = stop or StopRule()
    return Decoder(step, cache, stop=rule, clock=time.perf_counter, prefill_chunk=64, batch=rows), cache


def decoded(
    decoder: Decoder, drafter: Drafter, prompt: list[int], sparsity: Sparsity | None = None, new: int = NEW
) -> Decoded:
    return decoder.decode(decoder.prefill(prompt), drafter, sparsity or Sparsity(), new)


def plain(prompt: list[int], stop: StopRule | None = None) -> list[int]:
    decoder, _ = decoder_of(counting(), stop)
    return decoded(decoder, NoDrafter(), prompt).output


def small(growth: Growth, *, seed: int = 7, rows: int = 1, row: int = 0, **options: Any) -> ModelDrafter:
    """A drafter with another model: fewer layers, other weights."""
    step = counting(seed, num_hidden_layers=2)
    return ModelDrafter(step, step.new_cache(700, AttentionBudget(), rows), row, growth, **options)


def test_the_target_as_its_own_draft_model_is_always_right() -> None:
    step = counting()
    decoder, _ = decoder_of(step)
    own = counting()
    drafter = ModelDrafter(own, own.new_cache(700, AttentionBudget()), 0, CHAIN)
    result = decoded(decoder, drafter, PROMPT, new=1 + 7 * 5)
    assert result.output == plain(PROMPT)[:36]
    assert result.histogram == {5: 7}
    assert own.prefills == [len(PROMPT)]
    assert own.runs == [1, 1, 1, 1, *[2, 1, 1, 1] * 6], "an accepted chain leaves two tokens to run"


@pytest.mark.parametrize("growth", [CHAIN, TREE, Growth(3, 4), Growth(5, 2, 3), Growth(1, 5)])
def test_another_draft_model_changes_no_token(growth: Growth) -> None:
    drafter = small(growth)
    decoder, _ = decoder_of(counting())
    result = decoded(decoder, drafter, PROMPT)
    assert result.output == plain(PROMPT)
    assert max(len(taken.draft) for taken in result.transcript) == growth.size
    assert any(len(taken.path) < taken.draft.depth for taken in result.transcript), "some drafts must be rejected"
    assert decoded(decoder, drafter, OTHER).output == plain(OTHER)
    assert decoded(decoder, drafter, PROMPT).output == result.output


def test_a_tree_of_the_target_itself_holds_its_greedy_path() -> None:
    """Two levels in which everything grows and stays."""
    own = counting()
    drafter = ModelDrafter(own, own.new_cache(700, AttentionBudget()), 0, Growth(2, 3, 12))
    decoder, _ = decoder_of(counting())
    result = decoded(decoder, drafter, PROMPT, new=1 + 9 * 3)
    assert result.output == plain(PROMPT)[:28]
    assert result.histogram == {3: 9}


def brute_force(step: Step, sequence: list[int], path: list[int], sampling: Sampling) -> Tensor:
    """The distribution after ``sequence`` and ``path`` by a prefill of everything."""
    cache = step.new_cache(700, AttentionBudget())
    logits = step.prefill(torch.tensor([*sequence, *path]), cache, 512).logits
    return distribution(logits[None], sampling)[0]


@pytest.mark.parametrize("growth", [CHAIN, TREE])
@pytest.mark.parametrize("sample", [None, Sampling(0.8, 0.9)])
def test_confidences_are_those_of_a_prefill_after_any_accepts_and_rejects(
    growth: Growth, sample: Sampling | None
) -> None:
    drafter = small(growth, sample=sample)
    random = torch.Generator().manual_seed(4)
    drafter.reset(PROMPT, seed=3)
    sequence = [*PROMPT, 5]
    drafter.observe([5])
    for follow in (2, 0, 4, 1, 3, 0, 80, 2):
        draft = drafter.propose(9)
        assert len(draft) == growth.size
        paths: list[list[int]] = []
        for node, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
            before = paths[parent] if parent >= 0 else []
            expected = brute_force(drafter._step, sequence, before, sample or Sampling())
            assert draft.confidence[node] == pytest.approx(float(expected[token]), abs=2e-5)
            if sample is not None:
                assert draft.proposals is not None
                assert torch.allclose(draft.proposals[parent + 1], expected, atol=2e-5)
            paths.append([*before, token])
        noise = torch.randint(0, VOCAB, (follow,), generator=random).tolist()
        new = [*max(paths, key=len)[:follow], *noise, follow % VOCAB]
        drafter.observe(new)
        sequence += new


def test_the_same_prompt_is_prefilled_once() -> None:
    drafter = small(CHAIN)
    step = drafter._step
    assert isinstance(step, Counting)
    decoder, _ = decoder_of(counting())
    for _ in range(2):
        decoded(decoder, drafter, PROMPT)
    assert step.prefills == [len(PROMPT)]
    decoded(decoder, drafter, [*PROMPT, *OTHER])
    assert step.prefills == [len(PROMPT), len(OTHER)], "a longer prompt goes on from what is cached"
    decoded(decoder, drafter, OTHER)
    common = next(place for place, pair in enumerate(zip(PROMPT, OTHER, strict=False)) if pair[0] != pair[1])
    assert step.prefills[2:] == [len(OTHER) - common]


def test_passes_of_a_tree_run_the_root_and_all_that_grew() -> None:
    drafter = small(Growth(4, 3, 60))
    step = drafter._step
    assert isinstance(step, Counting)
    drafter.reset(PROMPT)
    drafter.observe([1, 2])
    drafter.propose(9)
    assert step.runs == [2, 4, 7, 10] and step.runs[-1] == room(Growth(4, 3, 60))
    drafter.observe([3])
    drafter.propose(2)
    assert step.runs[4:] == [1, 4]
    assert len(drafter.propose(0)) == 0 and len(step.runs) == 6


def test_many_tokens_between_two_drafts_are_prefilled() -> None:
    drafter = small(CHAIN)
    step = drafter._step
    assert isinstance(step, Counting)
    drafter.reset(PROMPT)
    drafter.observe(OTHER)
    drafter.propose(9)
    assert step.prefills == [len(PROMPT), len(OTHER) - 1] and step.runs == [1, 1, 1, 1]


@pytest.mark.parametrize("growth", [CHAIN, TREE])
def test_drawn_drafts_depend_on_the_seed_alone(growth: Growth) -> None:
    step, sample = counting(), Sampling(1.0)
    cache = step.new_cache(700, SPARSE.attention)
    step.prefill(torch.tensor(PROMPT), cache, 64)
    cheap = SelfSparseDrafter(step, cache, 0, growth, sparsity=SPARSE, sample=sample)
    for drafter in (small(growth, sample=sample), cheap):
        drafts = []
        for seed in (1, 2, 1):
            drafter.reset(PROMPT, seed=seed)
            drafter.observe([5])
            drafts.append(drafter.propose(9))
        assert drafts[0].tokens == drafts[2].tokens != drafts[1].tokens
        assert all(draft.proposals is not None for draft in drafts)


@pytest.mark.parametrize("growth", [CHAIN, TREE])
def test_sequences_of_a_batch_draft_on_rows_of_one_cache(growth: Growth) -> None:
    own = counting(7, num_hidden_layers=2)
    cache = own.new_cache(700, AttentionBudget(), 2)
    decoder, target = decoder_of(counting(), rows=2)
    several: list[list[Drafter]] = [
        [ModelDrafter(own, cache, row, growth) for row in range(2)],
        [SelfSparseDrafter(counting(), target, row, growth, sparsity=SPARSE) for row in range(2)],
    ]
    for drafters in several:
        prefixes = [decoder.prefill(prompt, row) for row, prompt in enumerate((PROMPT, OTHER))]
        results = decoder.decode_all(prefixes, drafters, Sparsity(), NEW)
        assert [result.output for result in results] == [plain(PROMPT), plain(OTHER)]


@pytest.mark.parametrize("kind", ["model", "selfsparse"])
@pytest.mark.parametrize("growth", [CHAIN, TREE])
def test_stop_rules_end_where_the_plain_decode_ends(kind: str, growth: Growth) -> None:
    whole = plain(PROMPT)
    stop = StopRule(frozenset({whole[17]}))
    step = counting()
    decoder, cache = decoder_of(step, stop)
    own = ModelDrafter(step, step.new_cache(700, AttentionBudget()), 0, growth)
    drafter = own if kind == "model" else SelfSparseDrafter(step, cache, 0, growth, sparsity=SPARSE)
    for _ in range(2):
        assert decoded(decoder, drafter, PROMPT).output == plain(PROMPT, stop)


def test_the_whole_target_as_drafter_is_always_right() -> None:
    step = counting()
    decoder, cache = decoder_of(step)
    everything = Sparsity(AttentionBudget(topk=1000))
    for sparsity in (Sparsity(), everything):
        drafter = SelfSparseDrafter(step, cache, 0, CHAIN, sparsity=sparsity)
        result = decoded(decoder, drafter, PROMPT, new=36)
        assert result.output == plain(PROMPT)[:36]
        assert result.histogram == {5: 7}
    drafter = SelfSparseDrafter(step, cache, 0, CHAIN, sparsity=Sparsity(), left_out=frozenset({1}))
    assert decoded(decoder, drafter, PROMPT, new=36).histogram != result.histogram


@pytest.mark.parametrize("growth", [CHAIN, TREE])
@pytest.mark.parametrize("left_out", [frozenset[int](), frozenset({1}), frozenset({0, 2})])
def test_a_cheap_target_as_drafter_changes_no_token(growth: Growth, left_out: frozenset[int]) -> None:
    step = counting()
    decoder, cache = decoder_of(step)
    drafter = SelfSparseDrafter(step, cache, 0, growth, sparsity=SPARSE, left_out=left_out)
    for prompt in (PROMPT, OTHER, PROMPT):
        result = decoded(decoder, drafter, prompt)
        assert result.output == plain(prompt)
        assert any(len(taken.path) < taken.draft.depth for taken in result.transcript), "some drafts must be rejected"


class Repeating:
    """Proposes the drafts of an earlier decode again."""

    def __init__(self, drafts: list[Draft]) -> None:
        self.drafts = iter(drafts)

    def reset(self, prompt: Sequence[int], features: Tensor | None = None, seed: int = 0) -> None:
        assert len(prompt)

    def observe(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        assert len(tokens)

    def propose(self, limit: int) -> Draft:
        return next(self.drafts)


@pytest.mark.parametrize("growth", [CHAIN, TREE])
def test_sparse_verification_does_not_notice_who_drafted(growth: Growth) -> None:
    """The same drafts from a drafter that never touches the cache give the same decode, bit by bit."""
    step = counting()
    decoder, cache = decoder_of(step)
    drafting = Sparsity(AttentionBudget(topk=2))
    drafter = SelfSparseDrafter(step, cache, 0, growth, sparsity=drafting, left_out=frozenset({1}))
    result = decoded(decoder, drafter, PROMPT, SPARSE)
    drafts = [taken.draft for taken in result.transcript]
    kept = [cache.prefix(layer, 0, cache.lengths[0]) for layer in range(3)]
    again = decoded(decoder, Repeating(drafts), PROMPT, SPARSE)
    assert again.output == result.output and again.transcript == result.transcript
    for layer, (keys, values) in enumerate(kept):
        more_keys, more_values = cache.prefix(layer, 0, cache.lengths[0])
        assert torch.equal(keys, more_keys) and torch.equal(values, more_values)


@pytest.mark.parametrize("growth", [Growth(20), Growth(7, 6, 30)])
def test_drafting_leaves_the_cache_as_it_was(growth: Growth) -> None:
    """Also where drafts fill blocks of which the sequence then makes others."""
    step = counting()
    cache = step.new_cache(700, SPARSE.attention)
    drafter = SelfSparseDrafter(step, cache, 0, growth, sparsity=SPARSE, left_out=frozenset({2}))
    step.prefill(torch.tensor(PROMPT), cache, 64)
    drafter.reset(PROMPT)
    for token in range(40):
        length = cache.lengths[0]
        before = [cache.prefix(layer, 0, length) for layer in range(3)]
        drafter.observe([token])
        assert len(drafter.propose(30)) == growth.size
        assert cache.lengths == [length]
        cache.refresh_summaries()
        whole = cache.whole_blocks()
        for layer, (keys, values) in enumerate(before):
            after_keys, after_values = cache.prefix(layer, 0, length)
            assert torch.equal(keys, after_keys) and torch.equal(values, after_values)
            blocks = keys[:, : whole * cache.block_size].transpose(1, 2)
            for name, stored in cache.summaries(layer).items():
                recomputed = summarise_blocks(blocks, cache.block_size, name)
                assert torch.allclose(stored[:, :, :whole], recomputed, atol=1e-6)
        step.run([Segment(0, [token])], cache, Verification(SPARSE))


def test_a_draft_that_does_not_fit_leaves_the_cache_as_it_was() -> None:
    step = counting()
    cache = step.new_cache(256, AttentionBudget())
    prompt = repetitive_prompt(253)
    step.prefill(torch.tensor(prompt), cache, 64)
    for growth, fits in ((Growth(6), 2), (Growth(6, 2), 6)):
        drafter = SelfSparseDrafter(step, cache, 0, growth, sparsity=Sparsity())
        drafter.reset(prompt)
        drafter.observe([1])
        with pytest.raises(ValueError, match="capacity"):
            drafter.propose(9)
        assert cache.lengths == [253]
        assert len(drafter.propose(2)) == fits


def test_unfit_caches_and_layers_are_refused() -> None:
    step = counting()
    dense, sparse = (step.new_cache(300, budget) for budget in (AttentionBudget(), SPARSE.attention))
    larger = Sparsity(replace(SPARSE.attention, block_size=32))
    for cache, sparsity in ((dense, SPARSE), (sparse, larger)):
        with pytest.raises(ValueError, match="blocks of"):
            SelfSparseDrafter(step, cache, 0, CHAIN, sparsity=sparsity)
    for left_out in (frozenset({3}), frozenset(range(3))):
        with pytest.raises(ValueError, match="left_out"):
            SelfSparseDrafter(step, sparse, 0, CHAIN, sparsity=SPARSE, left_out=left_out)
