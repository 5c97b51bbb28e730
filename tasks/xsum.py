"""XSum: one sentence that says what a news report is about (Narayan et al. 2018); ROUGE F-measures."""

from collections.abc import Iterable

from tasks.base import Example, Prompt
from tasks.common import BaseTask
from tasks.grading import ROUGE_METRICS, cut_at_stop, rouge
from tasks.sources import Row, read_bundled, text_of


class XSum(BaseTask):
    """Rows `document`, `summary`, `id`, as in EdinburghNLP/xsum."""

    name = "xsum"
    metrics = ROUGE_METRICS
    bundled = "xsum"
    fields = ("document", "summary", "id")
    plain_stop = ("\n",)
    chat_stop = ("\n\n",)

    def parse(self, row: Row) -> Iterable[Example]:
        identity = str(row["id"])
        yield Example(identity, identity, {"document": text_of(row, "document")}, (text_of(row, "summary"),))

    def demonstrations(self) -> tuple[tuple[str, str], ...]:
        return tuple((f"Report:\n{row['document']}", row["summary"]) for row in read_bundled("xsum_shots"))

    def prompt(self, example: Example) -> Prompt:
        return Prompt(
            instruction="Summarize the news report in one sentence that says who did what.",
            shots=self.shots,
            before="Report:\n",
            document=example.fields["document"],
            after="",
            cue="Summary:",
        )

    def grade(self, example: Example, text: str) -> dict[str, float]:
        return rouge(cut_at_stop(text, self.stop), example.references)
