"""A mixture of experts with real weights that needs no download: a dense model's FFNs, carved into experts.

Each FFN is partitioned: channels that are always strong form the shared expert, the others are clustered by what fires
together into routed experts of equal size, and a linear router is fitted to each expert's energy. Nothing is trained.
With every expert active the model is the dense one exactly; with fewer it is worse than a model trained as a mixture of
experts. So it stands in for the machinery and for the order of policies on METHOD section 4, not for absolute quality.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from harness.engine.model.loading import ModelError, cache_dir

VERSION = 1
COMMAND = "python -m scripts.carve_moe"
_FIELDS = ("shared", "experts", "router_weight", "router_bias")
_RIDGE = 0.1
"""Ridge penalty in mean variances of an input; quality on held-out text is flat from 0.001 to 0.1."""
_CLUSTER_ROUNDS = 12
_LEAST = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Carving:
    """How every FFN of a model is carved, and its routers.

    Attributes:
        shared: [layers, shared channels], int64, channels that always run.
        experts: [layers, experts, channels], int64, channels of the routed experts.
        router_weight, router_bias: [layers, experts, hidden] and [layers, experts], fp32; a softmax over the logits
            predicts each expert's share of the energy that the token gives to the routed channels.
        info: where it comes from, free of tensors (version, base, base_mark, text_sha256, sizes, measurements).
    """

    shared: Tensor
    experts: Tensor
    router_weight: Tensor
    router_bias: Tensor
    info: dict[str, Any]

    @property
    def width(self) -> int:
        """FFN channels of a layer, shared ones included."""
        return int(self.shared.shape[1] + self.experts[0].numel())

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically; ``info`` goes into its metadata."""
        write_tensors(path, {name: getattr(self, name) for name in _FIELDS}, {"kind": "carving", **self.info})

    @classmethod
    def load(cls, path: Path) -> Carving:
        """Read what :meth:`save` wrote.

        Raises:
            ModelError: the file is missing, unreadable, of another version, or no partition of the channels.
        """
        tensors, info = read_tensors(path, "carving", _FIELDS)
        found = cls(**tensors, info=info)
        try:
            order = torch.cat([found.shared, found.experts.flatten(1)], dim=1).sort(dim=1).values
            routers = (*found.experts.shape[:2], found.router_weight.shape[2])
            whole = bool((order == torch.arange(found.width)).all())
            sound = whole and found.router_weight.shape == routers and found.router_bias.shape == routers[:2]
        except (RuntimeError, IndexError):
            sound = False
        if not sound:
            raise ModelError(f"carving={path}: no partition of the channels with routers (`{COMMAND}` remakes it)")
        return found


def default_path() -> Path:
    """Where the carving of SmolLM2 lies when nothing else is said."""
    return cache_dir() / "carved_moe" / "smollm2" / "carving.safetensors"


def write_tensors(path: Path, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Write a safetensors file with ``info`` as JSON metadata; a killed write leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(kept, scratch, metadata={"info": json.dumps({"version": VERSION, **info})})
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def read_info(path: Path) -> dict[str, Any]:
    """Info of a file of :func:`write_tensors`; ``kind`` is ``carving`` or ``healing``.

    Raises:
        ModelError: one line: the file is missing, unreadable or of another version.
    """
    if not path.is_file():
        raise ModelError(f"carving={path}: there is no such file (`{COMMAND} --out PATH` makes it, --heal heals it)")
    try:
        with safe_open(path, framework="pt") as file:
            info: dict[str, Any] = json.loads((file.metadata() or {})["info"])
        if info["kind"] in ("carving", "healing") and info["version"] == VERSION:
            return info
        reason = f"it holds {info['kind']} of version {info['version']}"
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        reason = f"it cannot be read, {type(error).__name__}"
    raise ModelError(f"carving={path}: {reason} (`{COMMAND} --out PATH` makes it anew)")


def read_tensors(path: Path, kind: str, names: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and info of a file of :func:`write_tensors`.

    Raises:
        ModelError: as :func:`read_info`, or the file is of another kind or damaged.
    """
    info = read_info(path)
    if info["kind"] != kind:
        raise ModelError(f"{kind}={path}: the file holds a {info['kind']} (`{COMMAND} --help` tells which is which)")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}, info
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{kind}={path}: tensors are missing or damaged (`{COMMAND}` makes it anew)") from error


class CarvedMlp(nn.Module):
    """A carved FFN in its reference form: every channel is computed, those of idle experts are zeroed.

    Attributes:
        carved: marks the module for the engine's adapter.
        gate_proj, up_proj, down_proj: the dense model's own linear layers, channels in their old order.
        shared, experts: as in :class:`Carving`, of one layer.
        router: hidden to one logit per routed expert.
        top_k: routed experts that run per token, each with weight 1.
    """

    carved = True
    shared: Tensor
    experts: Tensor
    owner: Tensor

    def __init__(self, mlp: Any, shared: Tensor, experts: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> None:
        """Take over the projections of ``mlp``; the router takes their dtype and device."""
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        like = self.gate_proj.weight
        self.register_buffer("shared", shared.to(like.device))
        self.register_buffer("experts", experts.to(like.device))
        self.register_buffer("owner", _owners(shared, experts).to(like.device), persistent=False)
        self.router = nn.Linear(weight.shape[1], weight.shape[0], dtype=like.dtype, device=like.device)
        self.router.weight.data.copy_(weight)
        self.router.bias.data.copy_(bias)
        self.router.requires_grad_(False)
        self.top_k = top_k

    def rank(self, hidden: Tensor, activations: Tensor) -> Tensor:
        """[..., experts] of [..., hidden]: the larger, the sooner an expert runs."""
        logits: Tensor = self.router(hidden)
        return logits

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] to [..., hidden]: the shared channels and the token's ``top_k`` experts."""
        activations = F.silu(self.gate_proj(hidden)) * self.up_proj(hidden)
        chosen = chosen_experts(self.rank(hidden, activations), self.top_k)
        output: Tensor = self.down_proj(activations * spread(chosen.to(activations.dtype), self.owner))
        return output


class OracleMlp(CarvedMlp):
    """The same with a router that knows each expert's energy: the limit of any router on this partition."""

    def rank(self, hidden: Tensor, activations: Tensor) -> Tensor:
        """[..., experts], fp32: energies of the experts' channels, weighted by their down columns."""
        energy = (activations.float() * self.down_proj.weight.float().norm(dim=0)).square()
        sums: Tensor = energy[..., self.experts].sum(-1)
        return sums


def chosen_experts(ranks: Tensor, top_k: int) -> Tensor:
    """[..., experts], bool: the ``top_k`` largest of ``ranks``."""
    return torch.zeros_like(ranks, dtype=torch.bool).scatter_(-1, ranks.topk(top_k, dim=-1).indices, True)


def spread(weights: Tensor, owner: Tensor) -> Tensor:
    """[..., experts] to [..., width]: each channel's factor is that of its expert, 1 for shared channels."""
    return F.pad(weights, (0, 1), value=1.0).index_select(-1, owner)


def _owners(shared: Tensor, experts: Tensor) -> Tensor:
    """[width]: the routed expert of each channel, the number of experts for shared ones."""
    owner = torch.full((shared.numel() + experts.numel(),), experts.shape[0])
    owner[experts.flatten()] = torch.arange(experts.shape[0]).repeat_interleave(experts.shape[1])
    return owner


def weights_mark(model: Any) -> str:
    """Fingerprint of a library model by the signs of its first gate projection; the same in every dtype."""
    weight = model.model.layers[0].mlp.gate_proj.weight.detach()
    return hashlib.sha256(torch.signbit(weight).cpu().numpy().tobytes()).hexdigest()


def apply_carving(model: Any, carving: Carving, active: int, kind: type[CarvedMlp] = CarvedMlp) -> Any:
    """Replace every FFN of a library model in place; a carved model is carved anew.

    Args:
        model: a causal language model of a family with gated FFNs.
        carving: made from the same weights.
        active: routed experts that run per token.
        kind: the module that takes the FFN's place.

    Returns:
        ``model``.

    Raises:
        ModelError: sizes or weights do not fit, or ``active`` is out of range.
    """
    layers, routed = model.model.layers, carving.experts.shape[1]
    sizes = (len(layers), layers[0].mlp.gate_proj.out_features, layers[0].mlp.gate_proj.in_features)
    carved = (len(carving.shared), carving.width, carving.router_weight.shape[2])
    if sizes != carved:
        raise ModelError(f"carving: layers, width and hidden size are {carved}, the model has {sizes}")
    if carving.info.get("base_mark") != weights_mark(model):
        raise ModelError(f"carving: it was made from other weights (base {carving.info.get('base')}; `{COMMAND}`)")
    if not 1 <= active <= routed:
        raise ModelError(f"model.active={active}: the carving has {routed} routed experts (valid: 1 up to that)")
    for number, layer in enumerate(layers):
        shared, experts, weight, bias = (getattr(carving, name)[number] for name in _FIELDS)
        layer.mlp = kind(layer.mlp, shared, experts, weight, bias, active)
    return model


@dataclass(frozen=True, slots=True)
class CarvingPlan:
    """Sizes of a carving.

    Attributes:
        experts: experts that the width is divided into, shared ones included.
        shared: of them, those that always run.
        active: routed experts per token that the router and the partition are fitted for.
        rounds: alternations of fitting the router and reassigning the channels.
        seed: of the clustering.
    """

    experts: int = 16
    shared: int = 4
    active: int = 8
    rounds: int = 3
    seed: int = 0

    def check(self, width: int) -> None:
        """Refuse sizes that do not fit a width.

        Raises:
            ValueError: one line with the valid range.
        """
        if self.experts < 2 or width % self.experts:
            raise ValueError(f"--experts={self.experts} does not divide the FFN width {width} (or is below 2)")
        if not 0 <= self.shared < self.experts:
            raise ValueError(f"--shared={self.shared} is not at least 0 and below --experts={self.experts}")
        if not 1 <= self.active <= self.experts - self.shared:
            raise ValueError(f"--active={self.active} is not within 1 to {self.experts - self.shared} routed experts")


@torch.no_grad()
def collect_inputs(model: Any, sequences: Tensor, batch: int = 4) -> list[Tensor]:
    """What each FFN sees on some text.

    Args:
        model: a library model, not carved.
        sequences: [sequences, length], token ids.
        batch: sequences per forward.

    Returns:
        per layer the normed hidden states [tokens, hidden], in the model's dtype.
    """
    seen: list[list[Tensor]] = [[] for _ in model.model.layers]

    def hook(kept: list[Tensor]) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda _, inputs: kept.append(inputs[0].flatten(0, -2).clone())

    pairs = zip(model.model.layers, seen, strict=True)
    handles = [layer.mlp.register_forward_pre_hook(hook(kept)) for layer, kept in pairs]
    try:
        for first in range(0, len(sequences), batch):
            model.model(sequences[first : first + batch].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts) for parts in seen]


@torch.no_grad()
def carve_layer(mlp: Any, hidden: Tensor, plan: CarvingPlan) -> dict[str, Tensor]:
    """Partition one FFN and fit its router.

    A channel's energy on a token is the squared norm of what it adds to the output; the energies of the routed channels
    count relative to their sum, so that no token dominates. A channel moves to the expert whose being chosen goes with
    its energy most, measured against how often that expert is chosen, so that experts stay in even use.

    Args:
        mlp: gated FFN of a library model, silu.
        hidden: [tokens, hidden], its inputs on calibration text.
        plan: sizes.

    Returns:
        ``shared``, ``experts``, ``router_weight`` and ``router_bias`` of one layer, on the CPU.
    """
    activations = F.silu(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)
    energy = (activations.float() * mlp.down_proj.weight.float().norm(dim=0)).square()
    size, routed = energy.shape[1] // plan.experts, plan.experts - plan.shared
    order = energy.mean(0).argsort(descending=True)
    shared, rest = order[: plan.shared * size].sort().values, order[plan.shared * size :].sort().values
    energy = energy[:, rest]
    energy /= energy.sum(1, keepdim=True).clamp_(min=_LEAST)
    owner = _cluster(energy.sqrt(), routed, size, plan.seed)
    hidden = hidden.float()
    regression = _Regression(hidden)
    weight, bias = regression.fit(energy, owner, routed)
    for _ in range(plan.rounds):
        chosen = chosen_experts(hidden @ weight.T + bias, plan.active).float()
        deviation = (chosen - chosen.mean(0)) / chosen.std(0).clamp_(min=1e-3)
        owner = balanced_assignment(energy.T @ deviation, size)
        weight, bias = regression.fit(energy, owner, routed)
    experts = torch.stack([rest[owner == number] for number in range(routed)])
    parts = {"shared": shared, "experts": experts, "router_weight": weight, "router_bias": bias}
    return {name: tensor.cpu() for name, tensor in parts.items()}


def balanced_assignment(scores: Tensor, capacity: int) -> Tensor:
    """Assign every row to a column, at most ``capacity`` rows each, the best pairs first.

    Args:
        scores: [rows, columns], rows at most columns * capacity.
        capacity: rows per column.

    Returns:
        [rows], int64, on the device of ``scores``.
    """
    rows, columns = scores.shape
    owner, room = [-1] * rows, [capacity] * columns
    for pair in scores.flatten().argsort(descending=True, stable=True).tolist():
        row, column = divmod(pair, columns)
        if owner[row] < 0 and room[column]:
            owner[row] = column
            room[column] -= 1
    return torch.tensor(owner, device=scores.device)


def _cluster(magnitudes: Tensor, clusters: int, size: int, seed: int) -> Tensor:
    """[channels]: balanced k-means on the correlation of [tokens, channels], seeds far from each other."""
    standard = magnitudes - magnitudes.mean(0)
    standard /= standard.norm(dim=0).clamp_(min=_LEAST)
    similarity = standard.T @ standard
    generator = torch.Generator().manual_seed(seed)
    seeds = [int(torch.randint(len(similarity), (1,), generator=generator))]
    while len(seeds) < clusters:
        nearest = similarity[:, seeds].amax(1)
        nearest[seeds] = torch.inf
        seeds.append(int(nearest.argmin()))
    owner = balanced_assignment(similarity[:, seeds], size)
    for _ in range(_CLUSTER_ROUNDS):
        member = F.one_hot(owner, clusters).float()
        sums = similarity @ member
        moved = balanced_assignment(sums / (member * sums).sum(0).clamp_(min=_LEAST).sqrt(), size)
        if torch.equal(moved, owner):
            break
        owner = moved
    return owner


class _Regression:
    """Ridge regression of the logarithm of each expert's share of the energy on the hidden state."""

    def __init__(self, hidden: Tensor) -> None:
        """Factorise once for every later fit; ``hidden`` is [tokens, hidden], fp32."""
        self.centre = hidden.mean(0)
        self.inputs = hidden - self.centre
        gram = self.inputs.T @ self.inputs
        gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
        self.factor = torch.linalg.cholesky(gram)

    def fit(self, energy: Tensor, owner: Tensor, experts: int) -> tuple[Tensor, Tensor]:
        """Router weight [experts, hidden] and bias [experts] of a partition."""
        targets = (energy @ F.one_hot(owner, experts).float() + 1e-6).log()
        middle = targets.mean(0)
        weight = torch.cholesky_solve(self.inputs.T @ (targets - middle), self.factor)
        return weight.T.contiguous(), middle - self.centre @ weight
