"""Runs take turns: locks between processes, and what a run that waited or shared says of itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import exclusive

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from harness.exclusive import alone
with alone("cpu", sys.argv[1] == "alone", lambda: print("waiting", flush=True)):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(exclusive.FOLDER, str(tmp_path / "locks"))
    return tmp_path / "locks"


def hold(mode: str) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", HOLD, mode], cwd=ROOT, env=dict(os.environ), **pipes)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=60)


@pytest.mark.parametrize(("first", "second"), [("alone", "alone"), ("alone", "shared"), ("shared", "alone")])
def test_a_run_waits_for_one_that_it_must_not_meet(locks: Path, first: str, second: str) -> None:
    holder, other = hold(first), None
    try:
        assert said(holder) == "held"
        other = hold(second)
        assert said(other) == "waiting"
        end(holder)
        assert said(other) == "held"
    finally:
        for process in (holder, other):
            if process is not None and process.poll() is None:
                end(process)


def test_runs_that_share_run_side_by_side_and_a_kill_frees_the_machine(locks: Path) -> None:
    holders = [hold("shared"), hold("shared")]
    assert [said(process) for process in holders] == ["held", "held"]
    for process in holders:
        process.kill()
        process.wait()
    last = hold("alone")
    assert said(last) == "held"
    end(last)


def test_the_lock_file_may_be_locked_by_every_user_and_other_resources_are_free(locks: Path) -> None:
    waited: list[str] = []
    with exclusive.alone("cpu", True, lambda: waited.append("cpu")):
        assert (locks / "sparse-verification-cpu.lock").stat().st_mode & 0o777 == 0o666
        with exclusive.alone("gpu-1", True, lambda: waited.append("gpu")):
            pass
    with exclusive.alone("cpu", True, lambda: waited.append("cpu again")):
        pass
    assert waited == []
