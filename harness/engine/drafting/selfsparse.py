"""The target as its own drafter, made cheap by a small KV budget or by leaving layers out (METHOD section 1)."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from torch import Tensor

from harness.engine.cache import KVCache
from harness.engine.drafting.draft import Draft
from harness.engine.drafting.expansion import Growth, Pace, grow
from harness.engine.drafting.model import Passes
from harness.engine.model.step import Step
from harness.engine.model.verification import Verification
from harness.engine.sampling import Sampling
from sparse.budget import Sparsity
from sparse.cost import Cost


class SelfSparseDrafter:
    """Drafts by the target's own step on the target's own cache, as TriForce (arXiv 2404.11912) and layer skipping do.

    Draft tokens enter the row behind the sequence and are rolled back before the verification writes there; nothing
    before them changes, and summaries of blocks that they filled are forgotten with them. Selections are remembered
    within one draft only.

    Args:
        step: of the target.
        cache: of the target, with :func:`harness.engine.drafting.expansion.room` positions after the sequence.
        row: of the cache, that which the sequence is verified on.
        growth: of the drafts.
        sparsity: what drafting skips; the cache must keep the summaries that it scores with.
        left_out: layers that do not run while drafting.
        sample: how draft tokens are drawn; None takes the most probable ones.
        pace: when to stop; None leaves it to ``growth``.

    Attributes:
        spent: least work of its passes since the last reset.

    Raises:
        ValueError: the cache lacks summaries or is cut into other blocks, or ``left_out`` names layers that the model
            does not have, or all of them.
    """

    def __init__(
        self,
        step: Step,
        cache: KVCache,
        row: int,
        growth: Growth,
        *,
        sparsity: Sparsity,
        left_out: frozenset[int] = frozenset(),
        sample: Sampling | None = None,
        pace: Pace | None = None,
    ) -> None:
        budget, layers = sparsity.attention, set(range(step.weights.shape.layers))
        missing = set(budget.summaries) - set(cache.summaries(0, row))
        if missing or (not budget.is_dense and budget.block_size != cache.block_size):
            raise ValueError(
                f"drafting reads summaries {sorted(budget.summaries)} of blocks of {budget.block_size}; the cache "
                f"keeps {sorted(cache.summaries(0, row))} of blocks of {cache.block_size}"
            )
        if not left_out < layers:
            raise ValueError(f"left_out={sorted(left_out)} must leave at least one of {len(layers)} layers to run")
        self._cache = cache
        self._row = row
        self._growth = growth
        self._sparsity = sparsity
        self._left_out = left_out
        self._pace = pace
        self._draws = sample is not None
        self._random: Random | None = None
        self._passes = Passes(step, cache, row, growth.topk > 1, sample)
        self._last = 0
        self.spent = Cost()

    @property
    def reads_blocks(self) -> bool:
        """Whether it chooses blocks of the target's cache by their summaries."""
        return bool(self._sparsity.attention.summaries)

    def reset(self, prompt: Sequence[int], features: Tensor | None = None, seed: int = 0) -> None:
        """Start over; the target's cache holds ``prompt`` already."""
        self._random = Random(f"{seed} draft") if self._draws else None
        self._last = prompt[-1]
        self.spent = Cost()

    def observe(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        """The last of ``tokens`` is the next draft's root; the cache holds everything before it."""
        self._last = tokens[-1]

    def propose(self, limit: int) -> Draft:
        """What the target thinks at a glance; the cache is left as it was found.

        Raises:
            ValueError: the cache is full, or a position lies beyond the model's.
        """
        if limit < 1:
            return Draft()
        length = self._cache.lengths[self._row]
        try:
            root = self._passes.begin([self._last], Verification(self._sparsity, left_out=self._left_out))
            draft = grow(self._growth, root, self._passes.extend, limit, random=self._random, pace=self._pace)
            self.spent += self._passes.cost()
            return draft
        finally:
            self._cache.truncate(self._row, length)
