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
    assert isinstance(config.draft, LookupDraft) and config.draft.k == 6
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
    ({"attn.block_size": 20}, ["attn.block_size=20", "16, 32, 64"]),
    ({"attn.score": "meen"}, ["attn.score=meen", "mean, bound"]),
    ({"attn.name": "foo"}, ["attn.name=foo", "dense, block_topk"]),
    ({"attn": None}, ["attn.name=null", "dense, block_topk"]),
    ({"attn": "dense"}, ["attn=dense", "name"]),
    ({"attn": {"name": "dense"}}, ["sparse would be dense", "attn=block_topk", "arms=[ar,dense]"]),
    ({"attn": {"name": "dense"}, "arms": ["sparse"]}, ["sparse would be dense", "arms=[ar,dense]"]),
    ({"draft": {"name": "none"}}, ["dense and sparse need drafts", "draft=lookup", "arms=[ar,sparse_ar]"]),
    ({"draft.k": 0}, ["draft.k=0", "at least 1"]),
    ({"draft.max_ngram": 0}, ["draft.max_ngram=0", "at least 1"]),
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
    ({"task.hub": None}, ["task.hub=null", "path"]),
    ({"task.hub.branch": "x"}, ["task.hub.branch", "task.hub.path, task.hub.config"]),
    ({"model.dtype": "bf16"}, ["model.dtype=bf16", "bfloat16"]),
    ({"model.kind": "gguf"}, ["model.kind=gguf", "smollm2, hf, shape"]),
    ({"engine.threads": 0}, ["engine.threads=0", "at least 1"]),
    ({"engine.packed": 1}, ["engine.packed=1", "true or false"]),
    ({"seed": -1}, ["seed=-1", "at least 0"]),
    ({"seed": math.nan}, ["seed=nan", "whole number"]),
    ({"results_dir": 7}, ["results_dir=7", "quote"]),
    ({"results_dir": ""}, ["results_dir=''", "empty"]),
    ({"stale": "keeep"}, ["stale=keeep", "rerun, keep"]),
    ({"track.name": "mlflow"}, ["track.name=mlflow", "none, wandb_offline, wandb"]),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=str)
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
