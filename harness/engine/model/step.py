"""The decoding step: our own forward over borrowed weights (DESIGN section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from harness.engine.cache import KVCache
from harness.engine.model.attention import attend
from harness.engine.model.families import LayerWeights, ModelWeights
from harness.engine.model.feed_forward import feed_forward
from harness.engine.model.verification import Verification
from sparse.budget import AttentionBudget
from sparse.tree import Tree


@dataclass(frozen=True, slots=True)
class Segment:
    """The tokens that one sequence runs in a step.

    Attributes:
        row: of the cache.
        tokens: the last accepted token, which is not in the cache yet, and the draft.
        tree: how the tokens stand to each other; None for a chain.
    """

    row: int
    tokens: Sequence[int]
    tree: Tree | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Where the tokens of a step stand, for all layers.

    Attributes:
        parts: row of the cache, tokens and tree of each sequence.
        places: positions [tokens], int64.
        cos, sin: rotary tables of the tokens, [tokens, 1, head_dim].
    """

    parts: list[tuple[int, slice, Tree | None]]
    places: Tensor
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True)
class Output:
    """What a pass through the model gives.

    Attributes:
        logits: [tokens, vocab]; of a prefill those after the last token, [vocab].
        features: hidden states that enter the tapped layers, side by side, [tokens, taps * hidden]; None without taps.
    """

    logits: Tensor
    features: Tensor | None


class Step:
    """Runs tokens through the model against a cache.

    Args:
        weights: of the target model.
        taps: layers whose input features are wanted, for drafters that read them.
    """

    row_major = False
    """Whether its caches keep the channels of a key together."""

    def __init__(self, weights: ModelWeights, taps: tuple[int, ...] = ()) -> None:
        self.weights = weights
        self.taps = frozenset(taps)
        shape = weights.shape
        self._scale = shape.head_dim**-0.5

    def new_cache(self, capacity: int, budget: AttentionBudget, batch: int = 1, *more: AttentionBudget) -> KVCache:
        """A cache that fits this model and holds the summaries that ``budget`` scores with, and those of ``more``.

        Raises:
            ValueError: budgets that score cut the cache into blocks of different sizes.
        """
        scoring = [one for one in (budget, *more) if not one.is_dense]
        if len({one.block_size for one in scoring}) > 1:
            raise ValueError(f"one cache cannot be cut into blocks of {sorted({one.block_size for one in scoring})}")
        shape = self.weights.shape
        return KVCache(
            layers=shape.layers,
            batch=batch,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            capacity=capacity,
            dtype=self.weights.dtype,
            device=self.weights.device,
            block_size=(scoring or [budget])[0].block_size,
            summaries=tuple(dict.fromkeys(name for one in scoring for name in one.summaries)),
            row_major=self.row_major,
        )

    @torch.inference_mode()
    def run(
        self, segments: Sequence[Segment], cache: KVCache, run: Verification | None = None, last: int | None = None
    ) -> Output:
        """One verification step over several sequences; keys and values enter the cache and become valid.

        All sequences run through the linear maps together, whatever their lengths; what is chosen for a sequence
        (blocks, channels, experts) is chosen for it alone.

        Args:
            segments: the tokens of each sequence, one segment per row of the cache.
            cache: holds everything before them.
            run: budgets, counters and memory of this decode; dense by default.
            last: tokens whose logits are wanted, counted from the end; None for all.

        Returns:
            Logits and features of the tokens, segment after segment.

        Raises:
            ValueError: the cache is full, or a position lies beyond the model's positions.
        """
        run = Verification() if run is None else run
        rows = [segment.row for segment in segments]
        counts = [len(segment.tokens) for segment in segments]
        run.begin(rows, sum(counts))
        hidden, batch = self._embed(segments, cache)
        if not run.sparsity.attention.is_dense:
            for row in rows:
                cache.refresh_summaries(row)
        tapped = []
        for number in range(len(self.weights.layers)):
            if number in self.taps and run.tapped:
                self._finish(run, hidden)
                tapped.append(hidden.clone())
            if number in run.left_out:
                continue
            hidden = self._attention_half(run, number, hidden, batch, cache)
            hidden = self._feed_forward_half(run, number, hidden, batch)
        self._finish(run, hidden)
        for row, count in zip(rows, counts, strict=True):
            cache.advance(row, count)
        logits = self._logits(hidden if last is None else hidden[-last:])
        run.trace.lap("head")
        return Output(logits, torch.cat(tapped, dim=-1) if tapped else None)

    def _attention_half(self, run: Verification, number: int, hidden: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        """Hidden states [tokens, hidden] after the attention of a layer; the old ones may be overwritten."""
        layer = self.weights.layers[number]
        queries, keys, values = self._project(layer, hidden, batch.cos, batch.sin)
        run.trace.lap("linear")
        attended = [
            attend(run, number, row, cache, queries[part], keys[part], values[part], tree)
            for row, part, tree in batch.parts
        ]
        mixed = _joined(attended)
        if run.probe is not None:
            mixed = run.probe.mixed(number, mixed)
        hidden = hidden + layer.output(mixed.reshape(hidden.shape[0], -1))
        run.trace.lap("linear")
        return hidden

    def _feed_forward_half(self, run: Verification, number: int, hidden: Tensor, batch: Batch) -> Tensor:
        """Hidden states [tokens, hidden] after the FFN or experts of a layer; the old ones may be overwritten."""
        layer = self.weights.layers[number]
        normed = self._normed(hidden, layer.ffn_norm)
        run.trace.lap("linear")
        parts = [(batch.parts[0][0], slice(None), None)] if run.sparsity.shares_nothing else batch.parts
        outputs = [feed_forward(run, number, layer, normed[part], run.memory(row), tree) for row, part, tree in parts]
        return hidden + _joined(outputs)

    def _finish(self, run: Verification, hidden: Tensor) -> None:
        """Have everything asked of ``hidden`` so far done; here nothing waits."""

    def verify(
        self, tokens: Tensor, cache: KVCache, run: Verification | None = None, rows: list[int] | None = None
    ) -> Tensor:
        """:meth:`run` over chains of one length.

        Args:
            tokens: [batch, count], int64: the last accepted token and the draft, for each row.
            cache, run: as in :meth:`run`.
            rows: cache rows that ``tokens`` belong to; the first ones by default.

        Returns:
            [batch, count, vocab].
        """
        rows = list(range(tokens.shape[0])) if rows is None else rows
        segments = [Segment(row, chain) for row, chain in zip(rows, tokens.tolist(), strict=True)]
        return self.run(segments, cache, run).logits.view(*tokens.shape, -1)

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, cache: KVCache, chunk: int, row: int = 0) -> Output:
        """Dense prefill in chunks (METHOD section 1: prefill stays dense).

        Args:
            tokens: [count], int64, at least one.
            cache: holds everything before them; extended by ``count`` positions.
            chunk: tokens per forward pass.
            row: row of the cache.

        Returns:
            Logits after the last token, [vocab], and features of all tokens.

        Raises:
            ValueError: no tokens, the cache is full, or the position lies beyond the model's positions.
        """
        if tokens.numel() == 0:
            raise ValueError("prefill needs at least one token")
        hidden, run, tapped = None, Verification(), []
        for part in torch.split(tokens, chunk):
            start = cache.lengths[row]
            hidden, batch = self._embed([Segment(row, part.tolist())], cache)
            mask = _prefill_mask(part.shape[0], start, hidden.dtype, hidden.device)
            taps = []
            for number, layer in enumerate(self.weights.layers):
                if number in self.taps:
                    self._finish(run, hidden)
                    taps.append(hidden.clone())
                self._finish(run, hidden)
                queries, keys, values = self._project(layer, hidden, batch.cos, batch.sin)
                cache.write(number, row, start, keys, values)
                all_keys, all_values = cache.prefix(number, row, start + part.shape[0])
                mixed = functional.scaled_dot_product_attention(
                    queries.transpose(0, 1)[None],
                    all_keys[None],
                    all_values[None],
                    attn_mask=mask,
                    scale=1.0,
                    enable_gqa=True,
                )
                hidden = hidden + layer.output(mixed[0].transpose(0, 1).reshape(part.shape[0], -1))
                hidden = self._feed_forward_half(run, number, hidden, batch)
            self._finish(run, hidden)
            cache.advance(row, part.shape[0])
            if taps:
                tapped.append(torch.cat(taps, dim=-1))
        assert hidden is not None
        return Output(self._logits(hidden[-1:])[0], torch.cat(tapped) if tapped else None)

    def _embed(self, segments: Sequence[Segment], cache: KVCache) -> tuple[Tensor, Batch]:
        """Hidden states [tokens, hidden], and where the tokens stand."""
        weights, positions = self.weights, []
        device = weights.device
        for segment in segments:
            start, count = cache.lengths[segment.row], len(segment.tokens)
            cache.check_room(start + count)
            last = start + (count if segment.tree is None else 1 + segment.tree.depth)
            if last > weights.positions:
                raise ValueError(f"position {last} lies beyond the model's {weights.positions} positions")
            if segment.tree is None:
                positions.append(torch.arange(start, start + count, device=device))
            else:
                positions.append(segment.tree.depths + start)
        tokens = torch.tensor([token for segment in segments for token in segment.tokens], device=device)
        places = _joined(positions)
        ends = list(accumulate(len(segment.tokens) for segment in segments))
        parts = [
            (segment.row, slice(end - len(segment.tokens), end), segment.tree)
            for segment, end in zip(segments, ends, strict=True)
        ]
        batch = Batch(parts, places, weights.cos[places], weights.sin[places])
        return functional.embedding(tokens, weights.embedding), batch

    def _project(self, layer: LayerWeights, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated, scaled queries [tokens, heads, head_dim]; rotated keys and values [tokens, kv_heads, head_dim]."""
        shape = self.weights.shape
        states = layer.qkv(self._normed(hidden, layer.attention_norm)).view(hidden.shape[0], -1, shape.head_dim)
        split = shape.heads + shape.kv_heads
        rotating, values = states[:, :split], states[:, split:]
        if layer.query_norm is not None and layer.key_norm is not None:
            queries = self._head_norm(rotating[:, : shape.heads], layer.query_norm)
            keys = self._head_norm(rotating[:, shape.heads :], layer.key_norm)
            rotating = torch.cat((queries, keys), dim=1)
        rotated = torch.addcmul(rotating * cos, rotating.roll(shape.head_dim // 2, -1), sin)
        return rotated[:, : shape.heads] * self._scale, rotated[:, shape.heads :], values

    def _head_norm(self, states: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm of [tokens, heads, head_dim] per head, or over all heads where the weight covers them."""
        if weight.shape[0] == states.shape[-1]:
            return self._normed(states, weight)
        return self._normed(states.flatten(1), weight).view_as(states)

    def _normed(self, states: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(states, weight.shape, weight, self.weights.eps)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.weights.head(self._normed(hidden, self.weights.norm))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _prefill_mask(rows: int, start: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive causal mask [rows, start + rows]."""
    mask = torch.full((rows, start + rows), float("-inf"), dtype=dtype, device=device)
    return mask.triu(start + 1)
