"""What the tasks share: checked settings, stop strings, rows to examples, unique ids, the offset, demonstrations."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import islice

from tasks.base import SOURCES, STYLES, Example, Prompt, TaskError, TaskSettings, choose
from tasks.sources import Row, read_rows


class BaseTask(ABC):
    """A task over rows. A new one sets the class attributes and writes `parse`, `demonstrations`, `prompt`, `grade`.

    `bundled` is the stem of its file under tasks/data, `fields` are the names that each row must have. Each style has
    stop strings of its own, used where the settings give none.

    Raises:
        TaskError: for an unknown source or style, a negative offset, or more shots than there are demonstrations.
    """

    name: str
    metrics: tuple[str, ...]
    bundled: str
    fields: tuple[str, ...]
    sources: tuple[str, ...] = SOURCES
    plain_stop: tuple[str, ...] = ("\n\n",)
    chat_stop: tuple[str, ...] = ()

    def __init__(self, settings: TaskSettings) -> None:
        self.settings = settings
        choose("source", settings.source, self.sources)
        choose("style", settings.style, STYLES)
        if settings.offset < 0:
            raise TaskError(f"task.offset={settings.offset}: must be 0 or more")
        self.stop = settings.stop or (self.plain_stop if settings.style == "plain" else self.chat_stop)
        self.shots = self._take_shots(settings.shots)

    def _take_shots(self, count: int) -> tuple[tuple[str, str], ...]:
        available = self.demonstrations()
        if not 0 <= count <= len(available):
            raise TaskError(
                f"task.shots={count}: {self.name} has {len(available)} demonstrations, choose 0 to {len(available)}"
            )
        return available[:count]

    def examples(self) -> Iterator[Example]:
        """The examples from `settings.offset` on; an id that occurs again gets a number, so that each is unique."""
        return islice(self._unique(), self.settings.offset, None)

    def _unique(self) -> Iterator[Example]:
        seen: dict[str, int] = {}
        for example in self.read():
            count = seen[example.id] = seen.get(example.id, 0) + 1
            identity = example.id if count == 1 else f"{example.id}#{count}"
            yield Example(identity, example.cluster, example.fields, example.references)

    def read(self) -> Iterator[Example]:
        """All examples of the source, in a fixed order."""
        return read_rows(self.settings, self.bundled, self.fields, self.parse)

    @abstractmethod
    def parse(self, row: Row) -> Iterable[Example]:
        """The examples of one row; raises TaskError for a field of the wrong kind."""

    @abstractmethod
    def demonstrations(self) -> tuple[tuple[str, str], ...]:
        """Pairs of input text and answer text from data that is never graded."""

    @abstractmethod
    def prompt(self, example: Example) -> Prompt:
        """The prompt for one example."""

    def target(self, example: Example) -> str | None:
        """The first reference; a task whose answers have another form than its references says so itself."""
        return example.references[0] if example.references else None

    @abstractmethod
    def grade(self, example: Example, text: str) -> dict[str, float]:
        """One value from 0 to 100 for each of `metrics`."""
