"""Adaptive draft length: the cost of a step, when to go on, and pruning against brute force."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.engine.drafting.draft import Draft
from harness.engine.drafting.pace import ConfidencePace, GainPace, StepCost, prune


@st.composite
def trees(draw: st.DrawFn, size: int = 8) -> Draft:
    """Draft trees; the tokens are their numbers."""
    count = draw(st.integers(0, size))
    parents = tuple(draw(st.integers(-1, node - 1)) for node in range(count))
    return Draft(tuple(range(count)), parents, tuple(draw(st.floats(0, 1)) for _ in range(count)))


def survivals(draft: Draft) -> list[float]:
    found: list[float] = []
    for parent, confidence in zip(draft.parents, draft.confidence, strict=True):
        found.append(confidence * (found[parent] if parent >= 0 else 1.0))
    return found


def closed(draft: Draft, nodes: tuple[int, ...]) -> bool:
    """Whether every token's parent is there too."""
    return all(draft.parents[node] in (-1, *nodes) for node in nodes)


@given(draft=trees(), fixed=st.floats(0.01, 9), per_token=st.floats(0.001, 3), drafting=st.floats(0, 1))
def test_gain_finds_the_best_draft_of_all(draft: Draft, fixed: float, per_token: float, drafting: float) -> None:
    """No set of tokens with their ancestors gives more expected tokens per second."""
    cost = StepCost(fixed, per_token, drafting)
    chances = survivals(draft)

    def rate(nodes: tuple[int, ...]) -> float:
        return (1 + sum(chances[node] for node in nodes)) / cost.seconds(len(nodes))

    pruned = prune(draft, GainPace(cost))
    every = (nodes for size in range(len(draft) + 1) for nodes in combinations(range(len(draft)), size))
    best = max(rate(nodes) for nodes in every if closed(draft, nodes))
    assert rate(pruned.tokens) == pytest.approx(best, rel=1e-9)


@given(draft=trees(), least=st.floats(0, 1), size=st.none() | st.integers(0, 8))
def test_pruning_keeps_the_likely_tokens_and_their_ancestors(draft: Draft, least: float, size: int | None) -> None:
    pruned = prune(draft, ConfidencePace(least), size)
    chances = survivals(draft)
    enough = [node for node in range(len(draft)) if chances[node] >= least]
    assert len(pruned) == len(enough if size is None else enough[:size])
    assert set(pruned.tokens) <= set(enough) and closed(draft, pruned.tokens)
    left_out = [chances[node] for node in enough if node not in pruned.tokens]
    assert min((chances[node] for node in pruned.tokens), default=1.0) >= max(left_out, default=0.0)
    assert list(pruned.tokens) == sorted(pruned.tokens)
    for node, parent, confidence in zip(pruned.tokens, pruned.parents, pruned.confidence, strict=True):
        assert draft.parents[node] == (pruned.tokens[parent] if parent >= 0 else -1)
        assert confidence == draft.confidence[node]


@given(draft=trees())
def test_a_pace_that_always_goes_on_changes_nothing(draft: Draft) -> None:
    assert prune(draft, ConfidencePace(0.0)) is draft and prune(draft, None) is draft


def test_drawn_and_forced_tokens_are_not_pruned() -> None:
    for draft in (Draft.chain([1], proposals=torch.zeros(2, 4)), Draft((1,), (-1,), (1.0,), forced=((0,), 2))):
        with pytest.raises(ValueError, match="prune"):
            prune(draft, ConfidencePace(0.5))


@pytest.mark.parametrize("per_token, drafting, goes_on", [(0.0, 0.0, True), (0.6, 0.0, False), (0.4, 0.3, False)])
def test_gain_weighs_a_token_against_its_price(per_token: float, drafting: float, goes_on: bool) -> None:
    """At 1 + 0.5 expected tokens and one drafted token in a step of 2 seconds: the rate is 0.75 a second."""
    cost = StepCost(2.0 - 2 * per_token - drafting, per_token, drafting)
    assert cost.seconds(1) == pytest.approx(2.0)
    assert GainPace(cost).goes_on(0.4, 0.5, 1) is goes_on


@given(
    line=st.tuples(st.floats(0, 5), st.floats(0, 1)),
    tokens=st.lists(st.integers(1, 64), min_size=2, max_size=9, unique=True),
    noise=st.lists(st.floats(-3, 3), min_size=9, max_size=9),
)
def test_a_fit_is_the_best_line_without_negative_parts(
    line: tuple[float, float], tokens: list[int], noise: list[float]
) -> None:
    samples = [(n, max(line[0] + line[1] * n + extra, 0.01)) for n, extra in zip(tokens, noise, strict=False)]
    cost = StepCost.fit(samples, 0.25)

    def error(fixed: float, per_token: float) -> float:
        return sum((fixed + per_token * n - seconds) ** 2 for n, seconds in samples)

    assert cost.fixed >= 0 and cost.per_token >= 0 and cost.draft_seconds == 0.25
    best = error(cost.fixed, cost.per_token)
    for step in (1e-3, 0.05, 1.0):
        for fixed in (cost.fixed, max(cost.fixed - step, 0.0), cost.fixed + step):
            for per_token in (cost.per_token, max(cost.per_token - step, 0.0), cost.per_token + step):
                assert best <= error(fixed, per_token) + 1e-9


def test_a_fit_recovers_a_line_and_needs_two_sizes() -> None:
    cost = StepCost.fit([(1, 0.021), (7, 0.033), (7, 0.033), (13, 0.045)])
    assert cost.fixed == pytest.approx(0.019) and cost.per_token == pytest.approx(0.002)
    assert cost.seconds(6) == pytest.approx(0.033), "six drafted tokens and the root"
    for samples in ([], [(3, 0.1), (3, 0.2)], [(1, 0.0), (3, 0.2)]):
        with pytest.raises(ValueError, match="positive seconds of at least two"):
            StepCost.fit(samples)


def test_confidence_is_a_chance() -> None:
    for least in (-0.1, 1.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            ConfidencePace(least)
