"""Family adapters: from a library model to the weights of our step (DESIGN section 2).

To add a family, write a function from one decoder layer to :class:`LayerWeights` and list it in ``FAMILIES``; a parity
test over the list compares its step with the library's own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.engine.model.linear import LinearMap, make_linear
from sparse.cost import ModelShape


class UnsupportedModel(ValueError):
    """A checkpoint that no adapter covers; the message is one line and names what to do."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """What one decoder layer of the step needs.

    Attributes:
        attention_norm, ffn_norm: RMSNorm weights [hidden].
        qkv: fused query, key and value projection; query heads first, then key heads, then value heads.
        query_norm, key_norm: RMSNorm weights [head_dim] of families that normalise heads, else None.
        output: attention output projection.
        gate_up, down: fused gate and up projection (gate first), and down projection.
    """

    attention_norm: Tensor
    ffn_norm: Tensor
    qkv: LinearMap
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: LinearMap
    gate_up: LinearMap
    down: LinearMap


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """Everything the step computes with.

    Attributes:
        shape: sizes, for the step and the cost model.
        embedding: [vocab, hidden].
        layers: one entry a layer.
        norm: final RMSNorm weight [hidden].
        head: output projection.
        eps: RMSNorm epsilon.
        cos, sin: rotary tables [positions, 1, head_dim]; ``sin`` carries the sign of the rotated half.
        positions: longest sequence the model was built for.
        dtype, device: of every tensor above.
    """

    shape: ModelShape
    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: LinearMap
    eps: float
    cos: Tensor
    sin: Tensor
    positions: int
    dtype: torch.dtype
    device: torch.device


def _llama_layer(layer: Any, packed: bool) -> LayerWeights:
    """Llama, Mistral, Qwen2 and Qwen3: separate projections, gated FFN, optional biases and head norms."""
    attention, ffn = layer.self_attn, layer.mlp

    def fused(*modules: Any) -> LinearMap:
        weight = torch.cat([module.weight for module in modules])
        biases = [module.bias for module in modules]
        bias = None if biases[0] is None else torch.cat(biases)
        return make_linear(weight, bias, packed=packed)

    query_norm = getattr(attention, "q_norm", None)
    key_norm = getattr(attention, "k_norm", None)
    return LayerWeights(
        attention_norm=layer.input_layernorm.weight.detach(),
        ffn_norm=layer.post_attention_layernorm.weight.detach(),
        qkv=fused(attention.q_proj, attention.k_proj, attention.v_proj),
        query_norm=None if query_norm is None else query_norm.weight.detach(),
        key_norm=None if key_norm is None else key_norm.weight.detach(),
        output=fused(attention.o_proj),
        gate_up=fused(ffn.gate_proj, ffn.up_proj),
        down=fused(ffn.down_proj),
    )


FAMILIES: dict[str, Callable[[Any, bool], LayerWeights]] = {
    "llama": _llama_layer,
    "mistral": _llama_layer,
    "qwen2": _llama_layer,
    "qwen3": _llama_layer,
}


def check_supported(config: Any) -> None:
    """Refuse what the step does not compute.

    Args:
        config: the library's model configuration.

    Raises:
        UnsupportedModel: an unknown family, activation, rotary scheme or attention pattern.
    """
    if config.model_type not in FAMILIES:
        raise UnsupportedModel(
            f"model type '{config.model_type}' has no adapter: add one to FAMILIES in "
            f"harness/engine/model/families.py (there are: {', '.join(FAMILIES)})"
        )
    if config.hidden_act != "silu":
        raise UnsupportedModel(f"activation '{config.hidden_act}' is not supported (the step computes silu)")
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise UnsupportedModel(f"rotary scheme '{rope}' depends on the length of the input and is not supported")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise UnsupportedModel("layers with sliding-window attention are not supported")


def max_positions(config: Any) -> int:
    """Longest sequence that ``config`` allows our full-attention step; a sliding window cuts it to the window."""
    window = getattr(config, "sliding_window", None)
    positions = int(config.max_position_embeddings)
    return min(positions, int(window)) if window else positions


def model_shape(config: Any, dtype: torch.dtype) -> ModelShape:
    """Sizes for the cost model and the memory check, from the configuration alone."""
    heads = int(config.num_attention_heads)
    return ModelShape(
        layers=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        heads=heads,
        kv_heads=int(config.num_key_value_heads or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        ffn=int(config.intermediate_size),
        vocab=int(config.vocab_size),
        itemsize=dtype.itemsize,
    )


@torch.inference_mode()
def adapt(model: Any, *, packed: bool) -> ModelWeights:
    """Take over the weights of a library model; layer by layer the model's own copies are given up.

    The model is unusable afterwards. Memory peaks at the model plus one layer.

    Args:
        model: a causal language model of the library, of a supported family, in evaluation mode.
        packed: pack linear weights where the CPU supports it.

    Raises:
        UnsupportedModel: as :func:`check_supported`.
    """
    config = model.config
    check_supported(config)
    reference = model.model.embed_tokens.weight.detach()
    positions = max_positions(config)
    ids = torch.arange(positions, device=reference.device)[None]
    cos, sin = model.model.rotary_emb(reference.new_empty(1), ids)
    half = cos.shape[-1] // 2
    signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
    layers = []
    for layer in model.model.layers:
        layers.append(FAMILIES[config.model_type](layer, packed))
        layer.to("meta")
    head = model.lm_head.weight
    return ModelWeights(
        shape=model_shape(config, reference.dtype),
        embedding=reference,
        layers=tuple(layers),
        norm=model.model.norm.weight.detach(),
        head=make_linear(head, None, packed=packed),
        eps=float(config.rms_norm_eps),
        cos=cos[0].unsqueeze(1).contiguous(),
        sin=signed[0].unsqueeze(1).contiguous(),
        positions=positions,
        dtype=reference.dtype,
        device=reference.device,
    )
