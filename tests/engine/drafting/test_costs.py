"""What drafting costs by the cost model, against passes counted by hand."""

import time

import pytest
import torch

from harness.engine.decoding import Decoded, Decoder, StopRule
from harness.engine.drafting.base import Drafter, NoDrafter, spent
from harness.engine.drafting.combined import CombinedDrafter
from harness.engine.drafting.eagle3 import Eagle3Drafter
from harness.engine.drafting.expansion import Growth
from harness.engine.drafting.lookup import LookupDrafter
from harness.engine.drafting.model import ModelDrafter
from harness.engine.drafting.selfsparse import SelfSparseDrafter
from harness.engine.model.eagle3 import Eagle3Head, Eagle3Shape
from sparse.budget import AttentionBudget, Sparsity
from sparse.cost import COMPONENTS, Cost, HeadShape, ModelShape, StepPlan, plan_costs, prefill_cost, total
from tests.drafters import CAPACITY, KEPT, Target, target
from tests.engine.tiny import VOCAB, repetitive_prompt

PROMPT, CHAIN = repetitive_prompt(100), Growth(3)


def passes(shape: ModelShape, context: int, *rows: int, logits: int = 1) -> Cost:
    """Dense passes one after the other, each with the logits of its last tokens."""
    found = Cost()
    for count in rows:
        costs = plan_costs(shape, StepPlan(context=context, rows=count), logits=logits)
        found += total(costs.values())
        context += count
    return found


def decoded(made: Target, drafter: Drafter, tokens: int) -> Decoded:
    engine = Decoder(made.step, made.cache, stop=StopRule(), clock=time.perf_counter, prefill_chunk=64)
    return engine.decode(engine.prefill(PROMPT), drafter, Sparsity(), tokens)


def test_a_draft_model_pays_prefill_and_passes() -> None:
    made = target()
    shape = made.other.weights.shape
    drafter = ModelDrafter(made.other, made.other.new_cache(CAPACITY, AttentionBudget()), 0, CHAIN, prefill_chunk=64)
    drafter.reset(PROMPT)
    prefilled = prefill_cost(shape, 0, 100, 64)
    assert spent(drafter) == prefilled
    drafter.observe([5])
    drafter.propose(10)
    assert spent(drafter) == prefilled + passes(shape, 100, 1, 1, 1)
    drafter.reset(PROMPT)
    assert spent(drafter) == Cost(), "the same prompt is cached"
    drafter.observe([5, 7, 9])
    drafter.propose(2)
    assert spent(drafter) == passes(shape, 100, 3, 1)


def test_a_tree_runs_what_grew_before_again() -> None:
    made = target()
    shape = made.other.weights.shape
    drafter = ModelDrafter(made.other, made.other.new_cache(CAPACITY, AttentionBudget()), 0, Growth(3, 2, 6))
    drafter.reset(PROMPT)
    before = spent(drafter)
    drafter.observe([5])
    drafter.propose(10)
    expected = before + passes(shape, 100, 1)
    for rows in (3, 5):
        expected += passes(shape, 100, rows, logits=2)
    assert spent(drafter) == expected


def test_layers_left_out_of_drafting_cost_nothing() -> None:
    made = target()
    Decoder(made.step, made.cache, stop=StopRule(), clock=time.perf_counter, prefill_chunk=64).prefill(PROMPT)
    costs = []
    for left_out in (frozenset[int](), frozenset({1, 3, 4})):
        drafter = SelfSparseDrafter(made.step, made.cache, 0, CHAIN, sparsity=Sparsity(), left_out=left_out)
        drafter.reset(PROMPT)
        drafter.propose(3)
        costs.append(spent(drafter))
    shape = made.step.weights.shape
    whole, fewer = costs
    assert whole == passes(shape, 100, 1, 1, 1)
    head = 3 * shape.itemsize * shape.hidden * shape.vocab
    assert fewer.bytes - head == pytest.approx((whole.bytes - head) * 4 / 7)


def test_drafting_from_few_blocks_reads_fewer_positions() -> None:
    made = target()
    Decoder(made.step, made.cache, stop=StopRule(), clock=time.perf_counter, prefill_chunk=64).prefill(PROMPT)
    drafter = SelfSparseDrafter(made.step, made.cache, 0, Growth(1), sparsity=Sparsity(KEPT))
    drafter.reset(PROMPT)
    drafter.propose(1)
    shape = made.step.weights.shape
    dense = passes(shape, 100, 1)
    scored = shape.layers * 6 * shape.kv_heads * shape.head_dim * shape.itemsize
    assert spent(drafter).bytes == dense.bytes - (6 - 3) * 16 * shape.kv_bytes_per_token + scored


def test_a_head_pays_what_it_fuses_remembers_and_runs() -> None:
    sizes = Eagle3Shape(hidden=8, features=24, heads=2, kv_heads=1, head_dim=4, ffn=16, vocab=VOCAB, draft_vocab=20)
    head = Eagle3Head(sizes).eval()
    drafter = Eagle3Drafter(head, torch.randn(VOCAB, 8), Growth(2), window=5)
    cost = HeadShape(hidden=8, features=24, heads=2, kv_heads=1, head_dim=4, ffn=16, vocab=20, itemsize=4)
    names = dict(head.named_parameters())
    keys = names["midlayer.self_attn.k_proj.weight"].numel() + names["midlayer.self_attn.v_proj.weight"].numel()
    fusing = names["fc.weight"].numel()
    layer = sum(value.numel() for name, value in names.items() if value.dim() == 2) - fusing
    assert cost.remember(3) == Cost(4 * (fusing + keys + 2 * 3 * 4), 2 * 3 * (fusing + keys))
    assert cost.run(1, 9, fused=1).bytes == 4 * (fusing + layer + 2 * 4 * 10)
    assert cost.run(2, 9) == Cost(4 * (layer + 2 * 4 * 11), 2 * 2 * layer + 4 * 2 * 8 * 9)
    drafter.reset([1, 2, 3, 4], torch.randn(3, 24))
    assert spent(drafter) == cost.remember(2)
    drafter.observe([5, 6], torch.randn(2, 24))
    drafter.propose(2)
    expected = cost.remember(2) + cost.remember(2, alone=False) + cost.run(1, 5, fused=1) + cost.run(1, 6)
    assert spent(drafter) == expected
    assert spent(CombinedDrafter(LookupDrafter(Growth(2), 3), drafter, 2)) == expected


@pytest.mark.parametrize("name", ["none", "lookup", "self"])
def test_decodes_count_drafting_as_its_own_component(name: str) -> None:
    made = target()
    drafters: dict[str, Drafter] = {
        "none": NoDrafter(),
        "lookup": LookupDrafter(CHAIN, 3),
        "self": SelfSparseDrafter(made.step, made.cache, 0, CHAIN, sparsity=Sparsity()),
    }
    found = decoded(made, drafters[name], 9)
    assert tuple(found.costs) == (*COMPONENTS, "draft")
    assert (found.costs["draft"] == Cost()) == (name != "self")
    assert found.bytes == pytest.approx(sum(cost.bytes for cost in found.costs.values()))
    assert found.flops == pytest.approx(sum(cost.flops for cost in found.costs.values()))
    steps = found.trace.steps
    assert found.costs["head"].bytes == steps * 4 * made.step.weights.shape.hidden * VOCAB
    if name == "self":
        assert found.costs["draft"].bytes > found.costs["linear"].bytes, "three passes a step, at the same weights"
