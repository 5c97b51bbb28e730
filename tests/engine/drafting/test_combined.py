"""Two drafters as one."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harness.engine.drafting.base import Drafter, NoDrafter
from harness.engine.drafting.combined import CombinedDrafter, MatchingDrafter, joined
from harness.engine.drafting.draft import Draft
from harness.engine.drafting.expansion import Growth
from harness.engine.drafting.lookup import LookupDrafter
from harness.engine.drafting.suffix import SuffixDrafter


class Recorder:
    """Proposes what it was made with and remembers what it was told."""

    def __init__(self, tokens: Sequence[int], match: int = 0) -> None:
        self.tokens, self.match = tokens, match
        self.told: list[tuple[object, ...]] = []

    def reset(self, prompt: Sequence[int], features: Tensor | None = None, seed: int = 0) -> None:
        self.told.append(("reset", prompt, features, seed))

    def observe(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        self.told.append(("observe", tokens, features))

    def propose(self, limit: int) -> Draft:
        self.told.append(("propose", limit))
        return Draft.chain(self.tokens[:limit])


@pytest.mark.parametrize(
    "first, match, second, expected, asked",
    [
        ([1, 2], 3, [8, 9], (1, 2), False),
        ([1, 2], 2, [8, 9], (8, 9), True),
        ([], 5, [8, 9], (8, 9), True),
        ([1, 2], 2, [], (1, 2), True),
        ([], 0, [], (), True),
    ],
)
def test_the_second_is_asked_where_the_match_is_short(
    first: list[int], match: int, second: list[int], expected: tuple[int, ...], asked: bool
) -> None:
    cheap, model = Recorder(first, match), Recorder(second)
    assert CombinedDrafter(cheap, model, 3).propose(4).tokens == expected
    assert cheap.told == [("propose", 4)] and model.told == ([("propose", 4)] if asked else [])


@given(
    seeds=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), sizes=st.tuples(st.integers(0, 9), st.integers(0, 9))
)
def test_joined_drafts_have_the_paths_of_both_once(seeds: tuple[int, int], sizes: tuple[int, int]) -> None:
    def draft(seed: int, size: int) -> Draft:
        """A random tree over four tokens, siblings different."""
        random, used, tokens, parents = Random(seed), set[tuple[int, int]](), [], []
        while len(tokens) < size:
            edge = (random.randint(-1, len(tokens) - 1), random.randint(0, 3))
            if edge not in used:
                used.add(edge)
                parents.append(edge[0])
                tokens.append(edge[1])
        return Draft(tuple(tokens), tuple(parents), tuple(random.random() for _ in tokens))

    def paths(draft: Draft) -> dict[tuple[int, ...], float]:
        found: list[tuple[int, ...]] = []
        for token, parent in zip(draft.tokens, draft.parents, strict=True):
            found.append((*(found[parent] if parent >= 0 else ()), token))
        return dict(zip(found, draft.confidence, strict=True))

    first, second = (draft(seed, size) for seed, size in zip(seeds, sizes, strict=True))
    both, one, other = paths(joined(first, second)), paths(first), paths(second)
    assert len(both) == len(joined(first, second)) and set(both) == set(one) | set(other)
    assert all(both[path] == max(one.get(path, 0), other.get(path, 0)) for path in both)


def test_drawn_and_forced_drafts_are_not_joined() -> None:
    chain = Draft.chain([1, 2])
    for other in (replace(chain, proposals=torch.ones(3, 4)), replace(chain, forced=((0,), 2))):
        with pytest.raises(ValueError, match="joined"):
            joined(chain, other)


def test_a_short_match_joins_and_a_long_one_does_not() -> None:
    assert CombinedDrafter(Recorder([1, 2], 1), Recorder([1, 9]), 3, join=True).propose(4).tokens == (1, 2, 9)
    assert CombinedDrafter(Recorder([1, 2], 3), Recorder([1, 9]), 3, join=True).propose(4).tokens == (1, 2)


def test_both_see_everything() -> None:
    cheap, model, features = Recorder([1], 9), Recorder([2]), torch.zeros(1, 4)
    drafter = CombinedDrafter(cheap, model, 1)
    drafter.reset((3, 4), features, 11)
    drafter.observe([5], features)
    assert cheap.told == model.told == [("reset", (3, 4), features, 11), ("observe", [5], features)]


@pytest.mark.parametrize("first", [LookupDrafter(Growth(4), 3), SuffixDrafter(Growth(4), 8, 2.0)])
def test_it_stands_on_real_matches(first: MatchingDrafter) -> None:
    drafter: Drafter = CombinedDrafter(first, Recorder([7, 7]), 2)
    drafter.reset([1, 2, 3, 4, 1])
    assert drafter.propose(4).tokens == (7, 7), "a match of one token is too short"
    drafter.observe([2])
    assert drafter.propose(4).tokens == (3, 4, 1, 2)
    drafter.observe([9])
    assert drafter.propose(4).tokens == (7, 7)
    assert drafter.propose(0).tokens == ()


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="min_match"):
        CombinedDrafter(LookupDrafter(Growth(4), 3), NoDrafter(), 0)
