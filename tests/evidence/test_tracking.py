"""An offline run is read back from the log that W&B wrote: blocks of 32 KiB with chunks of crc, length and type."""

import getpass
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from harness.evidence import build_summary, tracking
from tests.evidence_samples import ARMS, config, example

ROOT = Path(__file__).resolve().parents[2]
BLOCK, FILE_HEADER, CHUNK_HEADER = 32768, 7, 7


def messages(content):
    """Whole messages of the log; a message may be split over chunks (type 1 whole, 2 first, 3 middle, 4 last)."""
    place, parts = FILE_HEADER, b""
    while place + CHUNK_HEADER <= len(content):
        left = BLOCK - place % BLOCK
        if left < CHUNK_HEADER:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + CHUNK_HEADER])
        parts += content[place + CHUNK_HEADER : place + CHUNK_HEADER + length]
        place += CHUNK_HEADER + length
        if kind in (1, 4):
            yield parts
            parts = b""


def stored(file):
    """(config, history rows, summary, run record) of one offline run."""
    from wandb.proto import wandb_internal_pb2 as protocol

    settings, history, summary, run, ends = {}, [], {}, None, []
    for message in messages(file.read_bytes()):
        record = protocol.Record()
        record.ParseFromString(message)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            history.append({name(item): json.loads(item.value_json) for item in record.history.item})
        elif kind == "summary":
            summary |= {name(item): json.loads(item.value_json) for item in record.summary.update}
        elif kind == "exit":
            ends.append(record.exit.exit_code)
    return settings, history, summary, run, ends


def name(item):
    return item.key or ".".join(item.nested_key)


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """Two members of a sweep, one good and one that broke; W&B's writer has ended."""
    import wandb

    results = tmp_path_factory.mktemp("tracked")
    for index, topk in enumerate((8, 16)):
        settings = config(topk=topk, data_files=[str(results / "x.jsonl")])
        tracker = tracking.make("offline", results_dir=results, project="p")
        tracker.start(settings, results / "runs" / f"print{topk}", f"topk {topk}", "sweep1")
        rows = [row for number in range(3) for row in example(f"e{number}")]
        for row in rows:
            tracker.log_example({"example": row.example_id, "arm": row.arm, "seconds": row.seconds, "text": row.text})
        facts = {"fingerprint": f"print{topk}", "task": "xsum", "model": "m", "device": "CPU"}
        summary = build_summary(**facts, records=rows, arms=ARMS, metrics=("rougeL",), resamples=100)
        tracker.finish(summary if index == 0 else None)
        tracker.finish(None)
    wandb.teardown()
    files = sorted((results / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    return results, files


def test_each_member_is_one_run_of_the_group(offline):
    _, files = offline
    runs = [stored(file)[3] for file in files]
    assert [run.display_name for run in runs] == ["topk 8", "topk 16"]
    assert {(run.run_group, run.project) for run in runs} == {("sweep1", "p")}
    assert len({run.run_id for run in runs}) == 2


def test_configuration_examples_and_summary_are_stored(offline):
    _, files = offline
    settings, history, summary, _, ends = stored(files[0])
    assert settings["attn"]["topk"] == 8 and settings["fingerprint"] == "print8"
    logged = [row["example/seconds"] for row in history if "example/seconds" in row]
    assert len(logged) == 9 and all(value > 0 for value in logged)
    assert summary["compare"]["sparse_vs_ar"]["speedup"] > 1
    assert summary["per_example.nrows"] == 9 and summary["examples"] == 3
    table = json.loads(next(files[0].parent.glob("files/media/table/*.json")).read_text())
    assert table["columns"] == ["example", "arm", "seconds", "text"]
    assert table["data"][0][:2] == ["e0", "ar"]
    assert ends == [0]


def test_a_broken_member_is_closed_as_failed(offline):
    assert stored(offline[1][1])[4] == [1]


def test_nothing_names_the_host_the_user_or_the_data_folder(offline):
    results, files = offline
    settings, _, _, run, _ = stored(files[0])
    assert settings["task"]["data_files"] == ["x.jsonl"]
    assert run.host == "" and run.git.remote_url == ""
    text = json.dumps(settings)
    assert str(results) not in text and f"/{getpass.getuser()}/" not in text
    assert not list(files[0].parent.glob("files/wandb-metadata.json")) and not list(files[0].parent.glob("files/*.txt"))


def test_staged_files_stay_in_the_results_folder(offline):
    assert (offline[0] / "wandb" / "data").is_dir()


def test_tracking_nothing_needs_nothing(tmp_path):
    tracker = tracking.make("none", results_dir=tmp_path)
    tracker.start({}, tmp_path, "n", None)
    tracker.log_example({"a": 1})
    tracker.finish({})
    assert list(tmp_path.iterdir()) == []


def test_examples_without_a_start_are_ignored(tmp_path):
    tracker = tracking.make("offline", results_dir=tmp_path)
    tracker.log_example({"a": 1})
    tracker.finish(None)


def test_evidence_and_tables_import_nothing_heavy():
    heavy = "{'torch', 'wandb', 'matplotlib', 'transformers', 'hydra', 'datasets'}"
    modules = "harness.evidence, harness.evidence.tracking, harness.evidence.rows, scripts.tables, scripts.plots"
    code = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
