"""The EAGLE-3 drafter: drafts against the forward pass written out, and real decodes over a tiny target."""

import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import harness.engine.drafting.eagle3 as module
from harness.engine.cache import KVCache
from harness.engine.decoding import Decoder, StopRule
from harness.engine.drafting import eagle3_memory
from harness.engine.drafting.base import NoDrafter
from harness.engine.drafting.draft import Draft
from harness.engine.drafting.eagle3 import Eagle3Drafter
from harness.engine.drafting.eagle3_memory import CompiledMemory
from harness.engine.drafting.expansion import Growth
from harness.engine.model.eagle3 import Eagle3Head, Eagle3Shape, feature_layers, load_head
from harness.engine.model.families import adapt
from harness.engine.model.step import Step
from harness.engine.sampling import Sampling, distribution
from sparse.budget import Sparsity
from sparse.ops.decoder_layer import native
from tests.engine.eagle3_reference import CONFIG, FEATURES, HIDDEN, LLAMA3, VOCAB, reference, tensors, write
from tests.engine.tiny import library_model, repetitive_prompt

CHAIN, TREE = Growth(4), Growth(4, 3, 10)
LAYERS = 8


@pytest.fixture(autouse=True, params=["torch", "kernels"])
def small_steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts take several chunks, and storage has to grow; with torch operators and with the CPU kernels."""
    monkeypatch.setattr(module, "_CHUNK", 5)
    monkeypatch.setattr(module, "_TOGETHER", 2)
    monkeypatch.setattr(eagle3_memory, "_ROOM", 3)
    if request.param == "torch":
        monkeypatch.setattr(CompiledMemory, "fits", lambda head: False)
    elif not native.available(torch.float32):
        pytest.skip("no kernels for decoder layers here")


@pytest.fixture(scope="module")
def embedding() -> Tensor:
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(11))


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Eagle3Head:
    folder = write(tmp_path_factory.mktemp("head"), CONFIG, tensors())
    return load_head(folder, torch.float32, torch.device("cpu"))


def sequence(length: int, seed: int = 0) -> tuple[list[int], Tensor]:
    """Tokens t_0 to t_n and, for all but the first, the features that they were predicted from."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
    return tokens, torch.randn(length - 1, FEATURES, generator=generator)


def path_to(draft: Draft, node: int) -> list[int]:
    """Tokens from the root's child to ``node``; empty for -1."""
    return [] if node < 0 else [*path_to(draft, draft.parents[node]), draft.tokens[node]]


def same(left: Draft, right: Draft) -> None:
    assert (left.tokens, left.parents) == (right.tokens, right.parents)
    assert left.confidence == pytest.approx(right.confidence, abs=1e-5)


@pytest.mark.parametrize("growth", [CHAIN, TREE, Growth(4, 2, 3), Growth(4, 2, 5)])
@pytest.mark.parametrize(("file", "rope"), [("model.safetensors", None), ("pytorch_model.bin", LLAMA3)])
def test_drafts_follow_the_published_forward_pass(
    growth: Growth, file: str, rope: dict[str, Any] | None, embedding: Tensor, tmp_path: Path
) -> None:
    weights, config = tensors(), {**CONFIG, "rope_scaling": rope}
    loaded = load_head(write(tmp_path, config, weights, file), torch.float32, torch.device("cpu"))
    chosen = weights["t2d"].nonzero()[:, 0]
    tokens, features = sequence(16)
    drawing = Eagle3Drafter(loaded, embedding, growth, sample=Sampling())
    choosing = Eagle3Drafter(loaded, embedding, growth)
    known = 9
    for drafter in (drawing, choosing):
        drafter.reset(tokens[:known], features[: known - 1], seed=4)
    for accepted in (1, 4, 2):
        new = slice(known, known + accepted)
        known += accepted
        for drafter in (drawing, choosing):
            drafter.observe(tokens[new], features[new.start - 1 : new.stop - 1])
        draft = drawing.propose(99)
        assert draft.proposals is not None and draft.proposals.shape == (1 + len(draft), VOCAB)
        for place, children in enumerate(draft.children()):
            if children:
                path = path_to(draft, place - 1)
                expected = reference(weights, config, embedding, tokens[1:known], features[: known - 1], path)[-1]
                found = draft.proposals[place, chosen].double().log()
                assert (found - expected.log_softmax(-1)).abs().max() < 2e-5
        draft = choosing.propose(99)
        assert draft.depth > 1
        for node, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
            path = path_to(draft, parent)
            expected = reference(weights, config, embedding, tokens[1:known], features[: known - 1], path)[-1].softmax(
                -1
            )
            assert draft.confidence[node] == pytest.approx(float(expected[chosen == token]), abs=1e-5)
            if node in draft.children()[parent + 1][:1]:
                assert token == int(chosen[expected.argmax()])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_running_drafter_equals_a_fresh_one(head: Eagle3Head, embedding: Tensor, data: st.DataObject) -> None:
    growth = data.draw(st.sampled_from([CHAIN, TREE, Growth(6, 2, 7), Growth(1)]))
    prompt = data.draw(st.integers(1, 14))
    tokens, features = sequence(prompt + 60, seed=data.draw(st.integers(0, 3)))
    running = Eagle3Drafter(head, embedding, growth)
    known = prompt
    running.reset(tokens[:known], features[: known - 1])
    for accepted, proposes in data.draw(st.lists(st.tuples(st.integers(1, 7), st.booleans()), min_size=1, max_size=8)):
        running.observe(tokens[known : known + accepted], features[known - 1 : known + accepted - 1])
        known += accepted
        if proposes:
            running.propose(data.draw(st.integers(0, 9)))
    fresh = Eagle3Drafter(head, embedding, growth)
    fresh.reset(tokens[:known], features[: known - 1])
    expected = fresh.propose(50)
    assert expected
    same(running.propose(50), expected)
    same(running.propose(50), expected)


def test_the_same_prompt_is_not_run_again(head: Eagle3Head, embedding: Tensor) -> None:
    tokens, features = sequence(30)
    drafter = Eagle3Drafter(head, embedding, TREE)
    drafter.reset(tokens[:12], features[:11])
    at_once = drafter.propose(9)
    drafter.observe(tokens[12:20], features[11:19])
    later = drafter.propose(9)
    unread = torch.full_like(features[:11], float("nan"))
    for _ in range(2):
        drafter.reset(tokens[:12], unread)
        drafter.observe(tokens[12:20], features[11:19])
        same(drafter.propose(9), later)
    drafter.reset(tokens[:12], unread)
    same(drafter.propose(9), at_once)
    drafter.reset(tokens[12:24], features[12:23])
    other = drafter.propose(9)
    assert other.confidence != at_once.confidence
    fresh = Eagle3Drafter(head, embedding, TREE)
    fresh.reset(tokens[12:24], features[12:23])
    same(fresh.propose(9), other)


@pytest.mark.parametrize("growth", [CHAIN, TREE])
def test_a_window_sees_the_last_tokens_alone(growth: Growth, head: Eagle3Head, embedding: Tensor) -> None:
    """What lies before it may be anything, after a prompt and after accepted tokens; a wide one changes nothing."""
    tokens, features = sequence(40)
    changed, poisoned = [3] * 20 + tokens[20:], features.clone()
    poisoned[:19] = float("nan")

    def drafts(window: int | None, tokens: list[int], features: Tensor) -> list[Draft]:
        drafter, found = Eagle3Drafter(head, embedding, growth, window=window), []
        drafter.reset(tokens[:30], features[:29])
        for start, stop in ((30, 31), (31, 36), (36, 40)):
            drafter.observe(tokens[start:stop], features[start - 1 : stop - 1])
            found.append(drafter.propose(9))
        return found

    pairs = zip(drafts(8, tokens, features), drafts(8, changed, poisoned), strict=True)
    assert all(same(one, other) is None for one, other in pairs)
    whole = drafts(None, tokens, features)
    assert all(same(one, other) is None for one, other in zip(drafts(99, tokens, features), whole, strict=True))
    assert drafts(8, tokens, features)[0].confidence != whole[0].confidence


def test_limits_and_short_sequences(head: Eagle3Head, embedding: Tensor) -> None:
    tokens, features = sequence(6)
    drafter = Eagle3Drafter(head, embedding, TREE)
    drafter.reset(tokens[:1], features[:0])
    assert not drafter.propose(5)
    drafter.observe(tokens[1:2], features[:1])
    assert not drafter.propose(0)
    assert [drafter.propose(limit).depth for limit in (1, 2)] == [1, 2]
    assert len(drafter.propose(50)) == TREE.size
    chain = Eagle3Drafter(head, embedding, CHAIN)
    chain.reset(tokens[:4], features[:3])
    assert chain.propose(50).is_chain and [len(chain.propose(limit)) for limit in (3, 50)] == [3, 4]


def test_features_that_do_not_fit_are_refused(head: Eagle3Head, embedding: Tensor) -> None:
    tokens, features = sequence(6)
    drafter = Eagle3Drafter(head, embedding, CHAIN)
    with pytest.raises(ValueError, match="no taps"):
        drafter.reset(tokens)
    with pytest.raises(ValueError, match="5 tokens need features of width 84"):
        drafter.reset(tokens, features[:-1])
    drafter.reset(tokens[:3], features[:2])
    with pytest.raises(ValueError, match="no taps"):
        drafter.observe(tokens[3:])
    with pytest.raises(ValueError, match="width 84"):
        drafter.observe(tokens[3:], features[2:, :-1])
    with pytest.raises(ValueError, match="embeddings of 61 tokens and width 24"):
        Eagle3Drafter(head, embedding[:, 1:], CHAIN)


def test_a_head_reads_embeddings_of_its_own(head: Eagle3Head, embedding: Tensor) -> None:
    tokens, features = sequence(9)
    own = Eagle3Head(head.shape, own_embedding=True).eval()
    own.load_state_dict({**head.state_dict(), "embed_tokens.weight": embedding})
    drafters = [Eagle3Drafter(head, embedding, TREE), Eagle3Drafter(own, torch.zeros(1, 1), TREE)]
    for drafter in drafters:
        drafter.reset(tokens, features)
    same(drafters[0].propose(9), drafters[1].propose(9))


def test_drawn_drafts_depend_on_the_seed_and_lie_in_the_targets_vocabulary(head: Eagle3Head, embedding: Tensor) -> None:
    tokens, features = sequence(9)
    sample = Sampling(temperature=0.7, top_k=4)
    drafter = Eagle3Drafter(head, embedding, TREE, sample=sample)
    drafts = []
    for seed in (1, 2, 1):
        drafter.reset(tokens, features, seed)
        drafts.append(drafter.propose(9))
    assert drafts[0].tokens == drafts[2].tokens != drafts[1].tokens
    plain = Eagle3Drafter(head, embedding, TREE, sample=Sampling())
    plain.reset(tokens, features)
    whole = plain.propose(9).proposals
    for draft in drafts:
        assert set(draft.tokens) <= set(head.targets.tolist())
        assert draft.proposals is not None and whole is not None
        torch.testing.assert_close(draft.proposals[0], distribution(whole[:1].log(), sample)[0])
        for node, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
            assert float(draft.proposals[parent + 1].sum()) == pytest.approx(1)
            assert draft.confidence[node] == pytest.approx(float(draft.proposals[parent + 1, token]))


class TwoTokens:
    """A pace that allows two tokens."""

    def goes_on(self, survival: float, expected: float, size: int) -> bool:
        return size < 2


def test_the_pace_ends_drafts(head: Eagle3Head, embedding: Tensor) -> None:
    drafter = Eagle3Drafter(head, embedding, CHAIN, pace=TwoTokens())
    drafter.reset(*sequence(9))
    assert len(drafter.propose(9)) == 2


class Hinted(NoDrafter):
    """Hands everything on to an EAGLE-3 drafter, but proposes partly right trees instead of its drafts."""

    reads_features = True

    def __init__(self, inner: Eagle3Drafter, continuation: Sequence[int]) -> None:
        self.inner, self.known, self.seen, self.random = inner, list(continuation), 0, Random(0)

    def reset(self, prompt: Sequence[int], features: Tensor | None = None, seed: int = 0) -> None:
        self.inner.reset(prompt, features, seed)

    def observe(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        self.inner.observe(tokens, features)
        self.seen += len(tokens)

    def propose(self, limit: int) -> Draft:
        self.inner.propose(limit)
        right = self.known[self.seen : self.seen + min(4, limit)]
        wrong = [(token + 1) % VOCAB for token in right]
        if not right or self.random.random() < 0.3:
            return Draft.chain(wrong)
        # Two children of each place on the right path, the wrong one first: kept tokens have gaps between them.
        tokens = [token for pair in zip(wrong, right, strict=True) for token in pair]
        parents = [parent for place in range(len(right)) for parent in [2 * place - 1] * 2]
        return Draft(tuple(tokens), tuple(parents), (0.5,) * len(tokens))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_decodes_keep_the_targets_tokens_and_the_heads_memory_stays_right(family: str) -> None:
    step = Step(adapt(library_model(family, num_hidden_layers=LAYERS), packed=False), taps=feature_layers(LAYERS))
    torch.manual_seed(5)
    drafter_head = Eagle3Head(Eagle3Shape(48, 144, 4, 2, 12, 48, VOCAB, VOCAB, theta=100.0)).eval()
    drafter_head.pack()
    with torch.no_grad():
        drafter_head.lm_head.weight.mul_(4)
    drafter_head.set_vocabulary(torch.arange(VOCAB))
    cache: KVCache = step.new_cache(300, Sparsity().attention)
    engine = Decoder(step, cache, stop=StopRule(), clock=time.perf_counter, prefill_chunk=64)
    prefix = engine.prefill(repetitive_prompt(150))
    expected = engine.decode(prefix, NoDrafter(), Sparsity(), 40).output
    for growth in (CHAIN, TREE):
        drafter = Eagle3Drafter(drafter_head, step.weights.embedding, growth)
        decoded = engine.decode(prefix, drafter, Sparsity(), 40)
        assert decoded.output == expected
        assert any(len(taken.draft) == growth.size for taken in decoded.transcript)
        hinted = Hinted(Eagle3Drafter(drafter_head, step.weights.embedding, growth), expected)
        decoded = engine.decode(prefix, hinted, Sparsity(), 40)
        assert decoded.output == expected
        assert decoded.histogram[1] and decoded.histogram[5]
        cache.truncate(0, 0)
        text = [*prefix.prompt, *expected]
        features = step.prefill(torch.tensor(text), cache, 64).features
        assert features is not None
        fresh = Eagle3Drafter(drafter_head, step.weights.embedding, growth)
        fresh.reset(text, features[:-1])
        for other in (drafter, hinted.inner):
            left, right = other.propose(9), fresh.propose(9)
            assert (left.tokens, left.parents) == (right.tokens, right.parents)
            assert left.confidence == pytest.approx(right.confidence, abs=1e-4)
        prefix = engine.prefill(prefix.prompt)
