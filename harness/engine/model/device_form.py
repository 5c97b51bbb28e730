"""What is fixed when a verification step is captured: sizes, bounds, the plan of its layers, and what it counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.engine.cache import PAGE
from harness.engine.model.families import LayerWeights, ModelWeights
from sparse.budget import Sparsity
from sparse.ops.sparse_ffn.eager import DENSE_PATH as DENSE_FFN_PATH
from sparse.ops.weights import MoeWeights
from sparse.trace import ANCHOR_HIT, ANCHOR_MISS, DRAFT_REUSE, DROPPED_PATH, RESTRICTED_PATH, SELECT_PATH, Trace

DENSE_PATH = "dense_attention.triton"
SPARSE_PATH = "block_attention.triton"
FFN_PATH = "sparse_ffn.triton"
MOE_PATH = "moe.triton"
MOST_TOKENS = 64
"""Most tokens that one sequence runs in a step: what the kernels take at once."""
LEFT_OUT, DENSE, RETRIEVES, TAKES_OVER = "left out", "dense", "retrieves", "takes over"


@dataclass(frozen=True, slots=True)
class Form:
    """All that a captured step takes for granted; steps of one form differ only in the contents of tensors.

    Attributes:
        sequences: that take part.
        tokens: of each sequence, those that only fill up included.
        tree: whether a mask says which tokens of its step a token sees; otherwise causal.
        sparsity: budgets.
        most: bound of the whole blocks kept per KV head; None where every layer attends to everything.
        longest: bound of the positions of a sequence for layers that attend to everything; 0 where none does.
        left_out: layers that do not run.
    """

    sequences: int
    tokens: int
    tree: bool
    sparsity: Sparsity
    most: int | None
    longest: int
    left_out: frozenset[int] = frozenset()

    @property
    def fresh(self) -> int:
        """Blocks per sequence that one step of so many tokens makes whole at most; 0 where no block is chosen."""
        block = self.sparsity.attention.block_size
        return 0 if self.most is None else (self.tokens + block - 1) // block

    def plan(self, layers: int) -> tuple[str, ...]:
        """What attention does in each layer: LEFT_OUT, DENSE, RETRIEVES or TAKES_OVER (METHOD sections 2 and 5)."""
        sparsity, plan, anchored = self.sparsity, [], False
        for layer in range(layers):
            if layer in self.left_out:
                plan.append(LEFT_OUT)
            elif self.most is None or layer < sparsity.attention.dense_layers:
                plan.append(DENSE)
            elif anchored and not sparsity.reuse.retrieves(layer):
                plan.append(TAKES_OVER)
            else:
                plan.append(RETRIEVES)
                anchored = True
        return tuple(plan)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the host knows of one step: positions before it and tokens of each sequence, without those that fill up."""

    starts: tuple[int, ...]
    counts: tuple[int, ...]


def bucket(count: int) -> int:
    """Tokens of a captured step that runs ``count`` of them: few sizes, so that few steps are captured.

    Raises:
        ValueError: more than MOST_TOKENS.
    """
    if count > MOST_TOKENS:
        raise ValueError(
            f"a sequence runs {count} tokens in one step: engine=cuda_graph takes up to {MOST_TOKENS} "
            "(shorten the draft, or choose engine=eager)"
        )
    for limit, multiple in ((2, 1), (24, 4), (MOST_TOKENS, 8)):
        if count <= limit:
            return -(-count // multiple) * multiple
    raise AssertionError


def rounded(count: int) -> int:
    """``count`` rounded up to one of four sizes between powers of two."""
    multiple = 1 << max(0, (count - 1).bit_length() - 3)
    return -(-count // multiple) * multiple


def form_of(sizes: Sizes, tree: bool, sparsity: Sparsity, left_out: frozenset[int], capacity: int, layers: int) -> Form:
    """The form of a step.

    Args:
        sizes: starts and numbers of tokens.
        tree: whether some sequence's tokens branch.
        sparsity: budgets.
        left_out: layers that do not run.
        capacity: positions of a row of the cache.
        layers: of the model.

    Raises:
        ValueError: too many tokens, or they do not fit into the cache.
    """
    tokens = bucket(max(sizes.counts))
    if max(sizes.starts) + tokens > capacity:
        tokens = max(sizes.counts)
    stop = max(sizes.starts) + tokens
    if stop > capacity:
        raise ValueError(f"position {stop} lies beyond the cache's capacity of {capacity}")
    attention = sparsity.attention
    most = None
    if any(attention.skips(layers - 1, start) for start in sizes.starts):
        most = min(rounded(max(attention.blocks(start) for start in sizes.starts)), capacity // attention.block_size)
    dense = most is None or attention.dense_layers > 0
    longest = min(rounded(-(-stop // PAGE)) * PAGE, capacity) if dense else 0
    return Form(len(sizes.counts), tokens, tree, sparsity, most, longest, left_out)


def check(sparsity: Sparsity, *, experts: bool = False) -> None:
    """Refuse budgets whose mechanisms need the host in the middle of a step.

    Args:
        sparsity: budgets of an arm.
        experts: whether the model has routed experts.

    Raises:
        ValueError: one line that names the setting, its value and what is valid.
    """
    attention, ffn, moe, reuse = sparsity.attention, sparsity.ffn, sparsity.moe, sparsity.reuse
    if not attention.is_dense:
        _refuse(attention.score == "oracle", "attn.score=oracle", "mean, bound or gaussian")
        _refuse(attention.query == "max", "attn.query=max", "first, mean or weighted")
        _refuse(attention.heads == "pooled", "attn.heads=pooled", "per_head")
        _refuse(bool(attention.low_heads), "attn.low_share above 0", "0")
    if not ffn.is_dense:
        _refuse(ffn.mask == "token", "ffn.mask=token", "union, root or weighted")
        _refuse(experts, f"ffn={ffn.rule} in a model with experts", "ffn=dense")
    _refuse(moe.rule != "dense", f"moe={moe.rule}", "dense or union")
    for what in ("retrieval", "channels"):
        skips = what in reuse.skip and bool(reuse.skip_layers)
        _refuse(skips, f"reuse.skip={what}, which ages by steps,", "ffn, or reuse=anchors or none")


def _refuse(found: bool, setting: str, valid: str) -> None:
    if found:
        raise ValueError(f"{setting} does not run with engine=cuda_graph (valid: {valid}; engine=eager runs it)")


def count(trace: Trace, form: Form, sizes: Sizes, weights: ModelWeights, read: Mapping[str, Sequence[int]]) -> None:
    """Enter one step into the counters, as it really ran: weights that sequences share are read once.

    Args:
        trace: takes the numbers.
        form: of the step.
        sizes: starts and numbers of tokens.
        weights: of the model.
        read: what only the device knew, as :func:`channels_of`, :func:`union_of` and :func:`pairs_of` name it.
    """
    _count_attention(trace, form, sizes, len(weights.layers))
    rows, sequences = sum(sizes.counts), len(sizes.counts)
    for number, layer in enumerate(weights.layers):
        if number in form.left_out:
            continue
        if form.sparsity.reuse.skips("ffn", number):
            trace.skipped("ffn")
            trace.ffn(number, width=_width(layer), gates=0, channels=0, rows=0)
            trace.experts_wanted[number] += 0 if layer.moe is None else layer.moe.top_k
        elif layer.moe is not None:
            _count_experts(trace, form, sizes, number, layer.moe, read)
        elif layer.ffn is not None and form.sparsity.ffn.applies(number):
            width = layer.ffn.width
            fixed = [form.sparsity.ffn.channels(width)] * sequences
            chosen = read.get(channels_of(number), fixed)
            trace.paths[FFN_PATH] += sequences
            trace.paths[DROPPED_PATH] += sum(own < width for own in chosen)
            kept = sum(tokens * own for tokens, own in zip(sizes.counts, chosen, strict=True))
            trace.ffn(number, width=0, gates=width, channels=sum(chosen), rows=rows, kept=kept)
            trace.width[number] += sequences * width
        elif layer.ffn is not None:
            width = layer.ffn.width
            trace.paths[DENSE_FFN_PATH] += 1
            trace.ffn(number, width=width, gates=width, channels=width, rows=rows)


def channels_of(layer: int) -> str:
    """Name of a count: the chosen FFN channels of each sequence."""
    return f"channels.{layer}"


def union_of(layer: int) -> str:
    """Name of two counts: the distinct experts of dense routing, and those that ran."""
    return f"union.{layer}"


def pairs_of(layer: int) -> str:
    """Name of counts of token-expert pairs: those that run in each sequence, then those that are substitutes."""
    return f"pairs.{layer}"


def _count_attention(trace: Trace, form: Form, sizes: Sizes, layers: int) -> None:
    budget, sequences = form.sparsity.attention, len(sizes.counts)
    lengths = [start + own for start, own in zip(sizes.starts, sizes.counts, strict=True)]
    missing = [start // budget.block_size - budget.blocks(start) for start in sizes.starts]
    attended = [length - blocks * budget.block_size for length, blocks in zip(lengths, missing, strict=True)]
    choosing = sum(blocks > 0 for blocks in missing)
    scored = sum(start // budget.block_size for start, blocks in zip(sizes.starts, missing, strict=True) if blocks)
    for layer, what in enumerate(form.plan(layers)):
        if what == LEFT_OUT:
            continue
        positions = lengths if what == DENSE else attended
        trace.paths[DENSE_PATH if what == DENSE else SPARSE_PATH] += sequences
        trace.visible[layer] += sum(lengths)
        trace.attended[layer] += sum(positions)
        trace.attention_products += sum(own * read for own, read in zip(sizes.counts, positions, strict=True))
        if what != DENSE:
            trace.paths[DRAFT_REUSE] += sum(sizes.counts) - sequences
        if what == TAKES_OVER:
            trace.paths[ANCHOR_HIT] += choosing
        if what == RETRIEVES:
            trace.paths[SELECT_PATH] += choosing
            trace.scored += scored
            trace.paths[ANCHOR_MISS] += 0 if form.sparsity.reuse.retrieves(layer) else choosing


def _count_experts(
    trace: Trace, form: Form, sizes: Sizes, number: int, moe: MoeWeights, read: Mapping[str, Sequence[int]]
) -> None:
    wanted, loaded = read[union_of(number)]
    rows, pairs = sum(sizes.counts), sum(sizes.counts) * moe.top_k
    if not form.sparsity.moe.is_dense:
        numbers = read[pairs_of(number)]
        kept, substituted = numbers[: len(sizes.counts)], numbers[len(sizes.counts) :]
        for tokens, ran, replaced in zip(sizes.counts, kept, substituted, strict=True):
            wanted_pairs = tokens * moe.top_k
            trace.pairs.update(wanted=wanted_pairs, kept=ran, substituted=replaced, dropped=wanted_pairs - ran)
            trace.paths[RESTRICTED_PATH] += ran < wanted_pairs or replaced > 0
        pairs = sum(kept)
    trace.paths[MOE_PATH] += 1
    trace.experts_wanted[number] += wanted
    trace.experts_loaded[number] += loaded
    shared = 0 if moe.shared is None else moe.shared.width
    width = moe.experts[0].width
    needed, products = loaded * width + shared, pairs * width + rows * shared
    trace.ffn(number, width=needed, gates=needed, channels=needed, rows=0)
    trace.gate_products += products
    trace.channel_products += products


def _width(layer: LayerWeights) -> int:
    """Channels that one token needs of a layer: those of its FFN, or of its experts and the shared one."""
    if layer.moe is None:
        return 0 if layer.ffn is None else layer.ffn.width
    shared = 0 if layer.moe.shared is None else layer.moe.shared.width
    return layer.moe.top_k * layer.moe.experts[0].width + shared
