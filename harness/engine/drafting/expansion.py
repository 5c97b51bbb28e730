"""Draft trees by top-k expansion under a total budget, as EAGLE-2 grows them (arXiv 2406.16858)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Growth:
    """How far drafts grow.

    Attributes:
        depth: tokens on a path at most.
        topk: children of a token at most, and tokens of a level that grow on; 1 makes chains.
        total: tokens of a draft at most.

    Raises:
        ValueError: a value below one.
    """

    depth: int
    topk: int = 1
    total: int | None = None

    def __post_init__(self) -> None:
        if min(self.depth, self.topk, self.size) < 1:
            raise ValueError(f"depth={self.depth}, topk={self.topk} and total={self.total} must be at least 1")

    @property
    def size(self) -> int:
        """Tokens of a draft at most; ``depth * topk`` where ``total`` is None."""
        return self.depth * self.topk if self.total is None else self.total


class Pace(Protocol):
    """When drafting more does not pay (adaptive draft length)."""

    def goes_on(self, survival: float, expected: float, size: int) -> bool:
        """Whether a token is worth its place in the draft.

        Args:
            survival: chance that it is accepted: the product of the confidences on its path.
            expected: expected accepted tokens of the draft without it.
            size: tokens of the draft without it.
        """


Extend = Callable[[Sequence[int], Sequence[int], Sequence[int]], Tensor]
"""Runs new tokens through the draft model: their own numbers, their tokens, their parents' numbers (-1 for the root);
gives the distribution after each of them, [n, vocab], fp32."""
