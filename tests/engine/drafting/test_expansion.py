"""Draft trees against a plain EAGLE-2, and the law of drawn ones."""

from collections import Counter
from collections.abc import Sequence
from itertools import permutations, product
from math import prod, sqrt
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.engine.acceptance_sampled import accept_sampled
from harness.engine.drafting.draft import Draft
from harness.engine.drafting.expansion import Growth, grow, room
from harness.engine.sampling import draw

Path = tuple[int, ...]


class Toy:
    """A model whose distribution depends on the whole path; some tokens may be impossible."""

    def __init__(self, vocab: int, seed: int, sharpness: float = 2.0, impossible: float = 0.0) -> None:
        self.vocab, self.seed, self.sharpness, self.impossible = vocab, seed, sharpness, impossible
        self.known: dict[Path, Tensor] = {}

    def after(self, path: Path) -> Tensor:
        if path not in self.known:
            generator = torch.Generator().manual_seed(hash((self.seed, path)) % 2**31)
            logits = torch.randn(self.vocab, generator=generator) * self.sharpness
            hidden = torch.rand(self.vocab, generator=generator) < self.impossible
            hidden[logits.argmax()] = False
            self.known[path] = logits.masked_fill(hidden, float("-inf")).softmax(0)
        return self.known[path]


class Extension:
    """Runs tokens of a toy, and checks what it is asked."""

    def __init__(self, toy: Toy, topk: int) -> None:
        self.toy, self.topk = toy, topk
        self.paths: dict[int, Path] = {-1: ()}
        self.calls = 0

    def __call__(self, numbers: Sequence[int], tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        assert 1 <= len(tokens) <= self.topk
        assert list(numbers) == list(range(len(self.paths) - 1, len(self.paths) - 1 + len(tokens)))
        self.calls += 1
        ran = [(*self.paths[parent], token) for token, parent in zip(tokens, parents, strict=True)]
        self.paths.update(zip(numbers, ran, strict=True))
        assert {len(path) for path in ran} == {self.calls}, "a level runs together"
        return torch.stack([self.toy.after(path) for path in ran])


class Above:
    """A pace that asks for some survival."""

    def __init__(self, least: float) -> None:
        self.least = least

    def goes_on(self, survival: float, expected: float, size: int) -> bool:
        return survival >= self.least


def grown(toy: Toy, growth: Growth, limit: int, **options: object) -> tuple[Draft, Extension]:
    extend = Extension(toy, growth.topk)
    draft = grow(growth, toy.after(()), extend, limit, **options)  # type: ignore[arg-type]
    assert len(extend.paths) <= room(growth)
    return draft, extend


def paths(draft: Draft) -> list[Path]:
    found: list[Path] = []
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def reference(toy: Toy, growth: Growth, limit: int, least: float = 0.0) -> dict[Path, float]:
    """EAGLE-2: expand all levels, then rank everything again."""
    survival: dict[Path, float] = {}
    growing: list[Path] = [()]
    for _ in range(min(growth.depth, limit)):
        level = {}
        for path in growing:
            chances = toy.after(path).tolist()
            for token in sorted(range(toy.vocab), key=lambda token: -chances[token])[: growth.topk]:
                value = survival.get(path, 1.0) * chances[token]
                if chances[token] > 0 and value >= least:
                    level[*path, token] = value
        survival |= level
        growing = sorted(level, key=lambda path: -level[path])[: growth.topk]
    return {path: survival[path] for path in sorted(survival, key=lambda path: -survival[path])[: growth.size]}


growths = st.builds(Growth, st.integers(1, 5), st.integers(1, 4), st.none() | st.integers(1, 25))
toys = st.builds(
    Toy, st.integers(1, 7), st.integers(0, 10**6), st.sampled_from([0.5, 3.0]), st.sampled_from([0.0, 0.5])
)


@settings(deadline=None)
@given(toy=toys, growth=growths, limit=st.integers(0, 6), least=st.sampled_from([0.0, 0.1]))
def test_chosen_trees_hold_the_nodes_of_eagle2(toy: Toy, growth: Growth, limit: int, least: float) -> None:
    draft, extend = grown(toy, growth, limit, pace=Above(least) if least else None)
    expected, found = reference(toy, growth, limit, least), paths(draft)
    assert sorted(found) == sorted(expected)
    assert draft.proposals is None
    for path, confidence in zip(found, draft.confidence, strict=True):
        assert confidence == pytest.approx(float(toy.after(path[:-1])[path[-1]]), abs=1e-7)
    for children in draft.children():
        chances = [draft.confidence[child] for child in children]
        assert chances == sorted(chances, reverse=True)
    deepest = max((len(path) for path in expected), default=0)
    assert deepest - 1 <= extend.calls <= max(0, min(growth.depth, growth.size, limit) - 1)


def test_chains_run_the_model_once_less_than_they_are_long() -> None:
    toy = Toy(5, 3)
    for growth, limit, length in [(Growth(4), 9, 4), (Growth(4), 3, 3), (Growth(6, 1, 2), 9, 2), (Growth(4), 0, 0)]:
        draft, extend = grown(toy, growth, limit)
        assert draft.is_chain
        assert len(draft) == length and extend.calls == max(0, length - 1)
        for place in range(length):
            assert draft.tokens[place] == int(toy.after(draft.tokens[:place]).argmax())


def test_equal_survival_goes_to_the_older_candidates() -> None:
    """Certain tokens below one half each: a child ties with its parent and must not stay without it."""
    toy = Toy(2, 0)
    toy.known = {(): torch.tensor([0.5, 0.5])} | {
        path: torch.tensor([1.0, 0.0]) for size in range(1, 5) for path in product(range(2), repeat=size)
    }
    draft, _ = grown(toy, Growth(4, 2, 5), 9)
    assert sorted(paths(draft)) == [(0,), (0, 0), (0, 0, 0), (1,), (1, 0)]


def test_of_a_parent_and_a_child_that_tie_the_child_gives_way_to_a_better_token() -> None:
    toy = Toy(3, 0)
    toy.known = {
        (): torch.tensor([0.5, 0.3, 0.2]),
        (0,): torch.tensor([0.8, 0.2, 0.0]),
        (1,): torch.tensor([1.0, 0.0, 0.0]),
        (0, 0): torch.tensor([1.0, 0.0, 0.0]),
        (1, 0): torch.tensor([1.0, 0.0, 0.0]),
    }
    assert paths(grown(toy, Growth(3, 2, 4), 9)[0]) == [(0,), (1,), (0, 0), (0, 0, 0)]


def test_tokens_that_cannot_stay_are_not_run() -> None:
    """A flat root and flat tokens below it: three tokens at the first level beat everything at the second."""
    toy = Toy(3, 0)
    toy.known = {(): torch.tensor([0.4, 0.35, 0.25])} | {(token,): torch.full((3,), 1 / 3) for token in range(3)}
    draft, extend = grown(toy, Growth(3, 3, 3), 9)
    assert paths(draft) == [(0,), (1,), (2,)] and extend.calls == 1


def test_a_chain_stops_before_the_model_runs_for_nothing() -> None:
    toy = Toy(4, 1)
    first = float(toy.after(()).max())
    draft, extend = grown(toy, Growth(5), 9, pace=Above(first + 1e-6))
    assert (len(draft), extend.calls) == (0, 0)
    draft, extend = grown(toy, Growth(5), 9, pace=Above(first))
    assert (len(draft), extend.calls) == (1, 1)


def test_a_pace_sees_the_draft_without_the_token() -> None:
    """Also where the token takes another one's place."""
    toy = Toy(3, 0)
    toy.known = {(): torch.tensor([0.6, 0.3, 0.1]), (0,): torch.tensor([0.9, 0.1, 0.0]), (1,): torch.full((3,), 1 / 3)}
    asked: list[tuple[float, float, int]] = []

    class Listening:
        def goes_on(self, survival: float, expected: float, size: int) -> bool:
            asked.append((round(survival, 4), round(expected, 4), size))
            return True

    draft, _ = grown(toy, Growth(2, 2, 2), 9, pace=Listening())
    assert paths(draft) == [(0,), (0, 0)]
    assert asked == [(0.6, 0.0, 0), (0.3, 0.6, 1), (0.54, 0.6, 1)]


@settings(deadline=None)
@given(toy=toys, growth=growths, limit=st.integers(0, 6), seed=st.integers(0, 99), least=st.sampled_from([0.0, 0.1]))
def test_drawn_trees_keep_their_limits_and_name_their_proposals(
    toy: Toy, growth: Growth, limit: int, seed: int, least: float
) -> None:
    pace = Above(least) if least else None
    draft, extend = grown(toy, growth, limit, random=Random(seed), pace=pace)
    again, _ = grown(toy, growth, limit, random=Random(seed), pace=pace)
    assert (draft.tokens, draft.parents) == (again.tokens, again.parents)
    depth = min(growth.depth, growth.size, limit)
    assert len(draft) <= growth.size and draft.depth <= depth and extend.calls <= max(0, depth - 1)
    assert (growth.topk > 1 or draft.is_chain) and (growth.topk > 1 or least or len(draft) == max(0, depth))
    if depth < 1:
        assert draft.proposals is None and not draft.tokens
        return
    assert draft.proposals is not None and draft.proposals.shape == (1 + len(draft), toy.vocab)
    found = [(), *paths(draft)]
    for path, row, children in zip(found, draft.proposals, draft.children(), strict=True):
        tokens = [draft.tokens[child] for child in children]
        assert len(tokens) == len(set(tokens)) <= growth.topk
        if tokens:
            assert torch.equal(row, toy.after(path))
            assert [draft.confidence[child] for child in children] == pytest.approx(row[tokens].tolist())
            assert all(row[tokens] > 0)


def test_impossible_tokens_get_no_place() -> None:
    toy = Toy(4, 0)
    toy.known = {(): torch.tensor([0.0, 0.7, 0.0, 0.3]), (1,): torch.eye(4)[2], (3,): torch.eye(4)[0]}
    for random in (None, Random(2)):
        draft, _ = grown(toy, Growth(2, 3, 12), 9, random=random)
        assert sorted(paths(draft)) == [(1,), (1, 2), (3,), (3, 0)]


def chi_square(counts: Counter[Path], expected: dict[Path, float], draws: int) -> float:
    """Standard deviations of the statistic above its mean, for cells of five or more."""
    cells = {cell: chance for cell, chance in expected.items() if chance * draws >= 5}
    assert sum(cells.values()) > 0.98 and counts.keys() <= expected.keys()
    statistic = sum((counts[cell] - chance * draws) ** 2 / (chance * draws) for cell, chance in cells.items())
    return (statistic - (len(cells) - 1)) / sqrt(2 * (len(cells) - 1))


def test_siblings_are_drawn_one_after_the_other_without_putting_back() -> None:
    weights = [0.5, 0.0, 0.3, 0.15, 0.05]
    expected: dict[Path, float] = {}
    for order in permutations([0, 2, 3, 4], 3):
        left = [1 - sum(weights[token] for token in order[:place]) for place in range(3)]
        expected[order] = prod(weights[token] / rest for token, rest in zip(order, left, strict=True))
    random, draws, root = Random(5), 6000, torch.tensor(weights)
    counts = Counter(grow(Growth(1, 3), root, Extension(Toy(5, 0), 3), 1, random=random).tokens for _ in range(draws))
    assert chi_square(counts, expected, draws) < 4


def first_tokens(draft: Draft, target: Toy, random: Random) -> Path:
    """The first two tokens of a text that begins with the verification of ``draft``."""
    probabilities = torch.stack([target.after(path) for path in [(), *paths(draft)]])
    text = tuple(accept_sampled(draft, probabilities, random).tokens(draft))
    return (*text, draw(target.after(text), random))[:2]


def without_unlikely_siblings(draft: Draft) -> Draft:
    """What ranking drawn siblings by probability would keep; only of drafts of depth one."""
    best = max(range(len(draft)), key=lambda node: draft.confidence[node])
    assert draft.proposals is not None
    return Draft((draft.tokens[best],), (-1,), (draft.confidence[best],), draft.proposals[[0, 1 + best]])


@pytest.mark.parametrize(
    "growth, least, ranked, lossless",
    [
        (Growth(3, 2, 5), 0.0, False, True),
        (Growth(3, 3, 8), 0.15, False, True),
        (Growth(3, 1), 0.4, False, True),
        (Growth(1, 2), 0.0, False, True),
        (Growth(1, 2), 0.0, True, False),
    ],
)
def test_drawn_drafts_leave_the_targets_distribution_alone(
    growth: Growth, least: float, ranked: bool, lossless: bool
) -> None:
    """Two tokens against their exact law; ranking what was drawn fails the same test."""
    drafter, target = Toy(3, 8, 1.0), Toy(3, 9, 1.0)
    expected: dict[Path, float] = {
        (a, b): float(target.after(())[a] * target.after((a,))[b]) for a, b in product(range(3), repeat=2)
    }
    drawing, accepting, draws = Random("draft"), Random("accept"), 4000
    counts: Counter[Path] = Counter()
    for _ in range(draws):
        draft, _ = grown(drafter, growth, 9, random=drawing, pace=Above(least) if least else None)
        counts[first_tokens(without_unlikely_siblings(draft) if ranked else draft, target, accepting)] += 1
    assert (chi_square(counts, expected, draws) < 4) == lossless
