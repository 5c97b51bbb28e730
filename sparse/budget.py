"""What may be computed: frozen budgets of the sparsity axes (METHOD sections 2 to 5)."""

from __future__ import annotations

from dataclasses import dataclass

BLOCK_SIZES = (16, 32, 64)
SCORES = ("mean", "bound")
QUERIES = ("first", "mean", "max")
REDUCTIONS = ("mean", "max")


@dataclass(frozen=True, slots=True)
class AttentionBudget:
    """Which KV blocks a verification step may attend to (METHOD section 2).

    ``topk`` counts every whole block kept per KV head, sink and window blocks included. The unfinished block at the
    end of the context and the step's own draft tokens are always visible and come on top.

    Attributes:
        topk: whole blocks kept per KV head; ``None`` keeps all of them (dense attention).
        block_size: positions per block.
        sinks: first blocks that always stay.
        window: last whole blocks that always stay.
        dense_layers: number of first layers that stay dense.
        score: ``mean`` is q . mean(keys); ``bound`` is the upper bound of q . k from the keys' min and max.
        query: whose query retrieves: ``first`` (root of the draft), ``mean`` or ``max`` over the step's tokens.
        gqa: how the scores of the query heads that share a KV head become one.

    Raises:
        ValueError: a field lies outside its range.
    """

    topk: int | None = None
    block_size: int = 16
    sinks: int = 1
    window: int = 1
    dense_layers: int = 0
    score: str = "mean"
    query: str = "first"
    gqa: str = "mean"

    def __post_init__(self) -> None:
        if self.topk is not None and self.topk < max(1, self.sinks + self.window):
            raise ValueError(f"topk={self.topk} is below sinks + window = {self.sinks + self.window} (or below 1)")
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size={self.block_size} is not one of {BLOCK_SIZES}")
        if min(self.sinks, self.window, self.dense_layers) < 0:
            raise ValueError("sinks, window and dense_layers must not be negative")
        for name, value, known in (
            ("score", self.score, SCORES),
            ("query", self.query, QUERIES),
            ("gqa", self.gqa, REDUCTIONS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not one of {known}")

    @classmethod
    def dense(cls) -> AttentionBudget:
        """The no-op: every block is attended to."""
        return cls()

    @property
    def is_dense(self) -> bool:
        """Whether this budget can never skip a block."""
        return self.topk is None

    def skips(self, layer: int, whole_blocks: int) -> bool:
        """Whether ``layer`` leaves out at least one of ``whole_blocks`` blocks."""
        return self.topk is not None and layer >= self.dense_layers and whole_blocks > self.topk

    @property
    def summaries(self) -> tuple[str, ...]:
        """Names of the block summaries that the score reads."""
        if self.is_dense:
            return ()
        return ("mean",) if self.score == "mean" else ("min", "max")
