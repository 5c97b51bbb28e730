"""Acceptance and prompt lookup against brute force."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.engine.acceptance import accept_greedy
from harness.engine.drafting.base import NoDrafter
from harness.engine.drafting.draft import Draft
from harness.engine.drafting.lookup import LookupDrafter


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


def proposed(drafter: LookupDrafter, limit: int) -> list[int]:
    draft = drafter.propose(limit)
    assert draft.is_chain
    return list(draft.tokens)


def brute_force(tokens: list[int], k: int, max_ngram: int) -> list[int]:
    """Latest earlier occurrence of the longest suffix by scanning; copies run on into themselves."""
    for size in range(min(max_ngram, len(tokens)), 0, -1):
        suffix = tokens[len(tokens) - size :]
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == suffix:
                grown = list(tokens)
                for offset in range(k):
                    grown.append(grown[end + offset])
                return grown[len(tokens) :]
    return []


@given(
    prompt=st.lists(st.integers(0, 4), max_size=30),
    output=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), max_size=8),
    k=st.integers(1, 5),
    max_ngram=st.integers(1, 4),
)
def test_lookup_equals_a_scan(prompt: list[int], output: list[list[int]], k: int, max_ngram: int) -> None:
    drafter = LookupDrafter(k, max_ngram)
    for _ in range(2):  # the second time from the kept index of the same prompt
        drafter.reset(prompt)
        tokens = list(prompt)
        assert proposed(drafter, k) == brute_force(tokens, k, max_ngram)
        for new in output:
            drafter.observe(new)
            tokens += new
            assert proposed(drafter, k) == brute_force(tokens, k, max_ngram)


def test_lookup_respects_the_limit_and_forgets_another_prompt() -> None:
    drafter = LookupDrafter(4, 2)
    drafter.reset([1, 2, 3, 4, 5, 1, 2])
    assert proposed(drafter, 9) == [3, 4, 5, 1] and proposed(drafter, 2) == [3, 4] and proposed(drafter, 0) == []
    drafter.reset([7, 8])
    assert proposed(drafter, 4) == []


def test_no_drafter_proposes_nothing() -> None:
    drafter = NoDrafter()
    drafter.reset([1, 1, 1])
    drafter.observe([1])
    assert len(drafter.propose(5)) == 0


def test_lookup_refuses_nonsense() -> None:
    for k, max_ngram in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            LookupDrafter(k, max_ngram)
