"""Every method of tests/methods.py through the step: no-op, counters, rollback, and that it reads what it selects."""

import pytest
import torch
from torch import Tensor

from harness.engine.cache import KVCache
from harness.engine.drafting.base import NoDrafter
from harness.engine.drafting.expansion import Growth
from harness.engine.drafting.lookup import LookupDrafter
from harness.engine.model.families import adapt
from harness.engine.model.probe import AttentionView, Probe
from harness.engine.model.step import Step
from harness.engine.model.verification import Verification
from sparse.budget import Sparsity
from sparse.selection import Selection
from sparse.trace import Trace
from tests.engine.tiny import decoder, library_model, repetitive_prompt
from tests.methods import METHODS, Method

CASES = [
    pytest.param(method, family, id=f"{method.name}, {family}") for method in METHODS for family in method.families
]
NO_OPS = [case for case in CASES if case.values[0].no_op is not None]
PROMPT, CAPACITY = 300, 340
STEPS = ([11, 3, 3, 9, 4], [7], [5, 8, 2], [1, 1])


def prefilled(family: str, sparsity: Sparsity) -> tuple[Step, KVCache]:
    step = Step(adapt(library_model(family), packed=False, channels=True))
    cache = step.new_cache(CAPACITY, sparsity.attention)
    step.prefill(torch.tensor(repetitive_prompt(PROMPT)), cache, 128)
    return step, cache


def steps(step: Step, cache: KVCache, sparsity: Sparsity, probe: Probe | None = None) -> tuple[list[Tensor], Trace]:
    """Logits of some steps of one decode, each with one token accepted."""
    run, found = Verification(sparsity, probe=probe), []
    for tokens in STEPS:
        length = cache.lengths[0]
        found.append(step.verify(torch.tensor([tokens]), cache, run)[0])
        cache.truncate(0, length + 1)
    return found, run.trace


def gap(left: list[Tensor], right: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("method, family", NO_OPS)
def test_zero_sparsity_is_dense(method: Method, family: str) -> None:
    """Ladder step 2 through the whole step, and step 1: the tokens of a speculative decode."""
    assert method.no_op is not None
    dense, _ = steps(*prefilled(family, Sparsity()), Sparsity())
    same, _ = steps(*prefilled(family, method.no_op), method.no_op)
    assert gap(dense, same) < 1e-4
    engine = decoder(family, method.no_op)
    prefix = engine.prefill(repetitive_prompt(PROMPT))
    expected = engine.decode(prefix, NoDrafter(), Sparsity(), 24).output
    assert engine.decode(prefix, LookupDrafter(Growth(6), 3), method.no_op, 24).output == expected


@pytest.mark.parametrize("method, family", CASES)
def test_an_active_method_counts_and_changes_something(method: Method, family: str) -> None:
    """Ladder step 5."""
    dense, plain = steps(*prefilled(family, Sparsity()), Sparsity())
    found, trace = steps(*prefilled(family, method.active), method.active)
    for path in method.paths:
        assert sum(count for name, count in trace.paths.items() if name.startswith(path)) > 0, path
        assert not any(name.startswith(path) for name in plain.paths)
    assert gap(dense, found) > 1e-3
    assert all(logits.isfinite().all() for logits in found)


@pytest.mark.parametrize("method, family", CASES)
def test_rolled_back_steps_leave_nothing_behind(method: Method, family: str) -> None:
    """Steps that were taken back entirely, in another decode, do not change a later decode from the same prefix."""
    step, cache = prefilled(family, method.active)
    clean, _ = steps(step, cache, method.active)
    cache.truncate(0, PROMPT)
    steps(step, cache, method.active)
    step.verify(torch.tensor([[9] * 20]), cache, Verification(method.active))
    cache.truncate(0, PROMPT)
    again, _ = steps(step, cache, method.active)
    assert gap(clean, again) == 0


class Recorder(Probe):
    """Remembers which positions each layer may read in each step."""

    def __init__(self, block_size: int) -> None:
        self.size, self.seen = block_size, {}  # type: ignore[var-annotated]

    def selection(self, layer: int, view: AttentionView, selection: Selection | None) -> Selection | None:
        blocks = view.start // self.size
        mask = torch.ones(view.keys.shape[1], blocks, dtype=torch.bool)
        if selection is not None:
            mask = selection.mask(blocks)
        self.seen[layer] = mask.repeat_interleave(self.size, dim=1)
        return selection


@pytest.mark.parametrize("method, family", [case for case in CASES if not case.values[0].active.attention.is_dense])
def test_attention_reads_exactly_what_was_selected(method: Method, family: str) -> None:
    """Ladder step 5: poison whatever the first step did not select; nothing changes. Poison what it did: it shows."""
    if method.reads_all:
        pytest.skip("the oracle reads every key by definition")
    step, cache = prefilled(family, method.active)
    recorder = Recorder(method.active.attention.block_size)
    tokens = torch.tensor([STEPS[0]])
    clean = step.verify(tokens, cache, Verification(method.active, probe=recorder))
    cache.truncate(0, PROMPT)
    for layer, mask in recorder.seen.items():
        poison(cache, layer, ~mask)
    assert torch.equal(step.verify(tokens, cache, Verification(method.active)), clean)
    cache.truncate(0, PROMPT)
    poison(cache, max(recorder.seen), recorder.seen[max(recorder.seen)])
    assert step.verify(tokens, cache, Verification(method.active)).isnan().any()


def poison(cache: KVCache, layer: int, positions: Tensor) -> None:
    """NaN into keys and values of a layer at [kv_heads, positions]; the block summaries stay."""
    keys, values = cache.layer(layer)
    for head, position in positions.nonzero().tolist():
        page, inside = divmod(position, keys.shape[-1])
        keys[page, head, :, inside] = float("nan")
        values[page, head, inside] = float("nan")


def test_an_old_selection_is_refreshed_in_time() -> None:
    """Skipped retrieval uses selections of at most refresh - 1 steps ago, and counts their age."""
    method = next(method for method in METHODS if method.name == "skipped retrieval")
    step, cache = prefilled("llama", method.active)
    run = Verification(method.active)
    for _ in range(7):
        step.verify(torch.tensor([[1]]), cache, run)
    assert dict(run.trace.stale) == {1: 2 * 2, 2: 2 * 2}
    assert run.trace.paths["reuse.skip_retrieval"] == 8 and run.trace.paths["select.blocks"] == 7 + 2 * 3


def test_anchors_save_selections() -> None:
    method = next(method for method in METHODS if method.name == "reuse anchors")
    _, trace = steps(*prefilled("llama", method.active), method.active)
    assert trace.paths["select.blocks"] == 2 * len(STEPS) and trace.paths["reuse.anchor"] == len(STEPS)
    assert trace.paths["reuse.miss_anchor"] == 0
