"""The steps that are checked and timed on a GPU, and what each of them gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from scripts.bench.measure import Spread
from scripts.bench.records import StepRow
from sparse.budget import AttentionBudget, FfnBudget, MoeBudget, Sparsity

BLOCK = 16


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison.

    Attributes:
        arch: a name of ``SHAPES``.
        batch, context: sequences, and positions before the step.
        draft: as :func:`scripts.bench.drafts.parse` takes it.
        density: share of the blocks that attention keeps; None for all.
        union: share of the experts that the step may load; None for all.
        target: least factor of the sparse step over the better dense one; None where none is set.
        seconds: guess at what the case takes, weights and captures included.
        channels: share of the FFN channels that the step keeps; None for all.
    """

    arch: str
    batch: int
    context: int
    draft: str
    density: float | None
    union: float | None
    target: float | None
    seconds: float
    channels: float | None = None

    @property
    def name(self) -> str:
        """As tables have it."""
        told = f"{self.arch}, batch {self.batch}, context {self.context}, {self.draft} tokens"
        told += "" if self.density is None else f", {self.density:.0%} of the blocks"
        told += "" if self.channels is None else f", {self.channels:.0%} of the channels"
        return told + ("" if self.union is None else f", {self.union:.0%} of the experts")

    @property
    def suspects(self) -> frozenset[str]:
        """The kernels and the architecture whose red checks forbid times of this case."""
        found = {"block_attention", self.arch}
        for kernel, share in (("block_selection", self.density), ("moe", self.union), ("sparse_ffn", self.channels)):
            if share is not None:
                found.add(kernel)
        return frozenset(found)

    def sparsity(self, experts: int) -> Sparsity:
        """What the sparse step may skip in a model with so many experts a layer."""
        blocks = self.context // BLOCK
        attention = AttentionBudget() if self.density is None else AttentionBudget(topk=round(self.density * blocks))
        moe = MoeBudget() if self.union is None else MoeBudget(union=max(1, round(self.union * experts)))
        ffn = FfnBudget() if self.channels is None else FfnBudget(rule="topk", keep=self.channels)
        return Sparsity(attention, ffn=ffn, moe=moe)


CASES = (
    Case("llama31_8b", 16, 8192, "7", 0.12, None, 1.6, 75),
    Case("llama31_8b", 1, 32768, "7", 0.12, None, 1.2, 65),
    Case("llama_7b", 8, 8192, "7", 0.12, None, 1.8, 75),
    Case("qwen3_30b_a3b", 1, 8192, "tree60", None, 0.25, 2.0, 100),
    Case("smollm2_135m", 1, 8000, "7", 0.06, None, None, 40),
)
EXACT = (
    Case("smollm2_135m", 2, 700, "tree16", 0.3, None, None, 15, channels=0.5),
    Case("qwen3_30b_a3b", 2, 300, "4", 0.5, 0.25, None, 20),
    *CASES[:3],
)
"""Compared in fp32; few rows per KV head, as large tiles of fp32 compile slowly."""
TINY = (
    Case("smollm2_135m", 2, 300, "tree5", 0.3, None, None, 20),
    Case("smollm2_135m", 1, 100, "2", None, None, None, 20, channels=0.3),
)
"""For the interpreter: checked, never timed."""


@dataclass(slots=True)
class Result:
    """What a case gave.

    Attributes:
        case: what was compared.
        layers, whole: decoder layers that ran, and that the model has.
        rows: for the CSV file.
        gain: of the sparse step over the better dense one, both as bare replays on the device.
        wall: the same over the dense step on our kernels, by the clock of the host, all work on the host included.
        limit: by bytes alone.
        dense: the better dense arm.
    """

    case: Case
    layers: int
    whole: int
    gain: Spread
    wall: Spread
    limit: float
    dense: str
    rows: Sequence[StepRow] = field(default=())

    @property
    def text(self) -> str:
        """One line of the table of targets."""
        wanted = "no target" if self.case.target is None else f"target {self.case.target}"
        met = "" if self.case.target is None else " met" if self.gain.median >= self.case.target else " missed"
        cut = "" if self.layers == self.whole else f", {self.layers} of {self.whole} layers"
        return (
            f"{self.case.name}{cut}: {self.gain.text()} times faster on the device (limit {self.limit:.2f}), "
            f"{wanted}{met}; with the host's work {self.wall.text()} over our dense step; dense is: {self.dense}"
        )
