"""Needle: a long document of generated prose with one ledger entry to find and to quote, after Kamradt (2023).

The prose comes from a seeded grammar, so a document of any length needs no data. Two other entries stand in the
document, to be told apart from the one asked for. Every example has a document of its own.
"""

import random
from collections.abc import Iterable, Iterator

from tasks.base import Example, Prompt, TaskError, TaskSettings, whole_number
from tasks.common import BaseTask
from tasks.grading import contains, cut_at_stop, word_f1
from tasks.prose import names, paragraph, record
from tasks.sources import Row

EXAMPLES = 128
"""Examples in one sequence; a run takes the first `task.limit` of them."""
TOKENS_PER_WORD = 1.21
"""Measured with the tokenizer of SmolLM2 on 100,000 words of the prose; other tokenizers come near."""
SHOT_WORDS = 90
ENTRIES = 3
_LEDGER = "Ledger entry:"


class Needle(BaseTask):
    """Options `context_tokens` (approximate length of the document) and `depth` (0 start to 1 end, null spreads it)."""

    name = "needle"
    metrics = ("accuracy", "f1")
    sources = ("bundled",)
    plain_stop = ("\n",)
    chat_stop = ()

    def __init__(self, settings: TaskSettings) -> None:
        self.context_tokens = whole_number(settings.options, "context_tokens", 6000, 200)
        self.depth = _depth(settings.options.get("depth"))
        super().__init__(settings)

    def read(self) -> Iterator[Example]:
        for index in range(EXAMPLES):
            depth = _spread(index) if self.depth is None else self.depth
            words = round(self.context_tokens / TOKENS_PER_WORD)
            text, name, entry, values = _document(f"{self.settings.seed}/{index}", words, depth)
            identity = f"needle-{self.settings.seed}-{self.context_tokens}-{index}"
            fields = {"document": text, "name": name, "depth": depth, "values": values}
            yield Example(identity, identity, fields, (entry,))

    def parse(self, row: Row) -> Iterable[Example]:
        raise TaskError("needle has no rows: its documents are generated")

    def demonstrations(self) -> tuple[tuple[str, str], ...]:
        return tuple(_shot(index) for index in range(4))

    def prompt(self, example: Example) -> Prompt:
        name = example.fields["name"]
        before, after = _input("\0", name).split("\0")
        return Prompt(
            instruction="Answer the question with the entry of the ledger, word for word.",
            shots=self.shots,
            before=before,
            document=example.fields["document"],
            after=after,
            cue="Answer:" if self.shots else f"{_LEDGER} {name} | goods:",
        )

    def grade(self, example: Example, text: str) -> dict[str, float]:
        """Accuracy: share of the entry's five values that are in the answer. F1: words shared with the entry."""
        answer, values = cut_at_stop(text, self.stop), example.fields["values"]
        return {
            "accuracy": sum(contains(answer, [value]) for value in values) / len(values),
            "f1": word_f1(answer, example.references[0]),
        }


def _depth(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise TaskError(f"task.depth={value}: must be from 0 (start) to 1 (end), or null for depths spread over both")
    return float(value)


def _spread(index: int) -> float:
    """Van der Corput sequence in base 2: the first n values lie evenly in 0..1 for every n."""
    depth, share = 0.0, 0.5
    while index:
        index, bit = divmod(index, 2)
        depth += share * bit
        share /= 2
    return depth


def _document(seed: str, words: int, depth: float) -> tuple[str, str, str, tuple[str, ...]]:
    """Text of about `words` words, and name, text and values of the entry at `depth`."""
    source = random.Random(f"needle/{seed}")
    people = names(source, ENTRIES)
    entry, values = record(source)
    lines = [f"{_LEDGER} {people[0]} | goods: {entry}"]
    lines += [f"{_LEDGER} {name} | goods: {record(source)[0]}" for name in people[1:]]
    paragraphs: list[str] = []
    missing = words - sum(len(line.split()) for line in lines)
    while missing > 0:
        paragraphs.append(paragraph(source))
        missing -= len(paragraphs[-1].split())
    place = round(depth * len(paragraphs))
    paragraphs.insert(place, lines[0])
    for line in lines[1:]:
        paragraphs.insert(source.randrange(len(paragraphs) + 1), line)
    return "\n".join(paragraphs), people[0], entry, values


def _shot(index: int) -> tuple[str, str]:
    text, name, entry, _ = _document(f"demonstration/{index}", SHOT_WORDS, (0.5, 0.0, 1.0, 0.5)[index])
    return _input(text, name), f"{_LEDGER} {name} | goods: {entry}"


def _input(document: str, name: str) -> str:
    return f"Text:\n{document}\nQuestion: What does the ledger say about {name}?"
