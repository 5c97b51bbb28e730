"""The cost model and the counters against sizes that can be counted by hand."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse.budget import AttentionBudget
from sparse.cost import (
    COMPONENTS,
    Cost,
    ModelShape,
    Peaks,
    StepPlan,
    expected_union,
    plan_costs,
    prefill_cost,
    total,
    trace_bytes,
    trace_costs,
    trace_flops,
)
from sparse.trace import Trace

SMOLLM2 = ModelShape(layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocab=49152, itemsize=2)
LLAMA31_8B = ModelShape(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256, itemsize=2)
QWEN3_30B = ModelShape(
    layers=48, hidden=2048, heads=32, kv_heads=4, head_dim=128, ffn=6144, vocab=151936, itemsize=2,
    experts=128, top_k=8, expert_ffn=768, moe_layers=48,
)  # fmt: skip
DENSE = AttentionBudget()


def dense_trace(shape: ModelShape, steps: int, rows: int, length: int) -> Trace:
    """Counters of dense steps of a dense model."""
    trace = Trace()
    for _ in range(steps):
        trace.begin(rows)
        for layer in range(shape.layers):
            trace.attention("dense", layer, length, length, rows)
            trace.ffn(layer, width=shape.ffn, gates=shape.ffn, channels=shape.ffn, rows=rows)
    return trace


def test_weights_and_cache_have_their_published_sizes() -> None:
    assert round(SMOLLM2.weight_bytes / 1e6) == 269
    assert LLAMA31_8B.kv_bytes_per_token == 128 * 1024
    assert round(LLAMA31_8B.weight_bytes / 1e9, 1) == 15.0
    assert round(QWEN3_30B.weight_bytes / 2e9, 1) == 30.2


def test_dense_steps_read_all_weights_and_positions() -> None:
    written = 7 * 23040
    expected = 2 * (SMOLLM2.weight_bytes + 7000 * 23040 + written)
    assert trace_bytes(SMOLLM2, DENSE, dense_trace(SMOLLM2, 2, 7, 7000)) == expected


def test_sparse_steps_read_what_was_chosen() -> None:
    trace = dense_trace(SMOLLM2, 1, 7, 1000)
    whole = trace_bytes(SMOLLM2, DENSE, trace)
    trace.begin(7)
    for layer in range(30):
        trace.attention("sparse", layer, 1000, 100, 7)
        trace.ffn(layer, width=1536, gates=1536, channels=1024, rows=7)
        trace.scored += 60
    saved = 2 * whole - trace_bytes(SMOLLM2, AttentionBudget(topk=4), trace)
    summaries = 30 * 60 * 3 * 64 * 2
    assert saved == 900 * 23040 + 30 * 2 * 512 * 576 * 2 - summaries
    bound, oracle = (AttentionBudget(topk=4, score=score) for score in ("bound", "oracle"))
    assert trace_bytes(SMOLLM2, bound, trace) - trace_bytes(SMOLLM2, AttentionBudget(topk=4), trace) == summaries
    assert trace_bytes(SMOLLM2, oracle, trace) - trace_bytes(SMOLLM2, AttentionBudget(topk=4), trace) == 15 * summaries
    assert trace.density("attention") == 0.55 and trace.densities("attention", 31)[30] is None
    assert trace.density("ffn") == (1536 + 1024) / (2 * 1536) and trace.density("experts") is None


def test_flops_of_one_token_are_two_per_weight_and_four_per_head_channel() -> None:
    weights = SMOLLM2.weight_bytes // 2
    one, three = dense_trace(SMOLLM2, 1, 1, 0), dense_trace(SMOLLM2, 1, 3, 100)
    assert trace_flops(SMOLLM2, DENSE, one) == 2 * weights
    assert trace_flops(SMOLLM2, DENSE, three) == 3 * 2 * weights + 4 * 3 * 30 * 9 * 64 * 100


def test_masked_channels_save_operations_and_no_bytes() -> None:
    masked, full = Trace(), Trace()
    for trace, kept in ((masked, 5), (full, None)):
        trace.begin(2)
        trace.ffn(0, width=10, gates=10, channels=10, rows=2, kept=kept)
    assert trace_bytes(SMOLLM2, DENSE, masked) == trace_bytes(SMOLLM2, DENSE, full)
    assert trace_flops(SMOLLM2, DENSE, full) - trace_flops(SMOLLM2, DENSE, masked) == 2 * 2 * 576 * 15


def test_components_add_up_and_name_what_they_read() -> None:
    trace = dense_trace(SMOLLM2, 2, 7, 1000)
    trace.scored = 30
    costs = trace_costs(SMOLLM2, AttentionBudget(topk=4), trace)
    assert tuple(costs) == COMPONENTS
    assert costs["linear"].bytes == 2 * 30 * 576 * 64 * (2 * 9 + 2 * 3) * 2
    assert costs["linear"].flops == 7 * costs["linear"].bytes
    assert costs["head"] == Cost(2 * 2 * 576 * 49152, 2 * 14 * 576 * 49152)
    assert costs["ffn"].bytes == 2 * 30 * 3 * 576 * 1536 * 2 and costs["moe"] == Cost()
    assert costs["attention"].bytes == 2 * (1000 + 7) * 23040
    assert costs["select"].bytes == 30 * 3 * 64 * 2
    few = trace_costs(SMOLLM2, DENSE, trace, layers=20, logits=2)
    assert few["linear"] == Cost(costs["linear"].bytes * 20 / 30, costs["linear"].flops * 20 / 30)
    assert few["head"].flops == costs["head"].flops / 7 and few["head"].bytes == costs["head"].bytes


@pytest.mark.parametrize(
    "settings, vectors",
    [
        ({}, 3),
        ({"gqa": "max"}, 9),
        ({"query": "max"}, 9 * 7),
        ({"query": "weighted", "gqa": "mean"}, 3),
        ({"score": "bound"}, 2 * 9),
        ({"score": "gaussian", "query": "max"}, 2 * 9 * 7),
        ({"score": "oracle"}, 9 * 7 * 16),
    ],
)
def test_the_selector_multiplies_queries_with_summaries(settings: dict[str, str], vectors: int) -> None:
    trace = dense_trace(SMOLLM2, 1, 7, 1000)
    trace.scored = 62
    found = trace_costs(SMOLLM2, AttentionBudget(topk=4, **settings), trace)["select"]  # type: ignore[arg-type]
    assert found.flops == 2 * 64 * vectors * 62


def test_dense_and_expert_layers_of_one_model_are_told_apart() -> None:
    mixed = replace(QWEN3_30B, layers=3, moe_layers=2)
    trace = Trace()
    trace.begin(5)
    trace.ffn(0, width=6144, gates=6144, channels=3072, rows=5)
    for layer in (1, 2):
        trace.experts_wanted[layer] += 30
        trace.ffn(layer, width=30 * 768, gates=30 * 768, channels=30 * 768, rows=0)
        trace.gate_products += 40 * 768
        trace.channel_products += 40 * 768
    costs = trace_costs(mixed, DENSE, trace)
    assert costs["ffn"] == Cost(2 * 2048 * 2 * 6144, 2 * 2048 * 5 * 2 * 6144)
    routers = 2 * 2048 * 128
    assert costs["moe"] == Cost(2 * (2 * 2048 * 3 * 30 * 768 + routers), 2 * (2 * 2048 * 3 * 40 * 768 + 5 * routers))


def test_peaks_say_which_side_binds() -> None:
    peaks = Peaks(10.0, 100.0)
    assert peaks.seconds(Cost(20, 100)) == 2 and peaks.binds(Cost(20, 100)) == "bandwidth"
    assert peaks.seconds(Cost(20, 300)) == 3 and peaks.binds(Cost(20, 300)) == "compute"
    assert Peaks(10.0).seconds(Cost(20, 1e30)) == 2
    assert total([Cost(1, 2), Cost(3, 4) * 2]) == Cost(7, 10)


@pytest.mark.parametrize("skew", [0.0, 0.7, 1.5])
def test_the_expected_union_is_that_of_random_draws(skew: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.arange(1, 25, dtype=torch.float64).pow(-skew).expand(400 * 9, 24)
    drawn = torch.multinomial(weights, 4, generator=generator).view(400, 36)
    seen = sum(len(set(row)) for row in drawn.tolist()) / 400
    assert expected_union(24, 4, 9, skew) == pytest.approx(seen, rel=0.025)


def test_unions_of_published_sizes() -> None:
    assert expected_union(128, 8, 1) == pytest.approx(8)
    assert expected_union(128, 8, 1, 1.0) == pytest.approx(8)
    assert expected_union(8, 8, 3, 2.0) == 8
    assert 125 < expected_union(128, 8, 60) < 126
    with pytest.raises(ValueError, match="top_k=9"):
        expected_union(8, 9, 1)


@given(
    batch=st.integers(1, 5), context=st.integers(1, 900), rows=st.integers(1, 9), kept=st.sampled_from((None, 32, 512))
)
def test_a_planned_step_is_that_of_its_counters(batch: int, context: int, rows: int, kept: int | None) -> None:
    plan = StepPlan(batch, context, rows, kept)
    trace, whole = Trace(), context // 16
    skips = kept is not None and kept < 16 * whole
    attended = (kept or 0) + context % 16 + rows if skips else context + rows
    trace.begin(batch * rows)
    for layer in range(30):
        for _ in range(batch):
            trace.attention("", layer, context + rows, attended, rows)
            trace.scored += whole if skips else 0
        trace.ffn(layer, width=1536, gates=1536, channels=1536, rows=batch * rows)
    assert plan_costs(SMOLLM2, plan) == trace_costs(SMOLLM2, AttentionBudget(topk=kept and kept // 16), trace)


def test_experts_outside_the_budget_are_not_read() -> None:
    dense, few = (plan_costs(QWEN3_30B, StepPlan(1, 8192, 61, union=union))["moe"] for union in (None, 32))
    routers = 2 * 48 * 2048 * 128
    assert few.bytes == routers + 2 * 48 * 3 * 2048 * 32 * 768
    assert (dense.bytes - routers) / (few.bytes - routers) == pytest.approx(expected_union(128, 8, 61) / 32, rel=1e-4)
    assert dense.flops == few.flops == 61 * (routers + 2 * 48 * 3 * 2048 * 8 * 768)


def test_a_prefill_reads_the_weights_once_a_chunk_and_the_head_once() -> None:
    head = 2 * 576 * 49152
    whole, chunked = prefill_cost(SMOLLM2, 10, 100, 100), prefill_cost(SMOLLM2, 10, 100, 60)
    assert whole.bytes == SMOLLM2.weight_bytes + (110 + 100) * 23040
    assert chunked.bytes == 2 * SMOLLM2.weight_bytes - head + (70 + 60 + 110 + 40) * 23040
    weights = SMOLLM2.weight_bytes - head
    assert whole.flops == 100 * weights + head + 4 * 30 * 9 * 64 * 100 * 110
