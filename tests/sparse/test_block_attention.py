"""The fast attention against the naive one: odd shapes, page borders, and memory poisoned where nothing may be read."""

import pytest
import torch

from harness.engine.cache import PAGE
from sparse.ops.block_attention import eager, naive
from sparse.tree import Tree

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def paged(keys: torch.Tensor, values: torch.Tensor, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [kv_heads, length, head_dim] as pages; everything beyond the length is NaN."""
    heads, length, dim = keys.shape
    full = torch.full((2, heads, pages * PAGE, dim), float("nan"), dtype=keys.dtype)
    full[0, :, :length], full[1, :, :length] = keys, values
    shaped = full.view(2, heads, pages, PAGE, dim)
    return shaped[0].permute(1, 0, 3, 2).contiguous(), shaped[1].transpose(0, 1).contiguous()


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


CASES = [
    # length, rows, kv_heads, groups, head_dim, block_size, kept blocks
    (37, 1, 1, 1, 8, 16, 1),
    (PAGE - 1, 3, 2, 3, 16, 16, 5),
    (PAGE, 1, 3, 3, 64, 16, 4),
    (PAGE + 1, 7, 3, 3, 64, 16, 4),
    (2 * PAGE + 5, 7, 1, 4, 32, 64, 3),
    (3 * PAGE - 2, 17, 2, 1, 24, 32, 9),
    (2 * PAGE + 3, 61, 2, 2, 16, 64, 2),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length, rows, heads, groups, dim, size, kept", CASES)
def test_block_and_dense_attention_equal_the_reference(
    length: int, rows: int, heads: int, groups: int, dim: int, size: int, kept: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(length)
    queries = (torch.randn(heads, rows * groups, dim) * dim**-0.5).to(dtype)
    keys, values = torch.randn(heads, length, dim).to(dtype), torch.randn(heads, length, dim).to(dtype)
    stored = paged(keys, values, length // PAGE + 2)
    whole = (length - rows) // size
    tail = whole * size
    blocks = torch.stack([torch.randperm(whole)[:kept] for _ in range(heads)])
    found = eager.block_attention(
        queries, *stored, blocks, tail_start=tail, length=length, block_size=size, groups=groups
    )
    truth = naive.block_attention(queries, keys, values, blocks, tail_start=tail, block_size=size, groups=groups)
    assert relative_error(found, truth) < TOLERANCE[dtype]
    dense = eager.dense_attention(queries, *stored, length, groups)
    everything = naive.block_attention(queries, keys, values, None, tail_start=tail, block_size=size, groups=groups)
    assert relative_error(dense, everything) < TOLERANCE[dtype]
    if kept < whole:
        assert relative_error(found, everything) > 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length, rows, heads, groups, dim, size, kept", CASES)
def test_trees_see_their_ancestors_only(
    length: int, rows: int, heads: int, groups: int, dim: int, size: int, kept: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(length + 1)
    tree = Tree([int(torch.randint(-1, node, ())) for node in range(rows - 1)])
    queries = (torch.randn(heads, rows * groups, dim) * dim**-0.5).to(dtype)
    keys, values = torch.randn(heads, length, dim).to(dtype), torch.randn(heads, length, dim).to(dtype)
    stored, start = paged(keys, values, length // PAGE + 2), length - rows
    whole = start // size
    blocks = torch.stack([torch.randperm(whole)[:kept] for _ in range(heads)])
    options = {"tail_start": whole * size, "block_size": size, "groups": groups, "tree": tree}
    found = eager.block_attention(queries, *stored, blocks, length=length, **options)
    assert relative_error(found, naive.block_attention(queries, keys, values, blocks, **options)) < TOLERANCE[dtype]
    dense = eager.dense_attention(queries, *stored, length, groups, tree)
    everything = naive.block_attention(queries, keys, values, None, **options)
    assert relative_error(dense, everything) < TOLERANCE[dtype]
    if dtype is torch.float32:
        mass = eager.attention_mass(queries, stored[0], start, length, size, groups, tree)
        seen = naive.visible_positions(None, 0, length, size, rows, tree=tree).repeat_interleave(groups, dim=1)
        weights = (queries @ keys.transpose(1, 2)).masked_fill(~seen, float("-inf")).softmax(-1)
        expected = weights[:, :, : whole * size].reshape(heads, rows * groups, whole, size).sum(-1)
        assert torch.allclose(mass, expected, atol=1e-6)


def test_zero_sparsity_equals_dense() -> None:
    torch.manual_seed(0)
    length, rows, heads, groups, dim, size = PAGE + 40, 5, 2, 3, 16, 16
    queries = torch.randn(heads, rows * groups, dim)
    stored = paged(torch.randn(heads, length, dim), torch.randn(heads, length, dim), 2)
    whole = (length - rows) // size
    blocks = torch.arange(whole).expand(heads, whole)
    found = eager.block_attention(
        queries, *stored, blocks, tail_start=whole * size, length=length, block_size=size, groups=groups
    )
    assert relative_error(found, eager.dense_attention(queries, *stored, length, groups).double()) < 2e-6


def test_blocks_left_out_are_never_read() -> None:
    """Poison everything that was not selected: the result must not change."""
    torch.manual_seed(3)
    length, rows, heads, groups, dim, size = 3 * PAGE, 4, 2, 2, 8, 32
    keys, values = torch.randn(heads, length, dim), torch.randn(heads, length, dim)
    whole = (length - rows) // size
    blocks = torch.stack([torch.randperm(whole)[:6] for _ in range(heads)])
    visible = naive.visible_positions(blocks, whole * size, length, size, rows)[:, -1]
    poisoned_keys, poisoned_values = keys.clone(), values.clone()
    poisoned_keys[~visible], poisoned_values[~visible] = float("nan"), float("nan")
    queries = torch.randn(heads, rows * groups, dim)
    options = {"tail_start": whole * size, "length": length, "block_size": size, "groups": groups}
    found = eager.block_attention(queries, *paged(poisoned_keys, poisoned_values, 4), blocks, **options)
    assert torch.equal(found, eager.block_attention(queries, *paged(keys, values, 4), blocks, **options))
    assert not found.isnan().any()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_entries_that_do_not_count_are_invisible(dtype: torch.dtype) -> None:
    """Heads with unequal budgets: padded entries add nothing, wherever they point."""
    torch.manual_seed(7)
    length, rows, heads, groups, dim, size = PAGE + 70, 5, 3, 2, 16, 16
    queries = (torch.randn(heads, rows * groups, dim) * dim**-0.5).to(dtype)
    keys, values = torch.randn(heads, length, dim).to(dtype), torch.randn(heads, length, dim).to(dtype)
    whole = (length - rows) // size
    blocks = torch.stack([torch.randperm(whole)[:6] for _ in range(heads)])
    valid = torch.arange(6)[None] < torch.tensor([6, 1, 3])[:, None]
    blocks = blocks.where(valid, blocks[:, :1])
    options = {"tail_start": whole * size, "block_size": size, "groups": groups, "valid": valid}
    found = eager.block_attention(queries, *paged(keys, values, 2), blocks, length=length, **options)
    truth = naive.block_attention(queries, keys, values, blocks, **options)
    assert relative_error(found, truth) < TOLERANCE[dtype]


def test_attention_mass_is_the_softmax_summed_over_blocks() -> None:
    torch.manual_seed(8)
    length, rows, heads, groups, dim, size = PAGE + 37, 4, 2, 3, 8, 16
    queries, keys = torch.randn(heads, rows * groups, dim), torch.randn(heads, length, dim)
    start = length - rows
    mass = eager.attention_mass(queries, paged(keys, keys, 2)[0], start, length, size, groups)
    assert mass.shape == (heads, rows * groups, start // size)
    for row in range(rows * groups):
        weights = torch.softmax(queries[:, row, None] @ keys[:, : start + row // groups + 1].transpose(1, 2), -1)[:, 0]
        expected = weights[:, : start // size * size].view(heads, -1, size).sum(-1)
        assert torch.allclose(mass[:, row], expected, atol=1e-6)


def test_the_reference_sees_what_it_says() -> None:
    blocks = torch.tensor([[0, 2]])
    seen = naive.visible_positions(blocks, tail_start=48, length=52, block_size=16, rows=3)
    expected = [*range(16), *range(32, 48), 48, 49]
    assert [row.nonzero().flatten().tolist() for row in seen[0]] == [expected, [*expected, 50], [*expected, 50, 51]]
