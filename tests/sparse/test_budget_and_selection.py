"""Budgets refuse nonsense; scores and selections agree with their definitions, compared by score and not by index."""

import itertools

import pytest
import torch

from sparse.budget import AttentionBudget, FfnBudget, MoeBudget, ReuseBudget, Sparsity
from sparse.scoring import block_scores, mass_scores, summarise_blocks
from sparse.selection import Selection, select_blocks

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
        {"topk": 4, "heads": "shared"},
        {"topk": 4, "survival": 0.0},
        {"topk": 4, "l0": 1024},
        {"l0": 16},
        {"l0": 1024, "rho": 1.0},
    ],
)
def test_nonsense_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        AttentionBudget(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "kind, values",
    [
        (FfnBudget, {"rule": "random"}),
        (FfnBudget, {"rule": "topk", "keep": 0.0}),
        (FfnBudget, {"rule": "topk", "keep": 1.5}),
        (FfnBudget, {"rule": "threshold", "tau": -0.1}),
        (FfnBudget, {"rule": "quantile"}),
        (FfnBudget, {"rule": "topk", "mask": "last"}),
        (MoeBudget, {"rule": "random"}),
        (MoeBudget, {"rule": "median_ratio", "m_max": 2, "betas": ((0.1,),)}),
        (MoeBudget, {"rule": "topp", "p": 0.0}),
        (MoeBudget, {"rule": "floor", "weight_floor": 1.0}),
        (MoeBudget, {"rule": "topk", "k": 0}),
        (MoeBudget, {"union": 0}),
        (MoeBudget, {"union": 4, "outside": "keep"}),
        (ReuseBudget, {"anchors": ()}),
        (ReuseBudget, {"anchors": (3, 1)}),
        (ReuseBudget, {"anchors": (0, 0)}),
        (ReuseBudget, {"skip": ("head",), "skip_layers": (1,)}),
        (ReuseBudget, {"skip": ("ffn",), "skip_layers": (-1,)}),
        (ReuseBudget, {"refresh": 0}),
    ],
)
def test_nonsense_on_the_other_axes_is_refused(kind: type, values: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        kind(**values)


def test_the_dense_budget_skips_nothing() -> None:
    dense = AttentionBudget()
    assert dense.is_dense and not dense.skips(0, 10**6) and dense.summaries == ()
    assert Sparsity().is_dense and Sparsity().shares_nothing


def test_a_budget_skips_only_where_it_leaves_something_out() -> None:
    budget = AttentionBudget(topk=4, dense_layers=2)
    assert [budget.skips(layer, 5 * 16) for layer in range(4)] == [False, False, True, True]
    assert not budget.skips(3, 5 * 16 - 1)


@pytest.mark.parametrize("length, kept", [(1024, 1024), (1039, 1024), (2048, 1280), (2063, 1280), (9000, 3008)])
def test_a_piecewise_budget_follows_the_formula_in_whole_blocks(length: int, kept: int) -> None:
    """floor((length - l0) * rho + l0) tokens, rounded down to blocks of 16 (METHOD section 2)."""
    budget = AttentionBudget(l0=1024, rho=0.25)
    assert budget.blocks(length) * 16 == kept
    assert budget.skips(0, length) == (kept < length // 16 * 16)


def queries_and_keys() -> tuple[torch.Tensor, torch.Tensor]:
    queries = torch.randn(HEADS, ROWS * GROUPS, DIM)
    return queries, torch.randn(HEADS, DIM, BLOCKS * SIZE)


@pytest.mark.parametrize(
    "score, query, gqa",
    list(itertools.product(("mean", "bound"), ("first", "mean", "max", "weighted"), ("mean", "max"))),
)
def test_scores_follow_their_definition(score: str, query: str, gqa: str) -> None:
    torch.manual_seed(0)
    queries, keys = queries_and_keys()
    budget = AttentionBudget(topk=4, score=score, query=query, gqa=gqa)
    summaries = {name: summarise_blocks(keys, SIZE, name) for name in budget.summaries}
    found = block_scores(queries, summaries, budget, GROUPS)
    for head in range(HEADS):
        rows = queries[head].view(ROWS, GROUPS, DIM)
        falling = torch.tensor([0.7**row for row in range(ROWS)])
        weighted = (rows * falling[:, None, None]).sum(0, keepdim=True) / falling.sum()
        asked = {"first": rows[:1], "mean": rows.mean(0, keepdim=True), "max": rows, "weighted": weighted}[query]
        for block in range(BLOCKS):
            inside = keys[head, :, block * SIZE : (block + 1) * SIZE]
            if score == "mean":
                each = asked @ inside.mean(1)
            elif score == "gaussian":
                spread = ((inside - inside.mean(1, keepdim=True)) ** 2).mean(1)
                each = asked @ inside.mean(1) + 0.5 * (asked**2) @ spread
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


def test_the_gaussian_score_estimates_the_mass_of_normal_keys() -> None:
    """For many normal keys it is close to log mean exp(q . k), which the mean alone underestimates."""
    torch.manual_seed(9)
    keys = torch.randn(1, DIM, 64 * 512).reshape(1, DIM, -1) * torch.rand(1, DIM, 1)
    queries = torch.randn(1, 1, DIM)
    budget = AttentionBudget(topk=4, score="gaussian", block_size=64)
    blocks = {name: summarise_blocks(keys, 64 * 512, name) for name in budget.summaries}
    truth = torch.logsumexp(queries @ keys, -1).item() - torch.tensor(64.0 * 512).log().item()
    assert block_scores(queries, blocks, budget, 1).item() == pytest.approx(truth, abs=0.05)
    assert block_scores(queries, blocks, AttentionBudget(topk=4), 1).item() < truth - 0.1


@pytest.mark.parametrize("sinks, window, topk", [(0, 0, 1), (1, 1, 2), (1, 1, 5), (2, 3, 7), (0, 2, BLOCKS - 1)])
def test_selection_takes_forced_blocks_and_then_the_best(sinks: int, window: int, topk: int) -> None:
    torch.manual_seed(2)
    scores = torch.randn(HEADS, BLOCKS)
    budget = AttentionBudget(topk=topk, sinks=sinks, window=window)
    chosen = select_blocks(scores.clone(), budget, topk)
    assert chosen.kept == HEADS * topk and chosen.valid is None
    forced = [*range(sinks), *range(BLOCKS - window, BLOCKS)]
    for head in range(HEADS):
        picked = chosen.blocks[head].tolist()
        assert len(set(picked)) == topk and set(forced) <= set(picked)
        free = sorted((scores[head, block].item() for block in range(BLOCKS) if block not in forced), reverse=True)
        taken = sorted((scores[head, block].item() for block in picked if block not in forced), reverse=True)
        assert taken == free[: topk - len(forced)]


def picked(chosen: Selection, head: int) -> set[int]:
    """Valid blocks of one head, each of them once."""
    valid = torch.ones_like(chosen.blocks[head], dtype=torch.bool) if chosen.valid is None else chosen.valid[head]
    found = chosen.blocks[head][valid].tolist()
    assert len(set(found)) == len(found)
    assert chosen.mask(BLOCKS)[head].nonzero().flatten().tolist() == sorted(found)
    return set(found)


@pytest.mark.parametrize("heads", ["per_head", "pooled"])
@pytest.mark.parametrize("sinks, window, keep", [(1, 1, 4), (0, 0, 3), (2, 1, 3)])
def test_low_heads_keep_the_forced_blocks_only(heads: str, sinks: int, window: int, keep: int) -> None:
    torch.manual_seed(4)
    scores = torch.randn(HEADS, BLOCKS)
    budget = AttentionBudget(topk=keep, sinks=sinks, window=window, heads=heads)
    chosen = select_blocks(scores.clone(), budget, keep, low=(1,))
    forced = {*range(sinks), *range(BLOCKS - window, BLOCKS)}
    assert picked(chosen, 1) == (forced or {int(scores[1].argmax())})
    least = max(1, len(forced))
    assert chosen.kept == sum(len(picked(chosen, head)) for head in range(HEADS)) == (HEADS - 1) * keep + least
    if heads == "per_head":
        assert len(picked(chosen, 0)) == len(picked(chosen, 2)) == keep


def test_pooled_budgets_go_where_attention_is_flat() -> None:
    """A head whose softmax is peaked in one block gives budget away; the total stays what it was."""
    torch.manual_seed(5)
    scores = torch.zeros(HEADS, BLOCKS)
    scores[0, 4] = 20.0
    scores[1:] += 0.01 * torch.randn(HEADS - 1, BLOCKS)
    budget = AttentionBudget(topk=5, heads="pooled")
    chosen = select_blocks(scores.clone(), budget, 5)
    assert picked(chosen, 0) == {0, 4, BLOCKS - 1}
    assert sum(len(picked(chosen, head)) for head in range(HEADS)) == chosen.kept == HEADS * 5
    probabilities = torch.softmax(scores, -1)
    rest = {(head, block) for head in range(HEADS) for block in range(1, BLOCKS - 1)}
    taken = {(head, block) for head in range(HEADS) for block in picked(chosen, head) if 0 < block < BLOCKS - 1}
    assert min(probabilities[place] for place in taken) >= max(probabilities[place] for place in rest - taken)


def test_heads_take_over_the_blocks_of_the_heads_they_are_mapped_to() -> None:
    chosen = select_blocks(torch.randn(HEADS, BLOCKS), AttentionBudget(topk=4), 4, low=(2,))
    mapped = chosen.of_heads((2, 2, 0))
    assert picked(mapped, 0) == picked(mapped, 1) == picked(chosen, 2) and picked(mapped, 2) == picked(chosen, 0)
    assert mapped.kept == 2 + 2 + 4


@pytest.mark.parametrize("query, gqa", list(itertools.product(("first", "mean", "max", "weighted"), ("mean", "max"))))
def test_oracle_scores_are_reduced_like_the_others(query: str, gqa: str) -> None:
    torch.manual_seed(6)
    mass = torch.softmax(torch.randn(HEADS, ROWS * GROUPS, BLOCKS), -1)
    found = mass_scores(mass, AttentionBudget(topk=4, score="oracle", query=query, gqa=gqa), GROUPS)
    falling = torch.tensor([0.7**row for row in range(ROWS)])
    for head in range(HEADS):
        rows = mass[head].view(ROWS, GROUPS, BLOCKS)
        weighted = (rows * falling[:, None, None]).sum(0) / falling.sum()
        asked = {"first": rows[0], "mean": rows.mean(0), "max": rows.amax(0), "weighted": weighted}[query]
        assert torch.allclose(found[head], asked.mean(0) if gqa == "mean" else asked.amax(0), atol=1e-6)


def test_there_must_be_something_to_select() -> None:
    scores = torch.randn(HEADS, 4)
    for keep in (4, 9, 1):
        with pytest.raises(ValueError, match="nothing to select"):
            select_blocks(scores, AttentionBudget(topk=4), keep)


def test_an_unknown_summary_is_refused() -> None:
    with pytest.raises(ValueError, match="median"):
        summarise_blocks(torch.zeros(1, 2, 16), 16, "median")
