"""The step of every family against the library's own forward: fp32, largest difference 1e-4 (DESIGN section 2)."""

import pytest
import torch

from harness.engine.model.families import (
    FAMILIES,
    LayerWeights,
    UnsupportedModel,
    adapt,
    check_supported,
    max_positions,
    model_shape,
)
from harness.engine.model.linear import make_linear, packing_supported
from harness.engine.model.loading import shape_config
from harness.engine.model.step import Step
from harness.engine.model.verification import Verification
from sparse.budget import AttentionBudget, Sparsity
from sparse.experts import probabilities, route
from sparse.ops.moe.eager import moe
from sparse.ops.weights import FfnWeights
from tests.engine.tiny import EXTRAS, VOCAB, library_model

LIMIT = 1e-4
DENSE = AttentionBudget()


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
    first = step.prefill(tokens[:300], cache, chunk).logits
    assert (first - expected[299]).abs().max() < LIMIT
    for start, stop in ((300, 301), (301, 309), (309, 333)):
        logits = step.verify(tokens[None, start:stop], cache)
        assert (logits[0] - expected[start:stop]).abs().max() < LIMIT
    cache.truncate(0, 100)
    again = step.verify(tokens[None, 100:120], cache)
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
        found = step.verify(new, together, Verification(Sparsity(used)))
        for row, prompt in enumerate(prompts):
            alone = step.new_cache(320, budget)
            step.prefill(prompt, alone, 128)
            assert (
                step.verify(new[row : row + 1], alone, Verification(Sparsity(used)))[0] - found[row]
            ).abs().max() < LIMIT


def test_heads_of_their_own_equal_the_library() -> None:
    """As many KV heads as query heads, as in LLaMA-7B."""
    model = library_model("llama", num_key_value_heads=6)
    tokens = torch.randint(0, VOCAB, (90,))
    with torch.inference_mode():
        expected = model(tokens[None]).logits[0]
    step = Step(adapt(model, packed=False))
    cache = step.new_cache(100, DENSE)
    step.prefill(tokens[:80], cache, 64)
    assert (step.verify(tokens[None, 80:], cache)[0] - expected[80:]).abs().max() < LIMIT


def test_zero_sparsity_equals_dense_and_sparsity_does_not() -> None:
    """A budget of all blocks but none is dense; a small one changes the logits; dense layers bring it back."""
    step = Step(adapt(library_model("llama"), packed=False))
    prompt, new = torch.randint(0, VOCAB, (500,)), torch.randint(0, VOCAB, (1, 4))

    def logits(budget: AttentionBudget) -> torch.Tensor:
        cache = step.new_cache(520, budget)
        step.prefill(prompt, cache, 256)
        return step.verify(new, cache, Verification(Sparsity(budget)))

    dense = logits(DENSE)
    assert torch.equal(logits(AttentionBudget(topk=31)), dense)
    assert torch.equal(logits(AttentionBudget(topk=2, dense_layers=3)), dense)
    assert (logits(AttentionBudget(topk=30)) - dense).abs().max() > LIMIT
    assert (logits(AttentionBudget(topk=2)) - dense).abs().max() > 1e-2


def test_unsupported_models_are_named() -> None:
    class Config:
        model_type = "deepseek_v3"
        hidden_act = "silu"
        rope_parameters = None

    with pytest.raises(UnsupportedModel, match=r"deepseek_v3.*families\.py"):
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
    with pytest.raises(UnsupportedModel, match=r"clip_qkv=8\.0"):
        check_supported(library_model("olmoe", clip_qkv=8.0).config)
    biased = library_model("llama", mlp_bias=True)
    with pytest.raises(UnsupportedModel, match="mlp_bias"):
        adapt(biased, packed=False, channels=True)


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


def _feed_forward(layer: LayerWeights, rows: torch.Tensor) -> torch.Tensor:
    """The FFN or MoE part of a layer with the model's own routing."""
    if layer.moe is None:
        assert layer.ffn is not None
        gate, up = layer.ffn.gate_up(rows).chunk(2, dim=-1)
        return layer.ffn.down(torch.nn.functional.silu(gate) * up)
    assert layer.ffn is None
    return moe(rows, route(probabilities(layer.moe.router(rows)), layer.moe), layer.moe)


@pytest.mark.parametrize("rows", [1, 9, 70])
@pytest.mark.parametrize("family", FAMILIES)
def test_feed_forward_parts_equal_the_library(family: str, rows: int) -> None:
    model, data = library_model(family), torch.randn(rows, 48)
    with torch.inference_mode():
        expected = [layer.mlp(data[None])[0].clone() for layer in model.model.layers]
    weights = adapt(model, packed=False)
    for layer, truth in zip(weights.layers, expected, strict=True):
        assert (_feed_forward(layer, data) - truth).abs().max() < LIMIT * truth.abs().max()
    routed = [layer.moe for layer in weights.layers if layer.moe is not None]
    shape = weights.shape
    assert shape.moe_layers == len(routed) == {"mixtral": 3, "qwen3_moe": 2, "olmoe": 3}.get(family, 0)
    for layer_moe in routed:
        assert (shape.experts, shape.top_k) == (len(layer_moe.experts), layer_moe.top_k)
        assert {expert.width for expert in layer_moe.experts} == {shape.expert_ffn}


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_channels_are_prepared_on_request(family: str) -> None:
    model, rows = library_model(family), torch.randn(5, 48)
    assert all(layer.ffn is None or layer.ffn.channels is None for layer in adapt(model, packed=False).layers)
    for layer in adapt(library_model(family), packed=False, channels=True).layers:
        networks = [layer.ffn] if layer.moe is None else list(layer.moe.experts)
        for network in networks:
            assert network is not None and network.gate is not None and network.channels is not None
            assert network.channels.shape == (network.width, 2 * 48) and network.channels.is_contiguous()
            gate, up = network.gate_up(rows).chunk(2, dim=-1)
            torch.testing.assert_close(network.gate(rows), gate)
            torch.testing.assert_close(rows @ network.channels[:, :48].T, up)
            torch.testing.assert_close(up @ network.channels[:, 48:], network.down(up))


class Carved(torch.nn.Module):
    """An FFN cut into routed experts of five channels and a shared rest, with a router of its own."""

    carved = True

    def __init__(self, ffn: torch.nn.Module, routed: int, top_k: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = ffn.gate_proj, ffn.up_proj, ffn.down_proj
        order = torch.randperm(self.gate_proj.out_features)
        self.experts, self.shared = order[: routed * 5].view(routed, 5), order[routed * 5 :]
        self.router, self.top_k = torch.nn.Linear(48, routed), top_k


@pytest.mark.parametrize("rows", [1, 6, 40])
def test_a_carved_ffn_with_all_experts_is_the_dense_one(rows: int) -> None:
    """88 channels: 12 experts and 28 shared channels, 17 experts and 3, or 16 of 80 and nothing shared."""
    data = torch.randn(rows, 48)
    for routed, intermediate in ((12, 88), (17, 88), (16, 80)):
        model = library_model("llama", intermediate_size=intermediate)
        with torch.inference_mode():
            expected = [layer.mlp(data).clone() for layer in model.model.layers]
        for layer in model.model.layers[1:]:
            layer.mlp = Carved(layer.mlp, routed, top_k=routed)
        weights = adapt(model, packed=False)
        shape = weights.shape
        assert (shape.moe_layers, shape.experts, shape.top_k, shape.expert_ffn) == (2, routed, routed, 5)
        assert shape.shared_ffn == intermediate - 5 * routed
        for layer, truth in zip(weights.layers, expected, strict=True):
            assert (_feed_forward(layer, data) - truth).abs().max() < LIMIT * truth.abs().max()
            if layer.moe is not None:
                one_by_one = moe(
                    data, torch.ones(rows, routed), layer.moe, lambda n, own, m=layer.moe: _run(m.experts[n], own)
                )
                if layer.moe.shared is not None:
                    one_by_one = one_by_one + _run(layer.moe.shared, data)
                assert (one_by_one - truth).abs().max() < LIMIT * truth.abs().max()
                assert layer.moe.unit and not layer.moe.normalise


def _run(weights: FfnWeights, rows: torch.Tensor) -> torch.Tensor:
    gate, up = weights.gate_up(rows).chunk(2, dim=-1)
    return weights.down(torch.nn.functional.silu(gate) * up)


def test_a_carved_ffn_runs_the_channels_of_its_experts() -> None:
    """The chosen experts count 1 each, whatever the router says, and nothing else but the shared channels runs."""
    torch.manual_seed(0)
    model, data = library_model("llama"), torch.randn(4, 48)
    carved = Carved(model.model.layers[0].mlp, routed=12, top_k=2)
    with torch.inference_mode():
        logits = carved.router(data)
        active = torch.zeros(4, 88)
        active[:, carved.shared] = 1
        for token, chosen in enumerate(logits.topk(2).indices):
            active[token, carved.experts[chosen].flatten()] = 1
        gate, up = carved.gate_proj(data), carved.up_proj(data)
        truth = carved.down_proj(torch.nn.functional.silu(gate) * up * active)
    model.model.layers[0].mlp = carved
    found = _feed_forward(adapt(model, packed=False).layers[0], data)
    assert (found - truth).abs().max() < LIMIT * truth.abs().max()


def test_published_sizes_give_the_published_parameters() -> None:
    """Weights of the checkpoints as their cards state them: 30.5B, 6.9B and 46.7B."""
    for arch, billions, sizes in (
        ("qwen3_30b_a3b", 30.5, (128, 8, 768, 48)),
        ("olmoe_1b_7b", 6.9, (64, 8, 1024, 16)),
        ("mixtral_8x7b", 46.7, (8, 2, 14336, 32)),
    ):
        shape = model_shape(shape_config(arch, None), torch.bfloat16)
        assert (shape.experts, shape.top_k, shape.expert_ffn, shape.moe_layers) == sizes
        total = shape.weight_bytes / 2 + shape.hidden * shape.vocab
        assert round(total / 1e9, 1) == billions
