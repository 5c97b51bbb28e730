"""Whole runs with drafters, trees, sampling and batches on random weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import build, runner
from harness.engine.model.eagle3 import Eagle3Head, Eagle3Shape
from harness.engine.model.shapes import SHAPES
from harness.schema import Config, ConfigError, resolve

TINY_SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 8192,
}
TINY = (
    *(
        "model=shape",
        "model.arch=tiny_seven",
        "model.dtype=float32",
        "track=none",
        "engine.threads=1",
        "analysis=none",
    ),
    *("task.limit=4", "task.max_new_tokens=14", "attn.topk=8", "engine.warmup=0", "arms=[ar,dense,sparse]"),
)
Compose = Callable[..., dict[str, Any]]
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def configured(compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    monkeypatch.setitem(SHAPES, "tiny_seven", TINY_SHAPE)
    return lambda *more: resolve(compose(*TINY, f"results_dir={tmp_path}/results", *more))


@pytest.fixture
def finished(configured: Callable[..., Config], tmp_path: Path) -> Run:
    """Runs once and gives the summary, with the records by arm under `rows`."""

    def run(*overrides: str) -> dict[str, Any]:
        folders = set((tmp_path / "results" / "runs").glob("*/"))
        runner.run(configured(*overrides))
        (folder,) = set((tmp_path / "results" / "runs").glob("*/")) - folders
        lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
        rows = {arm: [line for line in lines if line["arm"] == arm] for arm in ("ar", "dense", "sparse")}
        return json.loads((folder / "summary.json").read_text()) | {"rows": rows}

    return run


def outputs(found: dict[str, Any], arm: str) -> dict[str, list[int]]:
    return {row["example_id"]: row["output_ids"] for row in found["rows"][arm]}


@pytest.fixture
def head(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    made = Eagle3Head(Eagle3Shape(64, 192, 4, 2, 16, 96, 320, 100))
    made.set_vocabulary(torch.arange(0, 300, 3))
    made.save(tmp_path / "head")
    return tmp_path / "head"


@pytest.mark.parametrize(
    "overrides",
    [
        "draft=lookup draft.topk=2 draft.total=7",
        "draft=suffix draft.earlier=true",
        "draft=model draft.topk=2 draft.depth=3",
        "draft=selfsparse draft.blocks=4",
        "draft=selfsparse draft.blocks=null draft.skip_layers=[1,4] attn.block_size=32 attn.topk=4",
        "draft=eagle3 draft.topk=3 draft.depth=3 draft.total=6",
        "draft=combined draft.second=selfsparse",
        "draft=combined draft.second=model draft.join=true draft.model.topk=2",
        "draft=lookup draft.adaptive=confidence",
        "draft=lookup draft.adaptive=gain",
    ],
)
def test_every_drafter_runs_and_leaves_dense_output_alone(finished: Run, head: Path, overrides: str) -> None:
    """In batches of three: the outputs are those of decoding token by token, and drafts were really proposed."""
    where = [f"draft.path={head}"] if "eagle3" in overrides else []
    found = finished(*overrides.split(), *where, "engine.batch_size=3", "engine.wave=4")
    assert found["status"] == "ok" and outputs(found, "dense") == outputs(found, "ar")
    draft = found["arms"]["dense"]["draft"]
    assert 0 < draft["time_share"] < 1 and (draft["tokens_per_step"] > 0 or "adaptive" in overrides)
    assert found["arms"]["ar"]["draft"]["tokens_per_step"] == 0
    assert len({row["wave"] for row in found["rows"]["dense"]}) == 1 and found["rows"]["dense"][0]["wave"]


def test_batches_change_neither_output_nor_counts(finished: Run) -> None:
    """Dense and sparse, token for token; paths are counted once for a wave."""
    alone, together = finished(), finished("engine.batch_size=2")
    for arm in ("ar", "dense", "sparse"):
        assert outputs(together, arm) == outputs(alone, arm)
        assert together["arms"][arm]["histogram"] == alone["arms"][arm]["histogram"]
        densities = [found["arms"][arm]["density"]["attention"] for found in (together, alone)]
        assert densities[0] == pytest.approx(densities[1], rel=5e-3), "totals over a wave, weighted means alone"
    selected = [found["paths"]["select.blocks"] for found in (alone, together)]
    assert selected[0] == selected[1] > 0
    shared, own = (found["arms"]["ar"]["bytes_per_step"] for found in (together, alone))
    assert shared < own, "weights are read once for both sequences"


def test_an_oracle_chooses_the_acceptance_of_every_arm(finished: Run) -> None:
    sure = finished("draft=oracle", "draft.acceptance=1", "draft.depth=3", "task.max_new_tokens=13")
    for arm in ("dense", "sparse"):
        assert outputs(sure, arm) == outputs(sure, "ar")
        assert sure["arms"][arm]["acceptance_length"]["pooled"] == 4
    never = finished("draft=oracle", "draft.acceptance=0", "draft.depth=3")
    assert never["arms"]["sparse"]["acceptance_length"]["pooled"] == 1
    free = finished("draft=oracle", "draft.acceptance=1", "draft.depth=3", "draft.forced=false")
    assert outputs(free, "dense") == outputs(free, "ar") != outputs(free, "sparse")


def test_sampled_runs_depend_on_seed_and_example_alone(finished: Run) -> None:
    """Interrupted or not, in batches or not, from the first example or the third: the same draws."""
    first = finished("decode=sample", "arms=[ar,dense]")
    sparse = finished("decode=sample", "analysis=full")["compare"]["fidelity"]
    assert 0 < sparse["agreement"] <= 1 and sparse["accept_flips"] is sparse["noise_floor"] is None
    later = finished("decode=sample", "arms=[ar,dense]", "task.offset=2", "task.limit=2", "engine.batch_size=2")
    other = finished("decode=sample", "arms=[ar,dense]", "seed=1")
    for arm in ("ar", "dense"):
        assert set(outputs(later, arm)) < set(outputs(first, arm))
        assert all(tokens == outputs(first, arm)[name] for name, tokens in outputs(later, arm).items())
        assert outputs(other, arm) != outputs(first, arm)


@pytest.mark.parametrize(
    "overrides, words",
    [
        ("draft=eagle3", ["draft.path=null", "scripts.train_draft"]),
        ("draft=eagle3 draft.path=nowhere", ["draft.path=nowhere", "scripts.train_draft"]),
        ("draft=eagle3 model.arch=smollm2_135m", ["made for a target of width 64", "576"]),
        ("draft=selfsparse draft.skip_layers=[7]", ["draft.skip_layers=[7]", "0 to 6"]),
        ("draft=selfsparse draft.skip_layers=[0,1,2,3,4,5,6]", ["draft.skip_layers", "at least one must run"]),
        ("draft=model draft.path=nowhere/at/all", ["draft.path=nowhere/at/all", "model=shape reads bytes"]),
        ("draft=selfsparse draft.blocks=900", ["draft.blocks=900", "as much as the target", "valid: below"]),
        ("engine.batch_size=5", ["engine.batch_size=5", "4 examples"]),
    ],
)
def test_drafters_that_do_not_fit_are_refused(
    configured: Callable[..., Config], head: Path, overrides: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSE_VERIFICATION_CACHE", str(head.parent / "empty"))
    where = [f"draft.path={head}"] if "smollm2_135m" in overrides else []
    with pytest.raises(ConfigError) as caught:
        runner.run(configured(*overrides.split(), *where))
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_a_draft_model_needs_the_targets_vocabulary(compose: Compose, tmp_path: Path) -> None:
    """Two checkpoints on disk whose vocabularies differ in size."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from harness.engine.model import loading

    for name, vocab in (("target", 49152), ("draft", 320)):
        config = AutoConfig.for_model(**{**TINY_SHAPE, "vocab_size": vocab, "num_hidden_layers": 2})
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        loading.load_tokenizer(str(loading.smollm2_folder())).save_pretrained(tmp_path / name)
    where = ("model=hf", f"model.path={tmp_path}/target", "draft=model", f"draft.path={tmp_path}/draft")
    config = resolve(compose(*where, "task.limit=1", "attn.topk=8", f"results_dir={tmp_path}/results"))
    with pytest.raises(ConfigError, match=r"vocabulary of 320 tokens is not the target's of 49152"):
        build.plan(config)
