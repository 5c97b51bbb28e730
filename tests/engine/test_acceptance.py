"""Acceptance rules against brute force over all paths of random trees."""

from math import log
from random import Random
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.engine.acceptance import Accepted, Greedy, Rule, accept_greedy
from harness.engine.acceptance_relaxed import TopkMatch, Typical, accept_topk_match, accept_typical, longest_path
from harness.engine.acceptance_sampled import Sampled, accept_sampled
from harness.engine.drafting.draft import Draft
from harness.engine.sampling import Sampling

VOCAB = 5
RULES: list[Rule] = [
    Greedy(),
    Sampled(Sampling(0.8)),
    Sampled(Sampling(1.3, 0.9, 4)),
    Typical(Sampling(0.7), 0.3, 0.5),
    Typical(Sampling(0.7), 0.3, 0.5, greedy_bonus=False),
    TopkMatch(2),
]


@st.composite
def trees(draw: st.DrawFn) -> Draft:
    """Drafts of up to 12 tokens; siblings differ, and the nodes of different branches are mixed."""
    tokens: list[int] = []
    parents: list[int] = []
    for pick, token in draw(st.lists(st.tuples(st.integers(0, 60), st.integers(0, VOCAB - 1)), max_size=12)):
        parent = pick % (len(tokens) + 1) - 1
        if (token, parent) not in zip(tokens, parents, strict=True):
            tokens.append(token)
            parents.append(parent)
    return Draft(tuple(tokens), tuple(parents), (1.0,) * len(tokens))


def all_paths(draft: Draft) -> list[tuple[int, ...]]:
    """Every path from the root, the empty one first, then in the order of their last nodes."""
    paths: list[tuple[int, ...]] = [()]
    for node, parent in enumerate(draft.parents):
        paths.append((*paths[parent + 1], node))
    return paths


def rows_of(path: tuple[int, ...]) -> list[int]:
    """Of each token of the path, the row that judges it."""
    return [0, *(node + 1 for node in path)][: len(path)]


def random_logits(draft: Draft, seed: int, scale: float = 2.0) -> Tensor:
    return torch.randn(1 + len(draft), VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


@given(draft=trees(), data=st.data())
def test_greedy_takes_the_longest_path_of_the_target_s_choices(draft: Draft, data: st.DataObject) -> None:
    size = len(draft) + 1
    choices = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=size, max_size=size))
    followed = [
        path
        for path in all_paths(draft)
        if all(draft.tokens[node] == choices[row] for node, row in zip(path, rows_of(path), strict=True))
    ]
    best = max(followed, key=len)
    assert accept_greedy(draft, choices) == Accepted(best, choices[best[-1] + 1 if best else 0])


@settings(deadline=None)
@given(draft=trees(), seed=st.integers(0, 10**6), drawn=st.booleans())
def test_the_coldest_sampling_is_greedy(draft: Draft, seed: int, drawn: bool) -> None:
    logits = random_logits(draft, seed)
    if drawn:
        proposals = random_logits(draft, seed + 1).softmax(-1)
        draft = Draft(draft.tokens, draft.parents, draft.confidence, proposals)
    rule = Sampled(Sampling(temperature=1e-7))
    expected = accept_greedy(draft, Greedy().judge(logits))
    assert rule.accept(draft, rule.judge(logits), Random(seed)) == expected


@settings(deadline=None)
@given(draft=trees(), seed=st.integers(0, 10**6), epsilon=st.floats(0.05, 1), delta=st.floats(0.1, 1.5))
def test_typical_acceptance_equals_its_definition(draft: Draft, seed: int, epsilon: float, delta: float) -> None:
    logits, sampling = random_logits(draft, seed), Sampling(0.7)
    rule = Typical(sampling, epsilon, delta)
    rows = (logits.double() / 0.7).softmax(-1).tolist()

    def typical(row: list[float], token: int) -> bool:
        inverse_perplexity = 2.718281828459045 ** sum(p * log(p) for p in row)
        return row[token] > min(epsilon, delta * inverse_perplexity)

    def merit(path: tuple[int, ...]) -> tuple[int, float]:
        pairs = zip(path, rows_of(path), strict=True)
        return len(path), sum(log(rows[row][draft.tokens[node]]) for node, row in pairs)

    fitting = [
        path
        for path in all_paths(draft)
        if all(typical(rows[row], draft.tokens[node]) for node, row in zip(path, rows_of(path), strict=True))
    ]
    best = max(fitting, key=merit)
    last = best[-1] + 1 if best else 0
    assert rule.accept(draft, rule.judge(logits), Random(0)) == Accepted(best, int(logits[last].argmax()))


def test_typical_acceptance_may_draw_its_bonus_from_the_distribution() -> None:
    probabilities = torch.tensor([[0.1, 0.9, 0.0], [0.25, 0.0, 0.75]])
    draft, random = Draft.chain([1]), Random(0)
    bonus = [accept_typical(draft, probabilities, [0.5, 0.5], random).bonus for _ in range(4000)]
    assert set(bonus) == {0, 2} and abs(bonus.count(0) / 4000 - 0.25) < 0.025
    assert accept_typical(draft, probabilities, [0.5, 0.5]) == Accepted((0,), 2)


def test_a_token_at_the_threshold_is_not_typical() -> None:
    rule = Typical(Sampling(), epsilon=1.0, delta=1.0)
    logits = torch.zeros(2, 4)
    assert rule.accept(Draft.chain([3]), rule.judge(logits), Random(0)).path == ()


def test_tokens_that_the_sampling_rules_out_are_never_typical() -> None:
    rule = Typical(Sampling(top_k=2), epsilon=1e-6, delta=1e-6)
    logits = torch.tensor([[1.0, 2.0, 3.0]] * 2)
    assert [rule.accept(Draft.chain([token]), rule.judge(logits), Random(0)).path for token in range(3)] == [
        (),
        (0,),
        (0,),
    ]


@settings(deadline=None)
@given(draft=trees(), seed=st.integers(0, 10**6), k=st.integers(1, VOCAB + 2))
def test_topk_match_equals_its_definition(draft: Draft, seed: int, k: int) -> None:
    logits, rule = random_logits(draft, seed), TopkMatch(k)
    ranks = (logits[:, None, :] > logits[:, :, None]).sum(-1).tolist()

    def path_ranks(path: tuple[int, ...]) -> list[int]:
        return [ranks[row][draft.tokens[node]] for node, row in zip(path, rows_of(path), strict=True)]

    fitting = [path for path in all_paths(draft) if all(rank < k for rank in path_ranks(path))]
    best = max(fitting, key=lambda path: (len(path), -sum(path_ranks(path))))
    last = best[-1] + 1 if best else 0
    assert rule.accept(draft, rule.judge(logits), Random(0)) == Accepted(best, int(logits[last].argmax()))


@settings(deadline=None)
@given(draft=trees(), seed=st.integers(0, 10**6))
def test_the_top_one_match_is_greedy_at_equal_logits_too(draft: Draft, seed: int) -> None:
    logits = random_logits(draft, seed, 0.6).round()
    rule, greedy = TopkMatch(1), Greedy()
    assert rule.accept(draft, rule.judge(logits), Random(0)) == accept_greedy(draft, greedy.judge(logits))


@given(draft=trees(), data=st.data())
def test_the_longest_path_wins_then_the_best_then_the_first(draft: Draft, data: st.DataObject) -> None:
    size = len(draft)
    merits = data.draw(st.lists(st.sampled_from((None, 0.0, -1.0, -2.0)), min_size=size, max_size=size))

    def total(path: tuple[int, ...]) -> float:
        return sum(merits[node] or 0.0 for node in path)

    fitting = [path for path in all_paths(draft) if all(merits[node] is not None for node in path)]
    assert longest_path(draft, merits) == max(fitting, key=lambda path: (len(path), total(path)))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_sequences_judged_together_are_accepted_as_if_alone(rule: Rule) -> None:
    drafts = [Draft.chain([1, 2]), Draft(), Draft((0, 3, 4, 1), (-1, -1, 0, 1), (1.0,) * 4)]
    with torch.inference_mode():  # as the step gives them
        logits = [random_logits(draft, seed) for seed, draft in enumerate(drafts)]
        joint = torch.cat(logits)

    def alone(number: int) -> Accepted:
        return rule.accept(drafts[number], rule.judge(logits[number]), Random(f"{number}"))

    judged, start, together = rule.judge(joint), 0, []
    for number, draft in enumerate(drafts):
        own: Any = judged[start : start + 1 + len(draft)]
        together.append(rule.accept(draft, own, Random(f"{number}")))
        start += 1 + len(draft)
    assert together == [alone(0), alone(1), alone(2)]
    assert together[::-1] == [alone(2), alone(1), alone(0)]  # nothing is remembered from another sequence


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_opinions_that_do_not_fit_the_draft_are_refused(rule: Rule) -> None:
    with pytest.raises(ValueError, match="opinions"):
        rule.accept(Draft.chain([1, 2]), rule.judge(torch.zeros(2, VOCAB)), Random(0))


def test_other_misfits_are_refused() -> None:
    draft = Draft.chain([1], proposals=torch.full((2, 7), 1 / 7))
    with pytest.raises(ValueError, match=r"\[2, 7\].*\[2, 5\]"):
        accept_sampled(draft, torch.full((2, 5), 0.2), Random(0))
    with pytest.raises(ValueError, match="opinions"):
        accept_typical(Draft.chain([1]), torch.full((2, 5), 0.2), [0.1], Random(0))
    with pytest.raises(ValueError, match="opinions"):
        accept_topk_match(Draft(), [])
    for epsilon, delta in ((0.0, 1.0), (1.5, 1.0), (0.5, 0.0)):
        with pytest.raises(ValueError, match="epsilon"):
            Typical(Sampling(), epsilon, delta)
    with pytest.raises(ValueError, match="k=0"):
        TopkMatch(0)


def fixed(number: float) -> Random:
    """Gives the same number for ever."""
    return Mock(spec=Random, random=lambda: number)


@pytest.mark.parametrize("proposal", [None, [0.0, 0.6, 0.4]])
def test_a_token_that_the_target_excludes_is_rejected_without_harm(proposal: list[float] | None) -> None:
    proposals = None if proposal is None else torch.tensor([proposal] * 2)
    draft = Draft.chain([1], proposals=proposals)
    for number in (0.0, 0.5, 1 - 2**-53):
        assert accept_sampled(draft, torch.tensor([[1.0, 0.0, 0.0]] * 2), fixed(number)) == Accepted((), 0)


def test_children_that_the_proposal_cannot_have_drawn_are_passed_over() -> None:
    proposals = torch.tensor([[0.0, 1.0, 0.0]] * 4)
    target = torch.tensor([[0.6, 0.0, 0.4]] * 4)
    draft = Draft((1, 0, 2), (-1, -1, -1), (1.0,) * 3, proposals)  # one token is all that can be drawn
    for number in (0.0, 0.59):
        assert accept_sampled(draft, target, fixed(number)) == Accepted((), 0)
    assert accept_sampled(draft, target, fixed(0.61)) == Accepted((), 2)


def test_tails_of_the_proposal_below_fp32_s_smallest_normal_number_count() -> None:
    proposals = torch.tensor([[1.0, 1e-42, 0.0]] * 3)
    target = torch.tensor([[0.2, 0.3, 0.5]] * 3)  # without the first token 3/8 and 5/8
    draft = Draft((0, 1), (-1, -1), (1.0,) * 2, proposals)
    for second, bonus, expected in ((0.374, 0.0, ((1,), 0)), (0.376, 0.0, ((), 2)), (0.376, 0.99, ((), 2))):
        numbers = iter([0.5, second, bonus])
        accepted = accept_sampled(draft, target, Mock(spec=Random, random=lambda drawn=numbers: next(drawn)))
        assert accepted == Accepted(*expected)


def test_a_rejection_that_leaves_nothing_by_rounding_falls_back_to_the_target() -> None:
    below_one = 1 - 2**-24
    target = torch.tensor([[0.0, below_one, 0.0]] * 2)
    assert accept_sampled(Draft.chain([1]), target, fixed(1 - 2**-53)) == Accepted((), 1)
    proposals = torch.tensor([[0.0, 1.0, 0.0]] * 2)
    assert accept_sampled(Draft.chain([1], proposals=proposals), target, fixed(1 - 2**-53)) == Accepted((), 1)
