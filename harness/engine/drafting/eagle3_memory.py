"""What an EAGLE-3 head keeps of a sequence, and its passes over it: with torch operators, or with the CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional

from harness.engine.cache import PAGE, KVCache
from harness.engine.model.eagle3 import Attend, Eagle3Head
from sparse.ops.decoder_layer import native, structures

_ROOM = 512
"""Positions that storage starts with."""

Paths = Sequence[tuple[int, ...]]
"""Of each new draft token the draft tokens on its path, itself last, as they stand behind the observed ones."""


class Memory(Protocol):
    """Keys and values of a head's layer."""

    def reserve(self, size: int) -> None:
        """Make room for ``size`` positions; what is stored stays."""

    def store(self, start: int, embeddings: Tensor, states: Tensor) -> None:
        """Store observed pairs, [n, hidden] each, at ``start`` and the following places."""

    def run(self, embeddings: Tensor, states: Tensor, observed: int, done: int, paths: Paths, begin: int) -> Tensor:
        """Run new pairs through the head and store them behind everything else.

        Args:
            embeddings, states: [n, hidden].
            observed: places of observed pairs before them.
            done: places of draft tokens between those and the new ones.
            paths: which of the draft's places each pair sees; it stands where its path ends.
            begin: first observed place that is seen.

        Returns:
            The next states, [n, hidden].
        """

    def logits(self, states: Tensor) -> Tensor:
        """[n, hidden] to [n, draft_vocab]."""


def make_memory(head: Eagle3Head) -> Memory:
    """The fastest memory for ``head`` here."""
    return CompiledMemory(head) if CompiledMemory.fits(head) else TorchMemory(head)


class TorchMemory:
    """With torch operators: keys and values [kv_heads, room, head_dim], and rotary tables; the room doubles.

    Args:
        head: in evaluation mode.
    """

    def __init__(self, head: Eagle3Head) -> None:
        self._head = head
        weight = head.norm.weight
        self._keys = weight.new_empty(head.shape.kv_heads, 0, head.shape.head_dim)
        self._values = self._keys
        self._cos, self._sin = head.rotary(torch.arange(0, device=weight.device))

    def reserve(self, size: int) -> None:
        """Make room for ``size`` positions; what is stored stays."""
        heads, room, head_dim = self._keys.shape
        if size <= room:
            return
        larger = _larger(room, size)
        keys, values = self._keys.new_empty(2, heads, larger, head_dim).unbind()
        keys[:, :room], values[:, :room] = self._keys, self._values
        self._keys, self._values = keys, values
        self._cos, self._sin = self._head.rotary(torch.arange(larger, device=keys.device))

    def store(self, start: int, embeddings: Tensor, states: Tensor) -> None:
        """See :class:`Memory`."""
        places = slice(start, start + len(states))
        self._write(start, *self._head.keys_values(embeddings, states, self._cos[places], self._sin[places]))

    def run(self, embeddings: Tensor, states: Tensor, observed: int, done: int, paths: Paths, begin: int) -> Tensor:
        """See :class:`Memory`."""
        places = torch.tensor([observed + len(path) - 1 for path in paths], device=states.device)
        attend = self._attention(observed + done, self._mask(observed - begin, done, paths), begin)
        output: Tensor = self._head(embeddings, states, self._cos[places], self._sin[places], attend)
        return output

    def logits(self, states: Tensor) -> Tensor:
        """See :class:`Memory`."""
        return self._head.logits(states)

    def _write(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Store [n, kv_heads, head_dim] at ``start`` and the following places."""
        stop = start + keys.shape[0]
        self._keys[:, start:stop] = keys.transpose(0, 1)
        self._values[:, start:stop] = values.transpose(0, 1)

    def _mask(self, seen: int, done: int, paths: Paths) -> Tensor | None:
        """Additive mask [n, positions]: ``seen`` observed places, then the draft's; None where all is seen."""
        drafted = done + len(paths)
        if len(paths) == 1 and len(paths[0]) == drafted:
            return None  # a chain's next token sees everything
        mask = self._keys.new_zeros(len(paths), seen + drafted)
        mask[:, seen:].masked_fill_(~_visible(paths, drafted).to(mask.device), float("-inf"))
        return mask

    def _attention(self, start: int, mask: Tensor | None, begin: int) -> Attend:
        """Attention of new places from ``start`` on to everything from ``begin`` on, masked."""

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            self._write(start, keys, values)
            rows, (heads, _, head_dim) = queries.shape[0], self._keys.shape
            stop = start + rows
            grouped = queries.view(rows, heads, -1, head_dim).transpose(0, 1).reshape(1, heads, -1, head_dim)
            groups = grouped.shape[2] // rows
            mixed = functional.scaled_dot_product_attention(
                grouped,
                self._keys[None, :, begin:stop],
                self._values[None, :, begin:stop],
                attn_mask=None if mask is None else mask.repeat_interleave(groups, dim=0)[None, None],
                scale=1.0,
            )
            return mixed.view(heads, rows, groups, head_dim).transpose(0, 1).reshape(queries.shape)

        return attend


class _Weights:
    """A head's weights packed for the kernels."""

    def __init__(self, head: Eagle3Head) -> None:
        attention, mlp = head.midlayer.self_attn, head.midlayer.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.qkv = native.PackedLinear(torch.cat([one.weight.detach() for one in projections]))
        self.output = native.PackedLinear(attention.o_proj.weight.detach())
        gate_up = torch.cat((mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()))
        self.feed_forward = native.FeedForwardLayer(
            head.midlayer.post_attention_layernorm.weight.detach(),
            native.PackedLinear(gate_up, paired=True),
            native.PackedLinear(mlp.down_proj.weight.detach()),
            head.shape.eps,
        )


_packed: WeakKeyDictionary[Eagle3Head, _Weights] = WeakKeyDictionary()
"""Heads' packed weights, which all drafters of a head share."""


class CompiledMemory:
    """With the CPU kernels: a paged cache of one layer, and the head's weights packed for them.

    Args:
        head: in evaluation mode, one that :meth:`fits`.
    """

    def __init__(self, head: Eagle3Head) -> None:
        self._head = head
        self._weights = _packed.get(head) or _Weights(head)
        _packed[head] = self._weights
        lm_head = head.lm_head.map
        assert isinstance(lm_head, native.PackedLinear)
        self._lm_head = lm_head
        self._jobs = native.Jobs()
        self._cache: KVCache | None = None
        self._attention: native.AttentionLayer | None = None

    @staticmethod
    def fits(head: Eagle3Head) -> bool:
        """Whether the kernels run this head here: packed weights of sizes that they handle."""
        weight, shape = head.norm.weight, head.shape
        return (
            isinstance(head.lm_head.map, native.PackedLinear)
            and native.fits(shape.head_dim, weight.dtype, PAGE)
            and shape.ffn % 16 == 0
        )

    def reserve(self, size: int) -> None:
        """See :class:`Memory`."""
        old, shape, weight = self._cache, self._head.shape, self._head.norm.weight
        if old is not None and size <= old.capacity:
            return
        room = _larger(0 if old is None else old.capacity, size)
        self._cache = KVCache(
            layers=1,
            batch=1,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            capacity=room,
            dtype=weight.dtype,
        )
        if old is not None:
            pages = old.keys.shape[2]
            self._cache.keys[:, :, :pages], self._cache.values[:, :, :pages] = old.keys, old.values
        layer = self._head.midlayer
        self._attention = native.AttentionLayer(
            layer.hidden_norm.weight.detach(),
            self._weights.qkv,
            self._weights.output,
            None,
            None,
            *self._head.rotary(torch.arange(self._cache.capacity)),
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            eps=shape.eps,
            scale=shape.head_dim**-0.5,
            beside_norm=layer.input_layernorm.weight.detach(),
        )

    def store(self, start: int, embeddings: Tensor, states: Tensor) -> None:
        """See :class:`Memory`; the kernel stops after it has stored keys and values."""
        self._add(embeddings, states, start, 0, torch.arange(start, start + len(states)), None, 0, native.PROJECT)
        self._jobs.run(states.contiguous())

    def run(self, embeddings: Tensor, states: Tensor, observed: int, done: int, paths: Paths, begin: int) -> Tensor:
        """See :class:`Memory`."""
        chain = all(len(path) == done + 1 + row for row, path in enumerate(paths))
        visible = None if chain else _visible(paths, done + len(paths))
        places = torch.tensor([observed + len(path) - 1 for path in paths])
        states = states.clone()
        self._add(embeddings, states, observed, done, places, visible, begin, native.PROJECT | native.MIX)
        self._jobs.feed_forward(self._weights.feed_forward)
        self._jobs.run(states)
        return states

    def logits(self, states: Tensor) -> Tensor:
        """See :class:`Memory`."""
        return native.linear(self._lm_head, states, self._head.norm.weight, self._head.shape.eps)

    def _add(
        self,
        embeddings: Tensor,
        states: Tensor,
        observed: int,
        done: int,
        places: Tensor,
        visible: Tensor | None,
        begin: int,
        parts: int,
    ) -> None:
        """Queue the attention half."""
        assert self._cache is not None and self._attention is not None
        shape, segments = self._head.shape, structures.segments(1)
        segment = segments[0]
        segment.count, segment.start, segment.before = len(states), observed, done
        rows = native.padded_rows(len(states) * shape.heads // shape.kv_heads)
        queries = states.new_empty(rows, shape.kv_heads * shape.head_dim)
        segment.positions, segment.queries = places.data_ptr(), queries.data_ptr()
        segment.visible = None if visible is None else visible.data_ptr()
        segment.keys, segment.values, _ = self._cache.addresses(0)
        segment.blocks, segment.tail = places.data_ptr(), begin  # no block is chosen: all from ``begin`` on is seen
        keep = (places, queries, visible)
        embeddings = embeddings.contiguous()
        self._jobs.attend(self._attention, segments, block_size=16, parts=parts, beside=embeddings, keep=keep)


def _larger(room: int, size: int) -> int:
    larger = max(room, _ROOM)
    while larger < size:
        larger *= 2
    return larger


def _visible(paths: Paths, drafted: int) -> Tensor:
    """[n, drafted], bool: which of the draft's places each path holds."""
    seen = [row * drafted + place for row, path in enumerate(paths) for place in path]
    visible = torch.zeros(len(paths) * drafted, dtype=torch.bool)
    visible[torch.tensor(seen)] = True
    return visible.view(len(paths), drafted)
