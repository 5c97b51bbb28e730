"""The replaying drafter: as often right as asked, never beyond the end."""

from collections.abc import Sequence
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.engine.acceptance import accept_greedy
from harness.engine.drafting.draft import Draft
from harness.engine.drafting.expansion import Growth
from harness.engine.drafting.oracle import OracleDrafter

VOCAB = 13
TEXT = [place * place % 11 for place in range(20_000)]


def accepted(draft: Draft, rest: Sequence[int]) -> tuple[int, ...]:
    """Path that a target accepts whose greedy continuation is ``rest`` as long as the draft follows it."""
    choices = [rest[0]]
    for node in range(len(draft)):
        path, place = [], node
        while place >= 0:
            path.append(draft.tokens[place])
            place = draft.parents[place]
        right = path[::-1] == list(rest[: len(path)])
        choices.append(rest[len(path)] if right and len(path) < len(rest) else VOCAB)
    return accept_greedy(draft, choices).path


def check_shape(draft: Draft, growth: Growth, depth: int) -> None:
    """Siblings differ, and depth, children per token, growing tokens per level and size are within their limits."""
    children = draft.children()
    assert draft.depth == max(depth, 0) and len(draft) <= growth.size
    assert all(token in range(VOCAB) for token in draft.tokens)
    levels = [0]
    growing = [0] * (depth + 2)
    for parent in draft.parents:
        levels.append(levels[parent + 1] + 1)
    for place, nodes in enumerate(children):
        assert len(nodes) <= growth.topk
        assert len({draft.tokens[node] for node in nodes}) == len(nodes)
        growing[levels[place]] += bool(nodes)
    assert max(growing, default=0) <= growth.topk


@given(
    depth=st.integers(1, 5),
    topk=st.integers(1, 4),
    total=st.none() | st.integers(1, 30),
    acceptance=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    length=st.integers(0, 30),
    limit=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_drafts_and_forced_paths_are_consistent(
    depth: int, topk: int, total: int | None, acceptance: float, length: int, limit: int, seed: int
) -> None:
    growth = Growth(depth, topk, total)
    real, forced = (OracleDrafter(growth, acceptance, VOCAB, forced) for forced in (False, True))
    for drafter in (real, forced):
        drafter.expect(TEXT[:length])
        drafter.reset([1, 2], seed=seed)
    seen = 0
    while seen <= length:
        rest = TEXT[seen:length]
        draft, pinned = real.propose(limit), forced.propose(limit)
        reach = min(depth, growth.size, limit, len(rest) - 1)
        check_shape(draft, growth, reach)
        if topk > 1 and reach > 0:
            room = sum(topk if level == 0 else topk * topk for level in range(reach))
            assert len(draft) >= min(growth.size, topk * reach) and len(draft) <= room
        assert (draft.tokens, draft.parents, draft.forced) == (pinned.tokens, pinned.parents, None)
        if not rest:
            assert len(draft) == 0 and pinned.forced is None
            break
        path = accepted(draft, rest)
        assert pinned.forced == (path, rest[len(path)])
        assert [draft.tokens[node] for node in path] == rest[: len(path)]
        assert acceptance < 1 or len(path) == max(reach, 0)
        assert acceptance > 0 or not path
        new = rest[: len(path) + 1]
        real.observe(new)
        forced.observe(new)
        seen += len(new)


@pytest.mark.parametrize("topk, total", [(1, None), (3, 14)])
@pytest.mark.parametrize("acceptance", [0.35, 0.6, 0.9])
def test_the_acceptance_is_as_chosen(topk: int, total: int | None, acceptance: float) -> None:
    """Within four standard errors, token by token and in the length of a step."""
    depth = 4
    drafter = OracleDrafter(Growth(depth, topk, total), acceptance, VOCAB, False)
    drafter.expect(TEXT)
    drafter.reset([], seed=5)
    tried = right = seen = 0
    lengths: list[int] = []
    while len(lengths) < 3000:
        rest = TEXT[seen : seen + depth + 1]
        path = accepted(drafter.propose(depth), rest)
        right += len(path)
        tried += min(len(path) + 1, depth)
        lengths.append(len(path) + 1)
        drafter.observe(rest[: lengths[-1]])
        seen += lengths[-1]
    assert abs(right / tried - acceptance) < 4 * sqrt(acceptance * (1 - acceptance) / tried)
    mean = sum(lengths) / len(lengths)
    expected = (1 - acceptance ** (depth + 1)) / (1 - acceptance)
    second = sum((2 * n - 1) * acceptance ** (n - 1) for n in range(1, depth + 2))
    assert abs(mean - expected) < 4 * sqrt((second - expected**2) / len(lengths))


def test_the_right_path_has_no_fixed_place_in_a_tree() -> None:
    drafter = OracleDrafter(Growth(2, 3), 1.0, VOCAB, True)
    drafter.expect(TEXT)
    drafter.reset([], seed=1)
    paths = {draft.forced[0] for draft in (drafter.propose(2) for _ in range(60)) if draft.forced}
    assert {path[0] for path in paths} == {0, 1, 2} and {path[1] for path in paths} == {3, 4, 5}


def test_draws_belong_to_the_seed() -> None:
    drafter = OracleDrafter(Growth(4, 2), 0.5, VOCAB, False)
    drafter.expect(TEXT[:200])

    def drafts(seed: int) -> list[Draft]:
        drafter.reset([3], seed=seed)
        return [drafter.propose(4) for _ in range(20)]

    first = drafts(1)
    assert drafts(2) != first and drafts(1) == first


def test_nonsense_is_refused() -> None:
    for acceptance, vocab in ((1.2, 9), (-0.1, 9), (0.5, 3)):
        with pytest.raises(ValueError, match="must"):
            OracleDrafter(Growth(4, 3), acceptance, vocab, False)
