"""Tiny EAGLE-3 heads on disk as they are published, and their forward pass written out from the definition."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, FEATURES, VOCAB, DRAFT_VOCAB = 24, 3 * 28, 61, 23
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "target_hidden_size": FEATURES // 3,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "head_dim": 10,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": VOCAB,
    "draft_vocab_size": DRAFT_VOCAB,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def tensors(seed: int = 0, features: int = FEATURES, hidden: int = HIDDEN) -> dict[str, Tensor]:
    """Random weights under the published names; norms stay away from one."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(outputs: int, inputs: int) -> Tensor:
        return torch.randn(outputs, inputs, generator=generator) * 1.5 / math.sqrt(inputs)

    def norm() -> Tensor:
        return 1 + 0.3 * torch.randn(hidden, generator=generator)

    chosen = torch.randperm(VOCAB, generator=generator)[:DRAFT_VOCAB].sort().values
    return {
        "fc.weight": matrix(hidden, features),
        "midlayer.self_attn.q_proj.weight": matrix(60, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": matrix(20, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": matrix(20, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": matrix(hidden, 60),
        "midlayer.mlp.gate_proj.weight": matrix(48, hidden),
        "midlayer.mlp.up_proj.weight": matrix(48, hidden),
        "midlayer.mlp.down_proj.weight": matrix(hidden, 48),
        "midlayer.hidden_norm.weight": norm(),
        "midlayer.input_layernorm.weight": norm(),
        "midlayer.post_attention_layernorm.weight": norm(),
        "norm.weight": norm(),
        "lm_head.weight": matrix(DRAFT_VOCAB, hidden),
        "d2t": chosen - torch.arange(DRAFT_VOCAB),
        "t2d": torch.isin(torch.arange(VOCAB), chosen),
    }


def write(folder: Path, config: dict[str, Any], weights: dict[str, Tensor], name: str = "model.safetensors") -> Path:
    """A published head: config.json, and the weights as safetensors or as a torch file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if name.endswith(".safetensors"):
        save_file(weights, folder / name)
    else:
        torch.save(weights, folder / name)
    return folder


def reference(
    weights: dict[str, Tensor],
    config: dict[str, Any],
    embedding: Tensor,
    tokens: Sequence[int],
    features: Tensor,
    draft: Sequence[int] = (),
) -> Tensor:
    """Logits after each token and then after each draft token, fp64, all of it computed anew for every draft token.

    Args:
        weights: under the published names.
        config: rotary scheme, head sizes and eps.
        embedding: [vocab, hidden].
        tokens: t_1 to t_n.
        features: f_0 to f_{n - 1}, [n, features].
        draft: target tokens that follow.

    Returns:
        [n + len(draft), draft_vocab].
    """
    weights = {name: value.double() for name, value in weights.items()}
    states = list(features.double() @ weights["fc.weight"].T)
    sequence = [*tokens, *draft]
    outputs: list[Tensor] = []
    while len(outputs) < len(sequence):
        known = len(states)
        outputs = _layer(weights, config, embedding.double()[sequence[:known]], torch.stack(states))
        states.append(outputs[-1])
    final = _normed(torch.stack(outputs), weights["norm.weight"], config["rms_norm_eps"])
    return final @ weights["lm_head.weight"].T


def _layer(weights: dict[str, Tensor], config: dict[str, Any], embeddings: Tensor, states: Tensor) -> list[Tensor]:
    """The decoder layer, position by position and head by head."""
    layer = {name.removeprefix("midlayer."): value for name, value in weights.items() if name.startswith("midlayer.")}
    eps, size = config["rms_norm_eps"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    inputs = torch.cat(
        (
            _normed(embeddings, layer["input_layernorm.weight"], eps),
            _normed(states, layer["hidden_norm.weight"], eps),
        ),
        dim=-1,
    )
    queries, keys, values = (
        (inputs @ layer[f"self_attn.{kind}_proj.weight"].T).view(len(inputs), -1, size) for kind in "qkv"
    )
    queries, keys = _turned(queries, config), _turned(keys, config)
    outputs = []
    for position in range(len(inputs)):
        mixed = []
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = keys[: position + 1, group] @ queries[position, head] / math.sqrt(size)
            mixed.append(scores.softmax(0) @ values[: position + 1, group])
        state = states[position] + layer["self_attn.o_proj.weight"] @ torch.cat(mixed)
        inner = _normed(state, layer["post_attention_layernorm.weight"], eps)
        gate = layer["mlp.gate_proj.weight"] @ inner
        up = layer["mlp.up_proj.weight"] @ inner
        outputs.append(state + layer["mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up))
    return outputs


def _normed(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rows / (rows.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _turned(vectors: Tensor, config: dict[str, Any]) -> Tensor:
    """Rotary [positions, heads, size]: channels i and i + size / 2 span a plane of rate theta ** (-2 i / size)."""
    half = vectors.shape[-1] // 2
    rates = [_stretched(config["rope_theta"] ** (-plane / half), config.get("rope_scaling")) for plane in range(half)]
    angles = torch.outer(torch.arange(len(vectors)).double(), torch.tensor(rates, dtype=torch.float64))
    planes = torch.complex(vectors[..., :half], vectors[..., half:])
    turned = planes * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def _stretched(rate: float, scaling: dict[str, Any] | None) -> float:
    """Llama 3.1: by wavelength, slow planes turn ``factor`` times slower, with a ramp between slow and fast."""
    if scaling is None:
        return rate
    wavelength, original = 2 * math.pi / rate, scaling["original_max_position_embeddings"]
    if wavelength < original / scaling["high_freq_factor"]:
        return rate
    if wavelength > original / scaling["low_freq_factor"]:
        return rate / float(scaling["factor"])
    smooth = (original / wavelength - scaling["low_freq_factor"]) / (
        scaling["high_freq_factor"] - scaling["low_freq_factor"]
    )
    return (1 - smooth) * rate / float(scaling["factor"]) + smooth * rate
