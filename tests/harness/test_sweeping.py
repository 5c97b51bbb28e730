"""What a sweep tells its members and refuses, without starting one."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness import build, cli, runner, sweeping
from harness.evidence import RunLocked, RunStore, sweeps
from harness.schema import Config, ConfigError, resolve

Compose = Callable[..., dict[str, Any]]
TINY = ("model=shape", "model.arch=smollm2_135m", "model.dtype=float32", "track=none")


@pytest.fixture(autouse=True)
def own_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sweeping, "_started", None)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.chdir(tmp_path)


def begin(compose: Compose, *typed: list[str], launcher: str = "basic", n_jobs: int | None = None) -> list[Config]:
    """Begin a sweep as run.py does, and take the members' environment over."""
    configs = [resolve(compose(*TINY, *(text for text in member if not text.startswith("+")))) for member in typed]
    choices = SimpleNamespace(choices={"hydra/launcher": launcher})
    override = sweeping.begin(typed, configs, SimpleNamespace(runtime=choices, launcher={"n_jobs": n_jobs}))
    os.environ[sweeping.VARIABLE] = override.split("=", 1)[1].strip("'")
    return configs


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sweeping.VARIABLE, "")


@pytest.mark.usefixtures("told")
def test_members_know_their_sweep(compose: Compose, tmp_path: Path) -> None:
    assert sweeping.current() is None and sweeping.command() == sweeping.sys.argv
    first, _ = begin(compose, ["attn.topk=8", "task=squad"], ["attn.topk=9", "task=squad"])
    (sweep,) = sweeps.load_sweeps(tmp_path / "results")
    assert sweeping.current().title == sweep.title and sweep.name == "squad"
    assert sweeping.arrive(first, 0) == "1/2 " and sweeping.arrive(first, None) == ""
    assert sweeping.command() == sweeping.sys.argv
    assert [member.overrides[0] for member in sweep.members] == ["attn.topk=8", "attn.topk=9"]


@pytest.mark.usefixtures("told")
def test_the_fingerprint_of_another_machine_is_kept(
    compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = begin(compose, ["attn.topk=8"], ["attn.topk=9"])
    monkeypatch.setattr(os, "getpid", lambda: 0)
    sweeping.arrive(second, 1)
    before = sweeps.load_sweeps(tmp_path / "results")[0].members
    monkeypatch.setattr(build, "thread_count", lambda _: 99)
    sweeping.arrive(first, 0)
    after = sweeps.load_sweeps(tmp_path / "results")[0].members
    assert before[0].fingerprint != after[0].fingerprint and before[1] == after[1]
    with RunStore("results", build.resolved(first), first.arms) as store:
        assert store.fingerprint == after[0].fingerprint


@pytest.mark.usefixtures("told")
def test_what_only_another_machine_has_is_left_to_it(compose: Compose, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.device"):
        begin(compose, ["model.device=cuda"])
    begin(compose, ["model.device=cuda"], launcher="submitit_slurm")
    assert sweeps.load_sweeps(tmp_path / "results")[0].members[0].fingerprint is None


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize(
    ("typed", "launcher", "words"),
    [
        ([["results_dir=a"], ["results_dir=b"]], "basic", "results_dir=a,b"),
        ([["exclusive=false"]], "joblib", r"engine\.threads=null"),
        ([["exclusive=false"]], "ray", r"engine\.threads=null"),
    ],
)
def test_sweeps_that_cannot_be_are_refused(compose: Compose, typed: Any, launcher: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        begin(compose, *typed, launcher=launcher)
    assert not list(Path().rglob("*.json"))


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize(
    ("launcher", "n_jobs", "exclusive", "noted"),
    [
        ("joblib", -1, "true", True),
        ("ray", None, "true", True),
        ("joblib", 1, "true", False),
        ("basic", None, "true", False),
        ("joblib", 2, "false", False),
    ],
)
def test_parallel_members_that_take_turns_are_noted_once(
    compose: Compose, capsys: pytest.CaptureFixture[str], launcher: str, n_jobs: int | None, exclusive: str, noted: bool
) -> None:
    typed = [[f"attn.topk={topk}", f"exclusive={exclusive}", "engine.threads=1"] for topk in (8, 9)]
    begin(compose, *typed, launcher=launcher, n_jobs=n_jobs)
    assert capsys.readouterr().err.count("members on one machine take turns") == noted


@pytest.mark.usefixtures("told")
def test_the_name_is_that_of_the_experiment_or_the_tasks(compose: Compose, tmp_path: Path) -> None:
    begin(compose, ["task=xsum"], ["task=squad"])
    begin(compose, ["+experiment=smoke"])
    assert {sweep.name for sweep in sweeps.load_sweeps(tmp_path / "results")} == {"xsum-squad", "smoke"}


@pytest.mark.usefixtures("told")
def test_a_dry_run_leaves_no_manifest(compose: Compose) -> None:
    begin(compose, ["attn.topk=8", "dry_run=true"], ["attn.topk=9", "dry_run=true"])
    assert sweeping.current() is None and sweeping.finish(0) == 0 and not list(Path().rglob("*.json"))


@pytest.mark.usefixtures("told")
def test_a_sweep_ends_with_its_own_last_line(
    compose: Compose, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Later calls in the same process start from a clean slate, also in what their workers find their modules by."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/elsewhere", str(sweeping.ROOT)]))
    for title in ("squad", "xsum"):
        begin(compose, [f"task={title}"])
        assert sweeping.finish(0) == 0 and f"sweep {title}" in capsys.readouterr().err
        assert sweeping.finish(0) == 0 and capsys.readouterr().err == ""
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(sweeping.ROOT), "/elsewhere"]


def test_a_held_member_is_left_to_its_process_and_a_held_run_is_bad_input(
    compose: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    config = resolve(compose(*TINY))
    with RunStore(config.results_dir, build.resolved(config), config.arms):
        with pytest.raises(RunLocked):
            runner.run(config)
        with cli.guard(3, ["attn.topk=8"]):
            runner.run(config)
        assert capsys.readouterr().err == "[attn.topk=8] is running in another process and left to it\n"
        with pytest.raises(SystemExit) as ended, cli.guard():
            runner.run(config)
    assert ended.value.code == 2 and "results_dir" in capsys.readouterr().err


@pytest.mark.usefixtures("told")
def test_a_worker_without_the_folder_says_so(
    compose: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    begin(compose, ["attn.topk=8"])
    os.chdir(tmp_path)
    (tmp_path / "gone").rename(tmp_path / "moved")
    (tmp_path / "gone").write_text("")
    with pytest.raises(SystemExit) as ended, cli.guard():
        sweeping.enter()
    assert ended.value.code == 2 and "is not on this machine" in capsys.readouterr().err
