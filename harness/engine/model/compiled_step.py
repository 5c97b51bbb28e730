"""The decoding step with halves of layers as compiled CPU kernels: engine=compiled (DESIGN section 2).

What is chosen, remembered and counted is decided here exactly as in the eager step; the arithmetic waits in a queue,
and layers that follow each other run in one call. A layer or a setting that the kernels do not cover runs with torch
operators, which the counters of paths tell. Rows do not depend on each other's number: without sparsity a step that
verifies a chain gives every token the very bits that autoregressive decoding gives it, in bf16 too. In a tree, a branch
that does not lie right behind the root adds the same numbers up in another order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness.engine.cache import PAGE, KVCache
from harness.engine.model.attention import Choice, chosen, count_attention, known, retrieved
from harness.engine.model.families import LayerWeights, ModelWeights
from harness.engine.model.feed_forward import count_channels
from harness.engine.model.probe import AttentionView
from harness.engine.model.step import Batch, Segment, Step
from harness.engine.model.verification import Verification
from sparse.budget import AttentionBudget
from sparse.ops.decoder_layer import native, structures
from sparse.ops.sparse_ffn import eager as ffn_op
from sparse.selection import Selection
from sparse.trace import NATIVE
from sparse.tree import survival_weights


@dataclass(slots=True)
class _Sequences:
    """The sequences of a step as the kernels see them.

    Attributes:
        batch: of the step.
        template: what all layers share of the segments.
        queries: room for the queries of all of them, for layers whose blocks torch operators choose.
        views: of each sequence's queries, [kv_heads, tokens * groups, head_dim].
        shares: of each sequence's tokens in the query that chooses blocks, [tokens], once a layer has asked.
    """

    batch: Batch
    template: Any
    queries: Tensor
    views: list[Tensor] = field(default_factory=list)
    shares: dict[tuple[int, float], Tensor] = field(default_factory=dict)

    def shares_of(self, index: int, budget: AttentionBudget) -> Tensor | None:
        """The shares of a sequence's tokens in the query that chooses; None where one token chooses, or each by itself.

        They live as long as the step, because what waits in the queue points at them.
        """
        if budget.query not in ("mean", "weighted"):
            return None
        key = index, 1.0 if budget.query == "mean" else budget.survival
        if key not in self.shares:
            _, part, tree = self.batch.parts[index]
            self.shares[key] = survival_weights(part.stop - part.start, key[1], torch.device("cpu"), tree)
        return self.shares[key]


class CompiledStep(Step):
    """Runs tokens through the model against a cache, with compiled halves of layers where they fit.

    Args:
        weights: of the target model, packed where the kernels run.
        taps: as in :class:`Step`.
    """

    def __init__(self, weights: ModelWeights, taps: tuple[int, ...] = ()) -> None:
        super().__init__(weights, taps)
        self._attention = [self._attention_layer(layer) for layer in weights.layers]
        self._feed_forward = [self._feed_forward_layer(layer) for layer in weights.layers]
        self._sparse_ffn = [self._sparse_layer(layer) for layer in weights.layers]
        self._jobs = native.Jobs()
        self._uncounted: list[tuple[int, Tensor, int, int]] = []
        self._sequences: _Sequences | None = None

    @property
    def covers_all(self) -> bool:
        """Whether the kernels cover the attention of every layer."""
        return all(layer is not None for layer in self._attention)

    def _attention_layer(self, layer: LayerWeights) -> native.AttentionLayer | None:
        """The attention half for the kernels, or None where they do not cover it."""
        weights, shape = self.weights, self.weights.shape
        norms = [norm for norm in (layer.query_norm, layer.key_norm) if norm is not None]
        if not isinstance(layer.qkv, native.PackedLinear) or not isinstance(layer.output, native.PackedLinear):
            return None
        if any(norm.shape[0] != shape.head_dim for norm in norms) or not native.fits(
            shape.head_dim, weights.dtype, PAGE
        ):
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
            eps=weights.eps,
            scale=self._scale,
        )

    def _feed_forward_layer(self, layer: LayerWeights) -> native.FeedForwardLayer | None:
        """The dense feed-forward half for the kernels, or None where they do not cover it."""
        ffn = layer.ffn
        if ffn is None or not isinstance(ffn.gate_up, native.PackedLinear) or not ffn.gate_up.paired:
            return None
        if not isinstance(ffn.down, native.PackedLinear):
            return None
        return native.FeedForwardLayer(layer.ffn_norm, ffn.gate_up, ffn.down, self.weights.eps)

    def _sparse_layer(self, layer: LayerWeights) -> native.SparseFeedForwardLayer | None:
        """The feed-forward half with chosen channels for the kernels, or None where they do not cover it."""
        ffn = layer.ffn
        if ffn is None or ffn.channels is None or not isinstance(ffn.gate, native.PackedLinear):
            return None
        return native.SparseFeedForwardLayer(layer.ffn_norm, ffn.gate, ffn.channels, self.weights.eps)

    def _attention_half(self, run: Verification, number: int, hidden: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        layer, budget = self._attention[number], run.sparsity.attention
        if layer is None or run.probe is not None:
            self._finish(run, hidden)
            return super()._attention_half(run, number, hidden, batch, cache)
        if run.sparsity.reuse.head_map:
            self._finish(run, hidden)  # an anchor's blocks are copied, so they must be there
        sequences = self._of_step(batch, cache)
        segments = type(sequences.template).from_buffer_copy(sequences.template)
        attend = partial(
            self._jobs.attend,
            layer,
            segments,
            block_size=budget.block_size,
            score=budget.score if budget.score in structures.SCORES else "mean",
            every_row=budget.query == "max",
            reduce_max=budget.gqa == "max",
        )
        choices: list[Choice | None] = []
        for index, (segment, (row, _, _)) in enumerate(zip(segments, batch.parts, strict=True)):
            segment.keys, segment.values, summaries = cache.addresses(number, row)
            choice = known(run, number, row, cache.lengths[row])
            if choice is None and _covers(budget, number):
                shares = sequences.shares_of(index, budget)
                segment.shares = None if shares is None else shares.data_ptr()
                choice = self._ask(run, number, segment, summaries, cache, row)
            choices.append(choice)
        parts = native.PROJECT | native.MIX
        if None in choices:
            attend(parts=native.PROJECT)
            self._finish(run, hidden)
            parts = native.MIX
            for index, choice in enumerate(choices):
                if choice is None:
                    view = self._view(sequences, index, number, cache)
                    choices[index] = chosen(run, number, batch.parts[index][0], view)
            run.trace.lap("select")
        kept: list[Any] = []
        for segment, choice, (row, part, _) in zip(segments, choices, batch.parts, strict=True):
            assert choice is not None
            kept.append(_attend(segment, choice))
            rows = part.stop - part.start
            count_attention(run, number, NATIVE, *choice, cache.lengths[row] + rows, rows)
        attend(parts=parts, keep=kept)
        return hidden

    def _feed_forward_half(self, run: Verification, number: int, hidden: Tensor, batch: Batch) -> Tensor:
        layer, sparsity = self._feed_forward[number], run.sparsity
        if self._chooses(run, number, batch):
            return self._choose_channels(run, number, hidden, batch)
        skipped = sparsity.ffn.applies(number) or sparsity.reuse.skips("ffn", number)
        if layer is None or skipped or run.probe is not None:
            self._finish(run, hidden)
            return super()._feed_forward_half(run, number, hidden, batch)
        self._jobs.feed_forward(layer)
        ffn = self.weights.layers[number].ffn
        assert ffn is not None
        parts = [hidden.shape[0]] if sparsity.shares_nothing else [part.stop - part.start for _, part, _ in batch.parts]
        for rows in parts:  # counted as the layers beside it are, which choose for each sequence alone
            run.trace.paths[f"{ffn_op.DENSE}.{NATIVE}"] += 1
            run.trace.ffn(number, width=ffn.width, gates=ffn.width, channels=ffn.width, rows=rows)
        return hidden

    def _chooses(self, run: Verification, number: int, batch: Batch) -> bool:
        """Whether the kernel chooses the channels of a layer: one sequence, one set for its tokens, nothing reused."""
        budget, reuse = run.sparsity.ffn, run.sparsity.reuse
        if self._sparse_ffn[number] is None or run.probe is not None or len(batch.parts) > 1:
            return False
        reused = reuse.skips("ffn", number) or reuse.skips("channels", number)
        return budget.applies(number) and budget.shared and not reused

    def _choose_channels(self, run: Verification, number: int, hidden: Tensor, batch: Batch) -> Tensor:
        layer, budget, rows = self._sparse_ffn[number], run.sparsity.ffn, hidden.shape[0]
        assert layer is not None
        choice = ffn_op.choice_of(budget, number, layer.width, rows, batch.parts[0][2])
        chosen = self._jobs.sparse_feed_forward(
            layer, ranked=choice.ranked, survival=choice.survival, keep=choice.keep, threshold=choice.threshold
        )
        self._uncounted.append((number, chosen, layer.width, rows))
        return hidden

    def _embed(self, segments: Sequence[Segment], cache: KVCache) -> tuple[Tensor, Batch]:
        """As its parent's; what a step that failed left in the queue is forgotten."""
        self._jobs = native.Jobs()
        self._uncounted.clear()
        return super()._embed(segments, cache)

    def _finish(self, run: Verification, hidden: Tensor) -> None:
        """Run what waits in the queue."""
        if not len(self._jobs):
            return
        seconds = None if run.trace.clock is None else structures.stage_seconds()
        run.trace.lap("linear")
        self._jobs.run(hidden, seconds)
        if seconds is not None:
            run.trace.charge(dict(zip(structures.STAGES, seconds, strict=True)))
        for number, channels, width, rows in self._uncounted:
            run.trace.paths[ffn_op.FUSED_PATH] += 1
            count_channels(run.trace, number, width, int(channels[0]), rows)
        self._uncounted.clear()

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self.weights.head
        if not isinstance(head, native.PackedLinear):
            return super()._logits(hidden)
        return native.linear(head, hidden, self.weights.norm, self.weights.eps)

    def _of_step(self, batch: Batch, cache: KVCache) -> _Sequences:
        """The sequences of the step; made for its first layer."""
        if self._sequences is not None and self._sequences.batch is batch:
            return self._sequences
        shape = self.weights.shape
        groups, segments = shape.heads // shape.kv_heads, structures.segments(len(batch.parts))
        counts = [(part.stop - part.start) * groups for _, part, _ in batch.parts]
        padded = [native.padded_rows(count) for count in counts]
        queries = torch.empty(sum(padded), shape.kv_heads * shape.head_dim, dtype=self.weights.dtype)
        found = _Sequences(batch, segments, queries)
        for segment, (row, part, tree), own, count in zip(
            segments, batch.parts, torch.split(queries, padded), counts, strict=True
        ):
            segment.first, segment.count, segment.start = part.start, part.stop - part.start, cache.lengths[row]
            segment.positions = batch.places[part].data_ptr()
            segment.visible = None if tree is None else tree.visible.data_ptr()
            segment.queries = own.data_ptr()
            found.views.append(own.view(shape.kv_heads, -1, shape.head_dim)[:, :count])
        self._sequences = found
        return found

    def _ask(
        self, run: Verification, number: int, segment: Any, summaries: Mapping[str, int], cache: KVCache, row: int
    ) -> Choice:
        """Have the kernel choose the blocks; until it has run, the tensor of the choice holds nothing."""
        budget, start = run.sparsity.attention, cache.lengths[row]
        blocks = torch.empty(self.weights.shape.kv_heads, budget.blocks(start), dtype=torch.int64)
        segment.summary, segment.second = (*(summaries[name] for name in budget.summaries), None)[:2]
        segment.summary_stride = cache.capacity // cache.block_size
        segment.whole, segment.sinks, segment.window = start // budget.block_size, budget.sinks, budget.window
        return retrieved(run, number, row, start, Selection(blocks, None, blocks.numel()))

    def _view(self, sequences: _Sequences, index: int, number: int, cache: KVCache) -> AttentionView:
        """What a retrieving layer sees of a sequence, for scores that torch operators compute."""
        shape, (row, part, tree) = self.weights.shape, sequences.batch.parts[index]
        start = cache.lengths[row]
        return AttentionView(
            sequences.views[index],
            *cache.layer(number, row),
            start,
            start + part.stop - part.start,
            shape.heads // shape.kv_heads,
            cache.summaries(number, row) if start else {},
            tree,
        )


def _covers(budget: AttentionBudget, layer: int) -> bool:
    """Whether the kernel chooses the blocks by itself."""
    return budget.score in structures.SCORES and budget.heads == "per_head" and not budget.low(layer)


def _attend(segment: Any, choice: Choice) -> tuple[Tensor | None, ...]:
    """Have the kernel attend to a choice; what is returned must live until it has."""
    selection, segment.tail = choice
    if selection is None:
        return ()
    blocks, kept = selection.blocks.contiguous(), None if selection.valid is None else selection.valid.sum(1)
    segment.blocks, segment.chosen = blocks.data_ptr(), blocks.shape[1]
    segment.kept = None if kept is None else kept.data_ptr()
    return blocks, kept
