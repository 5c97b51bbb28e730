"""A draft: proposed tokens as a chain or a tree below the last accepted token (METHOD section 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse.tree import Tree


@dataclass(frozen=True, slots=True)
class Draft:
    """Proposed tokens; parents stand before their children, and the children of a node are tried in their order.

    Attributes:
        tokens: token ids; siblings differ.
        parents: of each token, the number of the token before it, -1 for the root.
        confidence: of each token, the drafter's own estimate of the chance that it is accepted once its parent is;
            between 0 and 1.
        proposals: [1 + tokens, vocab], fp32: row 0 belongs to the root, row n + 1 to token n. The distribution from
            which the children of that node were drawn one after the other, without putting back; rows of nodes without
            children are not read. None where tokens were chosen, not drawn.
        forced: path and bonus token that a step keeps whatever the target says: a simulated acceptance, for studies of
            speed; None for a real draft.

    Raises:
        ValueError: the lengths differ.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    confidence: tuple[float, ...] = ()
    proposals: Tensor | None = None
    forced: tuple[tuple[int, ...], int] | None = None

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.parents) == len(self.confidence):
            raise ValueError(f"{len(self.tokens)} tokens, {len(self.parents)} parents, {len(self.confidence)} chances")

    @classmethod
    def chain(
        cls, tokens: Sequence[int], confidence: Sequence[float] | float = 1.0, proposals: Tensor | None = None
    ) -> Draft:
        """Tokens that follow one another; ``confidence`` per token or for all of them."""
        chances = [confidence] * len(tokens) if isinstance(confidence, float) else confidence
        return cls(tuple(tokens), tuple(range(-1, len(tokens) - 1)), tuple(chances), proposals)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether every token follows the one before it."""
        return self.parents == tuple(range(-1, len(self.tokens) - 1))

    @property
    def depth(self) -> int:
        """Tokens on the longest path."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return max(depths, default=0)

    def tree(self, device: torch.device | str = "cpu") -> Tree | None:
        """The step's tokens, root first, as a tree; None for a chain."""
        return None if self.is_chain else Tree(self.parents, device)

    def children(self) -> list[list[int]]:
        """[1 + tokens]: the children of the root, then of each token, in the order in which they are tried."""
        found: list[list[int]] = [[] for _ in range(len(self.tokens) + 1)]
        for node, parent in enumerate(self.parents):
            found[parent + 1].append(node)
        return found
