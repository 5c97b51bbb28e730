"""Train a small EAGLE-3 draft head for a target (arXiv 2503.01840): `python -m scripts.train_draft --help`.

Prompts are answered by the target first, then the head is trained on these answers and on plain text. Both can be
interrupted: the same command goes on. Prints a line per validation, and a JSON line last.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness import console, models, roofline
from harness.engine.model import loading
from harness.engine.model.eagle3 import Eagle3Head, feature_layers
from harness.engine.model.eagle3_teacher import Passage, Teacher
from harness.engine.model.eagle3_training import Progress, Training, TrainingPlan
from scripts import draft_data, texts

_STATE = "training.pt"
_HELD = 24
"""Passages of each kind held back for validation at most, and one in eight at most."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train and write the head; returns the exit code, 2 for bad input."""
    options = _parser().parse_args(argv)
    try:
        line = run(options)
    except (ValueError, OSError) as error:
        print(f"train_draft: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps({"status": "ok", **line}, separators=(",", ":")))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.train_draft", description=__doc__.partition("\n")[0])
    texts.add_options(parser, dtype="auto")
    add, plan = parser.add_argument, TrainingPlan()
    add("--prompts", nargs="+", default=[], metavar="FILE", help="JSONL questions, or TASK=FILE with one of the tasks")
    add("--limit", type=int, default=1000, help="prompts of each file at most (default %(default)s)")
    add("--new-tokens", type=int, default=64, help="tokens of the target's answers at most (default %(default)s)")
    add("--answer-batch", type=int, default=8, help="answers decoded together (default %(default)s)")
    add("--window", type=int, default=512, help="tokens of a passage at most (default %(default)s)")
    add("--draft-vocab", type=int, default=8192, help="tokens that the head can propose (default %(default)s)")
    add("--steps", type=int, help="optimizer steps in all (default: 1000 where --minutes is not given)")
    add("--minutes", type=float, help="wall-clock of the training in all, without the answers")
    add("--unroll", type=int, default=plan.unroll, help="steps of the training-time test (default %(default)s)")
    add("--decay", type=float, default=plan.decay, help="weight of each step by the one before (default %(default)s)")
    add("--lr", type=float, default=plan.lr, help="highest learning rate (default %(default)s)")
    add("--warmup", type=int, default=plan.warmup, help="steps to get there (default %(default)s)")
    add("--batch-tokens", type=int, default=plan.batch_tokens, help="tokens per optimizer step (default %(default)s)")
    add("--prompt-weight", type=float, default=plan.prompt_weight, help="of prompt tokens (default %(default)s)")
    add("--validate-every", type=int, default=plan.validate_every, help="steps between (default %(default)s)")
    add("--fresh", action="store_true", help="start over instead of going on")
    add("--out", type=Path, help="folder to write (default: eagle3/<model> in the cache folder)")
    return parser


@dataclass(frozen=True, slots=True)
class Data:
    """What is trained on.

    Attributes:
        train, held: passages.
        tokens: what the head proposes, ascending.
        sha256: of the passages.
    """

    train: list[Passage]
    held: list[Passage]
    tokens: list[int]
    sha256: str

    @property
    def counts(self) -> dict[str, int]:
        """Tokens to train on by kind of passage."""
        kinds = ("answers", "text")
        return {kind: sum(len(one.tokens) for one in self.train if one.kind == kind) for kind in kinds}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train as the options say; what the JSON line says about it.

    Raises:
        ValueError, OSError: bad input, one line.
    """
    plan = _plan(options)
    prompt_files = [draft_data.PromptFile.named(name) for name in options.prompts]
    text_files = draft_data.text_files(options.text or ())
    if not prompt_files and not text_files:
        raise ValueError("--text: nothing to train on (valid: --text, --prompts, or both)")
    source = texts.find(options)
    feature_layers(source.shape.layers)
    if options.window > source.positions:
        raise ValueError(f"--window={options.window}: the model has {source.positions} positions (valid: up to that)")
    out: Path = options.out or loading.cache_dir() / "eagle3" / source.label
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out={out}: is a file (valid: a folder)")
    out.mkdir(parents=True, exist_ok=True)
    state = out / _STATE
    if options.fresh:
        state.unlink(missing_ok=True)
    data = gather(options, source, prompt_files, text_files)
    labels = [file.path.name for file in prompt_files] + [file.name for file in text_files]
    return train(source, plan, data, out, labels)


def _plan(options: argparse.Namespace) -> TrainingPlan:
    """The options that say how to train.

    Raises:
        ValueError: one of them, or another number, is out of range; one line.
    """
    least = {"limit": 1, "new_tokens": 1, "answer_batch": 1, "window": 32, "draft_vocab": 2, "unroll": 1, "warmup": 0}
    for name, value in (least | {"batch_tokens": 1, "validate_every": 1, "steps": 1}).items():
        given = getattr(options, name)
        if given is not None and given < value:
            raise ValueError(f"--{name.replace('_', '-')}={given}: must be at least {value}")
    ranges = {"decay": (0, 1), "lr": (0, 1), "minutes": (0, math.inf)}
    for name, (low, high) in ranges.items():
        given = getattr(options, name)
        if given is not None and not low < given <= high:
            raise ValueError(f"--{name}={given}: must lie above {low}" + (f", up to {high}" if high == 1 else ""))
    if not 0 <= options.prompt_weight <= 1:
        raise ValueError(f"--prompt-weight={options.prompt_weight}: must lie between 0 and 1")
    if options.prompts and options.new_tokens > options.window // 2:
        raise ValueError(f"--new-tokens={options.new_tokens}: more than half of --window={options.window}")
    return TrainingPlan(
        steps=1000 if options.steps is None and options.minutes is None else options.steps,
        minutes=options.minutes,
        unroll=options.unroll,
        decay=options.decay,
        lr=options.lr,
        warmup=options.warmup,
        batch_tokens=options.batch_tokens,
        prompt_weight=options.prompt_weight,
        validate_every=options.validate_every,
        seed=options.seed,
    )


def gather(
    options: argparse.Namespace,
    source: texts.Source,
    prompt_files: Sequence[draft_data.PromptFile],
    text_files: Sequence[Path],
) -> Data:
    """Windows of text, and prompts with the target's answers, of which those not kept from before are decoded now.

    Raises:
        ValueError: files cannot be read, or give too little; one line.
    """
    tokenizer, ends = source.tokenizer, models.end_ids(source.model, source.config, source.tokenizer)
    longest = options.window - options.new_tokens
    asked = draft_data.questions(prompt_files, tokenizer, longest, options.limit) if prompt_files else []
    passages = draft_data.text_passages(text_files, tokenizer, options.window)
    settings = {**source.identity, "dtype": str(source.dtype), "new_tokens": options.new_tokens}
    answers = draft_data.Answers(draft_data.Answers.file_of(loading.cache_dir() / "eagle3" / "answers", settings))
    missing = len(answers.missing(asked))
    if missing:
        console.note(f"answering {missing} of {len(asked)} prompts")
        step = texts.load(source)
        with console.progress("answers", len(asked), len(asked) - missing) as advance:
            answers.find(
                asked,
                step,
                tokenizer,
                ends,
                options.new_tokens,
                options.answer_batch,
                advance,
            )
        del step
    passages = [one for one in answers.passages(asked) + passages if len(one.tokens) > 2]
    train_part, held = _hold_back(passages)
    if not train_part or not held:
        raise ValueError(f"--text: {len(passages)} passages are too few to train on some and hold others back")
    vocab = source.shape.vocab
    tokens = draft_data.vocabulary(passages, min(options.draft_vocab, vocab), vocab, ends)
    return Data(train_part, held, tokens, draft_data.sha256(passages))


def _hold_back(passages: Sequence[Passage]) -> tuple[list[Passage], list[Passage]]:
    """Passages to train on, and of each kind some that are held back, evenly spaced."""
    train_part: list[Passage] = []
    held: list[Passage] = []
    for kind in ("answers", "text"):
        own = [one for one in passages if one.kind == kind]
        count = min(_HELD, -(-len(own) // 8))
        places = {place * len(own) // max(1, count) for place in range(count)}
        held += [own[place] for place in sorted(places)]
        train_part += [one for place, one in enumerate(own) if place not in places]
    return train_part, held


def train(source: texts.Source, plan: TrainingPlan, data: Data, out: Path, labels: list[str]) -> dict[str, Any]:
    """Train on the data and keep the best head in ``out``; what the JSON line says about it.

    Raises:
        ValueError: the model cannot be read, or ``out`` holds another training; one line.
    """
    model = models.library_model(source.model, source.config, source.dtype, source.device, source.seed)
    model.requires_grad_(False)
    teacher = Teacher(model, torch.tensor(data.tokens))
    head = teacher.new_head(source.config, plan.seed)
    mark = f"{source.identity} {source.dtype} {data.sha256} {len(data.tokens)}"
    training = Training(head, teacher, data.train, data.held, plan, out / _STATE, mark)
    device = roofline.device_text(source.device, torch.get_num_threads())
    console.note(
        f"training a head for {source.label}, {sum(one.numel() for one in head.parameters()) / 1e6:.1f} M weights, "
        f"{str(source.dtype).removeprefix('torch.')}, {device}; "
        + ", ".join(f"{count} tokens of {kind}" for kind, count in data.counts.items() if count)
        + (f"; going on after step {training.progress.steps}" if training.progress.steps else "")
    )

    def validated(progress: Progress) -> None:
        print(_line(progress), flush=True)

    def keep(best: Eagle3Head) -> None:
        write(best, out, notes(source, plan, data, labels, training.progress))

    with console.progress("training", 1000, 0) as advance:
        shown = 0

        def step_done(progress: Progress) -> None:
            nonlocal shown
            while shown < int(1000 * plan.done(progress.steps, progress.seconds)):
                advance()
                shown += 1

        ended = training.run(step_done, validated, keep)
    return {
        "path": str(out),
        "steps": ended.steps,
        "minutes": round(ended.seconds / 60, 2),
        "tokens": ended.tokens,
        "loss": round(ended.loss, 4),
        "acceptance": {kind: round(found.length, 4) for kind, found in ended.acceptance.items()},
        "best": round(ended.best, 4),
        "data_sha256": data.sha256,
    }


def _line(progress: Progress) -> str:
    """One validation."""
    parts = [f"step {progress.steps}", f"{progress.seconds / 60:.1f} min", f"loss {progress.loss:.4f}"]
    for kind, found in progress.acceptance.items():
        shares = " ".join(f"{share:.3f}" for share in found.accuracy)
        parts.append(f"{kind} {shares} acceptance {found.length:.3f}")
    return "  ".join([*parts, f"{progress.tokens / max(1e-9, progress.seconds):.0f} tokens/s"])


def notes(
    source: texts.Source, plan: TrainingPlan, data: Data, labels: list[str], progress: Progress
) -> dict[str, Any]:
    """What the head's config.json says about its training; no paths."""
    return {
        "training": {
            "target": source.identity,
            "target_dtype": str(source.dtype).removeprefix("torch."),
            "data": labels,
            "data_sha256": data.sha256,
            "data_tokens": data.counts,
            "steps": progress.steps,
            "tokens": progress.tokens,
            "minutes": round(progress.seconds / 60, 2),
            "unroll": plan.unroll,
            "lr": plan.lr,
            "seed": plan.seed,
            "loss": progress.loss,
            "accuracy": {kind: list(found.accuracy) for kind, found in progress.acceptance.items()},
            "validation_acceptance": {kind: found.length for kind, found in progress.acceptance.items()},
        }
    }


def write(head: Eagle3Head, folder: Path, entries: dict[str, Any]) -> None:
    """Save a head in bfloat16, each file at once or not at all.

    Args:
        head: in any dtype.
        folder: made where it is missing.
        entries: more of config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".saving.{os.getpid()}"
    try:
        copy.deepcopy(head).to(device="cpu", dtype=torch.bfloat16).save(scratch, entries)
        for file in sorted(scratch.iterdir(), reverse=True):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
