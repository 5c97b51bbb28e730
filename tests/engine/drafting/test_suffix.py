"""The suffix automaton and the drafts from it against naive scanning."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.engine.drafting.automaton import Place, SuffixAutomaton
from harness.engine.drafting.draft import Draft
from harness.engine.drafting.expansion import Growth
from harness.engine.drafting.pace import ConfidencePace, prune
from harness.engine.drafting.suffix import SharedHistory, SuffixDrafter

TEXT = st.lists(st.integers(0, 2), max_size=24)
OUTPUT = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=6)


def ends(text: list[int], piece: list[int]) -> list[int]:
    """Positions of ``text`` behind each occurrence of ``piece``."""
    size = len(piece)
    return [end for end in range(size, len(text) + 1) if text[end - size : end] == piece]


def check_counts(automaton: SuffixAutomaton, text: list[int], longest: int) -> None:
    """Every string of up to ``longest`` tokens is found with its count and latest end, and no other one."""
    assert automaton.size == len(text)
    pieces = {tuple(text[i : i + n]) for n in range(1, longest + 1) for i in range(len(text) - n + 1)}
    for piece in pieces | {(2, 1, 2, 0)[:longest], (9,)}:
        place: Place | None = Place(0, 0)
        for token in piece:
            place = automaton.follow(place, token) if place is not None else None
        found = ends(text, list(piece))
        assert (place is not None) == bool(found), piece
        if place is not None:
            assert place.length == len(piece)
            assert automaton.counts[place.state] == len(found), piece
            assert automaton.latest[place.state] == found[-1], piece
        if place is not None and len(piece) < longest:
            following = {f.token: (f.times, f.latest) for f in automaton.followers(place)}
            behind = Counter(text[end] for end in found if end < len(text))
            assert {token: times for token, (times, _) in following.items()} == behind
            for token, (_, latest) in following.items():
                assert latest == max(end for end in found if end < len(text) and text[end] == token) + 1


def naive_suffix(text: list[int], longest: int) -> int:
    """Tokens of the longest suffix that also occurs earlier."""
    for size in range(min(longest, len(text)), 0, -1):
        if len(ends(text, text[len(text) - size :])) > 1:
            return size
    return 0


@given(text=TEXT, longest=st.integers(1, 6))
def test_counts_and_suffixes_equal_a_scan(text: list[int], longest: int) -> None:
    automaton = SuffixAutomaton(longest)
    for size, token in enumerate(text, 1):
        automaton.extend(token)
        suffix = automaton.suffix()
        assert suffix.length == naive_suffix(text[:size], longest)
        assert automaton.latest[suffix.state] == size if suffix.length else suffix.state == 0
    check_counts(automaton, text, longest)


@given(prompt=TEXT, tails=st.lists(TEXT, max_size=3), longest=st.integers(1, 5))
def test_a_rollback_takes_back_everything(prompt: list[int], tails: list[list[int]], longest: int) -> None:
    automaton = SuffixAutomaton(longest)
    for token in prompt:
        automaton.extend(token)
    automaton.checkpoint()
    for tail in tails:
        for token in tail:
            automaton.extend(token)
        check_counts(automaton, prompt + tail, longest)
        assert automaton.suffix().length == naive_suffix(prompt + tail, longest)
        automaton.rollback()
        check_counts(automaton, prompt, longest)
        assert automaton.suffix().length == naive_suffix(prompt, longest)


@given(text=TEXT, context=TEXT, longest=st.integers(1, 6))
def test_a_match_is_the_longest_known_suffix(text: list[int], context: list[int], longest: int) -> None:
    automaton = SuffixAutomaton(longest)
    for token in text:
        automaton.extend(token)
    known = [n for n in range(1, min(longest, len(context)) + 1) if ends(text, context[len(context) - n :])]
    assert automaton.match(context).length == max(known, default=0)


@given(text=st.lists(st.integers(0, 1), min_size=1, max_size=20), more=st.lists(st.integers(0, 1), max_size=20))
def test_a_place_outlives_extensions(text: list[int], more: list[int]) -> None:
    """Places are trimmed when states split: another sequence's drafter may hold one while the history grows."""
    automaton = SuffixAutomaton(4)
    for token in text:
        automaton.extend(token)
    place = automaton.match(text)
    piece = text[len(text) - place.length :]
    for token in more:
        automaton.extend(token)
    trimmed = automaton.trim(place)
    assert automaton.counts[trimmed.state] == len(ends(text + more, piece))


def naive_draft(text: list[int], path: list[int], max_match: int) -> tuple[int, Counter[int], dict[int, int]]:
    """Context length, how often each token followed the longest context with followers, and where it did last."""
    whole = text + path
    for size in range(min(max_match, len(whole)), 0, -1):
        behind = [end for end in ends(text, whole[len(whole) - size :]) if end < len(text)]
        if behind:
            return size, Counter(text[end] for end in behind), {text[end]: end for end in behind}
    return 0, Counter(), {}


def check_draft(draft: Draft, text: list[int], growth: Growth, max_match: int, factor: float, limit: int) -> None:
    """Every token is a top follower of its context, in order and with its share, and no better token was left out."""
    match = naive_draft(text, [], max_match)[0]
    depth = min(growth.depth, limit, int(factor * match))
    assert draft.depth <= depth and len(draft) <= growth.size
    assert (len(draft) > 0) == (depth > 0)
    paths: list[list[int]] = [[]]
    survivals = [1.0]
    for token, parent, chance in zip(draft.tokens, draft.parents, draft.confidence, strict=True):
        paths.append([*paths[parent + 1], token])
        survivals.append(survivals[parent + 1] * chance)
    assert survivals[1:] == sorted(survivals[1:], reverse=True)
    for place, children in enumerate(draft.children()):
        context, times, latest = naive_draft(text, paths[place], max_match)
        ranked = sorted(times, key=lambda token: (times[token], latest[token]), reverse=True)[: growth.topk]
        assert [draft.tokens[child] for child in children] == ranked[: len(children)]
        for child in children:
            chance = times[draft.tokens[child]] / (sum(times.values()) + 2 / context)
            assert draft.confidence[child] == pytest.approx(chance, rel=1e-12)
        grows = sum(bool(nodes) and len(paths[n]) == len(paths[place]) for n, nodes in enumerate(draft.children()))
        may_grow = len(paths[place]) < depth and (children or grows < growth.topk)
        if len(draft) < growth.size and may_grow:
            assert len(children) == len(ranked)


@given(
    prompt=TEXT,
    output=OUTPUT,
    depth=st.integers(1, 5),
    topk=st.integers(1, 3),
    total=st.none() | st.integers(1, 9),
    max_match=st.integers(1, 5),
    factor=st.sampled_from([0.5, 1.0, 1.7, 4.0]),
    limit=st.integers(0, 6),
)
def test_drafts_equal_a_scan(
    prompt: list[int],
    output: list[list[int]],
    depth: int,
    topk: int,
    total: int | None,
    max_match: int,
    factor: float,
    limit: int,
) -> None:
    growth = Growth(depth, topk, total)
    drafter = SuffixDrafter(growth, max_match, factor)
    for _ in range(2):  # the second time from the kept automaton of the same prompt
        drafter.reset(prompt)
        text = list(prompt)
        for new in [[], *output]:
            drafter.observe(new)
            text += new
            draft = drafter.propose(limit)
            check_draft(draft, text, growth, max_match, factor, limit)
            assert drafter.match == (naive_draft(text, [], max_match)[0] if limit else 0)
            assert draft.is_chain or topk > 1


def test_periodic_text_goes_on_past_its_end() -> None:
    drafter = SuffixDrafter(Growth(8), 16, 4.0)
    drafter.reset([5, 1, 2, 3, 1, 2, 3, 1, 2, 3])
    assert drafter.propose(8).tokens == (1, 2, 3, 1, 2, 3, 1, 2)
    assert drafter.match == 6


def test_frequent_continuations_come_first_and_recent_ones_among_equals() -> None:
    drafter = SuffixDrafter(Growth(1, 3), 4, 1.0)
    drafter.reset([7, 1, 0, 7, 2, 0, 7, 2, 0, 7, 3, 5, 7])
    draft = drafter.propose(1)
    assert draft.tokens == (2, 3, 1) and drafter.match == 1
    assert draft.confidence == (2 / 6, 1 / 6, 1 / 6)


@given(text=st.lists(st.integers(0, 2), min_size=2, max_size=24), least=st.floats(0, 1), topk=st.integers(1, 3))
def test_a_pace_stops_the_growth_where_pruning_would(text: list[int], least: float, topk: int) -> None:
    growth, pace = Growth(4, topk, 7), ConfidencePace(least)
    free, paced = SuffixDrafter(growth, 3, 2.0), SuffixDrafter(growth, 3, 2.0, pace=pace)
    free.reset(text)
    paced.reset(text)
    assert paced.propose(9) == prune(free.propose(9), pace)


def test_earlier_outputs_help_later_prompts_only() -> None:
    earlier = SharedHistory(8)
    first, second = (SuffixDrafter(Growth(4), 8, 1.0, earlier) for _ in range(2))
    first.reset([1, 2])
    first.observe([30, 31, 32, 33, 34])
    second.reset([3, 30, 31])
    assert len(second.propose(4)) == 0, "nothing is shared before the sequence has ended"
    first.reset([4, 5])
    assert second.propose(4).tokens == (32, 33) and second.match == 2
    second.observe([32, 33])
    assert second.propose(4).tokens == (34,), "no match runs from one output to the next"
    first.reset([1, 2])
    first.observe([30, 31])
    assert len(first.propose(4)) == 0, "an output is not offered to its own prompt"
    second.reset([6, 31, 32, 40, 31, 32])
    assert second.propose(4).tokens[:1] == (40,), "the sequence itself wins where it matches as far"


def test_repeating_a_prompt_adds_nothing() -> None:
    earlier = SharedHistory(4)
    drafter = SuffixDrafter(Growth(4), 4, 1.0, earlier)
    for _ in range(3):
        drafter.reset([1, 2])
        drafter.observe([8, 9])
    drafter.reset([5])
    size = earlier.automaton.size
    assert size == 3, "two tokens and an end"
    drafter.reset([5])
    assert earlier.automaton.size == size


@given(outputs=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5), max_size=4), context=TEXT)
def test_history_matches_within_one_output(outputs: list[list[int]], context: list[int]) -> None:
    earlier = SharedHistory(3)
    for number, output in enumerate(outputs):
        earlier.add([number], output)
        earlier.add([number], output)  # replaced, not counted twice
    tail = context[-3:]
    known = [n for n in range(1, len(tail) + 1) if any(ends(output, tail[len(tail) - n :]) for output in outputs)]
    place = earlier.automaton.match(tail)
    assert place.length == max(known, default=0)
    if place.length:
        piece = tail[len(tail) - place.length :]
        assert earlier.automaton.counts[place.state] == sum(len(ends(output, piece)) for output in outputs)


def test_nonsense_is_refused() -> None:
    for max_match, factor in ((0, 1.0), (3, 0.0)):
        with pytest.raises(ValueError, match="max_match"):
            SuffixDrafter(Growth(3), max_match, factor)
    with pytest.raises(ValueError, match="longest"):
        SuffixAutomaton(0)
    with pytest.raises(ValueError, match="max_match"):
        SharedHistory(0)
