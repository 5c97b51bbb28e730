"""Tasks: data, prompts and grading. Nothing here knows about models, decoding or sparsity."""

from tasks.base import (
    Example,
    HubSource,
    Prompt,
    Task,
    TaskError,
    TaskSettings,
)
from tasks.common import BaseTask
from tasks.gsm8k import Gsm8k
from tasks.mathematics import Mathematics
from tasks.needle import Needle
from tasks.qmsum import QMSum
from tasks.squad import Squad
from tasks.squad_long import SquadLong
from tasks.xsum import XSum

TASKS: dict[str, type[BaseTask]] = {
    task.name: task for task in (XSum, Squad, Mathematics, Gsm8k, SquadLong, Needle, QMSum)
}

__all__ = ["TASKS", "BaseTask", "Example", "HubSource", "Prompt", "Task", "TaskError", "TaskSettings", "make"]


def make(name: str, settings: TaskSettings) -> Task:
    """Build the task of that name; raises TaskError for an unknown name or bad settings."""
    if name not in TASKS:
        raise TaskError(f"task.name={name}: choose one of {', '.join(TASKS)}")
    return TASKS[name](settings)
