"""The sparse feed-forward network by Triton kernels against fp64: odd shapes, channels that nothing may read, ties."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from sparse.budget import FfnBudget
from sparse.ops.sparse_ffn import eager
from sparse.tree import survival_weights
from tests.ops.interpreter import DEVICE, kernel

ffn = kernel("sparse_ffn", "ffn")
choose = kernel("sparse_ffn", "choose")
choose_above = kernel("sparse_ffn", "choose_above")

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
NAN = float("nan")
CASES = [
    # rows, hidden, width, chosen
    (1, 24, 40, 1),
    (7, 72, 90, 33),
    (16, 64, 300, 270),
    (17, 40, 40, 40),
    (61, 65, 50, 31),
    (67, 48, 280, 257),
]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that a kernel is given to fill holds NaN or the largest integers before."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def tensors(n: int, hidden: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, activations and channels of a network."""
    random = torch.Generator().manual_seed(n * 1000 + width)
    rows = torch.randn(n, hidden, generator=random)
    activations = torch.randn(n, width, generator=random)
    channels = torch.randn(width, 2 * hidden, generator=random) * hidden**-0.5
    return rows.to(dtype), activations.to(dtype), channels.to(dtype)


def truth(rows: Tensor, activations: Tensor, channels: Tensor, index: Tensor) -> Tensor:
    up, down = channels[index].double().chunk(2, dim=1)
    return (activations[:, index].double() * (rows.double() @ up.T)) @ down


def run(*given_tensors: Tensor, count: int | None = None) -> Tensor:
    counted = None if count is None else torch.tensor([count], dtype=torch.int32, device=DEVICE)
    found: Tensor = ffn(*(tensor.to(DEVICE) for tensor in given_tensors), counted)
    return found.cpu()


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def poisoned(activations: Tensor, channels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """NaN wherever a channel was not chosen."""
    activations, channels = activations.clone(), channels.clone()
    others = torch.ones(channels.shape[0], dtype=torch.bool).index_fill_(0, index, False)
    activations[:, others], channels[others] = NAN, NAN
    return activations, channels


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n, hidden, width, chosen", CASES)
def test_output_is_that_of_the_chosen_channels(
    n: int, hidden: int, width: int, chosen: int, dtype: torch.dtype
) -> None:
    rows, activations, channels = tensors(n, hidden, width, dtype)
    index = torch.randperm(width, generator=torch.Generator().manual_seed(chosen))[:chosen]
    exact = truth(rows, activations, channels, index)
    found = run(rows, *poisoned(activations, channels, index), index)
    assert found.dtype == dtype and found.shape == rows.shape
    assert relative_error(found, exact) < TOLERANCE[dtype]
    if chosen < width:
        assert relative_error(found, truth(rows, activations, channels, torch.arange(width))) > 0.05


@pytest.mark.parametrize("count", [0, 1, 16, 129, 270, 300])
def test_only_the_counted_channels_count(count: int) -> None:
    """What stands after them in the index is not even looked at; a count beyond the index takes all of it."""
    rows, activations, channels = tensors(5, 40, 280, torch.float32)
    index = torch.arange(279, 9, -1)
    used = index[:count].clone()
    index[count:] = 1 << 40
    found = run(rows, *poisoned(activations, channels, used), index, count=count)
    exact = truth(rows, activations, channels, used)
    assert (found.double() - exact).norm() <= TOLERANCE[torch.float32] * exact.norm()


def test_rows_of_wider_tensors_are_taken_as_they_are() -> None:
    rows, activations, channels = tensors(6, 40, 70, torch.bfloat16)
    index = torch.arange(0, 70, 3)
    wide = [torch.full((len(tensor), tensor.shape[1] + 5), NAN).to(tensor) for tensor in (rows, activations, channels)]
    for padded, tensor in zip(wide, (rows, activations, channels), strict=True):
        padded[:, : tensor.shape[1]] = tensor
    views = [padded[:, : tensor.shape[1]] for padded, tensor in zip(wide, (rows, activations, channels), strict=True)]
    assert torch.equal(run(*views, index), run(rows, activations, channels, index))
    assert torch.equal(choose(views[1].to(DEVICE), 9), choose(activations.to(DEVICE), 9))


def test_no_rows_and_no_channels() -> None:
    rows, activations, channels = tensors(2, 16, 20, torch.float32)
    assert not run(rows, activations, channels, torch.arange(0)).any()
    assert run(rows[:0], activations[:0], channels, torch.arange(3)).shape == (0, 16)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mask", ["union", "weighted", "root"])
@pytest.mark.parametrize("n, width, keep", [(1, 5, 5), (3, 100, 37), (40, 257, 1), (5, 512, 300)])
def test_topk_channels_are_those_of_the_cpu_path(n: int, width: int, keep: int, mask: str, dtype: torch.dtype) -> None:
    activations = torch.randn(n, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    ranked = activations[:1] if mask == "root" else activations
    weights = survival_weights(n, 0.7, torch.device("cpu")) if mask == "weighted" else None
    budget = FfnBudget(rule="topk", keep=keep / width, mask=mask, survival=0.7)
    magnitudes = eager._magnitudes(activations, budget, None).float()
    found = choose(ranked.to(DEVICE), keep, None if weights is None else weights.to(DEVICE)).cpu()
    assert found.dtype == torch.int64 and found.shape == (keep,)
    assert bool((found.diff() > 0).all())
    assert_close(magnitudes[found].sort().values, magnitudes.topk(keep).values.sort().values, rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=25, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.lists(st.sampled_from([0.0, -0.0, 1e-45, -1e-30, 0.5, -0.5, 2.0, 3e38]), min_size=1, max_size=70), st.data())
def test_ties_go_to_the_lower_channel(values: list[float], data: st.DataObject) -> None:
    activations = torch.tensor([values])
    keep = data.draw(st.integers(1, len(values)))
    order = activations[0].abs().argsort(descending=True, stable=True)
    assert choose(activations.to(DEVICE), keep).tolist() == sorted(order[:keep].tolist())
    threshold = data.draw(st.sampled_from([0.0, 1e-45, 0.5, 0.6, 1e38, 3.4e38]))
    index, count = choose_above(activations.to(DEVICE), threshold)
    expected = (activations[0].abs() >= threshold).nonzero().squeeze(1).tolist() or order[:1].tolist()
    assert index.tolist() == expected + [0] * (len(values) - len(expected))
    assert count.dtype == torch.int32 and count.tolist() == [len(expected)]


@pytest.mark.parametrize("threshold", [0.0, 0.8, 99.0])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_channels_above_a_threshold_go_straight_into_the_product(dtype: torch.dtype, threshold: float) -> None:
    rows, activations, channels = tensors(4, 40, 150, dtype)
    weights = survival_weights(4, 0.7, torch.device("cpu"))
    budget = FfnBudget(rule="threshold", tau=max(threshold, 0.1), mask="weighted", survival=0.7)
    magnitudes = eager._magnitudes(activations, budget, None)
    expected = (magnitudes >= threshold).nonzero().squeeze(1)
    expected = expected if expected.numel() else magnitudes.argmax(dim=0, keepdim=True)
    index, count = choose_above(activations.to(DEVICE), threshold, weights.to(DEVICE))
    assert index[: count.item()].tolist() == expected.tolist()
    found = ffn(rows.to(DEVICE), activations.to(DEVICE), channels.to(DEVICE), index, count).cpu()
    assert relative_error(found, truth(rows, activations, channels, expected)) < TOLERANCE[dtype]


def test_the_widest_layer() -> None:
    activations = torch.randn(1, 28672, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = choose(activations.to(DEVICE), 9000).cpu()
    order = activations[0].abs().float().argsort(descending=True, stable=True)
    assert torch.equal(found, order[:9000].sort().values)


def test_tensors_that_do_not_fit_are_refused() -> None:
    rows, activations, channels = tensors(3, 16, 20, torch.float32)
    index = torch.arange(4)
    for wrong in (
        (rows[:, :15], activations, channels, index),
        (rows[:2], activations, channels, index),
        (rows, activations, channels, index[None]),
        (rows.bfloat16(), activations, channels, index),
        (rows.double(), activations.double(), channels.double(), index),
        (rows, activations, channels, index.int()),
        (rows, activations, channels, index, index[:1]),
        (rows, activations, channels.T.contiguous().T, index),
    ):
        with pytest.raises(ValueError):
            ffn(*wrong)
    for keep in (0, 21):
        with pytest.raises(ValueError, match="20 channels"):
            choose(activations, keep)
    for bad, weights in (
        (activations[:0], None),
        (torch.zeros(1, 40000), None),
        (activations.T, None),
        (activations.double(), None),
        (activations, torch.ones(2)),
        (activations, torch.ones(3).double()),
    ):
        with pytest.raises(ValueError):
            choose_above(bad, 0.1, weights)
