"""The one list of drafters, each as chains and as trees, over one tiny target.

The generic tests in tests/engine/test_drafters.py run over it, and tests/harness/test_drafters_list.py checks that no
choice of the configuration is missing here. A new drafter is one more entry (docs/extending.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from harness.engine.acceptance import Rule
from harness.engine.cache import KVCache
from harness.engine.decoding import Decoder, StopRule
from harness.engine.drafting.base import Drafter, NoDrafter
from harness.engine.drafting.combined import CombinedDrafter
from harness.engine.drafting.eagle3 import Eagle3Drafter
from harness.engine.drafting.expansion import Growth
from harness.engine.drafting.lookup import LookupDrafter
from harness.engine.drafting.model import ModelDrafter
from harness.engine.drafting.oracle import OracleDrafter
from harness.engine.drafting.selfsparse import SelfSparseDrafter
from harness.engine.drafting.suffix import SharedHistory, SuffixDrafter
from harness.engine.model.eagle3 import Eagle3Head, Eagle3Shape, feature_layers
from harness.engine.model.families import adapt
from harness.engine.model.step import Step
from harness.engine.sampling import Sampling
from sparse.budget import AttentionBudget, Sparsity
from tests.engine.tiny import VOCAB, library_model

LAYERS, HIDDEN, CAPACITY = 7, 48, 500
GROWTHS = {"chain": Growth(4), "tree": Growth(3, 3, 8)}
KEPT = AttentionBudget(topk=3)


@dataclass(frozen=True, slots=True)
class Target:
    """A tiny random target that several sequences decode from.

    Attributes:
        step, cache: of the target; the step taps the layers that EAGLE-3 heads read.
        other: step of another tiny random model with the same vocabulary.
    """

    step: Step
    cache: KVCache
    other: Step

    def decoder(self, batch: int = 1, rule: Rule | None = None, stop: StopRule | None = None) -> Decoder:
        """A decoder over it."""
        options = {"clock": time.perf_counter, "prefill_chunk": 64, "batch": batch, "rule": rule}
        return Decoder(self.step, self.cache, stop=stop or StopRule(), **options)  # type: ignore[arg-type]


@cache
def _steps() -> tuple[Step, Step]:
    target = Step(adapt(library_model("llama", num_hidden_layers=LAYERS), packed=False), feature_layers(LAYERS))
    return target, Step(adapt(library_model("llama", seed=1, num_hidden_layers=2), packed=False))


def target(rows: int = 1) -> Target:
    """The target with an empty cache of ``rows`` rows."""
    step, other = _steps()
    return Target(step, step.new_cache(CAPACITY, KEPT, rows), other)


Make = Callable[[Target, int, Growth, Sampling | None], list[Drafter]]


def _each(make: Callable[[Target, int, Growth, Sampling | None], Drafter]) -> Make:
    return lambda target, rows, growth, sample: [make(target, row, growth, sample) for row in range(rows)]


def _suffix(target: Target, rows: int, growth: Growth, sample: Sampling | None) -> list[Drafter]:
    history = SharedHistory(12)
    return [SuffixDrafter(growth, 12, 2.0, history) for _ in range(rows)]


def _models(target: Target, rows: int, growth: Growth, sample: Sampling | None) -> list[Drafter]:
    own = target.other.new_cache(CAPACITY, AttentionBudget(), rows)
    return [ModelDrafter(target.other, own, row, growth, sample=sample) for row in range(rows)]


def _itself(target: Target, rows: int, growth: Growth, sample: Sampling | None) -> list[Drafter]:
    own = target.step.new_cache(CAPACITY, AttentionBudget(), rows)
    return [ModelDrafter(target.step, own, row, growth, sample=sample) for row in range(rows)]


def _few_blocks(target: Target, row: int, growth: Growth, sample: Sampling | None) -> Drafter:
    return SelfSparseDrafter(target.step, target.cache, row, growth, sparsity=Sparsity(KEPT), sample=sample)


def _few_layers(target: Target, row: int, growth: Growth, sample: Sampling | None) -> Drafter:
    left_out = frozenset({2, 4})
    return SelfSparseDrafter(
        target.step, target.cache, row, growth, sparsity=Sparsity(), left_out=left_out, sample=sample
    )


@cache
def _head() -> Eagle3Head:
    """A random head over two thirds of the vocabulary."""
    torch.manual_seed(3)
    head = Eagle3Head(Eagle3Shape(HIDDEN, 3 * HIDDEN, 6, 2, 8, 88, VOCAB, 40))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    head.set_vocabulary(torch.randperm(VOCAB)[:40].sort().values)
    return head.eval()


def _eagle(target: Target, row: int, growth: Growth, sample: Sampling | None) -> Drafter:
    return Eagle3Drafter(_head(), target.step.weights.embedding, growth, sample=sample)


def _oracle(target: Target, rows: int, growth: Growth, sample: Sampling | None) -> list[Drafter]:
    return [OracleDrafter(growth, 0.6, VOCAB, forced=False) for _ in range(rows)]


def _combined(target: Target, rows: int, growth: Growth, sample: Sampling | None) -> list[Drafter]:
    pairs = zip(_suffix(target, rows, growth, sample), _models(target, rows, growth, sample), strict=True)
    return [CombinedDrafter(first, second, 3) for first, second in pairs]  # type: ignore[arg-type]


def _joined(target: Target, rows: int, growth: Growth, sample: Sampling | None) -> list[Drafter]:
    pairs = zip(_suffix(target, rows, growth, None), _models(target, rows, growth, None), strict=True)
    return [CombinedDrafter(first, second, 3, join=True) for first, second in pairs]  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Case:
    """A drafter.

    Attributes:
        name: what a failing test shows.
        choice: the configuration's choice that makes it.
        make: target, rows, form of the drafts, and how drafts are drawn (None: not drawn) to one drafter per row.
        draws: whether it can draw its drafts.
    """

    name: str
    choice: str
    make: Make
    draws: bool = False


CASES = [
    Case("none", "none", _each(lambda *_: NoDrafter())),
    Case("lookup", "lookup", _each(lambda target, row, growth, sample: LookupDrafter(growth, 3))),
    Case("suffix", "suffix", _suffix),
    Case("model", "model", _models, draws=True),
    Case("the target as its own draft model", "model", _itself, draws=True),
    Case("selfsparse, few blocks", "selfsparse", _each(_few_blocks), draws=True),
    Case("selfsparse, few layers", "selfsparse", _each(_few_layers), draws=True),
    Case("eagle3", "eagle3", _each(_eagle), draws=True),
    Case("oracle", "oracle", _oracle),
    Case("suffix, else model", "combined", _combined, draws=True),
    Case("suffix and model", "combined", _joined),
]
