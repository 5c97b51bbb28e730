"""Family adapters: from a library model to the weights of our step (DESIGN section 2).

To add a family, write a function from one decoder layer to :class:`LayerWeights` and list it in ``FAMILIES``; a parity
test over the list compares its step with the library's own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from harness.engine.model.linear import make_linear
from sparse.cost import ModelShape
from sparse.ops.moe.eager import FusedMoeWeights
from sparse.ops.sparse_ffn import eager as sparse_ffn
from sparse.ops.sparse_ffn import native
from sparse.ops.weights import FfnWeights, LinearMap, MoeWeights


class UnsupportedModel(ValueError):
    """A checkpoint that no adapter covers; the message is one line and names what to do."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """What one decoder layer of the step needs.

    Attributes:
        attention_norm, ffn_norm: RMSNorm weights [hidden].
        qkv: fused query, key and value projection; query heads first, then key heads, then value heads.
        query_norm, key_norm: RMSNorm weights, [head_dim] in families that normalise each head; OLMoE normalises the
            whole projection at once, [heads * head_dim] and [kv_heads * head_dim]; None in the other families.
        output: attention output projection.
        ffn: dense feed-forward network, or None where the layer has routed experts.
        moe: routed experts, or None where the layer has a dense feed-forward network.
    """

    attention_norm: Tensor
    ffn_norm: Tensor
    qkv: LinearMap
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: LinearMap
    ffn: FfnWeights | None
    moe: MoeWeights | None


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


@dataclass(frozen=True, slots=True)
class Layout:
    """How weights are stored.

    Attributes:
        packed: linear weights packed where the CPU supports it.
        channels: feed-forward weights also by channel, for steps that skip some of them.
    """

    packed: bool
    channels: bool

    def linear(self, *modules: Any) -> LinearMap:
        """One linear map with the outputs of all ``modules``, linear modules of the library."""
        weight = torch.cat([module.weight for module in modules])
        biases = [module.bias for module in modules]
        return make_linear(weight, None if biases[0] is None else torch.cat(biases), packed=self.packed)

    def ffn(
        self, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None
    ) -> FfnWeights:
        """A gated feed-forward network.

        Args:
            gate_up: [2 * width, hidden], gate first.
            down: [hidden, width].
            gate_up_bias, down_bias: [2 * width] and [hidden], or None.

        Raises:
            UnsupportedModel: the layout by channel was asked for and there are biases.
        """
        width = down.shape[1]
        gate, channels = None, None
        if self.channels:
            if gate_up_bias is not None or down_bias is not None:
                raise UnsupportedModel("feed-forward channels cannot be skipped in a model with mlp_bias=true")
            gate = make_linear(gate_up[:width], packed=self.packed)
            channels = sparse_ffn.channel_rows(gate_up[width:], down)
        return FfnWeights(
            width=width,
            gate_up=make_linear(gate_up, gate_up_bias, packed=self.packed, paired=True),
            down=make_linear(down, down_bias, packed=self.packed),
            gate=gate,
            channels=channels,
            gate_rows=gate_up[:width].clone() if channels is not None else None,
        )

    def dense_ffn(self, module: Any) -> FfnWeights:
        """The feed-forward network of a library module with ``gate_proj``, ``up_proj`` and ``down_proj``."""
        gate, up, down = module.gate_proj, module.up_proj, module.down_proj
        bias = None if gate.bias is None else torch.cat((gate.bias, up.bias))
        return self.ffn(torch.cat((gate.weight, up.weight)), down.weight, bias, down.bias)


def _layer(layer: Any, layout: Layout, ffn: FfnWeights | None, moe: MoeWeights | None) -> LayerWeights:
    """Norms and attention as all families name them, with the feed-forward part given."""
    attention = layer.self_attn
    query_norm = getattr(attention, "q_norm", None)
    key_norm = getattr(attention, "k_norm", None)
    return LayerWeights(
        attention_norm=layer.input_layernorm.weight.detach(),
        ffn_norm=layer.post_attention_layernorm.weight.detach(),
        qkv=layout.linear(attention.q_proj, attention.k_proj, attention.v_proj),
        query_norm=None if query_norm is None else query_norm.weight.detach(),
        key_norm=None if key_norm is None else key_norm.weight.detach(),
        output=layout.linear(attention.o_proj),
        ffn=ffn,
        moe=moe,
    )


def _llama_layer(layer: Any, layout: Layout) -> LayerWeights:
    """Llama, Mistral, Qwen2 and Qwen3: gated FFN, optional biases and head norms; Llama also with a carved FFN."""
    if getattr(layer.mlp, "carved", False):
        return _layer(layer, layout, None, _carved_moe(layer.mlp, layout))
    return _layer(layer, layout, layout.dense_ffn(layer.mlp), None)


def _carved_moe(module: Any, layout: Layout) -> MoeWeights:
    """Experts cut out of a dense FFN: each is a subset of its channels, and all of them together are the FFN.

    Args:
        module: ``gate_proj``, ``up_proj``, ``down_proj`` and ``router``, linear modules; ``experts`` [routed, width]
            and ``shared`` [channels], int64, channel numbers; ``top_k``.
        layout: as in :class:`Layout`.

    Raises:
        UnsupportedModel: the projections have biases.
    """
    if any(part.bias is not None for part in (module.gate_proj, module.up_proj, module.down_proj)):
        raise UnsupportedModel("a carved feed-forward network must not have biases")
    gate, up, down = (part.weight for part in (module.gate_proj, module.up_proj, module.down_proj))

    def subset(channels: Tensor, layout: Layout = layout) -> FfnWeights:
        return layout.ffn(torch.cat((gate[channels], up[channels])), down[:, channels])

    together = torch.cat((module.experts.flatten(), module.shared))
    return FusedMoeWeights(
        router=layout.linear(module.router),
        experts=tuple(subset(channels) for channels in module.experts),
        shared=subset(module.shared) if module.shared.numel() else None,
        top_k=int(module.top_k),
        normalise=False,
        unit=True,
        fused=subset(together, replace(layout, channels=False)),
        channels=torch.cat((gate[together], up[together], down[:, together].t()), 1).contiguous(),
    )


def _fused_experts(module: Any, layout: Layout, normalise: bool) -> MoeWeights:
    """Routed experts that the library keeps as ``gate_up_proj`` [experts, 2 * width, hidden], gate first, and
    ``down_proj`` [experts, hidden, width]."""
    experts = module.experts
    both = (experts.gate_up_proj.detach(), experts.down_proj.detach())
    return MoeWeights(
        router=make_linear(module.gate.weight, packed=layout.packed),
        experts=tuple(layout.ffn(*own) for own in zip(*both, strict=True)),
        shared=None,
        top_k=int(module.gate.top_k),
        normalise=normalise,
        stacked=None if both[0].is_cpu else both,
    )


def _mixtral_layer(layer: Any, layout: Layout) -> LayerWeights:
    """Mixtral: the weights of a token's experts always sum to one."""
    return _layer(layer, layout, None, _fused_experts(layer.mlp, layout, normalise=True))


def _qwen3_moe_layer(layer: Any, layout: Layout) -> LayerWeights:
    """Qwen3-MoE: head norms, and dense layers between those with experts."""
    if not hasattr(layer.mlp, "experts"):
        return _layer(layer, layout, layout.dense_ffn(layer.mlp), None)
    return _layer(layer, layout, None, _fused_experts(layer.mlp, layout, bool(layer.mlp.gate.norm_topk_prob)))


def _olmoe_layer(layer: Any, layout: Layout) -> LayerWeights:
    """OLMoE: queries and keys are normalised over all heads together."""
    return _layer(layer, layout, None, _fused_experts(layer.mlp, layout, bool(layer.mlp.gate.norm_topk_prob)))


FAMILIES: dict[str, Callable[[Any, Layout], LayerWeights]] = {
    "llama": _llama_layer,
    "mistral": _llama_layer,
    "qwen2": _llama_layer,
    "qwen3": _llama_layer,
    "mixtral": _mixtral_layer,
    "qwen3_moe": _qwen3_moe_layer,
    "olmoe": _olmoe_layer,
}


def check_supported(config: Any) -> None:
    """Refuse what the step does not compute.

    Args:
        config: the library's model configuration.

    Raises:
        UnsupportedModel: an unknown family, activation, rotary scheme or attention pattern, or clipped projections.
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
    clip = getattr(config, "clip_qkv", None)
    if clip is not None:
        raise UnsupportedModel(f"clip_qkv={clip} is not supported (the step does not clip queries, keys and values)")


def max_positions(config: Any) -> int:
    """Longest sequence that ``config`` allows our full-attention step; a sliding window cuts it to the window."""
    window = getattr(config, "sliding_window", None)
    positions = int(config.max_position_embeddings)
    return min(positions, int(window)) if window else positions


def model_shape(config: Any, dtype: torch.dtype) -> ModelShape:
    """Sizes for the cost model and the memory check, from the configuration alone (a carved model looks dense)."""
    heads = int(config.num_attention_heads)
    moe_layers = _moe_layers(config)
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return ModelShape(
        layers=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        heads=heads,
        kv_heads=int(config.num_key_value_heads or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        ffn=int(config.intermediate_size),
        vocab=int(config.vocab_size),
        itemsize=dtype.itemsize,
        experts=int(config.num_experts) if moe_layers else 0,
        top_k=int(config.num_experts_per_tok) if moe_layers else 0,
        expert_ffn=int(width) if moe_layers else 0,
        moe_layers=moe_layers,
    )


def _moe_layers(config: Any) -> int:
    """Layers with routed experts; Qwen3-MoE may keep some layers dense."""
    if not getattr(config, "num_experts", 0):
        return 0
    dense, period = getattr(config, "mlp_only_layers", None) or (), getattr(config, "decoder_sparse_step", 1)
    return sum(layer not in dense and (layer + 1) % period == 0 for layer in range(config.num_hidden_layers))


def _carved_shape(shape: ModelShape, layers: tuple[LayerWeights, ...]) -> ModelShape:
    """``shape`` with the sizes of the experts that were carved out of dense layers; all such layers are alike."""
    carved = [layer.moe for layer in layers if layer.moe is not None]
    if not carved or shape.moe_layers:
        return shape
    first = carved[0]
    return replace(
        shape,
        experts=len(first.experts),
        top_k=first.top_k,
        expert_ffn=first.experts[0].width,
        shared_ffn=0 if first.shared is None else first.shared.width,
        moe_layers=len(carved),
    )


@torch.inference_mode()
def adapt(model: Any, *, packed: bool, channels: bool = False) -> ModelWeights:
    """Take over the weights of a library model; layer by layer the model's own copies are given up.

    The model is unusable afterwards. Memory peaks at the model plus one layer.

    Args:
        model: a causal language model of the library, of a supported family, in evaluation mode.
        packed: pack linear weights where the CPU supports it.
        channels: also prepare what steps that skip FFN channels need (METHOD section 3); one more copy of all
            feed-forward weights.

    Raises:
        UnsupportedModel: as :func:`check_supported`, or ``channels`` in a model with feed-forward biases.
    """
    config = model.config
    check_supported(config)
    reference = model.model.embed_tokens.weight.detach()
    positions = max_positions(config)
    ids = torch.arange(positions, device=reference.device)[None]
    cos, sin = model.model.rotary_emb(reference.new_empty(1), ids)
    half = cos.shape[-1] // 2
    signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
    layout, adapted = Layout(packed=packed, channels=channels), []
    for layer in model.model.layers:
        adapted.append(FAMILIES[config.model_type](layer, layout))
        layer.to("meta")
    layers = tuple(adapted)
    head = model.lm_head.weight
    if reference.device.type == "cpu" and (channels or any(layer.moe is not None for layer in layers)):
        native.available(reference.dtype)  # built now if it is missing, not in a timed step
    return ModelWeights(
        shape=_carved_shape(model_shape(config, reference.dtype), layers),
        embedding=reference,
        layers=layers,
        norm=model.model.norm.weight.detach(),
        head=make_linear(head, None, packed=packed),
        eps=float(config.rms_norm_eps),
        cos=cos[0].unsqueeze(1).contiguous(),
        sin=signed[0].unsqueeze(1).contiguous(),
        positions=positions,
        dtype=reference.dtype,
        device=reference.device,
    )
