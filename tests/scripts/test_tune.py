"""python -m scripts.tune as it is typed: a whole study on random weights, what it writes, and bad input."""

import json

import matplotlib
import pytest
import yaml

matplotlib.use("Agg")

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from harness.schema import resolve
from scripts import tune

TINY = (
    *("model=shape", "model.arch=smollm2_135m", "model.layers=2", "model.dtype=float32", "exclusive=false"),
    *("task.max_new_tokens=8", "engine.threads=1", "engine.warmup=0", "task.max_prompt_tokens=360"),
)
SPACE = {
    "attn.kept_tokens": {"low": 272, "high": 320, "log": True},  # the default keeps 256 and so loses most
    "attn.score": {"choices": ["mean", "bound"]},
    "draft.depth": {"low": 3, "high": 6},
}


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A study of three trials and two examples, run twice."""
    folder = tmp_path_factory.mktemp("tune")
    (folder / "space.yaml").write_text(yaml.safe_dump(SPACE, sort_keys=False))
    words = ["--trials=3", "--examples=2", "--validate=2", f"--space={folder / 'space.yaml'}", "--max-loss=0"]
    words += [f"--results={folder / 'results'}", f"--out={folder / 'conf' / 'experiment'}", *TINY]
    assert tune.main(words) == 0
    first = json.loads((folder / "results" / "tune" / "xsum_shape_kl.json").read_text())
    times = {file: file.stat().st_mtime_ns for file in (folder / "results" / "runs").glob("*/records.jsonl")}
    assert tune.main(words) == 0
    again = json.loads((folder / "results" / "tune" / "xsum_shape_kl.json").read_text())
    return folder, first, again, times


def test_a_study_runs_once(studied):
    folder, first, again, times = studied
    assert first["trials"] == again["trials"] and first["validation"] == again["validation"]
    assert times == {file: file.stat().st_mtime_ns for file in (folder / "results" / "runs").glob("*/records.jsonl")}
    assert len(times) == 3 + 2, "three trials, and validation by default and chosen setting"


def test_everything_is_in_the_file_and_no_path(studied):
    folder, document, _, _ = studied
    trials = {one["number"]: one for one in document["trials"]}
    assert [one["state"] for one in trials.values()].count("measured") == 3
    assert document["default"] == 0 and trials[0]["setting"] == "as typed" and document["limit"] == 0
    assert set(document["front"]) <= set(trials) and document["chosen"]["number"] == document["front"][-1] != 0
    names = {file.suffix for file in (folder / "results" / "tune").glob("xsum_shape_kl.*")}
    assert names == {".json", ".log", ".md", ".pdf", ".png"}
    assert str(folder) not in "".join(
        file.read_text() for file in (folder / "results" / "tune").glob("*") if file.suffix in (".json", ".md", ".log")
    )


def test_validation_is_on_other_examples(studied):
    folder, document, _, _ = studied
    found = document["validation"]
    assert found["offset"] == 2 and found["examples"] == 2
    seen = {}
    for name in (document["trials"][0]["fingerprint"], *found["runs"].values()):
        lines = (folder / "results" / "runs" / name / "records.jsonl").read_text().splitlines()
        seen[name] = {json.loads(line)["example_id"] for line in lines}
    tuned_on, default, tuned = seen.values()
    assert default == tuned and not tuned_on & tuned
    ratio = found["tuned"]["speed"]["value"] / found["default"]["speed"]["value"]
    assert found["speed_ratio"]["value"] == pytest.approx(ratio)


def test_the_experiment_composes_to_the_chosen_setting(studied):
    folder, document, _, _ = studied
    lines = (folder / "conf" / "experiment" / "tuned_xsum_shape.yaml").read_text().splitlines()
    assert lines[:2] == ["# @package _global_", "# python run.py experiment=tuned_xsum_shape"]
    assert all("# " in line for line in lines if line) and document["sources"] in lines[3]
    with initialize_config_dir(str(tune.CONF), version_base="1.3"):
        found = hydra_compose("config", [f"hydra.searchpath=[file://{folder}/conf]", "experiment=tuned_xsum_shape"])
        words = [*TINY, *document["chosen"]["words"]]
        wanted = hydra_compose("config", words)
    config, typed = (resolve(OmegaConf.to_container(one, resolve=True)) for one in (found, wanted))
    assert (config.attn, config.draft, config.ffn, config.reuse, config.task.name) == (
        *(typed.attn, typed.draft, typed.ffn, typed.reuse),
        "xsum",
    )
    assert config.model == typed.model and config.task.source == "bundled"


def test_an_experiment_says_nothing_of_data_and_places():
    from scripts.tuning import experiment

    words = ["task=squad_long", "task.source=files", "task.data_files=[/somewhere/private.jsonl]", "task.bucket=4k"]
    words += ["experiment=joined_fast", "reuse=anchors", "reuse.every=3", "task.limit=8", "task.offset=4", "track=none"]
    with initialize_config_dir(str(tune.CONF), version_base="1.3"):
        text = experiment.text("tuned_x", "What it is.", words, tune.composed)
    content = yaml.safe_load(text)
    assert "private" not in text and content["task"] == {"bucket": "4k"} and "track" not in text
    assert {"override /draft": "combined"} in content["defaults"] and content["draft"]["eagle3"]["window"] == 512
    assert content["reuse"] == {"every": 3}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trials=0"], "--trials=0: must be 1 or more"),
        (["--sampler=grid"], "--sampler: invalid choice: 'grid'"),
        (["--budget=5"], "--budget=5: must be a time such as 90s, 30m or 2h"),
        (["--max-loss=-1"], "--max-loss=-1.0: must be 0 or more"),
        (["--study=a/b"], "--study=a/b: must be a file name"),
        (["--space=missing.yaml"], "--space=missing.yaml: cannot be read"),
        (["task.limit=3"], "task.limit: cannot be set here; --examples"),
        (["attn.topq=3"], "attn.topq is not a key: did you mean attn.topk"),
        (["attn.topk=3,4"], "several values are a sweep"),
        (["task=sums"], "task=sums: choose one of"),
        (["arms=[ar,sparse]"], "dense is needed"),
        (["analysis=none"], "--loss=kl needs analysis=fidelity"),
        (["--speed=dense"], "dense verification depends on draft"),
        (["draft=lookup", "draft.depth=4", "attn=dense", "ffn=topk", "ffn.keep=0.9", "reuse=none"], "fixes every key"),
        (["--examples=900", *TINY], "--examples=900: the data has"),
        (["--validate=900", *TINY], "examples are left beyond the 8 to tune on"),
    ],
)
def test_bad_input_is_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        tune.main([f"--results={tmp_path}", *words])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and message in told and len(told.splitlines()) == 1
    assert not (tmp_path / "tune").exists()


def test_a_dry_run_stores_nothing(tmp_path, capsys):
    assert tune.main(["--dry-run", "--examples=2", "--validate=2", f"--results={tmp_path}", *TINY]) == 0
    told = capsys.readouterr().out
    assert "attn.kept_tokens: 128 to 2048, log" in told and "a sample: " in told and "task.offset=2" in told
    assert list(tmp_path.iterdir()) == []
