"""Random halves of decoder layers and sequences, for the kernels and for the naive reference at once."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse.ops.decoder_layer import naive, native, structures
from sparse.ops.decoder_layer.native import PAGE
from sparse.scoring import summarise_blocks
from sparse.selection import Selection
from sparse.tree import Tree

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1.5e-2}
"""Of a row: its error over what the half adds to it."""
NAN = float("nan")
POSITIONS = 6000


def need(dtype: torch.dtype) -> None:
    """Skips the test where the kernels do not run."""
    if shutil.which("c++") is None:
        pytest.skip("no compiler")
    assert native.available(torch.float32)
    if not native.available(dtype):
        pytest.skip("this CPU has no tile registers for bf16")


def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def worst_row(found: Tensor, truth: Tensor, hidden: Tensor) -> float:
    """Largest error of a row, relative to what was added to it."""
    errors, added = (found.double() - truth).norm(dim=1), (truth - hidden.double()).norm(dim=1)
    return float((errors / added).max())


@dataclass(frozen=True)
class Half:
    """An attention half, for the kernels and for the reference."""

    truth: naive.Attention
    layer: native.AttentionLayer
    dtype: torch.dtype
    hidden: int
    head_dim: int

    @property
    def groups(self) -> int:
        """Query heads per KV head."""
        return self.truth.heads // self.truth.kv_heads


def attention(
    dtype: torch.dtype,
    *,
    hidden: int = 80,
    kv_heads: int = 2,
    groups: int = 3,
    head_dim: int = 64,
    norms: bool = False,
    bias: bool = False,
    beside: bool = False,
) -> Half:
    """Random weights; what they add to a hidden state is about as large as the state."""
    heads, eps, scale = kv_heads * groups, 1e-5, head_dim**-0.5
    outputs, mixed = (heads + 2 * kv_heads) * head_dim, heads * head_dim
    inputs = 2 * hidden if beside else hidden
    qkv = naive.Linear(
        normal(outputs, inputs, scale=1.3 * inputs**-0.5, dtype=dtype), normal(outputs, dtype=dtype) if bias else None
    )
    output = naive.Linear(
        normal(hidden, mixed, scale=6 * mixed**-0.5, dtype=dtype), normal(hidden, dtype=dtype) if bias else None
    )
    head_norms = [1 + normal(head_dim, scale=0.3) if norms else None for _ in range(2)]
    query_norm, key_norm = (None if one is None else one.to(dtype) for one in head_norms)
    angles = torch.arange(POSITIONS)[:, None] * 1e4 ** -torch.arange(0, 1, 2 / head_dim)
    cos, sin = torch.cat((angles, angles), 1).cos(), torch.cat((-angles.sin(), angles.sin()), 1)
    norm, cos, sin = (1 + normal(hidden, scale=0.3)).to(dtype), cos[:, None].to(dtype), sin[:, None].to(dtype)
    maps = (native.PackedLinear(one.weight, one.bias) for one in (qkv, output))
    sizes: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "eps": eps, "scale": scale}
    sizes["beside_norm"] = (1 + normal(hidden, scale=0.3)).to(dtype) if beside else None
    truth = naive.Attention(norm, qkv, output, query_norm, key_norm, cos, sin, **sizes)
    layer = native.AttentionLayer(norm, *maps, query_norm, key_norm, cos, sin, **sizes)
    return Half(truth, layer, dtype, hidden, head_dim)


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward half, for the kernels and for the reference."""

    norm: Tensor
    gate_up: naive.Linear
    down: naive.Linear
    layer: native.FeedForwardLayer
    eps: float

    def truth(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] in fp64."""
        return naive.feed_forward_half(hidden, self.norm, self.gate_up, self.down, self.eps)


def feed_forward(dtype: torch.dtype, hidden: int, width: int, *, bias: bool = False) -> FeedForward:
    """Random weights; what they add to a hidden state is about as large as the state."""
    norm, eps = (1 + normal(hidden, scale=0.3)).to(dtype), 1e-5
    maps = [
        naive.Linear(normal(outputs, inputs, scale=2 * inputs**-0.5, dtype=dtype), normal(outputs) if bias else None)
        for outputs, inputs in ((2 * width, hidden), (hidden, width))
    ]
    both = native.PackedLinear(maps[0].weight, maps[0].bias, paired=True)
    down = native.PackedLinear(maps[1].weight, maps[1].bias)
    return FeedForward(norm, *maps, native.FeedForwardLayer(norm, both, down, eps), eps)


def random_tree(count: int) -> Tree:
    """A tree of ``count`` tokens whose branches mix, the root included."""
    draw = random.Random(count)
    return Tree([draw.randrange(-1, node) for node in range(count - 1)])


@dataclass
class OneSequence:
    """One sequence in a step: a clean cache for the reference, and one for the kernels that is NaN from ``start`` on.

    Attributes:
        half: its layer.
        start, count: positions before the step, and tokens of the step.
        tree: of the tokens; None for a chain.
        selection, tail, block_size: as in :class:`naive.Rows`.
        keys, values: the kernels' cache.
        clean: keys and values of the reference, fp64.
        queries: [kv_heads, padded rows, head_dim], where the kernels leave them.
    """

    half: Half
    start: int
    count: int
    tree: Tree | None = None
    selection: Selection | None = None
    tail: int = 0
    block_size: int = 16
    keys: Tensor = field(init=False)
    values: Tensor = field(init=False)
    clean: tuple[Tensor, Tensor] = field(init=False)
    queries: Tensor = field(init=False)

    def __post_init__(self) -> None:
        kv_heads, dim, dtype = self.half.truth.kv_heads, self.half.head_dim, self.half.dtype
        pages = -(-(self.start + self.count) // PAGE)
        self.keys = normal(pages, kv_heads, dim, PAGE, scale=1.3, dtype=dtype)
        self.values = normal(pages, kv_heads, PAGE, dim, dtype=dtype)
        self.clean = self.keys.double(), self.values.double()
        self.poison(torch.ones(kv_heads, pages * PAGE, dtype=torch.bool).index_fill(1, torch.arange(self.start), False))
        rows = native.padded_rows(self.count * self.half.groups)
        self.queries = torch.full((kv_heads, rows, dim), NAN, dtype=dtype)

    def poison(self, positions: Tensor) -> None:
        """NaN into the kernels' cache at ``positions`` [kv_heads, pages * page], bool."""
        where = positions.view(positions.shape[0], -1, PAGE).transpose(0, 1)
        self.keys.masked_fill_(where[:, :, None], NAN)
        self.values.masked_fill_(where[..., None], NAN)

    def summary(self, name: str, size: int) -> Tensor:
        """Of the whole blocks of keys, [kv_heads, head_dim, blocks]; NaN for the others."""
        keys = self.keys.permute(1, 2, 0, 3).flatten(2)
        found = torch.full((*keys.shape[:2], keys.shape[2] // size), NAN, dtype=keys.dtype)
        whole = self.start // size
        found[..., :whole] = summarise_blocks(keys[..., : whole * size], size, name)
        return found

    @property
    def rows(self) -> naive.Rows:
        """For the reference."""
        return naive.Rows(self.start, self.count, *self.clean, self.tree, self.selection, self.tail, self.block_size)

    def stored(self, cache: tuple[Tensor, Tensor]) -> Tensor:
        """Keys and values of the step's tokens in a cache, [2, kv_heads, count, head_dim]."""
        flat = cache[0].permute(1, 0, 3, 2).flatten(1, 2), cache[1].transpose(0, 1).flatten(1, 2)
        return torch.stack(flat)[:, :, self.start : self.start + self.count]

    def fill(self, segment: Any, first: int) -> list[Any]:
        """Describe the sequence to the kernels; what is returned must live as long."""
        positions = self.rows.positions
        segment.first, segment.count, segment.start = first, self.count, self.start
        segment.positions = positions.data_ptr()
        segment.keys, segment.values = self.keys.data_ptr(), self.values.data_ptr()
        segment.visible = None if self.tree is None else self.tree.visible.data_ptr()
        segment.queries = self.queries.data_ptr()
        kept = None
        if self.selection is not None:
            blocks, valid = self.selection.blocks, self.selection.valid
            kept = None if valid is None else valid.sum(1)
            segment.blocks, segment.chosen, segment.tail = blocks.data_ptr(), blocks.shape[1], self.tail
            segment.kept = None if kept is None else kept.data_ptr()
        return [positions, kept, self]


def segments_of(sequences: Sequence[OneSequence]) -> tuple[Any, list[Any]]:
    """The sequences for the kernels, and what must live as long."""
    segments, first, keep = structures.segments(len(sequences)), 0, []
    for segment, sequence in zip(segments, sequences, strict=True):
        keep.append(sequence.fill(segment, first))
        first += sequence.count
    return segments, keep


def attend(
    half: Half,
    hidden: Tensor,
    sequences: Sequence[OneSequence],
    parts: Sequence[int] = (native.PROJECT | native.MIX,),
    beside: Tensor | None = None,
) -> Tensor:
    """The attention half of all sequences by the kernels, one call for each of ``parts``."""
    found, (segments, keep) = hidden.clone(), segments_of(sequences)
    for part in parts:
        jobs = native.Jobs()
        jobs.attend(half.layer, segments, block_size=sequences[0].block_size, parts=part, beside=beside, keep=keep)
        jobs.run(found)
    return found
