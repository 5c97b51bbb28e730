"""Whole runs on random weights: what is stored, reused, resumed after kill -9, and refused."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import build, runner
from harness.engine.model import attention, compiled_step, shapes
from harness.evidence import provenance, tracking
from harness.schema import Config, ConfigError, resolve
from sparse import experts
from sparse.budget import FfnBudget, ReuseBudget
from sparse.ops.decoder_layer import native

SPARSE = f"block_attention.{'native' if native.available(torch.float32) else 'torch'}"
ROOT = Path(__file__).resolve().parents[2]
TINY = (
    *("model=shape", "model.arch=smollm2_135m", "model.layers=2", "model.dtype=float32", "track=none"),
    *("task.limit=3", "task.max_new_tokens=12", "engine.threads=1", "attn.topk=8", "engine.warmup=0"),
)
TINY_MOE = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
    "vocab_size": 320,
    "max_position_embeddings": 8192,
}
Compose = Callable[..., dict[str, Any]]


def route_as_usual(chances: Any, weights: Any, budget: Any, layer: int, tree: Any = None) -> Any:
    """What `restrict` would do if its budget had no effect."""
    combine = experts.route(chances, weights)
    pairs, union = int(combine.count_nonzero()), int(combine.any(0).sum())
    return combine, experts.Restriction(pairs, pairs, 0, 0, 0, 0, union, union)


@pytest.fixture
def configured(compose: Compose, tmp_path: Path) -> Callable[..., Config]:
    return lambda *more: resolve(compose(*TINY, f"results_dir={tmp_path}/results", *more))


def stored(config: Config) -> tuple[dict[str, Any], list[dict[str, Any]], Path]:
    (folder,) = (path for path in Path(config.results_dir, "runs").iterdir() if path.is_dir())
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return json.loads((folder / "summary.json").read_text()), lines, folder


def test_a_run_stores_what_the_contract_says(
    configured: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured("arms=[ar,dense,sparse,sparse_ar]")
    objective = runner.run(config)
    summary, records, folder = stored(config)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["status"] == summary["status"] == "ok" and line["fingerprint"] == folder.name
    assert objective == pytest.approx(line["speedup_vs_dense"], rel=1e-4) and objective is not None and objective > 0
    assert {path.name for path in folder.iterdir()} >= {"config.yaml", "provenance.json", "records.jsonl"}
    assert len(records) == 3 * 4 and summary["examples"] == 3
    by_arm = {arm: [row for row in records if row["arm"] == arm] for arm in config.arms}
    assert [row["output_ids"] for row in by_arm["ar"]] == [row["output_ids"] for row in by_arm["dense"]]
    assert summary["compare"]["fidelity"]["noise_floor"]["identical"] == 1
    assert summary["arms"]["sparse"]["density"]["attention"] < 0.5 < summary["arms"]["dense"]["density"]["attention"]
    assert summary["paths"][SPARSE] > 0 and summary["ceiling"]["sparse_vs_dense"] > 1
    assert all(row["paths"].get(SPARSE, 0) == 0 for row in by_arm["dense"])
    assert all(row["paths"][SPARSE] == 2 * row["steps"] for row in by_arm["sparse"])
    assert summary["arms"]["sparse_ar"]["acceptance_length"]["pooled"] == 1


def test_a_finished_run_is_taken_from_the_store(
    configured: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured("task.limit=1")
    first = runner.run(config)
    _, records, folder = stored(config)
    before = (folder / "records.jsonl").stat().st_mtime_ns

    def never(plan: Any) -> Any:
        raise AssertionError("the model was loaded again")

    with monkeypatch.context() as patched:
        patched.setattr(build, "load", never)
        assert runner.run(config) == first
    assert (folder / "records.jsonl").stat().st_mtime_ns == before
    runner.run(configured("task.limit=1", "rerun=true"))
    _, again, _ = stored(config)
    assert [row["output_ids"] for row in again] == [row["output_ids"] for row in records]
    assert (folder / "records.jsonl").stat().st_mtime_ns > before


class LostConnection:
    """A W&B run that takes nothing."""

    dir = "nowhere/files"

    def __getattr__(self, name: str) -> Any:
        raise OSError("connection lost")


def test_a_run_outlives_its_tracker(
    configured: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking.WandbTracker, "_open", lambda *_, **__: LostConnection())
    config = configured("task.limit=1", "track=wandb")
    assert runner.run(config) is not None
    told = capsys.readouterr()
    assert stored(config)[0]["status"] == json.loads(told.out.splitlines()[-1])["status"] == "ok"
    assert "W&B did not take the end of the run (connection lost); the run goes on" in told.err


def test_a_summary_is_stored_before_the_tracker_ends(
    configured: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(self: Any, summary: Any, records: Any = ()) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tracking.NullTracker, "finish", impatient)
    config = configured("task.limit=1")
    with pytest.raises(KeyboardInterrupt):
        runner.run(config)
    assert stored(config)[0]["status"] == "ok"


def test_a_missing_login_ends_before_the_old_run_is_lost(
    configured: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.run(configured("task.limit=1"))

    def refused(*_: Any, **__: Any) -> Any:
        raise tracking.TrackingError("W&B cannot start (no login); choose track=none")

    monkeypatch.setattr(tracking.WandbTracker, "_open", refused)
    monkeypatch.setattr(build, "load", refused)
    again = configured("task.limit=1", "track=wandb", "rerun=true")
    with pytest.raises(ConfigError, match="track=wandb: W&B cannot start"):
        runner.run(again)
    summary, records, _ = stored(again)
    assert summary["status"] == "ok" and len(records) == 3


def test_other_sources_make_a_stored_run_stale(
    configured: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured("task.limit=1")
    runner.run(config)
    _, _, folder = stored(config)
    before = (folder / "records.jsonl").stat().st_mtime_ns
    monkeypatch.setattr(provenance, "sources_hash", lambda *_: "0" * 16)
    runner.run(configured("task.limit=1", "stale=keep"))
    assert (folder / "records.jsonl").stat().st_mtime_ns == before
    runner.run(config)
    assert (folder / "records.jsonl").stat().st_mtime_ns > before


@pytest.mark.parametrize(
    "broken, overrides, counter",
    [
        ((attention, "known", lambda run, layer, row, start: (None, 0)), ("engine=eager",), "block_attention"),
        ((compiled_step, "known", lambda run, layer, row, start: (None, 0)), (), "block_attention"),
        ((FfnBudget, "applies", lambda *_: False), ("ffn=topk",), "sparse_ffn"),
        ((ReuseBudget, "retrieves", lambda *_: True), ("reuse=anchors",), "reuse.anchor"),
        ((ReuseBudget, "skips", lambda *_: False), ("reuse=skips", "reuse.skip_layers=[1]"), "reuse.skip_retrieval"),
        (
            (experts, "restrict", route_as_usual),
            ("model.arch=tiny_moe", "moe=union"),
            "experts.restricted",
        ),
    ],
    ids=["attention", "compiled", "ffn", "anchors", "skips", "experts"],
)
def test_a_mechanism_that_never_ran_makes_the_run_invalid(
    configured: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    broken: tuple[Any, str, Any],
    overrides: tuple[str, ...],
    counter: str,
) -> None:
    """Each mechanism is broken on purpose, so that it silently does nothing."""
    monkeypatch.setitem(shapes.SHAPES, "tiny_moe", TINY_MOE)
    config = configured("task.limit=1", *overrides)
    monkeypatch.setattr(*broken)
    with pytest.raises(runner.RunFailed, match="invalid"):
        runner.run(config)
    summary, _, _ = stored(config)
    assert summary["status"] == "invalid" and f"{counter} is switched on but never ran" in summary["reason"]
    assert not (summary["compare"].get("sparse_vs_dense") or {}).get("speedup")


def test_a_run_that_breaks_is_stored_with_its_reason_and_goes_on_later(
    configured: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured()
    real, calls = runner._wave, []

    def breaks_at_the_second(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the device\nwent away")
        return real(*arguments)

    monkeypatch.setattr(runner, "_wave", breaks_at_the_second)
    with pytest.raises(runner.RunFailed, match="the device went away"):
        runner.run(config)
    summary, records, _ = stored(config)
    assert summary["status"] == "failed" and summary["reason"] == "RuntimeError: the device went away"
    assert len(records) == 3
    monkeypatch.setattr(runner, "_wave", real)
    runner.run(config)
    summary, resumed, _ = stored(config)
    assert summary["status"] == "ok" and resumed[:3] == records and len(resumed) == 9


def command(results: Path, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "run.py"), *TINY, f"results_dir={results}", *more]


def test_kill_minus_nine_loses_at_most_the_example_in_flight(tmp_path: Path) -> None:
    size = ("task.limit=5", "task.max_new_tokens=12", "analysis=none")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = subprocess.Popen(command(killed, *size), cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        files = list(killed.glob("runs/*/records.jsonl"))
        if files and files[0].read_bytes().count(b"\n") >= 3:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = files[0].read_bytes()
    finished = before.count(b"\n") // 3 * 3
    assert 3 <= finished < 15, "the kill must come in the middle of the run"
    for place in (killed, whole):
        subprocess.run(command(place, *size), cwd=tmp_path, check=True, capture_output=True, timeout=200)
    after = files[0].read_bytes()
    assert after.splitlines()[:finished] == before.splitlines()[:finished]
    resumed, straight = (
        [json.loads(line) for line in next(place.glob("runs/*/records.jsonl")).read_text().splitlines()]
        for place in (killed, whole)
    )
    kept = ("example_id", "arm", "output_ids", "text", "grade", "histogram", "paths", "prompt_sha")
    assert [[row[key] for key in kept] for row in resumed] == [[row[key] for key in kept] for row in straight]


def bad_inputs(folder: Path) -> list[tuple[list[str], list[str]]]:
    """Overrides, and words that the one line must hold (DESIGN section 7)."""
    (folder / "weightless").mkdir()
    (folder / "weightless" / "config.json").write_text('{"model_type": "llama"}')
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text('{"document": "x", "summary"\n')
    (folder / "other.jsonl").write_text('{"question": "x", "answer": "y"}\n')
    files = "task.source=files"
    return [
        (["attn.tpk=8"], ["attn.tpk", "attn.topk"]),
        (["attn.topk=0"], ["attn.topk=0"]),
        (["attn.topk=100000"], ["attn.topk=100000", "blocks"]),
        (["attn=dense"], ["arms", "sparse"]),
        (["model=hf", f"model.path={folder}/weightless"], ["model.path", "weights"]),
        (["model=hf", f"model.path={folder}/absent"], ["model.path", "no such folder"]),
        (["model=shape", "model.arch=gpt9"], ["model.arch=gpt9", "llama_7b"]),
        (["model=shape", "model.arch=llama_13b", "model.dtype=float32"], ["memory", "model"]),
        (["task.max_prompt_tokens=9000"], ["task.max_prompt_tokens=9000", "8192"]),
        (["task.max_new_tokens=9000"], ["task.max_new_tokens=9000", "8192"]),
        ([files, f"task.data_files={folder}/absent.jsonl"], ["absent.jsonl"]),
        ([files, f"task.data_files={folder}/empty.jsonl"], ["empty.jsonl"]),
        ([files, f"task.data_files={folder}/broken.jsonl"], ["broken.jsonl"]),
        ([files, f"task.data_files={folder}/other.jsonl"], ["other.jsonl", "document"]),
        (["task.source=hub"], ["task.source=files"]),
        (["task.min_prompt_tokens=8000"], ["min_prompt_tokens"]),
        (["model=mixtral_8x7b", "model.path=some/mixtral"], ["model.path"]),
    ]


def test_bad_input_is_one_line_before_any_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line's own entry; in one process, because loading the libraries takes seconds."""

    def never(plan: Any) -> Any:
        raise AssertionError("weights were loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "load", never)
    for overrides, words in bad_inputs(tmp_path):
        argv = ["track=none", f"results_dir={tmp_path}/results", *overrides]
        monkeypatch.setattr(sys, "argv", ["run.py", *argv])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
        printed = capsys.readouterr()
        lines = printed.err.strip().splitlines()
        assert ended.value.code == 2, (overrides, printed.err)
        assert len(lines) == 1 and all(word in lines[0] for word in words), (overrides, printed.err)
        assert printed.out == "" and not list((tmp_path / "results").glob("runs/*/summary.json"))


def test_bad_input_ends_with_exit_code_two_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path / "results", "attn.topk=500"),
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "attn.topk=500" in done.stderr
