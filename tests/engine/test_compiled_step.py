"""The compiled step against the one that runs with torch operators: logits, choices, counters, and bf16 bit by bit."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.engine.analysis import SelectionAnalysis
from harness.engine.decoding import Decoder, StopRule
from harness.engine.drafting.expansion import Growth
from harness.engine.drafting.lookup import LookupDrafter
from harness.engine.model import compiled_step
from harness.engine.model.compiled_step import CompiledStep
from harness.engine.model.engines import make_step
from harness.engine.model.families import FAMILIES, adapt
from harness.engine.model.probe import Probe
from harness.engine.model.step import Segment, Step
from harness.engine.model.verification import Verification
from sparse.budget import AttentionBudget, ReuseBudget, Sparsity
from sparse.ops.decoder_layer import native
from sparse.trace import Trace
from tests.engine.compiled_pairs import CAPACITY, LIMIT, WIDTH, Pair, plain, ran, random_tree, same_counters, tiny
from tests.engine.tiny import VOCAB, library_model, repetitive_prompt
from tests.methods import DENSE_FAMILIES, METHODS, Method
from tests.sparse.decoder_layers import need

BLOCKS = AttentionBudget(topk=3)


@pytest.fixture(autouse=True)
def kernels() -> None:
    need(torch.float32)


@pytest.mark.parametrize(
    "method, family",
    [pytest.param(method, family, id=f"{method.name}, {family}") for method in METHODS for family in method.families],
)
def test_every_method_does_what_it_does_with_torch_operators(method: Method, family: str) -> None:
    """Several steps with random acceptance in between; what was chosen, remembered and counted is the same."""
    expected, found = Pair.of(family, method.active).rounds(method.active)
    same_counters(expected, found)
    sparse = not method.active.attention.is_dense
    attended = "block_attention" if sparse else "dense_attention"
    assert (ran(found, attended) > 0) == (family != "olmoe") and not any(
        ".native" in name for name in plain(found.paths)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 3])
def test_dense_steps_of_every_family(family: str, rows: int) -> None:
    """Layers that the kernels do not cover run beside those that they do: OLMoE's norms, and experts."""
    pair = Pair.of(family, Sparsity(), rows)
    expected, found = pair.rounds(Sparsity())
    same_counters(expected, found)
    covered = 0 if family == "olmoe" else 3
    assert pair.compiled.covers_all == (covered == 3) and ran(found, "dense_attention") == 4 * rows * covered
    ffns = {"qwen3_moe": 1}.get(family, 3 if family in DENSE_FAMILIES else 0)
    assert ran(found, "dense_ffn") == 4 * ffns


@pytest.mark.parametrize(
    "sparsity",
    [
        Sparsity(BLOCKS),
        Sparsity(AttentionBudget(topk=3, query="weighted", gqa="max", dense_layers=1)),
        Sparsity(AttentionBudget(l0=64, rho=0.3, score="bound", block_size=32)),
        Sparsity(BLOCKS, reuse=ReuseBudget(anchors=(1,), head_map=((0, 1), (0, 1), (1, 0)))),
        Sparsity(AttentionBudget(topk=3, heads="pooled", low_heads=((0, 1), (2, 0)))),
        Sparsity(BLOCKS, reuse=ReuseBudget(skip=("retrieval",), skip_layers=(1, 2), refresh=3)),
    ],
    ids=str,
)
def test_ragged_batches(sparsity: Sparsity) -> None:
    """Sequences of which some leave blocks out, and some are too short for it."""
    expected, found = Pair.of("llama", sparsity, 3).rounds(sparsity)
    same_counters(expected, found)
    assert ran(found, "block_attention") and ran(found, "dense_attention")


@pytest.mark.parametrize("query", ["first", "mean", "weighted", "max"])
@pytest.mark.parametrize("score", ["mean", "bound", "gaussian"])
def test_no_score_leaves_the_kernels(score: str, query: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever blocks are judged by, layers that retrieve wait in the queue like the others."""

    def interrupted(*_: object) -> None:
        raise AssertionError("torch operators chose the blocks")

    monkeypatch.setattr(compiled_step, "chosen", interrupted)
    sparsity = Sparsity(AttentionBudget(topk=3, score=score, query=query, gqa="max" if query == "mean" else "mean"))
    expected, found = Pair.of("llama", sparsity, 2).rounds(sparsity)
    same_counters(expected, found)
    assert ran(found, "block_attention")


def test_caches_hold_the_same() -> None:
    """Keys, values and block summaries after steps and rollbacks; nothing else was written."""
    sparsity = Sparsity(BLOCKS)
    pair = Pair.of("qwen3", sparsity, 2)
    pair.rounds(sparsity, 6)
    for row in range(2):
        length, blocks = pair.stores[0].lengths[row], pair.stores[0].whole_blocks(row)
        for store in pair.stores:
            store.refresh_summaries(row)
        for layer in range(3):
            for mine, theirs in zip(*(store.prefix(layer, row, length) for store in pair.stores), strict=True):
                assert (mine - theirs).abs().max() < LIMIT
            means = [store.summaries(layer, row)["mean"][..., :blocks] for store in pair.stores]
            assert (means[0] - means[1]).abs().max() < LIMIT
            keys, values = pair.stores[1].layer(layer, row)
            assert keys[-1, :, :, -64:].isnan().all() and values[-1, :, -64:].isnan().all()


def test_features_order_and_last_tokens() -> None:
    """Segments come back in the caller's order, whatever their rows; so do the features."""
    pair = Pair.of("llama", Sparsity(), 3, taps=(0, 2))
    segments = [Segment(2, [5, 6, 7]), Segment(0, [1] * 5, random_tree(5, random.Random(3))), Segment(1, [9])]
    pair.both(segments, (Verification(), Verification()), last=2)
    untapped = pair.compiled.run([Segment(1, [4])], pair.stores[1], Verification(tapped=False))
    assert untapped.features is None and untapped.logits.shape == (1, VOCAB)


@pytest.mark.parametrize("left_out", [frozenset({0}), frozenset({1}), frozenset({0, 1, 2})])
def test_layers_that_are_left_out(left_out: frozenset[int]) -> None:
    sparsity = Sparsity(BLOCKS, reuse=ReuseBudget(anchors=(0,)))
    same_counters(*Pair.of("llama", sparsity).rounds(sparsity, left_out=left_out))


def test_layers_that_do_not_fit_run_between_those_that_do() -> None:
    """Odd widths, and layers of which one half alone is packed."""
    sparsity = Sparsity(BLOCKS, reuse=ReuseBudget(anchors=(0,)))
    expected, found = Pair.of("llama", sparsity, width=88).rounds(sparsity)
    same_counters(expected, found)
    assert ran(found, "block_attention") == 12 and not ran(found, "dense_ffn")
    ours, theirs = tiny("llama", True), tiny("llama", False)
    first, second, third = ours.layers
    assert third.ffn is not None and theirs.layers[2].ffn is not None
    layers = (
        replace(first, qkv=theirs.layers[0].qkv),
        replace(second, ffn=theirs.layers[1].ffn),
        replace(third, output=theirs.layers[2].output, ffn=replace(third.ffn, down=theirs.layers[2].ffn.down)),
    )
    pair = Pair.over(theirs, replace(ours, layers=layers, head=theirs.head), sparsity)
    expected, found = pair.rounds(sparsity)
    same_counters(expected, found)
    assert not pair.compiled.covers_all and ran(found, "block_attention") == ran(found, "dense_ffn") == 4


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_weights_that_are_not_packed_run_with_torch_operators(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that were to be packed where the kernels do not run."""
    monkeypatch.setattr(native, "available", lambda dtype: False)
    for packed in (False, True):
        weights = adapt(library_model(family, intermediate_size=WIDTH), packed=packed, channels=True)
        pair = Pair.over(tiny(family, False), weights, Sparsity(BLOCKS))
        expected, found = pair.rounds(Sparsity(BLOCKS))
        same_counters(expected, found)
        assert not pair.compiled.covers_all and not ran(found, "block_attention") and not ran(found, "dense_ffn")


class Noted(Probe):
    """Counts what it is shown, and silences the first attention."""

    def __init__(self) -> None:
        self.shown: Counter[str] = Counter()

    def mixed(self, layer: int, output: Tensor) -> Tensor:
        self.shown["mixed"] += 1
        return output if layer else torch.zeros_like(output)

    def gated(self, layer: int, activations: Tensor) -> Tensor:
        self.shown["gated"] += 1
        return activations


def test_probes_look_into_torch_operators() -> None:
    """And change what the step goes on with; the next step without one runs with kernels again."""
    pair = Pair.of("llama", Sparsity(BLOCKS))
    probes = Noted(), Noted()
    runs = tuple(Verification(Sparsity(BLOCKS), probe=probe) for probe in probes)
    pair.both([Segment(0, [1, 2, 3])], (runs[0], runs[1]))
    assert probes[0].shown == probes[1].shown == {"mixed": 3, "gated": 3}
    assert not ran(runs[1].trace, "block_attention")
    bare = Verification(Sparsity(BLOCKS)), Verification(Sparsity(BLOCKS))
    pair.both([Segment(0, [4, 5])], bare)
    assert ran(bare[1].trace, "block_attention") == 3


def numbers(value: Any) -> Iterator[float]:
    """All numbers in nested lists."""
    if isinstance(value, list):
        for one in value:
            yield from numbers(one)
    elif value is not None:
        yield value


def test_analyses_of_a_replay_are_the_same() -> None:
    """Replays with a probe and without one, of a sparse decode."""
    sparsity, outputs, means, logits = Sparsity(BLOCKS), [], [], []
    for step in (Step(tiny("llama", False)), CompiledStep(tiny("llama", True))):
        store = step.new_cache(CAPACITY, BLOCKS)
        engine = Decoder(step, store, stop=StopRule(), clock=time.perf_counter, prefill_chunk=64)
        prefix = engine.prefill(repetitive_prompt(250))
        decoded = engine.decode(prefix, LookupDrafter(Growth(6), 3), sparsity, 20)
        analysis = SelectionAnalysis(BLOCKS, 3, every=1)
        engine.replay(prefix, decoded, sparsity, analysis)
        logits.append(torch.cat(engine.replay(prefix, decoded, sparsity)))
        means.append(analysis.means())
        outputs.append(decoded.output)
    assert outputs[0] == outputs[1] and (logits[0] - logits[1]).abs().max() < LIMIT
    assert means[0].keys() == means[1].keys() and means[0]["steps"] == means[1]["steps"] > 0
    for name in means[0]:
        assert list(numbers(means[0][name])) == pytest.approx(list(numbers(means[1][name])), abs=2e-4)


def test_a_full_cache_takes_exactly_what_fits() -> None:
    """Nothing is written beyond it."""
    step = CompiledStep(tiny("llama", True))
    store = step.new_cache(256, AttentionBudget(), 2)
    step.prefill(torch.tensor(repetitive_prompt(250)), store, 128)
    for count in (7, 300):
        with pytest.raises(ValueError, match="beyond the cache's capacity of 256"):
            step.run([Segment(1, [1]), Segment(0, [1] * count)], store)
        with pytest.raises(ValueError, match="beyond the cache's capacity of 256"):
            step.prefill(torch.tensor([1] * count), store, 128)
    assert step.run([Segment(0, [1] * 6)], store).logits.isfinite().all()
    assert store.lengths == [256, 0] and not store.keys[:, 1].any()


def test_a_step_that_failed_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that waited when something else failed do not run later, over other tokens."""
    pair = Pair.of("qwen3_moe", Sparsity())

    def fails(*_: Any) -> Tensor:
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(compiled_step.Step, "_feed_forward_half", fails)
        with pytest.raises(RuntimeError, match="stopped"):
            pair.compiled.run([Segment(0, [1] * 60)], pair.stores[1])
    same_counters(*pair.rounds(Sparsity()))


@pytest.mark.parametrize("sparsity", [Sparsity(), Sparsity(BLOCKS)], ids=["dense", "sparse"])
def test_time_is_charged_to_the_components_that_took_it(sparsity: Sparsity) -> None:
    """All of it, and nothing twice: the parts add up to the whole step."""
    step = CompiledStep(tiny("llama", True))
    store = step.new_cache(CAPACITY, BLOCKS)
    step.prefill(torch.tensor(repetitive_prompt(300)), store, 128)
    run = Verification(sparsity, Trace(clock=time.perf_counter))
    began = time.perf_counter()
    for _ in range(5):
        step.run([Segment(0, [1, 2, 3])], store, run)
    elapsed = time.perf_counter() - began
    spent = run.trace.seconds
    assert set(spent) == {"linear", "select", "attention", "ffn", "head"} and min(spent.values()) >= 0
    assert 0 < spent.total() <= elapsed
    assert min(spent[one] for one in ("linear", "attention", "ffn", "head")) > 0


def test_engines_by_name() -> None:
    weights = tiny("llama", True)
    step = make_step(weights, (1,), engine="compiled")
    assert type(step) is CompiledStep and step.taps == {1} and step.covers_all
    assert type(make_step(weights, engine="eager")) is Step
    with pytest.raises(ValueError, match="engine=fast: unknown"):
        make_step(weights, engine="fast")
