"""math-verify behind a time limit that works in any thread.

math-verify limits its time with SIGALRM, which only the main thread can use. Here it runs in one child process that is
started at the first comparison and answers line by line. The child limits its own processor time for a comparison, so
that a busy machine does not change a grade, and reads until end of file: it outlives neither a stuck comparison nor a
killed parent. The parent adds a limit by the clock.
"""

import atexit
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import threading
from pathlib import Path

_START_SECONDS = 120.0
CLOCK_FACTOR = 4.0
"""Seconds by the clock allowed for each second of processor time."""


class Verifier:
    """One child process, started when needed and again after it was ended; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def equal(self, reference: str, answer: str, seconds: float) -> bool:
        """True if both texts are the same mathematical object.

        False also when `seconds` of processor time, or four times as many by the clock, were not enough.

        Raises:
            RuntimeError: when the child process cannot be started.
        """
        with self._lock:
            child = self._running()
            request = json.dumps({"reference": reference, "answer": answer, "seconds": seconds})
            reply = self._ask(child, request, seconds * CLOCK_FACTOR)
            if reply is None:
                self._end()
            return reply == "true"

    def close(self) -> None:
        """End the child process; a later comparison starts a new one."""
        with self._lock:
            self._end()

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._child is not None and self._owner == os.getpid() and self._child.poll() is None:
            return self._child
        self._end()
        if importlib.util.find_spec("math_verify") is None:
            raise RuntimeError("maths grading needs the package math-verify[antlr4-9-3]")
        command = [sys.executable, "-P", str(Path(__file__).with_name("verifier_child.py"))]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        self._owner = os.getpid()
        if _read_line(self._child, _START_SECONDS) != "ready":
            self._end()
            raise RuntimeError("maths grading: the process with math-verify did not start")
        return self._child

    @staticmethod
    def _ask(child: "subprocess.Popen[bytes]", request: str, seconds: float) -> str | None:
        assert child.stdin is not None
        try:
            child.stdin.write(request.encode() + b"\n")
        except BrokenPipeError:
            return None
        return _read_line(child, seconds)

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None or self._owner != os.getpid():
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()


def _read_line(child: "subprocess.Popen[bytes]", seconds: float) -> str | None:
    """The child's next line; None after `seconds` without one or when the child has ended."""
    assert child.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        if not selector.select(seconds):
            return None
    return child.stdout.readline().decode().strip() or None


VERIFIER = Verifier()
atexit.register(VERIFIER.close)
