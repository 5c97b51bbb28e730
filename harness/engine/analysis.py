"""What the selections of real steps look like: overlap between draft tokens, similarity between layers, recall.

The observations on which reuse rests (METHOD sections 2 and 5). They cost more than the steps themselves, so they are
made in an untimed replay and on some steps only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.engine.model.attention import scores
from harness.engine.model.probe import AttentionView, Probe
from sparse.budget import AttentionBudget
from sparse.ops.block_attention.eager import attention_mass
from sparse.selection import Selection, select_blocks


class SelectionAnalysis(Probe):
    """Observes the selections of one decode; sums per layer, to be divided by their counts.

    Args:
        budget: of the arm that is observed.
        layers: of the model.
        distances: largest distance between draft tokens that is kept apart.
        every: observe every n-th step.

    Attributes:
        overlap: [layers][distances], sums of the share of a row's own blocks that the row ``distance`` tokens after it,
            on the same path of a tree, has too.
        pairs: as ``overlap``, how many.
        recall, oracle: [layers], sums over observed steps of the attention mass that the step's selection sees, and
            that the best selection of the same size would see; mean over rows and heads.
        observed: [layers], steps observed.
        similarity: [layers][layers], sums over steps of the Jaccard similarity of the layers' own root selections.
        compared: as ``similarity``, how many steps.
        steps: steps observed.
    """

    def __init__(self, budget: AttentionBudget, layers: int, *, distances: int = 6, every: int = 4) -> None:
        self._own = replace(budget, query="first", heads="per_head", low_heads=())
        self._best = replace(self._own, score="oracle", query="mean", gqa="mean")
        self._layers, self._distances, self._every = layers, distances, every
        self._calls = 0
        self._masks: dict[int, Tensor] = {}
        self.overlap = torch.zeros(layers, distances)
        self.pairs = torch.zeros(layers, distances)
        self.recall, self.oracle, self.observed = torch.zeros(layers), torch.zeros(layers), torch.zeros(layers)
        self.similarity, self.compared = torch.zeros(layers, layers), torch.zeros(layers, layers)
        self.steps = 0

    def selection(self, layer: int, view: AttentionView, selection: Selection | None) -> Selection | None:
        """Observe; the selection stays as it is."""
        if layer == 0:
            self._compare_layers()
            self._calls += 1
        if self._calls % self._every == 1 % self._every and self._own.skips(layer, view.start):
            self._observe(layer, view, selection)
        return selection

    def means(self) -> dict[str, Any]:
        """What was observed, as plain numbers; None where nothing was.

        ``overlap`` [layers][distances], ``recall`` and ``oracle_recall`` [layers], ``similarity`` [layers][layers],
        ``overlap_pairs`` and ``observed`` count ``overlap`` and the recalls, ``steps`` counts ``similarity``.
        """
        self._compare_layers()
        return {
            "overlap": _plain(self.overlap / self.pairs),
            "recall": _plain(self.recall / self.observed),
            "oracle_recall": _plain(self.oracle / self.observed),
            "similarity": _plain(self.similarity / self.compared),
            "overlap_pairs": self.pairs.tolist(),
            "observed": self.observed.tolist(),
            "steps": self.steps,
        }

    def _observe(self, layer: int, view: AttentionView, selection: Selection | None) -> None:
        budget, blocks = self._own, view.start // self._own.block_size
        keep = budget.blocks(view.start)
        rows = view.queries.shape[1] // view.groups
        masks = []
        for row in range(rows):
            alone = replace(view, queries=view.queries[:, row * view.groups : (row + 1) * view.groups], tree=None)
            alone = replace(alone, length=view.start + 1) if budget.score == "oracle" else alone
            masks.append(select_blocks(scores(budget, alone), budget, keep).mask(blocks))
        self._masks[layer] = masks[0].flatten().cpu()
        depths = list(range(rows)) if view.tree is None else view.tree.depths.tolist()
        for first in range(rows):
            for second in range(first + 1, rows):
                distance = depths[second] - depths[first]
                apart = view.tree is not None and not view.tree.visible[second, first]
                if apart or distance > self._distances:
                    continue
                shared = (masks[first] & masks[second]).sum() / masks[first].sum()
                self.overlap[layer, distance - 1] += shared.item()
                self.pairs[layer, distance - 1] += 1
        mass = attention_mass(
            view.queries, view.keys, view.start, view.length, budget.block_size, view.groups, view.tree
        )
        outside = 1 - mass.sum(-1).mean().item()
        best = select_blocks(mass.mean(1), self._best, keep).mask(blocks)
        chosen = torch.ones_like(best) if selection is None else selection.mask(blocks)
        chosen[:, view.tail_start // budget.block_size :] = True
        self.recall[layer] += outside + (mass * chosen[:, None]).sum(-1).mean().item()
        self.oracle[layer] += outside + (mass * best[:, None]).sum(-1).mean().item()
        self.observed[layer] += 1

    def _compare_layers(self) -> None:
        """Jaccard similarity between the layers of the step that has ended."""
        if len(self._masks) > 1:
            numbers = sorted(self._masks)
            masks = torch.stack([self._masks[layer] for layer in numbers]).float()
            both = masks @ masks.T
            sizes = both.diagonal()
            index = torch.tensor(numbers)
            self.similarity[index[:, None], index[None]] += both / (sizes[:, None] + sizes[None] - both)
            self.compared[index[:, None], index[None]] += 1
            self.steps += 1
        self._masks = {}


def _plain(values: Tensor) -> Any:
    """Nested lists with four decimals, None for what is not a number."""
    if values.dim() > 1:
        return [_plain(row) for row in values]
    return [None if value != value else round(value, 4) for value in values.tolist()]
