"""Acceptance rules: pure functions from a draft and the target's opinion to the tokens that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

import torch
from torch import Tensor

from harness.engine.drafting.draft import Draft


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a step keeps.

    Attributes:
        path: accepted draft tokens by their numbers, the root's child first; may be empty.
        bonus: the token after them, the target's own.
    """

    path: tuple[int, ...]
    bonus: int

    def tokens(self, draft: Draft) -> list[int]:
        """The new tokens: accepted ones and the bonus token, 1 + len(path)."""
        return [*(draft.tokens[node] for node in self.path), self.bonus]


class Rule(Protocol):
    """How a target's logits become accepted tokens."""

    def judge(self, logits: Tensor) -> Any:
        """What :meth:`accept` needs of logits [tokens, vocab], in one pass for all sequences; sliced by token."""

    def accept(self, draft: Draft, judged: Any, random: Random) -> Accepted:
        """What is kept of ``draft``.

        Args:
            draft: may be empty.
            judged: the slice of the root and the draft, 1 + len(draft) tokens.
            random: of the sequence; two decodes with the same state draw alike.
        """


class Greedy:
    """The most probable token at every position."""

    def judge(self, logits: Tensor) -> list[int]:
        """The target's greedy choices."""
        choices: list[int] = logits.max(-1).indices.tolist()  # several times faster than argmax in bf16
        return choices

    def accept(self, draft: Draft, judged: Sequence[int], random: Random) -> Accepted:
        """:func:`accept_greedy`; draws nothing."""
        return accept_greedy(draft, judged)


def accept_greedy(draft: Draft, choices: Sequence[int]) -> Accepted:
    """Follow the draft as long as a child equals the target's greedy choice, then add the target's own next token.

    Args:
        draft: may be empty.
        choices: the target's greedy tokens after the root and after each draft token, 1 + len(draft) of them.

    Returns:
        Between 1 and 1 + depth new tokens (METHOD section 1).

    Raises:
        ValueError: ``choices`` does not have one token more than ``draft``.
    """
    check_opinions(draft, len(choices))
    path: list[int] = []
    place = -1
    for node, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
        if parent == place and token == choices[place + 1]:
            path.append(node)
            place = node
    return Accepted(tuple(path), choices[place + 1])


def check_opinions(draft: Draft, opinions: int) -> None:
    """Refuse opinions that do not belong to a draft: there is one for the root and one for each token.

    Raises:
        ValueError: another number.
    """
    if opinions != len(draft) + 1:
        raise ValueError(f"{len(draft)} draft tokens need {len(draft) + 1} opinions of the target, got {opinions}")


def chances_of(draft: Draft, rows: Tensor) -> list[float]:
    """Of each draft token its probability after its parent, in one transfer.

    Args:
        draft: at least one token.
        rows: [1 + len(draft), vocab]: the distributions after the root and after each token.
    """
    vocab = rows.shape[1]
    places = [(parent + 1) * vocab + token for token, parent in zip(draft.tokens, draft.parents, strict=True)]
    chances: list[float] = rows.take(torch.tensor(places, device=rows.device)).tolist()
    return chances
