"""Training of an EAGLE-3 head: the unrolling and its loss against naive references, the loop against itself."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from harness.engine.model import eagle3_training, eagle3_unroll
from harness.engine.model.eagle3 import Eagle3Head, Eagle3Shape, HeadError, feature_layers
from harness.engine.model.eagle3_teacher import Batch, Passage, Teacher, make_batch
from harness.engine.model.eagle3_training import Acceptance, Examination, Training, TrainingPlan, batches, judged
from harness.engine.model.families import adapt
from harness.engine.model.step import Step
from sparse.budget import AttentionBudget
from tests.engine.tiny import VOCAB, library_model

SHAPE = Eagle3Shape(hidden=24, features=72, heads=6, kv_heads=2, head_dim=8, ffn=40, vocab=61, draft_vocab=37)


def random_head(seed=0):
    torch.manual_seed(seed)
    head = Eagle3Head(SHAPE)
    with torch.no_grad():
        for weight in head.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return head


def naive_states(head, embeddings, features, unroll):
    """Each anchor by itself: one growing list of pairs per anchor, whole attention matrix with an explicit mask.

    embeddings [n, hidden], features [n, features]; states of step j at anchor t as result[j - 1][t].
    """
    length, fused = len(features), head.fuse(features)
    found = [dict() for _ in range(unroll)]
    for anchor in range(length - 1):
        states = [fused[place] for place in range(anchor + 1)]
        for step in range(1, min(unroll, length - 1 - anchor) + 1):
            pairs = anchor + step
            mask = torch.full((pairs, pairs), float("-inf")).triu(1)

            def attend(queries, keys, values, mask=mask):
                group = queries.shape[1] // keys.shape[1]
                keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
                chances = (torch.einsum("qhd,khd->hqk", queries, keys) + mask).softmax(-1)
                return torch.einsum("hqk,khd->qhd", chances, values)

            rotary = head.rotary(torch.arange(pairs))
            output = head(embeddings[1 : pairs + 1], torch.stack(states), *rotary, attend)[-1]
            found[step - 1][anchor] = output
            states.append(output)
    return [torch.stack([step[anchor] for anchor in sorted(step)]) for step in found if step]


@pytest.mark.parametrize("mix", ["flash", "explicit"])
@pytest.mark.parametrize("length, unroll", [(2, 3), (5, 1), (5, 7), (40, 4)])
def test_the_unrolling_is_the_head_run_step_by_step(monkeypatch, mix, length, unroll):
    if mix == "explicit":
        monkeypatch.setattr(eagle3_unroll._FlashMix, "apply", eagle3_unroll._explicit_mix)
    head = random_head()
    embeddings, features = torch.randn(3, length, 24), torch.randn(3, length, 72, requires_grad=True)
    found = eagle3_unroll.unrolled(head, embeddings, features, unroll)
    assert [one.shape for one in found] == [(3, length - step, 24) for step in range(1, min(unroll, length - 1) + 1)]
    sum((one * torch.linspace(-1, 1, one.numel()).view_as(one)).sum() for one in found).backward()
    gradients = [features.grad, *(weight.grad for weight in head.midlayer.parameters())]
    features.grad = None
    head.zero_grad()
    own = [naive_states(head, embeddings[row], features[row], unroll) for row in range(3)]
    expected = [torch.stack(rows) for rows in zip(*own, strict=True)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)
    sum((one * torch.linspace(-1, 1, one.numel()).view_as(one)).sum() for one in expected).backward()
    others = [features.grad, *(weight.grad for weight in head.midlayer.parameters())]
    for one, other in zip(gradients, others, strict=True):
        assert (one - other).norm() <= 2e-5 * other.norm() + 2e-5


def test_the_loss_is_a_weighted_cross_entropy_and_has_its_gradients(monkeypatch):
    monkeypatch.setattr(eagle3_unroll, "_ROWS", 7)
    head = random_head()
    labels = torch.randn(2, 11, 37).mul(3).softmax(-1)
    weights = torch.rand(2, 11) * (torch.rand(2, 11) > 0.3)
    results = []
    for naive in (False, True):
        torch.manual_seed(1)
        steps = [torch.randn(2, 11 - step, 24, requires_grad=True) for step in (1, 2, 3)]
        head.zero_grad()
        if naive:
            loss = torch.zeros(())
            for number, states in enumerate(steps):
                each = functional.cross_entropy(
                    head.logits(states).flatten(0, 1), labels[:, number + 1 :].flatten(0, 1), reduction="none"
                )
                weight = weights[:, number + 1 :].flatten()
                loss = loss + 0.7**number * (each * weight).sum() / weight.sum()
        else:
            loss = eagle3_unroll.unrolled_loss(head, steps, labels, weights, 0.7)
        loss.backward()
        results.append([loss.detach(), head.lm_head.weight.grad, head.norm.weight.grad, *(one.grad for one in steps)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def target():
    return library_model("llama", num_hidden_layers=8)


def some_tokens(size=40):
    return torch.randperm(VOCAB, generator=torch.Generator().manual_seed(3))[:size].sort().values


def passage(length=48, seed=0, answer=None):
    generator = torch.Generator().manual_seed(seed)
    phrase = torch.randint(0, VOCAB, (7,), generator=generator).tolist()
    tokens = tuple((phrase * length)[:length])
    return Passage(tokens, len(tokens) if answer is None else answer)


def test_the_teacher_gives_the_features_of_the_step_and_restricted_distributions(target):
    tokens, one = some_tokens(), Passage(tuple(range(3, 51)), 20)
    teacher = Teacher(target, tokens)
    lesson = teacher.teach(make_batch([one], 0.25))
    logits = target(torch.tensor([one.tokens])).logits[0]
    torch.testing.assert_close(lesson.labels[0], logits[:, tokens].softmax(-1), atol=1e-5, rtol=1e-4)
    known = torch.isin(logits.argmax(-1), tokens)
    asked = torch.tensor([0.25] * 19 + [1.0] * 28 + [0.0])
    assert 0 < known.sum() < 48 and torch.equal(lesson.weights[0], asked * known)
    _, features, best = teacher.exam(make_batch([one], 0.25))
    assert torch.equal(best[0], logits.argmax(-1)) and torch.equal(features, lesson.features)
    step = Step(adapt(library_model("llama", num_hidden_layers=8), packed=False), taps=feature_layers(8))
    cache = step.new_cache(64, AttentionBudget())
    tapped = step.prefill(torch.tensor(one.tokens), cache, 17).features
    torch.testing.assert_close(lesson.features[0], tapped, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(lesson.embeddings[0], step.weights.embedding[list(one.tokens)])


def test_padding_weighs_nothing_and_changes_nothing(target):
    teacher, short, long = Teacher(target, some_tokens()), passage(9, 1), passage(30, 2)
    both, alone = teacher.teach(make_batch([short, long], 1.0)), teacher.teach(make_batch([short], 1.0))
    assert both.weights[0, 8:].sum() == 0 and torch.equal(both.weights[0, :9], alone.weights[0])
    torch.testing.assert_close(both.labels[0, :9], alone.labels[0], atol=1e-5, rtol=1e-4)
    head = teacher.new_head(target.config, 0)
    first = [eagle3_unroll.unrolled(head, one.embeddings, one.features, 3) for one in (both, alone)]
    for one, other in zip(*first, strict=True):
        torch.testing.assert_close(one[0, : other.shape[1]], other[0], atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(3, 60), min_size=1, max_size=600), st.integers(20, 200), st.integers(0, 5))
def test_each_pass_has_every_passage_once_in_batches_of_a_size(lengths, tokens, seed):
    given_passages = [Passage(tuple([number] * length), length) for number, length in enumerate(lengths)]
    stream = batches(given_passages, tokens, seed)
    for _ in range(2):
        seen = []
        while len(seen) < len(lengths):
            group = next(stream)
            longest = max(len(one.tokens) for one in group)
            assert len(group) == 1 or longest * len(group) <= tokens
            seen += [one.tokens[0] for one in group]
        assert sorted(seen) == list(range(len(lengths)))
    again = itertools.islice(batches(given_passages, tokens, seed), 3)
    assert list(again) == list(itertools.islice(batches(given_passages, tokens, seed), 3))


def test_acceptance_is_that_of_chains_decoded_one_by_one(target):
    tokens = some_tokens(50)
    teacher, held = Teacher(target, tokens), [passage(33, 4, answer=12), passage(21, 5, answer=3), passage(26, 6)]
    head = teacher.new_head(target.config, 1)
    for held_kind, found in Examination(teacher, held, 40).take(head, 3).items():
        agreed, tried = [0] * 3, [0] * 3
        for one in (one for one in held if one.kind == held_kind):
            embeddings, features, best = teacher.exam(make_batch([one], 0.0))
            states = naive_states(head, embeddings[0], features[0], 3)
            first = one.answer - 2 if held_kind == "answers" else 0
            for anchor in range(first, len(one.tokens) - 2):
                for step in range(min(3, len(one.tokens) - 2 - anchor)):
                    tried[step] += 1
                    guess = tokens[head.logits(states[step][anchor]).argmax()]
                    if guess != best[0, anchor + step + 1]:
                        break
                    agreed[step] += 1
        assert found.accuracy == tuple(a / max(1, b) for a, b in zip(agreed, tried, strict=True))
    assert Acceptance((0.5, 0.5, 0.2)).length == pytest.approx(1 + 0.5 + 0.25 + 0.05)


def trained(target, folder, plan, name="a.pt", seed=0, mark="m", held=None):
    """A training of a few passages; where it ended, its losses, the validated points and the weights kept."""
    teacher = Teacher(target, some_tokens(50))
    head = teacher.new_head(target.config, seed)
    passages = [passage(40, seed) for seed in range(6)]
    losses, points, kept = [], [], []
    training = Training(head, teacher, passages, held or passages[:2], plan, folder / name, mark)
    ended = training.run(
        lambda now: losses.append(now.loss),
        points.append,
        lambda best: kept.append({key: value.clone() for key, value in best.state_dict().items()}),
    )
    return ended, losses, points, kept, head


PLAN = TrainingPlan(steps=6, batch_tokens=100, warmup=2, validate_every=3, unroll=3)


def test_overfitting_lowers_the_loss_and_raises_validation_acceptance(target, tmp_path):
    plan = TrainingPlan(steps=120, batch_tokens=120, warmup=5, validate_every=40, unroll=3, lr=1e-2)
    ended, losses, points, kept, _ = trained(target, tmp_path, plan)
    assert [point.steps for point in points] == [40, 80, 120] and ended.steps == 120
    lesson = Teacher(target, some_tokens(50)).teach(make_batch([passage(40, seed) for seed in range(6)], 1.0))
    known = lesson.labels[:, 2:][lesson.weights[:, 2:] > 0].double()
    least = torch.special.entr(known).sum(-1).mean() * (1 + 0.8 + 0.64)
    assert points[-1].loss - least < 0.3 * (losses[0] - least)
    assert judged(points[-1].acceptance) > judged(points[0].acceptance) + 0.4 and judged(points[-1].acceptance) > 2
    best = list(itertools.accumulate((judged(point.acceptance) for point in points), max))
    assert [point.best for point in points] == best and len(kept) == len(set(best))


def test_an_interrupted_training_ends_like_one_without_a_break(target, tmp_path):
    *_, whole = trained(target, tmp_path, PLAN)
    done = []

    def stop_after_four(now):
        done.append(now.steps)
        if len(done) == 4:
            raise KeyboardInterrupt

    teacher = Teacher(target, some_tokens(50))
    passages = [passage(40, seed) for seed in range(6)]
    broken = Training(teacher.new_head(target.config, 0), teacher, passages, passages[:2], PLAN, tmp_path / "b.pt", "m")
    with pytest.raises(KeyboardInterrupt):
        broken.run(stop_after_four, lambda now: None, lambda best: None)
    ended, losses, *_, resumed = trained(target, tmp_path, PLAN, "b.pt", seed=9)
    assert ended.steps == 6 and len(losses) == 3
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert not list(tmp_path.glob(".*")) and ended.tokens == trained(target, tmp_path, PLAN)[0].tokens


def test_a_finished_training_is_not_repeated_and_another_one_is_refused(target, tmp_path, monkeypatch):
    first = trained(target, tmp_path, PLAN)[0]
    monkeypatch.setattr(eagle3_training, "Examination", lambda *_: pytest.fail("there is nothing left to do"))
    again, losses, *_ = trained(target, tmp_path, PLAN)
    assert again == first and losses == []
    for other in (replace(PLAN, lr=1e-4), PLAN):
        with pytest.raises(HeadError, match="start over"):
            trained(target, tmp_path, other, mark="other" if other is PLAN else "m")
    (tmp_path / "a.pt").write_bytes(b"torn")
    with pytest.raises(HeadError, match="cannot be read"):
        trained(target, tmp_path, PLAN)


def test_rates_rise_fall_and_end_by_step_or_clock():
    plan = TrainingPlan(steps=100, lr=1.0, warmup=10)
    rates = [plan.rate(step, 0) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] and rates[-1] < 0.06
    clock = TrainingPlan(minutes=2, lr=1.0, warmup=0)
    assert clock.done(5, 60) == 0.5 and clock.done(5, 120) == 1 and clock.rate(0, 60) == pytest.approx(0.525)
    assert TrainingPlan(steps=10, minutes=1).done(5, 54) == pytest.approx(0.9)
    assert math.isclose(clock.rate(3, 120), 0.05)


def test_a_batch_without_any_known_position_trains_on_nothing():
    head = random_head()
    steps = eagle3_unroll.unrolled(head, torch.randn(1, 6, 24), torch.randn(1, 6, 72), 2)
    loss = eagle3_unroll.unrolled_loss(head, steps, torch.zeros(1, 6, 37), torch.zeros(1, 6), 0.8)
    loss.backward()
    assert loss.item() == 0 and all(weight.grad.norm() == 0 for weight in head.parameters())
    assert make_batch([Passage((1, 2, 3), 3)], 0.5).weights.tolist() == [[1, 1, 0]]
    assert isinstance(make_batch([Passage((1, 2, 3), 1)], 0.5), Batch)
