"""A whole sparse FFN layer in one call of the kernel, against the naive reference and against its parts."""

from dataclasses import replace

import pytest
import torch

from sparse.budget import FfnBudget
from sparse.ops.sparse_ffn import eager, native
from tests.sparse.test_sparse_ffn import NAN, TOLERANCE, network, relative_error


@pytest.mark.parametrize("mask", ["union", "root", "weighted"])
@pytest.mark.parametrize("rule", ["topk", "threshold", "quantile"])
@pytest.mark.parametrize("rows, hidden, width", [(1, 64, 32), (7, 576, 1536), (8, 96, 160), (16, 64, 96), (17, 32, 64)])
def test_a_whole_layer_in_one_call_equals_the_reference(
    rows: int, hidden: int, width: int, rule: str, mask: str
) -> None:
    """Gates, choice and chosen channels; what is chosen may differ from the parts only where magnitudes nearly tie."""
    made = network(rows, hidden, width, torch.bfloat16)
    weights = replace(made.weights, gate_rows=made.gate)
    if not eager.fuses(weights):
        pytest.skip("this CPU has no tile registers, or no compiler")
    budget = FfnBudget(rule=rule, keep=0.6, tau=0.3, thresholds=(0.2, 0.25), mask=mask, survival=0.6)
    found, channels = eager.fused_ffn(made.rows, weights, budget, 1)
    assert channels.tolist() == sorted(set(channels.tolist())) and (
        rule != "topk" or len(channels) == round(0.6 * width)
    )
    assert relative_error(found, made.truth(made.chosen(channels))) < TOLERANCE[torch.bfloat16]
    magnitudes = eager._magnitudes(eager.activations(made.rows, weights), budget, None).float()
    others = magnitudes[~made.chosen(channels)[0]]
    if len(others) and rule == "topk":
        assert magnitudes[channels].min() >= others.max() - 0.02 * magnitudes.max()
    elif len(others):
        assert magnitudes[channels].min() >= 0.99 * budget.threshold(1) or len(channels) == 1
        assert others.max() <= 1.01 * budget.threshold(1)
    poisoned = weights.channels.clone()  # type: ignore[union-attr]
    poisoned[~made.chosen(channels)[0]] = NAN
    assert torch.equal(eager.fused_ffn(made.rows, replace(weights, channels=poisoned), budget, 1)[0], found)


def test_a_layer_that_does_not_fit_the_kernel_is_refused() -> None:
    made = network(3, 48, 64, torch.bfloat16)
    budget = FfnBudget(rule="topk", keep=0.5)
    assert not eager.fuses(made.weights) and not eager.fuses(replace(made.weights, gate_rows=made.gate))
    with pytest.raises(ValueError, match="by channel"):
        eager.fused_ffn(made.rows, made.weights, budget, 0)
    with pytest.raises(ValueError, match="shared mask"):
        eager.fused_ffn(made.rows, replace(made.weights, gate_rows=made.gate), replace(budget, mask="token"), 0)
    if eager.fuses(replace(network(3, 64, 64, torch.bfloat16).weights, gate_rows=torch.zeros(64, 64).bfloat16())):
        with pytest.raises(RuntimeError, match="64 channels of 48"):
            native.layer(made.rows, made.gate, made.weights.channels, None, ranked=1, keep=2)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="shapes"):
            native.layer(made.rows[:, :32], made.gate, made.weights.channels, None, ranked=1)  # type: ignore[arg-type]
