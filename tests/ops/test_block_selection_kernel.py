"""Block selection by Triton kernels against the naive one: ragged batches, any strides, memory poisoned with NaN."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse.budget import AttentionBudget
from sparse.ops.block_selection import naive
from sparse.scoring import block_scores
from sparse.selection import select_blocks
from sparse.tree import survival_weights
from tests.ops.interpreter import DEVICE, kernel

select = kernel("block_selection", "select")

NAN = float("nan")
SIZE = 16
SWITCHES = [
    AttentionBudget(topk=4),
    AttentionBudget(topk=4, gqa="max", query="mean", sinks=0, window=2),
    AttentionBudget(topk=4, score="bound", query="weighted", sinks=2, window=0),
    AttentionBudget(topk=4, score="bound", gqa="max", sinks=0, window=0),
    AttentionBudget(topk=4, score="gaussian", query="mean", block_size=32),
    AttentionBudget(topk=4, score="gaussian", gqa="max", query="weighted", sinks=3, window=1),
]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that a kernel is given to fill holds NaN or the largest integers before."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Step:
    """Queries and summaries of a ragged batch; whatever a selection must not read is NaN."""

    def __init__(
        self,
        budget: AttentionBudget,
        rows: tuple[int, ...],
        whole: tuple[int, ...],
        sizes: tuple[int, int, int] = (2, 3, 24),
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        small: bool = False,
        capacity: int | None = None,
    ) -> None:
        kv_heads, groups, dim = sizes
        self.budget, self.rows = budget, rows
        self.random, self.small = torch.Generator().manual_seed(seed), small
        self.capacity = max(whole) + 1 if capacity is None else capacity
        self.offsets = torch.tensor((0, *rows)).cumsum(0).to(torch.int32)
        self.starts = torch.tensor([n * budget.block_size + n % budget.block_size for n in whole], dtype=torch.int32)
        self.queries = self._numbers(sum(rows) + 1, kv_heads * groups, dim).to(dtype)
        self.queries[-1] = NAN
        self.weights = torch.full((sum(rows) + 1,), NAN)
        for first, count in zip(self.offsets.tolist(), rows, strict=False):
            if count:
                self.weights[first : first + count] = self.of_rows(count)
        self.summaries = {}
        low, high = (self._numbers(len(rows), kv_heads, dim, self.capacity) for _ in range(2))
        made = {"mean": low, "variance": high.square(), "min": low.minimum(high), "max": low.maximum(high)}
        for name in budget.summaries:
            self.summaries[name] = made[name].to(dtype)
            for sequence, count in enumerate(whole):
                self.summaries[name][sequence, :, :, count:] = NAN

    def _numbers(self, *shape: int) -> Tensor:
        """Normal numbers; small integers where sums are to be exact and scores are to be equal now and then."""
        if self.small:
            return torch.randint(-2, 3, shape, generator=self.random).float()
        return torch.randn(shape, generator=self.random)

    def of_rows(self, count: int) -> Tensor:
        """The weights [count] that the budget's query means."""
        if self.budget.query == "first":
            return torch.tensor([1.0] + [NAN] * (count - 1))
        if self.budget.query == "weighted":
            return survival_weights(count, self.budget.survival, torch.device("cpu"))
        return torch.full((count,), 1.0 / count)

    def select(self, keep: tuple[int, ...], most: int | None = None) -> tuple[list[list[list[int]]], Tensor]:
        """The kernels' choice by sequence and KV head, without what stands for nothing, and all of their blocks."""
        blocks, kept = select(
            self.queries.to(DEVICE),
            {name: summary.to(DEVICE) for name, summary in self.summaries.items()},
            self.budget,
            offsets=self.offsets.to(DEVICE),
            starts=self.starts.to(DEVICE),
            keep=torch.tensor(keep, dtype=torch.int32, device=DEVICE),
            most=max(keep) if most is None else most,
            weights=self.weights.to(DEVICE),
        )
        assert blocks.dtype == kept.dtype == torch.int32
        of_sequences = zip(blocks.tolist(), kept.tolist(), strict=True)
        return [
            [row[:count] for row, count in zip(rows, counts, strict=True)] for rows, counts in of_sequences
        ], blocks.cpu()

    def truth(self, keep: tuple[int, ...]) -> list[list[list[int]]]:
        weights = self.weights.nan_to_num(0.0)
        return naive.select(
            self.queries,
            self.summaries,
            self.budget,
            offsets=self.offsets,
            starts=self.starts,
            keep=torch.tensor(keep),
            weights=weights,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", SWITCHES)
def test_chosen_blocks_are_those_of_the_reference(budget: AttentionBudget, dtype: torch.dtype) -> None:
    step = Step(budget, (3, 1, 9), (19, 4, 41), dtype=dtype, seed=1)
    keep = (5, 4, 12)
    found, _ = step.select(keep)
    assert found == step.truth(keep)
    other = replace(budget, gqa="mean" if budget.gqa == "max" else "max")
    assert found != Step(other, (3, 1, 9), (19, 4, 41), dtype=dtype, seed=1).truth(keep)


@pytest.mark.parametrize("budget", SWITCHES)
def test_the_choice_is_that_of_the_cpu_path(budget: AttentionBudget) -> None:
    """By score, since torch.topk may break ties differently and sums differ in their last bits."""
    step = Step(budget, (4,), (37,), seed=2)
    found, _ = step.select((9,))
    queries = step.queries[:4].view(4, 2, 3, -1).transpose(0, 1).reshape(2, 12, -1)
    summaries = {name: summary[0, :, :, :37].contiguous() for name, summary in step.summaries.items()}
    chosen = select_blocks(block_scores(queries, summaries, budget, groups=3), budget, 9)
    assert found == [[sorted(row) for row in chosen.blocks.tolist()]]


@settings(deadline=None, max_examples=12, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.data())
def test_ties_go_to_the_lower_block(data: st.DataObject) -> None:
    """Scores of small integers are exact, so many are equal and the choice has one answer."""
    sequences = data.draw(st.integers(1, 2))
    rows = tuple(data.draw(st.integers(0, 2)) for _ in range(sequences))
    whole = tuple(data.draw(st.integers(0, 40)) for _ in range(sequences))
    keep = tuple(data.draw(st.integers(2, 44)) for _ in range(sequences))
    score, gqa = data.draw(st.sampled_from(["mean", "bound", "gaussian"])), data.draw(st.sampled_from(["mean", "max"]))
    budget = AttentionBudget(topk=2, score=score, gqa=gqa)
    step = Step(budget, rows, whole, (1, 2, 5), seed=data.draw(st.integers(0, 99)), small=True)
    found, blocks = step.select(keep, most=max(keep) + 1)
    assert found == step.truth(keep)
    for sequence, of_heads in enumerate(found):
        for head, chosen in enumerate(of_heads):
            assert not blocks[sequence, head, len(chosen) :].any()


def test_strides_do_not_matter() -> None:
    step = Step(SWITCHES[2], (2, 3), (21, 33), seed=3)
    expected, _ = step.select((6, 9))
    step.queries = step.queries.transpose(0, 2).contiguous().transpose(0, 2)
    step.summaries["max"] = step.summaries["max"].transpose(2, 3).contiguous().transpose(2, 3)
    step.summaries["min"] = step.summaries["min"].permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    assert not step.summaries["max"].is_contiguous() and not step.summaries["min"].is_contiguous()
    assert step.select((6, 9))[0] == expected == step.truth((6, 9))


def test_the_longest_context_and_scores_of_any_sign() -> None:
    """4096 blocks; their scores are all negative for one KV head, all positive for the other, and wide apart."""
    budget = AttentionBudget(topk=4)
    step = Step(budget, (1,), (4095,), (2, 1, 2), capacity=4096)
    step.queries[0] = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    magnitudes = torch.logspace(-30, 30, 4095)[torch.randperm(4095, generator=step.random)]
    step.summaries["mean"][0, :, 0, :4095] = -magnitudes
    found, _ = step.select((513,))
    order = magnitudes[1:-1].argsort() + 1
    assert found == [[sorted([0, 4094, *order[:511].tolist()]), sorted([0, 4094, *order[-511:].tolist()])]]


def test_sequences_without_rows_or_blocks_keep_none() -> None:
    step = Step(SWITCHES[0], (2, 0, 1), (9, 9, 0), seed=4)
    found, blocks = step.select((4, 4, 4), most=6)
    assert [[len(chosen) for chosen in of_heads] for of_heads in found] == [[4, 4], [0, 0], [0, 0]]
    assert blocks.shape == (3, 2, 6) and not blocks[1:].any()


@pytest.mark.parametrize(
    "change, named",
    [
        ({"score": "oracle"}, "gaussian"),
        ({"query": "max"}, "weighted"),
        ({"heads": "pooled"}, "per_head"),
        ({"low_heads": ((0, 1),)}, "low_heads"),
        ({"score": "bound"}, "min"),
    ],
)
def test_what_the_kernels_do_not_support_is_named(change: dict[str, object], named: str) -> None:
    step = Step(SWITCHES[0], (1,), (9,))
    step.budget = replace(step.budget, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=named):
        step.select((4,))


@pytest.mark.parametrize("queries, most", [((1, 6, 25), 4), ((1, 5, 24), 4), ((1, 6, 24), 0), ((1, 6, 24), 40000)])
def test_sizes_that_do_not_fit_are_refused(queries: tuple[int, ...], most: int) -> None:
    step = Step(SWITCHES[0], (1,), (9,))
    step.queries = torch.zeros(queries)
    with pytest.raises(ValueError):
        step.select((4,), most=most)
