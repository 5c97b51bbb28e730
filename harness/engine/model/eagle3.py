"""The EAGLE-3 draft head (arXiv 2503.01840) in the published checkpoint format: sizes, weights, one decoder layer.

A head reads hidden states of three target layers. Its only layer attends over (token, state) pairs: the token that
follows a position, and the state at that position, which is the fused target features where the target has been, and
the layer's own output where the head runs ahead.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Scaled, rotated queries [..., n, heads, head_dim], rotated keys and values [..., n, kv_heads, head_dim] to the
mixed values [..., n, heads, head_dim]."""

_ARCHITECTURE = "LlamaForCausalLMEagle3"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class HeadError(ValueError):
    """A head that cannot be used; the message is one line that names the folder and what is wrong."""


@dataclass(frozen=True, slots=True)
class Eagle3Shape:
    """Sizes of a head.

    Attributes:
        hidden: width of the head's states and of the token embeddings that it reads.
        features: width of the target features, three target layers side by side.
        heads, kv_heads, head_dim, ffn: of the decoder layer.
        vocab: of the target.
        draft_vocab: tokens that the head can propose.
        eps: of the norms.
        theta: base of the rotary embedding.
    """

    hidden: int
    features: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    draft_vocab: int
    eps: float = 1e-5
    theta: float = 10000.0


def feature_layers(layers: int) -> tuple[int, int, int]:
    """The target layers whose inputs a head reads: low, middle, high, as in the published heads.

    Raises:
        HeadError: the target is too shallow.
    """
    if layers < 6:
        raise HeadError(f"an EAGLE-3 head reads three layers of a target with at least 6 layers, this one has {layers}")
    return 2, layers // 2, layers - 3


class _Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps = eps

    def forward(self, states: Tensor) -> Tensor:
        return functional.rms_norm(states, self.weight.shape, self.weight, self._eps)


class _Attention(nn.Module):
    def __init__(self, shape: Eagle3Shape) -> None:
        super().__init__()
        self._shape = shape
        both, queries, keys = 2 * shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(both, queries, bias=False)
        self.k_proj = nn.Linear(both, keys, bias=False)
        self.v_proj = nn.Linear(both, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden, bias=False)

    def forward(self, both: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        size = self._shape.head_dim
        queries, keys, values = (
            project(both).unflatten(-1, (-1, size)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = attend(_rotated(queries, cos, sin) * size**-0.5, _rotated(keys, cos, sin), values)
        output: Tensor = self.o_proj(mixed.flatten(-2))
        return output


class _FeedForward(nn.Module):
    def __init__(self, shape: Eagle3Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down_proj = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        output: Tensor = self.down_proj(functional.silu(self.gate_proj(states)) * self.up_proj(states))
        return output


class _Layer(nn.Module):
    def __init__(self, shape: Eagle3Shape) -> None:
        super().__init__()
        self.self_attn = _Attention(shape)
        self.mlp = _FeedForward(shape)
        self.input_layernorm = _Norm(shape.hidden, shape.eps)
        self.hidden_norm = _Norm(shape.hidden, shape.eps)
        self.post_attention_layernorm = _Norm(shape.hidden, shape.eps)

    def forward(self, embeddings: Tensor, states: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        both = torch.cat((self.input_layernorm(embeddings), self.hidden_norm(states)), dim=-1)
        states = states + self.self_attn(both, cos, sin, attend)
        output: Tensor = states + self.mlp(self.post_attention_layernorm(states))
        return output


class Eagle3Head(nn.Module):
    """A head; parameters and buffers bear the names of the published checkpoints.

    Args:
        shape: sizes.

    Attributes:
        d2t: [draft_vocab], int64: what to add to a draft token's number to get the target's.
        t2d: [vocab], bool: which target tokens the head can propose.
    """

    d2t: Tensor
    t2d: Tensor

    def __init__(self, shape: Eagle3Shape) -> None:
        super().__init__()
        self.shape = shape
        self.fc = nn.Linear(shape.features, shape.hidden, bias=False)
        self.midlayer = _Layer(shape)
        self.norm = _Norm(shape.hidden, shape.eps)
        self.lm_head = nn.Linear(shape.hidden, shape.draft_vocab, bias=False)
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

    def logits(self, states: Tensor) -> Tensor:
        """[..., hidden] to [..., draft_vocab]."""
        output: Tensor = self.lm_head(self.norm(states))
        return output

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [n, 1, head_dim] of positions [n], in the dtype of the weights; sin carries its sign."""
        size = self.shape.head_dim
        rates = self.shape.theta ** (-torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size)
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
            "hidden_act": "silu",
            "torch_dtype": str(self.norm.weight.dtype).removeprefix("torch."),
            **(notes or {}),
        }
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / _WEIGHTS[0])
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [..., n, heads, head_dim]."""
    return states * cos + states.roll(states.shape[-1] // 2, -1) * sin


def read_shape(folder: Path) -> Eagle3Shape:
    """Sizes of a published head, from its config.json alone.

    Raises:
        HeadError: there is none, or it describes something else.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise HeadError(f"{folder}: config.json of an EAGLE-3 head cannot be read ({error})") from error
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        rope = config.get("rope_parameters") or config
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
            theta=float(rope.get("rope_theta") or 10000.0),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise HeadError(f"{folder}: config.json is not that of an EAGLE-3 head ({error})") from error
    if int(config.get("num_hidden_layers", 1)) != 1:
        raise HeadError(f"{folder}: a head of {config['num_hidden_layers']} layers is not supported (valid: 1)")
    if min(asdict(shape).values()) <= 0:
        raise HeadError(f"{folder}: config.json holds a size that is not positive")
    return shape


def load_head(folder: Path, dtype: torch.dtype, device: torch.device) -> Eagle3Head:
    """A published head.

    Args:
        folder: with config.json and model.safetensors or pytorch_model.bin.
        dtype, device: of the weights.

    Raises:
        HeadError: files are missing or do not fit together.
    """
    head = Eagle3Head(read_shape(folder))
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise HeadError(f"{folder}: the head has no weights ({' or '.join(_WEIGHTS)} is missing)")
    try:
        found = (
            load_file(weights)
            if weights.suffix == ".safetensors"
            else torch.load(weights, map_location="cpu", weights_only=True)
        )
        missing, unknown = head.load_state_dict(found, strict=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise HeadError(f"{folder}: {weights.name} cannot be read ({str(error).splitlines()[0]})") from error
    reduced = head.shape.draft_vocab < head.shape.vocab
    missing = [name for name in missing if reduced or name not in ("d2t", "t2d")]
    unknown = [name for name in unknown if name != "embed_tokens.weight"]
    if missing or unknown:
        raise HeadError(f"{folder}: {weights.name} lacks {missing} and has {unknown} that no EAGLE-3 head has")
    return head.to(device=device, dtype=dtype).eval()
