"""The decoding step as one function of device tensors, captured in CUDA graphs: engine=cuda_graph.

A step of few tokens launches hundreds of short kernels, and launching them one by one takes longer than running them.
So the step is captured once per form (``device_form.Form``) and replayed: what changes from step to step lies in one
tensor of numbers that is copied to the device beforehand, and nothing in between waits for the host.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache as cached
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional

from harness.engine.cache import KVCache
from harness.engine.model import device_form
from harness.engine.model.device_form import Form, Sizes
from harness.engine.model.device_inputs import Inputs, State, fresh_blocks, summarise
from harness.engine.model.families import LayerWeights, ModelWeights
from harness.engine.model.step import Output, Segment, Step
from harness.engine.model.verification import Verification
from sparse.budget import AttentionBudget, FfnBudget, MoeBudget, Sparsity
from sparse.experts import probabilities
from sparse.ops.moe import routing
from sparse.ops.sparse_ffn import eager as ffn_op
from sparse.ops.tuning import interpreted
from sparse.ops.weights import MoeWeights

_WARM_UP = 2
"""Runs before a capture: the first one compiles and tunes kernels."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """The Triton operators of a step; their modules say what they take.

    Attributes:
        attention: dense and block attention.
        select: blocks of a retrieving layer.
        ffn: feed-forward network from chosen channels.
        moe: routed experts.
    """

    attention: Callable[..., Tensor]
    select: Callable[..., tuple[Tensor, Tensor]]
    ffn: Callable[..., Tensor]
    moe: Callable[..., Tensor]


@cached
def kernels() -> Kernels:
    """The kernels, imported at the first call."""
    from sparse.ops.block_attention.kernel import attention
    from sparse.ops.block_selection.kernel import select
    from sparse.ops.moe.kernel import moe
    from sparse.ops.sparse_ffn.kernel import ffn

    return Kernels(attention, select, ffn, moe)


@dataclass(frozen=True, slots=True)
class _Result:
    """What a step leaves on the device.

    Attributes:
        logits, features: of all tokens, those that fill up included.
        counts: numbers that only the device knows, int64, one after the other; None where there are none.
        names: what they are and how many of each.
    """

    logits: Tensor
    features: Tensor | None
    counts: Tensor | None
    names: tuple[tuple[str, int], ...]

    def read(self) -> dict[str, list[int]]:
        """The counts by name; waits for the device if there are any."""
        if self.counts is None:
            return {}
        numbers = iter(self.counts.tolist())
        return {name: list(islice(numbers, size)) for name, size in self.names}


class _Captured:
    """One form's step over one cache: its inputs and, on a GPU, its graph."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: _Result | None = None

    def run(self, body: Callable[[], _Result], pool: Any) -> _Result:
        """Replay ``body``; the first call captures it into a graph of ``pool``. Without a pool it simply runs.

        The inputs must hold a real step already: runs before the capture write to the cache what the replay writes.
        """
        if pool is None:
            return body()
        if self._graph is None or self._result is None:
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    body()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool):
                self._result = body()
        self._graph.replay()
        return self._result


class DeviceStep(Step):
    """Runs verification steps as captured CUDA graphs, with the kernels of ``sparse/ops``; prefill as its parent does.

    Keys and values of tokens that only fill up are written behind the valid positions, so a cache of
    :meth:`new_cache` has room for them. In Triton's interpreter the same function runs on the CPU, uncaptured.

    Args:
        weights: of the target model; layers with experts need them stacked (``MoeWeights.stacked``).
        taps: layers whose input features are wanted, for drafters that read them.
        graphs: captured steps kept per cache; the one that was not used for longest makes room.
        capture: off, the same function runs without a graph, as it always does on the CPU.

    Raises:
        ValueError: the weights are not on a GPU and the interpreter is not on, or experts are not stacked.
    """

    def __init__(
        self, weights: ModelWeights, taps: tuple[int, ...] = (), *, graphs: int = 32, capture: bool = True
    ) -> None:
        super().__init__(weights, taps)
        if weights.device.type != "cuda" and not interpreted():
            raise ValueError(f"engine=cuda_graph needs a GPU, the model is on {weights.device} (valid: engine=eager)")
        if any(layer.moe is not None and layer.moe.stacked is None for layer in weights.layers):
            raise ValueError("engine=cuda_graph needs stacked expert weights in every layer with experts")
        self.row_major = weights.device.type == "cuda"
        self._graphs = graphs
        self._captured: WeakKeyDictionary[KVCache, OrderedDict[Form, _Captured]] = WeakKeyDictionary()
        self._pool = torch.cuda.graph_pool_handle() if capture and weights.device.type == "cuda" else None

    @staticmethod
    def check(sparsity: Sparsity, *, experts: bool = False) -> None:
        """Refuse what a captured step cannot do: see :func:`harness.engine.model.device_form.check`."""
        device_form.check(sparsity, experts=experts)

    def new_cache(self, capacity: int, budget: AttentionBudget, batch: int = 1, *more: AttentionBudget) -> KVCache:
        """As its parent's, with room for the tokens that fill a step up."""
        return super().new_cache(capacity + device_form.MOST_TOKENS, budget, batch, *more)

    @torch.inference_mode()
    def run(
        self, segments: Sequence[Segment], cache: KVCache, run: Verification | None = None, last: int | None = None
    ) -> Output:
        """As its parent's, captured at the first step of its form and replayed from then on.

        Args:
            segments, cache, last: as for the parent; a sequence runs at most ``device_form.MOST_TOKENS`` tokens.
            run: budgets that :meth:`check` accepts; one with a probe runs as the parent's does.

        Raises:
            ValueError: as the parent's; a budget or a number of tokens that a captured step does not take.
        """
        run = Verification() if run is None else run
        if run.probe is not None:
            return super().run(segments, cache, run, last)
        order = sorted(range(len(segments)), key=lambda number: segments[number].row)
        placed = [segments[number] for number in order]
        sizes = Sizes(tuple(cache.lengths[one.row] for one in placed), tuple(len(one.tokens) for one in placed))
        self._check_positions(placed, sizes)
        tree = any(one.tree is not None for one in placed)
        form = device_form.form_of(sizes, tree, run.sparsity, run.left_out, cache.capacity, len(self.weights.layers))
        captured = self._prepared(cache, form)
        run.begin([one.row for one in segments], sum(sizes.counts))
        fresh = [fresh_blocks(cache, one.row, form) for one in placed]
        captured.inputs.fill(segments, order, fresh, cache, run.sparsity.attention)
        result = captured.run(lambda: self._body(form, captured.inputs, cache), self._pool)
        for one in placed:
            if form.fresh:
                cache.declare_summarised(one.row)
            cache.advance(one.row, len(one.tokens))
        wanted = captured.inputs.places[: sum(sizes.counts)]
        logits = result.logits.index_select(0, wanted if last is None else wanted[-last:])
        features = None
        if result.features is not None and run.tapped:
            features = result.features.index_select(0, wanted)
        device_form.count(run.trace, form, sizes, self.weights, result.read())
        return Output(logits, features)

    def forms(self, cache: KVCache) -> tuple[Form, ...]:
        """Forms whose steps over ``cache`` are kept, the longest unused one first."""
        return tuple(self._captured.get(cache, ()))

    def _check_positions(self, placed: Sequence[Segment], sizes: Sizes) -> None:
        for segment, start, count in zip(placed, sizes.starts, sizes.counts, strict=True):
            last = start + (count if segment.tree is None else 1 + segment.tree.depth)
            if last > self.weights.positions:
                raise ValueError(f"position {last} lies beyond the model's {self.weights.positions} positions")

    def _prepared(self, cache: KVCache, form: Form) -> _Captured:
        """What is kept for a form, made if it is new."""
        known = self._captured.setdefault(cache, OrderedDict())
        if form not in known:
            self.check(form.sparsity, experts=any(layer.moe is not None for layer in self.weights.layers))
            if len(known) >= self._graphs:
                if self._pool is not None:
                    torch.cuda.synchronize(self.weights.device)  # the graph may still run
                known.popitem(last=False)
            known[form] = _Captured(Inputs(form, len(cache.lengths), self.weights.device))
        known.move_to_end(form)
        return known[form]

    def _body(self, form: Form, inputs: Inputs, cache: KVCache) -> _Result:
        """The whole step; nothing here may depend on the contents of a tensor but through other tensors."""
        op, budget, reuse = kernels(), form.sparsity.attention, form.sparsity.reuse
        plan = form.plan(len(self.weights.layers))
        state = State.of(inputs, self.weights)
        query_weights = None
        if form.most is not None:
            summarise(inputs, cache)
            query_weights = state.query_weights(budget)
        hidden = functional.embedding(inputs.tokens.view(-1), self.weights.embedding)
        visible = None if inputs.visible is None else inputs.visible.view(-1, form.tokens)
        where = {"offsets": state.offsets, "starts": state.starts}
        chosen: tuple[Tensor, Tensor] | None = None
        tapped: list[Tensor] = []
        counts: dict[str, Tensor] = {}
        for number, (layer, what) in enumerate(zip(self.weights.layers, plan, strict=True)):
            if number in self.taps:
                tapped.append(hidden)
            if what == device_form.LEFT_OUT:
                continue
            queries, keys, values = self._project(layer, hidden, state.cos, state.sin)
            stored_keys, stored_values = cache.keys[number], cache.values[number]
            stored_keys[state.rows, state.pages, :, :, state.inside] = keys
            stored_values[state.rows, state.pages, :, state.inside] = values
            if what == device_form.RETRIEVES:
                summaries = {name: stored[number] for name, stored in cache.stored_summaries.items()}
                chosen = op.select(
                    queries, summaries, budget, keep=state.keep, most=form.most, weights=query_weights, **where
                )
            blocks = kept = None
            if what != device_form.DENSE and chosen is not None:
                blocks, kept = chosen
                if what == device_form.TAKES_OVER and number in inputs.heads:
                    blocks, kept = blocks[:, inputs.heads[number]], kept[:, inputs.heads[number]]
            mixed = op.attention(
                queries,
                stored_keys,
                stored_values,
                most_rows=form.tokens,
                block_size=budget.block_size,
                blocks=blocks,
                kept=kept,
                visible=visible,
                longest=form.longest or None,
                **where,
            )
            hidden = hidden + layer.output(mixed.reshape(hidden.shape[0], -1))
            if not reuse.skips("ffn", number):
                normed = self._normed(hidden, layer.ffn_norm)
                hidden = hidden + self._feed_forward(form, number, layer, normed, state, counts)
        features = torch.cat(tapped, dim=-1) if tapped else None
        read = torch.cat([one.reshape(-1).to(torch.int64) for one in counts.values()]) if counts else None
        names = tuple((name, one.numel()) for name, one in counts.items())
        return _Result(self._logits(hidden), features, read, names)

    def _feed_forward(
        self, form: Form, number: int, layer: LayerWeights, rows: Tensor, state: State, counts: dict[str, Tensor]
    ) -> Tensor:
        """Output of one FFN or MoE layer for all tokens; each sequence has its own channels and experts."""
        if layer.moe is not None:
            return self._moe(form, number, layer.moe, rows, state, counts)
        assert layer.ffn is not None
        budget = form.sparsity.ffn
        if not budget.applies(number):
            return ffn_op.dense_ffn(rows, layer.ffn)
        if layer.ffn.channels is None:
            raise ValueError("these FFN weights have no channel rows: only their dense path was prepared")
        activations = ffn_op.activations(rows, layer.ffn).view(form.sequences, form.tokens, -1)
        magnitudes = _magnitudes(activations, budget, state)
        if budget.rule == "topk":
            index = magnitudes.topk(budget.channels(layer.ffn.width), dim=-1, sorted=False).indices
            chosen: list[Tensor | None] = [None] * form.sequences
        else:
            index, found = _above(magnitudes.float(), budget.threshold(number))
            chosen = list(torch.split(found, 1))
            counts[device_form.channels_of(number)] = found
        outputs = [
            kernels().ffn(own, act, layer.ffn.channels, channels, some)
            for own, act, channels, some in zip(torch.split(rows, form.tokens), activations, index, chosen, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _moe(
        self, form: Form, number: int, moe: MoeWeights, rows: Tensor, state: State, counts: dict[str, Tensor]
    ) -> Tensor:
        """A layer with experts: routing for each sequence alone, then the union of all of them once."""
        assert moe.stacked is not None
        gate_up, down = moe.stacked
        budget, own, total = form.sparsity.moe, (form.sequences, form.tokens, -1), gate_up.shape[0]
        real = state.real.view(-1, 1)
        shares = probabilities(moe.router(rows))
        dense = routing.mark(shares, shares.topk(moe.top_k, dim=-1).indices)
        runs, most = dense, moe.top_k * rows.shape[0]
        if budget.union is not None and budget.union < total:
            survival, most = state.survival(budget.survival), budget.union * form.sequences
            alone = zip(shares.view(own), dense.view(own), survival, strict=True)
            runs = torch.cat([_within_union(*each, moe, budget) for each in alone])
        combine = routing.weigh(shares, runs, dense, normalise=moe.normalise, unit=moe.unit) * real
        dense, runs = dense & real, runs & real
        counts[device_form.union_of(number)] = torch.stack((dense, runs)).any(1).sum(1)
        if not budget.is_dense:
            counts[device_form.pairs_of(number)] = torch.stack((runs, runs & ~dense)).view(2, *own).sum((2, 3))
        output = kernels().moe(rows, combine, gate_up, down, limit=min(total, most))
        return output if moe.shared is None else output + ffn_op.dense_ffn(rows, moe.shared)


def _within_union(shares: Tensor, dense: Tensor, survival: Tensor, moe: MoeWeights, budget: MoeBudget) -> Tensor:
    """The token-expert pairs of one sequence, [tokens, experts], bool, under the budget on their union."""
    assert budget.union is not None
    loaded = routing.best_union(shares, dense, dense, limit=budget.union, normalise=moe.normalise, survival=survival)
    return routing.inside_union(shares, dense, loaded, outside=budget.outside, top_k=moe.top_k)


def _magnitudes(activations: Tensor, budget: FfnBudget, state: State) -> Tensor:
    """[sequences, width]: what the shared masks rank the channels of activations [sequences, tokens, width] by."""
    if budget.mask == "root":
        return activations[:, 0].abs()
    if budget.mask == "weighted":
        return torch.bmm(state.survival(budget.survival)[:, None], activations.abs().float())[:, 0]
    return activations.abs().masked_fill(~state.real[:, :, None], 0.0).amax(1)


def _above(magnitudes: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Channels of at least ``threshold`` and in any case the strongest, first in [sequences, width], int64; and how
    many they are, [sequences], int32."""
    width = magnitudes.shape[1]
    channel = torch.arange(width, device=magnitudes.device).expand_as(magnitudes)
    chosen = (magnitudes >= threshold).scatter_(1, magnitudes.argmax(dim=1, keepdim=True), True)
    place = (chosen.cumsum(1) - 1).masked_fill_(~chosen, width)
    index = torch.zeros(magnitudes.shape[0], width + 1, dtype=torch.int64, device=magnitudes.device)
    return index.scatter_(1, place, channel)[:, :width], chosen.sum(1, dtype=torch.int32)
