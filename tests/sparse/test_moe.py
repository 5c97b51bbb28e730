"""The fast mixture-of-experts layer against the naive one, and that what no token runs is not touched."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sparse.ops.moe import eager, native
from sparse.ops.moe.naive import Matrices
from sparse.ops.moe.naive import moe as naive_moe
from sparse.ops.weights import FfnWeights, LinearMap, MoeWeights

HIDDEN, WIDTH, EXPERTS = 37, 11, 7


def _linear(weight: Tensor) -> LinearMap:
    return lambda rows: functional.linear(rows, weight)


def _network(parts: list[Matrices], dtype: torch.dtype) -> FfnWeights:
    gate, up = (torch.cat([getattr(part, name) for part in parts]).to(dtype) for name in ("gate", "up"))
    down = torch.cat([part.down for part in parts], 1).to(dtype)
    return FfnWeights(width=gate.shape[0], gate_up=_linear(torch.cat((gate, up))), down=_linear(down))


def _matrices(width: int) -> Matrices:
    return Matrices(*(torch.randn(shape) * 0.3 for shape in ((width, HIDDEN), (width, HIDDEN), (HIDDEN, width))))


def _layer(
    shared: bool, fused: bool = False, dtype: torch.dtype = torch.float32, poisoned: tuple[int, ...] = ()
) -> tuple[MoeWeights, list[Matrices], Matrices | None]:
    """A layer, its experts' matrices and its shared expert's; ``poisoned`` experts compute NaN."""
    parts, extra = [_matrices(WIDTH) for _ in range(EXPERTS)], _matrices(19) if shared else None
    stored = [Matrices(*(torch.full_like(x, float("nan")) for x in (p.gate, p.up, p.down))) for p in parts]
    used = [stored[number] if number in poisoned else part for number, part in enumerate(parts)]
    values: dict[str, Any] = {
        "router": _linear(torch.zeros(EXPERTS, HIDDEN)),
        "experts": tuple(_network([part], dtype) for part in used),
        "shared": None if extra is None else _network([extra], dtype),
        "top_k": 2,
        "normalise": True,
    }
    if not fused:
        return MoeWeights(**values), parts, extra
    every = [*used, *([] if extra is None else [extra])]
    channels = torch.cat([torch.cat((part.gate, part.up, part.down.T), 1) for part in every]).to(dtype)
    return eager.FusedMoeWeights(**values, fused=_network(every, dtype), channels=channels), parts, extra


def _routing(tokens: int, experts: list[int], per_token: int = 2) -> Tensor:
    """Random weights; every one of ``experts`` runs for some token if there are enough of them, no other does."""
    combine = torch.zeros(tokens, EXPERTS)
    for token in range(tokens):
        for number in range(min(per_token, len(experts))):
            combine[token, experts[(token * per_token + number) % len(experts)]] = torch.rand(()) + 0.1
    return combine


def _distance(found: Tensor, truth: Tensor) -> float:
    assert found.shape == truth.shape
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 7, eager._FEW_ROWS, eager._FEW_ROWS + 1, 83])
@pytest.mark.parametrize("experts", [[3], [0, 6], [5, 1, 2], list(range(EXPERTS))])
def test_only_the_experts_that_run_are_read(tokens: int, experts: list[int], shared: bool) -> None:
    torch.manual_seed(tokens)
    idle = tuple(set(range(EXPERTS)) - set(experts[: 2 * tokens]))
    weights, parts, extra = _layer(shared, poisoned=idle)
    rows, combine = torch.randn(tokens, HIDDEN), _routing(tokens, experts)
    truth = naive_moe(rows, combine, parts, extra)
    assert _distance(eager.moe(rows, combine, weights), truth) < 1e-6
    assert _distance(eager._by_expert(rows, combine, weights, None), naive_moe(rows, combine, parts)) < 1e-6


@pytest.mark.parametrize("tokens", [5, 40])
def test_tokens_may_run_any_number_of_experts(tokens: int) -> None:
    """An ablation may leave a token without an expert, or give it all of them."""
    torch.manual_seed(0)
    weights, parts, extra = _layer(True)
    rows, combine = torch.randn(tokens, HIDDEN), torch.rand(tokens, EXPERTS)
    combine[1], combine[3, 2:] = 0, 0
    assert _distance(eager.moe(rows, combine, weights), naive_moe(rows, combine, parts, extra)) < 1e-6
    nothing = torch.zeros_like(combine)
    assert _distance(eager.moe(rows, nothing, weights), naive_moe(rows, nothing, parts, extra)) < 1e-6


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tokens", [1, 6, 50])
def test_experts_side_by_side_give_the_same(tokens: int, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a kernel many experts run as one network, few of them one by one, and then the others are not touched."""
    monkeypatch.setattr(native, "available", lambda _: False)
    torch.manual_seed(1)
    weights, parts, extra = _layer(shared, fused=True)
    rows = torch.randn(tokens, HIDDEN)
    own = "all_rows" if tokens <= eager._FEW_ROWS else "by_expert"
    for experts, form in ((list(range(EXPERTS)), "fused"), ([1, 2, 4, 6], "simulated"), ([2, 5], own)):
        combine = _routing(tokens, experts, per_token=len(experts))
        assert eager.path(weights, len(experts), tokens) == f"moe.{form}"
        assert _distance(eager.moe(rows, combine, weights), naive_moe(rows, combine, parts, extra)) < 1e-6
    poisoned, parts, extra = _layer(shared, fused=True, poisoned=(0, 3, 6))
    combine = _routing(tokens, [1, 2], per_token=2)
    assert _distance(eager.moe(rows, combine, poisoned), naive_moe(rows, combine, parts, extra)) < 1e-6
    assert eager.path(_layer(shared)[0], EXPERTS, tokens) == f"moe.{own}"


@pytest.mark.skipif(not native.available(torch.bfloat16), reason="this CPU has no tile registers, or no compiler")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tokens", [1, 6, 7, eager._FEW_ROWS])
@pytest.mark.parametrize("experts", [[3], [1, 2, 4, 6], [0, 1, 2, 3, 4, 5]])
def test_the_kernel_reads_the_union_and_equals_the_reference(experts: list[int], tokens: int, shared: bool) -> None:
    torch.manual_seed(tokens)
    idle = tuple(set(range(EXPERTS)) - set(experts[: 2 * tokens]))
    weights, parts, extra = _layer(shared, fused=True, dtype=torch.bfloat16, poisoned=idle)
    low = [Matrices(*(x.bfloat16() for x in (part.gate, part.up, part.down))) for part in parts]
    lower = None if extra is None else Matrices(*(x.bfloat16() for x in (extra.gate, extra.up, extra.down)))
    rows, combine = torch.randn(tokens, HIDDEN).bfloat16(), _routing(tokens, experts)
    assert eager.path(weights, len(experts), tokens) == "moe.native"
    assert _distance(eager.moe(rows, combine, weights), naive_moe(rows, combine, low, lower)) < 6e-3


def test_the_kernel_computes_large_and_small_gates() -> None:
    """silu far from zero on both sides, where a polynomial of exp could leave its range."""
    if not native.available(torch.bfloat16):
        pytest.skip("this CPU has no tile registers, or no compiler")
    torch.manual_seed(3)
    part = _matrices(32)
    wide = Matrices(part.gate * 400, part.up, part.down)
    low = Matrices(*(x.bfloat16() for x in (wide.gate, wide.up, wide.down)))
    channels = torch.cat((low.gate, low.up, low.down.T), 1).contiguous()
    rows, combine = torch.randn(5, HIDDEN).bfloat16(), torch.rand(5, 2) + 0.5
    found = native.run(rows, combine, channels, 16)
    halves = [Matrices(low.gate[s], low.up[s], low.down[:, s]) for s in (slice(16), slice(16, 32))]
    assert _distance(found, naive_moe(rows, combine, halves)) < 6e-3
    with pytest.raises(ValueError, match="shapes"):
        native.run(rows, combine, channels[:, :-1], 16)
    with pytest.raises(ValueError, match="dtypes"):
        native.run(rows.float(), combine, channels, 16)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tokens", [1, 9, 30])
def test_a_replaced_expert_sees_its_own_rows_in_order(tokens: int, fused: bool) -> None:
    torch.manual_seed(2)
    weights, _, _ = _layer(False, fused=fused)
    rows, combine = torch.randn(tokens, HIDDEN), _routing(tokens, [1, 2, 4, 5, 6], per_token=3)
    seen: dict[int, Tensor] = {}

    def expert(number: int, own: Tensor) -> Tensor:
        assert number not in seen
        seen[number] = own
        return own * (number + 1)

    found = eager.moe(rows, combine, weights, expert)
    scale = combine.double() @ torch.arange(1.0, EXPERTS + 1).double()
    assert _distance(found, rows.double() * scale[:, None]) < 1e-6
    assert set(seen) == set(combine.any(0).nonzero().view(-1).tolist())
    for number, own in seen.items():
        assert torch.equal(own, rows[combine[:, number] != 0])


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_bfloat16_stays_within_its_rounding(tokens: int) -> None:
    """Three units of the last place, 2 ** -8 each: the projections, the activation and the result are rounded."""
    torch.manual_seed(3)
    for fused in (False, True):
        weights, parts, extra = _layer(True, fused=fused, dtype=torch.bfloat16)
        low = [Matrices(*(x.bfloat16() for x in (p.gate, p.up, p.down))) for p in parts]
        assert extra is not None
        low_extra = Matrices(*(x.bfloat16() for x in (extra.gate, extra.up, extra.down)))
        rows, combine = torch.randn(tokens, HIDDEN).bfloat16(), _routing(tokens, list(range(EXPERTS)), per_token=4)
        found = eager.moe(rows, combine, weights)
        assert found.dtype is torch.bfloat16
        assert _distance(found, naive_moe(rows, combine, low, low_extra)) < 3 * 2**-8
