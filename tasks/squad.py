"""SQuAD: a question on one paragraph, answered with words of it (Rajpurkar et al. 2016); F1 and exact match.

Rows of squad_v2 without an answer are graded too: an empty answer or "unanswerable" is right there.
"""

from collections.abc import Iterable

from tasks.base import Example, Prompt, TaskError
from tasks.common import BaseTask
from tasks.grading import cut_at_stop, squad_scores
from tasks.sources import Row, read_bundled, text_of, texts_of


class Squad(BaseTask):
    """Rows `id`, `title`, `context`, `question`, `answers{text}`, as in rajpurkar/squad."""

    name = "squad"
    metrics = ("f1", "em")
    bundled = "squad"
    fields = ("id", "title", "context", "question", "answers")
    plain_stop = ("\n",)
    chat_stop = ("\n",)

    def parse(self, row: Row) -> Iterable[Example]:
        fields = {"context": text_of(row, "context"), "question": text_of(row, "question")}
        yield Example(str(row["id"]), str(row["title"]), fields, _answers(row))

    def demonstrations(self) -> tuple[tuple[str, str], ...]:
        rows = read_bundled("squad_shots")
        return tuple((f"Text: {row['context']}\nQuestion: {row['question']}", row["answer"]) for row in rows)

    def prompt(self, example: Example) -> Prompt:
        return Prompt(
            instruction="Answer the question with a few words copied from the text.",
            shots=self.shots,
            before="Text: ",
            document=example.fields["context"],
            after=f"\nQuestion: {example.fields['question']}",
            cue="Answer:",
        )

    def grade(self, example: Example, text: str) -> dict[str, float]:
        return squad_scores(cut_at_stop(text, self.stop), example.references)


def _answers(row: Row) -> tuple[str, ...]:
    answers = row["answers"]
    if not hasattr(answers, "get"):
        raise TaskError("field 'answers': expected {text, answer_start}")
    return tuple(dict.fromkeys(texts_of(answers, "text")))
