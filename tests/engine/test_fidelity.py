"""Replays of a decode, teacher-forced fidelity, and what is observed of the selections."""

from dataclasses import replace

import pytest
import torch

from harness.engine.analysis import SelectionAnalysis
from harness.engine.decoding import Decoded, StepTaken
from harness.engine.drafting.draft import Draft
from harness.engine.drafting.expansion import Growth
from harness.engine.drafting.lookup import LookupDrafter
from harness.engine.fidelity import compare, forced, log_probability
from harness.engine.model.attention import scores
from harness.engine.model.probe import AttentionView, Probe
from sparse.budget import AttentionBudget, Sparsity
from sparse.selection import Selection, select_blocks
from tests.engine.tiny import decoder, library_model, repetitive_prompt

NEW = 30


def test_a_dense_replay_repeats_the_dense_decode() -> None:
    engine = decoder()
    prefix = engine.prefill(repetitive_prompt(300))
    decoded = engine.decode(prefix, LookupDrafter(Growth(6), 3), Sparsity(), NEW)
    logits = engine.replay(prefix, decoded, Sparsity())
    assert [rows.shape[0] for rows in logits] == [1 + len(taken.draft) for taken in decoded.transcript]
    kept = [rows[taken.rows].argmax(-1).tolist() for rows, taken in zip(logits, decoded.transcript, strict=True)]
    assert [token for step in kept for token in step] == decoded.output[1:]
    same = compare(logits, logits, decoded)
    assert (same.tokens, same.agreeing, same.flips, same.steps) == (NEW - 1, NEW - 1, 0, len(decoded.transcript))
    assert same.kl == pytest.approx(0, abs=1e-6)


def test_a_sparse_replay_drifts_and_more_so_with_less_budget() -> None:
    engine = decoder(budget=Sparsity(AttentionBudget(topk=2)))
    prefix = engine.prefill(repetitive_prompt(600))
    decoded = engine.decode(prefix, LookupDrafter(Growth(6), 3), Sparsity(), NEW)
    dense = engine.replay(prefix, decoded, Sparsity())
    kl = {}
    for topk in (2, 12, 34):
        sparse = engine.replay(prefix, decoded, Sparsity(AttentionBudget(topk=topk)))
        kl[topk] = compare(dense, sparse, decoded).kl
    assert kl[2] > kl[12] > kl[34] > 0


def test_fidelity_counts_what_it_says() -> None:
    """Two steps by hand: three kept tokens, one of them wrong under sparsity, which also shortens the draft."""
    dense = [torch.eye(4)[[1, 2]] * 9, torch.eye(4)[[3]] * 9]
    sparse = [torch.eye(4)[[3, 2]] * 9, torch.eye(4)[[3]] * 9]
    found = compare(
        dense,
        sparse,
        Decoded([0, 1, 2, 3], transcript=[StepTaken(Draft.chain([1]), (0,), 2), StepTaken(Draft(), (), 1)]),
    )
    assert (found.tokens, found.agreeing, found.steps, found.flips) == (3, 2, 2, 1)
    p, q = torch.softmax(dense[0][0], -1), torch.softmax(sparse[0][0], -1)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)


def test_selections_are_observed_as_a_direct_computation_says() -> None:
    budget = AttentionBudget(topk=5, query="first")
    engine = decoder(budget=Sparsity(budget))
    prefix = engine.prefill(repetitive_prompt(400))
    decoded = engine.decode(prefix, LookupDrafter(Growth(6), 3), Sparsity(), NEW)
    views: list[tuple[int, AttentionView, Selection | None]] = []

    class Both(Probe):
        def selection(self, layer: int, view: AttentionView, selection: Selection | None) -> Selection | None:
            views.append((layer, view, selection))
            return observed.selection(layer, view, selection)

    observed = SelectionAnalysis(budget, 3, every=1)
    engine.replay(prefix, decoded, Sparsity(budget), Both())
    found = observed.means()
    assert found["steps"] == len(decoded.transcript)
    own = {}
    overlaps: dict[tuple[int, int], list[float]] = {}
    for number, (layer, view, selection) in enumerate(views):
        rows, blocks = view.queries.shape[1] // view.groups, view.start // 16
        sets = []
        for row in range(rows):
            alone = replace(view, queries=view.queries[:, row * view.groups : (row + 1) * view.groups])
            chosen = select_blocks(scores(budget, alone), budget, 5)
            sets.append({(head, block) for head in range(2) for block in chosen.blocks[head].tolist()})
        own[number // 3, layer] = sets[0]
        assert selection is not None and sets[0] == set(map(tuple, selection.mask(blocks).nonzero().tolist()))
        for first in range(rows):
            for second in range(first + 1, rows):
                overlaps.setdefault((layer, second - first), []).append(len(sets[first] & sets[second]) / 10)
    for (layer, distance), values in overlaps.items():
        assert found["overlap"][layer][distance - 1] == pytest.approx(sum(values) / len(values), abs=1e-4)
    count = len(views) // 3
    for left in range(3):
        for right in range(3):
            both = [len(own[n, left] & own[n, right]) / len(own[n, left] | own[n, right]) for n in range(count)]
            assert found["similarity"][left][right] == pytest.approx(sum(both) / count, abs=1e-4)
    for layer in range(3):
        assert 0 < found["recall"][layer] <= found["oracle_recall"][layer] + 1e-4 <= 1.0002


def test_oracle_selection_has_the_oracle_s_recall() -> None:
    """With oracle scores, mean over all rows and heads, nothing better of that size exists."""
    budget = AttentionBudget(topk=5, score="oracle", query="mean")
    engine = decoder(budget=Sparsity(budget))
    prefix = engine.prefill(repetitive_prompt(400))
    decoded = engine.decode(prefix, LookupDrafter(Growth(6), 3), Sparsity(), 8)
    observed = SelectionAnalysis(budget, 3, every=1)
    engine.replay(prefix, decoded, Sparsity(budget), observed)
    found = observed.means()
    assert found["recall"] == pytest.approx(found["oracle_recall"], abs=1e-4)


def test_short_contexts_have_nothing_to_observe() -> None:
    budget = AttentionBudget(topk=30)
    engine = decoder(budget=Sparsity(budget))
    prefix = engine.prefill(repetitive_prompt(100))
    decoded = engine.decode(prefix, LookupDrafter(Growth(6), 3), Sparsity(), 8)
    observed = SelectionAnalysis(budget, 3)
    engine.replay(prefix, decoded, Sparsity(budget), observed)
    found = observed.means()
    assert found["steps"] == 0 and found["recall"] == [None] * 3


@pytest.mark.parametrize("depth", [0, 1, 6, 50])
def test_a_forced_decode_shows_every_token_once(depth: int) -> None:
    tokens = list(range(3, 20))
    made = forced(tokens, depth)
    seen, position = [tokens[0]], 0
    for taken in made.transcript:
        assert len(taken.draft) <= depth and taken.kept == len(taken.draft) + 1
        assert list(taken.draft.tokens) == tokens[position + 1 : position + 1 + len(taken.draft)]
        seen += tokens[position + 1 : position + 1 + taken.kept]
        position += taken.kept
    assert seen == made.output == tokens
    assert forced(tokens[:1], depth).transcript == []


@pytest.mark.parametrize("depth", [0, 4])
def test_the_log_probability_is_the_librarys(depth: int) -> None:
    prompt, text = repetitive_prompt(90), repetitive_prompt(17, seed=4)
    with torch.inference_mode():
        logits = library_model("llama")(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
    wanted = torch.log_softmax(logits, -1).gather(1, torch.tensor(text)[:, None]).sum().item()
    engine = decoder()
    prefix = engine.prefill(prompt)
    found = log_probability(text, prefix.logits, engine.replay(prefix, forced(text, depth), Sparsity()))
    assert found == pytest.approx(wanted, rel=1e-5)


def test_the_log_probability_sees_the_sparsity_of_steps_as_long_as_real_ones() -> None:
    """With fewer blocks it moves away from dense; where steps start, and so which token picks the blocks, matters."""
    engine = decoder(budget=Sparsity(AttentionBudget(topk=2)))
    prompt, text = repetitive_prompt(500), repetitive_prompt(21, seed=4)
    prefix = engine.prefill(prompt)

    def found(topk: int | None, depth: int) -> float:
        sparsity = Sparsity() if topk is None else Sparsity(AttentionBudget(topk=topk))
        return log_probability(text, prefix.logits, engine.replay(prefix, forced(text, depth), sparsity))

    dense = found(None, 6)
    assert found(None, 0) == pytest.approx(dense, rel=1e-5)
    assert abs(found(2, 6) - dense) > abs(found(24, 6) - dense) > 0
    assert abs(found(2, 6) - found(2, 0)) > 1e-3
    assert found(None, 6) == dense
