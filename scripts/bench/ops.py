"""Times of single operators and of the parts of a step, beside their byte limits.

Each call runs an operator once in every layer, with the layer's own weights, keys and values, and tells the time per
layer: what one layer read is gone from the caches before it is read again, as in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from harness.engine.cache import KVCache
from harness.engine.model.families import LayerWeights
from harness.engine.model.verification import Verification
from scripts.bench import checks
from scripts.bench.measure import Arm, Spread, alternate
from scripts.bench.records import OpRow
from scripts.bench.setting import REFERENCE, Setting, cells
from sparse import experts
from sparse.budget import FfnBudget, MoeBudget, Sparsity
from sparse.ops.block_attention import eager
from sparse.ops.moe import eager as moe_op
from sparse.ops.sparse_ffn import eager as ffn_op
from sparse.scoring import block_scores
from sparse.selection import select_blocks
from sparse.trace import Trace

_BATCH = 1
_PART = "step."


@dataclass(frozen=True, slots=True)
class Op:
    """One operator over all layers.

    Attributes:
        name, shape: what it is and the sizes that matter.
        layer: runs it for one layer.
        layers: how many there are.
        bytes, flops: of one layer, the least.
    """

    name: str
    shape: str
    layer: Callable[[int], object]
    layers: int
    bytes: float
    flops: float

    def call(self) -> None:
        """Every layer once."""
        for number in range(self.layers):
            self.layer(number)


def run(setting: Setting, repeats: int, screen: Console) -> list[OpRow]:
    """Check and time the operators at every context, on one sequence; prints a table each.

    Raises:
        checks.Red: an operator is off its reference; nothing of its context is printed.
    """
    rows: list[OpRow] = []
    for context, batch, caches in cells(setting):
        if batch != setting.batches[0]:
            continue
        checks.check_cell(setting, context, batch, caches)
        with torch.inference_mode():
            ops = list(_ops(setting, context, caches[REFERENCE]))
            arms: dict[str, Arm] = {f"{op.name} {op.shape}": op.call for op in ops}
            times = alternate(arms, setting.clock, max(3, repeats // 2))
        made = [_row(setting, op, times[f"{op.name} {op.shape}"]) for op in ops]
        for engine in setting.timed:
            made += _parts(setting, engine, context, caches[engine], max(3, repeats // 2))
        _table(made, context, screen)
        rows += made
    return rows


def _ops(setting: Setting, context: int, cache: KVCache) -> Iterator[Op]:
    for rows in dict.fromkeys(shape.rows for shape in setting.shapes):
        yield from _attention(setting, context, cache, rows)
        yield from _maps(setting, rows)
        kinds = setting.weights.layers
        if all(layer.ffn is not None for layer in kinds):
            yield from _ffn(setting, rows)
        elif all(layer.moe is not None for layer in kinds):
            yield from _moe(setting, rows)


def _attention(setting: Setting, context: int, cache: KVCache, rows: int) -> Iterator[Op]:
    """Dense attention, attention to chosen blocks, and the choice."""
    shape, budget = setting.weights.shape, setting.budget
    groups, length = shape.heads // shape.kv_heads, context
    whole = (length - rows) // budget.block_size
    tail, keep = whole * budget.block_size, budget.topk or 1
    size = (shape.layers, shape.kv_heads, rows * groups, shape.head_dim)
    queries = torch.randn(size, device=setting.weights.device).to(setting.weights.dtype) * shape.head_dim**-0.5

    def choose(layer: int) -> Tensor:
        scores = block_scores(queries[layer], cache.summaries(layer), budget, groups)[:, :whole]
        return select_blocks(scores, budget, keep).blocks

    chosen = [choose(layer) for layer in range(shape.layers)]

    def block(layer: int) -> Tensor:
        return eager.block_attention(
            queries[layer],
            *cache.layer(layer),
            chosen[layer],
            tail_start=tail,
            length=length,
            block_size=budget.block_size,
            groups=groups,
        )

    def dense(layer: int) -> Tensor:
        return eager.dense_attention(queries[layer], *cache.layer(layer), length, groups)

    position = shape.kv_heads * shape.head_dim * shape.itemsize
    kept = keep * budget.block_size + length - tail
    work = 4 * shape.heads * shape.head_dim * rows
    text = f"rows {rows}, context {context}"
    yield Op("dense_attention", text, dense, shape.layers, 2 * position * length, work * length)
    yield Op("block_attention", f"{text}, kept {kept}", block, shape.layers, 2 * position * kept, work * kept)
    scored = len(budget.summaries) * position * whole
    yield Op("block_selection", f"{text}, keep {keep}", choose, shape.layers, scored, 0.0)


def _maps(setting: Setting, rows: int) -> Iterator[Op]:
    """Projections of the attention, and the output head."""
    weights, shape = setting.weights, setting.weights.shape
    hidden = torch.randn(rows, shape.hidden, device=weights.device).to(weights.dtype)
    mixed = torch.randn(rows, shape.heads * shape.head_dim, device=weights.device).to(weights.dtype)
    outputs = shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads) * shape.hidden

    def layer(number: int) -> None:
        weights.layers[number].qkv(hidden)
        weights.layers[number].output(mixed)

    yield Op("projections", f"rows {rows}", layer, shape.layers, shape.itemsize * outputs, 2 * rows * outputs)
    size = shape.hidden * shape.vocab
    yield Op("head", f"rows {rows}", lambda _: weights.head(hidden), 1, shape.itemsize * size, 2 * rows * size)


def _ffn(setting: Setting, rows: int) -> Iterator[Op]:
    """A dense FFN, and one with a shared set of channels, the choice included."""
    weights, shape = setting.weights, setting.weights.shape
    budget = next((one.ffn for one in setting.axes.values() if not one.ffn.is_dense), FfnBudget("topk", 2 / 3))
    hidden = torch.randn(rows, shape.hidden, device=weights.device).to(weights.dtype)

    def layer_of(number: int) -> Any:
        return weights.layers[number].ffn

    def sparse(number: int) -> Tensor:
        ffn = layer_of(number)
        if ffn_op.fuses(ffn):
            return ffn_op.fused_ffn(hidden, ffn, budget, number)[0]
        activations = ffn_op.activations(hidden, ffn)
        return ffn_op.sparse_ffn(hidden, activations, ffn, ffn_op.select_channels(activations, budget, number))

    kept = budget.channels(shape.ffn)
    for name, call, channels, text in (
        ("dense_ffn", lambda number: ffn_op.dense_ffn(hidden, layer_of(number)), 3 * shape.ffn, ""),
        ("sparse_ffn", sparse, shape.ffn + 2 * kept, f", kept {kept} of {shape.ffn}"),
    ):
        size = channels * shape.hidden
        yield Op(name, f"rows {rows}{text}", call, shape.layers, shape.itemsize * size, 2 * rows * size)


def _moe(setting: Setting, rows: int) -> Iterator[Op]:
    """Experts of dense routing, and those of a budget on their union; routing is not timed."""
    weights, shape = setting.weights, setting.weights.shape
    hidden = torch.randn(rows, shape.hidden, device=weights.device).to(weights.dtype)
    budget = next((one.moe for one in setting.axes.values() if not one.moe.is_dense), MoeBudget(union=shape.top_k))

    def routed(layer: LayerWeights, restricted: bool) -> Tensor:
        assert layer.moe is not None
        probabilities = experts.probabilities(layer.moe.router(hidden))
        if restricted:
            return experts.restrict(probabilities, layer.moe, budget, 0)[0]
        return experts.route(probabilities, layer.moe)

    for name, restricted in (("dense_moe", False), ("union_moe", True)):
        combine = [routed(layer, restricted) for layer in weights.layers]
        union = sum(int((one != 0).any(0).sum()) for one in combine) / shape.layers
        pairs = sum(int((one != 0).sum()) for one in combine) / shape.layers

        def call(number: int, combine: list[Tensor] = combine) -> Tensor:
            moe = weights.layers[number].moe
            assert moe is not None
            return moe_op.moe(hidden, combine[number], moe)

        read = 3 * shape.hidden * (union * shape.expert_ffn + shape.shared_ffn) * shape.itemsize
        flops = 6 * shape.hidden * (pairs * shape.expert_ffn + rows * shape.shared_ffn)
        yield Op(name, f"rows {rows}, {union:.0f} experts", call, shape.layers, read, flops)


def _parts(setting: Setting, engine: str, context: int, cache: KVCache, repeats: int) -> list[OpRow]:
    """Where the time of a whole step goes, by the components that the step itself tells apart; none where it does not.

    Bytes and operations are not told apart there, so they are zero.
    """
    if setting.weights.device.type != "cpu":
        return []
    seconds: dict[tuple[str, str], list[float]] = {}
    for turn in range(1 + repeats):
        for axis in ("dense", "sparse"):
            for shape in setting.shapes:
                sparsity = Sparsity() if axis == "dense" else Sparsity(setting.budget)
                run = Verification(sparsity, Trace(clock=setting.clock))
                setting.run(engine, cache, setting.segments(context, _BATCH, shape), run)
                for part, taken in run.trace.seconds.items():
                    if turn and taken:
                        text = f"{axis} {shape.name}, context {context}"
                        seconds.setdefault((part, text), []).append(float(taken))
    return [_made(setting, engine, f"{_PART}{part}", text, taken, 0.0, 0.0) for (part, text), taken in seconds.items()]


def _row(setting: Setting, op: Op, seconds: list[float]) -> OpRow:
    return _made(setting, REFERENCE, op.name, op.shape, [one / op.layers for one in seconds], op.bytes, op.flops)


def _made(
    setting: Setting, engine: str, name: str, shape: str, seconds: list[float], read: float, flops: float
) -> OpRow:
    spread = Spread.of(seconds).scaled(1e3)
    return OpRow(
        arch=setting.arch,
        dtype=setting.dtype,
        engine=engine,
        op=name,
        shape=shape,
        median_ms=spread.median,
        p10_ms=spread.p10,
        p90_ms=spread.p90,
        limit_ms=1e3 * read / setting.bandwidth,
        bytes=float(read),
        flops=float(flops),
        **asdict(setting.place),
    )


def _table(rows: list[OpRow], context: int, screen: Console) -> None:
    """Operators per layer, and the parts of whole steps."""
    table = Table(title=f"operators, ms per layer: context {context}", title_justify="left")
    for column in ("operator", "shape", "engine", "median ms", "p10", "p90", "limit ms", "of limit"):
        table.add_column(column, justify="left" if column in ("operator", "shape", "engine") else "right")
    for row in (row for row in rows if not row.op.startswith(_PART)):
        numbers = [f"{value:.3f}" for value in (row.median_ms, row.p10_ms, row.p90_ms)]
        limit = (f"{row.limit_ms:.3f}", f"{row.limit_ms / row.median_ms:.0%}") if row.limit_ms else ("", "")
        table.add_row(row.op, row.shape, row.engine, *numbers, *limit)
    screen.print(table)
    parts = [row for row in rows if row.op.startswith(_PART)]
    if not parts:
        return
    names = list(dict.fromkeys(row.op for row in parts))
    table = Table(title=f"parts of whole steps, median ms: context {context}", title_justify="left")
    for column in ("step", "engine", *(name.removeprefix(_PART) for name in names)):
        table.add_column(column, justify="left" if column in ("step", "engine") else "right")
    for shape, engine in dict.fromkeys((row.shape, row.engine) for row in parts):
        own = {row.op: f"{row.median_ms:.2f}" for row in parts if (row.shape, row.engine) == (shape, engine)}
        table.add_row(shape.partition(",")[0], engine, *(own.get(name, "") for name in names))
    screen.print(table)
