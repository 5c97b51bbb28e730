"""The decoding step: our own forward over borrowed weights (DESIGN section 2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from harness.engine.cache import KVCache
from harness.engine.model.families import LayerWeights, ModelWeights
from sparse.budget import AttentionBudget
from sparse.ops.block_attention import eager
from sparse.scoring import block_scores
from sparse.selection import select_blocks
from sparse.trace import Trace


class Step:
    """Runs tokens through the model against a cache.

    Args:
        weights: of the target model.
    """

    def __init__(self, weights: ModelWeights) -> None:
        self.weights = weights
        shape = weights.shape
        self._groups = shape.heads // shape.kv_heads
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
        self,
        tokens: Tensor,
        cache: KVCache,
        budget: AttentionBudget,
        trace: Trace | None = None,
        rows: list[int] | None = None,
    ) -> Tensor:
        """One verification step: logits after each token; their keys and values enter the cache and become valid.

        All rows of the batch run through the linear maps together; attention runs row by row, because each row has a
        length of its own.

        Args:
            tokens: [batch, count], int64: the last accepted token and the draft, for each row.
            cache: holds everything before them.
            budget: what attention may skip (METHOD section 2).
            trace: counters to add to.
            rows: cache rows that ``tokens`` belong to; the first ones by default.

        Returns:
            [batch, count, vocab].

        Raises:
            ValueError: the cache is full, or the position lies beyond the model's positions.
        """
        batch, count = tokens.shape
        rows = list(range(batch)) if rows is None else rows
        trace = Trace() if trace is None else trace
        hidden, cos, sin = self._embed(tokens, [cache.lengths[row] for row in rows])
        if not budget.is_dense:
            for row in rows:
                cache.refresh_summaries(row)
        for number, layer in enumerate(self.weights.layers):
            queries, keys, values = self._project(layer, hidden, cos, sin)
            mixed = [
                self._attend(number, row, cache, budget, trace, queries[part], keys[part], values[part])
                for row, part in zip(rows, _parts(batch, count), strict=True)
            ]
            hidden = hidden + layer.output(mixed[0] if batch == 1 else torch.cat(mixed))
            hidden = hidden + self._ffn(layer, hidden)
        for row in rows:
            cache.advance(row, count)
        return self._logits(hidden).view(batch, count, -1)

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
        hidden = None
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
                hidden = hidden + self._ffn(layer, hidden)
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
        shape, eps = self.weights.shape, self.weights.eps
        normed = functional.rms_norm(hidden, (shape.hidden,), layer.attention_norm, eps)
        states = layer.qkv(normed).view(hidden.shape[0], -1, shape.head_dim)
        split = shape.heads + shape.kv_heads
        rotating, values = states[:, :split], states[:, split:]
        if layer.query_norm is not None and layer.key_norm is not None:
            queries = functional.rms_norm(rotating[:, : shape.heads], (shape.head_dim,), layer.query_norm, eps)
            keys = functional.rms_norm(rotating[:, shape.heads :], (shape.head_dim,), layer.key_norm, eps)
            rotating = torch.cat((queries, keys), dim=1)
        rotated = torch.addcmul(rotating * cos, rotating.roll(shape.head_dim // 2, -1), sin)
        return rotated[:, : shape.heads] * self._scale, rotated[:, shape.heads :], values

    def _attend(
        self,
        number: int,
        row: int,
        cache: KVCache,
        budget: AttentionBudget,
        trace: Trace,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        """Attention of one row's tokens, [tokens, heads * head_dim]; stores their keys and values first."""
        shape, groups = self.weights.shape, self._groups
        start, count = cache.lengths[row], queries.shape[0]
        cache.write(number, row, start, keys, values)
        stored_keys, stored_values = cache.layer(number, row)
        grouped = queries.view(count, shape.kv_heads, groups, shape.head_dim).transpose(0, 1)
        grouped = grouped.reshape(shape.kv_heads, count * groups, shape.head_dim)
        length, whole = start + count, start // budget.block_size
        if budget.skips(number, whole):
            scores = block_scores(grouped, cache.summaries(number, row), budget, groups)[:, :whole]
            blocks = select_blocks(scores, budget)
            tail = whole * budget.block_size
            mixed = eager.block_attention(
                grouped,
                stored_keys,
                stored_values,
                blocks,
                tail_start=tail,
                length=length,
                block_size=budget.block_size,
                groups=groups,
            )
            trace.sparse(length, blocks.shape[1] * budget.block_size + length - tail, count)
        else:
            mixed = eager.dense_attention(grouped, stored_keys, stored_values, length, groups)
            trace.dense(length)
        mixed = mixed.view(shape.kv_heads, count, groups, shape.head_dim).transpose(0, 1)
        return mixed.reshape(count, shape.heads * shape.head_dim)

    def _ffn(self, layer: LayerWeights, hidden: Tensor) -> Tensor:
        shape = self.weights.shape
        normed = functional.rms_norm(hidden, (shape.hidden,), layer.ffn_norm, self.weights.eps)
        both = layer.gate_up(normed)
        return layer.down(functional.silu(both[:, : shape.ffn]) * both[:, shape.ffn :])

    def _logits(self, hidden: Tensor) -> Tensor:
        normed = functional.rms_norm(hidden, (self.weights.shape.hidden,), self.weights.norm, self.weights.eps)
        return self.weights.head(normed)


def _parts(batch: int, count: int) -> list[slice]:
    return [slice(number * count, (number + 1) * count) for number in range(batch)]


def _prefill_mask(rows: int, start: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive causal mask [rows, start + rows]."""
    mask = torch.full((rows, start + rows), float("-inf"), dtype=dtype, device=device)
    return mask.triu(start + 1)
