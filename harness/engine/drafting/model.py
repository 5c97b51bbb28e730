"""Drafts by a smaller model, and the passes of any drafter that runs a model (METHOD section 1)."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from harness.engine.cache import KVCache
from harness.engine.drafting.draft import Draft
from harness.engine.drafting.expansion import Growth, Pace, grow
from harness.engine.model.step import Segment, Step
from harness.engine.model.verification import Verification
from harness.engine.sampling import Sampling, distribution
from sparse.cost import Cost, prefill_cost, total, trace_costs
from sparse.tree import Tree

_FEW = 64  # tokens up to which a step is cheaper than a prefill, which copies the cached keys and values


class Passes:
    """Runs a sequence's last tokens, and then the draft below them, through one row of a model's cache.

    A chain costs one pass of one token per level. A step's tokens see all of the cache, so the branches of a tree
    cannot enter it: each level runs the root and everything that grew so far in one pass with a tree mask, after
    rolling back to before the root. The n-th pass below the root then has 1 + n * topk tokens instead of topk; the
    passes are as many, and each reads the weights once.

    Args:
        step: of the model.
        cache: of the model, with :func:`harness.engine.drafting.expansion.room` positions after the sequence.
        row: of the cache.
        branches: whether drafts are trees.
        sample: how the distributions are made from logits; None takes them as they are.
    """

    def __init__(self, step: Step, cache: KVCache, row: int, branches: bool, sample: Sampling | None) -> None:
        self._step = step
        self._cache = cache
        self._row = row
        self._branches = branches
        self._sampling = sample or Sampling()
        self._run = Verification()
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._logits = 0

    def begin(self, tokens: Sequence[int], run: Verification) -> Tensor:
        """Run ``tokens``, the root last, after what the cache holds; they stay in it.

        Args:
            tokens: at least one.
            run: of this draft.

        Returns:
            The distribution after the root, [vocab], fp32.
        """
        self._run, self._logits = run, 0
        self._tokens, self._parents = [tokens[-1]], []
        return self._pass(Segment(self._row, tokens), 1)[0]

    def extend(self, numbers: Sequence[int], tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        """See :data:`harness.engine.drafting.expansion.Extend`; a chain's tokens stay in the cache, a tree's do not."""
        self._tokens.extend(tokens)
        self._parents.extend(parents)
        if not self._branches:
            return self._pass(Segment(self._row, tokens), 1)
        sequence = self._cache.lengths[self._row]
        self._cache.truncate(self._row, sequence - 1)
        tree = Tree(self._parents, self._step.weights.device)
        distributions = self._pass(Segment(self._row, self._tokens, tree), len(tokens))
        self._cache.truncate(self._row, sequence)
        return distributions

    def cached(self) -> list[int]:
        """Draft tokens that stand in the cache behind the root."""
        return [] if self._branches else self._tokens[1:]

    def cost(self) -> Cost:
        """Least work of all passes since :meth:`begin`."""
        shape, run = self._step.weights.shape, self._run
        layers = shape.layers - len(run.left_out)
        return total(trace_costs(shape, run.sparsity.attention, run.trace, layers=layers, logits=self._logits).values())

    def _pass(self, segment: Segment, last: int) -> Tensor:
        self._logits += last
        logits = self._step.run([segment], self._cache, self._run, last).logits
        return distribution(logits, self._sampling)


class ModelDrafter:
    """Drafts by a smaller model with the target's vocabulary, on a row of its own cache.

    The cache keeps what is common to its tokens and the sequence: the prompt over several decodes of it, and the
    accepted tokens of a chain. So a chain accepted in full leaves its last token and the bonus token to run.

    Args:
        step: of the draft model.
        cache: of the draft model, for the sequence and :func:`harness.engine.drafting.expansion.room` positions.
        row: of the cache; nobody else may use it.
        growth: of the drafts.
        sample: how draft tokens are drawn; None takes the most probable ones.
        pace: when to stop; None leaves it to ``growth``.
        prefill_chunk: tokens per forward pass of a prefill.

    Attributes:
        spent: least work of its passes since the last reset.
    """

    def __init__(
        self,
        step: Step,
        cache: KVCache,
        row: int,
        growth: Growth,
        *,
        sample: Sampling | None = None,
        pace: Pace | None = None,
        prefill_chunk: int = 512,
    ) -> None:
        self._step = step
        self._cache = cache
        self._row = row
        self._growth = growth
        self._pace = pace
        self._chunk = prefill_chunk
        self._draws = sample is not None
        self._random: Random | None = None
        self._passes = Passes(step, cache, row, growth.topk > 1, sample)
        self._sequence: list[int] = []
        self._cached: list[int] = []
        self._agreed = 0
        self.spent = Cost()

    def reset(self, prompt: Sequence[int], features: Tensor | None = None, seed: int = 0) -> None:
        """Start over after ``prompt``, and prefill what the cache does not hold of it.

        Raises:
            ValueError: the prompt is longer than the cache or the model's positions.
        """
        self._random = Random(f"{seed} draft") if self._draws else None
        self._sequence = list(prompt)
        self._agreed = 0
        self.spent = Cost()
        self._roll_back(len(prompt))
        self._prefill(self._sequence[len(self._cached) :])

    def observe(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        """Append tokens of the output; they run with the next draft."""
        self._sequence.extend(tokens)

    def propose(self, limit: int) -> Draft:
        """What the draft model thinks.

        Raises:
            ValueError: the cache is full, or a position lies beyond the draft model's.
        """
        if limit < 1:
            return Draft()
        self._roll_back(len(self._sequence) - 1)
        if len(self._sequence) - len(self._cached) > _FEW:
            self._prefill(self._sequence[len(self._cached) : -1])
        root = self._passes.begin(self._sequence[len(self._cached) :], Verification())
        draft = grow(self._growth, root, self._passes.extend, limit, random=self._random, pace=self._pace)
        self.spent += self._passes.cost()
        self._agreed = len(self._sequence)
        self._cached = [*self._sequence, *self._passes.cached()]
        return draft

    def _roll_back(self, most: int) -> None:
        """Cut the cache to what it has in common with the sequence, ``most`` tokens at most."""
        end = min(most, len(self._cached))
        self._agreed = min(self._agreed, end)
        while self._agreed < end and self._cached[self._agreed] == self._sequence[self._agreed]:
            self._agreed += 1
        del self._cached[self._agreed :]
        self._cache.truncate(self._row, self._agreed)

    def _prefill(self, tokens: list[int]) -> None:
        """Run ``tokens``, which follow what is cached, without asking for drafts."""
        if tokens:
            chain = torch.tensor(tokens, device=self._step.weights.device)
            start = self._cache.lengths[self._row]
            self._step.prefill(chain, self._cache, self._chunk, self._row)
            self.spent += prefill_cost(self._step.weights.shape, start, len(tokens), self._chunk)
            self._cached.extend(tokens)
