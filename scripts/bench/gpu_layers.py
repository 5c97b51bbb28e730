"""The kernels of block selection, sparse FFN and experts against their references, at odd shapes.

Memory that must not be read is filled with NaN. Runs on a GPU, and in Triton's interpreter at tiny shapes. Every check
gives its error and what is allowed.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from scripts.bench.gpu_common import TOLERANCE, Red, error_of, random_of
from sparse.budget import AttentionBudget
from sparse.ops.moe import naive as moe_naive
from sparse.ops.moe import routing

_EXACT = 1e-9
"""Allowed share of wrong numbers in a choice that must be the same."""
_ROUTING_TOLERANCE = 1e-5


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
        drawn = random_of((len(starts), kv_heads, head_dim, capacity), dtype, generator)
        shift = {"min": -1.0, "max": 1.0}.get(name, 0.0)
        summaries[name] = drawn.abs() * shift if shift else drawn.abs() if name == "variance" else drawn
        for row, start in enumerate(starts):
            summaries[name][row, ..., start // budget.block_size :] = float("nan")
    queries = random_of((sum(counts), kv_heads * groups, head_dim), dtype, generator) * head_dim**-0.5
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
    blocks, kept = blocks.cpu(), kept.cpu()
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
            outside = torch.ones(whole, dtype=torch.bool)
            outside[chosen] = False
            inside = ~outside
            inside[list(forced)] = False
            if inside.any() and outside.any():
                worst = max(worst, float((scores[outside].max() - scores[inside].min()) / scores.std()))
    return max(worst, 0.0), 1e-4


def ffn(
    rows: int, hidden: int, width: int, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> tuple[float, float]:
    """Error of the sparse FFN; channels outside the first ``count`` of the index are NaN."""
    states = random_of((rows, hidden), dtype, generator)
    activations = random_of((rows, width), dtype, generator)
    channels = random_of((width, 2 * hidden), dtype, generator) * hidden**-0.5
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
    return error_of(output, truth), TOLERANCE[dtype]


def channels_of(
    rows: int, width: int, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> tuple[float, float]:
    """Share of wrong channels among the strongest ones and among those above a threshold; equal ones rank by number."""
    kernel = importlib.import_module("sparse.ops.sparse_ffn.kernel")
    activations, keep = random_of((rows, width), dtype, generator), max(1, width // 3)
    magnitudes = activations.abs().amax(0).float()
    order = magnitudes.sort(descending=True, stable=True)
    strongest = order.indices[:keep].sort().values
    threshold = float(order.values[width // 2])
    above = (magnitudes >= threshold).nonzero().squeeze(1)
    told = torch.cat((above, torch.zeros(width - above.numel(), dtype=torch.int64)))
    placed = activations.to(device)
    found, count = kernel.choose_above(placed, threshold)
    pairs = [
        (kernel.choose(placed, keep), strongest),
        (found, told),
        (count, torch.tensor([above.numel()], dtype=torch.int32)),
    ]
    return max(float((one.cpu() != other).double().mean()) for one, other in pairs), _EXACT


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
    states = random_of((rows, hidden), dtype, generator)
    gate_up = random_of((experts, 2 * width, hidden), dtype, generator) * hidden**-0.5
    down = random_of((experts, hidden, width), dtype, generator) * width**-0.5
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
    return error_of(output, truth), TOLERANCE[dtype]


def routes(
    tokens: int,
    experts: int,
    limit: int | None,
    device: torch.device,
    _dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[float, float]:
    """Error of the routing kernel, always in fp32, against the router of separate operators in fp64."""
    chances = torch.randn(tokens, experts, generator=generator).softmax(-1)
    survival: Tensor | None = None
    if limit is not None:
        survival = torch.pow(0.7, torch.arange(tokens))
        survival = survival / survival.sum()
    how: dict[str, Any] = {"top_k": min(8, experts // 2), "normalise": True, "unit": False, "limit": limit}
    kernel = importlib.import_module("sparse.ops.moe.kernel")
    found = kernel.route(chances.to(device), survival=None if survival is None else survival.to(device), **how)
    truth = routing.route(chances.double(), survival=None if survival is None else survival.double(), **how)
    return error_of(found, truth), _ROUTING_TOLERANCE
