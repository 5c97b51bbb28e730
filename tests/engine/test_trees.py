"""A step over a draft tree against steps over its branches, dense and sparse, in every family."""

import pytest
import torch

from harness.engine.drafting.draft import Draft
from harness.engine.model.families import FAMILIES, adapt
from harness.engine.model.step import Segment, Step
from harness.engine.model.verification import Verification
from sparse.budget import AttentionBudget, FfnBudget, Sparsity
from tests.engine.tiny import library_model, repetitive_prompt

PARENTS = (-1, -1, 0, 0, 1, 2, 2, 5)
DRAFT = Draft((5, 9, 11, 2, 40, 7, 8, 33), PARENTS, (1.0,) * 8)
PROMPT, LIMIT = 300, 1e-4
ROOT = 17


def branch(node: int) -> list[int]:
    """Draft tokens from the root's child to ``node``."""
    path = []
    while node >= 0:
        path.append(node)
        node = PARENTS[node]
    return path[::-1]


@pytest.mark.parametrize("topk", [None, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_branch_gets_the_logits_of_its_own_chain(family: str, topk: int | None) -> None:
    """The root's selection serves the whole tree, so that sparse branches agree with sparse chains too."""
    sparsity = Sparsity(AttentionBudget(topk=topk))
    step = Step(adapt(library_model(family), packed=False))
    cache = step.new_cache(400, sparsity.attention)
    step.prefill(torch.tensor(repetitive_prompt(PROMPT)), cache, 128)
    segment = Segment(0, [ROOT, *DRAFT.tokens], DRAFT.tree())
    found = step.run([segment], cache, Verification(sparsity)).logits
    for node in range(len(DRAFT)):
        path = branch(node)
        cache.truncate(0, PROMPT)
        chain = step.run([Segment(0, [ROOT, *(DRAFT.tokens[one] for one in path)])], cache, Verification(sparsity))
        assert (found[[0, *(one + 1 for one in path)]] - chain.logits).abs().max() < LIMIT


@pytest.mark.parametrize(
    "sparsity", [Sparsity(), Sparsity(AttentionBudget(topk=4)), Sparsity(ffn=FfnBudget("topk", 0.5))]
)
def test_a_kept_branch_goes_on_as_if_it_had_run_alone(sparsity: Sparsity) -> None:
    """Compaction after acceptance: nothing is computed again, and the next step sees the branch alone."""
    step = Step(adapt(library_model("llama"), packed=False, channels=True))
    cache = step.new_cache(600, sparsity.attention)
    prompt, path = repetitive_prompt(509), branch(7)  # the kept tokens lie on both sides of a page border
    step.prefill(torch.tensor(prompt), cache, 128)
    step.run([Segment(0, [ROOT, *DRAFT.tokens], DRAFT.tree())], cache)
    cache.compact(0, 509, [0, *(node + 1 for node in path)])
    found = step.run([Segment(0, [3, 4])], cache, Verification(sparsity)).logits
    alone = step.new_cache(600, sparsity.attention)
    step.prefill(torch.tensor(prompt), alone, 128)
    step.run([Segment(0, [ROOT, *(DRAFT.tokens[node] for node in path)])], alone)
    assert (found - step.run([Segment(0, [3, 4])], alone, Verification(sparsity)).logits).abs().max() < LIMIT
    assert cache.lengths == alone.lengths == [509 + 1 + len(path) + 2]


@pytest.mark.parametrize("query", ["mean", "max", "weighted"])
def test_other_queries_see_the_whole_tree(query: str) -> None:
    """They choose other blocks than the root does, and others again when one leaf of the tree changes."""

    def chosen(query: str, tokens: list[int]) -> dict[int, list[list[int]]]:
        run = Verification(Sparsity(AttentionBudget(topk=4, query=query)))
        step.run([Segment(0, tokens, DRAFT.tree())], cache, run)
        cache.truncate(0, PROMPT)
        return {layer: made[0].blocks.sort().values.tolist() for layer, made in run.memory(0).blocks.items()}

    step = Step(adapt(library_model("llama"), packed=False))
    cache = step.new_cache(400, AttentionBudget(topk=4))
    step.prefill(torch.tensor(repetitive_prompt(PROMPT)), cache, 128)
    tree, other = [ROOT, *DRAFT.tokens], [ROOT, *DRAFT.tokens[:-4], 50, 51, 52, 53]
    assert chosen(query, tree) != chosen("first", tree) == chosen("first", other)
    assert chosen(query, tree) != chosen(query, other)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("topk", [None, 3])
def test_ragged_segments_of_a_batch_equal_each_alone(family: str, topk: int | None) -> None:
    sparsity = Sparsity(AttentionBudget(topk=topk))
    step = Step(adapt(library_model(family), packed=False), taps=(1, 2))
    lengths = (300, 41, 177)
    segments = [Segment(2, [1, 2, 3]), Segment(0, [ROOT, *DRAFT.tokens], DRAFT.tree()), Segment(1, [7])]
    together = step.new_cache(400, sparsity.attention, 3)
    for row, length in enumerate(lengths):
        step.prefill(torch.tensor(repetitive_prompt(length, row)), together, 128, row)
    found = step.run(segments, together, Verification(sparsity))
    assert found.features is not None and found.features.shape == (13, 2 * 48)
    place = 0
    for segment in segments:
        alone = step.new_cache(400, sparsity.attention)
        step.prefill(torch.tensor(repetitive_prompt(lengths[segment.row], segment.row)), alone, 128)
        own = step.run([Segment(0, segment.tokens, segment.tree)], alone, Verification(sparsity))
        part = slice(place, place + len(segment.tokens))
        assert (found.logits[part] - own.logits).abs().max() < LIMIT
        assert own.features is not None and (found.features[part] - own.features).abs().max() < LIMIT
        place = part.stop
    assert together.lengths == [300 + 9, 41 + 1, 177 + 3]


def test_features_are_the_inputs_of_the_tapped_layers() -> None:
    """Against the library's hidden states, in prefill and step."""
    model = library_model("llama")
    tokens = repetitive_prompt(90)
    with torch.inference_mode():
        hidden = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    expected = torch.cat((hidden[1], hidden[2]), -1)[0]
    step = Step(adapt(model, packed=False), taps=(1, 2))
    cache = step.new_cache(100, AttentionBudget())
    prefill = step.prefill(torch.tensor(tokens[:80]), cache, 32).features
    rest = step.run([Segment(0, tokens[80:])], cache).features
    assert prefill is not None and rest is not None
    assert (torch.cat((prefill, rest)) - expected).abs().max() < LIMIT


def test_a_tree_counts_positions_by_depth() -> None:
    """A wide tree near the model's last position fits as long as its paths do."""
    step = Step(adapt(library_model("llama", max_position_embeddings=104), packed=False))
    cache = step.new_cache(200, AttentionBudget())
    step.prefill(torch.tensor(repetitive_prompt(100)), cache, 64)
    wide = Draft(tuple(range(1, 10)), (-1,) * 9, (0.1,) * 9)
    assert step.run([Segment(0, [3, *wide.tokens], wide.tree())], cache).logits.shape == (10, 61)
    cache.truncate(0, 100)
    with pytest.raises(ValueError, match="beyond the model's 104 positions"):
        step.run([Segment(0, [3, *DRAFT.tokens], DRAFT.tree())], cache)
