"""How the tokens of one step stand to each other when a draft branches (METHOD sections 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


class Tree:
    """A step's tokens as a tree: the root, which is the last accepted token, and the draft below it.

    A chain needs none: where a tree is optional, None stands for a chain.

    Args:
        parents: of each draft token, the number of its parent among the draft tokens, -1 for the root; parents stand
            before their children.
        device: of the tensors.

    Attributes:
        depth: tokens on the longest path below the root.
        depths: [1 + draft tokens], int64: distance from the root, which is token 0.
        visible: [1 + draft tokens] squared, bool: whether a token (row) sees another (column): its ancestors and
            itself.

    Raises:
        ValueError: a parent does not stand before its child.
    """

    __slots__ = ("_masks", "depth", "depths", "visible")

    def __init__(self, parents: Sequence[int], device: torch.device | str = "cpu") -> None:
        depths, seen = [0], [[0]]
        for node, parent in enumerate(parents):
            if not -1 <= parent < node:
                raise ValueError(f"draft token {node} has the parent {parent}, which does not stand before it")
            depths.append(depths[parent + 1] + 1)
            seen.append([*seen[parent + 1], node + 1])
        size, self.depth = len(depths), max(depths)
        pairs = torch.tensor([row * size + column for row, columns in enumerate(seen) for column in columns])
        visible = torch.zeros(size * size, dtype=torch.bool)
        visible[pairs] = True
        self.depths = torch.tensor(depths, device=device)
        self.visible = visible.view(size, size).to(device)
        self._masks: dict[tuple[int, torch.dtype], Tensor] = {}

    def mask(self, groups: int, dtype: torch.dtype) -> Tensor:
        """Additive mask [rows * groups, rows] of the step's own tokens, 0 where visible and -inf elsewhere.

        Args:
            groups: query heads per KV head; those of a row stand together.
            dtype: of the scores that it is added to.
        """
        found = self._masks.get((groups, dtype))
        if found is None:
            hidden = torch.zeros(self.visible.shape, dtype=dtype, device=self.visible.device)
            hidden.masked_fill_(~self.visible, float("-inf"))
            found = self._masks[groups, dtype] = hidden.repeat_interleave(groups, dim=0)
        return found


def survival_weights(rows: int, survival: float, device: torch.device, tree: Tree | None = None) -> Tensor:
    """How much each token of a step counts in a weighted choice: [rows], fp32, they sum to 1.

    Args:
        rows: tokens of the step, the root first.
        survival: chance that one more draft token is accepted; a token at depth n counts survival ** n.
        device: of the result.
        tree: of the step; None for a chain.
    """
    if tree is None:
        return _chain_weights(rows, survival, device)
    weights = torch.pow(survival, tree.depths.to(torch.float64))
    return (weights / weights.sum()).to(torch.float32)


@lru_cache(maxsize=64)
def _chain_weights(rows: int, survival: float, device: torch.device) -> Tensor:
    weights = torch.pow(survival, torch.arange(rows, device=device, dtype=torch.float64))
    return (weights / weights.sum()).to(torch.float32)
