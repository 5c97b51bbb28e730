"""QMSum: a question on a long meeting, answered with a short summary (Zhong et al. 2021); ROUGE F-measures.

Questions on one meeting share a cluster.
"""

from collections.abc import Iterable
from itertools import islice

from tasks.base import Example, Prompt, TaskError, TaskSettings, whole_number
from tasks.common import BaseTask
from tasks.grading import ROUGE_METRICS, cut_at_stop, rouge
from tasks.sources import Row, read_bundled, text_of, texts_of


class QMSum(BaseTask):
    """Rows `_id`, `context`, `queries[{input, answers}]`; option `questions` (per meeting)."""

    name = "qmsum"
    metrics = ROUGE_METRICS
    bundled = "qmsum"
    fields = ("_id", "context", "queries")
    sources = ("bundled", "files")
    plain_stop = ("\n\n", "\nQuestion:")
    chat_stop = ("\n\n",)

    def __init__(self, settings: TaskSettings) -> None:
        self.questions = whole_number(settings.options, "questions", 2, 1)
        super().__init__(settings)

    def parse(self, row: Row) -> Iterable[Example]:
        meeting, queries = str(row["_id"]), row["queries"]
        if not isinstance(queries, list) or not all(hasattr(query, "get") for query in queries):
            raise TaskError("field 'queries': expected a list of {input, answers}")
        context = text_of(row, "context")
        for number, query in enumerate(islice(queries, self.questions)):
            answers = texts_of(query, "answers")
            if not answers:
                raise TaskError(f"query {number} has no answers, expected at least one")
            fields = {"context": context, "question": text_of(query, "input")}
            yield Example(f"{meeting}/{number}", meeting, fields, answers)

    def demonstrations(self) -> tuple[tuple[str, str], ...]:
        rows = read_bundled("qmsum_shots")
        return tuple((_input(row["context"], row["question"]), row["answer"]) for row in rows)

    def prompt(self, example: Example) -> Prompt:
        before, after = _input("\0", example.fields["question"]).split("\0")
        return Prompt(
            instruction="Read the transcript of a meeting and answer the question in a few sentences.",
            shots=self.shots,
            before=before,
            document=example.fields["context"],
            after=after,
            cue="Answer:",
        )

    def grade(self, example: Example, text: str) -> dict[str, float]:
        return rouge(cut_at_stop(text, self.stop), example.references)


def _input(context: str, question: str) -> str:
    return f"Transcript:\n{context}\nQuestion: {question}"
