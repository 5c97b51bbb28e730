"""What may be computed: frozen budgets of the sparsity axes (METHOD sections 2 to 5)."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import floor

BLOCK_SIZES = (16, 32, 64)
SCORES = ("mean", "bound", "gaussian", "oracle")
QUERIES = ("first", "mean", "max", "weighted")
REDUCTIONS = ("mean", "max")
HEAD_BUDGETS = ("per_head", "pooled")
FFN_RULES = ("dense", "topk", "threshold", "quantile")
FFN_MASKS = ("token", "union", "root", "weighted")
MOE_RULES = ("dense", "median_ratio", "topk", "topp", "floor")
OUTSIDE = ("substitute", "drop")
SKIPS = ("retrieval", "channels", "ffn")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not one of {known}")


def _share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name}={value} is not above 0 and at most 1")


@dataclass(frozen=True, slots=True)
class AttentionBudget:
    """Which KV blocks a verification step may attend to (METHOD section 2).

    The budget counts every whole block kept per KV head, sink and window blocks included. The unfinished block at the
    end of the context and the step's own draft tokens are always visible and come on top.

    Attributes:
        topk: whole blocks kept per KV head; with ``l0`` also None, all of them are kept (dense attention).
        l0: piecewise budget instead of ``topk``: dense up to ``l0`` tokens of context, beyond it
            floor((length - l0) * rho + l0) tokens per KV head, rounded down to whole blocks.
        rho: share of the tokens beyond ``l0`` that a piecewise budget keeps.
        block_size: positions per block.
        sinks: first blocks that always stay.
        window: last whole blocks that always stay.
        dense_layers: number of first layers that stay dense.
        score: ``mean`` is q . mean(keys); ``bound`` is the upper bound of q . k from the keys' min and max;
            ``gaussian`` is log mean exp(q . k) if the keys were normal with the block's mean and variance per channel;
            ``oracle`` is the attention mass itself, which reads every key: an upper bound of quality, not a saving.
        query: whose query retrieves: ``first`` (root of the draft), ``mean`` or ``max`` over the step's tokens, or
            ``weighted``, a mean in which the n-th draft token counts ``survival`` ** n.
        gqa: how the scores of the query heads that share a KV head become one.
        heads: ``per_head`` gives every KV head its own budget; ``pooled`` shares ``kv_heads`` budgets within the layer.
        survival: chance that one more draft token is accepted, for ``query="weighted"``.
        low_heads: (layer, KV head) pairs that keep sinks and window only.

    Raises:
        ValueError: a field lies outside its range.
    """

    topk: int | None = None
    l0: int | None = None
    rho: float = 0.25
    block_size: int = 16
    sinks: int = 1
    window: int = 1
    dense_layers: int = 0
    score: str = "mean"
    query: str = "first"
    gqa: str = "mean"
    heads: str = "per_head"
    survival: float = 0.7
    low_heads: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.topk is not None and self.topk < max(1, self.fixed):
            raise ValueError(f"topk={self.topk} is below sinks + window = {self.fixed} (or below 1)")
        if self.topk is not None and self.l0 is not None:
            raise ValueError("topk and l0 exclude each other")
        if self.l0 is not None and self.l0 < max(1, self.fixed) * self.block_size:
            raise ValueError(f"l0={self.l0} is below the sink and window blocks (or below one block)")
        if not 0 <= self.rho < 1:
            raise ValueError(f"rho={self.rho} is not at least 0 and below 1")
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size={self.block_size} is not one of {BLOCK_SIZES}")
        if min(self.sinks, self.window, self.dense_layers) < 0:
            raise ValueError("sinks, window and dense_layers must not be negative")
        _one_of("score", self.score, SCORES)
        _one_of("query", self.query, QUERIES)
        _one_of("gqa", self.gqa, REDUCTIONS)
        _one_of("heads", self.heads, HEAD_BUDGETS)
        _share("survival", self.survival)

    @property
    def fixed(self) -> int:
        """Blocks that always stay."""
        return self.sinks + self.window

    @property
    def is_dense(self) -> bool:
        """Whether this budget can never skip a block."""
        return self.topk is None and self.l0 is None

    def blocks(self, length: int) -> int:
        """Whole blocks kept per KV head when ``length`` positions precede the step."""
        whole = length // self.block_size
        if self.topk is not None:
            return min(self.topk, whole)
        if self.l0 is None or length <= self.l0:
            return whole
        return min(whole, max(1, self.fixed, floor((length - self.l0) * self.rho + self.l0) // self.block_size))

    def skips(self, layer: int, length: int) -> bool:
        """Whether ``layer`` leaves out at least one whole block of ``length`` positions."""
        return not self.is_dense and layer >= self.dense_layers and self.blocks(length) < length // self.block_size

    def low(self, layer: int) -> tuple[int, ...]:
        """KV heads of ``layer`` that keep sinks and window only."""
        return tuple(head for at, head in self.low_heads if at == layer)

    @property
    def summaries(self) -> tuple[str, ...]:
        """Names of the block summaries that the score reads."""
        if self.is_dense or self.score == "oracle":
            return ()
        return {"mean": ("mean",), "bound": ("min", "max"), "gaussian": ("mean", "variance")}[self.score]


@dataclass(frozen=True, slots=True)
class FfnBudget:
    """Which FFN channels a verification step computes (METHOD section 3).

    The gate is computed in full; channels whose |act(gate)| is small are dropped, so their rows of the up projection
    and columns of the down projection are not needed. Inside an MoE layer the rule applies to every kept expert, the
    shared one included; there "the step's tokens" are those routed to the expert, in their order.

    Attributes:
        rule: ``dense``; ``topk`` keeps the share ``keep`` of the channels with the largest magnitude; ``threshold``
            keeps magnitudes of at least ``tau``; ``quantile`` the same with one calibrated threshold per layer.
        keep: share of the channels that ``topk`` keeps.
        tau: absolute threshold.
        thresholds: one per layer, for ``quantile``.
        mask: ``token`` masks every token for itself (simulated: it saves operations on paper, no traffic); the others
            share one set of channels among the step's tokens and skip the rest: ``union`` ranks channels by their
            maximum over the tokens, ``root`` by the first token, ``weighted`` by a mean in which the n-th draft token
            counts ``survival`` ** n.
        survival: chance that one more draft token is accepted.
        dense_layers: number of first layers that stay dense.

    Raises:
        ValueError: a field lies outside its range.
    """

    rule: str = "dense"
    keep: float = 1.0
    tau: float = 0.0
    thresholds: tuple[float, ...] = ()
    mask: str = "union"
    survival: float = 0.7
    dense_layers: int = 0

    def __post_init__(self) -> None:
        _one_of("rule", self.rule, FFN_RULES)
        _one_of("mask", self.mask, FFN_MASKS)
        _share("keep", self.keep)
        _share("survival", self.survival)
        if self.tau < 0 or self.dense_layers < 0 or min(self.thresholds, default=0.0) < 0:
            raise ValueError("tau, thresholds and dense_layers must not be negative")
        if self.rule == "quantile" and not self.thresholds:
            raise ValueError("rule='quantile' needs one threshold per layer")

    @property
    def is_dense(self) -> bool:
        """Whether this budget can never drop a channel."""
        return self.rule == "dense" or (self.rule == "topk" and self.keep == 1.0)

    @property
    def shared(self) -> bool:
        """Whether the step's tokens share one set of channels, so that the others' weights are not read."""
        return self.mask != "token"

    def applies(self, layer: int) -> bool:
        """Whether ``layer`` may drop channels."""
        return not self.is_dense and layer >= self.dense_layers

    def channels(self, width: int) -> int:
        """Channels of ``width`` that ``topk`` keeps, at least one."""
        return max(1, round(self.keep * width))

    def threshold(self, layer: int) -> float:
        """Smallest magnitude that ``layer`` keeps."""
        return self.thresholds[layer] if self.rule == "quantile" else self.tau


@dataclass(frozen=True, slots=True)
class MoeBudget:
    """Which routed experts a verification step runs (METHOD section 4). Shared experts always run.

    First the rule decides per token, then the budget on the union, then ``free_loaded`` gives back what is loaded.

    Attributes:
        rule: ``dense``; ``median_ratio`` skips the m <= ``m_max`` lowest experts of a token, for the largest m whose
            share of the token's routing weight is below ``betas[layer][m - 1]``; ``topk`` keeps ``k`` experts a
            token; ``topp`` the fewest whose share of the token's weight reaches ``p``; ``floor`` those whose share is
            at least ``weight_floor``. The strongest expert of a token always stays.
        m_max: most experts skipped per token by ``median_ratio``.
        betas: [layers][m_max], medians of the weight share of the m lowest experts on calibration text.
        k: experts per token for ``topk``.
        p: weight share for ``topp``.
        weight_floor: smallest weight share for ``floor``.
        union: most distinct routed experts that a layer loads for all tokens of the step, ranked by the summed
            weight over the tokens, the n-th draft token counting ``survival`` ** n; None sets no limit.
        outside: what happens to a token's experts outside the union budget: ``drop`` them, or ``substitute`` them by
            the token's next best experts inside it.
        free_loaded: skipped experts of a token run after all where another token loads them anyway.
        survival: chance that one more draft token is accepted.

    Raises:
        ValueError: a field lies outside its range.
    """

    rule: str = "dense"
    m_max: int = 3
    betas: tuple[tuple[float, ...], ...] = ()
    k: int = 1
    p: float = 1.0
    weight_floor: float = 0.0
    union: int | None = None
    outside: str = "substitute"
    free_loaded: bool = False
    survival: float = 0.7

    def __post_init__(self) -> None:
        _one_of("rule", self.rule, MOE_RULES)
        _one_of("outside", self.outside, OUTSIDE)
        _share("p", self.p)
        _share("survival", self.survival)
        if min(self.m_max, self.k) < 1 or (self.union is not None and self.union < 1):
            raise ValueError("m_max, k and union must be at least 1")
        if not 0 <= self.weight_floor < 1:
            raise ValueError(f"weight_floor={self.weight_floor} is not at least 0 and below 1")
        if self.rule == "median_ratio" and (not self.betas or any(len(row) < self.m_max for row in self.betas)):
            raise ValueError(f"rule='median_ratio' needs betas for m up to m_max={self.m_max} in every layer")

    @property
    def is_dense(self) -> bool:
        """Whether this budget can never skip an expert."""
        return self.rule == "dense" and self.union is None


@dataclass(frozen=True, slots=True)
class ReuseBudget:
    """What layers and steps take over from each other (METHOD sections 2 and 5).

    Attributes:
        anchors: layers that retrieve blocks; every other layer takes the selection of the nearest anchor before it.
            None: every layer retrieves.
        head_map: [layers][kv_heads], the anchor's KV head whose blocks each head takes; empty: its own number.
        skip: experimental, in ``skip_layers``: ``retrieval`` and ``channels`` keep the layer's own selection of an
            earlier step, for at most ``refresh`` steps; ``ffn`` leaves the layer's FFN out.
        skip_layers: layers that skip.
        refresh: steps after which a kept selection is made anew.

    Raises:
        ValueError: a field lies outside its range.
    """

    anchors: tuple[int, ...] | None = None
    head_map: tuple[tuple[int, ...], ...] = ()
    skip: tuple[str, ...] = ()
    skip_layers: tuple[int, ...] = ()
    refresh: int = 4

    def __post_init__(self) -> None:
        if self.anchors is not None and (not self.anchors or list(self.anchors) != sorted(set(self.anchors))):
            raise ValueError(f"anchors={self.anchors} is not an ascending list of layers")
        if min((*(self.anchors or ()), *self.skip_layers), default=0) < 0:
            raise ValueError("layers must not be negative")
        for name in self.skip:
            _one_of("skip", name, SKIPS)
        if self.refresh < 1:
            raise ValueError(f"refresh={self.refresh} is below 1")

    def retrieves(self, layer: int) -> bool:
        """Whether ``layer`` makes a selection of its own."""
        return self.anchors is None or layer in self.anchors

    def skips(self, what: str, layer: int) -> bool:
        """Whether ``layer`` skips ``what``, one of SKIPS."""
        return what in self.skip and layer in self.skip_layers


@dataclass(frozen=True, slots=True)
class Sparsity:
    """The budgets of one arm, all axes together; without arguments the no-op."""

    attention: AttentionBudget = field(default_factory=AttentionBudget)
    ffn: FfnBudget = field(default_factory=FfnBudget)
    moe: MoeBudget = field(default_factory=MoeBudget)
    reuse: ReuseBudget = field(default_factory=ReuseBudget)

    @property
    def is_dense(self) -> bool:
        """Whether nothing can be skipped."""
        no_layer = not (self.reuse.skip and self.reuse.skip_layers)
        return self.attention.is_dense and self.ffn.is_dense and self.moe.is_dense and no_layer

    @property
    def shares_nothing(self) -> bool:
        """Whether FFN and MoE layers choose nothing, so that the sequences of a batch may run through them at once.

        Otherwise channels and experts are chosen, read and counted for each sequence alone.
        """
        return self.ffn.is_dense and self.moe.is_dense and not {"channels", "ffn"} & set(self.reuse.skip)
