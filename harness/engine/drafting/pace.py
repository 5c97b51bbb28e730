"""Adaptive draft length: which tokens of a draft are worth their place in the verification step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.engine.drafting.draft import Draft
from harness.engine.drafting.expansion import Pace


@dataclass(frozen=True, slots=True)
class StepCost:
    """Wall-clock of a step, a straight line over its tokens: reading weights and cache is paid once, rows each.

    Attributes:
        fixed: seconds of a step whatever its tokens.
        per_token: seconds of each verified token, the root included.
        draft_seconds: seconds that drafting one token takes; 0 for drafters without a model.
    """

    fixed: float
    per_token: float
    draft_seconds: float = 0.0

    @classmethod
    def fit(cls, samples: Sequence[tuple[int, float]], draft_seconds: float = 0.0) -> StepCost:
        """Least squares over measured verification steps; neither the slope nor the start of the line is negative.

        Args:
            samples: tokens of a step, the root included, and its seconds.
            draft_seconds: of the result.

        Raises:
            ValueError: fewer than two different numbers of tokens, or a step that took no time.
        """
        if len({tokens for tokens, _ in samples}) < 2 or min(seconds for _, seconds in samples) <= 0:
            raise ValueError("the cost of a step needs positive seconds of at least two different numbers of tokens")
        mean_tokens = sum(tokens for tokens, _ in samples) / len(samples)
        mean_seconds = sum(seconds for _, seconds in samples) / len(samples)
        spread = sum((tokens - mean_tokens) ** 2 for tokens, _ in samples)
        slope = sum((tokens - mean_tokens) * (seconds - mean_seconds) for tokens, seconds in samples) / spread
        if slope <= 0:
            return cls(mean_seconds, 0.0, draft_seconds)
        start = mean_seconds - slope * mean_tokens
        if start < 0:
            through_zero = sum(tokens * seconds for tokens, seconds in samples) / sum(t * t for t, _ in samples)
            return cls(0.0, through_zero, draft_seconds)
        return cls(start, slope, draft_seconds)

    def seconds(self, drafted: int) -> float:
        """Of a step that drafts ``drafted`` tokens and verifies them together with the root."""
        return self.fixed + self.per_token * (1 + drafted) + self.draft_seconds * drafted


@dataclass(frozen=True, slots=True)
class ConfidencePace:
    """Goes on while a token's chance to be accepted is large enough.

    Attributes:
        least: survival that is enough, between 0 and 1; 0 always goes on.

    Raises:
        ValueError: ``least`` is not between 0 and 1.
    """

    least: float

    def __post_init__(self) -> None:
        if not 0 <= self.least <= 1:
            raise ValueError(f"least={self.least} must lie between 0 and 1")

    def goes_on(self, survival: float, expected: float, size: int) -> bool:
        """See :class:`harness.engine.drafting.expansion.Pace`."""
        return survival >= self.least


@dataclass(frozen=True, slots=True)
class GainPace:
    """Goes on while one more token raises the expected tokens per second, the bonus token included.

    Where tokens come by falling survival and their confidences are true, the draft is the one with the most expected
    tokens per second: its gain only falls while its price stays the same.

    Attributes:
        cost: of a step on this model, machine and context.
    """

    cost: StepCost

    def goes_on(self, survival: float, expected: float, size: int) -> bool:
        """See :class:`harness.engine.drafting.expansion.Pace`."""
        with_it = (1 + expected + survival) * self.cost.seconds(size)
        return with_it > (1 + expected) * self.cost.seconds(size + 1)


def prune(draft: Draft, pace: Pace | None, size: int | None = None) -> Draft:
    """The tokens of a draft that are worth verifying, in their order; for drafters whose drafts cost nothing.

    Tokens are taken by falling survival, ancestors first, until one does not pay.

    Args:
        draft: of chosen tokens. Drawn ones must not be left out by what they are: the rest would no longer follow their
            distribution.
        pace: decides; None takes every token.
        size: tokens to keep at most; None sets no limit.

    Returns:
        ``draft`` itself if everything stays.

    Raises:
        ValueError: the tokens were drawn, or their acceptance is forced.
    """
    if draft.proposals is not None or draft.forced is not None:
        raise ValueError("only drafts of chosen tokens with real acceptance can be pruned")
    survivals: list[float] = []
    for parent, confidence in zip(draft.parents, draft.confidence, strict=True):
        survivals.append(confidence * (survivals[parent] if parent >= 0 else 1.0))
    expected, kept = 0.0, set[int]()
    for node in sorted(range(len(draft)), key=lambda node: -survivals[node])[:size]:
        if pace is not None and not pace.goes_on(survivals[node], expected, len(kept)):
            break
        kept.add(node)
        expected += survivals[node]
    if len(kept) == len(draft):
        return draft
    places = {node: place for place, node in enumerate(sorted(kept))}
    return Draft(
        tuple(draft.tokens[node] for node in places),
        tuple(places.get(draft.parents[node], -1) for node in places),
        tuple(draft.confidence[node] for node in places),
    )
