"""The sparse feed-forward network against the naive one: odd shapes, every kernel, channels that nothing may read."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sparse.budget import FfnBudget
from sparse.ops.native import build
from sparse.ops.sparse_ffn import eager, naive, native
from sparse.ops.weights import FfnWeights

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
NAN = float("nan")


@dataclass(frozen=True)
class Network:
    gate: Tensor
    up: Tensor
    down: Tensor
    rows: Tensor
    weights: FfnWeights

    def truth(self, mask: Tensor) -> Tensor:
        return naive.ffn(self.rows, self.gate, self.up, self.down, mask)

    def chosen(self, channels: Tensor) -> Tensor:
        """[n, width], bool: every row keeps ``channels``."""
        mask = torch.zeros(self.rows.shape[0], self.weights.width, dtype=torch.bool)
        mask[:, channels] = True
        return mask


def network(rows: int, hidden: int, width: int, dtype: torch.dtype = torch.float32) -> Network:
    torch.manual_seed(rows * 1000 + width)
    gate, up = ((torch.randn(width, hidden) * hidden**-0.5).to(dtype) for _ in range(2))
    down = (torch.randn(hidden, width) * width**-0.5).to(dtype)
    fused = torch.cat((gate, up))
    weights = FfnWeights(
        width,
        gate_up=lambda x: functional.linear(x, fused),
        down=lambda x: functional.linear(x, down),
        gate=lambda x: functional.linear(x, gate),
        channels=eager.channel_rows(up, down),
    )
    return Network(gate, up, down, torch.randn(rows, hidden).to(dtype), weights)


def relative_error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


@pytest.fixture
def reloaded() -> Iterator[None]:
    """The library is looked for anew, in this test and after it."""
    native.load.cache_clear()
    yield
    native.load.cache_clear()


@pytest.fixture(params=["native", "torch"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs once with the kernel and once without; the path that must be taken."""
    if request.param == "torch":
        monkeypatch.setattr(native, "available", lambda dtype: False)
        return eager.TORCH_PATH
    need_kernels()
    return eager.NATIVE_PATH


def need_kernels() -> None:
    if shutil.which("c++") is None:
        pytest.skip("no compiler")
    assert native.available(torch.float32) and native.available(torch.bfloat16)


SHAPES = [
    # rows, hidden, width, kept channels
    (1, 48, 37, 1),
    (2, 48, 130, 129),
    (3, 41, 66, 33),
    (4, 576, 203, 64),
    (5, 33, 97, 47),
    (6, 576, 1536, 1),
    (7, 576, 1536, 1023),
    (8, 64, 50, 31),
    (9, 48, 131, 100),
    (16, 96, 77, 76),
    (17, 47, 98, 97),
    (19, 576, 301, 158),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows, hidden, width, kept", SHAPES)
def test_chosen_channels_equal_the_reference_and_the_others_are_not_read(
    rows: int, hidden: int, width: int, kept: int, dtype: torch.dtype, either: str
) -> None:
    net = network(rows, hidden, width, dtype)
    channels = torch.randperm(width)[:kept]
    mask = net.chosen(channels)
    assert net.weights.channels is not None
    poisoned = replace(net.weights, channels=net.weights.channels.masked_fill(~mask[0][:, None], NAN))
    activations = eager.activations(net.rows, net.weights).masked_fill(~mask, NAN)
    assert eager.path(poisoned) == either
    found = eager.sparse_ffn(net.rows, activations, poisoned, channels)
    assert found.dtype == dtype
    truth = net.truth(mask)
    assert relative_error(found, truth) < TOLERANCE[dtype]
    if kept < 0.9 * width:
        assert relative_error(truth, net.truth(torch.ones_like(mask))) > 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows, hidden, width, kept", SHAPES)
def test_every_kernel_is_as_exact_as_torch(rows: int, hidden: int, width: int, kept: int, dtype: torch.dtype) -> None:
    need_kernels()
    net = network(rows, hidden, width, dtype)
    channels = torch.randperm(width)[:kept]
    stored = net.weights.channels
    assert stored is not None
    activations = eager.activations(net.rows, net.weights)
    up, down = stored[channels, :hidden], stored[channels, hidden:]
    exact = (activations[:, channels].double() * (net.rows.double() @ up.double().T)) @ down.double()
    plain = relative_error((activations[:, channels] * (net.rows @ up.T)) @ down, exact)
    for variant in native.variants(dtype):
        error = relative_error(native.ffn(net.rows, activations, stored, channels, variant), exact)
        assert error < max(1.5 * plain, 5e-7), variant


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_changes_nothing_but_rounding(threads: int) -> None:
    need_kernels()
    net = network(7, 100, 333, torch.bfloat16)
    channels = torch.randperm(333)[:205]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = eager.sparse_ffn(net.rows, eager.activations(net.rows, net.weights), net.weights, channels)
    finally:
        torch.set_num_threads(before)
    assert relative_error(found, net.truth(net.chosen(channels))) < TOLERANCE[torch.bfloat16]


def test_the_kernel_takes_views(either: str) -> None:
    net = network(5, 48, 70)
    wide = torch.cat((net.rows, net.rows), 1)[:, 48:]
    activations = eager.activations(net.rows, net.weights)
    strided = torch.stack((activations, activations), 2)[:, :, 1]
    channels = torch.arange(70)[1::3]
    found = eager.sparse_ffn(wide, strided, net.weights, channels)
    assert relative_error(found, net.truth(net.chosen(channels))) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_all_channels_equal_the_dense_network(dtype: torch.dtype, either: str) -> None:
    net = network(7, 48, 131, dtype)
    everything = torch.ones(7, 131, dtype=torch.bool)
    truth = net.truth(everything)
    activations = eager.activations(net.rows, net.weights)
    for found in (
        eager.dense_ffn(net.rows, net.weights),
        eager.sparse_ffn(net.rows, activations, net.weights, torch.randperm(131)),
        eager.masked_ffn(net.rows, activations, net.weights, everything),
    ):
        assert relative_error(found, truth) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_mask_per_token_drops_each_row_s_own_channels(dtype: torch.dtype) -> None:
    net = network(6, 48, 101, dtype)
    activations = eager.activations(net.rows, net.weights)
    mask = eager.token_mask(activations, FfnBudget(rule="topk", keep=0.3, mask="token"), 0)
    found = eager.masked_ffn(net.rows, activations.masked_fill(~mask, NAN), net.weights, mask)
    assert relative_error(found, net.truth(mask)) < TOLERANCE[dtype]
    assert relative_error(found, net.truth(torch.ones_like(mask))) > 10 * TOLERANCE[dtype]


def test_the_reference_is_the_formula() -> None:
    gate, up, down = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [5.0]]), torch.tensor([[7.0, 11.0]])
    mask = torch.tensor([[True, True], [False, True]])
    silu = [x / (1 + 2.718281828459045**-x) for x in (1.0, 2.0, 4.0)]
    expected = [[silu[0] * 3 * 7 + silu[1] * 5 * 11], [silu[2] * 10 * 11]]
    found = naive.ffn(torch.tensor([[1.0], [2.0]]), gate, up, down, mask)
    assert found.tolist() == [pytest.approx(row) for row in expected]


ACTIVATIONS = torch.tensor([[0.1, -0.9, 0.3, 0.0, 0.2], [0.8, 0.1, 0.0, 0.0, -0.6], [0.0, 0.1, 0.0, 1.0, 0.6]])


# weighted, survival 0.25: magnitudes times 1.3125 are 0.3, 0.93125, 0.3, 0.0625, 0.3875
@pytest.mark.parametrize("mask, expected", [("union", {1, 3}), ("root", {1, 2}), ("weighted", {1, 4})])
def test_shared_masks_rank_by_their_definition(mask: str, expected: set[int]) -> None:
    budget = FfnBudget(rule="topk", keep=0.4, mask=mask, survival=0.25)
    assert set(eager.select_channels(ACTIVATIONS, budget, 0).tolist()) == expected


@pytest.mark.parametrize("mask", ["union", "root", "weighted"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows, width, keep", [(1, 37, 0.01), (7, 130, 0.5), (19, 203, 0.99)])
def test_shared_topk_keeps_the_strongest(rows: int, width: int, keep: float, dtype: torch.dtype, mask: str) -> None:
    torch.manual_seed(rows)
    activations = torch.randn(rows, width).to(dtype)
    budget = FfnBudget(rule="topk", keep=keep, mask=mask, survival=0.6)
    channels = eager.select_channels(activations, budget, 0)
    assert channels.dtype == torch.int64
    kept = channels.tolist()
    assert len(kept) == len(set(kept)) == max(1, round(keep * width))
    magnitudes = activations.double().abs()
    share = torch.tensor([0.6**n for n in range(rows)], dtype=torch.float64)
    scores = {
        "union": magnitudes.max(0).values,
        "root": magnitudes[0],
        "weighted": (share[:, None] * magnitudes).sum(0) / share.sum(),
    }[mask]
    dropped = [channel for channel in range(width) if channel not in set(kept)]
    assert scores[kept].min() >= scores[dropped].max() - 1e-6


def test_thresholds_keep_what_reaches_them_and_at_least_the_strongest() -> None:
    def kept(**fields: object) -> list[int]:
        return sorted(eager.select_channels(ACTIVATIONS, FfnBudget(**fields), 1).tolist())  # type: ignore[arg-type]

    assert kept(rule="threshold", tau=0.6) == [0, 1, 3, 4]
    assert kept(rule="threshold", tau=0.6, mask="root") == [1]
    assert kept(rule="threshold", tau=0.0) == [0, 1, 2, 3, 4]
    assert kept(rule="threshold", tau=9.0) == [3]
    assert kept(rule="threshold", tau=9.0, mask="root") == [1]
    assert kept(rule="quantile", thresholds=(0.0, 0.85)) == [1, 3]
    # weighted, survival 0.5, divided by 1.75: 0.286, 0.557, 0.171, 0.143, 0.371
    assert kept(rule="threshold", tau=0.36, mask="weighted", survival=0.5) == [1, 4]
    assert kept(rule="topk", keep=1.0) == kept(rule="dense") == [0, 1, 2, 3, 4]


def test_token_masks_rank_each_row_for_itself() -> None:
    def mask(**fields: object) -> list[list[int]]:
        found = eager.token_mask(ACTIVATIONS, FfnBudget(mask="token", **fields), 1)  # type: ignore[arg-type]
        assert found.dtype == torch.bool
        return [row.nonzero().squeeze(1).tolist() for row in found]

    assert mask(rule="topk", keep=0.4) == [[1, 2], [0, 4], [3, 4]]
    assert mask(rule="topk", keep=0.01) == [[1], [0], [3]]
    assert mask(rule="threshold", tau=0.6) == [[1], [0, 4], [3, 4]]
    assert mask(rule="threshold", tau=0.95) == [[1], [0], [3]]
    assert mask(rule="quantile", thresholds=(0.0, 0.25)) == [[1, 2], [0, 4], [3, 4]]
    assert mask(rule="dense") == [[0, 1, 2, 3, 4]] * 3


def test_thresholds_are_not_rounded_to_the_dtype_of_the_activations() -> None:
    activations = torch.tensor([[0.05, 0.4]]).bfloat16()
    stored = activations[0, 0].item()
    above = stored * (1 + 2**-12)
    assert torch.tensor(above).bfloat16().item() == stored
    budget = FfnBudget(rule="threshold", tau=above)
    assert eager.select_channels(activations, budget, 0).tolist() == [1]
    assert eager.token_mask(activations, budget, 0).tolist() == [[False, True]]


def test_channel_rows_put_a_channel_side_by_side() -> None:
    up, down = torch.randn(5, 3), torch.randn(3, 5)
    rows = eager.channel_rows(up, down)
    assert rows.shape == (5, 6) and rows.is_contiguous()
    assert torch.equal(rows[2], torch.cat((up[2], down[:, 2])))


def test_what_was_not_prepared_or_does_not_fit_is_refused() -> None:
    net = network(2, 8, 5)
    bare = replace(net.weights, gate=None, channels=None)
    activations = eager.activations(net.rows, net.weights)
    assert eager.path(bare) == eager.TORCH_PATH
    with pytest.raises(ValueError, match="dense path"):
        eager.activations(net.rows, bare)
    with pytest.raises(ValueError, match="dense path"):
        eager.sparse_ffn(net.rows, activations, bare, torch.arange(2))
    with pytest.raises(ValueError, match="share"):
        eager.select_channels(activations, FfnBudget(rule="topk", keep=0.5, mask="token"), 0)


def test_the_kernel_refuses_what_would_read_beyond_its_tensors() -> None:
    need_kernels()
    net = network(2, 8, 5)
    activations = eager.activations(net.rows, net.weights)
    stored = net.weights.channels
    assert stored is not None
    for index in (torch.tensor([0, 5]), torch.tensor([-1])):
        with pytest.raises(IndexError, match="outside"):
            native.ffn(net.rows, activations, stored, index)
    for rows, gated, channels, index in (
        (net.rows[:1], activations, stored, torch.arange(2)),
        (net.rows, activations, stored[:4], torch.arange(2)),
        (net.rows, activations, stored[:, :10], torch.arange(2)),
        (net.rows, activations, stored, torch.arange(2, dtype=torch.int32)),
        (net.rows.bfloat16(), activations, stored, torch.arange(2)),
        (net.rows, activations, stored.T.contiguous().T, torch.arange(2)),
    ):
        with pytest.raises(ValueError):
            native.ffn(rows, gated, channels, index)
    with pytest.raises(RuntimeError, match="no such FFN kernel"):
        native.ffn(net.rows, activations, stored, torch.arange(2), variant=3)
    double = [tensor.double() for tensor in (net.rows, activations, stored)]
    assert not native.available(torch.float64)
    with pytest.raises(RuntimeError, match="no such FFN kernel"):
        native.ffn(*double, torch.arange(2))


def test_the_switch_turns_the_kernel_off(reloaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(3, 48, 37)
    monkeypatch.setenv(build.SWITCH, "0")
    assert not native.available(torch.float32)
    assert eager.path(net.weights) == eager.TORCH_PATH
    channels = torch.arange(20)
    found = eager.sparse_ffn(net.rows, eager.activations(net.rows, net.weights), net.weights, channels)
    assert relative_error(found, net.truth(net.chosen(channels))) < TOLERANCE[torch.float32]


def test_a_kernel_that_computes_nonsense_is_not_used(reloaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    need_kernels()
    native.load.cache_clear()
    monkeypatch.setattr(native, "_call", lambda kernels, variant, rows, *others: torch.zeros_like(rows))
    assert not native.available(torch.float32)
