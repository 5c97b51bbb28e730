"""The Triton mixture-of-experts layer against the naive one: the union alone is read, whatever else lies in memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse.ops.moe.naive import Matrices
from sparse.ops.moe.naive import moe as naive_moe
from tests.ops.interpreter import DEVICE, kernel

moe = kernel("moe", "moe")

NAN = float("nan")
TOLERANCE = {
    torch.float32: 1e-6,
    torch.float16: 2**-11,
    torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7,
}
"""Of the norm: activations and outputs are rounded once each, by half a unit of the last place at most; the interpreter
cuts bf16 off instead."""


@contextmanager
def _uninitialised_memory_is_nan() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _combine(tokens: int, experts: int, union: list[int], generator: torch.Generator) -> Tensor:
    """Random weights of about half of the pairs inside ``union``; each of its experts runs for some token."""
    combine = torch.zeros(tokens, experts)
    weights = torch.rand(tokens, len(union), generator=generator) + 0.1
    runs = torch.rand(tokens, len(union), generator=generator) < 0.5
    runs[torch.arange(len(union)) % tokens, torch.arange(len(union))] = True
    combine[:, union] = weights * runs
    return combine


class Layer:
    """Weights [experts, ...] that stand inside larger memory; all but the rows and columns of the union is NaN."""

    def __init__(
        self,
        sizes: tuple[int, int, int],
        union: list[int],
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        experts, hidden, width = sizes
        self.gate_up = self._poisoned(experts, 2 * width, hidden, dtype)
        self.down = self._poisoned(experts, hidden, width, dtype)
        for weights in (self.gate_up, self.down):
            shape = (len(union), *weights.shape[1:])
            weights[union] = (torch.randn(shape, generator=generator) * 0.2).to(dtype).to(DEVICE)
        self.width = width

    @staticmethod
    def _poisoned(experts: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.full((experts, rows + 1, columns + 8), NAN, dtype=dtype, device=DEVICE)[:, :rows, :columns]

    def naive(self, rows: Tensor, combine: Tensor) -> Tensor:
        gate, up = self.gate_up.cpu()[:, : self.width], self.gate_up.cpu()[:, self.width :]
        experts = [Matrices(*parts) for parts in zip(gate, up, self.down.cpu(), strict=True)]
        return naive_moe(rows, combine, experts)

    def found(self, rows: Tensor, combine: Tensor, limit: int | None = None) -> Tensor:
        with _uninitialised_memory_is_nan():
            output: Tensor = moe(rows.to(DEVICE), combine.to(DEVICE), self.gate_up, self.down, limit=limit)
        assert output.dtype is rows.dtype and output.shape == rows.shape
        return output.cpu()


def _distance(found: Tensor, truth: Tensor) -> float:
    assert found.shape == truth.shape
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "experts", "union", "limit", "hidden", "width"),
    [
        (1, 8, 1, 1, 100, 40),
        (1, 8, 2, None, 64, 64),
        (7, 8, 8, None, 136, 72),
        (60, 8, 3, 3, 72, 100),
        (61, 8, 5, 6, 200, 33),
        (100, 8, 8, 8, 72, 136),
        (7, 128, 128, None, 40, 16),
        (60, 128, 20, 32, 72, 40),
    ],
)
def test_only_the_union_is_read_and_the_rest_equals_the_reference(
    tokens: int, experts: int, union: int, limit: int | None, hidden: int, width: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(tokens + union)
    chosen = torch.randperm(experts, generator=generator)[:union].tolist()
    layer = Layer((experts, hidden, width), chosen, generator, dtype)
    rows = torch.randn(tokens, hidden, generator=generator).to(dtype)
    combine = _combine(tokens, experts, chosen, generator)
    found = layer.found(rows, combine, limit)
    assert _distance(found, layer.naive(rows, combine)) < TOLERANCE[dtype]


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 20),
    experts=st.integers(1, 6),
    spare=st.integers(0, 5),
    density=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_any_routing_equals_the_reference(tokens: int, experts: int, spare: int, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    combine = torch.rand(tokens, experts, generator=generator) - 0.5
    combine *= torch.rand(tokens, experts, generator=generator) < density
    union = (combine != 0).any(0).nonzero().view(-1).tolist()
    layer = Layer((experts, 70, 20), union, generator)
    rows = torch.randn(tokens, 70, generator=generator)
    found = layer.found(rows, combine, min(max(len(union), 1) + spare, experts))
    truth = layer.naive(rows, combine)
    assert _distance(found, truth) < TOLERANCE[torch.float32] if union else not found.any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_row_without_experts_is_zero_and_spoils_no_other() -> None:
    """Rows that only fill a captured step up may hold anything."""
    generator = torch.Generator().manual_seed(0)
    layer = Layer((8, 72, 40), [1, 4, 5], generator, torch.bfloat16)
    rows = torch.randn(9, 72, generator=generator).bfloat16()
    combine = _combine(9, 8, [1, 4, 5], generator)
    rows[3], rows[7], rows[8] = NAN, float("inf"), 3e38
    combine[3], combine[7:] = 0, 0
    found, real = layer.found(rows, combine), [0, 1, 2, 4, 5, 6]
    assert not found[[3, 7, 8]].any()
    truth = layer.naive(rows[real], combine[real])
    assert _distance(found[real], truth) < TOLERANCE[torch.bfloat16]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_expert_that_overflows_stays_with_the_rows_that_asked_for_it() -> None:
    generator = torch.Generator().manual_seed(1)
    layer = Layer((3, 72, 40), [0, 2], generator)
    layer.gate_up[2] = 1e30
    rows, combine = torch.rand(4, 72, generator=generator), torch.zeros(4, 3)
    combine[:3, 0], combine[3, 2] = 0.5, 1.0
    found = layer.found(rows, combine)
    assert _distance(found[:3], layer.naive(rows[:3], combine[:3])) < TOLERANCE[torch.float32]
    assert not found[3].isfinite().all()


def test_experts_behind_the_limit_are_left_out() -> None:
    generator = torch.Generator().manual_seed(2)
    layer = Layer((8, 72, 40), [0, 3, 4, 6, 7], generator)
    rows, combine = torch.randn(5, 72, generator=generator), _combine(5, 8, [0, 3, 4, 6, 7], generator)
    first = combine.clone()
    first[:, 5:] = 0
    assert _distance(layer.found(rows, combine, 3), layer.naive(rows, first)) < TOLERANCE[torch.float32]


def test_no_rows_and_rows_of_any_stride() -> None:
    generator = torch.Generator().manual_seed(3)
    layer = Layer((4, 72, 40), [1, 2], generator)
    assert layer.found(torch.zeros(0, 72), torch.zeros(0, 4)).shape == (0, 72)
    rows, combine = torch.randn(72, 5, generator=generator).T, _combine(5, 4, [1, 2], generator)
    assert _distance(layer.found(rows, combine.T.contiguous().T), layer.naive(rows, combine)) < 1e-6


def test_what_does_not_fit_is_refused() -> None:
    generator = torch.Generator().manual_seed(4)
    layer = Layer((4, 72, 40), [1], generator)
    rows, combine = torch.zeros(5, 72), torch.zeros(5, 4)
    for limit in (0, 5):
        with pytest.raises(ValueError, match=f"limit={limit}"):
            layer.found(rows, combine, limit)
    with pytest.raises(ValueError, match="shapes"):
        layer.found(rows[:4], combine)
    with pytest.raises(ValueError, match="shapes"):
        layer.found(rows[:, 1:], combine)
    with pytest.raises(ValueError, match="dimensions"):
        layer.found(rows[0], combine)
    with pytest.raises(ValueError, match="dtypes"):
        layer.found(rows.double(), combine)
    with pytest.raises(ValueError, match="dtypes"):
        layer.found(rows, combine.bool())
    layer.down = layer.down.mT.contiguous().mT
    with pytest.raises(ValueError, match="unit stride"):
        layer.found(rows, combine)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_captured_layer_follows_its_routing(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    layer = Layer((16, 520, 264), list(range(16)), generator, dtype)
    static_rows = torch.zeros(60, 520, dtype=dtype, device=DEVICE)
    static_combine = torch.ones(60, 16, device=DEVICE)
    moe(static_rows, static_combine, layer.gate_up, layer.down, limit=12)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = moe(static_rows, static_combine, layer.gate_up, layer.down, limit=12)
    for union in ([3], [0, 5, 15], list(range(2, 14)), [7, 8]):
        rows, combine = torch.randn(60, 520, generator=generator).to(dtype), _combine(60, 16, union, generator)
        static_rows.copy_(rows)
        static_combine.copy_(combine)
        graph.replay()
        found = output.cpu()
        assert _distance(found, layer.naive(rows, combine)) < TOLERANCE[dtype]
        graph.replay()
        assert torch.equal(output.cpu(), found)
