"""The Triton attention kernel on a GPU: against torch and flashinfer, and inside a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from tests.ops.interpreter import DEVICE
from tests.ops.test_block_attention_kernel import Batch, make_batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")]
LLAMA = {"heads": 8, "groups": 4, "dim": 128, "page": 256, "dtype": torch.bfloat16}


def rectangles(batch: Batch, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [batch, heads, rows, head_dim] and the first positions of the cache [batch, kv_heads, length, head_dim].

    What is NaN, because nothing may read it, becomes zero.
    """
    count = batch.keys.shape[0]
    queries = batch.queries.view(count, -1, *batch.queries.shape[1:]).transpose(1, 2)
    keys = batch.keys.permute(0, 2, 1, 4, 3).flatten(2, 3)[:, :, :length]
    values = batch.values.transpose(1, 2).flatten(2, 3)[:, :, :length]
    return queries, keys.nan_to_num(), values.nan_to_num()


def as_tokens(result: Tensor) -> Tensor:
    return result.transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("rows", [1, 7, 16, 61])
def test_dense_is_as_exact_as_sdpa(rows: int) -> None:
    start = 4097
    batch = make_batch(((start, rows),) * 2, most=None, **LLAMA)
    queries, keys, values = rectangles(batch, start + rows)
    shown = torch.ones(rows, start + rows, dtype=torch.bool, device=DEVICE).tril(start)
    peer = scaled_dot_product_attention(queries, keys, values, attn_mask=shown, scale=1.0, enable_gqa=True)
    found = batch.run()
    assert batch.error(found) < 1.5 * batch.error(as_tokens(peer))
    assert batch.error(found) < 4e-3


@pytest.mark.parametrize("trees", [False, True])
def test_selected_blocks_equal_flex_attention(trees: bool) -> None:
    start, rows, size = 2050, 16, 64
    batch = make_batch(((start, rows),) * 2, most=8, size=size, trees=trees, **LLAMA)
    queries, keys, values = rectangles(batch, start + rows)
    blocks = batch.options["blocks"]
    assert isinstance(blocks, Tensor)
    chosen = torch.zeros(2, 8, (start + rows) // size + 1, dtype=torch.bool, device=DEVICE)
    chosen.scatter_(2, blocks.long(), True)
    chosen[:, :, start // size :] = True
    visible = batch.options.get("visible")
    seen = visible if isinstance(visible, Tensor) else torch.ones(2 * rows, rows, device=DEVICE).tril().bool()
    seen = seen.view(2, rows, rows) if trees else torch.ones(rows, rows, device=DEVICE).tril().bool().expand(2, -1, -1)

    def shown(sequence: Tensor, head: Tensor, row: Tensor, position: Tensor) -> Tensor:
        own = seen[sequence, row, (position - start).clamp(min=0)]
        return chosen[sequence, head // 4, position // size] & ((position < start) | own)

    mask = create_block_mask(shown, 2, queries.shape[1], rows, start + rows, device=DEVICE)
    peer = flex_attention(queries, keys, values, block_mask=mask, scale=1.0, enable_gqa=True)
    assert isinstance(peer, Tensor)
    found = batch.run()
    assert batch.error(as_tokens(peer)) < 4e-3
    assert batch.error(found) < 4e-3


@pytest.mark.parametrize("rows", [1, 8])
def test_dense_equals_flashinfer(rows: int) -> None:
    flashinfer = pytest.importorskip("flashinfer")
    start = 3000
    batch = make_batch(((start, rows),), most=None, **LLAMA)
    _, keys, values = rectangles(batch, start + rows)
    peer = flashinfer.single_prefill_with_kv_cache(
        batch.queries,
        keys[0].transpose(0, 1).contiguous(),
        values[0].transpose(0, 1).contiguous(),
        causal=True,
        sm_scale=1.0,
    )
    assert batch.error(batch.run()) < 1.5 * batch.error(peer)


@pytest.mark.parametrize("splits", [1, 8])
def test_a_captured_call_follows_its_tensors(splits: int) -> None:
    """Lengths, offsets and choices change between replays of one graph; nothing of them was baked in."""
    shapes = [((900, 5), (300, 4)), ((1100, 2), (0, 3)), ((64, 5), (1027, 0))]
    cases = [
        make_batch(shape, most=6, counted=True, trees=True, most_rows=5, spare_tokens=9 - sum(r for _, r in shape),
                   seed=number, **LLAMA)
        for number, shape in enumerate(shapes)
    ]  # fmt: skip
    held = cases[0]
    names = ("offsets", "starts", "blocks", "kept", "visible")
    pages = max(case.keys.shape[1] for case in cases)
    shape = (2, pages, *held.keys.shape[2:])
    held_keys = torch.empty(shape, dtype=held.keys.dtype, device=DEVICE)
    held_values = torch.empty((2, pages, *held.values.shape[2:]), dtype=held.values.dtype, device=DEVICE)
    constant = Batch(held.queries.clone(), held_keys, held_values, dict(held.options), held.truth)
    for name in names:
        constant.options[name] = held.options[name].clone()  # type: ignore[attr-defined]

    def load(case: Batch) -> None:
        constant.queries.copy_(case.queries)
        for target, source in ((held_keys, case.keys), (held_values, case.values)):
            target.fill_(float("nan"))
            target[:, : source.shape[1]] = source
        for name in names:
            constant.options[name].copy_(case.options[name])  # type: ignore[attr-defined]

    load(held)
    constant.run(splits=splits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = constant.run(splits=splits)
    for case in reversed(cases):
        load(case)
        graph.replay()
        assert case.error(result) < 4e-3
