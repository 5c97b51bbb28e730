"""The attention kernel against its naive reference and against other libraries' kernels.

Memory that must not be read is filled with NaN. Runs on a GPU, and in Triton's interpreter at tiny shapes.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from scripts.bench import drafts
from scripts.bench.gpu_common import PAGE, TOLERANCE, error_of, random_of
from sparse.ops.block_attention import naive
from sparse.tree import Tree

_CROSS_TOLERANCE = 1e-2
"""Between two kernels in bf16 or fp16, neither of them the truth."""


class Absent(RuntimeError):
    """A library to compare with is not installed."""


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """Sizes of one check of attention; ``counts`` and ``starts`` are by sequence.

    Attributes:
        behind: blocks that became whole after the selection was made; above zero, the kernel is given tails and
            blocks in int64.
    """

    head_dim: int
    kv_heads: int
    groups: int
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    tree: bool
    block_size: int
    keep: int | None
    splits: int | None = None
    behind: int = 0

    @property
    def text(self) -> str:
        """As the check is named."""
        kind = "dense" if self.keep is None else f"{self.keep} blocks of {self.block_size}"
        older = f", chosen {self.behind} blocks before" if self.behind else ""
        sizes = f"head size {self.head_dim}, {self.groups} per KV head, rows {self.counts}{', tree' * self.tree}"
        return f"attention, {kind}{older}, {sizes}"

    def known(self, start: int) -> int:
        """Whole blocks that the selection knew when ``start`` positions precede the step."""
        return max(0, start // self.block_size - self.behind)


def attention(
    case: AttentionCase, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> tuple[float, float]:
    """Error of the attention kernel and what is allowed; all but chosen blocks, tail and the step's own rows is NaN."""
    batch, most = len(case.starts), max(case.counts)
    pages = -(-max(start + most for start in case.starts) // PAGE) + 1
    size = (batch, pages, case.kv_heads, PAGE, case.head_dim)
    keys, values = (torch.full(size, float("nan")) for _ in range(2))
    tree = drafts.parse(f"tree{most}").tree(torch.device("cpu")) if case.tree and most > 1 else None
    heads = case.kv_heads * case.groups
    queries = torch.randn(sum(case.counts), heads, case.head_dim, generator=generator) * case.head_dim**-0.5
    keep = case.keep or 0
    blocks = torch.zeros(batch, case.kv_heads, max(1, keep), dtype=torch.int64 if case.behind else torch.int32)
    kept = torch.zeros(batch, case.kv_heads, dtype=torch.int32)
    truths = []
    offsets = [0]
    for row, (start, count) in enumerate(zip(case.starts, case.counts, strict=True)):
        offsets.append(offsets[-1] + count)
        known = case.known(start)
        plain = [random_of((case.kv_heads, start + count, case.head_dim), dtype, generator) for _ in range(2)]
        for head in range(case.kv_heads):
            wanted = max(0, min(keep - head % 2, known))
            own = torch.randperm(known, generator=generator)[:wanted].sort().values
            kept[row, head] = wanted
            blocks[row, head, :wanted] = own
            read = torch.full((start + count,), case.keep is None)
            read[known * case.block_size :] = True
            for block in own.tolist():
                read[block * case.block_size : (block + 1) * case.block_size] = True
            for stored, full in zip((keys, values), plain, strict=True):
                flat = stored[row, :, head].reshape(-1, case.head_dim)
                flat[: start + count][read] = full[head][read].float()
                stored[row, :, head] = flat.view(pages, PAGE, case.head_dim)
        own_queries = queries[offsets[-2] : offsets[-1]].to(dtype)
        truths.append(_truth(case, own_queries, plain, None if case.keep is None else (blocks[row], kept[row]), tree))
    visible = None
    if tree is not None:
        visible = torch.cat([tree.visible[:count, :most] for count in case.counts])
    tails = [case.known(start) * case.block_size for start in case.starts]
    kernel = importlib.import_module("sparse.ops.block_attention.kernel")
    output = kernel.attention(
        queries.to(device, dtype),
        keys.to(device, dtype).transpose(-1, -2),
        values.to(device, dtype),
        offsets=torch.tensor(offsets, dtype=torch.int32, device=device),
        starts=torch.tensor(case.starts, dtype=torch.int32, device=device),
        most_rows=most,
        block_size=case.block_size,
        blocks=None if case.keep is None else blocks.to(device),
        kept=None if case.keep is None else kept.to(device),
        tails=torch.tensor(tails, dtype=torch.int32, device=device) if case.behind else None,
        visible=None if visible is None else visible.to(device),
        splits=case.splits,
    )
    return error_of(output, torch.cat(truths)), TOLERANCE[dtype]


def _truth(
    case: AttentionCase,
    queries: Tensor,
    plain: list[Tensor],
    chosen: tuple[Tensor, Tensor] | None,
    tree: Tree | None,
) -> Tensor:
    """[tokens, heads, head_dim] in fp64 for one sequence."""
    count = queries.shape[0]
    if count == 0:
        return queries.double()
    grouped = queries.view(count, case.kv_heads, case.groups, -1).transpose(0, 1).flatten(1, 2)
    blocks = valid = None
    if chosen is not None:
        blocks, kept = chosen
        valid = torch.arange(blocks.shape[1])[None] < kept[:, None]
    mixed = naive.block_attention(
        grouped,
        plain[0],
        plain[1],
        blocks,
        tail_start=case.known(plain[0].shape[1] - count) * case.block_size,
        block_size=case.block_size,
        groups=case.groups,
        valid=valid,
        tree=tree,
    )
    return mixed.view(case.kv_heads, count, case.groups, -1).transpose(0, 1).flatten(1, 2)


def cross_check(
    library: str, start: int, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> tuple[float, float]:
    """Difference of dense attention from another library's kernel, and what is allowed.

    Args:
        library: a name in ``LIBRARIES``.
        start: positions before the step.
        device, dtype, generator: of the tensors.

    Raises:
        Absent: it is not installed.
    """
    heads, kv_heads, head_dim, rows = 32, 8, 128, 16
    length = start + rows
    pages = -(-length // PAGE)
    stored = [
        random_of((1, pages, kv_heads, PAGE, head_dim), torch.float32, generator).to(device, dtype) for _ in range(2)
    ]
    queries = (random_of((rows, heads, head_dim), torch.float32, generator) * head_dim**-0.5).to(device, dtype)
    kernel = importlib.import_module("sparse.ops.block_attention.kernel")
    ours = kernel.attention(
        queries,
        stored[0].transpose(-1, -2),
        stored[1],
        offsets=torch.tensor([0, rows], dtype=torch.int32, device=device),
        starts=torch.tensor([start], dtype=torch.int32, device=device),
        most_rows=rows,
    )
    keys, values = (one[0].transpose(0, 1).flatten(1, 2)[None, :, :length] for one in stored)
    return error_of(ours, LIBRARIES[library](queries, keys, values, start)), _CROSS_TOLERANCE


def _sdpa(queries: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    mask = torch.ones(queries.shape[0], keys.shape[2], dtype=torch.bool, device=keys.device).tril(start)
    grouped = queries.transpose(0, 1)[None]
    mixed = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=1.0, enable_gqa=True)
    return mixed[0].transpose(0, 1)


def _flex(queries: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    flex = _library("torch.nn.attention.flex_attention")

    def visible(_batch: Tensor, _head: Tensor, row: Tensor, position: Tensor) -> Tensor:
        return position <= row + start

    mask = flex.create_block_mask(visible, None, None, queries.shape[0], keys.shape[2], device=str(keys.device))
    grouped = queries.transpose(0, 1)[None]
    mixed: Tensor = flex.flex_attention(grouped, keys, values, block_mask=mask, scale=1.0, enable_gqa=True)
    return mixed[0].transpose(0, 1)


def _flashinfer(queries: Tensor, keys: Tensor, values: Tensor, _start: int) -> Tensor:
    library = _library("flashinfer")
    plain = [one[0].transpose(0, 1).contiguous() for one in (keys, values)]
    mixed: Tensor = library.single_prefill_with_kv_cache(queries, *plain, causal=True, sm_scale=1.0)
    return mixed


def _library(name: str) -> Any:
    if importlib.util.find_spec(name) is None:
        raise Absent("not installed")
    return importlib.import_module(name)


LIBRARIES = {"SDPA": _sdpa, "flex_attention": _flex, "flashinfer": _flashinfer}
