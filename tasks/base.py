"""What a task is: examples to read, a prompt for each, and a grade for the answer.

A task knows neither the model nor the tokenizer. `tasks.prompting` turns its prompts into token ids.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

SOURCES = ("bundled", "files", "hub")
STYLES = ("chat", "plain")


class TaskError(ValueError):
    """Bad input to a task: one line that names the file or key, the value and a valid choice."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The parts of one prompt; only `document` may be shortened.

    The input text of the example is `before + document + after`. `shots` are pairs of an input text and an answer text,
    and `cue` ends a prompt in the plain style.
    """

    instruction: str
    shots: tuple[tuple[str, str], ...]
    before: str
    document: str
    after: str
    cue: str


@dataclass(frozen=True, slots=True)
class Example:
    """One graded item. `cluster` names the article or meeting where several examples share one, else it is the id."""

    id: str
    cluster: str
    fields: Mapping[str, Any]
    references: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HubSource:
    """A data set on the hub at a pinned revision."""

    path: str
    config: str | None
    split: str
    revision: str


@dataclass(frozen=True, slots=True)
class TaskSettings:
    """The part of a run's configuration that a task reads; `options` holds the keys that only one task has."""

    source: str
    data_files: tuple[str, ...]
    offset: int
    style: str
    shots: int
    stop: tuple[str, ...]
    seed: int
    hub: HubSource | None
    options: Mapping[str, Any]


class Task(Protocol):
    """What the harness uses of a task. `metrics[0]` is the primary metric; every metric is on the scale 0 to 100."""

    name: str
    metrics: tuple[str, ...]
    stop: tuple[str, ...]

    def examples(self) -> Iterator[Example]:
        """The examples from `settings.offset` on, in a fixed order, without a limit."""

    def prompt(self, example: Example) -> Prompt:
        """The prompt for one example."""

    def target(self, example: Example) -> str | None:
        """The answer that data and prompt ask for, as one text; None where there is none."""

    def grade(self, example: Example, text: str) -> dict[str, float]:
        """One value from 0 to 100 for each metric; text after a stop string does not count."""


def choose(key: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """Return `value` if it is one of `choices`; raise TaskError naming `task.<key>` otherwise."""
    if value not in choices:
        raise TaskError(f"task.{key}={value}: choose one of {', '.join(str(choice) for choice in choices)}")
    return value


def whole_number(options: Mapping[str, Any], key: str, default: int, least: int) -> int:
    """An option that is a whole number of at least `least`; raises TaskError naming `task.<key>` otherwise."""
    value = options.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise TaskError(f"task.{key}={value}: must be a whole number of {least} or more")
    return value


def content_id(*texts: str) -> str:
    """A short stable id for a row that has none."""
    return hashlib.sha256("\x1f".join(texts).encode()).hexdigest()[:12]
