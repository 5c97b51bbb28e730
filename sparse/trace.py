"""Counters of what steps really did: paths taken, traffic per layer and axis, reuse, time per component.

Counters are plain numbers, kept without touching the device, so that tracing never slows a timed arm noticeably.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

AXES = ("attention", "ffn", "experts")
DENSE_PATH = "dense_attention"
SPARSE_PATH = "block_attention"
TORCH, NATIVE = "torch", "native"
SELECT_PATH = "select.blocks"
LOW_HEADS_PATH = "select.low_heads"
DROPPED_PATH = "ffn.channels_dropped"
RESTRICTED_PATH = "experts.restricted"
ORACLE_PATH = "select.oracle.simulated"
ANCHOR_HIT = "reuse.anchor"
ANCHOR_MISS = "reuse.miss_anchor"
SKIP_PREFIX = "reuse.skip_"
DRAFT_REUSE = "reuse.draft_tokens"


@dataclass(slots=True)
class Trace:
    """Counters of one decode; those by layer are keyed by its number.

    Attributes:
        clock: seconds, for ``seconds``; None keeps no times.
        paths: calls per path name, for example ``block_attention.torch``, one a layer and step; reuse hits and misses.
        steps, rows: steps, and tokens verified in them.
        visible, attended: positions per KV head that dense attention would read, and that were read.
        attention_products: rows times positions attended to.
        scored: blocks whose score was computed, all layers together.
        width, channels: FFN channels whose up and down weights the layer's experts that ran have, and that were read.
        gates: gate rows read, all layers together.
        channel_products, gate_products: rows times channels, all layers together.
        experts_wanted, experts_loaded: distinct routed experts of dense routing, and those that ran.
        pairs: routed (token, expert) pairs by fate: wanted, kept, skipped, substituted, dropped, freed.
        stale: layers' reuses of a selection from an earlier step, by its age in steps.
        seconds: time per component.
    """

    clock: Callable[[], float] | None = None
    paths: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    rows: int = 0
    visible: Counter[int] = field(default_factory=Counter)
    attended: Counter[int] = field(default_factory=Counter)
    attention_products: float = 0
    scored: int = 0
    width: Counter[int] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    gates: int = 0
    channel_products: int = 0
    gate_products: int = 0
    experts_wanted: Counter[int] = field(default_factory=Counter)
    experts_loaded: Counter[int] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)
    stale: Counter[int] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    _mark: float = 0.0

    def begin(self, rows: int) -> None:
        """A step of ``rows`` tokens starts."""
        self.steps += 1
        self.rows += rows
        if self.clock is not None:
            self._mark = self.clock()

    def lap(self, component: str) -> None:
        """Charge the time since the last lap to ``component``."""
        if self.clock is not None:
            now = self.clock()
            self.seconds[component] += now - self._mark  # type: ignore[assignment]
            self._mark = now

    def charge(self, seconds: Mapping[str, float]) -> None:
        """Charge times that a kernel took of itself, by component; the next lap starts now."""
        if self.clock is not None:
            for component, spent in seconds.items():
                self.seconds[component] += spent  # type: ignore[assignment]
            self._mark = self.clock()

    def attention(self, path: str, layer: int, length: int, attended: float, rows: int) -> None:
        """``layer`` attended to ``attended`` of ``length`` positions per KV head with ``rows`` tokens."""
        self.paths[path] += 1
        self.visible[layer] += length
        self.attended[layer] += attended  # type: ignore[assignment]
        self.attention_products += rows * attended

    def ffn(self, layer: int, *, width: int, gates: int, channels: int, rows: int, kept: int | None = None) -> None:
        """``layer`` ran FFNs or experts of ``width`` channels in all, each for ``rows`` tokens.

        Args:
            layer: its number.
            width: channels that dense execution of these FFNs reads.
            gates: gate rows read.
            channels: channels whose up and down weights were read.
            rows: tokens, or (token, expert) pairs over experts.
            kept: (token, channel) pairs needed; by default every token needs every channel that was read.
        """
        self.width[layer] += width
        self.channels[layer] += channels
        self.gates += gates
        self.gate_products += rows * gates
        self.channel_products += rows * channels if kept is None else kept

    def skipped(self, what: str, age: int = 0) -> None:
        """A layer skipped ``what`` (reuse.skip); ``age`` is that of the selection it used instead, in steps."""
        self.paths[f"{SKIP_PREFIX}{what}"] += 1
        if age:
            self.stale[age] += 1

    def density(self, axis: str) -> float | None:
        """What was read over what dense execution would read: attention, ffn or experts; None where nothing ran."""
        read, whole = self._axis(axis)
        return read.total() / whole.total() if whole.total() else None

    def densities(self, axis: str, layers: int) -> list[float | None]:
        """:meth:`density` of every layer."""
        read, whole = self._axis(axis)
        return [read[layer] / whole[layer] if whole[layer] else None for layer in range(layers)]

    def _axis(self, axis: str) -> tuple[Counter[int], Counter[int]]:
        return {
            "attention": (self.attended, self.visible),
            "ffn": (self.channels, self.width),
            "experts": (self.experts_loaded, self.experts_wanted),
        }[axis]
