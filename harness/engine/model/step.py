"""The decoding step: our own forward over borrowed weights (DESIGN section 2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from harness.engine.cache import KVCache
from harness.engine.model.attention import attend
from harness.engine.model.families import LayerWeights, ModelWeights
from harness.engine.model.feed_forward import feed_forward
from harness.engine.model.verification import Verification
from sparse.budget import AttentionBudget


class Step:
    """Runs tokens through the model against a cache.

    Args:
        weights: of the target model.
    """

    def __init__(self, weights: ModelWeights) -> None:
        self.weights = weights
        shape = weights.shape
        self._scale = shape.head_dim**-0.5

    def new_cache(self, capacity: int, budget: AttentionBudget, batch: int = 1) -> KVCache:
        """A cache that fits this model and holds the summaries that ``budget`` scores with."""
        shape = self.weights.shape
        return KVCache(
            layers=shape.layers,
            batch=batch,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            capacity=capacity,
            dtype=self.weights.dtype,
            device=self.weights.device,
            block_size=budget.block_size,
            summaries=budget.summaries,
        )

    @torch.inference_mode()
    def verify(
        self, tokens: Tensor, cache: KVCache, run: Verification | None = None, rows: list[int] | None = None
    ) -> Tensor:
        """One verification step: logits after each token; their keys and values enter the cache and become valid.

        All rows of the batch run through the linear maps together; what is chosen for a sequence (blocks, channels,
        experts) is chosen row by row.

        Args:
            tokens: [batch, count], int64: the last accepted token and the draft, for each row.
            cache: holds everything before them.
            run: budgets, counters and memory of this decode; dense by default.
            rows: cache rows that ``tokens`` belong to; the first ones by default.

        Returns:
            [batch, count, vocab].

        Raises:
            ValueError: the cache is full, or the position lies beyond the model's positions.
        """
        batch, count = tokens.shape
        rows = list(range(batch)) if rows is None else rows
        run = Verification() if run is None else run
        run.begin(rows, batch * count)
        hidden, cos, sin = self._embed(tokens, [cache.lengths[row] for row in rows])
        if not run.sparsity.attention.is_dense:
            for row in rows:
                cache.refresh_summaries(row)
        parts = [(row, slice(place * count, (place + 1) * count)) for place, row in enumerate(rows)]
        whole = [(rows[0], slice(None))] if run.sparsity.shares_nothing else parts
        for number, layer in enumerate(self.weights.layers):
            queries, keys, values = self._project(layer, hidden, cos, sin)
            run.trace.lap("linear")
            mixed = _joined([attend(run, number, row, cache, queries[p], keys[p], values[p]) for row, p in parts])
            if run.probe is not None:
                mixed = run.probe.mixed(number, mixed)
            hidden = hidden + layer.output(mixed.reshape(batch * count, -1))
            normed = self._normed(hidden, layer.ffn_norm)
            run.trace.lap("linear")
            outputs = [feed_forward(run, number, layer, normed[part], run.memory(row)) for row, part in whole]
            hidden = hidden + _joined(outputs)
        for row in rows:
            cache.advance(row, count)
        logits = self._logits(hidden).view(batch, count, -1)
        run.trace.lap("head")
        return logits

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, cache: KVCache, chunk: int, row: int = 0) -> Tensor:
        """Dense prefill in chunks (METHOD section 1: prefill stays dense).

        Args:
            tokens: [count], int64, at least one.
            cache: holds everything before them; extended by ``count`` positions.
            chunk: tokens per forward pass.
            row: row of the cache.

        Returns:
            Logits after the last token, [vocab].

        Raises:
            ValueError: no tokens, the cache is full, or the position lies beyond the model's positions.
        """
        if tokens.numel() == 0:
            raise ValueError("prefill needs at least one token")
        hidden, run = None, Verification()
        for part in torch.split(tokens, chunk):
            start = cache.lengths[row]
            hidden, cos, sin = self._embed(part[None], [start])
            mask = _prefill_mask(part.shape[0], start, hidden.dtype, hidden.device)
            for number, layer in enumerate(self.weights.layers):
                queries, keys, values = self._project(layer, hidden, cos, sin)
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
                normed = self._normed(hidden, layer.ffn_norm)
                hidden = hidden + feed_forward(run, number, layer, normed, run.memory(row))
            cache.advance(row, part.shape[0])
        assert hidden is not None
        return self._logits(hidden[-1:])[0]

    def _embed(self, tokens: Tensor, starts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [batch * count, hidden] and rotary tables [batch * count, 1, head_dim]."""
        weights, count = self.weights, tokens.shape[1]
        if max(starts) + count > weights.positions:
            raise ValueError(f"position {max(starts) + count} lies beyond the model's {weights.positions} positions")
        hidden = functional.embedding(tokens.reshape(-1), weights.embedding)
        if len(starts) == 1:
            span = slice(starts[0], starts[0] + count)
            return hidden, weights.cos[span], weights.sin[span]
        positions = torch.cat([torch.arange(start, start + count, device=tokens.device) for start in starts])
        return hidden, weights.cos[positions], weights.sin[positions]

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
