"""Draft trees by top-k expansion under a total budget, as EAGLE-2 grows them (arXiv 2406.16858)."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from random import Random
from typing import Protocol

import torch
from torch import Tensor

from harness.engine.drafting.draft import Draft


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


def room(growth: Growth) -> int:
    """Positions that :func:`grow` may run through a draft model in one draft: the root, and what grows on below it."""
    return 1 + growth.topk * (growth.depth - 1)


def grow(
    growth: Growth,
    root: Tensor,
    extend: Extend,
    limit: int,
    *,
    random: Random | None = None,
    pace: Pace | None = None,
) -> Draft:
    """Draft below a sequence, level by level (EAGLE-2, arXiv 2406.16858); a chain where ``growth.topk`` is one.

    Chosen tokens: each growing token gets its ``topk`` most probable children; the ``topk`` candidates of the level
    with the highest survival (product of the confidences on the path) grow on; at the end the ``growth.size``
    candidates with the highest survival stay, older ones first where it ties. A parent is older than its child and
    survives no less, so what stays is a tree. A candidate that already has ``size`` better ones is dropped at once:
    neither it nor anything below it could stay, so it need not run.

    Drawn tokens, and why their verification stays lossless: each child is drawn from its parent's distribution without
    the children before it; how many children a token gets is decided from tokens of earlier levels only; a drawn token
    is never dropped. Let V be the expectation of any function of the final text if the draft so far were verified as it
    stands and the target went on alone. One more child of a node changes what happens only where the node is reached
    and its other children are rejected; the rejection rule turns a child drawn from what is left of the proposal into a
    token drawn from what is left of the target. So each draw leaves V as it is on average, whatever was decided before
    it, and at first V is the target's own. Ranking drawn siblings by probability would break this, since those that
    stay were not drawn from the proposal. So the places of a level, an even share of those left, are dealt before they
    are filled: a parent's n-th child stands in the queue with the parent's survival times the n-th largest probability.

    Args:
        growth: limits.
        root: [vocab], fp32: distribution after the sequence.
        extend: runs the tokens that grow on; its numbers count the tokens run so far. Not called for the last level.
        limit: tokens on a path at most, besides ``growth.depth``; nothing is drafted below one.
        random: draws tokens; None chooses the most probable ones.
        pace: refuses tokens that are not worth their place: chosen ones by their survival; drawn ones before they are
            drawn, by the product that orders the queue. A level without new tokens ends the growth.

    Returns:
        Tokens level by level, siblings by probability or in the order of drawing; none has a probability of zero.
        Confidences are the probabilities given by ``root`` and ``extend``; ``proposals`` only where tokens were drawn.
    """
    depth = min(growth.depth, growth.size, limit)
    plan: _Plan = _Chosen(growth, pace) if random is None else _Drawn(growth, pace, random, root.device)
    growing, distributions, run = [_ROOT], root[None], 0
    for levels in range(depth, 0, -1):
        born = plan.children(growing, distributions, levels)
        if levels == 1 or not born:
            break
        growing = sorted(born, key=_rank)[: growth.topk]
        for node in growing:
            node.run, run = run, run + 1
        distributions = extend(
            [node.run for node in growing],
            [node.token for node in growing],
            [node.parent.run for node in growing],
        )
    return plan.draft()


class _Node:
    """A token of a growing draft.

    Attributes:
        token: its id.
        parent: the token before it; the root is its own.
        confidence: its probability after its parent.
        survival: product of the confidences on its path.
        number: among all tokens of the growing draft, by age; -1 for the root.
        run: among those that were run; -1 for the root.
    """

    __slots__ = ("confidence", "number", "parent", "run", "survival", "token")

    def __init__(self, token: int, parent: _Node | None, confidence: float) -> None:
        self.token = token
        self.parent = self if parent is None else parent
        self.confidence = min(confidence, 1.0)
        self.survival: float = self.confidence if parent is None else parent.survival * self.confidence
        self.number = self.run = -1


_ROOT = _Node(-1, None, 1.0)


def _rank(node: _Node) -> tuple[float, int]:
    """Sorts by survival, the highest first, older ones first where it ties."""
    return -node.survival, node.number


class _Plan(Protocol):
    """Which tokens join a growing draft."""

    def children(self, parents: list[_Node], distributions: Tensor, levels: int) -> list[_Node]:
        """New tokens by age, below ``parents``, whose distributions are [parents, vocab].

        Args:
            levels: still to grow, this one included.
        """

    def draft(self) -> Draft:
        """What was grown."""


class _Chosen:
    """The most probable tokens."""

    def __init__(self, growth: Growth, pace: Pace | None) -> None:
        self._growth = growth
        self._pace = pace
        self._nodes: list[_Node] = []
        self._best: list[float] = []

    def children(self, parents: list[_Node], distributions: Tensor, levels: int) -> list[_Node]:
        """The ``topk`` most probable children of each parent that are among the best so far."""
        top = distributions.topk(min(self._growth.topk, distributions.shape[-1]))
        tokens, chances = torch.stack((top.indices.double(), top.values.double())).tolist()
        found = [
            _Node(int(token), parent, chance)
            for parent, *own in zip(parents, tokens, chances, strict=True)
            for token, chance in zip(*own, strict=True)
            if chance > 0
        ]
        order = sorted(range(len(found)), key=lambda place: -found[place].survival)
        joining = list(takewhile(lambda place: self._joins(found[place].survival), order))
        born = [found[place] for place in sorted(joining)]
        for node in born:
            node.number = len(self._nodes)
            self._nodes.append(node)
        return born

    def _joins(self, survival: float) -> bool:
        """Whether a candidate is among the best so far and worth its place; if so it takes it."""
        full = len(self._best) == self._growth.size
        if full and survival <= self._best[0]:
            return False
        others = self._best[1:] if full else self._best
        if self._pace is not None and not self._pace.goes_on(survival, sum(others), len(others)):
            return False
        insort(others, survival)
        self._best = others
        return True

    def draft(self) -> Draft:
        """The best of what was grown."""
        kept = sorted(sorted(self._nodes, key=_rank)[: self._growth.size], key=lambda node: node.number)
        places = {node.number: place for place, node in enumerate(kept)}
        return Draft(
            tuple(node.token for node in kept),
            tuple(places.get(node.parent.number, -1) for node in kept),
            tuple(node.confidence for node in kept),
        )


class _Drawn:
    """Tokens drawn without putting back, in places that were dealt before."""

    def __init__(self, growth: Growth, pace: Pace | None, random: Random, device: torch.device) -> None:
        self._growth = growth
        self._pace = pace
        self._nodes: list[_Node] = []
        self._rows: list[int] = []
        self._distributions: list[Tensor] = []
        self._generator = torch.Generator(device).manual_seed(random.getrandbits(63))

    def children(self, parents: list[_Node], distributions: Tensor, levels: int) -> list[_Node]:
        """As many drawn children of each parent as it was dealt places."""
        places = -(-(self._growth.size - len(self._nodes)) // levels)
        most = min(self._growth.topk, places, distributions.shape[-1])
        largest = distributions.topk(most).values.double()
        tokens, chances, estimates = torch.stack((*self._draw(distributions, most), largest)).tolist()
        dealt = self._deal(parents, estimates, places)
        born = [
            _Node(int(tokens[row][place]), parent, chances[row][place])
            for row, parent in enumerate(parents)
            for place in range(dealt[row])
        ]
        for node in born:
            node.number = len(self._nodes)
            self._nodes.append(node)
        self._rows.extend(1 + parent.number for parent in parents)
        self._distributions.append(distributions)
        return born

    def _draw(self, distributions: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """``count`` tokens of each row in their order of drawing, and their probabilities, [rows, count], fp64.

        Exponential clocks with the probabilities as rates run a race: the order in which they ring is that of draws
        without putting back.
        """
        size, device = distributions.shape, distributions.device
        uniform = torch.rand(size, dtype=torch.float64, device=device, generator=self._generator)
        tokens = (distributions / uniform.log_()).topk(count, largest=False).indices
        return tokens.double(), distributions.gather(-1, tokens).double()

    def _deal(self, parents: list[_Node], estimates: list[list[float]], places: int) -> list[int]:
        """How many children each parent gets; ``estimates`` are its largest probabilities in descending order."""
        queue = [
            (parent.survival * estimate, row)
            for row, parent in enumerate(parents)
            for estimate in estimates[row]
            if estimate > 0
        ]
        queue.sort(key=lambda offer: -offer[0])
        dealt, expected = [0] * len(parents), sum(node.survival for node in self._nodes)
        for size, (survival, row) in enumerate(queue[:places], start=len(self._nodes)):
            if self._pace is not None and not self._pace.goes_on(survival, expected, size):
                break
            dealt[row] += 1
            expected += survival
        return dealt

    def draft(self) -> Draft:
        """What was grown, and the distributions it was drawn from."""
        proposals = None
        if self._distributions:
            grown = torch.cat(self._distributions)
            proposals = grown.new_zeros(1 + len(self._nodes), grown.shape[-1])
            proposals[self._rows] = grown
        return Draft(
            tuple(node.token for node in self._nodes),
            tuple(node.parent.number for node in self._nodes),
            tuple(node.confidence for node in self._nodes),
            proposals,
        )
