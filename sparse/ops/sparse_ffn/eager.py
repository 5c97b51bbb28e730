"""Dense and sparse feed-forward networks of a step's rows (METHOD section 3): the CPU path and the fall-back elsewhere.

The gate is computed in full. With channels shared by the step's tokens, the rows of up and the columns of down of the
other channels are not read. With a mask per token everything is computed and the dropped activations are zero: that
measures quality, not speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparse.budget import FfnBudget
from sparse.ops.sparse_ffn import native
from sparse.ops.weights import FfnWeights
from sparse.tree import Tree, survival_weights

DENSE = "dense_ffn"
DENSE_PATH = f"{DENSE}.torch"
NATIVE_PATH = "sparse_ffn.native"
FUSED_PATH = "sparse_ffn.fused"
TORCH_PATH = "sparse_ffn.torch"
SIMULATED_PATH = "sparse_ffn.simulated"


def channel_rows(up: Tensor, down: Tensor) -> Tensor:
    """Each channel's row of up and column of down side by side.

    Args:
        up: [width, hidden].
        down: [hidden, width].

    Returns:
        [width, 2 * hidden], contiguous, for ``FfnWeights.channels``.
    """
    return torch.cat((up, down.T), dim=1)


def path(weights: FfnWeights) -> str:
    """The path that :func:`sparse_ffn` takes with these weights, NATIVE_PATH or TORCH_PATH."""
    channels = weights.channels
    if channels is not None and channels.device.type == "cpu" and native.available(channels.dtype):
        return NATIVE_PATH
    return TORCH_PATH


def dense_ffn(rows: Tensor, weights: FfnWeights) -> Tensor:
    """down(silu(gate(x)) * up(x)) with every channel: [n, hidden] to [n, hidden], in the dtype of ``rows``."""
    both = weights.gate_up(rows)
    return weights.down(functional.silu(both[:, : weights.width]) * both[:, weights.width :])


def activations(rows: Tensor, weights: FfnWeights) -> Tensor:
    """silu(gate(x)) of every channel: [n, hidden] to [n, width], in the dtype of ``rows``.

    Raises:
        ValueError: only the dense path of these weights was prepared.
    """
    if weights.gate is None:
        raise ValueError("these FFN weights have no separate gate: only their dense path was prepared")
    return functional.silu(weights.gate(rows))


def _magnitudes(activations: Tensor, budget: FfnBudget, tree: Tree | None) -> Tensor:
    """[width]: what the shared masks rank the channels by."""
    if budget.mask == "root":
        return activations[0].abs()
    if budget.mask == "weighted":
        weights = survival_weights(activations.shape[0], budget.survival, activations.device, tree)[None]
        return (weights @ activations.abs().float())[0]
    return activations.abs().amax(0)


def select_channels(activations: Tensor, budget: FfnBudget, layer: int, tree: Tree | None = None) -> Tensor:
    """The channels that all tokens of the step keep (METHOD section 3, shared masks).

    Args:
        activations: [n, width], n at least 1, the root of the draft first.
        budget: rule and shared mask.
        layer: number of the layer, for its threshold.
        tree: of the step's tokens, for weighted masks; None for a chain.

    Returns:
        [c], int64, each channel at most once and in no particular order, c at least 1.

    Raises:
        ValueError: the budget masks every token for itself.
    """
    if not budget.shared:
        raise ValueError("mask='token' has no channels that the tokens share")
    width = activations.shape[1]
    if budget.is_dense:
        return torch.arange(width, device=activations.device)
    keep = budget.channels(width) if budget.rule == "topk" else None
    if activations.device.type == "cpu" and native.available(activations.dtype):
        rows = activations[:1] if budget.mask == "root" else activations
        weights = None
        if budget.mask == "weighted":
            weights = survival_weights(rows.shape[0], budget.survival, rows.device, tree)
        return native.select(rows, weights, keep=keep, threshold=0.0 if keep else budget.threshold(layer))
    magnitudes = _magnitudes(activations, budget, tree)
    if keep is not None:
        return magnitudes.topk(keep, sorted=False).indices
    chosen = (magnitudes.float() >= budget.threshold(layer)).nonzero().squeeze(1)
    return chosen if chosen.numel() else magnitudes.argmax(dim=0, keepdim=True)


def token_mask(activations: Tensor, budget: FfnBudget, layer: int) -> Tensor:
    """The channels that each token keeps for itself (METHOD section 3, mask per token).

    Args:
        activations: [n, width].
        budget: the rule; its mask is not looked at.
        layer: number of the layer, for its threshold.

    Returns:
        [n, width], bool, at least one channel per row.
    """
    if budget.is_dense:
        return torch.ones_like(activations, dtype=torch.bool)
    magnitudes = activations.abs()
    if budget.rule == "topk":
        kept = magnitudes.topk(budget.channels(activations.shape[1]), dim=1, sorted=False).indices
        return torch.zeros_like(activations, dtype=torch.bool).scatter_(1, kept, True)
    strongest = magnitudes.argmax(dim=1, keepdim=True)
    return (magnitudes.float() >= budget.threshold(layer)).scatter_(1, strongest, True)


def sparse_ffn(rows: Tensor, activations: Tensor, weights: FfnWeights, channels: Tensor) -> Tensor:
    """The network's output from the chosen channels; the weights of the others are not read (METHOD section 3).

    Args:
        rows: [n, hidden].
        activations: [n, width], from :func:`activations`.
        weights: with ``channels``, in the dtype of ``rows``.
        channels: [c], int64, each at most once.

    Returns:
        [n, hidden] in the dtype of ``rows``.

    Raises:
        ValueError: only the dense path of these weights was prepared.
        IndexError: a channel lies outside the width.
    """
    if weights.channels is None:
        raise ValueError("these FFN weights have no channel rows: only their dense path was prepared")
    if path(weights) == NATIVE_PATH:
        return native.ffn(rows, activations, weights.channels, channels)
    hidden = rows.shape[1]
    chosen = weights.channels.index_select(0, channels)
    inner = activations.index_select(1, channels) * (rows @ chosen[:, :hidden].T)
    return inner @ chosen[:, hidden:]


@dataclass(frozen=True, slots=True)
class Choice:
    """How a kernel chooses the channels that a step's tokens share.

    Attributes:
        ranked: the first so many tokens say which channels count.
        survival: [ranked], fp32: magnitudes are summed with these weights; None takes their maximum.
        keep: number of channels; None keeps magnitudes of at least ``threshold``.
        threshold: smallest magnitude.
    """

    ranked: int
    survival: Tensor | None
    keep: int | None
    threshold: float


def choice_of(budget: FfnBudget, layer: int, width: int, rows: int, tree: Tree | None) -> Choice:
    """The choice that a budget with a shared mask asks for, in ``layer`` of ``width`` channels for ``rows`` tokens."""
    ranked = 1 if budget.mask == "root" else rows
    survival = (
        survival_weights(ranked, budget.survival, torch.device("cpu"), tree) if budget.mask == "weighted" else None
    )
    keep = budget.channels(width) if budget.rule == "topk" else None
    return Choice(ranked, survival, keep, 0.0 if keep else budget.threshold(layer))


def fuses(weights: FfnWeights) -> bool:
    """Whether :func:`fused_ffn` runs with these weights."""
    return weights.gate_rows is not None and weights.channels is not None and native.whole_layer(weights.gate_rows)


def fused_ffn(
    rows: Tensor, weights: FfnWeights, budget: FfnBudget, layer: int, tree: Tree | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`activations`, :func:`select_channels` and :func:`sparse_ffn` in one call of the kernel.

    Args:
        rows: [n, hidden], the root of the draft first.
        weights: for which :func:`fuses` holds.
        budget: rule and shared mask, not dense.
        layer: number of the layer, for its threshold.
        tree: as in :func:`select_channels`.

    Returns:
        The output [n, hidden], and the channels.

    Raises:
        ValueError: these weights do not fuse, or the budget has no shared mask.
    """
    if weights.gate_rows is None or weights.channels is None or not budget.shared or budget.is_dense:
        raise ValueError("the fused kernel needs weights by channel and a shared mask")
    choice = choice_of(budget, layer, weights.width, rows.shape[0], tree)
    return native.layer(
        rows,
        weights.gate_rows,
        weights.channels,
        choice.survival,
        ranked=choice.ranked,
        keep=choice.keep,
        threshold=choice.threshold,
    )


def masked_ffn(rows: Tensor, activations: Tensor, weights: FfnWeights, mask: Tensor) -> Tensor:
    """The network's output with a mask per token, simulated: every channel is computed (METHOD section 3).

    Args:
        rows: [n, hidden].
        activations: [n, width], from :func:`activations`.
        weights: the network.
        mask: [n, width], bool; dropped activations count zero.

    Returns:
        [n, hidden] in the dtype of ``rows``.
    """
    up = weights.gate_up(rows)[:, weights.width :]
    return weights.down(activations.masked_fill(~mask, 0.0) * up)
