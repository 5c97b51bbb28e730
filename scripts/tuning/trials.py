"""One trial: an ordinary run of the harness, stored under its fingerprint and read back from its files."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from harness.evidence import Record, StoreError, fingerprint
from harness.evidence.store import read_json
from harness.runner import RunFailed, Watch
from harness.schema import Config, ConfigError
from scripts.tuning.measure import Estimate, Measure, Table
from scripts.tuning.pruning import Bar, watcher
from tasks.base import TaskError

State = Literal["measured", "pruned", "failed", "impossible", "repeated"]
COUNTED: tuple[State, ...] = ("measured", "pruned", "failed")
"""Outcomes of trials that cost time."""


class Run(Protocol):
    """harness.runner.run."""

    def __call__(self, config: Config, member: str = "", *, watch: Watch | None = None) -> float | None:
        """Run one configuration, or take it from the store."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial ended.

    Attributes:
        state: measured = all examples, pruned = stopped early, failed = stored as failed or invalid, impossible = the
            configuration was refused, repeated = an earlier trial of the study had the same one.
        words: the setting as words of the command line.
        fingerprint: of its run, "" where there is none.
        reason: why it is not measured, or the number of the trial that it repeats.
        examples: that were measured.
        speed, loss: over these examples; None where there are none.
        seconds: that the trial took.
    """

    state: State
    words: tuple[str, ...]
    fingerprint: str = ""
    reason: str = ""
    examples: int = 0
    speed: Estimate | None = None
    loss: Estimate | None = None
    seconds: float = 0.0

    def plain(self) -> dict[str, Any]:
        """As JSON keeps it; `of` is the inverse."""
        return asdict(self) | {
            "words": list(self.words),
            "speed": self.speed and self.speed.plain(),
            "loss": self.loss and self.loss.plain(),
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Outcome:
        """Read it back."""
        speed, loss = plain["speed"], plain["loss"]
        found = {"words": tuple(plain["words"]), "speed": speed and Estimate.of(speed)}
        return cls(**{**plain, **found, "loss": loss and Estimate.of(loss)})


@dataclass(frozen=True, slots=True)
class Bench:
    """Where trials run.

    Attributes:
        compose: words of the command line -> the checked configuration on the tuning examples.
        resolved: harness.build.resolved.
        run: harness.runner.run.
        measure: what is read from the records.
        examples: of a whole trial.
        results: the results folder.
    """

    compose: Callable[[Sequence[str]], Config]
    resolved: Callable[[Config], Mapping[str, Any]]
    run: Run
    measure: Measure
    examples: int
    results: Path

    def attempt(self, words: Sequence[str], bar: Bar | None, known: Mapping[str, int]) -> Outcome:
        """Run one setting.

        Args:
            words: the setting.
            bar: what it is held against, None where it must not be stopped.
            known: fingerprint -> number of an earlier trial of this study.

        Raises:
            ConfigError: the results folder cannot be used, or no setting can measure what is asked for.
        """
        start = time.monotonic()
        try:
            config = self.compose(words)
            name = fingerprint(self.resolved(config))
            if name in known:
                return Outcome("repeated", tuple(words), name, str(known[name]))
            watch = None if bar is None else watcher(self.measure, bar, self.examples)
            failure = self._run(config, watch)
        except (ConfigError, TaskError) as error:
            if isinstance(error.__cause__, StoreError):
                raise
            return Outcome("impossible", tuple(words), reason=" ".join(str(error).split()))
        found = self._read(tuple(words), name, failure)
        return replace(found, seconds=round(time.monotonic() - start, 3))

    def table(self, name: str) -> Table:
        """What a stored run measured; raises NotMeasured where it holds no loss."""
        file = self.results / "runs" / name / "records.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        table = self.measure.table([Record.from_json(json.loads(line)) for line in lines])
        return table.check(self.measure.loss)

    def _run(self, config: Config, watch: Watch | None) -> str:
        """Run without the run's own table on standard output; the reason where the run is failed or invalid."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.run(config, watch=watch)
        except RunFailed as error:
            return str(error)
        return ""

    def _read(self, words: tuple[str, ...], name: str, failure: str) -> Outcome:
        """The outcome of a run that ended."""
        summary = read_json(self.results / "runs" / name / "summary.json") or {}
        status, reason = str(summary.get("status")), str(summary.get("reason") or "")
        if failure or status not in ("ok", "partial"):
            return Outcome("failed", words, name, failure or f"run {name} is {status}")
        table = self.table(name)
        state: State = "measured" if status == "ok" else "pruned"
        return Outcome(state, words, name, reason, len(table), table.speed(), table.loss())
