"""The EAGLE-3 draft head (arXiv 2503.01840) in the published checkpoint format: sizes, weights, one decoder layer.

A head reads hidden states of three target layers. Its only layer attends over (token, state) pairs: the token that
follows a position, and the state at that position, which is the fused target features where the target has been, and
the layer's own output where the head runs ahead.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness.engine.model.eagle3_layer import Attend, Eagle3Shape, Layer, Llama3Rope, Norm, PackedLinear

__all__ = [
    "WEIGHTS",
    "Attend",
    "Eagle3Head",
    "Eagle3Shape",
    "HeadError",
    "Llama3Rope",
    "feature_layers",
    "load_head",
    "read_shape",
]

_ARCHITECTURE = "LlamaForCausalLMEagle3"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Files that may hold the weights of a head, the first that is there wins."""

_PLAIN = {
    "attention_bias": False,
    "mlp_bias": False,
    "bias": False,
    "norm_before_residual": False,
    "norm_before_fc": False,
    "fc_norm": False,
    "norm_output": False,
    "parallel_drafting": False,
    "use_aux_hidden_state": True,
    "hidden_act": "silu",
}
"""Entries of config.json by which other tools mark variants of the layer, and what the plain head has there."""


class HeadError(ValueError):
    """A head that cannot be used; the message is one line that names the folder and what is wrong."""


def feature_layers(layers: int) -> tuple[int, int, int]:
    """The target layers whose inputs a head reads: low, middle, high, as in the published heads.

    Raises:
        HeadError: the target is too shallow.
    """
    if layers < 7:
        raise HeadError(f"an EAGLE-3 head reads three layers of a target with at least 7 layers, this one has {layers}")
    return 2, layers // 2, layers - 3


class Eagle3Head(nn.Module):
    """A head; parameters and buffers bear the names of the published checkpoints.

    Args:
        shape: sizes.
        own_embedding: whether the head has token embeddings of its own instead of the target's.

    Attributes:
        embed_tokens: the head's own token embeddings, if it has any.
        d2t: [draft_vocab], int64: what to add to a draft token's number to get the target's.
        t2d: [vocab], bool: which target tokens the head can propose.
    """

    d2t: Tensor
    t2d: Tensor

    def __init__(self, shape: Eagle3Shape, own_embedding: bool = False) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden) if own_embedding else None
        self.fc = PackedLinear(shape.features, shape.hidden)
        self.midlayer = Layer(shape)
        self.norm = Norm(shape.hidden, shape.eps)
        self.lm_head = PackedLinear(shape.hidden, shape.draft_vocab)
        self.register_buffer("d2t", torch.zeros(shape.draft_vocab, dtype=torch.int64))
        self.register_buffer("t2d", torch.arange(shape.vocab) < shape.draft_vocab)

    def set_vocabulary(self, tokens: Tensor) -> None:
        """Say which target tokens the head proposes.

        Args:
            tokens: [draft_vocab], int64, ascending.
        """
        self.d2t.copy_(tokens - torch.arange(tokens.shape[0], device=tokens.device))
        self.t2d.zero_()
        self.t2d[tokens] = True

    @property
    def targets(self) -> Tensor:
        """[draft_vocab], int64: the target's number of each draft token."""
        return self.d2t + torch.arange(self.d2t.shape[0], device=self.d2t.device)

    def fuse(self, features: Tensor) -> Tensor:
        """Target features [..., features] to states [..., hidden]."""
        states: Tensor = self.fc(features)
        return states

    def forward(self, embeddings: Tensor, states: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """The next states.

        Args:
            embeddings: [..., n, hidden], of the tokens that follow each position.
            states: [..., n, hidden], from :meth:`fuse` or from this method.
            cos, sin: rotary tables [n, 1, head_dim], from :meth:`rotary`.
            attend: mixes the layer's values over whatever it keeps of earlier positions.

        Returns:
            [..., n, hidden].
        """
        output: Tensor = self.midlayer(embeddings, states, cos, sin, attend)
        return output

    def keys_values(self, embeddings: Tensor, states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """What later positions read of these ones, without the rest of the layer.

        Args:
            embeddings, states, cos, sin: as for :meth:`forward`.

        Returns:
            Rotated keys and values, each [..., n, kv_heads, head_dim].
        """
        return self.midlayer.self_attn.keys_values(self.midlayer.both(embeddings, states), cos, sin)

    def pack(self) -> None:
        """Copy the weights into the layout that the CPU's matrix library prefers for few rows, where there is one.

        For weights that no longer change and no longer move; ``train()`` forgets the copies.
        """
        for module in self.modules():
            if isinstance(module, PackedLinear):
                module.pack()

    def logits(self, states: Tensor) -> Tensor:
        """[..., hidden] to [..., draft_vocab]."""
        output: Tensor = self.lm_head(self.norm(states))
        return output

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [n, 1, head_dim] of positions [n], in the dtype of the weights; sin carries its sign."""
        size = self.shape.head_dim
        rates = self.shape.theta ** (-torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size)
        if self.shape.rope is not None:
            rates = self.shape.rope.stretched(rates)
        angles = positions[:, None].double() * rates
        cos, sin = angles.cos(), angles.sin()
        dtype = self.norm.weight.dtype
        return torch.cat((cos, cos), -1)[:, None].to(dtype), torch.cat((-sin, sin), -1)[:, None].to(dtype)

    def save(self, folder: Path, notes: dict[str, Any] | None = None) -> None:
        """Write config.json and model.safetensors as published heads have them.

        Args:
            folder: made where it is missing.
            notes: more entries of config.json, for example how the head was trained.
        """
        shape = self.shape
        config = {
            "architectures": [_ARCHITECTURE],
            "model_type": "llama",
            "num_hidden_layers": 1,
            "hidden_size": shape.hidden,
            "target_hidden_size": shape.features // 3,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "intermediate_size": shape.ffn,
            "vocab_size": shape.vocab,
            "draft_vocab_size": shape.draft_vocab,
            "rms_norm_eps": shape.eps,
            "rope_theta": shape.theta,
            "rope_scaling": _rope_entry(shape.rope),
            "hidden_act": "silu",
            "torch_dtype": str(self.norm.weight.dtype).removeprefix("torch."),
            **(notes or {}),
        }
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / WEIGHTS[0])
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def _rope_entry(rope: Llama3Rope | None) -> dict[str, Any] | None:
    """``rope_scaling`` of config.json."""
    if rope is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": rope.factor,
        "low_freq_factor": rope.low,
        "high_freq_factor": rope.high,
        "original_max_position_embeddings": rope.original,
    }


def read_shape(folder: Path, target_layers: int | None = None) -> Eagle3Shape:
    """Sizes of a published head, from its config.json alone.

    Args:
        folder: of the head.
        target_layers: of the target that it must be for; None takes any.

    Raises:
        HeadError: there is none, or it describes something else or a variant that is not supported.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        config = {**(config.get("transformer_layer_config") or {}), **config}
        _check_variant(folder, config, target_layers)
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        shape = Eagle3Shape(
            hidden=hidden,
            features=3 * int(config.get("target_hidden_size") or hidden),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            ffn=int(config["intermediate_size"]),
            vocab=int(config["vocab_size"]),
            draft_vocab=int(config.get("draft_vocab_size") or config["vocab_size"]),
            eps=float(config.get("rms_norm_eps", 1e-6)),
            **_read_rope(folder, config),
        )
    except HeadError:
        raise
    except OSError as error:
        raise HeadError(f"{folder}: config.json of an EAGLE-3 head cannot be read ({error})") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise HeadError(f"{folder}: config.json is not that of an EAGLE-3 head ({error!r})") from error
    sizes = (shape.hidden, shape.features, shape.heads, shape.kv_heads, shape.head_dim, shape.ffn, shape.draft_vocab)
    if min(*sizes, shape.eps, shape.theta) <= 0 or shape.heads % shape.kv_heads or shape.head_dim % 2:
        raise HeadError(f"{folder}: config.json holds sizes that no head can have ({shape})")
    if shape.draft_vocab > shape.vocab:
        raise HeadError(f"{folder}: {shape.draft_vocab} draft tokens are more than the {shape.vocab} of the target")
    return shape


def _check_variant(folder: Path, config: dict[str, Any], target_layers: int | None) -> None:
    """Refuse heads whose layer differs from the published one, or that read other layers of the target."""
    if int(config.get("num_hidden_layers", 1)) != 1:
        raise HeadError(f"{folder}: a head of {config['num_hidden_layers']} layers is not supported (valid: 1)")
    eagle = config.get("eagle_config") or {}
    found = {"norm_before_residual": "speculators_model_type" in config, **eagle, **config}
    for name, plain in _PLAIN.items():
        if found.get(name) not in (None, plain):
            raise HeadError(f"{folder}: a head with {name}={found[name]} is not supported (valid: {plain})")
    layers = found.get("eagle_aux_hidden_state_layer_ids")
    if layers:
        # Layers are counted by their inputs, or by the outputs of the layers before them.
        depths = (layers[-1] + 3, layers[-1] + 4) if target_layers is None else (target_layers, target_layers)
        usual = [[2, depths[0] // 2, depths[0] - 3], [1, depths[1] // 2 - 1, depths[1] - 4]]
        if list(layers) not in usual:
            raise HeadError(f"{folder}: reads the target's layers {layers} (valid: low, middle and high, as published)")


def _read_rope(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """``theta`` and ``rope`` of a shape."""
    entry = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(entry.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = entry.get("rope_type", entry.get("type", "default"))
    if kind == "default":
        return {"theta": theta}
    if kind != "llama3":
        raise HeadError(f"{folder}: rotary scheme '{kind}' is not supported (valid: default, llama3)")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return {"theta": theta, "rope": Llama3Rope(*(float(entry[name]) for name in names))}


def load_head(folder: Path, dtype: torch.dtype, device: torch.device, *, packed: bool = True) -> Eagle3Head:
    """A published head.

    Args:
        folder: with config.json and model.safetensors or pytorch_model.bin.
        dtype, device: of the weights.
        packed: whether to :meth:`Eagle3Head.pack` it.

    Raises:
        HeadError: files are missing or do not fit together.
    """
    shape = read_shape(folder)
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise HeadError(f"{folder}: the head has no weights ({' or '.join(WEIGHTS)} is missing)")
    try:
        found = (
            load_file(weights)
            if weights.suffix == ".safetensors"
            else torch.load(weights, map_location="cpu", weights_only=True)
        )
        found = {_our_name(name): value for name, value in found.items()}
        with torch.device("meta"):
            head = Eagle3Head(shape, "embed_tokens.weight" in found)
        head.to_empty(device="cpu")
        head.set_vocabulary(torch.arange(shape.draft_vocab))
        missing, unknown = head.load_state_dict(found, strict=False)
    except (AttributeError, EOFError, OSError, RuntimeError, ValueError, SafetensorError, pickle.PickleError) as error:
        raise HeadError(f"{folder}: {weights.name} cannot be read ({' '.join(str(error).split())})") from error
    reduced = shape.draft_vocab < shape.vocab
    missing = [name for name in missing if name != "t2d" and (reduced or name != "d2t")]
    if missing or unknown:
        raise HeadError(f"{folder}: {weights.name} lacks {missing} and has {unknown} that no EAGLE-3 head has")
    _check_vocabulary(folder, head, "t2d" in found)
    head = head.to(device=device, dtype=dtype).eval()
    if packed:
        head.pack()
    return head


def _our_name(name: str) -> str:
    """Tools that number their layers call the only one ``layers.0``."""
    return "midlayer." + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name


def _check_vocabulary(folder: Path, head: Eagle3Head, given: bool) -> None:
    """Whether d2t names distinct tokens of the target, and the same ones as t2d where that is given."""
    targets, shape = head.targets, head.shape
    distinct = len(set(targets.tolist())) == shape.draft_vocab
    if not distinct or int(targets.min()) < 0 or int(targets.max()) >= shape.vocab:
        raise HeadError(f"{folder}: d2t does not lead to {shape.draft_vocab} different tokens of the target")
    expected = torch.zeros_like(head.t2d)
    expected[targets] = True
    if given and not torch.equal(expected, head.t2d):
        raise HeadError(f"{folder}: d2t and t2d do not name the same tokens")
    head.t2d.copy_(expected)
