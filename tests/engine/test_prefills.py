"""Prompts that are prefilled once for several runs: the same bits, bounded memory, and no mixing of weights."""

import time

import pytest
import torch

from harness.engine.decoding import Decoder, StopRule
from harness.engine.drafting.expansion import Growth
from harness.engine.drafting.lookup import LookupDrafter
from harness.engine.model.families import adapt
from harness.engine.model.step import Step
from harness.engine.prefills import Prefills, PrefillStore
from sparse.budget import AttentionBudget, Sparsity
from tests.engine.tiny import library_model, repetitive_prompt


def decoder(prefills: Prefills, block_size: int = 16, taps: tuple[int, ...] = ()) -> Decoder:
    step = Step(adapt(library_model("llama"), packed=False), taps)
    cache = step.new_cache(700, AttentionBudget(topk=3, block_size=block_size), 2)
    return Decoder(step, cache, stop=StopRule(), clock=time.perf_counter, prefill_chunk=64, prefills=prefills)


def outputs(engine: Decoder, prompt: list[int], row: int = 0, block_size: int = 16) -> list[list[int]]:
    prefix = engine.prefill(prompt, row)
    sparse = Sparsity(AttentionBudget(topk=3, block_size=block_size))
    return [engine.decode(prefix, LookupDrafter(Growth(5), 3), one, 25).output for one in (Sparsity(), sparse)]


@pytest.mark.parametrize("block_size", [16, 32])
def test_a_kept_prompt_gives_the_same_tokens_in_another_decoder(block_size: int) -> None:
    store, prompt = PrefillStore(10**9), repetitive_prompt(300)
    fresh = outputs(decoder(Prefills(PrefillStore()), block_size), prompt, 0, block_size)
    first = Prefills(store, "a")
    assert outputs(decoder(first), prompt) == outputs(decoder(Prefills(PrefillStore())), prompt)
    again = Prefills(store, "a")
    engine = decoder(again, block_size)
    outputs(engine, repetitive_prompt(310, seed=1), row=1)
    assert outputs(engine, prompt, 1, block_size) == fresh
    assert (first.hits, again.hits) == (0, 1)


def test_keys_values_logits_and_features_are_those_of_the_prefill() -> None:
    store, prompt = PrefillStore(10**9), repetitive_prompt(270)
    engines = [decoder(Prefills(store, "a"), taps=(1, 2)) for _ in range(2)]
    made, kept = (engine.prefill(prompt) for engine in engines)
    assert torch.equal(made.logits, kept.logits) and made.features is not None and kept.features is not None
    assert torch.equal(made.features, kept.features) and kept.seconds == made.seconds
    for layer in range(3):
        for one, other in zip(*(engine._cache.prefix(layer, 0, 270) for engine in engines), strict=True):
            assert torch.equal(one, other)


def test_decoding_does_not_reach_what_is_kept() -> None:
    store, prompt = PrefillStore(10**9), repetitive_prompt(250)
    engine = decoder(Prefills(store, "a"))
    before = outputs(engine, prompt)
    outputs(engine, prompt)
    assert outputs(decoder(Prefills(store, "a")), prompt) == before


def test_other_weights_and_other_prompts_are_prefilled() -> None:
    store, prompt = PrefillStore(10**9), repetitive_prompt(100)
    decoder(Prefills(store, "a")).prefill(prompt)
    others = Prefills(store, "b")
    decoder(others).prefill(prompt)
    same = Prefills(store, "a")
    decoder(same).prefill(prompt[:-1])
    assert others.hits == same.hits == 0


def test_memory_is_bounded_and_the_prompt_used_longest_ago_goes() -> None:
    probe = PrefillStore(10**9)
    decoder(Prefills(probe)).prefill(repetitive_prompt(200))
    store = PrefillStore(int(2.5 * probe.nbytes))
    prefills = Prefills(store)
    engine, prompts = decoder(prefills), [repetitive_prompt(200, seed) for seed in range(3)]
    for prompt in (prompts[0], prompts[1], prompts[0], prompts[2]):
        engine.prefill(prompt)
        assert store.nbytes <= store.limit
    assert prefills.hits == 1
    engine.prefill(prompts[0])
    assert prefills.hits == 2
    engine.prefill(prompts[1])
    assert prefills.hits == 2
    store.shrink(probe.nbytes)
    assert 0 < store.nbytes <= probe.nbytes
    store.shrink(0)
    hits = prefills.hits
    engine.prefill(prompts[1])
    assert store.nbytes == 0 and prefills.hits == hits
    small = PrefillStore(probe.nbytes - 1)
    decoder(Prefills(small)).prefill(prompts[0])
    assert small.nbytes == 0
