"""What captured steps take for granted, and what they refuse."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.engine.model.device_form import Sizes, bucket, form_of, rounded
from harness.engine.model.device_step import DeviceStep
from harness.engine.model.probe import Probe
from harness.engine.model.step import Segment
from harness.engine.model.verification import Verification
from sparse.budget import AttentionBudget, FfnBudget, MoeBudget, ReuseBudget, Sparsity
from tests.engine.device_pairs import tiny
from tests.ops.interpreter import DEVICE, interpreting


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    with interpreting():
        yield


@pytest.mark.parametrize(
    ("sparsity", "named"),
    [
        (Sparsity(AttentionBudget(topk=4, score="oracle")), "attn.score=oracle"),
        (Sparsity(AttentionBudget(topk=4, query="max")), "attn.query=max"),
        (Sparsity(AttentionBudget(topk=4, heads="pooled")), "attn.heads=pooled"),
        (Sparsity(AttentionBudget(topk=4, low_heads=((0, 1),))), "attn.low_share"),
        (Sparsity(ffn=FfnBudget("topk", 0.5, mask="token")), "ffn.mask=token"),
        (Sparsity(moe=MoeBudget(rule="topk")), "moe=topk"),
        (Sparsity(reuse=ReuseBudget(skip=("retrieval",), skip_layers=(1,))), "reuse.skip=retrieval"),
        (Sparsity(reuse=ReuseBudget(skip=("channels",), skip_layers=(1,))), "reuse.skip=channels"),
    ],
)
def test_what_needs_the_host_is_refused(sparsity: Sparsity, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}.*valid: .*engine=eager") as error:
        DeviceStep.check(sparsity)
    assert "\n" not in str(error.value)
    step = DeviceStep(tiny("llama"))
    store = step.new_cache(300, sparsity.attention)
    with pytest.raises(ValueError, match=named):
        step.run([Segment(0, [1])], store, Verification(sparsity))
    assert store.lengths == [0]


def test_channels_of_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="ffn=topk in a model with experts"):
        DeviceStep.check(Sparsity(ffn=FfnBudget("topk", 0.5)), experts=True)


def test_passes_with_a_probe_run_with_torch_operators() -> None:
    step = DeviceStep(tiny("llama"))
    run = Verification(probe=Probe())
    step.run([Segment(0, [1])], step.new_cache(300, AttentionBudget()), run)
    assert run.trace.paths["dense_attention.torch"] == len(step.weights.layers)


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="engine=cuda_graph needs a GPU"):
            DeviceStep(tiny("llama"))


@given(st.integers(1, 64), st.integers(1, 1 << 20))
def test_few_sizes_hold_all(count: int, bound: int) -> None:
    assert count <= bucket(count) <= max(count + 7, 2) and bucket(bucket(count)) == bucket(count)
    assert bound <= rounded(bound) < bound * 1.25 + 1 and rounded(rounded(bound)) == rounded(bound)


@given(st.lists(st.tuples(st.integers(0, 900), st.integers(1, 64)), min_size=1, max_size=4), st.integers(2, 70))
def test_bounds_of_a_form_hold(sequences: list[tuple[int, int]], topk: int) -> None:
    sizes = Sizes(tuple(start for start, _ in sequences), tuple(count for _, count in sequences))
    for budget in (AttentionBudget(topk=topk), AttentionBudget(l0=200, rho=topk / 100), AttentionBudget()):
        form = form_of(sizes, False, Sparsity(budget), frozenset(), 1024, 3)
        skipping = any(budget.skips(0, start) for start in sizes.starts)
        assert (form.most is not None) == skipping and (form.longest == 0) == skipping
        for start, count in sequences:
            assert count <= form.tokens and start + form.tokens <= 1024
            assert not skipping or budget.blocks(start) <= (form.most or 0) <= 1024 // 16
            assert skipping or start + form.tokens <= form.longest <= 1024
