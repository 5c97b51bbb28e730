"""A drafter that knows the continuation and is right as often as asked: speed at any acceptance length."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from torch import Tensor

from harness.engine.drafting.draft import Draft
from harness.engine.drafting.expansion import Growth


class OracleDrafter:
    """Replays a known continuation with a chosen chance of being right.

    Each token of one path is right with probability ``acceptance`` once those before it are; after a wrong one the
    rest is wrong too. So a chain of ``d`` tokens yields (1 - acceptance ** (d + 1)) / (1 - acceptance) tokens a step on
    average, the bonus token included. In a tree all other paths are wrong, and the right one has no fixed place among
    them, so that keeping it costs what it costs in a real tree.

    Tokens are proposed by their place in the continuation: a sequence that has left it, as one verified sparsely may,
    gets wrong ones, unless acceptance is forced. The continuation's last token is never proposed: it is left as the
    bonus token.

    Args:
        growth: shape of the drafts: a path of ``depth`` tokens; where ``topk`` is above 1, the other tokens up to
            ``size`` are spread evenly over the levels.
        acceptance: chance that a token is right, between 0 and 1.
        vocab: tokens of the vocabulary, from which wrong ones are drawn.
        forced: steps keep the right path and the continuation's next token whatever the target says, so that the
            acceptance length is as chosen under any sparsity, on random weights too.

    Raises:
        ValueError: acceptance is not between 0 and 1, or the vocabulary has no ``topk`` wrong tokens.
    """

    def __init__(self, growth: Growth, acceptance: float, vocab: int, forced: bool) -> None:
        if not 0 <= acceptance <= 1:
            raise ValueError(f"acceptance={acceptance} must lie between 0 and 1")
        if vocab <= growth.topk:
            raise ValueError(f"vocab={vocab} must be above topk={growth.topk}: siblings differ and may all be wrong")
        self._growth = growth
        self._acceptance = acceptance
        self._vocab = vocab
        self._forced = forced
        self._continuation: tuple[int, ...] = ()
        self._seen = 0
        self._random = Random(0)

    def expect(self, continuation: Sequence[int]) -> None:
        """What follows the prompt, the prefill's token first; of every sequence from now on."""
        self._continuation = tuple(continuation)

    def reset(self, prompt: Sequence[int], features: Tensor | None = None, seed: int = 0) -> None:
        """Start at the beginning of the continuation, with the draws of ``seed``."""
        self._seen = 0
        self._random = Random(f"{seed} oracle")

    def observe(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        """Go on in the continuation by as many tokens."""
        self._seen += len(tokens)

    def propose(self, limit: int) -> Draft:
        """The next tokens of the continuation up to a random place, wrong tokens otherwise."""
        rest = self._continuation[self._seen :]
        depth = min(self._growth.depth, self._growth.size, limit, len(rest) - 1)
        right = 0
        while right < depth and self._random.random() < self._acceptance:
            right += 1
        tokens, parents, confidence = list[int](), list[int](), list[float]()
        level, path = [-1], [-1]
        for place, width in enumerate(self._widths(depth)):
            start, main = len(tokens), self._random.randrange(width)
            others = iter(self._parents(level, path[-1], width - 1))
            taken = {path[-1]: {rest[place]}} if place <= right else {}
            for number in range(width):
                parent = path[-1] if number == main else next(others)
                is_right = number == main and place < right
                tokens.append(rest[place] if is_right else self._wrong(taken.setdefault(parent, set())))
                parents.append(parent)
                confidence.append(self._acceptance if number == main else 0.0)
            level = list(range(start, len(tokens)))
            path.append(start + main)
        forced = (tuple(path[1 : right + 1]), rest[right]) if self._forced and rest else None
        return Draft(tuple(tokens), tuple(parents), tuple(confidence), forced=forced)

    def _widths(self, depth: int) -> list[int]:
        """Tokens of each level: one of the main path, the others spread evenly."""
        topk, widths = self._growth.topk, [1] * max(depth, 0)
        left, grew = self._growth.size - len(widths), True
        while left and grew:
            grew = False
            for place, width in enumerate(widths):
                growing = min(topk, widths[place - 1]) if place else 1
                if left and width < topk * growing:
                    widths[place] += 1
                    left -= 1
                    grew = True
        return widths

    def _parents(self, level: list[int], main: int, number: int) -> list[int]:
        """Parents of a level's other tokens: at most ``topk`` tokens of the level before grow, to ``topk`` children."""
        topk = self._growth.topk
        others = [node for node in level if node != main]
        growing = self._random.sample(others, min(topk - 1, len(others)))
        slots = [node for node in growing for _ in range(topk)] + [main] * (topk - 1)
        return self._random.sample(slots, number)

    def _wrong(self, taken: set[int]) -> int:
        """A token that is not in ``taken``; added to it."""
        token = self._random.randrange(self._vocab)
        while token in taken:
            token = self._random.randrange(self._vocab)
        taken.add(token)
        return token
