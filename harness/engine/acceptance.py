"""Acceptance rules: pure functions from a draft and the target's opinion to the tokens that are kept."""

from __future__ import annotations

from collections.abc import Sequence


def accept_greedy(draft: Sequence[int], choices: Sequence[int]) -> list[int]:
    """Keep the draft as long as it equals the target's greedy choices, then add the target's own next token.

    Args:
        draft: proposed tokens, d_1 .. d_n; may be empty.
        choices: the target's greedy tokens after the root and after each draft token, n + 1 of them.

    Returns:
        Accepted draft tokens and one bonus token: between 1 and n + 1 tokens (METHOD section 1).

    Raises:
        ValueError: ``choices`` does not have one token more than ``draft``.
    """
    if len(choices) != len(draft) + 1:
        raise ValueError(f"{len(draft)} draft tokens need {len(draft) + 1} choices, got {len(choices)}")
    accepted = 0
    while accepted < len(draft) and draft[accepted] == choices[accepted]:
        accepted += 1
    return list(choices[: accepted + 1])
