"""Greedy acceptance, and no drafter at all."""

import pytest

from harness.engine.acceptance import accept_greedy
from harness.engine.drafting.base import NoDrafter
from harness.engine.drafting.draft import Draft


@pytest.mark.parametrize(
    "draft, choices, kept",
    [([], [7], [7]), ([1, 2], [1, 2, 3], [1, 2, 3]), ([1, 2], [9, 2, 3], [9]), ([1, 2, 3], [1, 5, 3, 4], [1, 5])],
)
def test_greedy_acceptance_keeps_the_common_start_and_one_more(
    draft: list[int], choices: list[int], kept: list[int]
) -> None:
    chain = Draft.chain(draft)
    assert accept_greedy(chain, choices).tokens(chain) == kept


def test_greedy_acceptance_needs_one_choice_more_than_drafts() -> None:
    with pytest.raises(ValueError, match="opinions"):
        accept_greedy(Draft.chain([1, 2]), [1, 2])


def test_no_drafter_proposes_nothing() -> None:
    drafter = NoDrafter()
    drafter.reset([1, 1, 1])
    drafter.observe([1])
    assert len(drafter.propose(5)) == 0
