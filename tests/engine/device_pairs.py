"""The same tiny model run step by step and as a captured step, over caches that hold the same prompts."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from harness.engine.cache import KVCache
from harness.engine.model.device_step import DeviceStep
from harness.engine.model.families import ModelWeights, adapt
from harness.engine.model.step import Segment, Step
from harness.engine.model.verification import Verification
from sparse.budget import AttentionBudget, Sparsity
from sparse.trace import Trace
from sparse.tree import Tree
from tests.engine.tiny import VOCAB, library_model, repetitive_prompt
from tests.ops.interpreter import DEVICE

LIMIT, CAPACITY = 1e-4, 600
LENGTHS = (131, 40, 150)  # of the prompts; the second one is too short to leave out a block
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
BLOCKS = AttentionBudget(topk=3)


def with_stacks(model: Any, weights: ModelWeights) -> ModelWeights:
    """``weights`` with the experts of ``model``, taken before they were adapted, as stacked tensors."""
    layers = []
    for layer, both in zip(weights.layers, model, strict=True):
        moe = layer.moe
        if moe is not None:
            known = {one.name: getattr(moe, one.name) for one in fields(moe)}
            moe = SimpleNamespace(**{**known, "stacked": both})
        layers.append(replace(layer, moe=moe))
    return replace(weights, layers=tuple(layers))


@cache
def tiny(family: str, dtype: torch.dtype = torch.float32) -> ModelWeights:
    """Weights of a tiny model with heads of 64."""
    sizes = {"hidden_size": 256} if family == "olmoe" else SIZES
    model = library_model(family, **{**SIZES, **sizes}).to(DEVICE, dtype)
    mlps = [layer.mlp for layer in model.model.layers]
    stacks = [
        (mlp.experts.gate_up_proj.detach().clone(), mlp.experts.down_proj.detach().clone())
        if hasattr(mlp, "experts")
        else None
        for mlp in mlps
    ]
    channels = family in ("llama", "qwen2", "qwen3", "mistral")
    return with_stacks(stacks, adapt(model, packed=False, channels=channels))


def tree_of(count: int, draw: random.Random) -> Tree:
    """A random tree of ``count`` tokens, the root included."""
    return Tree([draw.randrange(-1, node) for node in range(count - 1)], DEVICE)


def branch(segment: Segment, draw: random.Random) -> list[int]:
    """Tokens of a step that are accepted: the root, and a random path or prefix after it."""
    count = len(segment.tokens)
    if segment.tree is None:
        return list(range(draw.randint(1, count)))
    return segment.tree.visible[draw.randrange(count)].nonzero().view(-1).tolist()


@dataclass
class Pair:
    """The same model and prompts, run step by step and as a captured step."""

    eager: Step
    device: DeviceStep
    stores: tuple[KVCache, KVCache]

    @classmethod
    def of(cls, family: str, sparsity: Sparsity, batch: int, taps: tuple[int, ...] = ()) -> Pair:
        """Over the tiny model of a family."""
        return cls.over(tiny(family), sparsity, batch, taps)

    @classmethod
    def over(cls, weights: ModelWeights, sparsity: Sparsity, batch: int, taps: tuple[int, ...] = ()) -> Pair:
        """Prompts are prefilled; what the device's cache holds nothing in yet is poisoned."""
        eager, device = Step(weights, taps), DeviceStep(weights, taps)
        stores = tuple(step.new_cache(CAPACITY, sparsity.attention, batch) for step in (eager, device))
        for tensor in (stores[1].keys, stores[1].values, *stores[1].stored_summaries.values()):
            tensor.fill_(float("nan"))
        for store in stores:
            for row, length in zip(range(batch), LENGTHS, strict=False):
                eager.prefill(torch.tensor(repetitive_prompt(length, row), device=DEVICE), store, 128, row)
        return cls(eager, device, (stores[0], stores[1]))

    def both(self, segments: list[Segment], runs: tuple[Verification, Verification], last: int | None = None) -> float:
        """Largest difference of logits and features after one step."""
        found = self.device.run(segments, self.stores[1], runs[1], last)
        expected = self.eager.run(segments, self.stores[0], runs[0], last)
        assert found.logits.shape == expected.logits.shape and self.stores[0].lengths == self.stores[1].lengths
        difference = (found.logits - expected.logits).abs().max().item()
        if expected.features is not None:
            assert found.features is not None
            difference = max(difference, (found.features - expected.features).abs().max().item())
        return difference

    def accept(self, segments: list[Segment], draw: random.Random) -> None:
        """Keep a random branch of each segment in both caches."""
        for segment in segments:
            kept = branch(segment, draw)
            for store in self.stores:
                store.compact(segment.row, store.lengths[segment.row] - len(segment.tokens), kept)


def steps_of(form: str, batch: int, draw: random.Random) -> list[Segment]:
    """Random tokens for every row, in a random order of rows; trees or chains, as ``form`` says."""
    segments = []
    for row in draw.sample(range(batch), batch):
        count = draw.choice((1, 3, 6, 9))
        tokens = [draw.randrange(VOCAB) for _ in range(count)]
        segments.append(Segment(row, tokens, tree_of(count, draw) if form == "tree" and count > 1 else None))
    return segments


def rounds(pair: Pair, sparsity: Sparsity, form: str, batch: int, steps: int = 3) -> tuple[Trace, Trace]:
    """Random steps with random acceptance; asserts that logits agree, and returns both traces."""
    draw, runs = random.Random(7), (Verification(sparsity), Verification(sparsity))
    for _ in range(steps):
        segments = steps_of(form, batch, draw)
        assert pair.both(segments, runs) < LIMIT
        pair.accept(segments, draw)
    return runs[0].trace, runs[1].trace
