"""Draft shapes of timed steps: chains and trees by the number of their tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from sparse.tree import Tree

_WIDTH = 10
"""Tokens of a tree's level, as in the 60-token trees of EAGLE-3 (METHOD section 6)."""
_MOST = 64
_FORM = re.compile(r"(chain|tree)?(\d+)")


@dataclass(frozen=True, slots=True)
class DraftShape:
    """What a step verifies.

    Attributes:
        name: as the option has it: ``7``, ``chain16``, ``tree60``.
        rows: tokens of the step, the last accepted one, which is the root, included.
        parents: of each draft token, as :class:`sparse.tree.Tree` takes them; None for a chain.
    """

    name: str
    rows: int
    parents: tuple[int, ...] | None = None

    @property
    def kind(self) -> str:
        """``chain`` or ``tree`` with its depth."""
        return "chain" if self.parents is None else f"tree of depth {Tree(self.parents).depth}"

    def tree(self, device: torch.device) -> Tree | None:
        """The tree on a device; None for a chain."""
        return None if self.parents is None else Tree(self.parents, device)

    def path(self) -> list[int]:
        """Tokens from the root to the deepest leaf, as numbers from 0, the root, on."""
        if self.parents is None:
            return list(range(self.rows))
        depths = Tree(self.parents).depths.tolist()
        token, found = depths.index(max(depths)), []
        while token > 0:
            found.append(token)
            token = self.parents[token - 1] + 1
        return [0, *reversed(found)]


def parse(text: str) -> DraftShape:
    """A shape from ``7`` or ``chain16`` (a chain) or ``tree60`` (ten tokens a level, the first half branch twice).

    Raises:
        ValueError: another text, or more tokens than the operators take.
    """
    form = _FORM.fullmatch(text)
    rows = int(form[2]) if form else 0
    if form is None or not 1 <= rows <= _MOST:
        raise ValueError(f"--drafts={text}: is not a chain (7, chain16) or tree (tree60) of 1 to {_MOST} tokens")
    return DraftShape(text, rows, tree_parents(rows) if form[1] == "tree" and rows > 1 else None)


def tree_parents(rows: int) -> tuple[int, ...]:
    """Parents of a tree of ``rows`` tokens: ten children of the root, then two for each token of a level's first half.

    Args:
        rows: tokens, the root included.
    """
    parents = []
    for node in range(rows - 1):
        level, place = divmod(node, _WIDTH)
        parents.append(-1 if level == 0 else (level - 1) * _WIDTH + place // 2)
    return tuple(parents)
