r"""MATH: problems with a boxed answer (Hendrycks et al. 2021); share of answers equal to the reference."""

from collections.abc import Iterable

from tasks.base import Example, Prompt, TaskError, content_id
from tasks.common import BaseTask
from tasks.grading import cut_at_stop, last_boxed, maths
from tasks.sources import Row, read_bundled, text_of


class Mathematics(BaseTask):
    r"""Rows `problem` and `answer`, or `solution` with a \boxed answer; `unique_id` where there is one."""

    name = "math"
    metrics = ("accuracy",)
    bundled = "math"
    fields = ("problem", "answer|solution")
    plain_stop = ("\n\n", "\nProblem:")
    chat_stop = ()

    def parse(self, row: Row) -> Iterable[Example]:
        problem = text_of(row, "problem")
        identity = str(row.get("unique_id") or f"math-{content_id(problem)}")
        fields = {"problem": problem, "solution": row.get("solution")}
        yield Example(identity, identity, fields, (_answer(row),))

    def demonstrations(self) -> tuple[tuple[str, str], ...]:
        return tuple((f"Problem: {row['problem']}", row["solution"]) for row in read_bundled("math_shots"))

    def prompt(self, example: Example) -> Prompt:
        return Prompt(
            instruction=r"Solve the problem step by step and end with the answer in \boxed{}.",
            shots=self.shots,
            before=f"Problem: {example.fields['problem']}",
            document="",
            after="",
            cue="Solution:",
        )

    def target(self, example: Example) -> str:
        """The worked solution, or the boxed answer where the data have no solution."""
        return str(example.fields["solution"] or rf"\boxed{{{example.references[0]}}}")

    def grade(self, example: Example, text: str) -> dict[str, float]:
        return {"accuracy": maths(cut_at_stop(text, self.stop), example.references[0])}


def _answer(row: Row) -> str:
    if row.get("answer") is not None:
        return text_of(row, "answer")
    boxed = last_boxed(text_of(row, "solution"))
    if boxed is None:
        raise TaskError(r"field 'solution': expected a \boxed{} answer in it, or a field 'answer'")
    return boxed
