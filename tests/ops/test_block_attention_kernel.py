"""The Triton attention kernel against the naive reference: ragged batches, splits, trees, layouts, poisoned memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse.ops.block_attention import naive
from sparse.tree import Tree
from tests.ops.interpreter import DEVICE, kernel

attention = kernel("block_attention", "attention")
splits_for = kernel("block_attention", "splits_for")

PAGE = 128
TOLERANCE = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
NAN = float("nan")


def cache_layout(full: Tensor) -> Tensor:
    """[batch, pages, kv_heads, page, head_dim] with channels of a page side by side, as the cache keeps keys."""
    return full.transpose(3, 4).contiguous().transpose(3, 4)


def heads_inside(full: Tensor) -> Tensor:
    """The KV heads of a position side by side, as paged caches of serving engines keep them."""
    return full.transpose(2, 3).contiguous().transpose(2, 3)


def padded(full: Tensor) -> Tensor:
    """Channels of a position side by side, with a gap after them."""
    wide = full.new_full((*full.shape[:-1], full.shape[-1] + 8), NAN)
    wide[..., :-8] = full
    return wide[..., :-8]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": cache_layout,
    "row_major": Tensor.contiguous,
    "heads_inside": heads_inside,
    "padded": padded,
}


@dataclass
class Batch:
    """Steps of several sequences; ``truth`` is [tokens, heads, head_dim] in fp64."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    options: dict[str, object]
    truth: Tensor

    def run(self, **changes: object) -> Tensor:
        result: Tensor = attention(self.queries, self.keys, self.values, **{**self.options, **changes})
        return result

    def error(self, found: Tensor) -> float:
        return ((found.double() - self.truth).norm() / self.truth.norm()).item()


def make_batch(
    lengths: Sequence[tuple[int, int]],
    *,
    heads: int = 2,
    groups: int = 3,
    dim: int = 64,
    size: int = 16,
    most: int | None = 3,
    behind: int = 0,
    counted: bool = False,
    trees: bool = False,
    layout: str = "row_major",
    value_layout: str = "row_major",
    dtype: torch.dtype = torch.float32,
    most_rows: int | None = None,
    spare_tokens: int = 0,
    page: int = PAGE,
    seed: int = 0,
) -> Batch:
    """A ragged batch in which every position that no row may see is NaN.

    Args:
        lengths: (positions before the step, rows) of each sequence.
        most: blocks per KV head; None for dense attention.
        behind: whole blocks by which the selection is older than the step.
        counted: pass ``kept``, unequal per head; the entries beyond it point at blocks that must not be read.
        spare_tokens: rows of the queries that belong to no sequence.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [count for _, count in lengths]
    most_rows = most_rows or max(rows)
    tokens = sum(rows) + spare_tokens
    pages = max(start + count for start, count in lengths) // page + 2
    queries = (torch.randn(tokens, heads * groups, dim, generator=generator) * 2 * dim**-0.5).to(dtype)
    stored = torch.full((2, len(lengths), heads, pages * page, dim), NAN, dtype=dtype)
    blocks = torch.zeros(len(lengths), heads, most or 0, dtype=torch.int32)
    kept = torch.zeros(len(lengths), heads, dtype=torch.int32)
    visible = torch.rand(tokens, most_rows, generator=generator) < 0.5
    tails, truth, first = [], torch.zeros(tokens, heads * groups, dim, dtype=torch.float64), 0
    for number, (start, count) in enumerate(lengths):
        length = start + count
        whole = max(start // size - behind, 0)
        tails.append(whole * size)
        tree = None
        if trees and count:
            tree = Tree([int(torch.randint(-1, node, (), generator=generator)) for node in range(count - 1)])
            visible[first : first + count, :count] = tree.visible
        clean = torch.randn(2, heads, length, dim, generator=generator).to(dtype)
        valid = None
        if most is not None:
            for head in range(heads):
                order = torch.randperm(whole, generator=generator)[:most]
                kept[number, head] = len(order) - (head + number) % 2 if counted and len(order) else len(order)
                blocks[number, head, : len(order)] = order
            valid = torch.arange(most) < kept[number][:, None]
        chosen = None if most is None else blocks[number]
        if count:
            shown = naive.visible_positions(chosen, tails[-1], length, size, count, valid, tree).any(1)
            shown = shown.expand(heads, length)
            stored[:, number, :, :length] = torch.where(shown[None, :, :, None], clean, NAN)
            packed = queries[first : first + count].view(count, heads, groups, dim).transpose(0, 1)
            result = naive.block_attention(
                packed.reshape(heads, count * groups, dim),
                *clean,
                chosen,
                tail_start=tails[-1],
                block_size=size,
                groups=groups,
                valid=valid,
                tree=tree,
            )
            result = result.view(heads, count, groups, dim).transpose(0, 1)
            truth[first : first + count] = result.reshape(count, heads * groups, dim)
        first += count
    paged = stored.view(2, len(lengths), heads, pages, page, dim).transpose(2, 3)
    keys, values = LAYOUTS[layout](paged[0].to(DEVICE)), LAYOUTS[value_layout](paged[1].to(DEVICE))
    ends = torch.tensor([0, *rows]).cumsum(0)
    options: dict[str, object] = {
        "offsets": ends.to(torch.int32).to(DEVICE),
        "starts": torch.tensor([start for start, _ in lengths], dtype=torch.int32, device=DEVICE),
        "most_rows": most_rows,
        "block_size": size,
    }
    if most is not None:
        options["blocks"] = blocks.to(DEVICE)
        short = counted or bool((kept < most).any())
        options["kept"] = kept.to(DEVICE) if short else None
        options["tails"] = torch.tensor(tails, dtype=torch.int32, device=DEVICE) if behind else None
    if trees:
        options["visible"] = visible.to(DEVICE)
    return Batch(queries.to(DEVICE), keys.transpose(3, 4), values, options, truth.to(DEVICE))


RAGGED = ((150, 5), (0, 0), (37, 1), (255, 4))
SHAPES = [
    # groups, head_dim, block_size, most
    (1, 64, 16, 3),
    (3, 64, 32, 2),
    (4, 128, 64, 1),
    (8, 64, 16, 6),
    (3, 128, 16, 5),
]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups, dim, size, most", SHAPES)
def test_selected_blocks_equal_the_reference(
    groups: int, dim: int, size: int, most: int, dtype: torch.dtype, splits: int
) -> None:
    batch = make_batch(RAGGED, groups=groups, dim=dim, size=size, most=most, counted=True, dtype=dtype, trees=True)
    found = batch.run(splits=splits)
    assert found.dtype is dtype and found.is_contiguous()
    assert batch.error(found) < TOLERANCE[dtype]


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("groups, dim", [(3, 64), (4, 128)])
def test_dense_equals_the_reference(groups: int, dim: int, dtype: torch.dtype, splits: int) -> None:
    batch = make_batch(RAGGED, groups=groups, dim=dim, most=None, dtype=dtype)
    assert batch.error(batch.run(splits=splits)) < TOLERANCE[dtype]


@pytest.mark.parametrize("layout, value_layout", [*zip(LAYOUTS, reversed(LAYOUTS), strict=True)])
@pytest.mark.parametrize("most", [None, 4])
def test_any_strides_serve(layout: str, value_layout: str, most: int | None) -> None:
    batch = make_batch(((140, 3), (20, 2)), most=most, layout=layout, value_layout=value_layout)
    assert batch.keys.stride()[3:] != batch.values.stride()[:-3:-1]
    wide = torch.full((*batch.queries.shape[:2], 200), NAN, device=DEVICE)
    wide[..., 5:69] = batch.queries
    batch.queries = wide[..., 5:69]
    assert batch.error(batch.run(splits=2)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("start", [0, 1, 15, 16, 63, 64, 127, 128, 129])
def test_borders_of_blocks_and_pages(start: int) -> None:
    for most in (None, 2):
        for rows in (1, 6):
            batch = make_batch(((start, rows),), heads=1, most=most, seed=start)
            assert batch.error(batch.run(splits=2)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("behind", [1, 5, 20])
def test_everything_after_an_older_selection_is_visible(behind: int) -> None:
    """An anchor chose at an earlier step: the blocks that became whole since then are read as well."""
    batch = make_batch(((300, 4), (33, 2)), most=3, behind=behind, counted=True, trees=True)
    found = batch.run(splits=3)
    assert batch.error(found) < TOLERANCE[torch.float32]
    newer = make_batch(((300, 4), (33, 2)), most=3, counted=True, trees=True)
    assert newer.error(found) > 1e-2


def test_a_tree_differs_from_a_chain_and_many_rows_take_several_tiles() -> None:
    """61 rows of four query heads: two tiles of 128, the first sequence needs one of them and a part of the other."""
    batch = make_batch(((70, 37), (10, 61)), heads=1, groups=4, trees=True)
    found = batch.run(splits=2)
    assert batch.error(found) < TOLERANCE[torch.float32]
    assert batch.error(batch.run(splits=1)) < TOLERANCE[torch.float32]
    assert batch.error(batch.run(visible=None)) > 1e-2


def test_no_block_at_all_leaves_the_tail() -> None:
    batch = make_batch(((150, 3), (64, 2)), most=2)
    empty = torch.zeros_like(batch.options["kept"] or batch.options["blocks"][..., 0])  # type: ignore[index]
    none = batch.options["blocks"][..., :0]  # type: ignore[index]
    found = batch.run(kept=empty, splits=3)
    assert torch.equal(found, batch.run(blocks=none, kept=None, splits=3))
    assert found.isfinite().all() and batch.error(found) > 1e-2


def test_all_blocks_equal_dense() -> None:
    dense = make_batch(((131, 5),), most=None)
    whole = torch.arange(131 // 16, dtype=torch.int64, device=DEVICE).flip(0).expand(1, 2, -1)
    assert dense.error(dense.run(blocks=whole, splits=2)) < TOLERANCE[torch.float32]


def test_counts_beyond_the_table_are_cut() -> None:
    batch = make_batch(((150, 3),), most=3)
    many = torch.full((1, 2), 1000, dtype=torch.int32, device=DEVICE)
    assert torch.equal(batch.run(kept=many, splits=2), batch.run(splits=2))


@pytest.mark.parametrize("splits", [1, 2])
def test_tokens_of_no_sequence_give_zeros(splits: int) -> None:
    """A captured step has a fixed number of tokens; those after the last offset are padding."""
    batch = make_batch(((40, 2), (0, 0), (90, 1)), most=2, counted=True, spare_tokens=9, most_rows=4)
    batch.queries[3:] = NAN
    found = batch.run(splits=splits)
    assert batch.error(found) < TOLERANCE[torch.float32]
    assert not found[3:].any()


def test_more_splits_than_work_change_nothing_but_rounding() -> None:
    batch = make_batch(((90, 2), (3, 1)), heads=1, most=2, counted=True)
    for splits in (6, 20):
        assert batch.error(batch.run(splits=splits)) < TOLERANCE[torch.float32]


def test_large_scores_neither_overflow_nor_vanish() -> None:
    for splits in (1, 3):
        batch = make_batch(((200, 3),), most=None)
        batch.queries *= 0
        batch.queries[..., 0] = 1
        clean = batch.keys.isfinite()
        batch.keys.masked_fill_(clean, 0)
        first = batch.keys[0, :, :, 0]
        first[first.isfinite()] = -3e4
        first[0, :, 17] = 3e4
        expected = batch.values[0, 0, :, 17].repeat_interleave(3, 0)
        assert torch.equal(batch.run(splits=splits), expected.expand(3, -1, -1))


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_random_batches(data: st.DataObject) -> None:
    whole = st.integers(0, 200)
    lengths = data.draw(st.lists(st.tuples(whole, st.integers(1, 9)), min_size=1, max_size=2))
    batch = make_batch(
        lengths,
        heads=data.draw(st.sampled_from([1, 2])),
        groups=data.draw(st.sampled_from([1, 3, 8])),
        size=data.draw(st.sampled_from([16, 32, 64])),
        most=data.draw(st.sampled_from([None, 1, 4])),
        behind=data.draw(st.integers(0, 2)),
        counted=data.draw(st.booleans()),
        trees=data.draw(st.booleans()),
        layout=data.draw(st.sampled_from(sorted(LAYOUTS))),
        value_layout=data.draw(st.sampled_from(sorted(LAYOUTS))),
        seed=data.draw(st.integers(0, 99)),
    )
    splits = data.draw(st.sampled_from([None, 1, 2, 5]))
    assert batch.error(batch.run(splits=splits)) < TOLERANCE[torch.float32]


def test_splits_fill_the_device_without_tiny_shares() -> None:
    if DEVICE == "cpu":
        device = torch.device("cpu")
        assert splits_for(32768, 8, device) == 33
        assert splits_for(1024, 8, device) == 4
        assert splits_for(100, 8, device) == 1
        assert splits_for(0, 8, device) == 1
        assert splits_for(8192, 128, device) == 2
        assert splits_for(8192, 500, device) == 1
        assert splits_for(10**6, 1, device) == 64


@pytest.mark.parametrize(
    "change, message",
    [
        ({"block_size": 24}, "block_size=24"),
        ({"block_size": 256}, "block_size=256"),
        ({"blocks": torch.zeros(1, 5, 2, dtype=torch.int32)}, "5"),
    ],
)
def test_unsupported_sizes_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_batch(((40, 2),)).run(**change)


def test_unsupported_tensors_are_refused() -> None:
    batch = make_batch(((40, 2),))
    with pytest.raises(ValueError, match="head_dim=48"):
        attention(batch.queries[..., :48], batch.keys[:, :, :, :48], batch.values[..., :48], **batch.options)
    with pytest.raises(ValueError, match="5 query heads"):
        attention(batch.queries[:, :5], batch.keys, batch.values, **batch.options)
    with pytest.raises(ValueError, match="dtypes"):
        attention(batch.queries.to(torch.bfloat16), batch.keys, batch.values, **batch.options)
    with pytest.raises(ValueError, match="values"):
        attention(batch.queries, batch.keys, batch.values.transpose(3, 4), **batch.options)
