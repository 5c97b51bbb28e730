"""Trees of draft tokens against following the parents by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse.budget import AttentionBudget
from sparse.scoring import block_scores
from sparse.tree import Tree, survival_weights

PARENTS = st.integers(0, 2**32 - 1).map(
    lambda seed: [
        torch.randint(-1, node, (), generator=torch.Generator().manual_seed(seed)).item() for node in range(9)
    ]
)


def ancestors(parents: list[int], node: int) -> list[int]:
    """Token numbers from the root, 0, to draft token ``node``."""
    path = []
    while node >= 0:
        path.append(node + 1)
        node = parents[node]
    return [0, *reversed(path)]


@given(parents=PARENTS)
def test_depths_and_sight_follow_the_parents(parents: list[int]) -> None:
    tree = Tree(parents)
    paths = [[0], *(ancestors(parents, node) for node in range(len(parents)))]
    assert tree.depths.tolist() == [len(path) - 1 for path in paths]
    assert [row.nonzero().flatten().tolist() for row in tree.visible] == [sorted(path) for path in paths]
    mask = tree.mask(3, torch.float32)
    assert torch.equal(mask == 0, tree.visible.repeat_interleave(3, dim=0)) and mask.min() == float("-inf")
    assert tree.mask(3, torch.float32) is mask


def test_a_parent_must_stand_before_its_child() -> None:
    for parents in ([0], [-1, 1], [-2], [-1, 0, 5]):
        with pytest.raises(ValueError, match="stand before"):
            Tree(parents)


def test_a_chain_as_a_tree_counts_the_same() -> None:
    chain = survival_weights(5, 0.6, torch.device("cpu"))
    assert torch.allclose(chain, survival_weights(5, 0.6, torch.device("cpu"), Tree([-1, 0, 1, 2])))
    assert chain.sum() == pytest.approx(1) and (chain[1:] / chain[:-1]).tolist() == pytest.approx([0.6] * 4)


def test_weighted_queries_count_a_token_by_its_depth() -> None:
    """Three children of the root count alike; as a chain they would not."""
    torch.manual_seed(2)
    budget = AttentionBudget(topk=2, query="weighted", survival=0.5)
    queries, means = torch.randn(1, 4, 8), torch.randn(1, 8, 6)
    found = block_scores(queries, {"mean": means}, budget, 1, Tree([-1, -1, -1]))
    weights = torch.tensor([1, 0.5, 0.5, 0.5]) / 2.5
    assert torch.allclose(found, (weights @ queries[0] @ means[0])[None], atol=1e-6)
    assert not torch.allclose(found, block_scores(queries, {"mean": means}, budget, 1))
