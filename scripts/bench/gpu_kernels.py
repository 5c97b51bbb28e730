"""Every Triton kernel against its naive reference, at odd shapes, memory that must not be read filled with NaN.

Runs on a GPU, and with ``--interpret`` in Triton's interpreter at tiny shapes.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from scripts.bench import drafts
from scripts.bench.gpu_common import Deadline, Red
from sparse.budget import AttentionBudget
from sparse.ops.block_attention import naive as attention_naive
from sparse.ops.moe import naive as moe_naive
from sparse.tree import Tree

PAGE = 256
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
_CROSS_TOLERANCE = 1e-2
"""Between two kernels in bf16 or fp16, neither of them the truth."""
Found = tuple[str, float, float]
"""What was checked, its error and its tolerance."""


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """Sizes of one check of attention; ``counts`` and ``starts`` are by sequence."""

    head_dim: int
    kv_heads: int
    groups: int
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    tree: bool
    block_size: int
    keep: int | None
    splits: int | None = None


def run(device: torch.device, dtypes: tuple[torch.dtype, ...], tiny: bool, deadline: Deadline) -> list[Found]:
    """Every check that the time allows; prints a line each.

    Raises:
        Red: a kernel is off its reference.
    """
    found: list[Found] = []
    for dtype in dtypes:
        for name, check in _checks(tiny):
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            if deadline.allows(label, 5):
                generator = torch.Generator().manual_seed(len(found))
                error, tolerance = check(device, dtype, generator)
                print(f"{label}: off by {error:.1e} (allowed {tolerance:.0e})", flush=True)
                if not error < tolerance:
                    raise Red(f"{label}: off its reference by {error:.1e} of its norm, allowed are {tolerance:.0e}")
                found.append((label, error, tolerance))
    return found


Check = Callable[[torch.device, torch.dtype, torch.Generator], tuple[float, float]]


def _checks(tiny: bool) -> Iterator[tuple[str, Check]]:
    for case in _attention_cases(tiny):
        kind = "dense" if case.keep is None else f"{case.keep} blocks of {case.block_size}"
        sizes = f"head size {case.head_dim}, {case.groups} per KV head, rows {case.counts}{', tree' * case.tree}"
        yield f"attention, {kind}, {sizes}", lambda *where, case=case: attention(case, *where)
    for score, query, gqa in (("mean", "first", "mean"), ("bound", "weighted", "max"), ("gaussian", "mean", "mean")):
        budget = AttentionBudget(topk=5, score=score, query=query, gqa=gqa)
        yield f"selection, {score}, {query}, {gqa}", lambda *where, budget=budget: selection(budget, tiny, *where)
    for rows, hidden, width in ((3, 72, 104),) if tiny else ((1, 576, 1536), (7, 200, 777), (61, 4096, 1000)):
        sizes = f"rows {rows}, hidden {hidden}, width {width}"
        yield f"sparse FFN, {sizes}", lambda *where, n=rows, h=hidden, w=width: ffn(n, h, w, *where)
    for rows, experts, width, hidden in ((5, 5, 24, 40),) if tiny else ((1, 11, 72, 136), (60, 40, 96, 520)):
        sizes = f"rows {rows}, {experts} experts, hidden {hidden}, width {width}"
        yield (
            f"experts, {sizes}",
            lambda *where, n=rows, e=experts, w=width, h=hidden: experts_of(n, e, w, h, *where),
        )


def _attention_cases(tiny: bool) -> Iterator[AttentionCase]:
    if tiny:
        yield AttentionCase(64, 1, 3, (133, 0, 40), (5, 0, 1), False, 16, 3)
        yield AttentionCase(64, 2, 1, (70,), (4,), True, 16, None, 2)
        return
    for head_dim, kv_heads, groups in ((64, 3, 3), (128, 2, 4), (128, 1, 8), (64, 5, 1)):
        yield AttentionCase(head_dim, kv_heads, groups, (1031, 300, 517), (7, 0, 3), False, 16, 11)
        yield AttentionCase(head_dim, kv_heads, groups, (1500, 799), (60, 60), True, 32, 9)
        yield AttentionCase(head_dim, kv_heads, groups, (1031, 5, 517), (7, 1, 16), False, 16, None)
        yield AttentionCase(head_dim, kv_heads, groups, (2047,), (1,), False, 64, 7, 5)


def attention(
    case: AttentionCase, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> tuple[float, float]:
    """Error of the attention kernel; only chosen blocks, the tail and the step's own rows are not NaN."""
    batch, most = len(case.starts), max(case.counts)
    pages = -(-max(start + most for start in case.starts) // PAGE) + 1
    size = (batch, pages, case.kv_heads, PAGE, case.head_dim)
    keys, values = (torch.full(size, float("nan")) for _ in range(2))
    tree = drafts.parse(f"tree{most}").tree(torch.device("cpu")) if case.tree and most > 1 else None
    heads = case.kv_heads * case.groups
    queries = torch.randn(sum(case.counts), heads, case.head_dim, generator=generator) * case.head_dim**-0.5
    keep = case.keep or 0
    blocks = torch.zeros(batch, case.kv_heads, max(1, keep), dtype=torch.int32)
    kept = torch.zeros(batch, case.kv_heads, dtype=torch.int32)
    truths = []
    offsets = [0]
    for row, (start, count) in enumerate(zip(case.starts, case.counts, strict=True)):
        offsets.append(offsets[-1] + count)
        whole = start // case.block_size
        plain = [_random((case.kv_heads, start + count, case.head_dim), dtype, generator) for _ in range(2)]
        chosen = [
            sorted(torch.randperm(whole, generator=generator)[: max(0, min(keep - head % 2, whole))].tolist())
            for head in range(case.kv_heads)
        ]
        for head, own in enumerate(chosen):
            kept[row, head] = len(own)
            blocks[row, head, : len(own)] = torch.tensor(own, dtype=torch.int32)
            read = torch.full((start + count,), case.keep is None)
            read[whole * case.block_size :] = True
            for block in own:
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
        visible=None if visible is None else visible.to(device),
        splits=case.splits,
    )
    return _error(output, torch.cat(truths)), TOLERANCE[dtype]


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
    start = plain[0].shape[1] - count
    mixed = attention_naive.block_attention(
        grouped,
        plain[0],
        plain[1],
        blocks,
        tail_start=start // case.block_size * case.block_size,
        block_size=case.block_size,
        groups=case.groups,
        valid=valid,
        tree=tree,
    )
    return mixed.view(case.kv_heads, count, case.groups, -1).transpose(0, 1).flatten(1, 2)


def selection(
    budget: AttentionBudget, tiny: bool, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> tuple[float, float]:
    """Worst gap by which a block outside the selection scores above one inside, over the spread of the scores.

    Raises:
        Red: the selection has other blocks than it must, or not in order.
    """
    kv_heads, groups, head_dim = (1, 2, 64) if tiny else (3, 3, 128)
    starts = (200, 90) if tiny else (4099, 300, 65519)
    counts, keep = (3, 2, 7)[: len(starts)], [budget.topk or 1] * len(starts)
    capacity = max(starts) // budget.block_size + 3
    naive = importlib.import_module("sparse.ops.block_selection.naive")
    summaries = {}
    for name in ("mean", "min", "max", "variance"):
        drawn = _random((len(starts), kv_heads, head_dim, capacity), dtype, generator)
        shift = {"min": -1.0, "max": 1.0}.get(name, 0.0)
        summaries[name] = drawn.abs() * shift if shift else drawn.abs() if name == "variance" else drawn
        for row, start in enumerate(starts):
            summaries[name][row, ..., start // budget.block_size :] = float("nan")
    queries = _random((sum(counts), kv_heads * groups, head_dim), dtype, generator) * head_dim**-0.5
    weights, offsets = torch.zeros(sum(counts)), [0]
    for count in counts:
        own = torch.full((count,), 1 / count) if budget.query == "mean" else torch.pow(0.7, torch.arange(count))
        weights[offsets[-1] : offsets[-1] + count] = own / own.sum()
        if budget.query == "first":
            weights[offsets[-1] : offsets[-1] + count] = (torch.arange(count) == 0).float()
        offsets.append(offsets[-1] + count)
    kernel = importlib.import_module("sparse.ops.block_selection.kernel")
    blocks, kept = kernel.select(
        queries.to(device),
        {name: summaries[name].to(device) for name in budget.summaries},
        budget,
        offsets=torch.tensor(offsets, dtype=torch.int32, device=device),
        starts=torch.tensor(starts, dtype=torch.int32, device=device),
        keep=torch.tensor(keep, dtype=torch.int32, device=device),
        most=max(keep),
        weights=weights.to(device),
    )
    worst = 0.0
    for row, start in enumerate(starts):
        whole, tokens = start // budget.block_size, slice(offsets[row], offsets[row + 1])
        for head in range(kv_heads):
            chosen = blocks[row, head, : int(kept[row, head])].tolist()
            forced = {*range(min(budget.sinks, whole)), *range(max(0, whole - budget.window), whole)}
            if len(chosen) != min(whole, keep[row]) or chosen != sorted(set(chosen)) or not forced <= set(chosen):
                raise Red(
                    f"selection: {chosen} of {whole} blocks is not a selection of {keep[row]} with its fixed ones"
                )
            valid = {name: summaries[name][row, head, :, :whole] for name in budget.summaries}
            mine = queries[tokens, head * groups : (head + 1) * groups]
            scores = naive.scores(mine, valid, budget, weights[tokens])
            inside = [float(scores[block]) for block in chosen if block not in forced]
            outside = [float(scores[block]) for block in range(whole) if block not in chosen]
            if inside and outside:
                worst = max(worst, (max(outside) - min(inside)) / float(scores.std()))
    return max(worst, 0.0), 1e-4


def ffn(
    rows: int, hidden: int, width: int, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> tuple[float, float]:
    """Error of the sparse FFN; channels outside the first ``count`` of the index are NaN."""
    states = _random((rows, hidden), dtype, generator)
    activations = _random((rows, width), dtype, generator)
    channels = _random((width, 2 * hidden), dtype, generator) * hidden**-0.5
    order = torch.randperm(width, generator=generator)
    index, count = order[: 2 * width // 3], width // 2
    mine = channels[index[:count]].double()
    truth = (activations[:, index[:count]].double() * (states.double() @ mine[:, :hidden].T)) @ mine[:, hidden:]
    poisoned = torch.full_like(channels, float("nan"))
    poisoned[index[:count]] = channels[index[:count]]
    output = importlib.import_module("sparse.ops.sparse_ffn.kernel").ffn(
        states.to(device),
        activations.to(device),
        poisoned.to(device),
        index.to(device),
        torch.tensor([count], dtype=torch.int32, device=device),
    )
    return _error(output, truth), TOLERANCE[dtype]


def experts_of(
    rows: int,
    experts: int,
    width: int,
    hidden: int,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[float, float]:
    """Error of the mixture of experts; the weights of experts that run for no row are NaN."""
    states = _random((rows, hidden), dtype, generator)
    gate_up = _random((experts, 2 * width, hidden), dtype, generator) * hidden**-0.5
    down = _random((experts, hidden, width), dtype, generator) * width**-0.5
    wanted = torch.rand(rows, experts, generator=generator)
    wanted[:, torch.arange(experts) % 3 == 1] = 0
    combine = wanted * (wanted >= wanted.topk(2, dim=1).values[:, 1:])
    matrices = [
        moe_naive.Matrices(gate_up[number, :width], gate_up[number, width:], down[number]) for number in range(experts)
    ]
    truth = moe_naive.moe(states, combine, matrices)
    idle = combine.sum(0) == 0
    gate_up[idle], down[idle] = float("nan"), float("nan")
    output = importlib.import_module("sparse.ops.moe.kernel").moe(
        states.to(device), combine.to(device), gate_up.to(device), down.to(device), limit=int((~idle).sum())
    )
    return _error(output, truth), TOLERANCE[dtype]


def cross_checks(device: torch.device, dtype: torch.dtype, start: int = 2000) -> dict[str, float | str]:
    """Dense attention of the kernel against other libraries' kernels, by name; why where one is not there.

    Args:
        device, dtype: of the tensors.
        start: positions before the step.

    Raises:
        Red: they differ by more than rounding.
    """
    heads, kv_heads, head_dim, rows = 32, 8, 128, 16
    length = start + rows
    pages = -(-length // PAGE)
    stored = [torch.randn(1, pages, kv_heads, PAGE, head_dim, device=device, dtype=dtype) for _ in range(2)]
    queries = torch.randn(rows, heads, head_dim, device=device, dtype=dtype) * head_dim**-0.5
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
    found: dict[str, float | str] = {}
    for name, other in (("SDPA", _sdpa), ("flex_attention", _flex), ("flashinfer", _flashinfer)):
        output = other(queries, keys, values, start)
        if output is None:
            found[name] = "not installed"
            continue
        found[name] = error = _error(ours, output)
        if not error < _CROSS_TOLERANCE:
            raise Red(f"dense attention: off {name} by {error:.1e} of its norm, allowed are {_CROSS_TOLERANCE:.0e}")
    return found


def _sdpa(queries: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    mask = torch.ones(queries.shape[0], keys.shape[2], dtype=torch.bool, device=keys.device).tril(start)
    grouped = queries.transpose(0, 1)[None]
    mixed = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=1.0, enable_gqa=True)
    return mixed[0].transpose(0, 1)


def _flex(queries: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor | None:
    if importlib.util.find_spec("torch.nn.attention.flex_attention") is None:
        return None
    flex: Any = importlib.import_module("torch.nn.attention.flex_attention")

    def visible(_batch: Tensor, _head: Tensor, row: Tensor, position: Tensor) -> Tensor:
        return position <= row + start

    mask = flex.create_block_mask(visible, None, None, queries.shape[0], keys.shape[2], device=str(keys.device))
    grouped = queries.transpose(0, 1)[None]
    mixed: Tensor = flex.flex_attention(grouped, keys, values, block_mask=mask, scale=1.0, enable_gqa=True)
    return mixed[0].transpose(0, 1)


def _flashinfer(queries: Tensor, keys: Tensor, values: Tensor, _start: int) -> Tensor | None:
    if importlib.util.find_spec("flashinfer") is None:
        return None
    library: Any = importlib.import_module("flashinfer")
    plain = [one[0].transpose(0, 1).contiguous() for one in (keys, values)]
    mixed: Tensor = library.single_prefill_with_kv_cache(queries, *plain, causal=True, sm_scale=1.0)
    return mixed


def _random(size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal values that ``dtype`` can hold."""
    return torch.randn(size, generator=generator).to(dtype)


def _error(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; infinite where there is a NaN."""
    truth = truth.double().cpu()
    error = float((found.double().cpu() - truth).norm() / truth.norm())
    return error if math.isfinite(error) else float("inf")
