"""Prompt lookup against brute force."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.engine.drafting.draft import Draft
from harness.engine.drafting.expansion import Growth
from harness.engine.drafting.lookup import LookupDrafter, Odds
from harness.engine.drafting.pace import ConfidencePace, prune

PROMPT = st.lists(st.integers(0, 4), max_size=30)
OUTPUT = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), max_size=8)


def proposed(drafter: LookupDrafter, limit: int) -> list[int]:
    draft = drafter.propose(limit)
    assert draft.is_chain
    return list(draft.tokens)


def occurrences(tokens: list[int], k: int, max_ngram: int) -> list[tuple[int, tuple[int, ...]]]:
    """By scanning: every earlier occurrence of every suffix, longest first, then latest first.

    Each by its size and the ``k`` tokens behind it, where copies run on into themselves.
    """
    found = []
    for size in range(min(max_ngram, len(tokens)), 0, -1):
        suffix = tokens[len(tokens) - size :]
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == suffix:
                grown = list(tokens)
                for offset in range(k):
                    grown.append(grown[end + offset])
                found.append((size, tuple(grown[len(tokens) :])))
    return found


@given(prompt=PROMPT, output=OUTPUT, k=st.integers(1, 5), max_ngram=st.integers(1, 4))
def test_a_chain_equals_a_scan(prompt: list[int], output: list[list[int]], k: int, max_ngram: int) -> None:
    drafter = LookupDrafter(Growth(k), max_ngram)
    for _ in range(2):  # the second time from the kept index of the same prompt
        drafter.reset(prompt)
        tokens = list(prompt)
        for new in [[], *output]:
            drafter.observe(new)
            tokens += new
            size, expected = next(iter(occurrences(tokens, k, max_ngram)), (0, ()))
            assert proposed(drafter, k) == list(expected)
            assert drafter.match == size


def paths_of(draft: Draft) -> list[tuple[int, ...]]:
    """Of each token, the tokens from the root's child to it."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


@given(prompt=PROMPT, output=OUTPUT, k=st.integers(1, 4), topk=st.integers(2, 4), max_ngram=st.integers(1, 3))
def test_a_tree_merges_the_continuations_of_a_scan(
    prompt: list[int], output: list[list[int]], k: int, topk: int, max_ngram: int
) -> None:
    """Of each n-gram the ``2 * topk`` latest occurrences are looked at."""
    drafter = LookupDrafter(Growth(k, topk), max_ngram)
    drafter.reset(prompt)
    tokens = list(prompt)
    for new in [[], *output]:
        drafter.observe(new)
        tokens += new
        seen = Counter[int]()
        expected: list[tuple[int, ...]] = []
        for size, path in occurrences(tokens, k, max_ngram):
            seen[size] += 1
            fresh = seen[size] <= 2 * topk and path not in expected
            expected += [path] if fresh and len(expected) < topk else []
        draft = drafter.propose(k)
        paths = paths_of(draft)
        assert [path for path in paths if len(path) == k] == expected
        assert len(paths) == len(set(paths)) == len({path[:n] for path in expected for n in range(1, k + 1)})


@given(prompt=PROMPT, depth=st.integers(1, 4), topk=st.integers(1, 4), total=st.integers(1, 6), data=st.data())
def test_a_draft_keeps_to_its_limits(prompt: list[int], depth: int, topk: int, total: int, data: st.DataObject) -> None:
    least, limit = data.draw(st.floats(0, 1)), data.draw(st.integers(0, 5))
    whole = LookupDrafter(Growth(depth, topk), 3)
    small = LookupDrafter(Growth(depth, topk, total), 3, ConfidencePace(least))
    whole.reset(prompt)
    small.reset(prompt)
    draft = small.propose(limit)
    assert draft == prune(whole.propose(limit), ConfidencePace(least), total)
    assert len(draft) <= total and draft.depth <= min(depth, limit)


def test_the_limit_is_kept_and_another_prompt_forgotten() -> None:
    drafter = LookupDrafter(Growth(4), 2)
    drafter.reset([1, 2, 3, 4, 5, 1, 2])
    assert proposed(drafter, 9) == [3, 4, 5, 1] and proposed(drafter, 2) == [3, 4] and proposed(drafter, 0) == []
    assert drafter.match == 0
    drafter.reset([7, 8])
    assert proposed(drafter, 4) == []


def test_longer_ngrams_stand_before_shorter_ones_and_later_ones_first() -> None:
    drafter = LookupDrafter(Growth(2, 3), 2)
    drafter.reset([1, 2, 50, 51, 1, 2, 60, 61, 9, 2, 70, 71, 1, 2])
    draft = drafter.propose(2)
    assert [draft.tokens[node] for node in draft.children()[0]] == [60, 50, 70]
    assert paths_of(draft) == [(60,), (60, 61), (50,), (50, 51), (70,), (70, 71)]


def test_confidence_counts_the_own_proposals_and_is_forgotten() -> None:
    drafter = LookupDrafter(Growth(2), 2)
    text = [1, 2, 3, 4, 1, 2]
    drafter.reset(text)
    assert drafter.propose(2).confidence == (2 / 4, 3 / 5), "two tokens agree before the first, three before the second"
    drafter.observe([3, 9])  # the first one right, the second one wrong
    drafter.observe([1, 2])
    assert drafter.propose(2).confidence == (3 / 5, 3 / 6)
    drafter.observe([8])  # the first one wrong, the second one never tried
    drafter.observe([1, 2])
    assert drafter.propose(2).confidence == (3 / 6, 3 / 6)
    drafter.reset(text)
    assert drafter.propose(2).confidence == (2 / 4, 3 / 5)


def test_odds_settle_siblings_apart_and_only_below_accepted_parents() -> None:
    odds = Odds()
    draft = odds.rate([5, 6, 7, 8], [-1, -1, 0, 1], [3, 2, 4, 3])
    assert draft.confidence == (3 / 5, 1 / 10, 4 / 6, 3 / 5)
    odds.settle([6, 9])
    odds.settle([8])  # a draft is settled once
    again = odds.rate([5, 6, 7, 8], [-1, -1, 0, 1], [3, 2, 4, 3])
    assert again.confidence == (3 / 7, 2 / 11, 4 / 6, 3 / 7)


@given(rights=st.lists(st.booleans(), min_size=1, max_size=40))
def test_odds_tend_to_the_share_that_was_right(rights: list[bool]) -> None:
    odds, chances = Odds(), []
    for right in rights:
        chances.append(odds.rate([1], [-1], [1]).confidence[0])
        odds.settle([1 if right else 2])
    for right, (before, after) in zip(rights, pairwise(chances), strict=False):
        assert (after > before) == right
    end = odds.rate([1], [-1], [1]).confidence[0]
    assert end == pytest.approx((sum(rights) + 1) / (len(rights) + 3), rel=1e-12)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="max_ngram"):
        LookupDrafter(Growth(3), 0)
