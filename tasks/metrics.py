"""The gradings as `evaluate.Metric`s that need no hub: `load("rouge")`, `load("squad")`, `load("maths")`.

Each takes `predictions` (texts) and `references` (a list of texts for each prediction) and computes means, 0 to 100.
Importing this module imports `evaluate`, so the tasks themselves do not.
"""

from collections.abc import Callable, Sequence

import datasets
import evaluate

from tasks.base import TaskError
from tasks.grading import maths, rouge, squad_scores

_GRADINGS: dict[str, Callable[[str, Sequence[str]], dict[str, float]]] = {
    "rouge": rouge,
    "squad": squad_scores,
    "maths": lambda prediction, references: {"accuracy": max(maths(prediction, each) for each in references)},
}


class TaskMetric(evaluate.Metric):  # type: ignore[misc]
    """Mean of a grading over all predictions; the grading is chosen by `config_name`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=f"Mean of the task grading {self.config_name}, from 0 to 100.",
            citation="",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        """Mean for each score over the pairs of a prediction and its references."""
        grade = _GRADINGS[self.config_name]
        scores = [grade(text, wanted) for text, wanted in zip(predictions, references, strict=True)]
        return {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}


def load(name: str) -> TaskMetric:
    """The metric of that name, kept in memory; raises TaskError for an unknown one."""
    if name not in _GRADINGS:
        raise TaskError(f"metric {name!r}: choose one of {', '.join(_GRADINGS)}")
    return TaskMetric(config_name=name, keep_in_memory=True)
