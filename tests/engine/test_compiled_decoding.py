"""Decoding with the compiled step: the exactness ladder, and the bits of bf16 (DESIGN section 5, steps 1 and 6)."""

from __future__ import annotations

import time
from functools import cache

import pytest
import torch
from torch import Tensor

from harness.engine.decoding import Decoded, Decoder, Prefix, StopRule
from harness.engine.drafting.base import Drafter, NoDrafter
from harness.engine.drafting.expansion import Growth
from harness.engine.drafting.lookup import LookupDrafter
from harness.engine.drafting.oracle import OracleDrafter
from harness.engine.model.compiled_step import CompiledStep
from harness.engine.model.eagle3 import feature_layers
from harness.engine.model.families import adapt
from harness.engine.model.step import Segment, Step
from sparse.budget import AttentionBudget, Sparsity
from sparse.tree import Tree
from tests.drafters import CAPACITY, CASES, GROWTHS, KEPT, LAYERS, Case, Target
from tests.engine.compiled_pairs import WIDTH
from tests.engine.test_drafters import LENGTHS, NEW, prefixes
from tests.engine.tiny import VOCAB, library_model, repetitive_prompt
from tests.sparse.decoder_layers import need

DENSE = Sparsity()
MODELS = ((0, LAYERS), (1, 2))
"""Seed and layers of a target and of another model."""
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
LONG = 300
CHAIN, TREE = Growth(6), Growth(4, 3, 24)


@cache
def steps(compiled: bool) -> tuple[Step, Step]:
    """A target of as many layers as that of tests/drafters.py, and another model."""
    make: type[Step] = CompiledStep if compiled else Step
    models = (
        library_model("llama", seed, num_hidden_layers=layers, intermediate_size=WIDTH) for seed, layers in MODELS
    )
    target, other = (adapt(model, packed=compiled) for model in models)
    return make(target, feature_layers(LAYERS)), make(other)


@cache
def alone(row: int) -> list[int]:
    """What autoregressive decoding with torch operators says after the prompt of a row."""
    step, other = steps(False)
    engine = Target(step, step.new_cache(CAPACITY, KEPT, row + 1), other).decoder()
    return engine.decode(prefixes(engine, row + 1)[row], NoDrafter(), DENSE, NEW).output


@pytest.mark.parametrize(
    "form, batch",
    [
        ("chain", 1),
        ("tree", 4),
        pytest.param("tree", 1, marks=pytest.mark.slow),
        pytest.param("chain", 4, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_greedy_output_is_that_of_autoregressive_decoding(case: Case, form: str, batch: int) -> None:
    """Ladder step 1, in fp32: six prompts in a batch of four, of which two enter when others have left."""
    need(torch.float32)
    rows = 1 if batch == 1 else len(LENGTHS)
    step, other = steps(True)
    made = Target(step, step.new_cache(CAPACITY, KEPT, rows), other)
    engine, drafters = made.decoder(batch), case.make(made, rows, GROWTHS[form], None)
    prompts = prefixes(engine, rows)
    for row, drafter in enumerate(drafters):
        if isinstance(drafter, OracleDrafter):
            drafter.expect(alone(row))
    decoded = engine.decode_all(prompts, drafters, DENSE, NEW)
    assert [one.output for one in decoded] == [alone(row) for row in range(rows)]
    paths = {path for path in decoded[0].trace.paths if path.startswith("dense_")}
    assert paths == {"dense_attention.native", "dense_ffn.native"}


@cache
def bf16(family: str) -> CompiledStep:
    """A step over a tiny model in bf16 that the kernels cover."""
    model = library_model(family, **SIZES, intermediate_size=WIDTH).bfloat16()
    return CompiledStep(adapt(model, packed=True, channels=True))


def prefilled(family: str, rows: int = 1) -> tuple[Decoder, list[Prefix]]:
    need(torch.bfloat16)
    step = bf16(family)
    assert step.covers_all
    store = step.new_cache(150 + LONG + 30, AttentionBudget(), rows)
    engine = Decoder(step, store, stop=StopRule(), clock=time.perf_counter, prefill_chunk=64, batch=rows)
    return engine, [engine.prefill(repetitive_prompt(150 - 7 * row, row), row) for row in range(rows)]


def kept_logits(engine: Decoder, prefix: Prefix, decoded: Decoded) -> Tensor:
    """Logits after every token that a decode kept, [tokens, vocab]."""
    logits = engine.replay(prefix, decoded, DENSE)
    return torch.cat([rows[taken.rows] for rows, taken in zip(logits, decoded.transcript, strict=True)])


def drafter(name: str, continuation: list[int]) -> Drafter:
    """Chains by prompt lookup, or of one that knows the continuation and is often wrong."""
    if name == "lookup":
        return LookupDrafter(CHAIN, 3)
    made = OracleDrafter(CHAIN, 0.6, VOCAB, forced=False)
    made.expect(continuation)
    return made


@pytest.mark.parametrize("name", ["lookup", "oracle"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_bf16_chains_decode_the_very_bits_of_autoregressive_decoding(family: str, name: str) -> None:
    """Ladder step 6: the noise floor of this engine is zero, in tokens and in logits."""
    engine, (prefix,) = prefilled(family)
    single = engine.decode(prefix, NoDrafter(), DENSE, LONG)
    decoded = engine.decode(prefix, drafter(name, single.output), DENSE, LONG)
    assert len(decoded.transcript) < len(single.transcript) and any(len(taken.path) > 1 for taken in decoded.transcript)
    assert decoded.output == single.output and len(set(single.output)) > 20
    assert torch.equal(kept_logits(engine, prefix, decoded), kept_logits(engine, prefix, single))


def test_bf16_batches_decode_the_very_bits_of_each_sequence_alone() -> None:
    engine, prompts = prefilled("llama", 4)
    outputs = [engine.decode(prefix, NoDrafter(), DENSE, 80).output for prefix in prompts]
    drafters = [drafter("oracle", output) for output in outputs]
    assert [one.output for one in engine.decode_all(prompts, drafters, DENSE, 80)] == outputs
    assert len({tuple(output) for output in outputs}) == 4


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_bf16_branches_side_by_side_get_the_very_bits_of_a_chain(family: str) -> None:
    """The tokens of a tree whose ancestors lie right behind the root, whatever stands beside them."""
    need(torch.bfloat16)
    step = bf16(family)
    store = step.new_cache(200, AttentionBudget())
    step.prefill(torch.tensor(repetitive_prompt(150)), store, 64)
    tree = Tree([-1, 0, 1, 2, 0, -1, 5, 1])
    tokens = [3, 5, 9, 11, 2, 40, 7, 8, 33]
    found = step.run([Segment(0, tokens, tree)], store).logits
    store.truncate(0, 150)
    chain = step.run([Segment(0, tokens[:5])], store).logits
    assert torch.equal(found[:5], chain)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_bf16_trees_differ_by_rounding_alone(family: str) -> None:
    """Other branches stand between the tokens of a path, so that sums run in another order than for a chain."""
    engine, (prefix,) = prefilled(family)
    single = engine.decode(prefix, NoDrafter(), DENSE, LONG)
    known = OracleDrafter(TREE, 0.6, VOCAB, forced=True)
    known.expect(single.output)
    decoded = engine.decode(prefix, known, DENSE, LONG)
    assert decoded.output == single.output and any(not taken.draft.is_chain for taken in decoded.transcript)
    truth = kept_logits(engine, prefix, single).float()
    errors = (kept_logits(engine, prefix, decoded).float() - truth).abs().amax(1)
    assert errors.max() < 0.01 * truth.abs().max()
    side_by_side = [taken.rows == list(range(taken.kept)) for taken in decoded.transcript]
    first = sum(taken.kept for taken in decoded.transcript[: side_by_side.index(False)])
    assert first > 0 and not errors[:first].any()
