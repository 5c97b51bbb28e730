"""Budgets refuse nonsense; scores and selections agree with their definitions, compared by score and not by index."""

import itertools

import pytest
import torch

from sparse.budget import AttentionBudget
from sparse.scoring import block_scores, summarise_blocks
from sparse.selection import select_blocks

HEADS, GROUPS, ROWS, DIM, BLOCKS, SIZE = 3, 2, 5, 8, 13, 16


@pytest.mark.parametrize(
    "values",
    [
        {"topk": 0},
        {"topk": 1, "sinks": 1, "window": 1},
        {"topk": 4, "block_size": 24},
        {"topk": 4, "sinks": -1},
        {"topk": 4, "score": "median"},
        {"topk": 4, "query": "last"},
        {"topk": 4, "gqa": "min"},
    ],
)
def test_nonsense_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        AttentionBudget(**values)  # type: ignore[arg-type]


def test_the_dense_budget_skips_nothing() -> None:
    dense = AttentionBudget.dense()
    assert dense.is_dense and not dense.skips(0, 10**6) and dense.summaries == ()


def test_a_budget_skips_only_where_it_leaves_something_out() -> None:
    budget = AttentionBudget(topk=4, dense_layers=2)
    assert [budget.skips(layer, 5) for layer in range(4)] == [False, False, True, True]
    assert not budget.skips(3, 4)


def queries_and_keys() -> tuple[torch.Tensor, torch.Tensor]:
    queries = torch.randn(HEADS, ROWS * GROUPS, DIM)
    return queries, torch.randn(HEADS, DIM, BLOCKS * SIZE)


@pytest.mark.parametrize(
    "score, query, gqa", list(itertools.product(("mean", "bound"), ("first", "mean", "max"), ("mean", "max")))
)
def test_scores_follow_their_definition(score: str, query: str, gqa: str) -> None:
    torch.manual_seed(0)
    queries, keys = queries_and_keys()
    budget = AttentionBudget(topk=4, score=score, query=query, gqa=gqa)
    summaries = {name: summarise_blocks(keys, SIZE, name) for name in budget.summaries}
    found = block_scores(queries, summaries, budget, GROUPS)
    for head in range(HEADS):
        rows = queries[head].view(ROWS, GROUPS, DIM)
        asked = {"first": rows[:1], "mean": rows.mean(0, keepdim=True), "max": rows}[query]
        for block in range(BLOCKS):
            inside = keys[head, :, block * SIZE : (block + 1) * SIZE]
            if score == "mean":
                each = asked @ inside.mean(1)
            else:
                low, high = inside.min(1).values, inside.max(1).values
                each = torch.maximum(asked * low, asked * high).sum(-1)
            each = each.max(0).values
            expected = each.mean() if gqa == "mean" else each.max()
            assert found[head, block].item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_bound_is_above_every_product_in_the_block() -> None:
    torch.manual_seed(1)
    queries, keys = queries_and_keys()
    budget = AttentionBudget(topk=4, score="bound", query="max", gqa="max")
    summaries = {name: summarise_blocks(keys, SIZE, name) for name in budget.summaries}
    products = (queries @ keys).view(HEADS, -1, BLOCKS, SIZE).amax(dim=(1, 3))
    assert (block_scores(queries, summaries, budget, GROUPS) >= products - 1e-5).all()


@pytest.mark.parametrize("sinks, window, topk", [(0, 0, 1), (1, 1, 2), (1, 1, 5), (2, 3, 7), (0, 2, BLOCKS - 1)])
def test_selection_takes_forced_blocks_and_then_the_best(sinks: int, window: int, topk: int) -> None:
    torch.manual_seed(2)
    scores = torch.randn(HEADS, BLOCKS)
    budget = AttentionBudget(topk=topk, sinks=sinks, window=window)
    chosen = select_blocks(scores.clone(), budget)
    forced = [*range(sinks), *range(BLOCKS - window, BLOCKS)]
    for head in range(HEADS):
        picked = chosen[head].tolist()
        assert len(set(picked)) == topk and set(forced) <= set(picked)
        free = sorted((scores[head, block].item() for block in range(BLOCKS) if block not in forced), reverse=True)
        taken = sorted((scores[head, block].item() for block in picked if block not in forced), reverse=True)
        assert taken == free[: topk - len(forced)]


def test_there_must_be_something_to_select() -> None:
    scores = torch.randn(HEADS, 4)
    for topk in (4, 9, None):
        with pytest.raises(ValueError, match="nothing to select"):
            select_blocks(scores, AttentionBudget(topk=topk))


def test_an_unknown_summary_is_refused() -> None:
    with pytest.raises(ValueError, match="median"):
        summarise_blocks(torch.zeros(1, 2, 16), 16, "median")
