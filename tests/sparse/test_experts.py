"""Routing under a budget against a version that walks from token to token and says each rule in words."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse.budget import MoeBudget
from sparse.experts import Restriction, probabilities, restrict, route
from sparse.ops.moe import native
from sparse.ops.weights import MoeWeights

BETAS = ((0.05, 0.2, 0.35, 0.6), (0.3, 0.25, 0.6, 0.9))


@pytest.fixture(params=["kernel", "torch"], autouse=True, scope="module")
def route_by(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs with the CPU kernel, where there is one, and without."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(native, "routes", lambda _: False)
        elif native.native.load() is None:
            pytest.skip("no kernel here")
        yield request.param


def _weights(top_k: int, kind: str = "normalise") -> MoeWeights:
    def unused(rows: Tensor) -> Tensor:
        raise AssertionError("routing runs no expert")

    return MoeWeights(unused, (), None, top_k, normalise=kind == "normalise", unit=kind == "unit")


def _probabilities(tokens: int, experts: int, seed: int, scale: float = 1.5) -> Tensor:
    """Random routing in which no two experts of a token tie."""
    generator = torch.Generator().manual_seed(seed)
    return probabilities(torch.randn(tokens, experts, generator=generator) * scale)


def _keep(top: list[tuple[float, int]], budget: MoeBudget, layer: int) -> list[int]:
    """Experts of one token that the rule keeps; ``top`` holds (probability, expert), strongest first."""
    total = sum(weight for weight, _ in top)
    shares = [weight / total for weight, _ in top]
    names = [expert for _, expert in top]
    if budget.rule == "topk":
        return names[: budget.k]
    if budget.rule == "topp":
        for count in range(1, len(names)):
            if sum(shares[:count]) >= budget.p:
                return names[:count]
    if budget.rule == "floor":
        return [name for place, name in enumerate(names) if place == 0 or shares[place] >= budget.weight_floor]
    if budget.rule == "median_ratio":
        for skipped in range(min(budget.m_max, len(names) - 1), 0, -1):
            if sum(shares[-skipped:]) < budget.betas[layer][skipped - 1]:
                return names[:-skipped]
    return names


def naive_restrict(
    chances: Tensor, weights: MoeWeights, budget: MoeBudget, layer: int
) -> tuple[Tensor, dict[str, int], set[int]]:
    """Combine in fp64, the counters, and the loaded experts."""
    rows = chances.double().tolist()
    experts = range(chances.shape[1])
    ranked = [sorted(((row[e], e) for e in experts), reverse=True) for row in rows]
    dense = [{e for _, e in order[: weights.top_k]} for order in ranked]
    sums = [sum(row[e] for e in wanted) for row, wanted in zip(rows, dense, strict=True)]
    kept = [set(_keep(order[: weights.top_k], budget, layer)) for order in ranked]
    count = {"wanted": sum(map(len, dense)), "substituted": 0, "dropped": 0, "freed": 0}
    count["skipped"] = count["wanted"] - sum(map(len, kept))
    score = dict.fromkeys(set().union(*kept), 0.0)
    for depth, (row, own, total) in enumerate(zip(rows, kept, sums, strict=True)):
        for e in own:
            score[e] += row[e] / (total if weights.normalise else 1) * budget.survival**depth
    loaded = set(sorted(score, key=lambda e: -score[e])[: budget.union])
    for order, own in zip(ranked, kept, strict=True):
        lost = own - loaded
        own -= lost
        spare = [e for _, e in order if e in loaded and e not in own]
        wish = len(lost) if budget.outside == "substitute" else int(not own)
        own.update(spare[:wish])
        count["substituted"] += len(spare[:wish])
        count["dropped"] += len(lost) - len(spare[:wish])
    if budget.free_loaded:
        for wanted, own in zip(dense, kept, strict=True):
            count["freed"] += len((wanted & loaded) - own)
            own |= wanted & loaded
    combine = torch.zeros(chances.shape, dtype=torch.float64)
    for token, own in enumerate(kept):
        total = sum(rows[token][e] for e in own)
        for e in own:
            share = rows[token][e] / total
            combine[token, e] = 1 if weights.unit else share * (1 if weights.normalise else sums[token])
    count |= {"kept": sum(map(len, kept)), "union": len(loaded), "union_dense": len(set().union(*dense))}
    return combine, count, loaded


@st.composite
def budgets(draw: st.DrawFn) -> MoeBudget:
    return MoeBudget(
        rule=draw(st.sampled_from(["dense", "median_ratio", "topk", "topp", "floor"])),
        m_max=draw(st.integers(1, 4)),
        betas=BETAS,
        k=draw(st.integers(1, 6)),
        p=draw(st.floats(0.2, 0.99)),
        weight_floor=draw(st.floats(0, 0.6)),
        union=draw(st.none() | st.integers(1, 12)),
        outside=draw(st.sampled_from(["substitute", "drop"])),
        free_loaded=draw(st.booleans()),
        survival=draw(st.floats(0.3, 1)),
    )


@settings(max_examples=400, deadline=None)
@given(
    budget=budgets(),
    kind=st.sampled_from(["normalise", "plain", "unit"]),
    tokens=st.integers(1, 9),
    experts=st.integers(2, 13),
    top_k=st.integers(1, 6),
    layer=st.integers(0, 1),
    seed=st.integers(0, 10**6),
)
def test_restriction_equals_the_walk_over_tokens(
    budget: MoeBudget, kind: str, tokens: int, experts: int, top_k: int, layer: int, seed: int
) -> None:
    weights = _weights(min(top_k, experts), kind)
    chances = _probabilities(tokens, experts, seed)
    combine, done = restrict(chances, weights, budget, layer)
    expected, counts, loaded = naive_restrict(chances, weights, budget, layer)
    assert combine.dtype is torch.float32
    assert torch.equal(combine != 0, expected != 0)
    torch.testing.assert_close(combine.double(), expected, rtol=1e-5, atol=1e-7)
    assert done == Restriction(**counts)
    assert done.kept == done.wanted - done.skipped - done.dropped + done.freed
    assert (combine != 0).any(1).all()
    assert set((combine != 0).any(0).nonzero().view(-1).tolist()) == loaded


@pytest.mark.parametrize("kind", ["normalise", "plain", "unit"])
def test_a_budget_that_skips_nothing_is_dense_routing(kind: str) -> None:
    weights, chances = _weights(4, kind), _probabilities(7, 10, 0)
    dense = route(chances, weights)
    assert ((dense != 0).sum(1) == 4).all()
    union = int((dense != 0).any(0).sum())
    unlimited = [
        MoeBudget(),
        MoeBudget(rule="topk", k=4),
        MoeBudget(rule="floor"),
        MoeBudget(rule="topp"),
        MoeBudget(rule="median_ratio", m_max=3, betas=((0.0, 0.0, 0.0),)),
        MoeBudget(union=union),
        MoeBudget(union=10, outside="drop"),
        MoeBudget(rule="topk", k=2, union=10, free_loaded=True),
    ]
    for budget in unlimited[:-1]:
        combine, done = restrict(chances, weights, budget, 0)
        assert torch.equal(combine != 0, dense != 0) and torch.allclose(combine, dense, atol=1e-6, rtol=0)
        assert done == Restriction(28, 28, 0, 0, 0, 0, union, union)
    combine, done = restrict(chances, weights, unlimited[-1], 0)
    assert done.skipped == 14 and 0 < done.freed < 14
    assert done.union < done.union_dense


def test_routing_weighs_as_the_family_does() -> None:
    chances = torch.tensor([[0.5, 0.1, 0.3, 0.1 - 1e-3, 1e-3]])
    expected = {"normalise": [0.625, 0, 0.375, 0, 0], "plain": [0.5, 0, 0.3, 0, 0], "unit": [1.0, 0, 1, 0, 0]}
    for kind, row in expected.items():
        torch.testing.assert_close(route(chances, _weights(2, kind)), torch.tensor([row]))


def test_what_happens_outside_the_union_budget() -> None:
    """Two tokens that share no expert, one expert loaded: the root's favourite."""
    chances = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04], [0.02, 0.03, 0.1, 0.4, 0.45]])
    weights = _weights(2, "plain")
    combine, done = restrict(chances, weights, MoeBudget(union=1, outside="drop"), 0)
    torch.testing.assert_close(combine, torch.tensor([[0.8, 0, 0, 0, 0], [0.85, 0, 0, 0, 0]]))
    assert done == Restriction(4, 2, 0, 1, 2, 0, 4, 1)
    combine, done = restrict(chances, weights, MoeBudget(union=2, survival=0.9), 0)
    assert (combine != 0).tolist() == [[True, False, False, False, True]] * 2
    torch.testing.assert_close(combine[0], torch.tensor([0.8 * 50 / 54, 0, 0, 0, 0.8 * 4 / 54]))
    assert done == Restriction(4, 4, 0, 2, 0, 0, 4, 2)
    combine, done = restrict(chances, weights, MoeBudget(union=2, survival=0.5), 0)
    assert (combine != 0).tolist() == [[True, True, False, False, False]] * 2


def test_probabilities_never_vanish() -> None:
    """Logits hundreds apart leave no expert with weight zero, so that even the worst one can stand in."""
    logits = torch.tensor([[0.0, -500.0, -400.0], [-500.0, 0.0, -450.0]], dtype=torch.bfloat16)
    chances = probabilities(logits)
    assert chances.dtype is torch.float32 and (chances > 0).all()
    for kind in ("normalise", "plain", "unit"):
        combine, done = restrict(chances, _weights(1, kind), MoeBudget(union=1), 0)
        torch.testing.assert_close(combine, torch.tensor([[1.0, 0, 0], [1.0, 0, 0]]))
        assert done.substituted == 1
