"""The resolver: what it takes, what it refuses and how it says so."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest

from harness.fields import fields_of, is_settings
from harness.schema import (
    DOCS,
    GROUPS,
    AnchorReuse,
    BlockTopkAttention,
    Config,
    ConfigError,
    LookupDraft,
    explain_unknown,
    resolve,
    task_options,
    to_dict,
)

Compose = Callable[..., dict[str, Any]]
CLASSES = sorted(
    {cls for _, classes in GROUPS.values() for cls in classes.values()} | {Config}, key=lambda c: c.__name__
)


def changed(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of a raw configuration with some dotted keys set."""
    raw = copy.deepcopy(raw)
    for key, value in changes.items():
        *groups, last = key.split(".")
        place = raw
        for group in groups:
            place = place[group]
        place[last] = value
    return raw


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(raw)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_default_configuration(compose: Compose) -> None:
    config = resolve(compose())
    assert isinstance(config.attn, BlockTopkAttention) and config.attn.topk == 16
    assert isinstance(config.draft, LookupDraft) and config.draft.depth == 6
    assert config.arms == ("ar", "dense", "sparse") and config.task.data_files == ()
    assert resolve(to_dict(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_has_a_comment_of_one_line(cls: type) -> None:
    for name, hint, metadata in fields_of(cls):
        assert metadata["doc"] and "\n" not in metadata["doc"] and "|" not in metadata["doc"], name
        if is_settings(hint):
            assert all(inner["doc"] for _, _, inner in fields_of(hint))


def test_a_key_means_the_same_with_every_choice() -> None:
    for group, (_, classes) in GROUPS.items():
        for cls in classes.values():
            assert all(metadata["doc"] == DOCS[f"{group}.{name}"] for name, _, metadata in fields_of(cls))


BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"attn.topkk": 3}, ["attn.topkk", "attn.topk"]),
    ({"rerunn": True}, ["rerunn", "rerun"]),
    ({"attn.topk": 0}, ["attn.topk=0", "at least 1"]),
    ({"attn.topk": -4}, ["attn.topk=-4", "at least 1"]),
    ({"attn.topk": 2.5}, ["attn.topk=2.5", "whole number"]),
    ({"attn.topk": True}, ["attn.topk=true", "whole number"]),
    ({"attn.topk": "8"}, ["attn.topk=8", "whole number"]),
    ({"attn.topk": None}, ["attn.topk=null", "whole number"]),
    ({"attn.topk": [8, 16]}, ["attn.topk=[8,16]", "whole number"]),
    ({"attn.topk": {"a": 1}}, ["attn.topk=", "whole number"]),
    ({"attn.topk": 1}, ["attn.topk=1", "attn.sinks + attn.window = 2"]),
    ({"attn.sinks": 9, "attn.window": 8}, ["attn.topk=16", "attn.sinks + attn.window = 17"]),
    ({"attn.budget": "square"}, ["attn.budget=square", "fixed, piecewise"]),
    ({"attn.budget": "piecewise", "attn.l0": 31}, ["attn.l0=31", "at least 32 tokens"]),
    ({"attn.budget": "piecewise", "attn.l0": 8, "attn.sinks": 0, "attn.window": 0}, ["attn.l0=8", "at least 16"]),
    ({"attn.rho": 1}, ["attn.rho=1", "a number of at least 0 and below 1"]),
    ({"attn.rho": -0.1}, ["attn.rho=-0.1", "at least 0"]),
    ({"attn.query": "last"}, ["attn.query=last", "first, mean, max, weighted"]),
    ({"attn.heads": "shared"}, ["attn.heads=shared", "per_head, pooled"]),
    ({"attn.survival": 0}, ["attn.survival=0", "a number above 0 and of at most 1"]),
    ({"attn.survival": 1.5}, ["attn.survival=1.5", "of at most 1"]),
    ({"attn.low_share": 1}, ["attn.low_share=1", "below 1"]),
    ({"attn.low_share": 0.5}, ["calibration=null: attn.low_share=0.5 needs one", "python -m scripts.calibrate"]),
    ({"calibration": ""}, ["calibration=''", "empty"]),
    ({"analysis": "yes"}, ["analysis=yes", "full, fidelity, none"]),
    ({"exclusive": "maybe"}, ["exclusive=maybe", "true or false"]),
    ({"attn.block_size": 20}, ["attn.block_size=20", "16, 32, 64"]),
    ({"attn.score": "meen"}, ["attn.score=meen", "mean, bound, gaussian, oracle"]),
    ({"attn.name": "foo"}, ["attn.name=foo", "dense, block_topk"]),
    ({"attn": None}, ["attn.name=null", "dense, block_topk"]),
    ({"attn": "dense"}, ["attn=dense", "name"]),
    ({"attn": {"name": "dense"}}, ["sparse would be dense", "attn=block_topk", "arms=[ar,dense]"]),
    ({"attn": {"name": "dense"}, "arms": ["sparse"]}, ["sparse would be dense", "arms=[ar,dense]"]),
    ({"draft": {"name": "none"}}, ["dense and sparse need drafts", "draft=lookup", "arms=[ar,sparse_ar]"]),
    ({"draft.depth": 0}, ["draft.depth=0", "from 1 to 256"]),
    ({"draft.max_ngram": 0}, ["draft.max_ngram=0", "from 1 to 64"]),
    ({"arms": []}, ["arms=[]", "ar, dense, sparse, sparse_ar"]),
    ({"arms": ["ar", "ar"]}, ["arms=[ar,ar]", "each once"]),
    ({"arms": ["ar", "fast"]}, ["arms=[ar,fast]", "ar, dense, sparse, sparse_ar"]),
    ({"task.name": "xsun"}, ["task.name=xsun", "xsum, squad"]),
    ({"task.source": "web"}, ["task.source=web", "bundled, files, hub"]),
    ({"task.data_files": "a.jsonl"}, ["task.data_files=[a.jsonl]", "task.source=files"]),
    ({"task.source": "files"}, ["task.data_files=[]", "task.source=files"]),
    ({"task.source": "files", "task.data_files": ["a", "a"]}, ["task.data_files=[a,a]", "once"]),
    ({"task.source": "files", "task.data_files": [""]}, ["task.data_files", "empty"]),
    ({"task.source": "files", "task.data_files": [3]}, ["task.data_files=[3]", "list of texts"]),
    ({"task.limit": 0}, ["task.limit=0", "at least 1"]),
    ({"task.offset": -1}, ["task.offset=-1", "at least 0"]),
    ({"task.style": "raw"}, ["task.style=raw", "chat, plain"]),
    ({"task.stop": ["\n", 3]}, ["task.stop=[\\n,3]", "list of texts"]),
    ({"task.max_new_tokens": 0}, ["task.max_new_tokens=0", "at least 1"]),
    (
        {"task.min_prompt_tokens": 9, "task.max_prompt_tokens": 8},
        ["task.min_prompt_tokens=9", "task.max_prompt_tokens=8"],
    ),
    ({"task.max_prompt_tokens": 100}, ["attn.topk=16", "256 tokens", "choose 10 or less"]),
    (
        {"task.max_prompt_tokens": 960, "task.max_new_tokens": 64, "attn.budget": "piecewise"},
        ["attn.l0=1024", "the cache of 1024", "less than 1024"],
    ),
    ({"task.hub": None}, ["task.hub=null", "path"]),
    ({"task.hub.branch": "x"}, ["task.hub.branch", "task.hub.path, task.hub.config"]),
    ({"model.dtype": "bf16"}, ["model.dtype=bf16", "bfloat16"]),
    ({"model.kind": "gguf"}, ["model.kind=gguf", "smollm2, hf, shape, carved_moe"]),
    ({"engine.threads": 0}, ["engine.threads=0", "at least 1"]),
    ({"engine.packed": 1}, ["engine.packed=1", "true or false"]),
    ({"seed": -1}, ["seed=-1", "at least 0"]),
    ({"seed": math.nan}, ["seed=nan", "whole number"]),
    ({"results_dir": 7}, ["results_dir=7", "quote"]),
    ({"results_dir": ""}, ["results_dir=''", "empty"]),
    ({"stale": "keeep"}, ["stale=keeep", "rerun, keep"]),
    ({"track.name": "mlflow"}, ["track.name=mlflow", "none, wandb_offline, wandb"]),
]


FFN = {"mask": "union", "survival": 0.7, "dense_layers": 0}
MOE = {"union": None, "outside": "substitute", "free_loaded": False, "survival": 0.7}
DENSE = {"name": "dense"}
ANCHORS = {"name": "anchors", "anchors": "every", "layers": [], "every": 2, "theta": 0.7, "head_map": False}
SKIPS = {"name": "skips", "skip": ["retrieval"], "skip_layers": [3], "refresh": 4}
TOPK_FFN = {"name": "topk", **FFN, "keep": 0.5}

BAD_SPARSITY: list[tuple[dict[str, Any], list[str]]] = [
    ({"ffn": {**TOPK_FFN, "keep": 1}}, ["ffn.keep=1", "above 0 and below 1"]),
    ({"ffn": {**TOPK_FFN, "keep": 0}}, ["ffn.keep=0", "above 0"]),
    ({"ffn": {**TOPK_FFN, "keep": math.nan}}, ["ffn.keep=nan", "above 0"]),
    ({"ffn": {**TOPK_FFN, "mask": "all"}}, ["ffn.mask=all", "union, root, weighted, token"]),
    ({"ffn": {**TOPK_FFN, "dense_layers": -1}}, ["ffn.dense_layers=-1", "at least 0"]),
    ({"ffn": {"name": "threshold", **FFN, "tau": 0}}, ["ffn.tau=0", "above 0"]),
    ({"ffn": {"name": "threshold", **FFN, "keep": 0.5}}, ["ffn.keep is not a key", "ffn.tau"]),
    ({"ffn": {"name": "quantile", **FFN, "sparsity": 1}}, ["ffn.sparsity=1", "below 1"]),
    ({"ffn": {"name": "quantile", **FFN, "sparsity": 0.5}}, ["calibration=null: ffn=quantile needs one"]),
    ({"moe": {"name": "union", **MOE}}, ["moe.union=null", "whole number of at least 1"]),
    ({"moe": {"name": "union", **MOE, "union": 0}}, ["moe.union=0", "at least 1"]),
    ({"moe": {"name": "topk", **MOE, "k": 0}}, ["moe.k=0", "at least 1"]),
    ({"moe": {"name": "topk", **MOE, "k": 2, "outside": "skip"}}, ["moe.outside=skip", "substitute, drop"]),
    ({"moe": {"name": "topp", **MOE, "p": 1}}, ["moe.p=1", "below 1"]),
    ({"moe": {"name": "floor", **MOE, "weight_floor": 0}}, ["moe.weight_floor=0", "above 0"]),
    ({"moe": {"name": "median_ratio", **MOE, "m_max": 0}}, ["moe.m_max=0", "at least 1"]),
    ({"moe": {"name": "median_ratio", **MOE, "m_max": 3}}, ["calibration=null: moe=median_ratio needs one"]),
    ({"reuse": {**ANCHORS, "every": 1}}, ["reuse.every=1", "at least 2"]),
    ({"reuse": {**ANCHORS, "anchors": "jaccard"}}, ["reuse.anchors=jaccard needs one", "scripts.calibrate"]),
    ({"reuse": {**ANCHORS, "anchors": "mass"}}, ["reuse.anchors=mass needs one", "scripts.calibrate"]),
    ({"reuse": {**ANCHORS, "head_map": True}}, ["reuse.head_map=true needs one", "scripts.calibrate"]),
    (
        {"reuse": {**ANCHORS, "anchors": "mass", "head_map": True}},
        ["reuse.anchors=mass and reuse.head_map=true need one"],
    ),
    (
        {"reuse": ANCHORS, "attn.low_share": 0.1, "calibration": "some.json"},
        ["attn.low_share=0.1", "cannot be passed on", "reuse=none"],
    ),
    ({"reuse": {**ANCHORS, "theta": 0}}, ["reuse.theta=0", "above 0"]),
    ({"reuse": {**ANCHORS, "anchors": "list"}}, ["reuse.layers=[]", "ascending"]),
    ({"reuse": {**ANCHORS, "anchors": "list", "layers": [0, 4, 2]}}, ["reuse.layers=[0,4,2]", "ascending"]),
    ({"reuse": {**ANCHORS, "anchors": "list", "layers": [0, 4, 4]}}, ["reuse.layers=[0,4,4]", "ascending"]),
    ({"reuse": {**ANCHORS, "anchors": "list", "layers": [2, 4]}}, ["reuse.layers=[2,4]", "must begin with 0"]),
    (
        {"reuse": {**ANCHORS, "anchors": "list", "layers": [0, 4]}, "attn.dense_layers": 2},
        ["reuse.layers=[0,4]", "must begin with 2", "attn.dense_layers=2"],
    ),
    ({"reuse": {**ANCHORS, "anchors": "list", "layers": ["a"]}}, ["reuse.layers=[a]", "list of whole numbers"]),
    ({"reuse": {**ANCHORS, "anchors": "list", "layers": [0, -1]}}, ["reuse.layers=[0,-1]", "of at least 0"]),
    ({"reuse": {**ANCHORS, "anchors": "list", "layers": [0, 1.5]}}, ["reuse.layers=[0,1.5]", "whole numbers"]),
    ({"reuse": {**ANCHORS, "anchors": "list", "layers": [False]}}, ["reuse.layers=[false]", "whole numbers"]),
    ({"reuse": {**ANCHORS, "layers": [0, 4]}}, ["reuse.layers=[0,4]", "not read with reuse.anchors=every"]),
    ({"reuse": ANCHORS, "attn": DENSE, "ffn": TOPK_FFN}, ["reuse=anchors: attn=dense selects no blocks"]),
    ({"reuse": ANCHORS, "attn": DENSE}, ["sparse would be dense"]),
    ({"reuse": {**SKIPS, "skip": []}}, ["reuse.skip=[]", "retrieval, channels, ffn"]),
    ({"reuse": {**SKIPS, "skip": ["ffn", "ffn"]}}, ["reuse.skip=[ffn,ffn]", "each once"]),
    ({"reuse": {**SKIPS, "skip": ["moe"]}}, ["reuse.skip=[moe]", "a list of retrieval, channels, ffn"]),
    ({"reuse": {**SKIPS, "skip_layers": []}}, ["reuse.skip_layers=[]", "at least one"]),
    ({"reuse": {**SKIPS, "skip_layers": [4, 3]}}, ["reuse.skip_layers=[4,3]", "ascending"]),
    ({"reuse": {**SKIPS, "refresh": 1}}, ["reuse.refresh=1", "at least 2"]),
    ({"reuse": SKIPS, "attn": DENSE}, ["sparse would be dense"]),
    ({"reuse": SKIPS, "attn": DENSE, "ffn": TOPK_FFN}, ["reuse.skip=[retrieval]", "attn=dense has no retrieval"]),
    ({"reuse": SKIPS, "attn.dense_layers": 4}, ["reuse.skip_layers=[3]", "attn.dense_layers=4", "from 4 on"]),
    ({"reuse": {**SKIPS, "skip": ["channels"]}}, ["reuse.skip=[channels]", "ffn=dense selects no channels"]),
    (
        {"reuse": {**SKIPS, "skip": ["channels"]}, "ffn": {**TOPK_FFN, "mask": "token"}},
        ["reuse.skip=[channels]", "ffn.mask=token", "union, root or weighted"],
    ),
    (
        {"reuse": {**SKIPS, "skip": ["channels"]}, "ffn": {**TOPK_FFN, "dense_layers": 4}},
        ["reuse.skip_layers=[3]", "ffn.dense_layers=4"],
    ),
    ({"reuse": {**SKIPS, "skip": ["channels", "ffn"]}, "ffn": TOPK_FFN}, ["name one of channels, ffn"]),
]


@pytest.mark.parametrize(("changes", "words"), [*BAD, *BAD_SPARSITY], ids=str)
def test_bad_settings_are_refused_in_one_line(compose: Compose, changes: dict[str, Any], words: list[str]) -> None:
    text = refusal(changed(compose(), changes))
    assert all(word in text for word in words), text


def test_a_missing_key_is_named(compose: Compose) -> None:
    raw = compose()
    del raw["attn"]["topk"]
    assert "attn.topk is missing" in refusal(raw)


def test_limits_of_single_tasks(compose: Compose) -> None:
    needle = compose("task=needle")
    assert "task.depth=1.5: must be a number from 0 to 1" in refusal(changed(needle, {"task.depth": 1.5}))
    assert "task.context_tokens=6000" in refusal(changed(needle, {"task.max_prompt_tokens": 4096}))
    assert "no data set on the hub" in refusal(changed(needle, {"task.source": "hub"}))
    assert "task.depth=nan" in refusal(changed(needle, {"task.depth": math.nan}))
    assert "task.bucket=16k" in refusal(changed(compose("task=squad_long"), {"task.bucket": "16k"}))


def test_values_are_brought_to_their_type(compose: Compose) -> None:
    files = resolve(changed(compose(), {"task.source": "files", "task.data_files": "a.jsonl", "task.stop": "\n"}))
    assert files.task.data_files == ("a.jsonl",) and files.task.stop == ("\n",)
    assert task_options(resolve(changed(compose("task=needle"), {"task.depth": 1})).task)["depth"] == 1.0


def test_options_are_the_keys_of_one_task(compose: Compose) -> None:
    assert task_options(resolve(compose("task=xsum")).task) == {}
    assert set(task_options(resolve(compose("task=needle")).task)) == {"context_tokens", "depth"}
    assert set(task_options(resolve(compose("task=squad_long")).task)) == {"bucket", "questions"}


def test_sparse_groups_resolve(compose: Compose) -> None:
    good: list[dict[str, Any]] = [
        {"attn.budget": "piecewise", "attn.l0": 32, "attn.topk": 1},
        {"attn.score": "oracle", "attn.query": "weighted", "attn.heads": "pooled"},
        {"attn.low_share": 0.5, "calibration": "some.json"},
        {"ffn": {"name": "quantile", **FFN, "sparsity": 0.5}, "calibration": "some.json", "attn": DENSE},
        {"moe": {"name": "median_ratio", **MOE, "m_max": 3}, "calibration": "some.json", "attn": DENSE},
        {"reuse": {**ANCHORS, "anchors": "list", "layers": [2, 9]}, "attn.dense_layers": 2},
        {"reuse": {**ANCHORS, "anchors": "list", "layers": 0}},
        {"reuse": {**ANCHORS, "anchors": "jaccard", "head_map": True}, "calibration": "some.json"},
        {"reuse": {**SKIPS, "skip": ["ffn"]}, "attn": DENSE},
        {"reuse": {**SKIPS, "skip": ["retrieval", "channels"]}, "ffn": TOPK_FFN},
        {"reuse": {**SKIPS, "skip_layers": [1, 2]}, "attn.dense_layers": 2},
        {"reuse": SKIPS, "ffn": {**TOPK_FFN, "mask": "token"}},
    ]
    for changes in good:
        raw = changed(compose(), changes)
        config = resolve(raw)
        assert resolve(to_dict(config)) == config, changes
    layers = [0, 9]
    listed = resolve(changed(compose(), {"reuse": {**ANCHORS, "anchors": "list", "layers": layers}})).reuse
    assert isinstance(listed, AnchorReuse) and listed.layers == (0, 9)


def test_model_labels(compose: Compose) -> None:
    assert resolve(compose("model=hf", "model.path=some/where/tiny.gguf")).model.name == "tiny.gguf"
    assert resolve(compose("model=hf", "model.path=org/name", "model.name=mine")).model.name == "mine"
    assert "model.path=null" in refusal(compose("model=hf"))


def test_drafts_are_needed_only_where_they_are_verified(compose: Compose) -> None:
    assert resolve(compose("draft=none", "arms=[ar,sparse_ar]")).draft.name == "none"
    assert resolve(compose("attn=dense", "arms=[ar,dense]")).attn.name == "dense"


def test_unknown_keys_are_explained() -> None:
    assert "belongs to attn=block_topk" in explain_unknown("attn.topk")
    assert "did you mean task.limit?" in explain_unknown("task.limits")
    assert "valid keys are" in explain_unknown("qqq") and "attn.topk" not in explain_unknown("qqq")
    assert "task.context_tokens" in DOCS
