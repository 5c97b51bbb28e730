"""Speculative sampling against the target's own distribution, on a toy target that is a Markov chain (DESIGN 5.4)."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from math import prod
from random import Random
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.engine import acceptance_sampled
from harness.engine.acceptance import Accepted
from harness.engine.acceptance_sampled import Sampled, accept_sampled
from harness.engine.drafting.draft import Draft
from harness.engine.drafting.expansion import Growth, grow
from harness.engine.drafting.pace import ConfidencePace
from harness.engine.sampling import Sampling

VOCAB = 8
EMITTED = 3
ALMOST_ONE = 1 - 2**-53
WARM = Sampling(temperature=0.8)
CHAIN = (-1, 0, 1)
TREE = (-1, 0, -1, 0, 2, -1, 1, 3, 3)  # depth 3; siblings are not side by side
AcceptRule = Callable[[Draft, Tensor, Random], Accepted]
Propose = Callable[[int, Random], Draft]
"""The draft after a token."""


@dataclass(frozen=True)
class Case:
    """A toy target and a drafter that only half agrees with it.

    Attributes:
        parents: of the drafted tokens.
        drawn: whether drafts are drawn, or the most probable tokens of the draft model.
        sampling: of the target.
        sharpness: of the draft model; a high one leaves next to no mass after the first of its tokens.
    """

    parents: tuple[int, ...]
    drawn: bool
    sampling: Sampling = WARM
    sharpness: float = 1.5


CASES = {
    "chosen chain": Case(CHAIN, drawn=False),
    "chosen tree": Case(TREE, drawn=False),
    "drawn chain": Case(CHAIN, drawn=True),
    "drawn tree": Case(TREE, drawn=True),
    "drawn tree, truncated": Case(TREE, drawn=True, sampling=Sampling(temperature=0.8, top_p=0.85, top_k=5)),
    "sharp drawn tree": Case(TREE, drawn=True, sharpness=30.0),
}


@cache
def tables(case: Case) -> tuple[Tensor, Tensor]:
    """What follows each token: the target's distribution and the draft model's, [VOCAB, VOCAB] each."""
    random = Random("toy tables")
    target, noise = (torch.tensor([[random.gauss(0, 1.2) for _ in range(VOCAB)] for _ in range(VOCAB)]) for _ in "ab")
    return Sampled(case.sampling).judge(target), ((target + noise) * case.sharpness / 1.7).softmax(-1)


def without_putting_back(weights: list[float], count: int, random: Random) -> list[int]:
    """``count`` different tokens, each drawn in proportion to the weights of those left."""
    weights, found = list(weights), []
    for _ in range(count):
        (token,) = random.choices(range(VOCAB), weights)
        weights[token] = 0.0
        found.append(token)
    return found


def drafter(case: Case) -> Propose:
    """Drafts of the shape that the case names."""
    proposals = tables(case)[1]
    rows, ranked = proposals.tolist(), proposals.argsort(descending=True).tolist()
    families = Draft((0,) * len(case.parents), case.parents, (1.0,) * len(case.parents)).children()

    def propose(root: int, random: Random) -> Draft:
        tokens = [root] * (len(case.parents) + 1)
        for place, children in enumerate(families):
            if children:
                last, count = tokens[place], len(children)
                drawn = without_putting_back(rows[last], count, random) if case.drawn else ranked[last][:count]
                for child, token in zip(children, drawn, strict=True):
                    tokens[child + 1] = token
        chances = (1.0,) * len(case.parents)
        return Draft(tuple(tokens[1:]), case.parents, chances, proposals[tokens] if case.drawn else None)

    return propose


def decoded(
    rule: AcceptRule, case: Case, seed: int, draws: int, propose: Propose | None = None
) -> Counter[tuple[int, ...]]:
    """How often which tokens came out first after token 0, in ``draws`` speculative decodes."""
    target, propose = tables(case)[0], propose or drafter(case)
    drafting, accepting = Random(f"{seed} draft"), Random(f"{seed} accept")
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(draws):
        output = [0]
        while len(output) <= EMITTED:
            draft = propose(output[-1], drafting)
            output += rule(draft, target[[output[-1], *draft.tokens]], accepting).tokens(draft)
        counts[tuple(output[1 : EMITTED + 1])] += 1
    return counts


def p_value(counts: Counter[tuple[int, ...]], target: list[list[float]]) -> float:
    """Of a chi-square test of the joint counts; tuples that are expected fewer than five times are pooled."""
    draws, statistic, bins = counts.total(), 0.0, 0
    pooled = [0.0, 0.0]
    for tokens in product(range(VOCAB), repeat=EMITTED):
        expected = draws * prod(target[before][token] for before, token in zip((0, *tokens), tokens, strict=False))
        if expected == 0 and counts[tokens]:
            return 0.0
        if expected < 5:
            pooled = [pooled[0] + counts[tokens], pooled[1] + expected]
        else:
            statistic, bins = statistic + (counts[tokens] - expected) ** 2 / expected, bins + 1
    if pooled[1] > 0:
        statistic, bins = statistic + (pooled[0] - pooled[1]) ** 2 / pooled[1], bins + 1
    half = torch.tensor([(bins - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def by_definition(draft: Draft, target: Tensor, random: Random, flaw: str = "") -> Accepted:
    """What :func:`accept_sampled` should do, in plain numbers, or a rule that is wrong in one way."""
    path, place = [], -1
    while True:
        row = left = target[place + 1].tolist()
        proposal = None if draft.proposals is None else draft.proposals[place + 1].tolist()
        for child in draft.children()[place + 1]:
            token = draft.tokens[child]
            if random.random() < (left[token] if proposal is None else left[token] / proposal[token]):
                path.append(child)
                place = child
                break
            if proposal is None:
                left = [0.0 if one == token else p for one, p in enumerate(left)]
                left = left if flaw == "not renormalised" else normalised(left)
            else:
                left = normalised([max(0.0, p - q) for p, q in zip(left, proposal, strict=True)])
                if flaw != "proposal kept":
                    mass = 1 - proposal[token] if flaw == "mass by difference" else None
                    proposal = normalised([0.0 if one == token else q for one, q in enumerate(proposal)], mass)
        else:
            (bonus,) = random.choices(range(VOCAB), row if flaw == "bonus of the target" else left)
            return Accepted(tuple(path), bonus)


def normalised(weights: list[float], mass: float | None = None) -> list[float]:
    """Weights over their sum, or over ``mass``."""
    mass = sum(weights) if mass is None else mass
    return [weight / mass for weight in weights] if mass > 0 else weights


def chance(rule: AcceptRule, name: str, seed: int, draws: int) -> float:
    """Of counts at least as far from the target's distribution as those of ``rule``, were the rule lossless."""
    return p_value(decoded(rule, CASES[name], seed, draws), tables(CASES[name])[0].tolist())


@pytest.mark.parametrize("name", CASES)
def test_speculative_sampling_keeps_the_distribution(name: str) -> None:
    assert chance(accept_sampled, name, seed=0, draws=6_000) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("seed", (0, 1, 2))
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.sharpness < 2])  # others: exactly, below
def test_speculative_sampling_keeps_the_distribution_of_many_draws(name: str, seed: int) -> None:
    assert chance(accept_sampled, name, seed, draws=50_000) > 0.01


@pytest.mark.parametrize(
    "flaw, name",
    [
        ("bonus of the target", "chosen chain"),
        ("bonus of the target", "drawn chain"),
        ("bonus of the target", "drawn tree, truncated"),
        ("not renormalised", "chosen tree"),
        ("proposal kept", "drawn tree"),
        ("mass by difference", "sharp drawn tree"),
    ],
)
def test_a_wrong_rule_is_found_out(flaw: str, name: str) -> None:
    assert chance(partial(by_definition, flaw=flaw), name, seed=0, draws=6_000) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("seed", (0, 1, 2))
@pytest.mark.parametrize("flaw, name", [("bonus of the target", "drawn chain"), ("not renormalised", "chosen tree")])
def test_a_wrong_rule_is_found_out_by_many_draws(flaw: str, name: str, seed: int) -> None:
    assert chance(partial(by_definition, flaw=flaw), name, seed, draws=50_000) < 1e-9


@dataclass(frozen=True)
class Grown:
    """How the drafts of a draft model grow.

    Attributes:
        growth: limits.
        least: survival below which no place is dealt.
        flaw: what is done to a draft once it is drawn; None leaves it alone.
    """

    growth: Growth
    least: float = 0.0
    flaw: Callable[[Draft], Draft] | None = None

    def chance(self, seed: int, draws: int) -> float:
        """Of counts at least as far from the target's distribution, were growing and accepting lossless."""
        return p_value(decoded(accept_sampled, TOY, seed, draws, self.draft), tables(TOY)[0].tolist())

    def draft(self, root: int, random: Random) -> Draft:
        """The draft after a token."""
        proposals = tables(TOY)[1]

        def extend(numbers: Sequence[int], tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
            return proposals[list(tokens)]

        pace = ConfidencePace(self.least)
        draft = grow(self.growth, proposals[root], extend, self.growth.depth, random=random, pace=pace)
        return draft if self.flaw is None else self.flaw(draft)


def kept(draft: Draft, nodes: Iterable[int]) -> Draft:
    """The draft with these nodes only, in this order; what lost its parent goes along."""
    places = {-1: -1}
    for node in nodes:
        if draft.parents[node] in places:
            places[node] = len(places) - 1
    order = list(places)[1:]
    assert draft.proposals is not None
    return Draft(
        tuple(draft.tokens[node] for node in order),
        tuple(places[draft.parents[node]] for node in order),
        tuple(draft.confidence[node] for node in order),
        draft.proposals[[node + 1 for node in places]],
    )


def ranked(draft: Draft) -> Draft:
    """Siblings by probability instead of in the order of their drawing."""
    return kept(draft, [n for group in draft.children() for n in sorted(group, key=lambda n: -draft.confidence[n])])


def without_the_least_probable(draft: Draft) -> Draft:
    """One sibling less wherever there are several."""
    left_out = {min(group, key=lambda n: draft.confidence[n]) for group in draft.children() if len(group) > 1}
    return kept(draft, [node for node in range(len(draft)) if node not in left_out])


def the_best(draft: Draft) -> Draft:
    """All tokens but the two with the lowest survival: what is right for chosen tokens only."""
    survivals: list[float] = []
    for parent, confidence in zip(draft.parents, draft.confidence, strict=True):
        survivals.append(confidence * (survivals[parent] if parent >= 0 else 1.0))
    best = sorted(range(len(draft)), key=lambda node: -survivals[node])
    return kept(draft, sorted(best[: len(draft) - 2]))


def stopped(draft: Draft) -> Draft:
    """A token that the draft model itself thought improbable ends its path."""
    return kept(draft, [node for node in range(len(draft)) if draft.confidence[node] >= 0.1])


TOY = CASES["drawn tree"]
BUSHY = Growth(3, 3, 8)
GROWN = {"tree": Grown(BUSHY), "chain": Grown(Growth(4, 1)), "adaptive tree": Grown(BUSHY, least=0.1)}
FLAWED = {
    "siblings ranked": Grown(BUSHY, flaw=ranked),
    "least probable sibling dropped": Grown(BUSHY, flaw=without_the_least_probable),
    "best ones kept": Grown(BUSHY, flaw=the_best),
    "chain stopped at an improbable token": Grown(Growth(4, 1), flaw=stopped),
}


@pytest.mark.parametrize("name", ["tree", "chain"])
def test_drawn_growth_keeps_the_distribution(name: str) -> None:
    """From the draft model to the output: how many tokens are drawn where, and what is accepted."""
    assert GROWN[name].chance(seed=0, draws=3_000) > 0.01


@pytest.mark.parametrize("name", FLAWED)
def test_drafts_touched_after_drawing_are_found_out(name: str) -> None:
    assert FLAWED[name].chance(seed=0, draws=1_500) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("seed", (0, 1, 2))
@pytest.mark.parametrize("name", GROWN)
def test_drawn_growth_keeps_the_distribution_over_many_draws(name: str, seed: int) -> None:
    assert GROWN[name].chance(seed, draws=20_000) > 0.01


def chance_of_acceptance(children: list[int], proposal: Tensor | None, target: Tensor) -> float:
    """Of the last of a node's children if those before it are rejected, by bisection over its uniform number."""
    draft = level(children, proposal)
    rows, rejections = target.expand(len(draft) + 1, -1), [ALMOST_ONE] * (len(draft) - 1)

    def accepted(number: float) -> bool:
        numbers = iter([*rejections, number, 0.5])
        return bool(accept_sampled(draft, rows, Mock(spec=Random, random=lambda: next(numbers))).path)

    if accepted(ALMOST_ONE):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if accepted(middle) else (low, middle)
    return low


def level(children: list[int], proposal: Tensor | None) -> Draft:
    """A draft of a root's children."""
    size = len(children)
    proposals = None if proposal is None else proposal.expand(size + 1, -1)
    return Draft(tuple(children), (-1,) * size, (1.0,) * size, proposals)


@pytest.mark.parametrize("sharpness", [None, 1.0, 14.0, 60.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_law_of_a_node_is_the_target_s(monkeypatch: pytest.MonkeyPatch, sharpness: float | None, seed: int) -> None:
    left: list[Tensor] = []

    def keep(row: Tensor, random: Random) -> int:
        left.append(row)
        return 0

    monkeypatch.setattr(acceptance_sampled, "draw", keep)
    generator = torch.Generator().manual_seed(seed)
    target, other = torch.randn(2, 5, generator=generator)
    target, proposal = target.softmax(-1), None if sharpness is None else (other * sharpness).softmax(-1)
    law = [0.0] * 5

    def add(before: list[int], weight: float) -> None:
        if len(before) == 3:
            accept_sampled(level(before, proposal), target.expand(4, -1), Mock(spec=Random, random=lambda: ALMOST_ONE))
            for token, share in enumerate(normalised(left[-1].tolist())):
                law[token] += weight * share
            return
        shares = (
            [float(token == seed + len(before)) for token in range(5)]  # chosen: one token after the other
            if proposal is None
            else normalised([0.0 if token in before else q for token, q in enumerate(proposal.tolist())])
        )
        for token, share in enumerate(shares):
            if share > 0:
                children = [*before, token]
                accepted = chance_of_acceptance(children, proposal, target)
                law[token] += weight * share * accepted
                if accepted < 1:
                    add(children, weight * share * (1 - accepted))

    add([], 1.0)
    assert law == pytest.approx(target.tolist(), abs=3e-7)


@settings(deadline=None)
@given(
    picks=st.lists(st.integers(0, 40), max_size=14),
    drawn=st.booleans(),
    root=st.integers(0, VOCAB - 1),
    seed=st.integers(),
)
def test_tree_sampling_equals_its_definition(picks: list[int], drawn: bool, root: int, seed: int) -> None:
    parents: list[int] = []
    for pick in picks:
        parent = pick % (len(parents) + 1) - 1
        if parents.count(parent) < VOCAB - 2:
            parents.append(parent)
    case = Case(tuple(parents), drawn)
    draft = drafter(case)(root, Random(seed))
    rows = tables(case)[0][[root, *draft.tokens]]
    before = rows.clone()
    ours, theirs = Random(seed + 1), Random(seed + 1)
    assert accept_sampled(draft, rows, ours) == by_definition(draft, rows, theirs)
    assert ours.getstate() == theirs.getstate()
    assert torch.equal(rows, before)
