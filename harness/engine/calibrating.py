"""What calibration text tells about a model: selections, heads, gates and routing of dense steps (METHOD sections 2-4).

Teacher forced: each window is prefilled, then verified in steps whose tokens are those of the text, all accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.engine.cache import KVCache
from harness.engine.model.attention import scores
from harness.engine.model.probe import AttentionView, Probe
from harness.engine.model.step import Step
from harness.engine.model.verification import Verification
from sparse.budget import AttentionBudget, FfnBudget, Sparsity
from sparse.cost import ModelShape
from sparse.ops.block_attention.eager import attention_mass
from sparse.selection import Selection, select_blocks

SHARES = tuple(round(0.05 * step, 2) for step in range(1, 20))
"""Shares of a layer's channels whose gate quantiles are kept."""
EVERY_CHANNEL = FfnBudget(rule="threshold", tau=0.0, mask="token")
"""Drops nothing, but runs an expert's channels where a probe sees them."""
SAMPLE = 1 << 16
"""Gate magnitudes kept per layer: a quantile's standard error is below 0.002 in share."""


@dataclass(frozen=True, slots=True)
class Tables:
    """The measured tables as plain numbers, with the meaning and shapes of ``harness.calibration.Calibration``."""

    jaccard: tuple[tuple[float, ...], ...]
    recovered_mass: tuple[tuple[float, ...], ...]
    head_map: tuple[tuple[tuple[int, ...], ...], ...]
    head_contribution: tuple[tuple[float, ...], ...]
    ffn_quantiles: dict[str, tuple[float, ...]]
    moe_beta: tuple[tuple[float, ...], ...] | None


class Sample:
    """A uniform sample without replacement from a stream of numbers, in bounded memory.

    Every number gets a random key and the lowest keys stay, so the sample is exact as long as all numbers fit.

    Args:
        limit: numbers kept.
        generator: of the keys, on the CPU.
    """

    def __init__(self, limit: int, generator: torch.Generator) -> None:
        self._limit, self._generator = limit, generator
        self._keys, self._values = torch.empty(0), torch.empty(0)

    def add(self, values: Tensor) -> None:
        """Offer numbers of any shape and dtype."""
        values = values.detach().float().flatten().cpu()
        keys = torch.rand(values.shape[0], generator=self._generator)
        if self._keys.shape[0] == self._limit:
            near = keys < self._keys.max()
            keys, values = keys[near], values[near]
        self._keys, self._values = torch.cat((self._keys, keys)), torch.cat((self._values, values))
        if self._keys.shape[0] > self._limit:
            self._keys, kept = self._keys.topk(self._limit, largest=False)
            self._values = self._values[kept]

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """Magnitude that each share of the numbers stays below, interpolated; zeros where nothing was offered."""
        if not self._values.shape[0]:
            return [0.0] * len(shares)
        found: list[float] = torch.quantile(self._values.double(), torch.tensor(shares, dtype=torch.float64)).tolist()
        return found


class Calibrator(Probe):
    """Collects every table over dense steps.

    Args:
        shape: of the model.
        budget: of the selections that are compared; every step must leave out at least one whole block.
        seed: of the sample of gate magnitudes.

    Attributes:
        steps: steps collected.
    """

    def __init__(self, shape: ModelShape, budget: AttentionBudget, seed: int) -> None:
        layers, heads = shape.layers, shape.kv_heads
        self._shape, self._budget = shape, budget
        self._masks: list[Tensor] = []
        self._mass: list[Tensor] = []
        self._jaccard = torch.zeros(layers, layers, dtype=torch.float64)
        self._recovered = torch.zeros(layers, heads, layers, heads, dtype=torch.float64)
        self._contribution = torch.zeros(layers, heads, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        self._gates = [Sample(SAMPLE, generator) for _ in range(layers)]
        self._shares: list[list[Tensor]] = [[] for _ in range(layers)]
        self.steps = 0

    def selection(self, layer: int, view: AttentionView, selection: Selection | None) -> Selection | None:
        """Keep the layer's own root selection and its attention mass; the last layer completes the step."""
        budget, whole = self._budget, view.start // self._budget.block_size
        mass = attention_mass(view.queries, view.keys, view.start, view.length, budget.block_size, view.groups)
        own = select_blocks(scores(budget, view), budget, budget.blocks(view.start))
        self._masks.append(own.mask(whole).cpu())
        self._mass.append(mass.mean(1).double().cpu())
        if layer == self._shape.layers - 1:
            self._compare()
        return selection

    def gated(self, layer: int, activations: Tensor) -> Tensor:
        """Sample gate magnitudes."""
        self._gates[layer].add(activations.abs())
        return activations

    def routed(self, layer: int, probabilities: Tensor, combine: Tensor) -> Tensor:
        """Keep each token's weight shares of its lowest experts."""
        top = probabilities.topk(self._shape.top_k, dim=-1).values.double()
        lowest = top.flip(-1).cumsum(-1)
        self._shares[layer].append((lowest / lowest[:, -1:])[:, :-1].cpu())
        return combine

    def tables(self) -> Tables:
        """The tables over all steps so far.

        Raises:
            ValueError: there were none.
        """
        if not self.steps:
            raise ValueError("calibration needs at least one step")
        seen = self._recovered.diagonal(dim1=1, dim2=3).sum(-1)
        quantiles = [sample.quantiles(SHARES) for sample in self._gates]
        return Tables(
            jaccard=_rows(self._jaccard / self.steps),
            recovered_mass=_rows((seen / seen.diagonal()[:, None]).T),
            head_map=self._head_map(),
            head_contribution=_rows(self._contribution / self.steps),
            ffn_quantiles={str(share): tuple(row[at] for row in quantiles) for at, share in enumerate(SHARES)},
            moe_beta=self._betas(),
        )

    def _compare(self) -> None:
        """Every layer's selection against every layer's mass, head by head."""
        masks, mass = torch.stack(self._masks), torch.stack(self._mass)
        self._masks, self._mass = [], []
        by_head = masks.double().transpose(0, 1)
        both = by_head @ by_head.transpose(1, 2)
        sizes = both.diagonal(dim1=1, dim2=2)
        self._jaccard += (both / (sizes[:, :, None] + sizes[:, None] - both)).mean(0)
        outside = 1 - mass.sum(-1)
        inside = torch.tensordot(mass, masks.double(), dims=([2], [2]))
        self._recovered += outside[:, :, None, None] + inside
        free = slice(self._budget.sinks, mass.shape[-1] - self._budget.window)
        self._contribution += mass[..., free].sum(-1)
        self.steps += 1

    def _head_map(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """[layer][anchor][kv_heads]; a head keeps its own number where no other recovers more."""
        by_anchor = self._recovered.transpose(1, 2)
        best, own = by_anchor.max(dim=-1), by_anchor.diagonal(dim1=2, dim2=3)
        numbers = torch.arange(by_anchor.shape[-1])
        chosen = torch.where(own >= best.values, numbers, best.indices)
        return tuple(tuple(tuple(int(head) for head in row) for row in layer) for layer in chosen.tolist())

    def _betas(self) -> tuple[tuple[float, ...], ...] | None:
        """[layers][top_k - 1], zeros for layers without experts; None without experts, or with one per token."""
        if not self._shape.moe_layers or self._shape.top_k < 2:
            return None
        none = torch.zeros(1, self._shape.top_k - 1, dtype=torch.float64)
        return _rows(torch.stack([torch.cat(shares or [none]).quantile(0.5, dim=0) for shares in self._shares]))


def calibrate(
    step: Step,
    cache: KVCache,
    windows: Sequence[Sequence[int]],
    budget: AttentionBudget,
    *,
    context: int,
    rows: int,
    seed: int = 0,
    chunk: int = 1024,
    advance: Callable[[], None] = lambda: None,
) -> Tables:
    """Measure the tables of a model on windows of text.

    Args:
        step: of the model; with experts its weights need the layout by channel.
        cache: made with ``budget``, with room for a window.
        windows: token ids, each ``context`` and a multiple of ``rows`` more.
        budget: of the block selections, not pooled.
        context: tokens prefilled.
        rows: tokens per verification step.
        seed: of the sample of gate magnitudes.
        chunk: tokens per forward pass of the prefill.
        advance: called after each step.

    Raises:
        ValueError: the budget keeps every block, or a window does not fit.
    """
    if not budget.skips(budget.dense_layers, context):
        raise ValueError(f"{budget.topk} blocks of {budget.block_size} leave nothing out of {context} positions")
    weights = step.weights
    probe = Calibrator(weights.shape, budget, seed)
    sparsity = Sparsity(ffn=EVERY_CHANNEL) if weights.shape.moe_layers else Sparsity()
    for window in windows:
        tokens = torch.tensor(window, device=weights.device)
        cache.truncate(0, 0)
        step.prefill(tokens[:context], cache, chunk)
        run = Verification(sparsity, probe=probe)
        for part in torch.split(tokens[context:], rows):
            cache.refresh_summaries()
            step.verify(part[None], cache, run)
            advance()
    return probe.tables()


def _rows(values: Tensor) -> tuple[tuple[float, ...], ...]:
    """A matrix as plain numbers."""
    return tuple(tuple(row) for row in values.tolist())
