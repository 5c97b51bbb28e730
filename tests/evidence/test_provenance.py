import getpass
import json
import platform
import subprocess
from pathlib import Path

import pytest

from harness.evidence import provenance
from tests.evidence_samples import config

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("/home/bob/data/x.jsonl is empty", "x.jsonl is empty"),
        ("read '~/x y' and ../up/z.gz, ./here/w", "read 'x y' and z.gz, w"),
        ("https://host/a/b HuggingFaceTB/SmolLM2 7/8 and/or", "https://host/a/b HuggingFaceTB/SmolLM2 7/8 and/or"),
        ("task.data_files=[/a/b.jsonl,/c/d.jsonl]", "task.data_files=[b.jsonl,d.jsonl]"),
        ("/tmp/runs/", "runs"),
    ],
)
def test_scrub_keeps_the_last_part_of_paths_only(text, clean):
    assert provenance.scrub(text) == clean


def test_argv_loses_folders_and_personal_keys():
    argv = ["/home/bob/run.py", "-m", "attn.topk=8,16", "+task.data_files=[data/dev/x.jsonl,'/y/z.jsonl']"]
    argv += ["track.entity=bob", "results_dir=/scratch/bob/out", "model.path=org/model"]
    assert provenance.clean_argv(argv) == [
        "run.py",
        "-m",
        "attn.topk=8,16",
        "+task.data_files=[x.jsonl,'z.jsonl']",
        "results_dir=out",
        "model.path=org/model",
    ]


def test_portable_configurations_name_no_folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "w.safetensors").write_bytes(b"1" * 10)
    (tmp_path / "x.jsonl").write_text("{}\n")
    raw = config(data_files=[str(tmp_path / "x.jsonl")]) | {"results_dir": str(tmp_path / "out")}
    raw["model"]["path"] = str(tmp_path / "model")
    raw["track"] = {"name": "wandb", "entity": "bob", "project": "p"}
    plain = provenance.portable(raw)
    assert str(tmp_path) not in json.dumps(plain)
    assert plain["task"]["data_files"] == ["x.jsonl"] and len(plain["task"]["data_sha256"][0]) == 64
    assert plain["model"]["path"] == "model" and len(plain["model"]["path_sha256"]) == 64
    assert plain["track"] == {"name": "wandb", "entity": None, "project": "p"}
    assert provenance.portable(plain) == plain
    assert raw["model"]["path"] == str(tmp_path / "model")


def test_hub_ids_stay_as_they_are():
    raw = config()
    raw["model"]["path"] = "meta-llama/Llama-3.1-8B-Instruct"
    assert provenance.portable(raw)["model"] == raw["model"]


def test_contents_of_folders_are_told_apart(tmp_path):
    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(3_000_000))
    first = provenance.content_hash(tmp_path)
    file.write_bytes(bytes(2_999_999) + b"1")
    assert provenance.content_hash(tmp_path) != first
    file.write_bytes(bytes(3_000_000))
    assert provenance.content_hash(tmp_path) == first
    (tmp_path / "config.json").write_text("{}")
    assert provenance.content_hash(tmp_path) != first
    assert provenance.content_hash(tmp_path / "absent") is None


def test_sources_follow_code_and_bundled_data_only(tmp_path):
    for name in ("sparse/a.py", "harness/b.py", "tasks/data/c.jsonl", "tasks/notes.md", "scripts/d.py", "sparse/k.h"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    before = provenance.sources_hash(tmp_path)
    for name, changes in (
        ("scripts/d.py", False),
        ("tasks/notes.md", False),
        ("sparse/a.py", True),
        ("sparse/k.h", True),
        ("tasks/data/c.jsonl", True),
    ):
        (tmp_path / name).write_text("2")
        assert (provenance.sources_hash(tmp_path) != before) is changes
        (tmp_path / name).write_text("1")
    (tmp_path / "sparse/a.py").rename(tmp_path / "sparse/z.py")
    assert provenance.sources_hash(tmp_path) != before


def test_provenance_names_neither_host_nor_user_nor_folder():
    proof = provenance.collect(ROOT, argv=[str(ROOT / "run.py"), f"results_dir={ROOT}/x"], device="CPU", threads=2)
    text = json.dumps(proof)
    assert str(ROOT) not in text and str(Path.home()) + "/" not in text
    assert platform.node() not in [value for value in proof.values() if isinstance(value, str)]
    assert getpass.getuser() not in proof["argv"]
    assert proof["packages"]["numpy"] and proof["end"] is None and provenance.finished(proof)["end"]
    assert {"git", "sources", "packages", "device", "threads", "argv", "start", "end"} <= set(proof)


def test_git_state_follows_changes_outside_results(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    assert provenance.git_state(tmp_path) == {"sha": None, "dirty": None}
    git("init")
    (tmp_path / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "summary.csv").write_text("x")
    clean = provenance.git_state(tmp_path)
    (tmp_path / "a.py").write_text("2")
    assert len(clean["sha"]) == 40 and clean["dirty"] is False
    assert provenance.git_state(tmp_path) == {"sha": clean["sha"], "dirty": True}
