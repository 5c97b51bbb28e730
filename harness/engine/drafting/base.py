"""What a drafter is: propose, observe, reset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Drafter(Protocol):
    """Proposes continuations; sees every token of the sequence exactly once, in order."""

    def reset(self, prompt: Sequence[int]) -> None:
        """Start a new sequence; the same prompt as before must cost next to nothing."""

    def observe(self, tokens: Sequence[int]) -> None:
        """Append tokens that are now part of the sequence."""

    def propose(self, limit: int) -> list[int]:
        """At most ``limit`` tokens that may follow the sequence; empty if there is no idea."""


class NoDrafter:
    """Proposes nothing: every step decodes one token."""

    def reset(self, prompt: Sequence[int]) -> None:
        """Nothing to forget."""

    def observe(self, tokens: Sequence[int]) -> None:
        """Nothing to learn."""

    def propose(self, limit: int) -> list[int]:
        """No tokens."""
        return []
