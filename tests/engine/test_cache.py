"""The cache against a plain list of keys, under any order of writes, accepts and rejects."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.engine.cache import PAGE, KVCache
from sparse.scoring import SUMMARIES, summarise_blocks

LAYERS, BATCH, HEADS, DIM = 2, 2, 2, 4


def make(block_size: int = 16, capacity: int = 2 * PAGE, row_major: bool = False) -> KVCache:
    return KVCache(
        layers=LAYERS,
        batch=BATCH,
        kv_heads=HEADS,
        head_dim=DIM,
        capacity=capacity,
        dtype=torch.float32,
        block_size=block_size,
        summaries=SUMMARIES,
        row_major=row_major,
    )


def append(cache: KVCache, truth: list[torch.Tensor], row: int, count: int) -> None:
    """Write ``count`` random positions in every layer, as a step does."""
    new = torch.randn(LAYERS, count, HEADS, DIM)
    for layer in range(LAYERS):
        cache.write(layer, row, cache.lengths[row], new[layer], -new[layer])
    cache.advance(row, count)
    truth[row] = torch.cat((truth[row], new), dim=1)


def check(cache: KVCache, truth: list[torch.Tensor]) -> None:
    for row in range(BATCH):
        length = truth[row].shape[1]
        assert cache.lengths[row] == length
        cache.refresh_summaries(row)
        for layer in range(LAYERS):
            keys, values = cache.prefix(layer, row, length)
            expected = truth[row][layer].transpose(0, 1)
            assert torch.equal(keys, expected) and torch.equal(values, -expected)
            whole = length // cache.block_size
            if not whole:
                continue
            blocks = keys[:, : whole * cache.block_size].transpose(1, 2)
            for name in SUMMARIES:
                recomputed = summarise_blocks(blocks, cache.block_size, name)
                assert torch.allclose(cache.summaries(layer, row)[name][:, :, :whole], recomputed, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    block_size=st.sampled_from((16, 32, 64)),
    steps=st.lists(
        st.tuples(st.integers(0, BATCH - 1), st.integers(1, 90), st.floats(0, 1), st.booleans()), max_size=14
    ),
    row_major=st.booleans(),
)
def test_any_sequence_of_accepts_and_rejects_equals_a_recomputation(
    block_size: int, steps: list[tuple[int, int, float, bool]], row_major: bool
) -> None:
    torch.manual_seed(0)
    cache = make(block_size, row_major=row_major)
    truth = [torch.zeros(LAYERS, 0, HEADS, DIM) for _ in range(BATCH)]
    for row, count, kept, refreshed in steps:
        count = min(count, cache.capacity - cache.lengths[row])
        before = cache.lengths[row]
        append(cache, truth, row, count)
        if refreshed:
            cache.refresh_summaries(row)
        length = before + round(kept * count)
        cache.truncate(row, length)
        truth[row] = truth[row][:, :length]
    check(cache, truth)


@settings(max_examples=40, deadline=None)
@given(
    block_size=st.sampled_from((16, 32, 64)),
    steps=st.lists(st.tuples(st.integers(1, 70), st.integers(0, 2**32 - 1), st.booleans()), max_size=10),
    row_major=st.booleans(),
)
def test_keeping_a_branch_of_a_tree_equals_writing_it_alone(
    block_size: int, steps: list[tuple[int, int, bool]], row_major: bool
) -> None:
    """The tokens that are kept move together, over page borders too; what was between them is gone."""
    torch.manual_seed(1)
    cache = make(block_size, row_major=row_major)
    truth = [torch.zeros(LAYERS, 0, HEADS, DIM) for _ in range(BATCH)]
    for count, choice, refreshed in steps:
        before = cache.lengths[1]
        count = min(count, cache.capacity - before)
        append(cache, truth, 1, count)
        if refreshed:
            cache.refresh_summaries(1)
        kept = [token for token in range(count) if choice >> (token % 32) & 1]
        cache.compact(1, before, kept)
        truth[1] = truth[1][:, [*range(before), *(before + token for token in kept)]]
    check(cache, truth)


def test_a_branch_must_lie_in_the_step() -> None:
    cache, truth = make(), [torch.zeros(LAYERS, 0, HEADS, DIM) for _ in range(BATCH)]
    append(cache, truth, 0, 20)
    for kept, words in (([0, 2, 2], "ascend"), ([0, 5], "step of 5"), ([-1, 0], "step of 5")):
        with pytest.raises(ValueError, match=words):
            cache.compact(0, 15, kept)


def test_rollback_far_back_forgets_summaries() -> None:
    cache, truth = make(), [torch.zeros(LAYERS, 0, HEADS, DIM) for _ in range(BATCH)]
    append(cache, truth, 0, 100)
    check(cache, truth)
    cache.truncate(0, 40)
    truth[0] = truth[0][:, :40]
    append(cache, truth, 0, 300)
    check(cache, truth)


def test_bounds_are_kept() -> None:
    cache, truth = make(), [torch.zeros(LAYERS, 0, HEADS, DIM) for _ in range(BATCH)]
    append(cache, truth, 0, 10)
    with pytest.raises(ValueError, match="truncate"):
        cache.truncate(0, 11)
    with pytest.raises(ValueError, match="truncate"):
        cache.truncate(0, -1)
    with pytest.raises(ValueError, match="capacity"):
        cache.write(0, 0, cache.capacity - 1, torch.zeros(2, HEADS, DIM), torch.zeros(2, HEADS, DIM))
    with pytest.raises(ValueError, match="capacity"):
        make(capacity=0)
    with pytest.raises(ValueError, match="divide"):
        make(block_size=24)


def test_capacity_is_whole_pages_and_counted() -> None:
    cache = make(capacity=PAGE + 1)
    assert cache.capacity == 2 * PAGE
    keys_and_values = 2 * LAYERS * BATCH * HEADS * DIM * cache.capacity * 4
    assert cache.nbytes == keys_and_values + len(SUMMARIES) * keys_and_values // 2 // cache.block_size
