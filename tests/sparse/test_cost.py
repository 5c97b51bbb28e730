"""The cost model against sizes that can be counted by hand."""

from sparse.budget import AttentionBudget
from sparse.cost import ModelShape, selector_bytes, step_bytes, step_flops
from sparse.trace import Trace

SMOLLM2 = ModelShape(layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocab=49152, itemsize=2)
LLAMA31_8B = ModelShape(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256, itemsize=2)


def test_weights_and_cache_have_their_published_sizes() -> None:
    assert round(SMOLLM2.weight_bytes / 1e6) == 269
    assert LLAMA31_8B.kv_bytes_per_token == 128 * 1024
    assert round(LLAMA31_8B.weight_bytes / 1e9, 1) == 15.0


def test_a_step_reads_weights_attended_positions_and_summaries() -> None:
    assert step_bytes(SMOLLM2, 7000) == SMOLLM2.weight_bytes + 7000 * 23040
    mean, bound = AttentionBudget(topk=4), AttentionBudget(topk=4, score="bound")
    assert selector_bytes(SMOLLM2, mean, 30, 100) == 30 * 100 * 3 * 64 * 2
    assert selector_bytes(SMOLLM2, bound, 30, 100) == 2 * selector_bytes(SMOLLM2, mean, 30, 100)
    assert selector_bytes(SMOLLM2, AttentionBudget.dense(), 30, 100) == 0


def test_flops_of_one_token_are_two_per_weight_and_four_per_head_channel() -> None:
    weights = SMOLLM2.weight_bytes // 2
    assert step_flops(SMOLLM2, 1, 0) == 2 * weights
    assert step_flops(SMOLLM2, 3, 100) - step_flops(SMOLLM2, 3, 0) == 4 * 3 * 30 * 9 * 64 * 100


def test_density_is_attended_over_visible() -> None:
    trace = Trace()
    assert trace.density is None
    trace.dense(100)
    trace.sparse(100, 20, rows=5)
    assert trace.density == 0.6 and trace.selections == 1 and trace.reused == 4
    assert dict(trace.paths) == {"dense_attention.torch": 1, "block_attention.torch": 1}
