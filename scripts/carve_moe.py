"""Carve SmolLM2's FFNs into shared and routed experts: `python -m scripts.carve_moe --help`.

Prints the sizes, then perplexity and top-1 agreement with the dense model on held-out text, and a JSON line last. With
--heal the carved model is then distilled against the dense one; run it again to go on after an interruption.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from harness.engine.model import loading
from harness.engine.model.carving import (
    CarvedMlp,
    Carving,
    CarvingPlan,
    OracleMlp,
    apply_carving,
    carve_layer,
    chosen_experts,
    collect_inputs,
    default_path,
    read_info,
    weights_mark,
)
from harness.engine.model.families import UnsupportedModel, check_supported
from harness.engine.model.healing import HealingPlan, file_sha256, heal, load_carved
from scripts.common import ROOT

BUNDLED = ("xsum", "squad", "qmsum", "gsm8k", "math")
_TEXT_FIELDS = ("document", "context", "question", "problem", "answer", "solution")
_HELD_EVERY = 5
"""One sequence in so many is held out and never calibrated or healed on."""
_MOST_CHARACTERS = 4_000_000
NOTICE = (
    "Carved without training: exact with all experts active, worse than a trained mixture of experts with fewer.\n"
    "It stands in for the machinery and for the order of policies, not for absolute quality."
)


@dataclass(frozen=True, slots=True)
class Quality:
    """How a model predicts held-out text.

    Attributes:
        perplexity: exp of the mean loss per token.
        agreement: share of the positions whose most likely token is the dense model's.
    """

    perplexity: float
    agreement: float


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """Text as token ids, cut into sequences.

    Attributes:
        calibration: [sequences, length], part of ``healing``.
        healing: [sequences, length], all that is not held out.
        held: [sequences, length], in neither of them.
        sha256: of the text.
    """

    calibration: Tensor
    healing: Tensor
    held: Tensor
    sha256: str


def main(argv: Sequence[str] | None = None) -> int:
    """Carve, and heal where asked; returns the exit code (2 for bad input)."""
    options = _parser().parse_args(argv)
    screen = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    try:
        folder, carve_plan, heal_plan = prepare(options)
        device = loading.resolve_device(options.device)
        dtype = loading.resolve_dtype(options.dtype, device)
        text = read_text(options, loading.load_tokenizer(folder))
        found: dict[str, Any] = {"out": options.out.name}
        if not (options.heal and options.out.is_file()):
            found |= carve(folder, dtype, device, text, carve_plan, options, screen)
        if options.heal:
            found |= run_healing(folder, dtype, device, text, heal_plan, options, screen)
    except (loading.ModelError, UnsupportedModel, ValueError) as error:
        print(f"carve_moe: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"status": "ok", **found}, separators=(",", ":")))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.carve_moe", description=__doc__.partition("\n")[0])
    add, carving, healing = parser.add_argument, CarvingPlan(), HealingPlan()
    add("--model", help="folder of a Llama checkpoint (default: SmolLM2)")
    add("--text", type=Path, nargs="+", default=[], help="text files, plain or .gz (default: the bundled samples)")
    add("--out", type=Path, default=default_path(), help="file to write (default: in the cache folder)")
    add("--experts", type=int, default=carving.experts, help="experts of a layer, shared ones too (%(default)s)")
    add("--shared", type=int, default=carving.shared, help="of them, shared experts (%(default)s)")
    add("--active", type=int, default=carving.active, help="routed experts active per token (%(default)s)")
    add("--tokens", type=int, default=16384, help="calibration tokens (%(default)s)")
    add("--sequence", type=int, default=512, help="tokens of a sequence (%(default)s)")
    add("--rounds", type=int, default=carving.rounds, help="rounds of routing and reassigning (%(default)s)")
    add("--seed", type=int, default=0, help="of the clustering and the healing (%(default)s)")
    add("--heal", action="store_true", help="distil the carving at --out against the dense model; carve if missing")
    add("--steps", type=int, default=healing.steps, help="healing steps in all (%(default)s)")
    add("--lr", type=float, default=healing.lr, help="first learning rate of the healing (%(default)s)")
    add("--rank", type=int, default=healing.rank, help="rank of the healing's adapters (%(default)s)")
    add("--batch", type=int, default=healing.batch, help="sequences per healing step (%(default)s)")
    add("--save-every", type=int, default=healing.save_every, help="healing steps between states (%(default)s)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return parser


def prepare(options: argparse.Namespace) -> tuple[str, CarvingPlan, HealingPlan]:
    """Folder of the dense model and the plans, checked before anything is computed.

    Raises:
        harness.engine.model.loading.ModelError, harness.engine.model.families.UnsupportedModel, ValueError: bad
            input, one line.
    """
    for file in options.text:
        if not file.is_file():
            raise ValueError(f"--text={file}: there is no such file")
    if options.out.suffix != ".safetensors":
        raise ValueError(f"--out={options.out}: the name must end in .safetensors")
    least = {"rounds": 0, "tokens": 1, "sequence": 2, "steps": 1, "rank": 1, "batch": 1, "save_every": 1}
    for name, value in least.items():
        if getattr(options, name) < value:
            raise ValueError(f"--{name.replace('_', '-')}={getattr(options, name)} is below {value}")
    if not 0 < options.lr < 1:
        raise ValueError(f"--lr={options.lr} is not between 0 and 1")
    folder = str(loading.smollm2_folder()) if options.model is None else options.model
    config = loading.load_config(folder)
    check_supported(config)
    if options.sequence > config.max_position_embeddings:
        raise ValueError(f"--sequence={options.sequence}: the model has {config.max_position_embeddings} positions")
    plan = CarvingPlan(options.experts, options.shared, options.active, options.rounds, options.seed)
    plan.check(config.intermediate_size)
    if options.heal and options.out.is_file() and read_info(options.out)["kind"] != "carving":
        raise ValueError(f"--out={options.out}: name the carving to heal, the healed file is written beside it")
    healing = HealingPlan(options.steps, options.lr, options.rank, options.batch, options.save_every, options.seed)
    return folder, plan, healing


def documents(files: Sequence[Path]) -> Iterator[str]:
    """The text of each file, or of each bundled sample file where none is named, no document twice.

    Raises:
        ValueError: a file that is no text.
    """
    for file in files:
        try:
            raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            yield raw.decode("utf-8", errors="replace")[:_MOST_CHARACTERS]
        except (OSError, EOFError) as error:
            raise ValueError(f"--text={file}: cannot be read ({type(error).__name__})") from error
    for name in () if files else BUNDLED:
        rows = [json.loads(line) for line in (ROOT / "tasks" / "data" / f"{name}.jsonl").read_text().splitlines()]
        parts = [row[field] for row in rows for field in _TEXT_FIELDS if isinstance(row.get(field), str)]
        yield "\n\n".join(dict.fromkeys(parts))


def read_text(options: argparse.Namespace, tokenizer: Any) -> Text:
    """Sequences spread evenly over every text, and others of the same texts that are held out.

    Raises:
        ValueError: there is too little text.
    """
    digest, length = hashlib.sha256(), options.sequence
    train, held = [], []
    for document in documents(options.text):
        digest.update(document.encode())
        ids = torch.tensor(tokenizer.encode(document, verbose=False))
        rows = ids[: len(ids) // length * length].view(-1, length)
        out = torch.arange(len(rows)) % _HELD_EVERY == _HELD_EVERY - 1
        train.append(rows[~out])
        held.append(rows[out])
    wanted = math.ceil(options.tokens / length)
    found = Text(_spread(train, wanted), torch.cat(train), _spread(held, math.ceil(wanted / 4)), digest.hexdigest())
    if not len(found.held):
        raise ValueError(f"--text: there is too little for {_HELD_EVERY} sequences of --sequence={length} tokens")
    return found


def _spread(parts: list[Tensor], wanted: int) -> Tensor:
    """About ``wanted`` rows, evenly spaced in every part, as many from each as it and the others have to give."""
    chosen, left = [], wanted
    for number, part in enumerate(sorted(parts, key=len)):
        count = min(len(part), -(-left // (len(parts) - number)))
        chosen.append(part[torch.arange(count) * len(part) // max(1, count)])
        left -= count
    return torch.cat(chosen)


def carve(
    folder: str,
    dtype: torch.dtype,
    device: torch.device,
    text: Text,
    plan: CarvingPlan,
    options: argparse.Namespace,
    screen: Console,
) -> dict[str, Any]:
    """Carve, measure and save; what the JSON line says about it."""
    start = time.perf_counter()
    model = loading.load_model(folder, dtype, device)
    base = Path(folder).name if options.model else "SmolLM2-135M-Instruct"
    screen.print(f"model        {base}, {dtype}, {device}, {torch.get_num_threads()} threads")
    screen.print(f"text         {text.calibration.numel()} tokens to calibrate, {text.held.numel()} held out")
    size, routed = model.config.intermediate_size // plan.experts, plan.experts - plan.shared
    screen.print(f"experts      {plan.shared} shared, {plan.active} of {routed} routed active, {size} channels each")
    dense = predictions(model, text.held)
    inputs = collect_inputs(model, text.calibration)
    layers = []
    for number in track(range(len(inputs)), "carving", console=_progress()):
        layers.append(carve_layer(model.model.layers[number].mlp, inputs[number], plan))
        inputs[number] = inputs[number][:0]
    info: dict[str, Any] = {
        "base": base,
        "base_mark": weights_mark(model),
        "text_sha256": text.sha256,
        "tokens": text.calibration.numel(),
        "plan": asdict(plan),
        "active": plan.active,
    }
    carving = Carving(**{name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}, info=info)
    fitted = time.perf_counter() - start
    counts = sorted({plan.active, max(1, plan.active * 3 // 4), max(1, plan.active // 2)}, reverse=True)
    measured = {"dense": quality(dense, dense)}
    for active in counts:
        for name, kind in (("router", CarvedMlp), ("oracle", OracleMlp)):
            apply_carving(model, carving, active, kind)
            measured[f"{name} {active}/{routed}"] = quality(predictions(model, text.held), dense)
    used = expert_use(apply_carving(model, carving, plan.active), text.held)
    info |= {"quality": {name: asdict(value) for name, value in measured.items()}, "use_range": used}
    carving.save(options.out)
    report(measured, screen)
    seconds = time.perf_counter() - start
    screen.print(f"an expert runs on {used[0]:.0%} to {used[1]:.0%} of the tokens (even: {plan.active / routed:.0%})")
    screen.print(f"{fitted:.0f} s to carve, {seconds:.0f} s in all; written to {options.out}")
    screen.print(NOTICE)
    return {"seconds": round(seconds, 1), **{name: info[name] for name in ("tokens", "plan", "quality", "use_range")}}


def run_healing(
    folder: str,
    dtype: torch.dtype,
    device: torch.device,
    text: Text,
    plan: HealingPlan,
    options: argparse.Namespace,
    screen: Console,
) -> dict[str, Any]:
    """Heal the carving, measure before and after, and save; what the JSON line says about it."""
    start = time.perf_counter()
    teacher = loading.load_model(folder, dtype, device)
    carving, sha256 = Carving.load(options.out), file_sha256(options.out)
    active = int(carving.info["active"])
    student = apply_carving(loading.load_model(folder, dtype, device), carving, active)
    dense = predictions(teacher, text.held)
    measured = {"dense": quality(dense, dense)}
    measured["before"] = quality(predictions(student, text.held), dense)
    healed = options.out.with_name(
        f"healed{'' if options.out.stem == 'carving' else '_' + options.out.stem}.safetensors"
    )
    screen.print(
        f"healing      {active} experts active, {text.healing.numel()} tokens of text at hand, rank {plan.rank}"
    )
    with Progress(*Progress.get_default_columns(), "loss {task.fields[loss]:.4f}", console=_progress()) as bar:
        task = bar.add_task("healing", total=plan.steps, loss=math.nan)
        adapters = heal(
            student,
            teacher,
            text.healing,
            plan,
            healed.with_suffix(".state.pt"),
            f"{sha256} {text.sha256} {tuple(text.healing.shape)}",
            lambda done, loss: bar.update(task, completed=done, loss=loss),
        )
    adapters.info.update(carving=options.out.name, carving_sha256=sha256, text_sha256=text.sha256, active=active)
    adapters.save(healed)
    merged = load_carved(str(healed), active, dtype, device, folder)
    measured["after"] = quality(predictions(merged, text.held), dense)
    adapters.info["quality"] = {name: asdict(value) for name, value in measured.items()}
    adapters.save(healed)
    report(measured, screen)
    screen.print(f"{time.perf_counter() - start:.0f} s to heal; written to {healed}")
    return {"healed": healed.name, **adapters.info, "heal_seconds": round(time.perf_counter() - start, 1)}


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """Mean loss of a model on a text, nats per token, and its most likely tokens [sequences, length]."""

    loss: float
    best: Tensor


@torch.inference_mode()
def predictions(model: Any, sequences: Tensor, batch: int = 2) -> Predictions:
    """What a library model predicts on [sequences, length]."""
    losses, best = [], []
    for first in range(0, len(sequences), batch):
        ids = sequences[first : first + batch].to(model.device)
        logits = model(ids, use_cache=False).logits.float()
        losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").cpu())
        best.append(logits.argmax(-1).cpu())
    return Predictions(torch.cat(losses).double().mean().item(), torch.cat(best))


def quality(found: Predictions, dense: Predictions) -> Quality:
    """Perplexity, and agreement with the dense model."""
    return Quality(math.exp(found.loss), (found.best == dense.best).double().mean().item())


@torch.inference_mode()
def expert_use(model: Any, sequences: Tensor) -> tuple[float, float]:
    """Least and largest share of the tokens on which a routed expert runs, over the experts of all layers."""
    shares: list[list[Tensor]] = [[] for _ in model.model.layers]
    handles = [
        layer.mlp.router.register_forward_hook(
            lambda _, inputs, logits, kept=kept, top_k=layer.mlp.top_k: kept.append(
                chosen_experts(logits, top_k).flatten(0, -2).double().mean(0)
            )
        )
        for layer, kept in zip(model.model.layers, shares, strict=True)
    ]
    predictions(model, sequences)
    for handle in handles:
        handle.remove()
    means = torch.stack([torch.stack(kept).mean(0) for kept in shares])
    return means.min().item(), means.max().item()


def report(measured: dict[str, Quality], screen: Console) -> None:
    """The table on the screen."""
    table = Table(title="held-out text", title_justify="left")
    for column in ("routed experts active", "perplexity", "top-1 agreement"):
        table.add_column(column, justify="left" if column.startswith("routed") else "right")
    for name, value in measured.items():
        table.add_row(name, f"{value.perplexity:.2f}", f"{value.agreement:.1%}")
    screen.print(table)


def _progress() -> Console:
    """Progress goes to standard error, and only to a terminal."""
    return Console(stderr=True, quiet=not sys.stderr.isatty())


if __name__ == "__main__":
    raise SystemExit(main())
