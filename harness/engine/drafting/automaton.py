"""An online suffix automaton over token ids that counts occurrences and can take its newest tokens back.

Construction after Blumer et al. 1985; the counts make it the frequency tree of SuffixDecoding (arXiv 2411.04975).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Follower(NamedTuple):
    """A token that follows a string; the greater one is more frequent, or as frequent and more recent.

    Attributes:
        times: how often it follows.
        latest: tokens of the text up to the end of its latest occurrence behind the string.
        token: itself.
        state: that holds the string with the token behind it.
    """

    times: int
    latest: int
    token: int
    state: int


class Place(NamedTuple):
    """A string that occurs in the text: the state that holds it, and its tokens."""

    state: int
    length: int


class SuffixAutomaton:
    """All substrings of a growing text; those of up to ``longest`` tokens with counts and latest occurrences.

    A state holds the strings that end at the same positions of the text: one of each length from ``lengths[link] + 1``
    to ``lengths[state]``, each a suffix of the next. Extending costs amortised constant time for the states and at most
    ``longest`` updates for the counts. State 0 is the empty string.

    Args:
        longest: tokens of the longest string that is told from longer ones and counted.

    Attributes:
        transitions: of each state, the next state by token.
        links: of each state, that of its longest suffix with more occurrences; -1 for the empty string.
        lengths: of each state, the tokens of its longest string.
        counts: of each state whose shortest string has at most ``longest`` tokens, how often its strings occur;
            overlaps count. Meaningless for the empty string and for longer ones.
        latest: of these states, the number of tokens of the text up to the end of the latest occurrence.
        size: tokens of the text.

    Raises:
        ValueError: ``longest`` below one.
    """

    __slots__ = (
        "_base",
        "_last",
        "_mark",
        "_saved",
        "_tail",
        "counts",
        "latest",
        "lengths",
        "links",
        "longest",
        "size",
        "transitions",
    )

    def __init__(self, longest: int) -> None:
        if longest < 1:
            raise ValueError(f"longest={longest} must be at least 1")
        self.longest = longest
        self.transitions: list[dict[int, int]] = [{}]
        self.links = [-1]
        self.lengths = [0]
        self.counts = [0]
        self.latest = [0]
        self.size = 0
        self._last = 0
        self._tail = Place(0, 0)
        self._base = 0
        self._mark = (0, 0, self._tail)
        self._saved: dict[int, tuple[dict[int, int], int, int, int]] = {}

    def extend(self, token: int) -> None:
        """Append one token to the text."""
        transitions, links, lengths = self.transitions, self.links, self.lengths
        before, new = self._last, self._add({}, self.lengths[self._last] + 1, 0, 0, 0)
        while before >= 0 and token not in transitions[before]:
            self._keep(before)
            transitions[before][token] = new
            before = links[before]
        if before >= 0:
            split = transitions[before][token]
            if lengths[split] != lengths[before] + 1:
                split = self._split(before, token, split)
            links[new] = split
        self._last = new
        self.size += 1
        tail = self.follow(self._tail, token)
        assert tail is not None
        self._tail = tail
        state = tail.state
        while state > 0:
            self._keep(state)
            self.counts[state] += 1
            self.latest[state] = self.size
            state = links[state]

    def follow(self, place: Place, token: int) -> Place | None:
        """The string one token on, its last ``longest`` tokens; None where it does not occur.

        Args:
            place: a string of this text; may be older than the latest extension.
            token: that follows it.
        """
        state, length = self.trim(place)
        found = self.transitions[state].get(token)
        return None if found is None else self.trim(Place(found, min(length + 1, self.longest)))

    def followers(self, place: Place) -> list[Follower]:
        """What follows a string of fewer than ``longest`` tokens in the text, in no order; empty at its only end."""
        counts, latest = self.counts, self.latest
        return [
            Follower(counts[state], latest[state], token, state)
            for token, state in self.transitions[place.state].items()
        ]

    def trim(self, place: Place) -> Place:
        """The same string in the state that holds it now: an extension may have split the old one."""
        state, length = place
        while state > 0 and self.lengths[self.links[state]] >= length:
            state = self.links[state]
        return Place(state, length)

    def shorten(self, place: Place) -> Place:
        """The longest suffix of a string, not empty itself, that occurs more often."""
        link = self.links[place.state]
        return Place(link, self.lengths[link])

    def suffix(self) -> Place:
        """The longest suffix of the text, of at most ``longest`` tokens, that occurred before its end; may be empty."""
        place = self.trim(self._tail)
        return self.shorten(place) if place.state > 0 and self.counts[place.state] < 2 else place

    def match(self, context: Sequence[int]) -> Place:
        """The longest suffix of ``context``, of at most ``longest`` tokens, that occurs in the text; may be empty."""
        place = Place(0, 0)
        for token in context[-self.longest :]:
            found = self.follow(place, token)
            while found is None and place.state > 0:
                place = self.shorten(place)
                found = self.follow(place, token)
            place = found or place
        return place

    def checkpoint(self) -> None:
        """Remember the text as it is; :meth:`rollback` comes back to it. Replaces the checkpoint before."""
        self._base = len(self.links)
        self._mark = (self._last, self.size, self.trim(self._tail))
        self._saved = {}

    def rollback(self) -> None:
        """Take back every token since the checkpoint, at a cost that grows with these tokens only."""
        for column in (self.transitions, self.links, self.lengths, self.counts, self.latest):
            del column[self._base :]
        for state, saved in self._saved.items():
            self.transitions[state], self.links[state], self.counts[state], self.latest[state] = saved
        self._saved = {}
        self._last, self.size, self._tail = self._mark

    def _split(self, before: int, token: int, state: int) -> int:
        """Move the strings of ``state`` up to those that follow ``before`` into a state of their own."""
        transitions, links = self.transitions, self.links
        link, count, latest = links[state], self.counts[state], self.latest[state]
        short = self._add(dict(transitions[state]), self.lengths[before] + 1, link, count, latest)
        self._keep(state)
        links[state] = short
        while before >= 0 and transitions[before].get(token) == state:
            self._keep(before)
            transitions[before][token] = short
            before = links[before]
        return short

    def _add(self, transitions: dict[int, int], length: int, link: int, count: int, latest: int) -> int:
        self.transitions.append(transitions)
        self.links.append(link)
        self.lengths.append(length)
        self.counts.append(count)
        self.latest.append(latest)
        return len(self.links) - 1

    def _keep(self, state: int) -> None:
        """Save a state of the checkpoint before it changes for the first time."""
        if state < self._base and state not in self._saved:
            whole = (dict(self.transitions[state]), self.links[state], self.counts[state], self.latest[state])
            self._saved[state] = whole
