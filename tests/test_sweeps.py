"""Sweeps from the outside: kill -9, two processes on one folder, other launchers. A stand-in for the runner stores."""

import json
import random
from pathlib import Path

import pytest

from scripts import status
from tests.sweep_process import Sweep, check_complete, survives_two_kills

TWELVE = ("attn.topk=8,9,10,11", "task=xsum,squad,math", "task.limit=2", "track=none")
JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
RAY = ("hydra/launcher=ray", "++hydra.launcher.ray.init.address=local", "++hydra.launcher.ray.init.num_cpus=2")
SUBMITIT = ("hydra/launcher=submitit_local",)
TINY = (
    *("model=shape", "model.arch=smollm2_135m", "model.layers=2", "model.dtype=float32", "track=none"),
    *("task.limit=2", "task.max_new_tokens=8", "engine.threads=1", "engine.warmup=0"),
)


def launcher(*argv: str) -> tuple[str, ...]:
    """The launcher's overrides; skips the test where its plugin is not installed."""
    name = argv[0].rpartition("=")[2].removesuffix("_local") if argv else ""
    if name:
        pytest.importorskip(f"hydra_plugins.hydra_{name}_launcher")
        pytest.importorskip(name)
    return argv


def calm(folder: Path, *argv: str, **environment: str) -> Sweep:
    return Sweep(folder, *argv, RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", **environment)


def test_a_killed_sweep_is_completed_by_the_same_command(tmp_path: Path) -> None:
    sweep = calm(tmp_path, "attn.topk=8,9,10", "task.limit=2", "track=none", DECODE="0.1")
    sweep.kill_at(3, 0.05)
    before = sweep.stored()
    assert status.main(["--results", str(sweep.results)]) == 1
    code, _, err = sweep.run()
    assert code == 0 and err.splitlines()[-1].endswith(": 3 ok of 3")
    assert not sweep.kept[1] & set(sweep.appended(2))
    check_complete(sweep, 3, 2, before)
    assert status.main(["--results", str(sweep.results)]) == 0
    (file,) = sweep.results.glob("sweeps/*.json")
    manifest = json.loads(file.read_text())
    assert {member["fingerprint"] for member in manifest["members"]} == set(sweep.stored())
    assert manifest["command"].startswith("python run.py -m attn.topk=8,9,10") and file.stem.startswith("xsum-")


def test_two_processes_share_a_sweep(tmp_path: Path) -> None:
    sweep = calm(tmp_path, "attn.topk=8,9,10", "task.limit=2", "track=none", DECODE="1")
    first, second = sweep.start(), sweep.start()
    codes = [process.wait(200) for process in (first, second)]
    told = [sweep.printed("err", call) for call in (1, 2)]
    assert codes == [0, 0], told
    appended = sweep.appended(1) + sweep.appended(2)
    assert len(appended) == len(set(appended)) == 6 and sweep.appended(1) and sweep.appended(2)
    assert any("is running in another process and left to it" in text for text in told)
    assert any(text.splitlines()[-1].endswith(": 3 ok of 3") for text in told)
    check_complete(sweep, 3, 2, {})


@pytest.mark.slow
@pytest.mark.parametrize("argv", [(), JOBLIB, RAY], ids=["basic", "joblib", "ray"])
def test_a_sweep_killed_twice_is_completed_by_the_third_call(tmp_path: Path, argv: tuple[str, ...]) -> None:
    sweep = calm(tmp_path, *TWELVE, *launcher(*argv), DECODE="0.1")
    err = survives_two_kills(sweep, 12, 2, random.Random(1))
    assert any(line.endswith(": 12 ok of 12") for line in err.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("argv", [JOBLIB, RAY], ids=["joblib", "ray"])
def test_workers_whose_parent_was_killed_keep_their_runs(tmp_path: Path, argv: tuple[str, ...]) -> None:
    sweep = calm(tmp_path, *TWELVE, *launcher(*argv), DECODE="0.5")
    sweep.kill_at(3, 0.1, workers=False)
    before = sweep.stored()
    code, _, err = sweep.run()
    assert code == 0, err
    sweep.settle()
    assert sweep.run()[0] == 0
    assert not sweep.kept[1] & set(sweep.appended(2) + sweep.appended(3))
    check_complete(sweep, 12, 2, before)


@pytest.mark.slow
@pytest.mark.parametrize("argv", [JOBLIB, SUBMITIT, RAY], ids=["joblib", "submitit", "ray"])
def test_failures_in_workers_are_told_and_counted(tmp_path: Path, argv: tuple[str, ...]) -> None:
    sweep = calm(tmp_path, "seed=0,1,5", "task.limit=1", "track=none", *launcher(*argv))
    code, _, err = sweep.run()
    told = [line for line in err.splitlines() if line.startswith("[") or line.startswith("sweep")]
    assert code == 1 and "Traceback" not in err
    assert sum(line.startswith("[seed=1 ") and line.endswith("is failed: as it was told to") for line in told) == 1
    assert sum(line.startswith("[seed=5 ") and "task.data_files=[x]: no such file" in line for line in told) == 1
    assert any(line.endswith(": 1 ok, 1 failed, 1 missing of 3") for line in told)
    stored = [json.loads(file.read_text())["argv"] for file in sweep.results.glob("runs/*/provenance.json")]
    assert len(stored) == 2 and all(argv[0].endswith("run.py") and "seed=0,1,5" in argv for argv in stored)


def outputs(results: Path) -> dict[tuple[str, str, str], list[int]]:
    rows = {}
    for file in results.glob("runs/*/records.jsonl"):
        for row in map(json.loads, file.read_text().splitlines()):
            rows[file.parent.name, row["example_id"], row["arm"]] = row["output_ids"]
    return rows


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], list[int]]:
    """What members store, one after the other in one process."""
    sweep = calm(tmp_path_factory.mktemp("straight"), *TINY, "attn.topk=8,9", REAL="1")
    assert sweep.run()[0] == 0
    return outputs(sweep.results)


@pytest.mark.slow
@pytest.mark.parametrize("argv", [JOBLIB, SUBMITIT, RAY], ids=["joblib", "submitit", "ray"])
def test_every_launcher_stores_the_same(
    tmp_path: Path, argv: tuple[str, ...], straight: dict[tuple[str, str, str], list[int]]
) -> None:
    sweep = calm(tmp_path, *TINY, "attn.topk=8,9", *launcher(*argv), REAL="1")
    code, _, err = sweep.run()
    assert code == 0, err
    assert len(straight) == 12 and outputs(sweep.results) == straight
    (file,) = sweep.results.glob("runs/*/provenance.json".replace("*", next(iter(straight))[0]))
    assert "attn.topk=8,9" in json.loads(file.read_text())["argv"]


@pytest.mark.slow
def test_twelve_real_runs_survive_two_kills(tmp_path: Path) -> None:
    sweep = calm(tmp_path, *TINY, "attn.topk=5,6,7,8", "task=xsum,squad,math", REAL="1")
    survives_two_kills(sweep, 12, 2, random.Random(3))
