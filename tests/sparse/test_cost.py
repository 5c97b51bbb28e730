"""The cost model and the counters against sizes that can be counted by hand."""

from sparse.budget import AttentionBudget
from sparse.cost import ModelShape, trace_bytes, trace_flops
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
    expected = 2 * (SMOLLM2.weight_bytes + 7000 * 23040)
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
    assert trace_flops(SMOLLM2, one) == 2 * weights
    assert trace_flops(SMOLLM2, three) == 3 * 2 * weights + 4 * 3 * 30 * 9 * 64 * 100


def test_masked_channels_save_operations_and_no_bytes() -> None:
    masked, full = Trace(), Trace()
    for trace, kept in ((masked, 5), (full, None)):
        trace.begin(2)
        trace.ffn(0, width=10, gates=10, channels=10, rows=2, kept=kept)
    assert trace_bytes(SMOLLM2, DENSE, masked) == trace_bytes(SMOLLM2, DENSE, full)
    assert trace_flops(SMOLLM2, full) - trace_flops(SMOLLM2, masked) == 2 * 2 * 576 * 15
