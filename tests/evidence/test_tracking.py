"""An offline run is read back from the log that W&B wrote: blocks of 32 KiB with chunks of crc, length and type."""

import base64
import json
import re
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from harness.evidence import build_summary, tracking
from scripts import workspace
from tests.evidence_samples import ARMS, config, example, stored_run

ROOT = Path(__file__).resolve().parents[2]
BLOCK, FILE_HEADER, CHUNK_HEADER = 32768, 7, 7
USER, HOME, KEY = "user-mark-71", "home-mark-72", "5ec4e7" * 6 + "abcd"
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


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


def artifacts(file):
    """{artifact name: (type, {file name: staged copy})} of one offline run."""
    from wandb.proto import wandb_internal_pb2 as protocol

    found = {}
    for message in messages(file.read_bytes()):
        record = protocol.Record()
        record.ParseFromString(message)
        if record.WhichOneof("record_type") == "artifact":
            entries = {entry.path: Path(entry.local_path) for entry in record.artifact.manifest.contents}
            found[record.artifact.name] = (record.artifact.type, entries)
    return found


def settings_of(kind):
    settings = config(topk=8, data_files=[str(Path.home() / "x.jsonl")]) | {"moe": {"name": "dense"}}
    if kind == "moe":
        settings["model"] = settings["model"] | {"kind": "carved_moe", "name": "carved_moe"}
        settings |= {"ffn": {"name": "dense"}, "moe": {"name": "union", "union": 6}}
    return settings | ({"ffn": {"name": "topk", "keep": 0.5}} if kind == "ffn" else {})


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """Two members of a sweep, a run that broke and a report; user, home and key are marked; the writer has ended."""
    import wandb

    results = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patched:
        wandb.teardown()
        for variable in ("USER", "LOGNAME", "USERNAME"):
            patched.setenv(variable, USER)
        patched.setenv("HOME", str(tmp_path_factory.mktemp(HOME)))
        patched.setenv("WANDB_API_KEY", KEY)
        stores = {kind: stored_run(results, settings_of(kind), examples=3) for kind in ("ffn", "moe")}
        for kind, store in stores.items():
            tracker = tracking.make("offline", results_dir=results, project="p", texts=kind == "moe")
            tracker.start(settings_of(kind), store.path, f"run {kind}", "curve-0123abcd")
            for row in store.records():
                tracker.log_example(row)
            tracker.finish(store.summary(), store.records())
            tracker.finish(None)
        tracker = tracking.make("offline", results_dir=results, project="p")
        tracker.start(settings_of("ffn"), results / "runs" / "other", "broken", "mine")
        tracker.finish(None)
        for folder in ("tables", "figures"):
            (results / folder).mkdir()
        (results / "tables" / "results.csv").write_text("task,speed-up\nxsum,1.25\n")
        (results / "tables" / "results.md").write_text("| task |\n")
        (results / "figures" / "tradeoff.png").write_bytes(PIXEL)
        (results / "figures" / "tradeoff.pdf").write_bytes(b"%PDF")
        assert tracking.log_results(results, "offline", project="p", group="curve-0123abcd") == 3
        wandb.teardown()
    files = sorted((results / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    assert len(files) == 4
    return results, {stored(file)[3].display_name: file for file in files}


def test_members_of_a_sweep_are_runs_of_its_group(offline):
    runs = {name: stored(file)[3] for name, file in offline[1].items()}
    groups = {name: run.run_group for name, run in runs.items()}
    assert groups == {
        "run ffn": "curve-0123abcd",
        "run moe": "curve-0123abcd",
        "broken": "mine",
        "report": groups["report"],
    }
    assert {name: run.job_type for name, run in runs.items()} == {
        **dict.fromkeys(("run ffn", "run moe", "broken"), "run"),
        "report": "report",
    }
    assert list(runs["run ffn"].tags) == ["xsum", "SmolLM2-135M-Instruct", "lookup", "attention", "ffn"]
    assert {run.project for run in runs.values()} == {"p"} and len({run.run_id for run in runs.values()}) == 4


def test_configuration_examples_and_summary_are_stored(offline):
    results, files = offline
    settings, history, summary, _, ends = stored(files["run ffn"])
    assert settings["attn"]["topk"] == 8 and (results / "runs" / settings["fingerprint"]).is_dir()
    logged = [row for row in history if "example/number" in row]
    assert [row["example/number"] for row in logged] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert all(row["example/sparse/seconds"] > 0 for row in logged[2::3])
    assert summary["compare"]["sparse_vs_ar"]["speedup"] == summary["result/speedup_vs_ar"] > 1
    assert summary["per_example.nrows"] == 9 and summary["examples"] == 3
    assert "trace" not in summary["arms"]["sparse"]
    assert ends == [0]


def table(file, key):
    (found,) = file.parent.glob(f"files/media/table/{key}_*.table.json")
    return json.loads(found.read_text())


def test_tables_hold_arms_and_accepted_tokens(offline):
    file = offline[1]["run ffn"]
    stored_summary = json.loads(artifacts(file)[f"run-{stored(file)[0]['fingerprint']}"][1]["summary.json"].read_text())
    arms = table(file, "arms")
    rows = {row[0]: dict(zip(arms["columns"], row, strict=True)) for row in arms["data"]}
    assert {arm: row["tokens"] for arm, row in rows.items()} == {
        arm: block["tokens"] for arm, block in stored_summary["arms"].items()
    }
    accepted = table(file, "accepted_tokens")
    sparse = {row[1]: row[2] for row in accepted["data"] if row[0] == "sparse"}
    counts = stored_summary["arms"]["sparse"]["histogram"]
    assert sparse == {new: steps for new, steps in enumerate(counts) if new}
    assert sum(row[3] for row in accepted["data"] if row[0] == "sparse") == pytest.approx(1)


def test_histograms_count_every_step(offline):
    _, history, summary, _, _ = stored(offline[1]["run ffn"])
    (row,) = (row for row in history if "histogram/accepted_tokens/sparse.values" in row)
    block = summary["arms"]["sparse"]
    assert row["histogram/accepted_tokens/sparse.values"] == block["histogram"]
    assert row["histogram/accepted_tokens/sparse.bins"][:3] == [-0.5, 0.5, 1.5]
    edges = row["histogram/step_ms/sparse.bins"]
    assert sum(row["histogram/step_ms/sparse.values"]) == block["steps"]
    assert edges[0] <= block["step_ms"]["p50"] <= edges[-1]


def test_outputs_leave_the_machine_only_where_that_was_asked_for(offline):
    _, files = offline
    assert "text" not in table(files["run ffn"], "per_example")["columns"]
    asked = table(files["run moe"], "per_example")
    assert asked["data"][0][asked["columns"].index("text")] == "text of e0"
    staged = [path.read_bytes() for _, held in artifacts(files["run ffn"]).values() for path in held.values()]
    assert len(staged) > 3 and not any(b"text of e" in content for content in staged)
    assert b"text of e" not in files["run ffn"].read_bytes()


def test_files_of_the_run_are_an_artifact_without_the_records(offline):
    results, files = offline
    settings = stored(files["run ffn"])[0]
    kind, held = artifacts(files["run ffn"])[f"run-{settings['fingerprint']}"]
    folder = results / "runs" / settings["fingerprint"]
    assert kind == "run" and set(held) == {"config.yaml", "provenance.json", "summary.json"}
    assert held["config.yaml"].read_bytes() == (folder / "config.yaml").read_bytes()
    assert json.loads(held["summary.json"].read_text()) == json.loads((folder / "summary.json").read_text())


def test_a_report_holds_tables_and_figures(offline):
    _, history, _, run, _ = stored(offline[1]["report"])
    kind, held = artifacts(offline[1]["report"])["results-report"]
    assert kind == "results" and set(held) == {"tables/results.csv", "tables/results.md", "figures/tradeoff.png"}
    assert held["figures/tradeoff.png"].read_bytes() == PIXEL
    logged = {key for row in history for key in row}
    assert any(key.startswith("figures/tradeoff") for key in logged) and run.run_group == "curve-0123abcd"
    (found,) = offline[1]["report"].parent.glob("files/media/table/tables/results_*.table.json")
    assert json.loads(found.read_text())["data"] == [["xsum", "1.25"]]


def test_a_broken_member_is_closed_as_failed(offline):
    assert stored(offline[1]["broken"])[4] == [1]


def test_nothing_names_the_host_the_user_or_the_key(offline):
    results, files = offline
    marks = [re.escape(mark).encode() for mark in (USER, HOME, KEY)]
    marks.append(rb"(?<![A-Za-z0-9])" + re.escape(socket.gethostname()).encode() + rb"(?![A-Za-z0-9])")
    for file in (path for path in (results / "wandb").rglob("*") if path.is_file()):
        found = [mark for mark in marks if re.search(mark, file.read_bytes())]
        assert found == [], file.relative_to(results)
    assert not any(path.is_symlink() for path in (results / "wandb").rglob("*"))
    assert stored(files["run ffn"])[0]["task"]["data_files"] == ["x.jsonl"]
    assert not list(files["run ffn"].parent.glob("files/wandb-metadata.json"))


def test_the_results_folder_is_named_only_where_staged_copies_lie(offline):
    """Their places are read when the run is uploaded and are not sent."""
    from wandb.proto import wandb_internal_pb2 as protocol

    results, files = offline
    folder = str(results).encode()
    naming = [path for path in (results / "wandb").rglob("*") if path.is_file() and folder in path.read_bytes()]
    assert {path.suffix for path in naming} == {".wandb"}
    for file in files.values():
        for message in messages(file.read_bytes()):
            record = protocol.Record()
            record.ParseFromString(message)
            for entry in record.artifact.manifest.contents:
                assert results in Path(entry.local_path).parents
                entry.local_path = ""
            assert folder not in record.SerializeToString()


def test_staged_files_stay_in_the_results_folder(offline):
    assert (offline[0] / "wandb" / "data").is_dir()


class BrokenRun:
    """A W&B run that takes nothing, as after a lost connection."""

    dir = "nowhere/files"

    def __init__(self):
        self.ended = None

    def log(self, *_, **__):
        raise RuntimeError("connection\nlost")

    log_artifact = define_metric = log

    def finish(self, exit_code):
        self.ended = exit_code
        raise OSError("no answer")


def test_what_breaks_after_the_start_costs_one_line_each(tmp_path, monkeypatch, capsys):
    broken = BrokenRun()
    monkeypatch.setattr(tracking.WandbTracker, "_open", lambda *_, **__: broken)
    tracker = tracking.make("online", results_dir=tmp_path)
    tracker.start(config(), tmp_path / "runs" / "a", "n", None)
    rows = example("e0")
    for row in rows:
        tracker.log_example(row)
    facts = {"fingerprint": "a", "task": "xsum", "model": "m", "device": "CPU"}
    tracker.finish(build_summary(**facts, records=rows, arms=ARMS, metrics=("rougeL",), resamples=100), rows)
    lines = capsys.readouterr().err.splitlines()
    assert broken.ended == 0
    assert lines[1] == "W&B did not take the example (connection lost); the run goes on"
    assert len(lines) == len(set(lines)) and all("the run goes on" in line for line in lines)


def test_online_without_a_login_says_what_to_choose(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    wandb.teardown()
    tracker = tracking.make("online", results_dir=tmp_path / "results")
    with pytest.raises(tracking.TrackingError, match=r"choose track=wandb_offline or track=none$"):
        tracker.start(config(), tmp_path / "runs" / "a", "n", None)
    tracker.finish(None)


def test_a_results_folder_without_tables_is_no_report(tmp_path):
    with pytest.raises(tracking.TrackingError, match="no tables or figures"):
        tracking.log_results(tmp_path, "offline")
    assert tracking.log_results(tmp_path, "none") == 0
    assert list(tmp_path.iterdir()) == []


def test_tracking_nothing_needs_nothing(tmp_path):
    tracker = tracking.make("none", results_dir=tmp_path)
    tracker.start({}, tmp_path, "n", None)
    tracker.log_example(example("e0")[0])
    tracker.finish({})
    assert list(tmp_path.iterdir()) == []


def test_examples_without_a_start_are_ignored(tmp_path):
    tracker = tracking.make("offline", results_dir=tmp_path)
    tracker.log_example(example("e0")[0])
    tracker.finish(None)


@pytest.fixture(scope="module")
def stored_keys(offline):
    """Keys of history and summary, and of the configuration, that the two members of the sweep stored."""
    keys, settings = set(), set()
    for name in ("run ffn", "run moe", "report"):
        own, history, summary, _, _ = stored(offline[1][name])
        keys |= {key for row in history for key in row} | set(summary)
        keys |= {key.rpartition(".")[0] for key in keys if key.endswith("._type")}
        settings |= {f"{group}.value.{key}" for group, block in own.items() if isinstance(block, dict) for key in block}
    return keys, settings


@pytest.mark.filterwarnings("ignore:Pydantic V1 style")
def test_the_view_draws_only_what_runs_store(stored_keys):
    pytest.importorskip("wandb_workspaces")
    keys, settings = stored_keys
    section = workspace.spec(workspace.build("p", "e"))["section"]
    panels = [panel for part in section["panelBankConfig"]["sections"] for panel in part["panels"]]
    drawn = set()
    for panel in panels:
        shown = panel["config"]
        axes = [shown[axis].removeprefix("summary:") for axis in ("xAxis", "yAxis") if axis in shown]
        axes = [axis for axis in axes if axis != "_step"]
        drawn |= {*axes, *shown.get("metrics", ()), *shown.get("mediaKeys", ())[:1]}
        drawn |= {"accepted_tokens"} if "accepted_tokens" in json.dumps(shown.get("userQuery", "")) else set()
    columns = section["runSets"][0]["runFeed"]["columnOrder"]
    drawn |= {column.removeprefix("summary:") for column in columns if column.startswith("summary:")}
    assert len(drawn) > 30 and drawn - keys == set()
    assert {column.removeprefix("config:") for column in columns if column.startswith("config:")} <= settings
    assert section["runSets"][0]["grouping"] == [{"section": "run", "name": "group"}]
    assert not section["settings"]["useRunsTableGroupingInPanels"]


def test_evidence_and_tables_import_nothing_heavy():
    heavy = "{'torch', 'wandb', 'wandb_workspaces', 'matplotlib', 'transformers', 'hydra', 'datasets'}"
    modules = "harness.evidence, harness.evidence.tracking, harness.evidence.rows, scripts.tables, scripts.plots"
    modules += ", scripts.sync, scripts.workspace"
    code = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
