"""Passages that a draft head is trained on: windows of text, and prompts with the target's own greedy answers."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tasks
from harness.engine.decoding import Decoder, StopRule
from harness.engine.drafting.expansion import Growth
from harness.engine.drafting.lookup import LookupDrafter
from harness.engine.model.eagle3_teacher import Passage
from harness.engine.model.step import Step
from scripts import texts
from sparse.budget import Sparsity
from tasks.base import Example, Prompt, Task, TaskError, TaskSettings, content_id
from tasks.prompting import Prepared, prepare

_STYLES = {"squad": ("plain", 1), "xsum": ("chat", 0), "math": ("chat", 0), "gsm8k": ("chat", 0)}
"""Style and demonstrations of each task's prompts, those of its runs; of SQuAD's demonstrations one, for length."""
_FIELDS = {
    "squad": ("context", "question"),
    "math": ("problem",),
    "xsum": ("document",),
    "gsm8k": ("question",),
}
"""Fields by which a row shows its task; the first that fits wins."""
_OTHER = {"document": ("context", "text"), "question": ("problem",), "problem": ("question",)}
"""Fields that may stand in for one where the task is named."""
_TEXT = ("text", "document", "context", "content")
_SHORTEST = 32
"""Tokens of a window at least."""
_DRAFT = 3
"""Draft length and longest n-gram of the lookup that speeds the target's answers up."""


@dataclass(frozen=True, slots=True)
class PromptFile:
    """A file of prompts.

    Attributes:
        path: JSONL, plain or .gz.
        task: whose prompts its rows make; None to tell by each row's fields.
    """

    path: Path
    task: str | None

    @classmethod
    def named(cls, argument: str) -> PromptFile:
        """From FILE or TASK=FILE.

        Raises:
            ValueError: there is no such file or task; one line.
        """
        task, mark, name = argument.partition("=")
        if mark and task not in _FIELDS:
            raise ValueError(f"--prompts={argument}: there is no task {task} (valid: {', '.join(_FIELDS)})")
        path = Path(name if mark else argument)
        if not path.is_file():
            raise ValueError(f"--prompts={argument}: there is no such file")
        return cls(path, task if mark else None)


def text_files(arguments: Sequence[str]) -> list[Path]:
    """The files that the arguments name, those of a folder in the order of their names.

    Raises:
        ValueError: there is no such file, or a folder without any; one line.
    """
    found: list[Path] = []
    for name in arguments:
        path = Path(name)
        inside = sorted(file for file in path.glob("*") if file.is_file()) if path.is_dir() else [path]
        inside = [file for file in inside if path.is_file() or file.name.endswith((".txt", ".gz", ".jsonl"))]
        if not inside or not all(file.is_file() for file in inside):
            raise ValueError(f"--text={name}: there is no such file, or no .txt, .gz or .jsonl file in it")
        found += inside
    return found


def text_passages(files: Sequence[Path], tokenizer: Any, window: int) -> list[Passage]:
    """Windows of text one after another, each with the tokens that the tokenizer puts in front of any text.

    Args:
        files: .txt or .txt.gz with one text each, .jsonl or .jsonl.gz with one in a field of each row.
        tokenizer: of the target.
        window: tokens of a passage at most.

    Raises:
        ValueError: a file cannot be read or has no text; one line.
    """
    lead, found = tuple(tokenizer.encode("")), []
    for file in files:
        if file.name.endswith((".jsonl", ".jsonl.gz")):
            rows = [next((row[name] for name in _TEXT if isinstance(row.get(name), str)), "") for row in _rows(file)]
            documents = list(dict.fromkeys(filter(None, rows)))
        else:
            documents = [texts.read([str(file)]).content]
        if not documents:
            raise ValueError(f"--text={file}: no text in it (valid: a field named {', '.join(_TEXT)})")
        for document in documents:
            ids = tokenizer.encode(document, add_special_tokens=False)
            room = window - len(lead)
            parts = [(*lead, *ids[first : first + room]) for first in range(0, len(ids), room)]
            found += [Passage(part, len(part)) for part in parts if len(part) >= _SHORTEST]
    return found


def _rows(file: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of a JSONL file.

    Raises:
        ValueError: it is none; one line.
    """
    number = 0
    try:
        with (gzip.open if file.name.endswith(".gz") else open)(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                number += 1
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not an object")
                yield row
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{file}: line {number} cannot be read as a JSON object ({type(error).__name__})") from error


class _One:
    """A task with a single example, given by hand."""

    def __init__(self, task: Task, example: Example) -> None:
        self.name, self.metrics, self.stop = task.name, task.metrics, task.stop
        self._task, self._example = task, example

    def examples(self) -> Iterator[Example]:
        return iter((self._example,))

    def prompt(self, example: Example) -> Prompt:
        return self._task.prompt(example)

    def target(self, example: Example) -> None:
        """None: the target model's own answers are wanted."""

    def grade(self, example: Example, text: str) -> dict[str, float]:
        return self._task.grade(example, text)


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt that the target is to answer: its token ids, their hash, and the texts that end the answer."""

    ids: tuple[int, ...]
    sha: str
    stop: tuple[str, ...]


def questions(files: Sequence[PromptFile], tokenizer: Any, longest: int, limit: int | None) -> list[Question]:
    """Prompts as the tasks of the harness build them; a prompt that comes twice is kept once.

    Args:
        files: with rows that a task can ask about.
        tokenizer: of the target.
        longest: tokens of a prompt; documents lose their middle, longer prompts without one are left out.
        limit: prompts of each file at most.

    Raises:
        ValueError: a file gives none; one line.
    """
    made = {name: _task(name, tokenizer) for name in _FIELDS}
    found: dict[str, Question] = {}
    for file in files:
        before = len(found)
        for row in _rows(file.path):
            if limit is not None and len(found) - before >= limit:
                break
            ready = _ask(file, row, made, tokenizer, longest)
            if ready is not None:
                task, prepared = ready
                found.setdefault(prepared.sha, Question(prepared.ids, prepared.sha, task.stop))
        if len(found) == before:
            wanted = ", or ".join(" and ".join(names) for names in _FIELDS.values())
            raise ValueError(f"--prompts={file.path}: no row with {wanted} that fits into {longest} tokens")
    return list(found.values())


def _task(name: str, tokenizer: Any) -> Task:
    settings = TaskSettings("bundled", (), 0, _style(name, tokenizer), _STYLES[name][1], (), 0, None, {})
    return tasks.make(name, settings)


def _style(name: str, tokenizer: Any) -> str:
    """The style of a task's prompts; plain where the tokenizer has no chat template."""
    return _STYLES[name][0] if getattr(tokenizer, "chat_template", None) is not None else "plain"


def _ask(
    file: PromptFile, row: Mapping[str, Any], made: Mapping[str, Task], tokenizer: Any, longest: int
) -> tuple[Task, Prepared] | None:
    """The prompt of a row, if it makes one that is short enough."""
    name = file.task or next((name for name, keys in _FIELDS.items() if all(row.get(key) for key in keys)), None)
    if name is None:
        return None
    fields = {key: next((row[k] for k in (key, *_OTHER.get(key, ())) if row.get(k)), None) for key in _FIELDS[name]}
    if not all(isinstance(value, str) for value in fields.values()):
        return None
    identity, task, style = content_id(*map(str, fields.values())), made[name], _style(name, tokenizer)
    one = _One(task, Example(identity, identity, fields, ()))
    try:
        (ready,) = prepare(one, tokenizer, style=style, limit=1, min_prompt_tokens=0, max_prompt_tokens=longest)
    except TaskError:
        return None
    return task, ready


class Answers:
    """The target's greedy answers, kept in a file as they are found.

    Args:
        file: one JSON object a line; a torn last line, as a kill leaves it, is dropped.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, tuple[int, ...]] = {}
        if file.is_file():
            whole = file.read_bytes()
            kept = whole[: whole.rfind(b"\n") + 1]
            if len(kept) < len(whole):
                file.write_bytes(kept)
            for line in kept.splitlines():
                row = json.loads(line)
                self._known[row["prompt"]] = tuple(row["answer"])

    @classmethod
    def file_of(cls, folder: Path, settings: Mapping[str, Any]) -> Path:
        """Where answers under ``settings`` (target, number format, length) are kept, below ``folder``."""
        text = json.dumps(settings, sort_keys=True)
        return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"

    def missing(self, asked: Sequence[Question]) -> list[Question]:
        """Questions without an answer."""
        return [one for one in asked if self._key(one) not in self._known]

    def passages(self, asked: Sequence[Question]) -> list[Passage]:
        """Prompt and answer of each question that has one."""
        known = [(one, self._known[self._key(one)]) for one in asked if self._key(one) in self._known]
        return [Passage(one.ids + answer, len(one.ids)) for one, answer in known]

    def find(
        self,
        asked: Sequence[Question],
        step: Step,
        tokenizer: Any,
        ends: frozenset[int],
        new_tokens: int,
        batch: int,
        advance: Callable[[], None],
    ) -> None:
        """Decode what is missing and add it to the file, some batches at a time.

        Args:
            asked: all questions.
            step: of the target.
            tokenizer: for texts that end an answer.
            ends: tokens that end an answer.
            new_tokens: of an answer at most.
            batch: answers decoded together.
            advance: called after each new answer.
        """
        missing = self.missing(asked)
        longest = max((len(one.ids) for one in missing), default=0)
        budget, rows = Sparsity(), 2 * batch
        cache = step.new_cache(longest + new_tokens + _DRAFT + 1, budget.attention, rows)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        for stop in dict.fromkeys(one.stop for one in missing):
            rule = StopRule(ends, stop, tokenizer)
            decoder = Decoder(step, cache, stop=rule, clock=time.perf_counter, prefill_chunk=512, batch=batch)
            chosen = [one for one in missing if one.stop == stop]
            for first in range(0, len(chosen), rows):
                part = chosen[first : first + rows]
                prefixes = [decoder.prefill(one.ids, row) for row, one in enumerate(part)]
                drafters = [LookupDrafter(Growth(_DRAFT), _DRAFT) for _ in part]
                decoded = decoder.decode_all(prefixes, drafters, budget, new_tokens)
                self._add({self._key(one): tuple(result.output) for one, result in zip(part, decoded, strict=True)})
                for _ in part:
                    advance()

    def _add(self, found: Mapping[str, tuple[int, ...]]) -> None:
        lines = [json.dumps({"prompt": key, "answer": list(answer)}) + "\n" for key, answer in found.items()]
        with open(self._file, "a", encoding="utf-8") as out:
            out.write("".join(lines))
            out.flush()
            os.fsync(out.fileno())
        self._known.update(found)

    @staticmethod
    def _key(question: Question) -> str:
        return content_id(question.sha, *question.stop)


def vocabulary(passages: Sequence[Passage], size: int, whole: int, ends: frozenset[int]) -> list[int]:
    """The tokens that a head proposes: those that end a text, then the most frequent ones.

    Answers count as much as text and prompts together, whichever there is more of. Tokens that never occur come last,
    lower numbers first.

    Args:
        passages: all that the head is trained on.
        size: tokens to choose.
        whole: tokens of the target.
        ends: tokens that end a text.

    Returns:
        Token ids, ascending.
    """
    read, answered = Counter[int](), Counter[int]()
    for one in passages:
        read.update(one.tokens[: one.answer])
        answered.update(one.tokens[one.answer :])
    shares = dict.fromkeys(range(whole), 0.0)
    for counts in (read, answered):
        for token, count in counts.items():
            shares[token] += count / counts.total()
    order = sorted(range(whole), key=lambda token: (token not in ends, -shares[token], token))
    return sorted(order[:size])


def sha256(passages: Sequence[Passage]) -> str:
    """Hash of all tokens and of where answers begin, hex."""
    digest = hashlib.sha256()
    for one in passages:
        digest.update(f"{one.answer}:{','.join(map(str, one.tokens))};".encode())
    return digest.hexdigest()
