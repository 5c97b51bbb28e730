"""Runs take turns on a machine, so that none is timed while another uses its cores (METHOD section 8)."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FOLDER = "SPARSE_VERIFICATION_LOCKS"
"""Environment variable: folder of the locks, for machines on which the folder for temporary files is not shared."""


@contextmanager
def alone(resource: str, exclusive: bool, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold ``resource`` of this machine, alone or with others that share it.

    Args:
        resource: a short name, the same in every process of the machine.
        exclusive: alone; else together with others that are not exclusive.
        waiting: called once if another run must end first.
    """
    handle = _opened(Path(os.environ.get(FOLDER) or tempfile.gettempdir()) / f"sparse-verification-{resource}.lock")
    mode = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    try:
        try:
            fcntl.flock(handle, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, mode)
        yield
    finally:
        os.close(handle)


def _opened(file: Path) -> int:
    """A descriptor of the lock file, which all users of the machine may lock and nobody removes."""
    with suppress(FileNotFoundError):
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(file, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    with suppress(PermissionError):
        os.fchmod(handle, 0o666)
    return handle
