"""Bytes and FLOPs of steps per component, from shapes and the selections really made (METHOD section 7).

The counts are the least traffic that steps need: each weight, key and value once, new keys and values written once.
What a whole block adds to its summary, embeddings, norms and activations are left out: together they stay below one per
cent. A measured time beside :meth:`Peaks.seconds` says how far an implementation is from its limit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import expm1

from sparse.budget import AttentionBudget
from sparse.trace import Trace

COMPONENTS = ("linear", "attention", "select", "ffn", "moe", "head")
"""Parts of a verification step: attention projections; attention with the writes of its keys and values; scoring of
blocks; dense FFNs; routers and experts; output head."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Work that something needs at least; costs add up.

    Attributes:
        bytes: read from memory or written to it.
        flops: floating-point operations, a multiplication with its addition counting two.
    """

    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """Both together."""
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def __mul__(self, times: float) -> Cost:
        """So many times this."""
        return Cost(self.bytes * times, self.flops * times)


def total(costs: Iterable[Cost]) -> Cost:
    """All of them together."""
    return sum(costs, Cost())


@dataclass(frozen=True, slots=True)
class Peaks:
    """What a device reaches at best.

    Attributes:
        bandwidth: bytes per second.
        rate: floating-point operations per second of matrix products; infinite where it is not known.
    """

    bandwidth: float
    rate: float = float("inf")

    def seconds(self, cost: Cost) -> float:
        """Least time of work whose traffic and arithmetic overlap perfectly."""
        return max(cost.bytes / self.bandwidth, cost.flops / self.rate)

    def binds(self, cost: Cost) -> str:
        """Which side sets that time: ``bandwidth`` or ``compute``."""
        return "bandwidth" if cost.bytes / self.bandwidth >= cost.flops / self.rate else "compute"


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder-only transformer.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim, vocab: the usual sizes.
        ffn: channels of a dense FFN layer.
        itemsize: bytes per weight and per cached key or value.
        experts: routed experts of an MoE layer; 0 in a dense model, as all that follow.
        top_k: routed experts per token.
        expert_ffn: channels of a routed expert.
        shared_ffn: channels of the shared experts together.
        moe_layers: layers with routed experts; the others have a dense FFN.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    itemsize: int
    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    moe_layers: int = 0

    @property
    def projections(self) -> int:
        """Weights of one layer's attention projections."""
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def fixed_weights(self) -> int:
        """Weights that every step reads whatever is sparse: attention projections, routers and the output head."""
        return self.layers * self.projections + self.hidden * (self.moe_layers * self.experts + self.vocab)

    @property
    def channels(self) -> int:
        """FFN channels of the whole model, all experts included."""
        moe = self.moe_layers * (self.experts * self.expert_ffn + self.shared_ffn)
        return (self.layers - self.moe_layers) * self.ffn + moe

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights but the embedding."""
        return self.itemsize * (self.fixed_weights + 3 * self.hidden * self.channels)

    @property
    def kv_bytes_per_token(self) -> int:
        """Cache bytes of one position over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.itemsize


def trace_costs(
    shape: ModelShape,
    budget: AttentionBudget,
    trace: Trace,
    *,
    layers: int | None = None,
    logits: int | None = None,
) -> dict[str, Cost]:
    """What the traced steps need, by COMPONENTS.

    Where some layers are dense and some have experts, counters of both kinds are split by their widths; that is exact
    unless tokens share no channels or layers leave their FFN out. Sums over components are always exact.

    Args:
        shape: the model.
        budget: says which summaries, or for the oracle which keys, the selector reads, and for which queries.
        trace: of all steps.
        layers: decoder layers that ran; all by default.
        logits: tokens that went through the output head; all by default.
    """
    size, rows, steps = shape.itemsize, trace.rows, trace.steps
    ran = shape.layers if layers is None else layers
    position = shape.kv_heads * shape.head_dim
    scored = budget.block_size if budget.score == "oracle" else len(budget.summaries)
    moved = 2 * position * (trace.attended.total() + rows * ran)
    head, routers = shape.hidden * shape.vocab, shape.hidden * shape.experts * min(shape.moe_layers, ran)
    ffn, moe = _feed_forward(shape, trace)
    return {
        "linear": Cost(size * steps * ran * shape.projections, 2 * rows * ran * shape.projections),
        "attention": Cost(size * moved, 4 * shape.heads * shape.head_dim * trace.attention_products),
        "select": Cost(size * scored * position * trace.scored, _scoring_flops(shape, budget, trace)),
        "ffn": ffn,
        "moe": moe + Cost(size * steps * routers, 2 * rows * routers),
        "head": Cost(size * steps * head, 2 * (rows if logits is None else logits) * head),
    }


def trace_bytes(shape: ModelShape, budget: AttentionBudget, trace: Trace) -> float:
    """Least bytes that the traced steps move: those of :func:`trace_costs` together."""
    return total(trace_costs(shape, budget, trace).values()).bytes


def trace_flops(shape: ModelShape, budget: AttentionBudget, trace: Trace) -> float:
    """Floating-point operations of the traced steps: those of :func:`trace_costs` together."""
    return total(trace_costs(shape, budget, trace).values()).flops


def _scoring_flops(shape: ModelShape, budget: AttentionBudget, trace: Trace) -> float:
    """Products of queries with summaries; queries are averaged over heads first where the scores are linear in them."""
    if not trace.scored:
        return 0.0
    rows = trace.attention_products / trace.attended.total()
    if budget.score == "oracle":
        vectors = rows * shape.heads * budget.block_size
    elif budget.score == "mean" and budget.gqa == "mean" and budget.query != "max":
        vectors = shape.kv_heads
    else:
        vectors = shape.heads * len(budget.summaries) * (rows if budget.query == "max" else 1)
    return float(2 * shape.head_dim * vectors * trace.scored)


def _feed_forward(shape: ModelShape, trace: Trace) -> tuple[Cost, Cost]:
    """Dense FFNs, and experts without routers."""
    whole = Cost(
        shape.itemsize * shape.hidden * (trace.gates + 2 * trace.channels.total()),
        2 * shape.hidden * (trace.gate_products + 2 * trace.channel_products),
    )
    if shape.moe_layers in (0, shape.layers):
        return (Cost(), whole) if shape.moe_layers else (whole, Cost())
    plain = [layer for layer in trace.width if layer not in trace.experts_wanted]
    width, channels = sum(trace.width[layer] for layer in plain), sum(trace.channels[layer] for layer in plain)
    gates = trace.gates * width / trace.width.total() if width else 0.0
    products = trace.rows * shape.ffn * len(plain) * (1 + 2 * channels / width) if width else 0.0
    ffn = Cost(shape.itemsize * shape.hidden * (gates + 2 * channels), min(whole.flops, 2 * shape.hidden * products))
    return ffn, whole + ffn * -1


def expected_union(experts: int, top_k: int, tokens: float, skew: float = 0.0) -> float:
    """Distinct routed experts that independent tokens are expected to need (METHOD section 4).

    Tokens of one draft resemble each other, so that a real union is smaller.

    Args:
        experts: of a layer.
        top_k: per token.
        tokens: of the step.
        skew: 0 for uniform routing; else the n-th most popular expert is n ** -skew times as popular as the first, and
            a token draws its experts without putting back. Their chances are those of exponential clocks to have rung
            by the time at which top_k have on average, so that the result is within a few per cent.

    Raises:
        ValueError: top_k is not between 1 and the experts, or skew is negative.
    """
    if not 1 <= top_k <= experts or skew < 0:
        raise ValueError(f"top_k={top_k} must lie between 1 and {experts} experts, skew={skew} must not be negative")
    chances = [top_k / experts] * experts
    if skew and top_k < experts:
        weights = [float(rank) ** -skew for rank in range(1, experts + 1)]
        low, high = 0.0, 1.0
        while _raced(weights, high) < top_k:
            high *= 2
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if _raced(weights, middle) < top_k else (low, middle)
        chances = [-expm1(-weight * high) for weight in weights]
    return sum(1 - float((1 - chance) ** tokens) for chance in chances)


def _raced(weights: list[float], time: float) -> float:
    """How many exponential clocks of these rates are expected to have rung by ``time``."""
    return sum(-expm1(-weight * time) for weight in weights)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A step that was not run.

    Attributes:
        batch: sequences.
        context: positions before the step, of each of them.
        rows: tokens of each, the root included.
        kept: positions before the step that each KV head attends to; None for all.
        block_size: positions per scored block.
        every: every n-th layer retrieves, the others take its blocks.
        keep: share of the FFN channels whose up and down weights are read, inside experts too.
        union: routed experts that a layer may load for all tokens of the step; None for those that they want.
        skew: of the routing, see :func:`expected_union`.
    """

    batch: int = 1
    context: int = 0
    rows: int = 1
    kept: int | None = None
    block_size: int = 16
    every: int = 1
    keep: float = 1.0
    union: float | None = None
    skew: float = 0.0

    @property
    def selects(self) -> bool:
        """Whether blocks are left out."""
        return self.kept is not None and self.kept < self.context // self.block_size * self.block_size

    def budget(self) -> AttentionBudget:
        """Mean-key scores of the first token's query."""
        if not self.selects:
            return AttentionBudget(block_size=self.block_size)
        return AttentionBudget(topk=max(2, (self.kept or 0) // self.block_size), block_size=self.block_size)


def plan_costs(shape: ModelShape, plan: StepPlan, *, logits: int | None = None) -> dict[str, Cost]:
    """:func:`trace_costs` of a step that was not run.

    Args:
        shape: the model.
        plan: the step; the experts of all its tokens are loaded once.
        logits: as in :func:`trace_costs`.
    """
    trace, tokens = Trace(), plan.batch * plan.rows
    trace.begin(tokens)
    own = plan.context % plan.block_size + plan.rows
    attended = (plan.kept or 0) + own if plan.selects else plan.context + plan.rows
    for layer in range(shape.layers):
        trace.attention("", layer, plan.batch * (plan.context + plan.rows), plan.batch * attended, plan.rows)
        if plan.selects and layer % plan.every == 0:
            trace.scored += plan.batch * (plan.context // plan.block_size)
        if layer >= shape.layers - shape.moe_layers:
            wanted = expected_union(shape.experts, shape.top_k, tokens, plan.skew)
            union = wanted if plan.union is None else min(plan.union, wanted)
            trace.experts_wanted[layer] += round(wanted)
            width = round(union * shape.expert_ffn) + shape.shared_ffn
            per_token = round(min(shape.top_k, union) * shape.expert_ffn) + shape.shared_ffn
        else:
            width = per_token = shape.ffn
        channels = round(plan.keep * width)
        trace.ffn(layer, width=width, gates=width, channels=channels, rows=0)
        trace.gate_products += tokens * per_token
        trace.channel_products += tokens * round(plan.keep * per_token)
    return trace_costs(shape, plan.budget(), trace, logits=logits)


def prefill_cost(shape: ModelShape, start: int, tokens: int, chunk: int) -> Cost:
    """A dense prefill of ``tokens`` after ``start`` cached positions, ``chunk`` at a time; logits of the last one."""
    whole = Cost()
    for begin in range(start, start + tokens, chunk):
        rows = min(chunk, start + tokens - begin)
        costs = plan_costs(shape, StepPlan(context=begin, rows=rows), logits=1)
        last = begin + rows == start + tokens
        whole += total(cost for name, cost in costs.items() if last or name != "head")
    return whole


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Sizes of an EAGLE-3 head (arXiv 2503.01840): one decoder layer over pairs of a token and a state.

    Attributes:
        hidden, heads, kv_heads, head_dim, ffn: of its layer, whose queries, keys and values read both of a pair.
        features: width of the target's features.
        vocab: tokens that it can propose.
        itemsize: bytes per weight.
    """

    hidden: int
    features: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    itemsize: int

    def remember(self, tokens: int, *, alone: bool = True) -> Cost:
        """Features fused, keys and values of ``tokens`` observed tokens computed together and stored.

        Args:
            tokens: how many.
            alone: in a pass of their own; otherwise a pass that is counted elsewhere reads the weights.
        """
        weights = self.hidden * (self.features + 4 * self.kv_heads * self.head_dim) if tokens else 0
        stored = 2 * tokens * self.kv_heads * self.head_dim
        return Cost(self.itemsize * (weights * alone + stored), 2 * tokens * weights)

    def run(self, rows: int, positions: int, fused: int = 0) -> Cost:
        """A pass through layer and output head.

        Args:
            rows: tokens, observed or drafted.
            positions: that they attend to, their own included.
            fused: those of ``rows`` whose features are fused first.
        """
        keys, queries = self.kv_heads * self.head_dim, self.heads * self.head_dim
        layer = self.hidden * (2 * (queries + 2 * keys) + queries + 3 * self.ffn)
        weights, fusing = layer + self.hidden * self.vocab, self.features * self.hidden
        moved = weights + (fusing if fused else 0) + 2 * keys * (positions + rows)
        return Cost(self.itemsize * moved, 2 * (rows * weights + fused * fusing) + 4 * rows * queries * positions)
