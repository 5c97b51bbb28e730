"""The chosen setting as a file of conf/experiment."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import manual
from harness.evidence.labels import flatten
from harness.schema import DOCS, GROUPS

Composed = tuple[Mapping[str, Any], Mapping[str, str]]
"""A composed configuration, and the file that each group took."""

_ELSEWHERE = (
    *("task.source", "task.data_files", "task.limit", "task.offset", "model.device", "engine.threads", "track"),
    *("analysis", "seed", "results_dir", "rerun", "stale", "exclusive"),
)
"""Keys and groups that say where and on what a run is made, not how it verifies."""


def name_of(task: str, model: str) -> str:
    """tuned_<task>_<model>, in letters, digits and underscores."""
    return re.sub(r"\W+", "_", f"tuned_{task}_{model}").strip("_").lower()


def text(name: str, note: str, words: Sequence[str], compose: Callable[[Sequence[str]], Composed]) -> str:
    """The file: every choice and key that differs from conf/config.yaml, each line with its comment.

    A model in a folder of this machine is left out; the command line must name it again.

    Args:
        name: of the experiment.
        note: what it is and where it comes from, in lines of one comment.
        words: the setting as words of the command line, those that it was tuned with included.
        compose: words -> configuration and choices.
    """
    chosen, choices = compose(words)
    _, defaults = compose([])
    groups = [group for group in GROUPS if group not in _ELSEWHERE and choices[group] != defaults[group]]
    if Path(str((chosen["model"] or {}).get("path") or "")).is_absolute():
        groups = [group for group in groups if group != "model"]
    plain, _ = compose([f"{group}={choices[group]}" for group in groups])
    before = flatten(plain)
    changed: dict[str, Any] = {}
    for key, value in flatten(chosen).items():
        if key in before and before[key] != value and not _elsewhere(key, value):
            _put(changed, key.split("."), value)
    lines = ["# @package _global_", f"# python run.py experiment={name}", *(f"# {line}" for line in note.splitlines())]
    if groups:
        lines.append("defaults:  # choices that differ from conf/config.yaml")
        lines += [f"  - override /{group}: {choices[group]}  # {DOCS[group]}" for group in groups]
    return "\n".join([*lines, *([""] if changed else []), *manual.yaml_lines(changed)]) + "\n"


def _elsewhere(key: str, value: Any) -> bool:
    hub = key.startswith("task.hub.")
    path = isinstance(value, str) and Path(value).is_absolute()
    return hub or path or any(key == other or key.startswith(f"{other}.") for other in _ELSEWHERE)


def _put(content: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for name in path[:-1]:
        content = content.setdefault(name, {})
    content[path[-1]] = value
