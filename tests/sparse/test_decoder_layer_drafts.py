"""What a drafter's head asks of the kernels: rows beside the hidden states, drafts in passes, a short memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse.ops.decoder_layer import naive, native
from sparse.ops.decoder_layer.native import PAGE, PROJECT
from sparse.selection import Selection
from tests.sparse.decoder_layers import (
    TOLERANCE,
    Half,
    OneSequence,
    attend,
    attention,
    need,
    normal,
    random_tree,
    segments_of,
    worst_row,
)


@pytest.fixture(params=TOLERANCE, ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """A format that runs here."""
    need(request.param)
    torch.manual_seed(0)
    found: torch.dtype = request.param
    return found


@pytest.mark.parametrize("hidden", [80, 41])
def test_rows_beside_the_hidden_states_are_projected_with_them(hidden: int, dtype: torch.dtype) -> None:
    """Each part with its own norm; what is added, is added to the hidden states."""
    half = attention(dtype, hidden=hidden, beside=True)
    sequences = [OneSequence(half, 40, 3), OneSequence(half, 300, 17, random_tree(17))]
    states, beside = normal(20, hidden, dtype=dtype), normal(20, hidden, scale=3, dtype=dtype)
    truth = naive.attention_half(states, half.truth, [one.rows for one in sequences], beside)
    assert worst_row(attend(half, states, sequences, beside=beside), truth, states) < TOLERANCE[dtype]
    for one in sequences:
        stored, expected = one.stored((one.keys, one.values)).double(), one.stored(one.clean)
        assert ((stored - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < TOLERANCE[dtype]


def in_passes(half: Half, hidden: Tensor, one: OneSequence, sizes: list[int], parts: int) -> Tensor:
    """The draft of a sequence in passes of ``sizes`` tokens, each seeing those before it."""
    done, found = 0, hidden.clone()
    for size in sizes:
        part, (segments, keep) = slice(done, done + size), segments_of([one])
        segments[0].count, segments[0].before = size, done
        positions = one.rows.positions[part].contiguous()
        segments[0].positions = positions.data_ptr()
        visible = None if one.tree is None else one.tree.visible[part, : part.stop].contiguous()
        segments[0].visible = None if visible is None else visible.data_ptr()
        jobs, rows = native.Jobs(), found[part]
        jobs.attend(half.layer, segments, block_size=16, parts=parts, keep=[keep, positions, visible])
        jobs.run(rows)
        done += size
    return found


@pytest.mark.parametrize("form", ["chain", "tree"])
@pytest.mark.parametrize("start, sizes", [(0, [1, 4, 12]), (PAGE - 7, [5, 16, 3]), (300, [33, 1, 27])])
def test_a_draft_in_several_passes_is_that_of_one(start: int, sizes: list[int], form: str, dtype: torch.dtype) -> None:
    """Tokens of earlier passes are seen as the tree says; each pass stores its own."""
    half, count = attention(dtype, norms=True), sum(sizes)
    tree = random_tree(count) if form == "tree" else None
    one = OneSequence(half, start, count, tree)
    hidden = normal(count, half.hidden, dtype=dtype)
    found = in_passes(half, hidden, one, sizes, native.PROJECT | native.MIX)
    truth = naive.attention_half(hidden, half.truth, [one.rows])
    assert worst_row(found, truth, hidden) < TOLERANCE[dtype]
    again = OneSequence(half, start, count, tree)
    again.keys, again.values = one.keys, one.values
    assert torch.equal(attend(half, hidden, [again]), found)


@pytest.mark.parametrize("begin", [0, 1, 37, 48, PAGE + 9, 300])
def test_a_memory_may_begin_anywhere(begin: int, dtype: torch.dtype) -> None:
    """Without chosen blocks all from a position on is seen, and nothing before it."""
    half = attention(dtype)
    start, count = 300, 9
    one = OneSequence(half, start, count, random_tree(count))
    hidden = normal(count, half.hidden, dtype=dtype)
    unread = torch.zeros(2, one.keys.shape[0] * PAGE, dtype=torch.bool)
    unread[:, : begin // 16 * 16] = True
    one.poison(unread)

    def run() -> Tensor:
        found, (segments, keep) = hidden.clone(), segments_of([one])
        empty = torch.empty(1, dtype=torch.int64)
        segments[0].blocks, segments[0].chosen, segments[0].tail = empty.data_ptr(), 0, begin
        jobs = native.Jobs()
        jobs.attend(half.layer, segments, block_size=16, keep=[keep, empty])
        jobs.run(found)
        return found

    found = run()
    one.selection, one.tail = Selection(torch.empty(2, 0, dtype=torch.int64), None, 0), begin
    truth = naive.attention_half(hidden, half.truth, [one.rows])
    assert worst_row(found, truth, hidden) < TOLERANCE[dtype]
    one.tail = begin + 1
    if begin < start:
        other = naive.attention_half(hidden, half.truth, [one.rows])
        assert worst_row(other, truth, hidden) > TOLERANCE[dtype]


def test_storing_alone_leaves_the_hidden_states(dtype: torch.dtype) -> None:
    """Keys and values enter the cache; nothing else changes."""
    half = attention(dtype)
    one = OneSequence(half, 20, 40)
    hidden = normal(40, half.hidden, dtype=dtype)
    assert torch.equal(attend(half, hidden, [one], parts=[PROJECT]), hidden)
    naive.attention_half(hidden, half.truth, [one.rows])
    stored, expected = one.stored((one.keys, one.values)).double(), one.stored(one.clean)
    assert ((stored - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < TOLERANCE[dtype]
    assert one.keys[..., 60:].isnan().all() and one.values[..., 60:, :].isnan().all()
