"""The step of every family against the library's own forward: fp32, largest difference 1e-4 (DESIGN section 2)."""

import pytest
import torch

from harness.engine.model.families import FAMILIES, UnsupportedModel, adapt, check_supported, max_positions
from harness.engine.model.linear import make_linear, packing_supported
from harness.engine.model.step import Step
from sparse.budget import AttentionBudget
from tests.engine.tiny import EXTRAS, VOCAB, library_model

LIMIT = 1e-4
DENSE = AttentionBudget.dense()


def test_every_family_is_tested() -> None:
    assert set(EXTRAS) == set(FAMILIES)


@pytest.mark.parametrize("chunk", [1000, 70, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_steps_equal_the_library(family: str, chunk: int) -> None:
    model = library_model(family)
    tokens = torch.randint(0, VOCAB, (333,))
    with torch.inference_mode():
        expected = model(tokens[None]).logits[0]
    step = Step(adapt(model, packed=False))
    cache = step.new_cache(400, DENSE)
    first = step.prefill(tokens[:300], cache, chunk)
    assert (first - expected[299]).abs().max() < LIMIT
    for start, stop in ((300, 301), (301, 309), (309, 333)):
        logits = step.verify(tokens[None, start:stop], cache, DENSE)
        assert (logits[0] - expected[start:stop]).abs().max() < LIMIT
    cache.truncate(0, 100)
    again = step.verify(tokens[None, 100:120], cache, DENSE)
    assert (again[0] - expected[100:120]).abs().max() < LIMIT


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch_keep_to_themselves(family: str) -> None:
    """Ragged rows: each gets what it gets alone, dense and sparse."""
    budget = AttentionBudget(topk=4)
    step = Step(adapt(library_model(family), packed=False))
    prompts = [torch.randint(0, VOCAB, (length,)) for length in (150, 290)]
    new = torch.randint(0, VOCAB, (2, 5))
    for used in (DENSE, budget):
        together = step.new_cache(320, budget, batch=2)
        for row, prompt in enumerate(prompts):
            step.prefill(prompt, together, 128, row=row)
        found = step.verify(new, together, used)
        for row, prompt in enumerate(prompts):
            alone = step.new_cache(320, budget)
            step.prefill(prompt, alone, 128)
            assert (step.verify(new[row : row + 1], alone, used)[0] - found[row]).abs().max() < LIMIT


def test_zero_sparsity_equals_dense_and_sparsity_does_not() -> None:
    """A budget of all blocks but none is dense; a small one changes the logits; dense layers bring it back."""
    step = Step(adapt(library_model("llama"), packed=False))
    prompt, new = torch.randint(0, VOCAB, (500,)), torch.randint(0, VOCAB, (1, 4))

    def logits(budget: AttentionBudget) -> torch.Tensor:
        cache = step.new_cache(520, budget)
        step.prefill(prompt, cache, 256)
        return step.verify(new, cache, budget)

    dense = logits(DENSE)
    assert torch.equal(logits(AttentionBudget(topk=31)), dense)
    assert torch.equal(logits(AttentionBudget(topk=2, dense_layers=3)), dense)
    assert (logits(AttentionBudget(topk=30)) - dense).abs().max() > LIMIT
    assert (logits(AttentionBudget(topk=2)) - dense).abs().max() > 1e-2


def test_unsupported_models_are_named() -> None:
    class Config:
        model_type = "mixtral"
        hidden_act = "silu"
        rope_parameters = None

    with pytest.raises(UnsupportedModel, match=r"mixtral.*families\.py"):
        check_supported(Config())
    Config.model_type, Config.hidden_act = "llama", "gelu"
    with pytest.raises(UnsupportedModel, match="gelu"):
        check_supported(Config())
    Config.hidden_act, Config.rope_parameters = "silu", {"rope_type": "dynamic"}  # type: ignore[assignment]
    with pytest.raises(UnsupportedModel, match="dynamic"):
        check_supported(Config())
    Config.rope_parameters, Config.layer_types = None, ["sliding_attention"]  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedModel, match="sliding"):
        check_supported(Config())


def test_a_sliding_window_bounds_the_positions() -> None:
    assert max_positions(library_model("mistral", sliding_window=128).config) == 128
    assert max_positions(library_model("mistral").config) == 1024


def test_positions_and_empty_prompts_are_refused() -> None:
    step = Step(adapt(library_model("llama", max_position_embeddings=32), packed=False))
    cache = step.new_cache(64, DENSE)
    with pytest.raises(ValueError, match="32 positions"):
        step.prefill(torch.zeros(33, dtype=torch.int64), cache, 64)
    with pytest.raises(ValueError, match="at least one"):
        step.prefill(torch.zeros(0, dtype=torch.int64), cache, 64)


@pytest.mark.skipif(not packing_supported(torch.bfloat16), reason="this CPU or torch has no packed bf16 weights")
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_packed_weights_compute_the_same_product(rows: int) -> None:
    torch.manual_seed(0)
    weight, bias, data = torch.randn(70, 33), torch.randn(70), torch.randn(rows, 33)
    low = [part.bfloat16() for part in (weight, bias, data)]
    truth = low[2].double() @ low[0].double().T + low[1].double()
    for packed in (True, False):
        found = make_linear(low[0], low[1], packed=packed)(low[2])
        assert ((found.double() - truth).norm() / truth.norm()).item() < 4e-3
