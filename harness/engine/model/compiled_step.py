"""The decoding step with halves of layers as compiled CPU kernels: engine=compiled (DESIGN section 2).

What is chosen, remembered and counted is decided here exactly as in the eager step; only the arithmetic of a half layer
is one call. A layer or a setting that the kernels do not cover runs with torch operators, which the counters of paths
tell. Rows do not depend on each other's number: without sparsity a verification step gives every token the very bits
that autoregressive decoding gives it, in bf16 too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.engine.cache import PAGE, KVCache
from harness.engine.model.attention import Choice, chosen, count_attention, known, retrieved
from harness.engine.model.families import LayerWeights, ModelWeights
from harness.engine.model.probe import AttentionView
from harness.engine.model.step import Batch, Step
from harness.engine.model.verification import Verification
from sparse.budget import AttentionBudget
from sparse.ops.decoder_layer import native
from sparse.ops.sparse_ffn import eager as ffn_op
from sparse.selection import Selection
from sparse.trace import NATIVE


class CompiledStep(Step):
    """Runs tokens through the model against a cache, with compiled halves of layers where they fit.

    Args:
        weights: of the target model, packed where the kernels run.
        taps: as in :class:`Step`.
    """

    def __init__(self, weights: ModelWeights, taps: tuple[int, ...] = ()) -> None:
        super().__init__(weights, taps)
        self._layers = [self._compiled(layer) for layer in weights.layers]
        self._batch: tuple[Batch, Any, Tensor] | None = None

    @property
    def covers_all(self) -> bool:
        """Whether the kernels cover the attention of every layer."""
        return all(layer is not None for layer in self._layers)

    def _compiled(self, layer: LayerWeights) -> native.AttentionLayer | None:
        """The attention half for the kernels, or None where they do not cover it."""
        weights, shape = self.weights, self.weights.shape
        norms = [norm for norm in (layer.query_norm, layer.key_norm) if norm is not None]
        if not isinstance(layer.qkv, native.PackedLinear) or not isinstance(layer.output, native.PackedLinear):
            return None
        if any(norm.shape[0] != shape.head_dim for norm in norms) or not native.fits(shape.head_dim, weights.dtype):
            return None
        return native.AttentionLayer(
            layer.attention_norm,
            layer.qkv,
            layer.output,
            layer.query_norm,
            layer.key_norm,
            weights.cos,
            weights.sin,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            page=PAGE,
            eps=weights.eps,
            scale=self._scale,
        )

    def _attention_half(self, run: Verification, number: int, hidden: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        layer = self._layers[number]
        if layer is None or run.probe is not None:
            return super()._attention_half(run, number, hidden, batch, cache)
        segments, queries = self._segments(batch, cache)
        budget = run.sparsity.attention
        choices = []
        for index, (row, _, _) in enumerate(batch.parts):
            choice = _Chosen(known(run, number, row, cache.lengths[row]))
            segment = segments[index]
            segment.keys, segment.values, summaries = cache.addresses(number, row)
            segment.summary = None
            if choice.made is None and _covers(budget, number):
                choice.asked = torch.empty(
                    self.weights.shape.kv_heads, budget.blocks(cache.lengths[row]), dtype=torch.int64
                )
                _ask(segment, choice.asked, budget, summaries["mean"], cache, row)
            choices.append(choice)
        seconds = native.stage_seconds() if run.trace.clock is not None else None
        options = {"block_size": budget.block_size, "reduce_max": budget.gqa == "max", "seconds": seconds}
        parts = native.PROJECT | native.MIX
        if any(choice.made is None and choice.asked is None for choice in choices):
            for segment in segments:
                _attend(segment, (None, 0))
            layer.run(hidden, segments, batch.places, parts=native.PROJECT, **options)
            parts = native.MIX
            for index, choice in enumerate(choices):
                if choice.made is None and choice.asked is None:
                    choice.made = chosen(run, number, batch.parts[index][0], self._view(index, queries, number, batch, cache))
        for segment, choice in zip(segments, choices, strict=True):
            if choice.made is not None:
                choice.kept = _attend(segment, choice.made)
        layer.run(hidden, segments, batch.places, parts=parts, **options)
        for (row, part, _), choice in zip(batch.parts, choices, strict=True):
            start, rows = cache.lengths[row], part.stop - part.start
            if choice.asked is not None:
                selection = Selection(choice.asked, None, choice.asked.numel())
                choice.made = retrieved(run, number, row, start, selection)
            assert choice.made is not None
            count_attention(run, number, NATIVE, *choice.made, start + rows, rows)
        if seconds is not None:
            run.trace.charge(dict(zip(native.STAGES, seconds, strict=True)))
        return hidden

    def _feed_forward_half(self, run: Verification, number: int, hidden: Tensor, batch: Batch) -> Tensor:
        layer = self.weights.layers[number]
        ffn, sparsity = layer.ffn, run.sparsity
        if (
            ffn is None
            or run.probe is not None
            or sparsity.ffn.applies(number)
            or sparsity.reuse.skips("ffn", number)
            or not isinstance(ffn.gate_up, native.PackedLinear)
            or not isinstance(ffn.down, native.PackedLinear)
            or not ffn.gate_up.paired
        ):
            return super()._feed_forward_half(run, number, hidden, batch)
        seconds = native.stage_seconds() if run.trace.clock is not None else None
        native.feed_forward(hidden, layer.ffn_norm, self.weights.eps, ffn.gate_up, ffn.down, seconds)
        run.trace.paths[f"{ffn_op.DENSE}.{NATIVE}"] += 1
        run.trace.ffn(number, width=ffn.width, gates=ffn.width, channels=ffn.width, rows=hidden.shape[0])
        if seconds is not None:
            run.trace.charge(dict(zip(native.STAGES, seconds, strict=True)))
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self.weights.head
        if not isinstance(head, native.PackedLinear):
            return super()._logits(hidden)
        return native.linear(head, hidden, self.weights.norm, self.weights.eps)

    def _segments(self, batch: Batch, cache: KVCache) -> tuple[Any, Tensor]:
        """The step's sequences for the kernels, and room for their queries; made once a step."""
        if self._batch is not None and self._batch[0] is batch:
            return self._batch[1], self._batch[2]
        shape = self.weights.shape
        groups, segments = shape.heads // shape.kv_heads, native.segments(len(batch.parts))
        rows = [native.padded_rows((part.stop - part.start) * groups) for _, part, _ in batch.parts]
        queries = torch.empty(sum(rows), shape.kv_heads * shape.head_dim, dtype=self.weights.dtype)
        first = 0
        for segment, (row, part, tree), padded in zip(segments, batch.parts, rows, strict=True):
            segment.first, segment.count, segment.start = part.start, part.stop - part.start, cache.lengths[row]
            segment.visible = None if tree is None else tree.visible.data_ptr()
            segment.queries = queries[first].data_ptr()
            first += padded
        self._batch = batch, segments, queries
        return segments, queries

    def _view(self, index: int, queries: Tensor, number: int, batch: Batch, cache: KVCache) -> AttentionView:
        """What a retrieving layer sees of a sequence, for scores that torch operators compute."""
        shape = self.weights.shape
        groups = shape.heads // shape.kv_heads
        counts = [(part.stop - part.start) * groups for _, part, _ in batch.parts]
        first = sum(native.padded_rows(count) for count in counts[:index])
        own = queries[first : first + native.padded_rows(counts[index])].view(shape.kv_heads, -1, shape.head_dim)
        row, part, tree = batch.parts[index]
        start = cache.lengths[row]
        return AttentionView(
            own[:, : counts[index]],
            *cache.layer(number, row),
            start,
            start + part.stop - part.start,
            groups,
            cache.summaries(number, row) if start else {},
            tree,
        )


@dataclass(slots=True)
class _Chosen:
    """One sequence's choice in a layer: made already, or asked of the kernel, which fills ``asked``.

    ``kept`` holds the numbers of blocks that count while the kernel reads them.
    """

    made: Choice | None
    asked: Tensor | None = None
    kept: Tensor | None = None


def _covers(budget: AttentionBudget, layer: int) -> bool:
    """Whether the kernel chooses the blocks by itself."""
    plain = budget.score == "mean" and budget.query == "first" and budget.heads == "per_head"
    return plain and not budget.low(layer)


def _ask(segment: Any, blocks: Tensor, budget: AttentionBudget, summary: int, cache: KVCache, row: int) -> None:
    """Have the kernel choose ``blocks`` [kv_heads, k] and attend to them."""
    start = cache.lengths[row]
    segment.blocks, segment.kept, segment.chosen = blocks.data_ptr(), None, blocks.shape[1]
    segment.summary, segment.summary_stride = summary, cache.capacity // cache.block_size
    segment.whole = start // budget.block_size
    segment.sinks, segment.window = budget.sinks, budget.window
    segment.tail = segment.whole * budget.block_size


def _attend(segment: Any, choice: Choice) -> Tensor | None:
    """Have the kernel attend to a choice; what is returned must live until it has."""
    selection, segment.tail = choice
    if selection is None:
        segment.blocks = None
        return None
    segment.blocks, segment.chosen = selection.blocks.data_ptr(), selection.blocks.shape[1]
    kept = None if selection.valid is None else selection.valid.sum(1)
    segment.kept = None if kept is None else kept.data_ptr()
    return kept
