"""run.py from the outside: exit codes, bad input, sweeps. A stub stands in for the runner, so nothing decodes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
STUB = '''
"""Python imports this at start: it puts a runner in place that only says what it was asked to run."""
import json
import sys
import types


class RunFailed(Exception):
    pass


def run(config, member):
    if config.seed == 3:
        raise KeyboardInterrupt
    if config.seed == 4:
        raise RuntimeError("a bug")
    if config.seed == 5:
        from tasks.base import TaskError
        raise TaskError("task.data_files=[x]: no such file")
    print(json.dumps({"task": config.task.name, "topk": config.attn.topk, "seed": config.seed}), flush=True)
    if config.seed == 1:
        raise RunFailed("the run failed as it was told to")
    return 1.0


RunFailed.__module__ = run.__module__ = "harness.runner"
def resolved(config):
    from harness.schema import to_dict
    return to_dict(config)


stub, build = types.ModuleType("harness.runner"), types.ModuleType("harness.build")
stub.RunFailed, stub.run, build.resolved = RunFailed, run, resolved
sys.modules |= {"harness.runner": stub, "harness.build": build}
'''


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "sitecustomize.py").write_text(STUB)
    (tmp_path / "cwd").mkdir()
    return tmp_path


def run(place: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(place / "stub")}
    command = [sys.executable, str(ROOT / "run.py"), *argv]
    return subprocess.run(command, cwd=place / "cwd", env=environment, capture_output=True, text=True, timeout=120)


def members(done: subprocess.CompletedProcess[str]) -> list[tuple[str, int, int]]:
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return [(line["task"], line["topk"], line["seed"]) for line in lines]


def test_a_run_ends_with_the_runners_line_and_leaves_no_clutter(place: Path) -> None:
    done = run(place, "task=squad", "attn.topk=8")
    assert (done.returncode, members(done), done.stderr) == (0, [("squad", 8, 0)], "")
    assert [path.name for path in (place / "cwd").rglob("*")] == ["results"]


def test_a_sweep_runs_every_combination(place: Path) -> None:
    done = run(place, "-m", "attn.topk=8,16", "task=xsum,squad")
    assert done.returncode == 0
    assert re.fullmatch(r"sweep xsum-squad-[0-9a-f]{8}: 4 missing of 4\n", done.stderr)
    assert members(done) == [("xsum", 8, 0), ("squad", 8, 0), ("xsum", 16, 0), ("squad", 16, 0)]
    assert {path.name for path in (place / "cwd" / "results").iterdir()} == {"hydra", "sweeps"}


def test_a_failing_member_does_not_stop_the_others(place: Path) -> None:
    done = run(place, "-m", "seed=1,0")
    assert done.returncode == 1 and len(members(done)) == 2
    assert "[seed=1] the run failed as it was told to" in done.stderr and "Traceback" not in done.stderr


def test_bad_input_found_by_one_member_is_exit_code_two(place: Path) -> None:
    done = run(place, "-m", "seed=5,0")
    assert done.returncode == 2 and len(members(done)) == 1
    assert "[seed=5] task.data_files=[x]" in done.stderr and "Traceback" not in done.stderr


def test_members_in_processes_of_their_own_report_the_same_way(place: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    done = run(place, "-m", "seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=1")
    assert done.returncode == 1 and "[seed=1]" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("seed", "code"), [("1", 1), ("3", 130), ("5", 2)])
def test_exit_codes_of_a_single_run(place: Path, seed: str, code: int) -> None:
    done = run(place, f"seed={seed}")
    assert done.returncode == code and len(done.stderr.splitlines()) == 1


def test_a_bug_keeps_its_traceback(place: Path) -> None:
    done = run(place, "seed=4")
    assert done.returncode == 1 and "RuntimeError: a bug" in done.stderr


BAD = [
    (["attn.topkk=3"], ["attn.topkk", "did you mean attn.topk?"]),
    (["attn=foo"], ["attn=foo", "block_topk, dense"]),
    (["attn=dense", "attn.topk=3"], ["attn.topk", "attn=block_topk"]),
    (["attn.topk=0"], ["attn.topk=0", "at least 1"]),
    (["attn.topk=a=b"], ["attn.topk=a=b", "key=value"]),
    (["task=xsum,squad"], ["task=xsum,squad", "-m"]),
    (["attn=dense"], ["arms=[ar,dense,sparse]", "arms=[ar,dense]"]),
    (["attn=null"], ["group", "attn=dense"]),
    (["+nothing=1"], ["nothing is not a key"]),
    (["-m", "attn.topk=8,0", "task=xsum,squad"], ["attn.topk=0", "at least 1"]),
    (["-m", "attn.topk=8,16", "experiment=none"], ["experiment=none", "smoke"]),
    (["results_dir=taken"], ["results_dir=taken", "cannot be written"]),
]


@pytest.mark.parametrize(("argv", "words"), BAD, ids=lambda value: " ".join(value))
def test_bad_input_is_one_line_and_nothing_runs(place: Path, argv: list[str], words: list[str]) -> None:
    (place / "cwd" / "taken").write_text("a file, not a folder")
    done = run(place, *argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and all(word in done.stderr for word in words), done.stderr


def test_the_composed_configuration_is_shown_with_comments(place: Path) -> None:
    done = run(place, "--cfg", "job", "task=math")
    assert done.returncode == 0 and yaml.safe_load(done.stdout)["task"]["name"] == "math"
    assert all("  # " in line for line in done.stdout.splitlines())


def test_help_needs_no_run(place: Path) -> None:
    done = run(place, "--help")
    assert done.returncode == 0 and "attn.topk=16  # " in done.stdout and "*block_topk" in done.stdout
