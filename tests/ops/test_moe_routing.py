"""Routing on the device against routing on the CPU, which counts what it does, and that it never looks at a value."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse import experts
from sparse.budget import MoeBudget
from sparse.ops.moe import native
from sparse.ops.moe.routing import route
from sparse.ops.weights import MoeWeights
from sparse.tree import Tree, survival_weights
from tests.ops.interpreter import DEVICE, kernel

kernel_route = kernel("moe", "route")

KINDS = {"normalise": (True, False), "plain": (False, False), "unit": (False, True)}


def _weights(top_k: int, kind: str) -> MoeWeights:
    def unused(rows: Tensor) -> Tensor:
        raise AssertionError("routing runs no expert")

    return MoeWeights(unused, (), None, top_k, *KINDS[kind])


def _probabilities(tokens: int, count: int, seed: int) -> Tensor:
    logits = torch.randn(tokens, count, generator=torch.Generator().manual_seed(seed)) * 1.5
    return experts.probabilities(logits)


def _routed(chances: Tensor, top_k: int, kind: str, budget: MoeBudget, survival: Tensor | None) -> Tensor:
    normalise, unit = KINDS[kind]
    return route(
        chances,
        top_k=top_k,
        normalise=normalise,
        unit=unit,
        limit=budget.union,
        survival=survival,
        outside=budget.outside,
    )


@st.composite
def trees(draw: st.DrawFn) -> Tree | None:
    if draw(st.booleans()):
        return None
    return Tree([draw(st.integers(-1, node - 1)) for node in range(draw(st.integers(0, 11)))])


@settings(max_examples=300, deadline=None)
@given(
    tree=trees(),
    tokens=st.integers(1, 12),
    count=st.integers(1, 20),
    top_k=st.integers(1, 8),
    union=st.none() | st.integers(1, 20),
    outside=st.sampled_from(["substitute", "drop"]),
    survival=st.floats(0.2, 1),
    kind=st.sampled_from(list(KINDS)),
    seed=st.integers(0, 10**6),
)
def test_it_equals_the_counting_router(
    tree: Tree | None,
    tokens: int,
    count: int,
    top_k: int,
    union: int | None,
    outside: str,
    survival: float,
    kind: str,
    seed: int,
) -> None:
    """To the last bit its version in torch, and in its choices the kernel."""
    tokens, top_k = tokens if tree is None else tree.depths.numel(), min(top_k, count)
    budget = MoeBudget(union=union, outside=outside, survival=survival)
    chances, weights = _probabilities(tokens, count, seed), _weights(top_k, kind)
    counts = survival_weights(tokens, survival, chances.device, tree)
    found = _routed(chances, top_k, kind, budget, counts)
    by_kernel, _ = experts.restrict(chances, weights, budget, 0, tree)
    assert torch.equal(found != 0, by_kernel != 0)
    torch.testing.assert_close(found, by_kernel, rtol=1e-5, atol=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "routes", lambda _: False)
        assert torch.equal(found, experts.restrict(chances, weights, budget, 0, tree)[0])
        if union is None:
            assert torch.equal(found, experts.route(chances, weights))


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 12),
    count=st.integers(1, 20),
    top_k=st.integers(1, 8),
    limit=st.none() | st.integers(1, 20),
    survival=st.none() | st.floats(0.2, 1),
    kind=st.sampled_from(list(KINDS)),
    seed=st.integers(0, 10**6),
)
def test_the_kernel_chooses_and_weighs_alike(
    tokens: int, count: int, top_k: int, limit: int | None, survival: float | None, kind: str, seed: int
) -> None:
    chances, top_k = _probabilities(tokens, count, seed), min(top_k, count)
    counts = None if survival is None else survival_weights(tokens, survival, chances.device)
    _assert_alike(chances, top_k, kind, limit, counts)


@pytest.mark.parametrize(("tokens", "count", "limit"), [(60, 128, 32), (64, 256, 64), (33, 60, None), (7, 64, 1)])
def test_the_kernel_routes_steps_of_real_models(tokens: int, count: int, limit: int | None) -> None:
    _assert_alike(_probabilities(tokens, count, 1), 8, "normalise", limit, None)


def _assert_alike(chances: Tensor, top_k: int, kind: str, limit: int | None, counts: Tensor | None) -> None:
    normalise, unit = KINDS[kind]
    expected = route(chances, top_k=top_k, normalise=normalise, unit=unit, limit=limit, survival=counts)
    found = kernel_route(
        chances.to(DEVICE),
        top_k=top_k,
        normalise=normalise,
        unit=unit,
        limit=limit,
        survival=None if counts is None else counts.to(DEVICE),
    ).cpu()
    assert torch.equal(found != 0, expected != 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("survival", [1.0, 0.7])
@pytest.mark.parametrize(("tokens", "count", "limit"), [(2, 4, 1), (6, 24, 3), (12, 20, 5)])
def test_equal_sums_load_the_first_experts(tokens: int, count: int, limit: int, survival: float) -> None:
    """With one expert a token each wanted expert has the weight of its tokens, whatever their probabilities."""
    chances = _probabilities(tokens, count, 0)
    wanted = chances.argmax(-1).tolist()
    counts = survival_weights(tokens, survival, chances.device)
    votes = [sum(counts[t].item() for t in range(tokens) if wanted[t] == expert) for expert in range(count)]
    assert survival < 1 or len({vote for vote in votes if vote}) < len(set(wanted)), "no two sums are equal"
    loaded = sorted(range(count), key=lambda expert: (-votes[expert], expert))[:limit]
    expected = torch.zeros(tokens, count).index_fill_(1, torch.tensor(loaded), 1.0)
    best = (chances * expected).argmax(-1)
    budget = MoeBudget(union=limit, survival=survival)
    by_kernel, _ = experts.restrict(chances, _weights(1, "normalise"), budget, 0)
    assert torch.equal(_routed(chances, 1, "normalise", budget, counts).argmax(-1), best)
    assert torch.equal(by_kernel.argmax(-1), best)
    _assert_alike(chances, 1, "normalise", limit, counts)


def test_the_kernel_ranks_equal_experts_by_number() -> None:
    found = kernel_route(torch.full((3, 5), 0.2, device=DEVICE), top_k=2, normalise=True, unit=False, limit=1)
    assert found.cpu().tolist() == [[1.0, 0, 0, 0, 0]] * 3
    chances = torch.tensor([[0.3, 0.3, 0.1, 0.3], [0.1, 0.3, 0.3, 0.3]], device=DEVICE)
    found = kernel_route(chances, top_k=2, normalise=False, unit=True)
    assert found.cpu().tolist() == [[1.0, 1, 0, 0], [0, 1, 1, 0]]


def test_the_kernel_refuses_what_does_not_fit() -> None:
    choices = {"top_k": 2, "normalise": True, "unit": False}
    for wrong in (torch.ones(65, 4), torch.ones(4, 257), torch.ones(4, 8).bfloat16()):
        with pytest.raises(ValueError, match="64 by 256"):
            kernel_route(wrong.to(DEVICE), **choices)
    with pytest.raises(ValueError, match="limit=0"):
        kernel_route(torch.ones(4, 8, device=DEVICE), limit=0, **choices)
    assert kernel_route(torch.ones(0, 8, device=DEVICE), **choices).shape == (0, 8)


def test_without_weights_all_tokens_count_alike() -> None:
    chances = torch.tensor([[0.6, 0.3, 0.06, 0.04], [0.1, 0.15, 0.35, 0.4], [0.03, 0.07, 0.5, 0.4]])
    budget = MoeBudget(union=2, survival=1.0)
    alike = _routed(chances, 2, "plain", budget, None)
    assert (alike != 0).tolist() == [[False, False, True, True]] * 3
    assert torch.equal(alike, _routed(chances, 2, "plain", budget, survival_weights(3, 1.0, chances.device)))
    first = _routed(chances, 2, "plain", budget, torch.tensor([1.0, 0.0, 0.0]))
    assert (first != 0).tolist() == [[True, True, False, False]] * 3
    torch.testing.assert_close(first.sum(-1), torch.tensor([0.9, 0.75, 0.9]))


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="limit=0"):
        route(_probabilities(2, 4, 0), top_k=2, normalise=True, unit=False, limit=0)


@pytest.mark.parametrize("outside", ["substitute", "drop"])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("union", [None, 3])
def test_no_value_is_read_back(union: int | None, kind: str, outside: str) -> None:
    """Meta tensors have shapes only: whatever needs a value on the host raises."""
    chances, counts = torch.empty(7, 10, device="meta"), torch.empty(7, device="meta")
    budget = MoeBudget(union=union, outside=outside)
    assert _routed(chances, 4, kind, budget, counts).shape == (7, 10)
    assert _routed(chances, 4, kind, budget, None).is_meta
    assert experts.route(chances, _weights(4, kind)).is_meta


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="no GPU")
def test_a_captured_routing_follows_its_probabilities() -> None:
    budget = MoeBudget(union=32)
    chances = _probabilities(60, 128, 0).to(DEVICE)
    counts = survival_weights(60, budget.survival, chances.device)
    _routed(chances, 8, "normalise", budget, counts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = _routed(chances, 8, "normalise", budget, counts)
    for seed in range(1, 4):
        fresh = _probabilities(60, 128, seed)
        chances.copy_(fresh)
        graph.replay()
        expected, _ = experts.restrict(fresh, _weights(8, "normalise"), budget, 0)
        torch.testing.assert_close(output.cpu(), expected)
