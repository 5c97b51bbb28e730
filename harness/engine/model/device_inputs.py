"""What a captured step reads: the tensors that are filled before each replay, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from harness.engine.cache import PAGE, KVCache
from harness.engine.model.device_form import Form
from harness.engine.model.families import ModelWeights
from harness.engine.model.step import Segment
from sparse.budget import AttentionBudget
from sparse.scoring import summarise_blocks


class Inputs:
    """Tensors that a captured step reads, filled before each replay by one copy, and by small ones for trees.

    Attributes:
        tokens, depths: [sequences, tokens], int64: ids, and distances from the root.
        counts, rows, begins: [sequences], int64: tokens that do not only fill up, row of the cache, positions before
            the step.
        fresh: [sequences, fresh blocks], int64: blocks to summarise, some of them perhaps once more.
        bounds: int64, over the rows of the cache: offsets [batch + 1], starts [batch], blocks to keep [batch].
        places: [sequences * tokens], int64: the wanted tokens in the caller's order, as far as there are any.
        visible: [sequences, tokens, tokens], bool: which tokens of its sequence a token sees; None for chains.
        heads: by layer, int64: the anchor's KV head whose blocks each head takes.
    """

    def __init__(self, form: Form, batch: int, device: torch.device) -> None:
        n, t = form.sequences, form.tokens
        sizes = [n * t, n * t, n, n, n, n * form.fresh, 3 * batch + 1, n * t]
        self._numbers = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        parts = torch.split(self._numbers, sizes)
        self.tokens, self.depths = parts[0].view(n, t), parts[1].view(n, t)
        self.counts, self.rows, self.begins = parts[2:5]
        self.fresh, self.bounds, self.places = parts[5].view(n, form.fresh), parts[6], parts[7]
        self.visible, self._alone, self._causal = None, None, None
        if form.tree:
            self.visible = torch.zeros(n, t, t, dtype=torch.bool, device=device)
            self._alone = torch.eye(t, dtype=torch.bool, device=device)
            self._causal = torch.ones(t, t, dtype=torch.bool, device=device).tril()
        head_map = form.sparsity.reuse.head_map
        self.heads = {layer: torch.tensor(heads, device=device) for layer, heads in enumerate(head_map)}

    def fill(
        self,
        segments: Sequence[Segment],
        order: Sequence[int],
        fresh: Sequence[list[int]],
        cache: KVCache,
        budget: AttentionBudget,
    ) -> None:
        """Copy one step's numbers to the device; the copy waits for nothing.

        Args:
            segments: in the caller's order.
            order: of their rows in the cache: numbers of ``segments``.
            fresh: blocks to summarise, by sequence in the order of rows.
            cache, budget: of the step.
        """
        t, batch = self.tokens.shape[1], len(cache.lengths)
        placed = [segments[number] for number in order]
        owned, starts, keep = [0] * batch, [0] * batch, [0] * batch
        for segment in placed:
            start = cache.lengths[segment.row]
            owned[segment.row], starts[segment.row], keep[segment.row] = t, start, budget.blocks(start)
        begin_of = {number: place * t for place, number in enumerate(order)}
        places = [begin_of[number] + token for number, one in enumerate(segments) for token in range(len(one.tokens))]
        numbers = [token for one in placed for token in (*one.tokens, *[0] * (t - len(one.tokens)))]
        numbers += [depth for _ in placed for depth in range(t)]
        numbers += [len(one.tokens) for one in placed]
        numbers += [one.row for one in placed]
        numbers += [starts[one.row] for one in placed]
        numbers += [block for blocks in fresh for block in blocks]
        numbers += [*accumulate(owned, initial=0), *starts, *keep, *places]
        numbers += [0] * (self._numbers.numel() - len(numbers))
        pinned = self._numbers.device.type == "cuda"
        self._numbers.copy_(torch.tensor(numbers, pin_memory=pinned), non_blocking=True)
        if self.visible is not None:
            self._fill_trees(placed)

    def _fill_trees(self, placed: Sequence[Segment]) -> None:
        """Masks and depths; tokens that fill up see nothing but themselves and what is before the step."""
        assert self.visible is not None and self._alone is not None and self._causal is not None
        for segment, visible, depths in zip(placed, self.visible, self.depths, strict=True):
            tree, count = segment.tree, len(segment.tokens)
            visible.copy_(self._causal if tree is None else self._alone)
            if tree is not None:
                visible[:count, :count].copy_(tree.visible)
                depths[:count].copy_(tree.depths)


@dataclass(frozen=True, slots=True)
class State:
    """What the layers of a step share, computed once on the device.

    Attributes:
        rows, pages, inside: [all tokens], int64: where keys and values are stored.
        cos, sin: rotary tables of the tokens.
        real: [sequences, tokens], bool: not only there to fill up.
        depths: [sequences, tokens], int64.
        offsets, starts, keep: of the kernels, int32.
    """

    rows: Tensor
    pages: Tensor
    inside: Tensor
    cos: Tensor
    sin: Tensor
    real: Tensor
    depths: Tensor
    offsets: Tensor
    starts: Tensor
    keep: Tensor

    @classmethod
    def of(cls, inputs: Inputs, weights: ModelWeights) -> State:
        """The state that follows from ``inputs``."""
        n, t = inputs.tokens.shape
        number = torch.arange(t, device=inputs.tokens.device)
        stored = (inputs.begins[:, None] + number).view(-1)
        positions = (inputs.begins[:, None] + inputs.depths).clamp(max=weights.positions - 1).view(-1)
        batch = inputs.bounds.numel() // 3
        offsets, starts, keep = torch.split(inputs.bounds.to(torch.int32), [batch + 1, batch, batch])
        return cls(
            rows=inputs.rows[:, None].expand(n, t).reshape(-1),
            pages=stored // PAGE,
            inside=stored % PAGE,
            cos=weights.cos[positions],
            sin=weights.sin[positions],
            real=number < inputs.counts[:, None],
            depths=inputs.depths,
            offsets=offsets,
            starts=starts,
            keep=keep,
        )

    def survival(self, chance: float) -> Tensor:
        """[sequences, tokens], fp32: as :func:`sparse.tree.survival_weights`, zero for tokens that fill up."""
        weights = torch.pow(chance, self.depths.to(torch.float64)) * self.real
        return (weights / weights.sum(1, keepdim=True)).to(torch.float32)

    def query_weights(self, budget: AttentionBudget) -> Tensor:
        """[all tokens], fp32: how much each token's query counts when blocks are chosen."""
        if budget.query == "weighted":
            return self.survival(budget.survival).view(-1)
        weights = self.real.to(torch.float32)
        if budget.query == "first":
            weights = torch.zeros_like(weights)
            weights[:, 0] = 1.0
        return (weights / weights.sum(1, keepdim=True)).view(-1)


def fresh_blocks(cache: KVCache, row: int, form: Form) -> list[int]:
    """The blocks of ``row`` that a step summarises, ``form.fresh`` of them.

    Where more became whole than one step makes whole, they are summarised at once. What fills the list up is a whole
    block, which is summarised again, or block 0, which nobody looks at before it is whole and summarised.
    """
    if not form.fresh:
        return []
    stale = list(cache.unsummarised(row))
    if len(stale) > form.fresh:
        cache.refresh_summaries(row)
        stale = []
    filler = max(0, cache.whole_blocks(row) - 1)
    return [*stale, *[filler] * (form.fresh - len(stale))]


def summarise(inputs: Inputs, cache: KVCache) -> None:
    """Summaries of the fresh blocks, in all layers at once, as :meth:`KVCache.refresh_summaries` makes them."""
    per_page = PAGE // cache.block_size
    blocks = inputs.fresh.reshape(-1)
    rows = inputs.rows[:, None].expand_as(inputs.fresh).reshape(-1)
    keys = cache.keys.view(*cache.keys.shape[:-1], per_page, cache.block_size)
    fresh = keys[:, rows, blocks // per_page, :, :, blocks % per_page]
    for name, stored in cache.stored_summaries.items():
        stored[:, rows, :, :, blocks] = summarise_blocks(fresh, cache.block_size, name).squeeze(-1)
