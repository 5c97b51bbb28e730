"""Training of an EAGLE-3 head (arXiv 2503.01840): batches, validation, a loop that can be interrupted."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.engine.model.eagle3 import Eagle3Head, HeadError
from harness.engine.model.eagle3_teacher import Passage, Teacher, make_batch
from harness.engine.model.eagle3_unroll import unrolled, unrolled_loss

_POOL = 256
"""Passages among which those of similar length are put together."""
_LAST_RATE = 0.05
"""Learning rate at the end, relative to the highest."""


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How a head is trained.

    Attributes:
        steps: optimizer steps in all; None for no limit.
        minutes: wall-clock in all, over every run of the same training; None for no limit.
        unroll: steps of the training-time test.
        decay: step j counts decay ** (j - 1).
        lr: highest learning rate of AdamW, reached after ``warmup`` steps; then it falls with a cosine.
        warmup: steps.
        batch_tokens: tokens per optimizer step at most, padding included; a passage alone may have more.
        prompt_weight: weight of a position whose next token is not part of an answer, in a passage with one.
        clip: largest norm of the gradient.
        validate_every: steps between validations, each of which saves the training state.
        seed: of the order of the passages.
    """

    steps: int | None = None
    minutes: float | None = None
    unroll: int = 5
    decay: float = 0.8
    lr: float = 2e-3
    warmup: int = 40
    batch_tokens: int = 2048
    prompt_weight: float = 0.3
    clip: float = 1.0
    validate_every: int = 100
    seed: int = 0

    def done(self, steps: int, seconds: float) -> float:
        """Share of the training that lies behind, 0 to 1."""
        by_steps = 0.0 if self.steps is None else steps / self.steps
        by_time = 0.0 if self.minutes is None else seconds / (60 * self.minutes)
        return min(1.0, max(by_steps, by_time))

    def rate(self, steps: int, seconds: float) -> float:
        """Learning rate of the next step."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.done(steps, seconds)))
        return self.lr * min(1.0, (steps + 1) / max(1, self.warmup)) * (_LAST_RATE + (1 - _LAST_RATE) * cosine)


def batches(passages: Sequence[Passage], tokens: int, seed: int) -> Iterator[list[Passage]]:
    """Batches without end, a function of the seed alone; in each pass every passage comes once.

    Args:
        passages: at least one.
        tokens: of a batch at most, padding included, unless one passage alone has more.
        seed: of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(passages), generator=generator).tolist()
        found: list[list[Passage]] = []
        for first in range(0, len(order), _POOL):
            found += _by_length([passages[place] for place in order[first : first + _POOL]], tokens)
        for place in torch.randperm(len(found), generator=generator).tolist():
            yield found[place]


def _by_length(passages: Sequence[Passage], tokens: int) -> list[list[Passage]]:
    """Batches of passages of similar length."""
    found: list[list[Passage]] = []
    for one in sorted(passages, key=lambda one: len(one.tokens)):
        if found and len(one.tokens) * (len(found[-1]) + 1) <= tokens:
            found[-1].append(one)
        else:
            found.append([one])
    return found


@dataclass(frozen=True, slots=True)
class Acceptance:
    """How far a head's chains agree with the target on held-back passages, greedy and teacher forced.

    Attributes:
        accuracy: per depth, the share of the chains that agree there among those that agree at all depths before.
    """

    accuracy: tuple[float, ...]

    @property
    def length(self) -> float:
        """Tokens per step that follow: one, and what is accepted of a chain."""
        total, chance = 1.0, 1.0
        for share in self.accuracy:
            chance *= share
            total += chance
        return total


class Examination:
    """Held-back passages, read by the target once.

    Args:
        teacher: the target.
        passages: held back from the training.
        tokens: of a forward pass.

    Attributes:
        kinds: of the passages.
    """

    def __init__(self, teacher: Teacher, passages: Sequence[Passage], tokens: int) -> None:
        self.kinds = sorted({one.kind for one in passages})
        self._parts: list[tuple[str, tuple[Tensor, Tensor, Tensor], Tensor]] = []
        for kind in self.kinds:
            for group in _by_length([one for one in passages if one.kind == kind], tokens):
                batch = make_batch(group, 0.0)
                self._parts.append((kind, teacher.exam(batch), (batch.weights > 0).to(teacher.device)))

    @torch.no_grad()
    def take(self, head: Eagle3Head, unroll: int) -> dict[str, Acceptance]:
        """Acceptance of each kind of passage; of answers only where the head would draft, within the answer."""
        tried = {kind: [0] * unroll for kind in self.kinds}
        right = {kind: [0] * unroll for kind in self.kinds}
        for kind, (embeddings, features, best), counted in self._parts:
            agreed = counted[:, 1:]
            for number, states in enumerate(unrolled(head, embeddings, features, unroll)):
                count = states.shape[1]
                asked = agreed[:, :count] & counted[:, number + 1 :]
                agreed = asked & (head.targets[head.logits(states).argmax(-1)] == best[:, number + 1 :])
                tried[kind][number] += int(asked.sum())
                right[kind][number] += int(agreed.sum())
        return {
            kind: Acceptance(tuple(hit / max(1, count) for hit, count in zip(right[kind], tried[kind], strict=True)))
            for kind in self.kinds
        }


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training stands.

    Attributes:
        steps, seconds, tokens: done so far, over every run of it.
        loss: of the last steps, mean since the validation before, nats.
        acceptance: by kind of passage, of the last validation.
        best: highest validation acceptance so far, tokens per step.
    """

    steps: int
    seconds: float
    tokens: int
    loss: float
    acceptance: dict[str, Acceptance]
    best: float


def judged(acceptance: dict[str, Acceptance]) -> float:
    """The one number that heads are compared by: that on answers, or on text where there are none."""
    return acceptance["answers" if "answers" in acceptance else "text"].length


class Training:
    """The loop. Weights are trained in fp32 and run in the target's dtype.

    An interrupted training that goes on ends in the same weights as one without a break, unless the clock ends it.

    Args:
        head: fp32; trained in place.
        teacher: the target, for which the head proposes.
        passages: to train on.
        held: held back for validation.
        plan: how to train.
        state: file of the training state, written atomically at each validation.
        mark: what is trained on what; with the plan, a state of another one is refused.

    Raises:
        HeadError: ``state`` cannot be read or belongs to something else.
    """

    def __init__(
        self,
        head: Eagle3Head,
        teacher: Teacher,
        passages: Sequence[Passage],
        held: Sequence[Passage],
        plan: TrainingPlan,
        state: Path,
        mark: str,
    ) -> None:
        self.progress = Progress(0, 0.0, 0, math.nan, {}, 0.0)
        self._plan, self._teacher, self._passages, self._state = plan, teacher, passages, state
        limits = {"steps": None, "minutes": None, "validate_every": None}
        self._mark = f"{mark} {sorted((asdict(plan) | limits).items())}"
        self._weights: list[nn.Parameter] = list(head.parameters())
        self._head = copy.deepcopy(head).to(teacher.dtype)
        self._running: list[nn.Parameter] = list(self._head.parameters())
        self._optimizer = torch.optim.AdamW(self._weights, lr=plan.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        self._restore()
        self._held = held

    def run(
        self,
        advance: Callable[[Progress], None],
        validated: Callable[[Progress], None],
        keep: Callable[[Eagle3Head], None],
    ) -> Progress:
        """Train until the plan is done.

        Args:
            advance: called after each step.
            validated: called after each validation.
            keep: called with a head that is the best so far, in the target's dtype, after ``validated``.

        Returns:
            where it ended.
        """
        plan = self._plan
        if plan.done(self.progress.steps, self.progress.seconds) == 1.0:
            return self.progress
        exam = Examination(self._teacher, self._held, plan.batch_tokens)
        stream = islice(batches(self._passages, plan.batch_tokens, plan.seed), self.progress.steps, None)
        before, losses, begun = self.progress, [], time.monotonic()
        for group in stream:
            losses.append(self._step(group))
            now = self.progress
            self.progress = now = Progress(
                now.steps + 1,
                before.seconds + time.monotonic() - begun,
                now.tokens + sum(len(one.tokens) for one in group),
                losses[-1],
                now.acceptance,
                now.best,
            )
            ended = plan.done(now.steps, now.seconds) == 1.0
            if now.steps % plan.validate_every == 0 or ended:
                self._validate(exam, sum(losses) / len(losses), validated, keep)
                losses = []
            advance(self.progress)
            if ended:
                break
        return self.progress

    def _step(self, group: list[Passage]) -> float:
        """One optimizer step; its loss."""
        plan = self._plan
        lesson = self._teacher.teach(make_batch(group, plan.prompt_weight))
        steps = unrolled(self._head, lesson.embeddings, lesson.features, plan.unroll)
        loss = unrolled_loss(self._head, steps, lesson.labels, lesson.weights, plan.decay)
        loss.backward()  # type: ignore[no-untyped-call]
        for weight, running in zip(self._weights, self._running, strict=True):
            assert running.grad is not None
            weight.grad = running.grad.to(weight.dtype)
            running.grad = None
        torch.nn.utils.clip_grad_norm_(self._weights, plan.clip)
        for group_ in self._optimizer.param_groups:
            group_["lr"] = plan.rate(self.progress.steps, self.progress.seconds)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._copy()
        return loss.item()

    @torch.no_grad()
    def _copy(self) -> None:
        """The trained weights to the head that runs."""
        for weight, running in zip(self._weights, self._running, strict=True):
            running.copy_(weight)

    def _validate(
        self,
        exam: Examination,
        loss: float,
        validated: Callable[[Progress], None],
        keep: Callable[[Eagle3Head], None],
    ) -> None:
        now, acceptance = self.progress, exam.take(self._head, self._plan.unroll)
        better = judged(acceptance) > now.best
        best = max(now.best, judged(acceptance))
        self.progress = Progress(now.steps, now.seconds, now.tokens, loss, acceptance, best)
        validated(self.progress)
        if better:
            keep(self._head)
        self._store()

    def _store(self) -> None:
        path = self._state
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        saved = {
            "mark": self._mark,
            "progress": asdict(self.progress),
            "weights": [weight.detach() for weight in self._weights],
            "optimizer": self._optimizer.state_dict(),
        }
        try:
            torch.save(saved, scratch)
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)

    def _restore(self) -> None:
        if not self._state.is_file():
            return
        try:
            saved: dict[str, Any] = torch.load(self._state, weights_only=True, map_location="cpu")
        except Exception as error:
            raise HeadError(f"{self._state}: cannot be read ({type(error).__name__}), start over") from error
        if saved.get("mark") != self._mark:
            raise HeadError(f"{self._state}: was made for another target, other data or other settings, start over")
        with torch.no_grad():
            for weight, value in zip(self._weights, saved["weights"], strict=True):
                weight.copy_(value)
        self._optimizer.load_state_dict(saved["optimizer"])
        found = saved["progress"]
        found["acceptance"] = {kind: Acceptance(**value) for kind, value in found["acceptance"].items()}
        self.progress = Progress(**found)
        self._copy()
