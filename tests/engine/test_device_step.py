"""The captured step against the step by step one: its body in Triton's interpreter, its graphs where there is a GPU."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.engine.decoding import Decoder, StopRule
from harness.engine.drafting.expansion import Growth
from harness.engine.drafting.lookup import LookupDrafter
from harness.engine.model import device_form
from harness.engine.model.device_step import DeviceStep
from harness.engine.model.step import Segment, Step
from harness.engine.model.verification import Verification
from sparse.budget import AttentionBudget, FfnBudget, MoeBudget, ReuseBudget, Sparsity
from sparse.scoring import summarise_blocks
from sparse.trace import Trace
from tests.engine.device_pairs import BLOCKS, LENGTHS, LIMIT, Pair, rounds, steps_of, tiny, tree_of
from tests.engine.tiny import VOCAB, repetitive_prompt
from tests.ops.interpreter import DEVICE, interpreting


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    with interpreting():
        yield


CASES = {
    "dense chain": ("llama", Sparsity(), "chain", 1),
    "dense ragged tree": ("qwen3", Sparsity(), "tree", 3),
    "norm over all heads": ("olmoe", Sparsity(BLOCKS), "chain", 1),
    "blocks": ("llama", Sparsity(BLOCKS), "chain", 1),
    "blocks, ragged tree": ("qwen3", Sparsity(BLOCKS), "tree", 3),
    "piecewise budget, bounds": ("llama", Sparsity(AttentionBudget(l0=64, rho=0.3, score="bound")), "chain", 3),
    "variance, weighted tree": (
        "llama",
        Sparsity(AttentionBudget(topk=3, score="gaussian", query="weighted")),
        "tree",
        1,
    ),
    "mean query, maximum over heads": ("llama", Sparsity(AttentionBudget(topk=3, query="mean", gqa="max")), "chain", 3),
    "anchors, head map, dense first layer": (
        "llama",
        Sparsity(
            AttentionBudget(topk=3, dense_layers=1), reuse=ReuseBudget(anchors=(1,), head_map=((0, 1), (0, 1), (1, 0)))
        ),
        "tree",
        3,
    ),
    "late anchor": ("qwen2", Sparsity(BLOCKS, reuse=ReuseBudget(anchors=(1,))), "chain", 1),
    "skipped FFN": ("llama", Sparsity(reuse=ReuseBudget(skip=("ffn",), skip_layers=(1,))), "chain", 1),
    "FFN, union": ("llama", Sparsity(ffn=FfnBudget("topk", 0.5)), "chain", 3),
    "FFN, root, dense first layer": (
        "llama",
        Sparsity(ffn=FfnBudget("topk", 0.3, mask="root", dense_layers=1)),
        "chain",
        1,
    ),
    "FFN, weighted": ("qwen3", Sparsity(ffn=FfnBudget("topk", 0.4, mask="weighted")), "tree", 3),
    "FFN, threshold": ("llama", Sparsity(ffn=FfnBudget("threshold", tau=0.5)), "chain", 3),
    "FFN, out of reach": ("llama", Sparsity(ffn=FfnBudget("threshold", tau=1e9)), "tree", 1),
    "experts": ("qwen3_moe", Sparsity(BLOCKS), "tree", 3),
    "experts, union": ("qwen3_moe", Sparsity(moe=MoeBudget(union=3)), "chain", 3),
    "experts, union, dropped": ("olmoe", Sparsity(BLOCKS, moe=MoeBudget(union=3, outside="drop")), "tree", 1),
    "experts, wide union": ("mixtral", Sparsity(moe=MoeBudget(union=6, free_loaded=True)), "chain", 1),
}


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_those_run_one_by_one(name: str) -> None:
    """Several steps with random acceptance in between, so that summaries, rollbacks and filling tokens count."""
    family, sparsity, form, batch = CASES[name]
    pair = Pair.of(family, sparsity, batch)
    rounds(pair, sparsity, form, batch)


def test_a_shared_expert_and_experts_of_equal_weight() -> None:
    """As carved models have them."""
    weights = tiny("qwen3_moe")
    shared = weights.layers[1].ffn

    def carved(moe: Any) -> Any:
        return SimpleNamespace(**{**vars(moe), "shared": shared, "unit": True})

    layers = tuple(one if one.moe is None else replace(one, moe=carved(one.moe)) for one in weights.layers)
    pair = Pair.over(replace(weights, layers=layers), Sparsity(), 1)
    rounds(pair, Sparsity(), "chain", 1, 2)


def test_summaries_are_those_of_the_keys_after_any_steps() -> None:
    """Blocks that became whole in captured steps, and those that a step summarised before it was rolled back."""
    sparsity = Sparsity(AttentionBudget(topk=3, score="bound"))
    pair = Pair.of("llama", sparsity, 2)
    rounds(pair, sparsity, "tree", 2, 7)
    store = pair.stores[1]
    made = [store.unsummarised(row).start for row in range(2)]
    assert all(0 <= length // 16 - blocks <= 1 for length, blocks in zip(store.lengths, made, strict=True))
    assert sum(made) > sum(length // 16 for length in LENGTHS[:2])
    for row, summarised in enumerate(made):
        for layer in range(3):
            keys = store.prefix(layer, row, summarised * 16)[0].transpose(1, 2)
            for name, found in store.summaries(layer, row).items():
                assert torch.equal(found[..., :summarised], summarise_blocks(keys, 16, name))


def test_many_stale_summaries_are_caught_up_with() -> None:
    """More than one step makes whole: here all of the prompt's, which no one summarised."""
    sparsity = Sparsity(BLOCKS)
    pair = Pair.of("llama", sparsity, 1)
    assert len(pair.stores[1].unsummarised(0)) == LENGTHS[0] // 16
    assert pair.both([Segment(0, [3, 1])], (Verification(sparsity), Verification(sparsity))) < LIMIT
    assert len(pair.stores[1].unsummarised(0)) == 0


def test_counters_are_those_of_the_step_by_step_one() -> None:
    """One sequence: every axis; the paths differ in the name of what ran."""
    names = {
        device_form.DENSE_PATH: "dense_attention.torch",
        device_form.SPARSE_PATH: "block_attention.torch",
        device_form.FFN_PATH: "sparse_ffn",
        device_form.MOE_PATH: "moe",
    }
    anchors = ReuseBudget(anchors=(1,), skip=("ffn",), skip_layers=(2,))
    attention = Sparsity(AttentionBudget(topk=3, dense_layers=1), reuse=anchors)
    ffn = Sparsity(ffn=FfnBudget("threshold", tau=0.5, dense_layers=1))
    union = Sparsity(BLOCKS, moe=MoeBudget(union=3))
    for family, sparsity in (("llama", attention), ("llama", ffn), ("qwen3_moe", Sparsity()), ("qwen3_moe", union)):
        expected, found = rounds(Pair.of(family, sparsity, 1), sparsity, "tree", 1, 2)
        for one in fields(Trace):
            if one.name not in ("clock", "seconds", "paths", "_mark"):
                assert getattr(found, one.name) == getattr(expected, one.name), one.name
        paths: Counter[str] = Counter()
        for name, calls in expected.paths.items():
            moe = name.startswith(("moe.", "dense_moe."))
            paths["moe" if moe else "sparse_ffn" if name.startswith("sparse_ffn.") else name] += calls
        assert Counter({names.get(name, name): calls for name, calls in found.paths.items()}) == paths


def test_counters_of_a_batch() -> None:
    """Attention reads for each sequence what it reads alone; the gate is read once for all of them."""
    both = Sparsity(BLOCKS, ffn=FfnBudget("topk", 0.5))
    expected, found = rounds(Pair.of("llama", both, 3), both, "chain", 3, 2)
    for name in ("visible", "attended", "attention_products", "scored", "width", "channels", "channel_products"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.gates * 3 == expected.gates and found.gate_products == expected.gate_products
    assert found.paths["select.blocks"] == expected.paths["select.blocks"]
    assert found.paths["ffn.channels_dropped"] == found.paths["sparse_ffn.triton"] == 3 * 3 * 2


def test_features_order_and_last_tokens() -> None:
    """Segments come back in the caller's order, whatever their rows; so do the features."""
    pair = Pair.of("llama", Sparsity(), 3, taps=(0, 2))
    draw, runs = random.Random(3), (Verification(), Verification())
    segments = [Segment(2, [5, 6, 7]), Segment(0, [1] * 5, tree_of(5, draw)), Segment(1, [9])]
    assert pair.both(segments, runs, last=2) < LIMIT
    untapped = pair.device.run([Segment(1, [4])], pair.stores[1], Verification(tapped=False))
    assert untapped.features is None and untapped.logits.shape == (1, VOCAB)


def test_layers_that_are_left_out() -> None:
    sparsity = Sparsity(BLOCKS, reuse=ReuseBudget(anchors=(0,)))
    pair = Pair.of("llama", sparsity, 1)
    left_out = frozenset({0})
    runs = Verification(sparsity, left_out=left_out), Verification(sparsity, left_out=left_out)
    assert pair.both([Segment(0, [3, 1, 2])], runs) < LIMIT
    assert runs[1].trace.paths["reuse.miss_anchor"] == runs[0].trace.paths["reuse.miss_anchor"] == 1


def test_forms_are_kept_as_long_as_they_are_used() -> None:
    weights = tiny("llama")
    step = DeviceStep(weights, graphs=2)
    store = step.new_cache(300, AttentionBudget())
    for count in (1, 3, 1, 4, 9):
        step.run([Segment(0, [1] * count)], store)
    assert [form.tokens for form in step.forms(store)] == [4, 12]
    assert step.forms(step.new_cache(300, AttentionBudget())) == ()


def test_a_full_cache_takes_exactly_what_fits() -> None:
    """A cache without room for tokens that fill up, as another step makes it."""
    weights = tiny("llama")
    step, eager = DeviceStep(weights), Step(weights)
    stores = [eager.new_cache(256, AttentionBudget()) for _ in range(2)]
    for store in stores:
        eager.prefill(torch.tensor(repetitive_prompt(250), device=DEVICE), store, 128)
    tokens = Segment(0, [1, 2, 3, 4, 5])
    found, expected = step.run([tokens], stores[0]).logits, eager.run([tokens], stores[1]).logits
    assert (found - expected).abs().max() < LIMIT
    with pytest.raises(ValueError, match="position 257 lies beyond the cache's capacity of 256"):
        step.run([Segment(0, [1, 2])], stores[0])
    with pytest.raises(ValueError, match="a sequence runs 65 tokens"):
        step.run([Segment(0, [1] * 65)], stores[0])
    store = step.new_cache(1024, AttentionBudget())
    store.advance(0, 1023)
    with pytest.raises(ValueError, match="position 1025 lies beyond the model's 1024 positions"):
        step.run([Segment(0, [1, 2])], store)


def test_decoding_goes_as_with_the_step_by_step_one() -> None:
    """Sequences that finish make room for others, in other rows of the cache."""
    outputs = []
    for step in (Step(tiny("llama")), DeviceStep(tiny("llama"))):
        store = step.new_cache(250, BLOCKS, 3)
        engine = Decoder(step, store, stop=StopRule(), clock=time.perf_counter, prefill_chunk=64, batch=2)
        prefixes = [engine.prefill(repetitive_prompt(length, row), row) for row, length in enumerate((131, 70, 90))]
        drafters = [LookupDrafter(Growth(4), 3) for _ in prefixes]
        outputs.append([one.output for one in engine.decode_all(prefixes, drafters, Sparsity(BLOCKS), 7)])
    assert outputs[0] == outputs[1]


@contextmanager
def never_waiting() -> Iterator[None]:
    """Raises where the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_replays_equal_the_function_they_captured(name: str, dtype: torch.dtype) -> None:
    """Forms take turns and make room for each other, so that graphs share their memory."""
    family, sparsity, form, batch = CASES[name]
    weights = tiny(family, dtype)
    captured, plain = DeviceStep(weights, graphs=3), DeviceStep(weights, capture=False)
    pair = Pair.over(weights, sparsity, batch)
    pair = replace(pair, eager=plain, device=captured)
    draw, runs = random.Random(5), (Verification(sparsity), Verification(sparsity))
    for _ in range(8):
        segments = steps_of(form, batch, draw)
        assert pair.both(segments, runs) < (LIMIT if dtype is torch.float32 else 0.05)
        pair.accept(segments, draw)
    assert 1 < len(captured.forms(pair.stores[1])) <= 3
    assert runs[0].trace == runs[1].trace


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_rounding_of_bf16_stays_small() -> None:
    """Dense, so that no choice can flip."""
    pair = Pair.over(tiny("qwen3", torch.bfloat16), Sparsity(), 3)
    segments = steps_of("tree", 3, random.Random(2))
    found = pair.device.run(segments, pair.stores[1]).logits.float()
    expected = pair.eager.run(segments, pair.stores[0]).logits.float()
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("form", ["chain", "tree"])
def test_nothing_waits_for_the_device(form: str) -> None:
    """A whole step, the filling of its inputs included; only counts that the device alone knows are waited for."""
    sparsity = Sparsity(AttentionBudget(topk=3, query="weighted"), FfnBudget("topk", 0.5))
    step = DeviceStep(tiny("llama"))
    store, run = step.new_cache(600, sparsity.attention, 2), Verification(sparsity)
    for row in range(2):
        step.prefill(torch.tensor(repetitive_prompt(150, row), device=DEVICE), store, 128, row)
    trees = [tree_of(6, random.Random(row)) if form == "tree" else None for row in range(2)]
    segments = [Segment(row, [1, 2, 3, 4, 5, 6], tree) for row, tree in enumerate(trees)]
    step.run(segments, store, run)
    with never_waiting():
        for _ in range(5):
            step.run(segments, store, run)
            store.compact(0, store.lengths[0] - 6, [0, 2])
    assert len(step.forms(store)) == 1
