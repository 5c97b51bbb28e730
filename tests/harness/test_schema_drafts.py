"""Settings of drafters and decodings: what is refused, and what the checks let through."""

from collections.abc import Callable
from typing import Any

import pytest

from harness.fields import ConfigError
from harness.schema import CombinedDraft, Eagle3Draft, SuffixDraft, resolve
from harness.schema_drafts import drafters

Compose = Callable[..., dict[str, Any]]

BAD: list[tuple[list[str], list[str]]] = [
    (["draft=suffix", "draft.depth=9", "draft.total=8"], ["draft.total=8", "draft.depth=9", "at least 9"]),
    (["draft=lookup", "draft.total=12"], ["draft.total=12", "draft.topk=1", "chain of 6 tokens"]),
    (["draft=eagle3", "draft.sample=true"], ["draft.sample=true", "decode=greedy", "decode=sample"]),
    (["draft=combined", "draft.eagle3.sample=true"], ["draft.eagle3.sample=true", "decode=sample"]),
    (["draft=selfsparse", "draft.blocks=null"], ["draft.blocks=null", "draft.skip_layers=[]"]),
    (["draft=selfsparse", "draft.skip_layers=[4,2]"], ["draft.skip_layers=[4,2]", "ascending"]),
    (
        ["draft=combined", "draft.join=true", "decode=sample", "draft.eagle3.sample=true"],
        ["draft.join=true", "draft.eagle3.sample=false"],
    ),
    (["draft=oracle", "decode=sample"], ["draft=oracle", "decode=sample", "greedy"]),
    (["draft=oracle", "draft.adaptive=gain"], ["draft.adaptive=gain", "choose never"]),
    (["draft=oracle", "draft.acceptance=1.5"], ["draft.acceptance=1.5", "from 0 to 1"]),
    (["draft.adaptive=sometimes"], ["draft.adaptive=sometimes", "never, confidence, gain"]),
    (["draft=combined", "draft.second=lookup"], ["draft.second=lookup", "model, selfsparse, eagle3"]),
    (["decode=sample", "decode.temperature=0"], ["decode.temperature=0", "above 0"]),
    (["decode=sample", "decode.top_p=1.2"], ["decode.top_p=1.2", "at most 1"]),
    (["decode=topk_match", "decode.k=0"], ["decode.k=0", "at least 1"]),
    (["draft.max_ngram=1000"], ["draft.max_ngram=1000", "from 1 to 64"]),
    (["draft.depth=1000000"], ["draft.depth=1000000", "from 1 to 256"]),
    (["engine.batch_size=0"], ["engine.batch_size=0", "at least 1"]),
    (["engine.batch_size=4", "engine.wave=3"], ["engine.wave=3", "engine.batch_size=4"]),
]


@pytest.mark.parametrize("overrides, words", BAD, ids=lambda value: " ".join(value)[:60])
def test_contradictions_are_refused_in_one_line(compose: Compose, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(compose(*overrides))
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words)


def test_the_papers_tree_is_a_setting(compose: Compose) -> None:
    config = resolve(compose("draft=eagle3", "draft.total=60", "draft.topk=10", "draft.depth=6"))
    assert isinstance(config.draft, Eagle3Draft) and config.draft.size == 60
    assert resolve(compose("draft=eagle3", "draft.topk=3", "draft.depth=4")).draft.size == 12  # type: ignore[attr-defined]


def test_a_combination_names_both_drafters(compose: Compose) -> None:
    config = resolve(compose("draft=combined", "draft.second=selfsparse", "draft.suffix.depth=11"))
    assert isinstance(config.draft, CombinedDraft) and config.draft.size == 11
    names = [(path, part.name) for path, part in drafters(config.draft)]
    assert names == [("draft.suffix", "suffix"), ("draft.selfsparse", "selfsparse")]
    assert isinstance(config.draft.parts[0], SuffixDraft)
    assert drafters(resolve(compose("draft=none", "arms=[ar,sparse_ar]")).draft) == []
