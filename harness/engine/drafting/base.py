"""What a drafter is: reset, observe, propose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from harness.engine.drafting.draft import Draft
from sparse.cost import Cost


class Drafter(Protocol):
    """Proposes continuations of one sequence; sees every token of it exactly once, in order.

    Features are hidden states of the target, for drafters that read them (``Step.taps``): the row of a token is that
    from which it was predicted, so the state after the token before it, [tokens, taps * hidden]. None without taps.

    A drafter that reads features says so by an attribute ``reads_features``, one that reads block summaries of the
    target's cache by ``reads_blocks``; both are taken as false where they are missing. One that runs a model counts
    the least work of its passes since the last reset in an attribute ``spent``; where that is missing, there is none.
    """

    def reset(self, prompt: Sequence[int], features: Tensor | None = None, seed: int = 0) -> None:
        """Start a new sequence; the same prompt as before should cost next to nothing.

        Args:
            prompt: token ids.
            features: those of ``prompt[1:]``.
            seed: of whatever this sequence draws.
        """

    def observe(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        """Append tokens that are now part of the sequence; the first call brings the prefill's token."""

    def propose(self, limit: int) -> Draft:
        """What may follow the sequence, no path longer than ``limit``; empty if there is no idea."""


def spent(drafter: Drafter) -> Cost:
    """Least bytes and FLOPs of a drafter's passes since its last reset (METHOD section 7)."""
    found: Cost = getattr(drafter, "spent", Cost())
    return found


class NoDrafter:
    """Proposes nothing: every step decodes one token."""

    def reset(self, prompt: Sequence[int], features: Tensor | None = None, seed: int = 0) -> None:
        """Nothing to forget."""

    def observe(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        """Nothing to learn."""

    def propose(self, limit: int) -> Draft:
        """No tokens."""
        return Draft()
