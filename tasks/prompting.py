"""From a task's prompts to token ids: chat or plain style, truncation in the middle of the document, a hash.

Demonstrations are earlier turns in the chat style and earlier blocks of text in the plain style. The chat template
renders its own special tokens; the plain style gets the tokens that the tokenizer puts in front of any text by default
(a BOS for Llama, nothing for SmolLM2) and never one at the end.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tasks.base import Example, Prompt, Task, TaskError, choose

_MARKER = "\ue000document\ue001"


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    def encode(self, text: str, /, *, add_special_tokens: bool = ...) -> list[int]:
        """Token ids of `text`."""

    def apply_chat_template(
        self, conversation: list[dict[str, str]], /, *, tokenize: bool, add_generation_prompt: bool
    ) -> Any:
        """The conversation as one text, with the start of the assistant's turn."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt ready to run: `ids` [prompt tokens], `sha` (sha256 of the ids, hex), document tokens left out.

    `target` holds the ids of the wanted answer as it would follow the prompt; empty where the task has none.
    """

    example: Example
    ids: tuple[int, ...]
    sha: str
    truncated_tokens: int
    target: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Layout:
    """The rendered text around the document, and the ids that come before any text."""

    lead: tuple[int, ...]
    head: str
    tail: str


def prepare(
    task: Task,
    tokenizer: Tokenizer,
    *,
    style: str,
    limit: int | None,
    min_prompt_tokens: int,
    max_prompt_tokens: int | None,
) -> list[Prepared]:
    """Render the task's examples until `limit` prompts are ready.

    Prompts under `min_prompt_tokens` (counted before truncation) are skipped. Prompts over `max_prompt_tokens` lose the
    middle of their document, never anything else.

    Raises:
        TaskError: when no prompt is left, when the text around a document does not fit alone, or when the style is
            chat and the tokenizer has no chat template.
    """
    choose("style", style, ("chat", "plain"))
    if limit is not None and limit < 1:
        raise TaskError(f"task.limit={limit}: must be 1 or more, or null for all examples")
    prepared: list[Prepared] = []
    seen = 0
    for example in task.examples():
        if limit is not None and len(prepared) >= limit:
            break
        seen += 1
        prompt = task.prompt(example)
        layout = _layout(prompt, tokenizer, style)
        whole = (*layout.lead, *_encode(tokenizer, layout.head + prompt.document + layout.tail))
        if len(whole) < min_prompt_tokens:
            continue
        ids, cut = whole, 0
        if max_prompt_tokens is not None and len(whole) > max_prompt_tokens:
            ids, cut = _shorten(layout, prompt.document, tokenizer, max_prompt_tokens, example.id)
        target = _target(task.target(example), tokenizer, style)
        prepared.append(Prepared(example, ids, hash_ids(ids), cut, target))
    if not prepared:
        raise TaskError(_nothing_left(task, seen, min_prompt_tokens))
    return prepared


def render(prompt: Prompt, tokenizer: Tokenizer, style: str) -> str:
    """The whole prompt as text, without truncation (special tokens of a chat template included)."""
    layout = _layout(prompt, tokenizer, style)
    return layout.head + prompt.document + layout.tail


def hash_ids(ids: Sequence[int]) -> str:
    """sha256 of the ids as decimal numbers with commas between, hex."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()


def _layout(prompt: Prompt, tokenizer: Tokenizer, style: str) -> _Layout:
    if style == "plain":
        return _plain_layout(prompt, tokenizer)
    if getattr(tokenizer, "chat_template", None) is None:
        raise TaskError("task.style=chat: the model's tokenizer has no chat template, choose task.style=plain")
    text = tokenizer.apply_chat_template(_conversation(prompt), tokenize=False, add_generation_prompt=True)
    head, marker, tail = text.partition(_MARKER)
    if not marker:
        raise TaskError("task.style=chat: the chat template drops the user's text, choose task.style=plain")
    return _Layout((), head, tail)


def _conversation(prompt: Prompt) -> list[dict[str, str]]:
    turns: list[dict[str, str]] = []
    for text, answer in prompt.shots:
        turns.append({"role": "user", "content": _join(prompt.instruction, text)})
        turns.append({"role": "assistant", "content": answer})
    question = prompt.before + _MARKER + prompt.after
    turns.append({"role": "user", "content": _join(prompt.instruction, question)})
    return turns


def _plain_layout(prompt: Prompt, tokenizer: Tokenizer) -> _Layout:
    blocks = [f"{text}\n{prompt.cue} {answer}" for text, answer in prompt.shots]
    head = "".join(f"{block}\n\n" for block in (prompt.instruction, *blocks) if block)
    bare, default = _encode(tokenizer, "a"), tuple(tokenizer.encode("a"))
    lead = next((default[:i] for i in range(len(default)) if default[i : i + len(bare)] == bare), ())
    return _Layout(lead, head + prompt.before, f"{prompt.after}\n{prompt.cue}")


def _join(instruction: str, text: str) -> str:
    return f"{instruction}\n\n{text}" if instruction else text


def _target(text: str | None, tokenizer: Tokenizer, style: str) -> tuple[int, ...]:
    """The wanted answer as it follows the prompt: at once after a chat template, after a space behind a cue."""
    answer = (text or "").strip()
    return _encode(tokenizer, answer if style == "chat" or not answer else f" {answer}")


def _encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False)) if text else ()


def _shorten(
    layout: _Layout, document: str, tokenizer: Tokenizer, limit: int, example_id: str
) -> tuple[tuple[int, ...], int]:
    """Keep the first and the last tokens of the document so that the prompt has at most `limit` tokens."""
    head = (*layout.lead, *_encode(tokenizer, layout.head))
    tail = _encode(tokenizer, layout.tail)
    body = _encode(tokenizer, document)
    room = limit - len(head) - len(tail)
    if room < 1 or not body:
        fixed = len(head) + len(tail)
        raise TaskError(
            f"task.max_prompt_tokens={limit}: example {example_id} needs {fixed} tokens for instruction, shots and "
            f"question alone, choose at least {fixed + (64 if body else 0)} or fewer task.shots"
        )
    keep = min(room, len(body))
    first = (keep + 1) // 2
    last = keep - first
    return head + body[:first] + body[len(body) - last :] + tail, len(body) - keep


def _nothing_left(task: Task, seen: int, least: int) -> str:
    if seen == 0:
        return f"task.offset: {task.name} has no examples from there on, choose a smaller offset"
    return f"task.min_prompt_tokens={least}: all {seen} examples of {task.name} are shorter, choose a smaller value"
