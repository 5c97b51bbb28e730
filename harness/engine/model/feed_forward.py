"""Feed-forward and mixture-of-experts layers of a verification step (METHOD sections 3 to 5)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from harness.engine.model.families import LayerWeights
from harness.engine.model.verification import Verification
from sparse import experts
from sparse.ops.moe import eager as moe_op
from sparse.ops.sparse_ffn import eager as ffn_op
from sparse.ops.weights import FfnWeights, MoeWeights
from sparse.reuse import SelectionMemory
from sparse.trace import DROPPED_PATH, RESTRICTED_PATH, Trace
from sparse.tree import Tree


def feed_forward(
    run: Verification,
    layer: int,
    weights: LayerWeights,
    rows: Tensor,
    memory: SelectionMemory,
    tree: Tree | None = None,
) -> Tensor:
    """Output of one FFN or MoE layer for the tokens of one sequence, which share one set of channels and experts.

    Args:
        run: budgets and counters.
        layer: its number.
        weights: of the layer.
        rows: [tokens, hidden], normed.
        memory: of the sequence.
        tree: of the tokens; None for a chain.

    Returns:
        [tokens, hidden].
    """
    if run.sparsity.reuse.skips("ffn", layer):
        run.trace.skipped("ffn")
        run.trace.ffn(layer, width=_width(weights), gates=0, channels=0, rows=0)
        if weights.moe is not None:
            run.trace.experts_wanted[layer] += weights.moe.top_k
        return torch.zeros_like(rows)
    if weights.moe is not None:
        output = _moe(run, layer, weights.moe, rows, tree)
        run.trace.lap("moe")
        return output
    assert weights.ffn is not None
    output = _ffn(run, layer, weights.ffn, rows, memory, tree)
    run.trace.lap("ffn")
    return output


def _ffn(
    run: Verification,
    layer: int,
    weights: FfnWeights,
    rows: Tensor,
    memory: SelectionMemory | None,
    tree: Tree | None,
) -> Tensor:
    """A dense FFN, or one expert; experts remember no channels."""
    if run.sparsity.ffn.applies(layer):
        return _sparse_ffn(run, layer, weights, rows, memory, tree)
    width = weights.width
    run.trace.paths[ffn_op.DENSE_PATH] += 1
    run.trace.ffn(layer, width=width, gates=width, channels=width, rows=rows.shape[0])
    if run.probe is None:
        return ffn_op.dense_ffn(rows, weights)
    both = weights.gate_up(rows)
    activations = run.probe.gated(layer, functional.silu(both[:, :width]))
    return weights.down(activations * both[:, width:])


def _sparse_ffn(
    run: Verification,
    layer: int,
    weights: FfnWeights,
    rows: Tensor,
    memory: SelectionMemory | None,
    tree: Tree | None,
) -> Tensor:
    budget, reuse, trace, width = run.sparsity.ffn, run.sparsity.reuse, run.trace, weights.width
    skips = memory is not None and reuse.skips("channels", layer)
    if budget.shared and run.probe is None and not skips and ffn_op.fuses(weights):
        output, channels = ffn_op.fused_ffn(rows, weights, budget, layer, tree)
        trace.paths[ffn_op.FUSED_PATH] += 1
        count_channels(trace, layer, width, channels.shape[0], rows.shape[0])
        return output
    activations = ffn_op.activations(rows, weights)
    if run.probe is not None:
        activations = run.probe.gated(layer, activations)
    if not budget.shared:
        mask = ffn_op.token_mask(activations, budget, layer)
        kept = int(mask.sum())
        trace.paths[ffn_op.SIMULATED_PATH] += 1
        trace.paths[DROPPED_PATH] += kept < mask.numel()
        trace.ffn(layer, width=width, gates=width, channels=width, rows=rows.shape[0], kept=kept)
        return ffn_op.masked_ffn(rows, activations, weights, mask)
    old = None
    if memory is not None and skips:
        old = memory.old_channels(layer, reuse.refresh)
    if old is not None:
        channels = old[0]
        trace.skipped("channels", old[1])
    else:
        channels = ffn_op.select_channels(activations, budget, layer, tree)
        if memory is not None:
            memory.keep_channels(layer, channels)
    trace.paths[ffn_op.path(weights)] += 1
    count_channels(trace, layer, width, channels.shape[0], rows.shape[0])
    return ffn_op.sparse_ffn(rows, activations, weights, channels)


def count_channels(trace: Trace, layer: int, width: int, kept: int, rows: int) -> None:
    """Count a layer that read all gates and ``kept`` of its channels for ``rows`` tokens."""
    trace.paths[DROPPED_PATH] += kept < width
    trace.ffn(layer, width=width, gates=width, channels=kept, rows=rows)


def _moe(run: Verification, layer: int, weights: MoeWeights, rows: Tensor, tree: Tree | None) -> Tensor:
    budget, trace = run.sparsity.moe, run.trace
    probabilities = experts.probabilities(weights.router(rows))
    if budget.is_dense:
        combine = experts.route(probabilities, weights)
    else:
        combine, done = experts.restrict(probabilities, weights, budget, layer, tree)
        for fate in ("wanted", "kept", "skipped", "substituted", "dropped", "freed"):
            trace.pairs[fate] += getattr(done, fate)
        trace.experts_wanted[layer] += done.union_dense
        trace.paths[RESTRICTED_PATH] += done.kept < done.wanted or done.substituted > 0
    if run.probe is not None:
        combine = run.probe.routed(layer, probabilities, combine)
    chosen = combine.count_nonzero(0).tolist()
    union, pairs = sum(count > 0 for count in chosen), sum(chosen)
    if budget.is_dense:
        trace.experts_wanted[layer] += union
    trace.experts_loaded[layer] += union
    width, count = weights.experts[0].width, rows.shape[0]
    sparse_path = f"{moe_op.PATH}.by_expert" if run.sparsity.ffn.applies(layer) else moe_op.path(weights, union, count)
    trace.paths[moe_op.DENSE_PATH if budget.is_dense else sparse_path] += 1
    if run.sparsity.ffn.applies(layer):

        def expert(number: int, own: Tensor) -> Tensor:
            return _ffn(run, layer, weights.experts[number], own, None, None)

        output = moe_op.moe(rows, combine, weights, expert)
        return output if weights.shared is None else output + _ffn(run, layer, weights.shared, rows, None, tree)
    needed = union * width + (0 if weights.shared is None else weights.shared.width)
    products = pairs * width + (0 if weights.shared is None else count * weights.shared.width)
    trace.ffn(layer, width=needed, gates=needed, channels=needed, rows=0)
    trace.gate_products += products
    trace.channel_products += products
    return moe_op.moe(rows, combine, weights)


def _width(weights: LayerWeights) -> int:
    """Channels that one token needs of a layer: those of its FFN, or of its experts and the shared one."""
    if weights.ffn is not None:
        return weights.ffn.width
    assert weights.moe is not None
    shared = 0 if weights.moe.shared is None else weights.moe.shared.width
    return weights.moe.top_k * weights.moe.experts[0].width + shared
