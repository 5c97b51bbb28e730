"""The truth for halves of a decoder layer: plain operators in fp64, one sequence at a time. Slow on purpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse.budget import AttentionBudget
from sparse.ops.block_attention import naive
from sparse.scoring import block_scores
from sparse.selection import Selection, select_blocks
from sparse.tree import Tree


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear map: weight [outputs, inputs], bias [outputs] or None."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        """[n, inputs] to [n, outputs] in fp64."""
        product = rows.double() @ self.weight.double().T
        return product if self.bias is None else product + self.bias.double()


@dataclass(frozen=True, slots=True)
class Attention:
    """The weights of a layer's attention half.

    Attributes:
        norm: RMSNorm weight [hidden].
        qkv: query heads first, then key heads, then value heads.
        output: [heads * head_dim] to [hidden].
        query_norm, key_norm: RMSNorm weights of each head [head_dim], or None.
        cos, sin: rotary tables [positions, 1, head_dim]; ``sin`` carries the sign of the rotated half.
        heads, kv_heads: query heads and KV heads.
        eps, scale: of the norms, and of the queries.
        beside_norm: RMSNorm weight [hidden] of the rows that stand before the hidden states among the inputs of
            ``qkv``, as in an EAGLE-3 head (arXiv 2503.01840); None where there are none.
    """

    norm: Tensor
    qkv: Linear
    output: Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    cos: Tensor
    sin: Tensor
    heads: int
    kv_heads: int
    eps: float
    scale: float
    beside_norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """The tokens of one sequence in a step, and what they attend to.

    Attributes:
        start: positions before the step.
        count: tokens of the step.
        keys, values: [pages, kv_heads, head_dim, page] and [pages, kv_heads, page, head_dim], fp64, changed in place.
        tree: of the tokens; None for a chain.
        selection: blocks to attend to, None for all positions.
        tail: position from which on everything is attended to, where there are blocks.
        block_size: positions per block.
    """

    start: int
    count: int
    keys: Tensor
    values: Tensor
    tree: Tree | None = None
    selection: Selection | None = None
    tail: int = 0
    block_size: int = 16

    @property
    def positions(self) -> Tensor:
        """[count], int64: of the tokens, for the rotation; those of a tree count from its root."""
        return self.start + (torch.arange(self.count) if self.tree is None else self.tree.depths)


def normed(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension in fp64."""
    wide = rows.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def project(
    hidden: Tensor, layer: Attention, positions: Tensor, beside: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a step's tokens (DESIGN section 2).

    Args:
        hidden: [tokens, hidden].
        layer: weights.
        positions: [tokens], int64.
        beside: [tokens, hidden], for layers with ``beside_norm``; else None.

    Returns:
        Rotated and scaled queries [tokens, heads, head_dim], rotated keys and values [tokens, kv_heads, head_dim].
    """
    inputs = normed(hidden, layer.norm, layer.eps)
    if beside is not None and layer.beside_norm is not None:
        inputs = torch.cat((normed(beside, layer.beside_norm, layer.eps), inputs), dim=1)
    states = layer.qkv(inputs).view(hidden.shape[0], -1, layer.cos.shape[-1])
    queries, keys, values = torch.split(states, [layer.heads, layer.kv_heads, layer.kv_heads], dim=1)
    if layer.query_norm is not None:
        queries = normed(queries, layer.query_norm, layer.eps)
    if layer.key_norm is not None:
        keys = normed(keys, layer.key_norm, layer.eps)
    cos, sin = layer.cos[positions].double(), layer.sin[positions].double()

    def rotated(states: Tensor) -> Tensor:
        low, high = states.chunk(2, dim=-1)
        return states * cos + torch.cat((high, low), dim=-1) * sin

    return rotated(queries) * layer.scale, rotated(keys), values


def grouped(queries: Tensor, kv_heads: int) -> Tensor:
    """Queries [tokens, heads, head_dim] as [kv_heads, tokens * groups, head_dim], the groups of a token together."""
    tokens, _, head_dim = queries.shape
    return queries.reshape(tokens, kv_heads, -1, head_dim).transpose(0, 1).reshape(kv_heads, -1, head_dim)


def choose(
    queries: Tensor,
    summaries: Mapping[str, Tensor],
    budget: AttentionBudget,
    groups: int,
    start: int,
    tree: Tree | None = None,
) -> Selection:
    """The blocks that a step attends to (METHOD section 2).

    Args:
        queries: [kv_heads, tokens * groups, head_dim], the root's groups first.
        summaries: those that the score reads, each [kv_heads, head_dim, capacity_blocks]; only whole blocks of
            ``start`` positions are read.
        budget: blocks to keep and how they are scored; must leave out at least one block.
        groups: query heads per KV head.
        start: positions before the step.
        tree: of the tokens; None for a chain.
    """
    whole = start // budget.block_size
    valid = {name: stored[..., :whole].double() for name, stored in summaries.items()}
    scores = block_scores(queries.double(), valid, budget, groups, tree)
    return select_blocks(scores, budget, budget.blocks(start))


def attention_half(hidden: Tensor, layer: Attention, sequences: Sequence[Rows], beside: Tensor | None = None) -> Tensor:
    """hidden + output(attention(norm(hidden))); keys and values enter the caches.

    Args:
        hidden: [tokens, hidden].
        layer: weights.
        sequences: own the tokens one after the other.
        beside: as in :func:`project`.

    Returns:
        [tokens, hidden] in fp64.
    """
    groups, mixed, first = layer.heads // layer.kv_heads, [], 0
    for sequence in sequences:
        part = slice(first, first + sequence.count)
        first = part.stop
        other = None if beside is None else beside[part]
        queries, keys, values = project(hidden[part], layer, sequence.positions, other)
        _store(sequence, keys, values)
        length, selection = sequence.start + sequence.count, sequence.selection
        attended = naive.block_attention(
            grouped(queries, layer.kv_heads),
            sequence.keys.permute(1, 0, 3, 2).flatten(1, 2)[:, :length],
            sequence.values.transpose(0, 1).flatten(1, 2)[:, :length],
            None if selection is None else selection.blocks,
            tail_start=sequence.tail,
            block_size=sequence.block_size,
            groups=groups,
            valid=None if selection is None else selection.valid,
            tree=sequence.tree,
        )
        mixed.append(attended.view(layer.kv_heads, sequence.count, -1).transpose(0, 1).reshape(sequence.count, -1))
    return hidden.double() + layer.output(torch.cat(mixed))


def feed_forward_half(hidden: Tensor, norm: Tensor, gate_up: Linear, down: Linear, eps: float) -> Tensor:
    """hidden + down(silu(gate(x)) * up(x)) with x = norm(hidden), [tokens, hidden] in fp64; gate before up."""
    gates, ups = gate_up(normed(hidden, norm, eps)).chunk(2, dim=1)
    return hidden.double() + down(gates / (1 + (-gates).exp()) * ups)


def _store(sequence: Rows, keys: Tensor, values: Tensor) -> None:
    """Put keys and values [count, kv_heads, head_dim] at the positions after the start."""
    page_size = sequence.values.shape[2]
    for token in range(sequence.count):
        page, inside = divmod(sequence.start + token, page_size)
        sequence.keys[page, :, :, inside] = keys[token]
        sequence.values[page, :, inside] = values[token]
