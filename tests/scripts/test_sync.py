"""What is uploaded, what is left alone, and what is said where an upload fails; no network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.evidence import tracking, uploads
from scripts import sync, workspace

ROOT = Path(__file__).resolve().parents[2]
OLD, NEW, DONE, ONLINE = (
    "offline-run-20260101_000000-aaaa", "offline-run-20260102_000000-bbbb", "offline-run-20260103_000000-cccc",
    "run-20260104_000000-dddd",
)  # fmt: skip


@pytest.fixture
def results(tmp_path):
    for name in (NEW, OLD, DONE, ONLINE):
        folder = tmp_path / "results" / "wandb" / name
        folder.mkdir(parents=True)
        (folder / f"run-{name[-4:]}.wandb").write_bytes(b":W&B")
    (tmp_path / "results" / "wandb" / DONE / "run-cccc.wandb.synced").touch()
    (tmp_path / "results" / "wandb" / "offline-run-20260105_000000-empty").mkdir()
    return tmp_path / "results"


@pytest.fixture
def wandb_command(monkeypatch):
    """Stands for W&B's command: marks every run but OLD, and keeps what it was called with."""
    calls = []

    def run(command, *, env, timeout, **_):
        calls.append((command, env, timeout))
        folder = Path(command[-1])
        if folder.name == OLD:
            return subprocess.CompletedProcess(command, 0, "", "wandb: Syncing 1 run(s):\nwandb: ERROR 403 no right\n")
        if folder.name == ONLINE:
            raise subprocess.TimeoutExpired(command, timeout)
        next(folder.glob("*.wandb")).with_suffix(".wandb.synced").touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(uploads.subprocess, "run", run)
    monkeypatch.setattr(tracking, "require_login", lambda: None)
    return calls


def test_a_dry_run_names_what_is_missing_and_touches_nothing(results, capsys):
    before = sorted(results.rglob("*"))
    assert sync.main(["--results", str(results), "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"would upload {OLD}", f"would upload {NEW}"]
    assert sync.main(["--results", str(results), "--dry-run", "--all"]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == [OLD, NEW, DONE, ONLINE]
    assert sorted(results.rglob("*")) == before


def test_one_failed_upload_leaves_the_others_and_shows_in_the_exit_code(results, wandb_command, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    assert sync.main(["--results", str(results), "--timeout", "5"]) == 1
    assert capsys.readouterr().out.splitlines() == [f"failed {OLD}: ERROR 403 no right", f"uploaded {NEW}"]
    assert all("WANDB_MODE" not in env and timeout == 5 for _, env, timeout in wandb_command)
    assert {env["WANDB_DIR"] for _, env, _ in wandb_command} == {str(results)}
    assert sync.main(["--results", str(results), "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"would upload {OLD}"]


def test_everything_again_passes_over_the_marks(results, wandb_command, capsys):
    assert sync.main(["--results", str(results), "--all", "--timeout", "7"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"failed {ONLINE}: no end after 7 s")
    assert all({"--include-synced", "--include-online"} <= set(command) for command, _, _ in wandb_command)


def test_nothing_left_is_no_failure(results, wandb_command, capsys):
    for name in (OLD, NEW):
        next((results / "wandb" / name).glob("*.wandb")).with_suffix(".wandb.synced").touch()
    assert sync.main(["--results", str(results)]) == 0
    assert capsys.readouterr().out.startswith("nothing to upload") and wandb_command == []


def test_an_upload_that_is_not_marked_failed(results, monkeypatch):
    silent = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(uploads.subprocess, "run", lambda *_, **__: silent)
    assert uploads.upload(results / "wandb" / OLD, seconds=1) == "exit code 0, but W&B left no mark of an upload"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--results", "missing"], "--results=missing"), (["--timeout", "0"], "--timeout=0"), (["--report"], "tables")],
)
def test_bad_input_ends_with_one_line(arguments, named, results, wandb_command, capsys):
    options = ["--results", str(results), *arguments]
    assert sync.main(options) == 2
    told = capsys.readouterr()
    assert told.out == "" and named in told.err and len(told.err.splitlines()) == 1 and wandb_command == []


def test_without_a_login_one_line_says_so(results, tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    command = [sys.executable, "-m", "scripts.sync", "--results", str(results)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "W&B: not logged in; run `wandb login` or set WANDB_API_KEY\n"


def test_a_missing_library_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    assert workspace.main(["--project", "p", "--dry-run"]) == 2
    assert capsys.readouterr().err == 'wandb-workspaces is missing; install it: pip install -e ".[track]"\n'
