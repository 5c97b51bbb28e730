import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from harness.evidence import RunLocked, RunStore, StoreError, fingerprint, load_runs
from harness.evidence.rows import write_overview
from harness.evidence.store import is_held, read_json, write_text
from tests.evidence_samples import ARMS, config, example, proof, record, stored_run

ROOT = Path(__file__).resolve().parents[2]


def reopened(results, settings=None):
    with RunStore(results, settings or config(), ARMS) as store:
        return store.records()


def begun(results, sources="abc", settings=None, **options):
    """What `begin` decides for one more call of the program."""
    with RunStore(results, settings or config(), ARMS) as store:
        return store.begin(proof(sources), **options)


def interrupted(results, count=2):
    with RunStore(results, config(), ARMS) as store:
        store.begin(proof())
        for index in range(count):
            store.append(example(f"e{index}"))
    return store.path


def test_the_fingerprint_ignores_what_changes_no_result():
    base = config()
    other = config() | {"track": {"name": "wandb_offline"}, "results_dir": "/elsewhere", "rerun": True, "stale": "keep"}
    assert fingerprint(base) == fingerprint(other)
    assert len(fingerprint(base)) == 16 and int(fingerprint(base), 16) >= 0


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"arms": ["ar"]}, {"attn": {"name": "dense"}}, {"engine": {"threads": 1}}]
)
def test_the_fingerprint_follows_everything_else(change):
    assert fingerprint(config() | change) != fingerprint(config())


def test_the_fingerprint_follows_contents_of_data_files_and_not_their_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder in ("a", "b"):
        (tmp_path / folder / "x.jsonl").write_text("{}\n")
    prints = [fingerprint(config(data_files=[str(tmp_path / folder / "x.jsonl")])) for folder in ("a", "b")]
    (tmp_path / "b" / "x.jsonl").write_text('{"edited": 1}\n')
    prints.append(fingerprint(config(data_files=[str(tmp_path / "b" / "x.jsonl")])))
    assert prints[0] == prints[1] != prints[2]


def test_a_stored_configuration_has_the_fingerprint_of_its_folder(tmp_path):
    (tmp_path / "x.jsonl").write_text("{}\n")
    stored_run(tmp_path / "results", config(source="files", data_files=[str(tmp_path / "x.jsonl")]))
    (run,) = load_runs(tmp_path / "results")
    assert fingerprint(run.config) == run.fingerprint == run.summary["fingerprint"]
    assert run.config["task"]["data_files"] == ["x.jsonl"]


def test_a_run_leaves_the_four_files(tmp_path):
    store = stored_run(tmp_path, examples=3)
    assert {"config.yaml", "provenance.json", "records.jsonl", "summary.json"} <= set(os.listdir(store.path))
    assert store.path == tmp_path / "runs" / store.fingerprint
    assert yaml.safe_load((store.path / "config.yaml").read_text())["attn"]["topk"] == 16
    lines = [json.loads(line) for line in (store.path / "records.jsonl").read_text().splitlines()]
    assert [(row["example_id"], row["arm"]) for row in lines[:4]] == [
        ("e0", "ar"),
        ("e0", "dense"),
        ("e0", "sparse"),
        ("e1", "ar"),
    ]


def test_a_finished_run_is_reused_unless_rerun(tmp_path):
    stored_run(tmp_path)
    assert begun(tmp_path) == "reuse"
    assert len(reopened(tmp_path)) == 18
    assert begun(tmp_path, rerun=True) == "start"
    assert reopened(tmp_path) == []


def test_an_interrupted_run_resumes_with_what_is_complete(tmp_path):
    interrupted(tmp_path)
    with RunStore(tmp_path, config(), ARMS) as store:
        assert store.state("abc") == "interrupted"
        assert store.begin(proof()) == "resume"
        assert store.done() == {"e0", "e1"}


@pytest.mark.parametrize("cut", [1, 40, 900])
def test_a_torn_tail_is_cut_back_to_the_last_whole_example(tmp_path, cut):
    file = interrupted(tmp_path, 3) / "records.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[:-cut])
    kept = reopened(tmp_path)
    assert kept == [row for index in range(2) for row in example(f"e{index}")]
    assert content.startswith(file.read_bytes()) and file.read_bytes().endswith(b"}\n")
    with RunStore(tmp_path, config(), ARMS) as store:
        store.append(example("e2"))
    assert file.read_bytes() == content


@pytest.mark.parametrize("tail", [b"\0" * 100, b'{"example_id": "e9"}\n', b"[1]\n", b"\xff\n", b"null\n"])
def test_a_damaged_tail_is_cut(tmp_path, tail):
    file = interrupted(tmp_path) / "records.jsonl"
    content = file.read_bytes()
    file.write_bytes(content + tail)
    assert len(reopened(tmp_path)) == 6
    assert file.read_bytes() == content


def test_an_example_is_stored_whole_once_and_without_nan(tmp_path):
    with RunStore(tmp_path, config(), ARMS) as store:
        store.begin(proof())
        with pytest.raises(ValueError, match="one whole example"):
            store.append(example("e0")[:2])
        with pytest.raises(ValueError, match="one whole example"):
            store.append([*example("e0")[:2], record("e1", "sparse")])
        with pytest.raises(ValueError, match="JSON"):
            store.append([record("e0", arm, seconds=float("nan")) for arm in ARMS])
        store.append(example("e0"))
        with pytest.raises(ValueError, match="one whole example"):
            store.append([*example("e1"), *example("e2")[:2]])
        with pytest.raises(ValueError, match="stored already"):
            store.append(example("e0"))
        with pytest.raises(ValueError, match="one whole example"):
            store.append([*example("e1"), *example("e2")[:2]])
        with pytest.raises(ValueError, match="stored already"):
            store.append([*example("e1"), *example("e2"), *example("e1")])
    assert len(reopened(tmp_path)) == 3


def test_the_examples_of_a_wave_are_stored_together_and_kept_one_by_one(tmp_path):
    with RunStore(tmp_path, config(), ARMS) as store:
        store.begin(proof())
        store.append([row for index in range(3) for row in example(f"e{index}")])
    file = store.path / "records.jsonl"
    file.write_bytes(file.read_bytes()[:-30])
    assert reopened(tmp_path) == [row for index in range(2) for row in example(f"e{index}")]


def test_other_sources_make_a_run_stale(tmp_path):
    stored_run(tmp_path)
    with RunStore(tmp_path, config(), ARMS) as store:
        assert (store.state("abc"), store.state("new")) == ("finished", "stale")
    assert load_runs(tmp_path)[0].stale("new") and not load_runs(tmp_path)[0].stale("abc")
    assert begun(tmp_path, "new", stale="keep") == "reuse"
    assert begun(tmp_path, "new") == "start"
    assert reopened(tmp_path) == []


def test_an_unfinished_run_never_mixes_programs_or_machines(tmp_path):
    interrupted(tmp_path)
    assert begun(tmp_path, "new", stale="keep") == "start"
    interrupted(tmp_path)
    with RunStore(tmp_path, config(), ARMS) as store:
        assert store.begin(proof(threads=1)) == "start"


def test_a_failed_run_is_stored_with_its_reason_and_tried_again(tmp_path):
    store = stored_run(tmp_path, examples=2, status="failed", reason="attn.topk=0 is not positive")
    assert store.summary()["reason"] == "attn.topk=0 is not positive"
    assert store.state("abc") == "failed"
    assert begun(tmp_path) == "resume"
    assert store.summary() is None


def test_states_of_new_and_partial_runs(tmp_path):
    with RunStore(tmp_path, config(), ARMS) as store:
        assert store.state("abc") == "new"
    stored_run(tmp_path, status="partial", reason="stopped by the user")
    assert store.state("abc") == "interrupted"


def test_a_resumed_run_keeps_its_first_start(tmp_path):
    path = interrupted(tmp_path)
    write_text(path / "provenance.json", json.dumps(proof(start="2020-01-01T00:00:00+00:00")))
    with RunStore(tmp_path, config(), ARMS) as store:
        store.begin(proof())
        store.finish({"status": "ok"}, proof(end="later"))
    assert read_json(path / "provenance.json")["start"].startswith("2020")
    assert read_json(path / "provenance.json")["end"] == "later"


def test_two_processes_cannot_hold_one_run(tmp_path):
    with RunStore(tmp_path, config(), ARMS) as store:
        with pytest.raises(RunLocked, match=f"run {store.fingerprint} is in use"), RunStore(tmp_path, config(), ARMS):
            pass
        with RunStore(tmp_path, config(topk=8), ARMS):
            pass
    with RunStore(tmp_path, config(), ARMS):
        pass


def test_a_lock_that_is_only_looked_at_keeps_nobody_out(tmp_path):
    with RunStore(tmp_path, config(), ARMS) as store:
        assert is_held(store.path)
    with (store.path / "lock").open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        assert not is_held(store.path)
        threading.Timer(0.15, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
        with RunStore(tmp_path, config(), ARMS):
            assert is_held(store.path)
    assert not is_held(tmp_path / "absent") and not (tmp_path / "absent").exists()


@pytest.mark.parametrize("cut", ["summary.json", "records.jsonl", "config.yaml"])
def test_a_rerun_that_is_killed_as_it_begins_starts_afresh(tmp_path, monkeypatch, cut):
    stored_run(tmp_path)

    def killed(file, *_, **__):
        if file.name == cut:
            raise KeyboardInterrupt
        real(file, missing_ok=True)

    real = Path.unlink
    monkeypatch.setattr(Path, "unlink", killed)
    monkeypatch.setattr("harness.evidence.store.write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        begun(tmp_path, rerun=True)
    monkeypatch.undo()
    assert begun(tmp_path) == "start"
    assert reopened(tmp_path) == []


def test_what_killed_writers_left_is_removed(tmp_path, monkeypatch):
    path = interrupted(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        patched.setattr(Path, "unlink", lambda *_, **__: None)
        for file in (path / "summary.json", tmp_path / "summary.csv", tmp_path / "other.csv"):
            with pytest.raises(OSError, match="killed"):
                write_text(file, "half")
    assert len(list(path.glob(".summary.json.*"))) == 1
    assert len(reopened(tmp_path)) == 6 and not list(path.glob(".summary*"))
    write_overview(tmp_path, sources="abc")
    assert not list(tmp_path.glob(".summary.csv*")) and list(tmp_path.glob(".other.csv*"))


WRITER = """
import sys
from tests.evidence_samples import ARMS, config, example, proof
from harness.evidence import RunStore
with RunStore(sys.argv[1], config(), ARMS) as store:
    store.begin(proof())
    for index in range(100000):
        if f"e{index}" not in store.done():
            store.append(example(f"e{index}"))
            print(index, flush=True)
"""


def test_kill_9_loses_at_most_the_example_in_flight(tmp_path):
    said = 0
    for _ in range(2):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3):
            assert child.stdout.readline()
        time.sleep(0.05)
        child.send_signal(signal.SIGKILL)
        said += 3 + len(child.stdout.read().split())
        child.wait()
        with RunStore(tmp_path, config(), ARMS) as store:
            ids = [row.example_id for row in store.records()]
        assert said <= len(ids) // 3 <= said + 2
        assert ids == [f"e{index}" for index in range(len(ids) // 3) for _ in ARMS]


def test_atomic_writes_leave_the_old_file_when_they_fail(tmp_path, monkeypatch):
    file = tmp_path / "x.json"
    write_text(file, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_text(file, "new")
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["x.json"]


def test_unreadable_folders_are_named(tmp_path):
    store = stored_run(tmp_path)
    (store.path / "summary.json").write_text("[")
    with pytest.raises(StoreError, match=r"summary\.json is not a JSON object"):
        load_runs(tmp_path)


def test_folders_that_are_no_runs_are_passed_over(tmp_path):
    (tmp_path / "runs" / "junk").mkdir(parents=True)
    with RunStore(tmp_path, config(), ARMS):
        pass
    assert load_runs(tmp_path) == load_runs(tmp_path / "absent") == []
