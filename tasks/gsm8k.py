"""GSM8K: word problems with a whole number as answer (Cobbe et al. 2021); share of right final numbers."""

import re
from collections.abc import Iterable

from tasks.base import Example, Prompt, TaskError, content_id
from tasks.common import BaseTask
from tasks.grading import cut_at_stop, maths
from tasks.sources import Row, read_bundled, text_of

_CALCULATION = re.compile(r"<<[^>]*>>")


class Gsm8k(BaseTask):
    """Rows `question` and `answer` (a solution that ends in `#### number`), as in openai/gsm8k."""

    name = "gsm8k"
    metrics = ("accuracy",)
    bundled = "gsm8k"
    fields = ("question", "answer")
    plain_stop = ("\n\n", "\nQuestion:")
    chat_stop = ()

    def parse(self, row: Row) -> Iterable[Example]:
        question = text_of(row, "question")
        identity = f"gsm8k-{content_id(question)}"
        yield Example(identity, identity, {"question": question, "solution": _worked(row)}, (_number(row),))

    def demonstrations(self) -> tuple[tuple[str, str], ...]:
        return tuple((f"Question: {row['question']}", _worked(row)) for row in read_bundled("gsm8k_shots"))

    def prompt(self, example: Example) -> Prompt:
        return Prompt(
            instruction="Solve the problem step by step and end with the answer as a number.",
            shots=self.shots,
            before=f"Question: {example.fields['question']}",
            document="",
            after="",
            cue="Answer:",
        )

    def target(self, example: Example) -> str:
        """The worked solution with its number at the end."""
        return str(example.fields["solution"])

    def grade(self, example: Example, text: str) -> dict[str, float]:
        return {"accuracy": maths(cut_at_stop(text, self.stop), example.references[0])}


def _number(row: Row) -> str:
    _, mark, number = text_of(row, "answer").rpartition("####")
    if not mark or not number.strip():
        raise TaskError("field 'answer': expected a solution that ends in '#### number'")
    return number.strip()


def _worked(row: Row) -> str:
    """The solution without calculator marks, on one line, ending in a sentence with the number."""
    steps = _CALCULATION.sub("", text_of(row, "answer").rpartition("####")[0])
    return f"{' '.join(steps.split())} The answer is {_number(row)}."
