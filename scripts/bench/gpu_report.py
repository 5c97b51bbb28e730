"""What a GPU check has found so far, and how it is told when the call ends, is red, or runs out of time. No torch."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SPARE = 15.0
"""Seconds before the end of the call at which the last line is printed whatever still runs."""


def told(error: BaseException) -> str:
    """An exception in one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


class Deadline:
    """The time that a call may take; parts that no longer fit are left out with a note.

    Args:
        minutes: in all.
        started: value of ``time.monotonic()`` at the start; now by default.
        spare: seconds at the end that no part may use.
    """

    def __init__(self, minutes: float, started: float | None = None, spare: float = 0.0) -> None:
        self._end = (time.monotonic() if started is None else started) + 60 * minutes - spare
        self.skipped: list[str] = []

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def allows(self, what: str, seconds: float) -> bool:
        """Whether ``seconds`` are left; otherwise ``what`` is noted as left out."""
        if self.left() >= seconds:
            return True
        self.note(what, f"needs about {seconds:.0f} s, {max(0.0, self.left()):.0f} s are left")
        return False

    def note(self, what: str, why: str) -> None:
        """Say that ``what`` is left out."""
        self.skipped.append(f"{what}: {why}")
        print(f"left out: {what}: {why}", flush=True)


class Report:
    """Everything measured, and what went wrong. Safe to tell from another thread than the one that fills it.

    Args:
        deadline: whose notes of parts left out belong to it.
        file: where the last line is kept as well; None for nowhere.

    Attributes:
        red: names of kernels and architectures with a red check: none of their times may be shown.
        stops: called before the process is ended from outside: they end its children.
    """

    def __init__(self, deadline: Deadline, file: Path | None = None) -> None:
        self.deadline, self.red = deadline, set[str]()
        self.stops: list[Callable[[], object]] = []
        self._file, self._values = file, dict[str, Any]()
        self._problems: list[str] = []
        self._failed = self._told = False
        self._lock = threading.RLock()

    @property
    def problems(self) -> list[str]:
        """Red checks, and what could not be run."""
        return list(self._problems)

    def add(self, **values: Any) -> None:
        """Keep these for the last line."""
        with self._lock:
            self._values |= values

    def case(self, part: str, name: str, value: Any) -> None:
        """Keep the result of one case of ``part``, and print it as a JSON line of its own."""
        with self._lock:
            self._values.setdefault(part, {})[name] = value
            print(json.dumps({"partial": {part: {name: value}}}, separators=(",", ":")), flush=True)

    def fail(self, text: str, *suspects: str) -> None:
        """A red check; ``suspects`` are the kernels or architectures that it is about."""
        self._failed = True
        self.red.update(suspects)
        self.problem(f"RED: {text}")

    def problem(self, text: str) -> None:
        """Something that could not be run; the rest goes on."""
        with self._lock:
            self._problems.append(text)
        print(text, flush=True)

    def tell(self, stopped: bool = False) -> bool:
        """Print the last line, once.

        Args:
            stopped: whether parts were still running.

        Returns:
            Whether it was printed by this call.
        """
        with self._lock:
            if self._told:
                return False
            self._told = True
            incomplete = "stopped" if stopped else "incomplete" if self._problems else "ok"
            status = "failed" if self._failed else incomplete
            told = {"status": status, "problems": self._problems, **self._values, "left_out": self.deadline.skipped}
            line = json.dumps(told, separators=(",", ":"))
            if self._file is not None:
                self._keep(line)
            print(line, flush=True)
            return True

    def _keep(self, line: str) -> None:
        assert self._file is not None
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(line + "\n", encoding="utf-8")
        except OSError as error:
            print(f"{self._file}: cannot be written: {error}", flush=True)

    def stop(self) -> None:
        """End the process now, with what is known as its last line. Exit code 1."""
        for end in self.stops:
            end()
        if self.tell(stopped=True):
            os._exit(1)


def watchdog(report: Report, seconds: float) -> threading.Timer:
    """A running timer that ends the process after ``seconds``, with what is known by then; cancel it to keep on."""
    timer = threading.Timer(max(0.0, seconds), report.stop)
    timer.daemon = True
    timer.start()
    return timer
