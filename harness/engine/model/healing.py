"""A short distillation that heals a carved model against the dense one it was carved from.

Router, one scale per expert and low-rank adapters on gate, up and down are trained, everything else is frozen. Forward
the experts are chosen by the hard top-k, as in decoding; backward the choice counts as a sigmoid of the distance to the
limit between the last chosen and the first idle expert (straight-through estimate). Scales and adapters are folded into
the weights at load, so that every chosen expert keeps weight 1.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.engine.model.carving import (
    COMMAND,
    CarvedMlp,
    Carving,
    apply_carving,
    chosen_experts,
    default_path,
    read_info,
    read_tensors,
    spread,
    write_tensors,
)
from harness.engine.model.loading import ModelError, load_model

_SIDES = ("gate", "up", "down")
_FIELDS = (*(f"{side}_{half}" for side in _SIDES for half in "ab"), "scales", "router_weight", "router_bias")
_TEMPERATURE = 0.5
"""Width of the straight-through sigmoid, in logits (logarithms of energy shares)."""
_ROUTER_RATE = 0.1
"""Learning rate of the router relative to that of the adapters: its inputs add up over the whole hidden state."""


@dataclass(frozen=True, slots=True)
class HealingPlan:
    """How a healing is trained.

    Attributes:
        steps: optimizer steps in all; the learning rate falls linearly to a tenth.
        lr: first learning rate of AdamW.
        rank: of the adapters.
        batch: sequences per step.
        save_every: steps between saved states.
        seed: of the adapters and of the order of the text.
    """

    steps: int = 200
    lr: float = 1e-3
    rank: int = 4
    batch: int = 2
    save_every: int = 20
    seed: int = 0


class HealedMlp(nn.Module):
    """Training form of a carved FFN: the frozen :class:`CarvedMlp` with its adapters, scales and router, fp32."""

    def __init__(self, mlp: CarvedMlp, rank: int, generator: torch.Generator) -> None:
        """Adapters that start as a no-op around ``mlp``."""
        super().__init__()
        self.mlp = mlp
        device = mlp.gate_proj.weight.device
        for side in _SIDES:
            outputs, inputs = getattr(mlp, f"{side}_proj").weight.shape
            down = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
            self.register_parameter(f"{side}_a", nn.Parameter(down.to(device)))
            self.register_parameter(f"{side}_b", nn.Parameter(torch.zeros(outputs, rank, device=device)))
        self.scales = nn.Parameter(torch.ones(mlp.experts.shape[0], device=device))
        self.router_weight = nn.Parameter(mlp.router.weight.detach().float().clone())
        self.router_bias = nn.Parameter(mlp.router.bias.detach().float().clone())

    def _project(self, side: str, inputs: Tensor) -> Tensor:
        first, second = (getattr(self, f"{side}_{half}").to(inputs.dtype) for half in "ab")
        output: Tensor = getattr(self.mlp, f"{side}_proj")(inputs) + F.linear(F.linear(inputs, first), second)
        return output

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] to [..., hidden]; the value is that of the merged weights."""
        logits = F.linear(hidden.float(), self.router_weight, self.router_bias)
        weights = chosen_experts(logits, self.mlp.top_k).float()
        if self.mlp.top_k < logits.shape[-1]:
            border = logits.detach().topk(self.mlp.top_k + 1, dim=-1).values[..., -2:].mean(-1, keepdim=True)
            soft = torch.sigmoid((logits - border) / _TEMPERATURE)
            weights = weights + (soft - soft.detach())
        factors = spread(weights * self.scales, self.mlp.owner).to(hidden.dtype)
        activations = F.silu(self._project("gate", hidden)) * self._project("up", hidden)
        return self._project("down", activations * factors)


@dataclass(frozen=True, slots=True, eq=False)
class Healing:
    """Trained adapters of every layer.

    Attributes:
        tensors: fp32, each with the layer as first dimension: gate_a, up_a, down_a [layers, rank, inputs]; gate_b,
            up_b, down_b [layers, outputs, rank]; scales, router_bias [layers, experts]; router_weight [layers,
            experts, hidden].
        info: where it comes from; ``carving`` names the file beside it and ``carving_sha256`` its content.
    """

    tensors: dict[str, Tensor]
    info: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically."""
        write_tensors(path, self.tensors, {"kind": "healing", **self.info})

    @classmethod
    def load(cls, path: Path) -> Healing:
        """Read what :meth:`save` wrote.

        Raises:
            ModelError: the file is missing, unreadable or of another version.
        """
        return cls(*read_tensors(path, "healing", _FIELDS))

    @torch.no_grad()
    def merge(self, model: Any) -> Any:
        """Fold the adapters and scales into the weights of a freshly carved model, in place.

        Returns:
            ``model``, whose experts still count 1 each.

        Raises:
            ModelError: sizes do not fit the model.
        """
        try:
            for number, layer in enumerate(model.model.layers):
                self._merge_layer(layer.mlp, {name: self.tensors[name][number] for name in _FIELDS})
        except (RuntimeError, IndexError) as error:
            raise ModelError(f"healing: its sizes do not fit the model (`{COMMAND} --heal` makes it anew)") from error
        return model

    @staticmethod
    def _merge_layer(mlp: CarvedMlp, parts: dict[str, Tensor]) -> None:
        device = mlp.gate_proj.weight.device
        factors = {"down": spread(parts["scales"].to(device), mlp.owner)}
        for side in _SIDES:
            weight = getattr(mlp, f"{side}_proj").weight
            change = (parts[f"{side}_b"] @ parts[f"{side}_a"]).to(device)
            weight.copy_((weight.float() + change) * factors.get(side, 1.0))
        mlp.router.weight.copy_(parts["router_weight"])
        mlp.router.bias.copy_(parts["router_bias"])


def load_carved(path: str | None, active: int, dtype: torch.dtype, device: torch.device, base_folder: str) -> Any:
    """The carved library model, healed where ``path`` is a healed file.

    Args:
        path: a carving or a healed file, None for the carving at its default place.
        active: routed experts per token.
        dtype, device: of the weights.
        base_folder: the dense model that was carved.

    Returns:
        a library model in evaluation mode with a :class:`CarvedMlp` in every layer.

    Raises:
        ModelError: a file is missing or damaged, or does not fit the model or the carving beside it.
    """
    chosen = default_path() if path is None else Path(path).expanduser()
    healing = Healing.load(chosen) if read_info(chosen)["kind"] == "healing" else None
    source = chosen if healing is None else chosen.with_name(str(healing.info.get("carving")))
    carving = Carving.load(source)
    if healing is not None and healing.info.get("carving_sha256") != file_sha256(source):
        raise ModelError(f"healing={chosen}: {source.name} has changed since (`{COMMAND} --heal` makes it anew)")
    model = apply_carving(load_model(base_folder, dtype, device), carving, active)
    return model if healing is None else healing.merge(model)


def file_sha256(path: Path) -> str:
    """Hash of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def batch_of(step: int, sequences: int, plan: HealingPlan) -> Tensor:
    """[batch], numbers of the sequences of a step, a function of the step alone: each pass has an order of its own."""
    places = range(step * plan.batch, (step + 1) * plan.batch)
    orders = {
        turn: torch.randperm(sequences, generator=torch.Generator().manual_seed(plan.seed + turn))
        for turn in {place // sequences for place in places}
    }
    return torch.stack([orders[place // sequences][place % sequences] for place in places])


def distillation_loss(student: Any, teacher: Any, ids: Tensor) -> Tensor:
    """KL(teacher || student) of the next token, in nats, mean over the tokens of ``ids`` [sequences, length]."""
    with torch.no_grad():
        target = teacher(ids, use_cache=False).logits.float().log_softmax(-1)
    found = student(ids, use_cache=False).logits.float().log_softmax(-1)
    return F.kl_div(found, target, reduction="sum", log_target=True) / ids.numel()


def heal(
    student: Any,
    teacher: Any,
    sequences: Tensor,
    plan: HealingPlan,
    state: Path,
    identity: str,
    report: Callable[[int, float], None],
) -> Healing:
    """Train a carved model towards the dense one; goes on from ``state`` where that exists.

    An interrupted run that is resumed ends in the same state as one without a break.

    Args:
        student: a freshly carved library model; its FFNs are replaced by their training form.
        teacher: the dense model.
        sequences: [sequences, length], token ids.
        plan: how to train.
        state: file of the training state, written atomically every ``plan.save_every`` steps and at the end.
        identity: of carving and text; a state of another one is refused.
        report: called after each step with the steps done and the loss.

    Returns:
        the adapters; ``info`` holds the plan and the loss of the last step.

    Raises:
        ModelError: ``state`` is unreadable or belongs to something else.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    student.requires_grad_(False)
    layers = [HealedMlp(layer.mlp, plan.rank, generator) for layer in student.model.layers]
    for layer, mlp in zip(student.model.layers, layers, strict=True):
        layer.mlp = mlp
    routers = [part for mlp in layers for part in (mlp.router_weight, mlp.router_bias)]
    others = [part for mlp in layers for name, part in mlp.named_parameters() if name in _FIELDS[:-2]]
    groups = [{"params": others, "lr": plan.lr}, {"params": routers, "lr": plan.lr * _ROUTER_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    mark = f"{identity} rank={plan.rank} lr={plan.lr} batch={plan.batch} seed={plan.seed}"
    done, loss_value = _restore(state, mark, others + routers, optimizer)
    for step in range(done, plan.steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - 0.9 * step / plan.steps)
        ids = sequences[batch_of(step, len(sequences), plan)].to(student.device)
        loss = distillation_loss(student, teacher, ids)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(others + routers, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done, loss_value = step + 1, loss.item()
        if done % plan.save_every == 0 or done == plan.steps:
            _store(state, mark, done, loss_value, others + routers, optimizer)
        report(done, loss_value)
    tensors = {name: torch.stack([getattr(mlp, name).detach().cpu() for mlp in layers]) for name in _FIELDS}
    return Healing(tensors, {"plan": asdict(plan), "steps_done": done, "last_loss": loss_value})


def _store(
    path: Path, mark: str, done: int, loss: float, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    saved = {
        "mark": mark,
        "done": done,
        "loss": loss,
        "parameters": [part.detach() for part in parameters],
        "optimizer": optimizer.state_dict(),
    }
    try:
        torch.save(saved, scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _restore(
    path: Path, mark: str, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Steps done and last loss of a saved state, put into the parameters and the optimizer; 0 where there is none."""
    if not path.is_file():
        return 0, float("nan")
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ModelError(
            f"{path}: cannot be read ({type(error).__name__}); remove it to heal from the start"
        ) from error
    if saved.get("mark") != mark:
        raise ModelError(f"{path}: was made with another carving, text, rank, lr or seed; remove it to start anew")
    with torch.no_grad():
        for part, value in zip(parameters, saved["parameters"], strict=True):
            part.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["done"]), float(saved["loss"])
