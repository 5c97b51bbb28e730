"""Prefilled prompts that are kept in memory, so that the members of a sweep share a prefill as the arms of a run do.

Prefill is dense (METHOD section 1): it depends on weights and prompt alone, not on what is swept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from harness.engine.cache import KVCache


@dataclass(frozen=True, slots=True)
class Prefilled:
    """What a prefill leaves beside keys and values.

    Attributes:
        logits: [vocab], after the last token of the prompt.
        features: of all prompt tokens, where the step has taps.
        seconds: wall-clock of the prefill, when it was made.
    """

    logits: Tensor
    features: Tensor | None
    seconds: float


class PrefillStore:
    """The prompts used last, as many as fit into ``limit`` bytes; 0 keeps none."""

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self._kept: dict[tuple[str, tuple[int, ...]], tuple[Prefilled, Tensor, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes kept now."""
        return sum(_size(*entry) for entry in self._kept.values())

    def shrink(self, limit: int) -> None:
        """Keep no more than ``limit`` bytes from now on."""
        self.limit = limit
        while self._kept and self.nbytes > limit:
            del self._kept[next(iter(self._kept))]

    def get(self, key: tuple[str, tuple[int, ...]]) -> tuple[Prefilled, Tensor, Tensor] | None:
        """What is kept under ``key``; it counts as used now."""
        entry = self._kept.pop(key, None)
        if entry is not None:
            self._kept[key] = entry
        return entry

    def put(self, key: tuple[str, tuple[int, ...]], entry: tuple[Prefilled, Tensor, Tensor]) -> None:
        """Keep ``entry``; those used longest ago make room, and one that is too large for all of it is not kept."""
        size = _size(*entry)
        if size > self.limit:
            return
        while self._kept and self.nbytes + size > self.limit:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = entry


@dataclass(slots=True)
class Prefills:
    """The prompts of a store that were prefilled with the same weights, run in the same way.

    Attributes:
        store: may hold those of others too.
        identity: what tells these weights from others.
        hits: prompts that were taken from the store.
    """

    store: PrefillStore
    identity: str = ""
    hits: int = 0

    def restore(self, prompt: Sequence[int], cache: KVCache, row: int) -> Prefilled | None:
        """Put a kept prompt into ``row`` of a cache of the same layout; None where it is not kept."""
        entry = self.store.get((self.identity, tuple(prompt)))
        if entry is None:
            return None
        done, keys, values = entry
        cache.restore(row, len(prompt), keys, values)
        self.hits += 1
        return done

    def keep(self, prompt: Sequence[int], cache: KVCache, row: int, done: Prefilled) -> None:
        """Copy a prompt that ``row`` holds."""
        if self.store.limit:
            self.store.put((self.identity, tuple(prompt)), (done, *cache.snapshot(row)))


def _size(done: Prefilled, *tensors: Tensor) -> int:
    parts = [*tensors, done.logits, *(() if done.features is None else (done.features,))]
    return sum(part.numel() * part.element_size() for part in parts)
