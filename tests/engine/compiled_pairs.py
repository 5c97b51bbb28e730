"""The same tiny model run with torch operators and with compiled layers, over caches that hold the same prompts."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch

from harness.engine.cache import KVCache
from harness.engine.model.compiled_step import CompiledStep
from harness.engine.model.families import ModelWeights, adapt
from harness.engine.model.step import Segment, Step
from harness.engine.model.verification import Verification
from sparse.budget import Sparsity
from sparse.trace import Trace
from sparse.tree import Tree
from tests.engine.tiny import VOCAB, library_model, repetitive_prompt

LIMIT, CAPACITY = 1e-4, 400
LENGTHS = (251, 40, 150)
"""Of the prompts: one ends before a page, one is too short to leave out a block."""
WIDTH = 96
"""Channels of the feed-forward networks; gate and up are then packed as a pair."""


@cache
def tiny(family: str, packed: bool, **changes: Any) -> ModelWeights:
    """Weights of a tiny model, with everything that sparse steps need."""
    return adapt(
        library_model(family, intermediate_size=changes.pop("width", WIDTH), **changes), packed=packed, channels=True
    )


def random_tree(count: int, draw: random.Random) -> Tree:
    return Tree([draw.randrange(-1, node) for node in range(count - 1)])


def random_steps(rows: int, draw: random.Random) -> list[Segment]:
    """Tokens for every row, chains and trees, in any order of rows."""
    segments = []
    for row in draw.sample(range(rows), rows):
        count = draw.choice((1, 3, 6, 9, 17))
        tree = random_tree(count, draw) if draw.random() < 0.5 else None
        segments.append(Segment(row, [draw.randrange(VOCAB) for _ in range(count)], tree))
    return segments


def accepted(segment: Segment, draw: random.Random) -> list[int]:
    """Tokens of a step that are kept: the root, and a random path or prefix after it."""
    count = len(segment.tokens)
    if segment.tree is None:
        return list(range(draw.randint(1, count)))
    return segment.tree.visible[draw.randrange(count)].nonzero().view(-1).tolist()


@dataclass
class Pair:
    """Both steps over caches that hold the same prompts; the compiled step's is NaN where nothing was written."""

    eager: Step
    compiled: CompiledStep
    stores: tuple[KVCache, KVCache]

    @classmethod
    def of(cls, family: str, sparsity: Sparsity, rows: int = 1, taps: tuple[int, ...] = (), **changes: Any) -> Pair:
        """Over the tiny model of a family."""
        return cls.over(tiny(family, False, **changes), tiny(family, True, **changes), sparsity, rows, taps)

    @classmethod
    def over(
        cls, plain: ModelWeights, packed: ModelWeights, sparsity: Sparsity, rows: int = 1, taps: tuple[int, ...] = ()
    ) -> Pair:
        """Over two forms of the same weights."""
        steps = Step(plain, taps), CompiledStep(packed, taps)
        stores = tuple(step.new_cache(CAPACITY, sparsity.attention, rows) for step in steps)
        for tensor in (stores[1].keys, stores[1].values, *stores[1].stored_summaries.values()):
            tensor.fill_(torch.nan)
        for step, store in zip(steps, stores, strict=True):
            for row in range(rows):
                step.prefill(torch.tensor(repetitive_prompt(LENGTHS[row], row)), store, 128, row)
        return cls(*steps, (stores[0], stores[1]))

    def both(self, segments: list[Segment], runs: tuple[Verification, Verification], last: int | None = None) -> None:
        """One step of each; logits and features agree."""
        expected = self.eager.run(segments, self.stores[0], runs[0], last)
        found = self.compiled.run(segments, self.stores[1], runs[1], last)
        assert self.stores[0].lengths == self.stores[1].lengths
        assert (found.logits - expected.logits).abs().max() < LIMIT
        assert (found.features is None) == (expected.features is None)
        if expected.features is not None and found.features is not None:
            assert (found.features - expected.features).abs().max() < LIMIT

    def rounds(self, sparsity: Sparsity, steps: int = 4, **options: Any) -> tuple[Trace, Trace]:
        """Random steps with random acceptance of both; returns their traces."""
        draw = random.Random(7)
        runs = Verification(sparsity, **options), Verification(sparsity, **options)
        for _ in range(steps):
            segments = random_steps(len(self.stores[0].lengths), draw)
            self.both(segments, runs)
            for segment in segments:
                kept = accepted(segment, draw)
                for store in self.stores:
                    store.compact(segment.row, store.lengths[segment.row] - len(segment.tokens), kept)
        return runs[0].trace, runs[1].trace


def same_counters(expected: Trace, found: Trace) -> None:
    """Everything but what kernels are called."""
    for one in fields(Trace):
        if one.name not in ("clock", "seconds", "paths", "_mark"):
            assert getattr(found, one.name) == getattr(expected, one.name), one.name
    assert plain(found.paths) == plain(expected.paths)


def plain(paths: Counter[str]) -> Counter[str]:
    """Counters of paths without the name of what ran."""
    counted: Counter[str] = Counter()
    for name, calls in paths.items():
        plain_name, _, how = name.rpartition(".")
        counted[plain_name if how in ("native", "torch", "fused") else name] += calls
    return counted


def ran(trace: Trace, name: str) -> int:
    """Calls of a kernel for layers."""
    return trace.paths[f"{name}.native"]
