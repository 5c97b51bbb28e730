"""EAGLE-3 heads: the published checkpoint format against a forward pass written out from its definition."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from harness.engine.model.eagle3 import (
    Eagle3Head,
    Eagle3Shape,
    HeadError,
    Llama3Rope,
    feature_layers,
    load_head,
    read_shape,
)
from harness.engine.model.linear import packing_supported
from tests.engine.eagle3_reference import (
    CONFIG,
    DRAFT_VOCAB,
    FEATURES,
    HIDDEN,
    LLAMA3,
    VOCAB,
    reference,
    tensors,
    write,
)

CPU = torch.device("cpu")
SPECULATORS_LAYER = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
TOKENS = [7, 60, 0, 13, 13, 41, 2, 58, 9]


def logits(head: Eagle3Head, embedding: Tensor, tokens: list[int], features: Tensor) -> Tensor:
    """Of a loaded head after each token, [n, draft_vocab], with plain causal attention."""
    groups = head.shape.heads // head.shape.kv_heads

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        scores = torch.einsum("nhd,mhd->hnm", queries, keys.repeat_interleave(groups, 1))
        scores += torch.full(scores.shape[1:], float("-inf"), dtype=scores.dtype).triu(1)
        return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), values.repeat_interleave(groups, 1))

    with torch.inference_mode():
        cos, sin = head.rotary(torch.arange(len(tokens)))
        return head.logits(head(embedding[tokens], head.fuse(features), cos, sin, attend))


def numbered(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("midlayer.", "layers.0."): value for name, value in weights.items()}


def whole_vocabulary(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = {name: value for name, value in weights.items() if name not in ("d2t", "t2d")}
    return {**kept, "lm_head.weight": torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(3))}


def nested(config: dict[str, Any]) -> dict[str, Any]:
    inner = {name: config[name] for name in SPECULATORS_LAYER}
    outer = {name: value for name, value in config.items() if name not in inner}
    return {
        **outer,
        "transformer_layer_config": inner,
        "speculators_model_type": "eagle3",
        "norm_before_residual": False,
    }


FORMATS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "safetensors": (CONFIG, dict, "model.safetensors"),
    "torch file": (CONFIG, dict, "pytorch_model.bin"),
    "numbered layer": (CONFIG, numbered, "model.safetensors"),
    "nested config": (nested(CONFIG), numbered, "model.safetensors"),
    "llama 3.1": ({**CONFIG, "rope_scaling": LLAMA3}, dict, "pytorch_model.bin"),
    "new rope entry": (
        {**CONFIG, "rope_theta": None, "rope_parameters": {**LLAMA3, "rope_theta": 500.0}},
        dict,
        "model.safetensors",
    ),
    "whole vocabulary": ({**CONFIG, "draft_vocab_size": None}, whole_vocabulary, "model.safetensors"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_loaded_heads_compute_the_published_forward_pass(name: str, tmp_path: Path) -> None:
    config, change, file = FORMATS[name]
    weights = change(tensors())
    head = load_head(write(tmp_path, config, weights, file), torch.float32, CPU)
    embedding = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1))
    features = torch.randn(len(TOKENS), FEATURES, generator=torch.Generator().manual_seed(2))
    published = {key.replace("layers.0.", "midlayer."): value for key, value in weights.items()}
    plain = {**CONFIG, "rope_scaling": LLAMA3 if name in ("llama 3.1", "new rope entry") else None}
    expected = reference(published, plain, embedding, TOKENS, features)
    found = logits(head, embedding, TOKENS, features)
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() < 1e-5
    assert expected.std() > 0.3


def test_a_head_with_embeddings_of_its_own_keeps_them(tmp_path: Path) -> None:
    own = torch.randn(VOCAB, HIDDEN)
    head = load_head(write(tmp_path, CONFIG, {**tensors(), "embed_tokens.weight": own}), torch.float32, CPU)
    assert head.embed_tokens is not None and torch.equal(head.embed_tokens.weight, own)


def test_draft_tokens_lead_to_the_targets_tokens(tmp_path: Path) -> None:
    weights = tensors()
    chosen = weights["t2d"].nonzero()[:, 0]
    head = load_head(write(tmp_path / "full", CONFIG, weights), torch.bfloat16, CPU)
    assert head.targets.tolist() == chosen.tolist() and head.d2t.dtype == torch.int64
    assert not head.training and head.fc.weight.dtype == torch.bfloat16
    del weights["t2d"]
    head = load_head(write(tmp_path / "without t2d", CONFIG, weights), torch.float32, CPU)
    assert head.t2d.nonzero()[:, 0].tolist() == chosen.tolist()
    other = Eagle3Head(head.shape)
    other.set_vocabulary(chosen)
    assert torch.equal(other.d2t, head.d2t) and torch.equal(other.t2d, head.t2d)


@pytest.mark.parametrize("own_embedding", [False, True])
def test_saved_heads_come_back(own_embedding: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = Eagle3Shape(16, 60, 4, 2, 6, 20, VOCAB, DRAFT_VOCAB, 1e-6, 300.0, Llama3Rope(4.0, 1.0, 2.0, 64.0))
    head = Eagle3Head(shape, own_embedding)
    head.set_vocabulary(torch.randperm(VOCAB)[:DRAFT_VOCAB].sort().values)
    head.save(tmp_path / "new" / "head", {"trained": {"steps": 3}})
    again = load_head(tmp_path / "new" / "head", torch.float32, CPU)
    assert again.shape == shape
    state = again.state_dict()
    assert list(state) == list(head.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in head.state_dict().items())
    assert json.loads((tmp_path / "new" / "head" / "config.json").read_text())["trained"] == {"steps": 3}


def test_the_stretched_rotary_embedding_is_that_of_llama_3_1() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters={**scaling, "original_max_position_embeddings": 8192, "rope_theta": 500000.0},
    )
    positions = torch.tensor([0, 1, 77, 1000, 4095])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    shape = Eagle3Shape(8, 24, 2, 1, 128, 8, 10, 10, theta=500000.0, rope=Llama3Rope(8.0, 1.0, 4.0, 8192.0))
    ours, signed = Eagle3Head(shape).rotary(positions)
    torch.testing.assert_close(ours[:, 0], cos[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(signed[:, 0, 64:], sin[0, :, 64:], atol=1e-3, rtol=0)
    torch.testing.assert_close(signed[:, 0, :64], -sin[0, :, :64], atol=1e-3, rtol=0)
    plain, _ = Eagle3Head(replace(shape, rope=None)).rotary(positions)
    assert (plain - ours).abs().max() > 0.1


def test_heads_read_low_middle_and_high_layers() -> None:
    assert [feature_layers(layers) for layers in (7, 30, 32)] == [(2, 3, 4), (2, 15, 27), (2, 16, 29)]
    with pytest.raises(HeadError, match="at least 7 layers, this one has 6"):
        feature_layers(6)


def test_the_layers_that_a_config_names_must_be_the_usual_ones(tmp_path: Path) -> None:
    for layers in range(8, 70):
        usual = list(feature_layers(layers))
        for named in (usual, [layer - 1 for layer in usual]):
            for entry in (
                {"eagle_aux_hidden_state_layer_ids": named},
                {"eagle_config": {"eagle_aux_hidden_state_layer_ids": named, "use_aux_hidden_state": True}},
            ):
                read_shape(write(tmp_path, {**CONFIG, **entry}, {}))
                read_shape(tmp_path, layers)
                with pytest.raises(HeadError, match="reads the target's layers"):
                    read_shape(tmp_path, layers + 4)
    with pytest.raises(HeadError, match=r"layers \[2, 5, 27\]"):
        read_shape(write(tmp_path, {**CONFIG, "eagle_aux_hidden_state_layer_ids": [2, 5, 27]}, {}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 2}, "2 layers"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"norm_before_residual": True}, "norm_before_residual=True"),
        ({"speculators_model_type": "eagle3"}, "norm_before_residual=True"),
        ({"fc_norm": True}, "fc_norm=True"),
        ({"norm_output": True}, "norm_output=True"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state=False"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"hidden_size": "wide"}, "wide"),
        ({"hidden_size": None}, "not that of an EAGLE-3 head"),
        ({"intermediate_size": 0}, "sizes that no head can have"),
        ({"num_key_value_heads": 4}, "sizes that no head can have"),
        ({"draft_vocab_size": VOCAB + 1}, "more than the 61"),
    ],
)
def test_configs_of_other_heads_are_refused_in_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(HeadError) as caught:
        read_shape(write(tmp_path, {**CONFIG, **change}, {}))
    text = str(caught.value)
    assert message in text and str(tmp_path) in text and "\n" not in text


@pytest.mark.parametrize("text", [None, "{", "[]", "3", "null"])
def test_a_config_that_cannot_be_read_is_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(HeadError, match=r"config\.json"):
        read_shape(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.weight": None}, r"lacks \['norm.weight'\]"),
        ({"d2t": None, "t2d": None}, r"lacks \['d2t'\]"),
        ({"midlayer.self_attn.q_norm.weight": torch.ones(10)}, "q_norm"),
        ({"fc.weight": torch.zeros(HIDDEN, FEATURES - 3)}, "size mismatch for fc.weight"),
        ({"d2t": torch.full((DRAFT_VOCAB,), -1)}, "d2t does not lead"),
        ({"d2t": torch.full((DRAFT_VOCAB,), 50)}, "d2t does not lead"),
        ({"d2t": -torch.arange(DRAFT_VOCAB)}, "d2t does not lead"),
        ({"t2d": torch.arange(VOCAB) < DRAFT_VOCAB}, "d2t and t2d"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(
    change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    weights = {name: value for name, value in {**tensors(), **change}.items() if value is not None}
    with pytest.raises(HeadError, match=message) as caught:
        load_head(write(tmp_path, CONFIG, weights), torch.float32, CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_broken_and_missing_weights_are_refused(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, CONFIG, tensors(), name)
    whole = (folder / name).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no weights at all"):
        (folder / name).write_bytes(content)
        with pytest.raises(HeadError, match=f"{name} cannot be read"):
            load_head(folder, torch.float32, CPU)
    (folder / name).unlink()
    with pytest.raises(HeadError, match="has no weights"):
        load_head(folder, torch.float32, CPU)


@pytest.mark.skipif(not packing_supported(torch.bfloat16), reason="torch packs no weights here")
def test_packed_weights_serve_until_training_goes_on(tmp_path: Path) -> None:
    folder = write(tmp_path, CONFIG, tensors())
    plain, packed = (load_head(folder, torch.bfloat16, CPU, packed=packed) for packed in (False, True))
    embedding, features = torch.randn(VOCAB, HIDDEN).bfloat16(), torch.randn(len(TOKENS), FEATURES).bfloat16()
    expected = logits(plain, embedding, TOKENS, features)
    torch.testing.assert_close(logits(packed, embedding, TOKENS, features), expected, atol=0.1, rtol=0.05)
    with torch.no_grad():
        packed.lm_head.weight.zero_()
    assert logits(packed, embedding, TOKENS, features).any()
    assert not logits(packed.train().eval(), embedding, TOKENS, features).any()
