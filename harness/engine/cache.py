"""Key-value cache of fixed size: pages, rollback by length, block summaries (DESIGN section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sparse.scoring import summarise_blocks

PAGE = 256


class KVCache:
    """Keys and values of a batch of sequences of different lengths.

    Storage, allocated once: keys [layers, batch, pages, kv_heads, head_dim, page], values [layers, batch, pages,
    kv_heads, page, head_dim]. ``lengths[row]`` says how much of a row is valid; rollback sets it back and touches no
    memory. Summaries [layers, batch, kv_heads, head_dim, blocks] cover whole blocks of valid positions only.

    Args:
        layers, batch, kv_heads, head_dim: sizes.
        capacity: positions per row, rounded up to whole pages.
        dtype, device: of keys, values and summaries.
        block_size: positions per summarised block; a divisor of the page.
        summaries: which of ``sparse.scoring.SUMMARIES`` to keep.
        row_major: the channels of a key lie together in memory, as GPU kernels like it; the shape stays.

    Raises:
        ValueError: a block size that does not divide the page, or a capacity below one.
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        block_size: int = 16,
        summaries: tuple[str, ...] = (),
        row_major: bool = False,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity}: a cache needs at least one position")
        if PAGE % block_size:
            raise ValueError(f"block_size={block_size} does not divide the page of {PAGE}")
        pages = -(-capacity // PAGE)
        self.capacity = pages * PAGE
        self.block_size = block_size
        self.lengths = [0] * batch
        self._summarised = [0] * batch
        inner = (PAGE, head_dim) if row_major else (head_dim, PAGE)
        self._keys = torch.zeros(layers, batch, pages, kv_heads, *inner, dtype=dtype, device=device)
        if row_major:
            self._keys = self._keys.transpose(-1, -2)
        self._values = torch.zeros(layers, batch, pages, kv_heads, PAGE, head_dim, dtype=dtype, device=device)
        blocks = self.capacity // block_size
        self._summaries = {
            name: torch.zeros(layers, batch, kv_heads, head_dim, blocks, dtype=dtype, device=device)
            for name in summaries
        }
        self._layers = [[(self._keys[i, row], self._values[i, row]) for row in range(batch)] for i in range(layers)]
        self._addresses: list[list[tuple[int, int, dict[str, int]]]] = []
        self._layer_summaries = [
            [{name: stored[i, row] for name, stored in self._summaries.items()} for row in range(batch)]
            for i in range(layers)
        ]

    @property
    def keys(self) -> Tensor:
        """All keys, [layers, batch, pages, kv_heads, head_dim, page]."""
        return self._keys

    @property
    def values(self) -> Tensor:
        """All values, [layers, batch, pages, kv_heads, page, head_dim]."""
        return self._values

    @property
    def stored_summaries(self) -> dict[str, Tensor]:
        """All summaries by name, each [layers, batch, kv_heads, head_dim, blocks]."""
        return self._summaries

    def addresses(self, layer: int, row: int = 0) -> tuple[int, int, dict[str, int]]:
        """Where keys, values and summaries of one row lie in memory, for kernels."""
        if not self._addresses:
            self._addresses = [
                [
                    (keys.data_ptr(), values.data_ptr(), {name: one.data_ptr() for name, one in summaries.items()})
                    for (keys, values), summaries in zip(*both, strict=True)
                ]
                for both in zip(self._layers, self._layer_summaries, strict=True)
            ]
        return self._addresses[layer][row]

    def layer(self, layer: int, row: int = 0) -> tuple[Tensor, Tensor]:
        """Keys [pages, kv_heads, head_dim, page] and values [pages, kv_heads, page, head_dim] of one row."""
        return self._layers[layer][row]

    def summaries(self, layer: int, row: int = 0) -> dict[str, Tensor]:
        """Summaries by name, each [kv_heads, head_dim, blocks]; only the first :meth:`whole_blocks` are valid."""
        return self._layer_summaries[layer][row]

    def whole_blocks(self, row: int = 0) -> int:
        """Blocks that valid positions fill completely."""
        return self.lengths[row] // self.block_size

    def write(self, layer: int, row: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Store positions ``start`` and following of one layer and row; the length does not change.

        Args:
            keys, values: [tokens, kv_heads, head_dim].

        Raises:
            ValueError: the positions do not fit.
        """
        stop = start + keys.shape[0]
        self.check_room(stop)
        stored_keys, stored_values = self._layers[layer][row]
        transposed, moved = keys.permute(1, 2, 0), values.transpose(0, 1)
        begin = start
        while begin < stop:
            page, inside = divmod(begin, PAGE)
            count = min(stop - begin, PAGE - inside)
            source = slice(begin - start, begin - start + count)
            stored_keys[page, :, :, inside : inside + count] = transposed[:, :, source]
            stored_values[page, :, inside : inside + count] = moved[:, source]
            begin += count

    def check_room(self, stop: int) -> None:
        """Refuse ``stop`` positions where they do not fit.

        Raises:
            ValueError: they do not.
        """
        if stop > self.capacity:
            raise ValueError(f"position {stop} lies beyond the cache's capacity of {self.capacity}")

    def advance(self, row: int, tokens: int) -> None:
        """Declare the ``tokens`` positions after the current length valid."""
        self.lengths[row] += tokens

    def truncate(self, row: int, length: int) -> None:
        """Roll back to ``length`` positions; summaries of blocks that are no longer whole are forgotten.

        Raises:
            ValueError: ``length`` is negative or beyond the current length.
        """
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(f"cannot truncate a row of {self.lengths[row]} positions to {length}")
        self.lengths[row] = length
        self._summarised[row] = min(self._summarised[row], length // self.block_size)

    def compact(self, row: int, length: int, kept: Sequence[int]) -> None:
        """Keep the branch of a draft tree that was accepted and forget the rest; nothing is computed again.

        Args:
            row: of the cache.
            length: positions before the step that wrote the tree.
            kept: tokens of the step to keep, as numbers from 0 (the root) on, ascending; they move together.

        Raises:
            ValueError: ``kept`` does not ascend, or reaches beyond the valid positions.
        """
        if any(later <= earlier for earlier, later in pairwise(kept)):
            raise ValueError(f"the tokens {list(kept)} do not ascend")
        if kept and not 0 <= kept[0] <= kept[-1] < self.lengths[row] - length:
            raise ValueError(f"the tokens {list(kept)} do not lie in a step of {self.lengths[row] - length}")
        for place, token in enumerate(kept):
            if place != token:
                page, inside = divmod(length + token, PAGE)
                new_page, new_inside = divmod(length + place, PAGE)
                self._keys[:, row, new_page, :, :, new_inside] = self._keys[:, row, page, :, :, inside]
                self._values[:, row, new_page, :, new_inside] = self._values[:, row, page, :, inside]
        self._summarised[row] = min(self._summarised[row], length // self.block_size)
        self.truncate(row, length + len(kept))

    def unsummarised(self, row: int = 0) -> range:
        """Blocks of ``row`` that became whole since they were last summarised."""
        return range(self._summarised[row], self.whole_blocks(row))

    def declare_summarised(self, row: int) -> None:
        """The caller has summarised all whole blocks of ``row``."""
        self._summarised[row] = self.whole_blocks(row)

    def refresh_summaries(self, row: int = 0) -> None:
        """Summarise the blocks of ``row`` that became whole since the last call, in all layers at once."""
        whole = self.whole_blocks(row)
        per_page = PAGE // self.block_size
        first = self._summarised[row]
        while self._summaries and first < whole:
            page, inside = divmod(first, per_page)
            last = min(whole, (page + 1) * per_page)
            positions = slice(inside * self.block_size, (last - page * per_page) * self.block_size)
            keys = self._keys[:, row, page, :, :, positions]
            for name, stored in self._summaries.items():
                stored[:, row, :, :, first:last] = summarise_blocks(keys, self.block_size, name)
            first = last
        self._summarised[row] = whole

    def snapshot(self, row: int) -> tuple[Tensor, Tensor]:
        """Copies of the valid pages of ``row``: keys [layers, pages, ...] and values, laid out as they are stored."""
        pages = -(-self.lengths[row] // PAGE)
        return self._keys[:, row, :pages].clone(), self._values[:, row, :pages].clone()

    def restore(self, row: int, length: int, keys: Tensor, values: Tensor) -> None:
        """Make ``row`` hold ``length`` positions of a :meth:`snapshot`, of this cache or of one of the same layout.

        Raises:
            ValueError: they do not fit.
        """
        self.check_room(length)
        pages = keys.shape[1]
        self._keys[:, row, :pages].copy_(keys)
        self._values[:, row, :pages].copy_(values)
        self.lengths[row], self._summarised[row] = length, 0

    def prefix(self, layer: int, row: int, length: int) -> tuple[Tensor, Tensor]:
        """The first ``length`` positions as contiguous keys and values, each [kv_heads, length, head_dim] (a copy)."""
        keys, values = self._layers[layer][row]
        pages = -(-length // PAGE)
        _, heads, head_dim, _ = keys.shape
        flat_keys = keys[:pages].permute(1, 0, 3, 2).reshape(heads, -1, head_dim)
        flat_values = values[:pages].permute(1, 0, 2, 3).reshape(heads, -1, head_dim)
        return flat_keys[:, :length], flat_values[:, :length]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and summaries together."""
        stored = [self._keys, self._values, *self._summaries.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in stored)
