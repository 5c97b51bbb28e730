"""Time of each kernel at the sizes of public models, beside its bytes over the device's bandwidth.

Calls are captured in one CUDA graph over several sets of inputs, round after round.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.engine.model.shapes import SHAPES
from scripts.bench import records
from scripts.bench.gpu_baseline import prefix_attention
from scripts.bench.gpu_common import PAGE, cache_bytes, rotated_ms, sets, surviving
from scripts.bench.gpu_report import Report
from scripts.bench.measure import Spread
from scripts.bench.records import OpRow, Place
from sparse.budget import AttentionBudget

BLOCK = 16
DENSITY = 0.12
TARGET = 0.7
"""Least share of its bytes-over-bandwidth limit that a kernel should reach."""
LEAST_LIMIT_MS = 0.01
"""Below it launches and the depth of a pipeline take the time, and a share of the limit says nothing."""
_SECONDS = 15
"""Guess at one operator: compiling and tuning included."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Sizes of attention in one layer.

    Attributes:
        arch: a name of ``SHAPES``.
        batch, context, rows: sequences, positions before the step, tokens of each.
    """

    arch: str
    batch: int
    context: int
    rows: int

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, KV heads and head size."""
        shape = SHAPES[self.arch]
        heads = int(shape["num_attention_heads"])
        size = int(shape.get("head_dim") or shape["hidden_size"] // heads)
        return heads, int(shape["num_key_value_heads"]), size

    @property
    def text(self) -> str:
        """As tables show it."""
        return f"{self.arch}, batch {self.batch}, context {self.context}, rows {self.rows}"


ATTENTION = (
    Attention("llama31_8b", 16, 8192, 7),
    Attention("llama31_8b", 1, 32768, 7),
    Attention("llama_7b", 8, 8192, 7),
    Attention("qwen3_30b_a3b", 1, 8192, 60),
    Attention("smollm2_135m", 1, 7300, 7),
)
FFN = (("llama31_8b", 7), ("llama31_8b", 56), ("llama_7b", 7), ("smollm2_135m", 7))
MOE = (("qwen3_30b_a3b", 60, 128), ("qwen3_30b_a3b", 60, 32), ("qwen3_30b_a3b", 7, 32))


@dataclass(frozen=True, slots=True)
class Op:
    """One operator on several sets of inputs.

    Attributes:
        name, shape: what it is, and its sizes.
        bytes, flops: the least of one call.
        make: a call on fresh inputs.
        kernel: of ours that is timed; empty for the library's.
    """

    name: str
    shape: str
    bytes: float
    flops: float
    make: Callable[[], Callable[[], object]]
    kernel: str = ""


@dataclass(frozen=True, slots=True)
class Timed:
    """An operator's row.

    Attributes:
        row: for the CSV file.
        judged: whether a share of the limit means something: the work is long enough and does not fit the L2 cache.
    """

    row: OpRow
    judged: bool

    @property
    def share(self) -> float:
        """Of the limit by bytes."""
        return self.row.limit_ms / self.row.median_ms

    @property
    def text(self) -> str:
        """One line of the table of targets."""
        row = self.row
        told = f"{row.op}, {row.shape}: {1e3 * row.median_ms:.1f} us"
        if not self.judged:
            return f"{told}, too short or too small for a share of its limit"
        aim = f"target {TARGET:.0%}" if row.engine == "triton" else "for comparison"
        return f"{told}, limit {1e3 * row.limit_ms:.1f} us, {self.share:.0%} of it, {aim}"


def judged(limit_ms: float, rotating: float, cache: float) -> bool:
    """Whether a kernel's share of its limit means something.

    Args:
        limit_ms: bytes over bandwidth.
        rotating: bytes of all sets of inputs.
        cache: bytes of the L2 cache.
    """
    return limit_ms >= LEAST_LIMIT_MS and rotating > cache


def run(place: Place, bandwidth: float, file: Path, report: Report) -> Iterator[Timed]:
    """Time every operator that the time allows; a row goes to ``file`` as soon as it is known.

    Raises:
        Lost: the device is; what was given by then stands.
    """
    for op in operators():
        name = f"{op.name}, {op.shape}"
        if op.kernel in report.red:
            report.deadline.note(name, f"red: {op.kernel}")
        elif report.deadline.allows(name, _SECONDS):
            timed = None
            with surviving(report, name):
                number = sets(op.bytes)
                spread = rotated_ms([op.make() for _ in range(number)])
                row = _row(op, spread, place, bandwidth)
                timed = Timed(row, judged(row.limit_ms, number * op.bytes, cache_bytes()))
                print(timed.text, flush=True)
                records.append(file, [row])
            if timed is not None:
                yield timed


def operators() -> Iterator[Op]:
    """All of them, those of the targets first."""
    for sizes in ATTENTION:
        yield from _attention(sizes)
    for arch, rows, union in MOE:
        yield _moe(arch, rows, union)
    for arch, rows in FFN:
        yield _ffn(arch, rows)


def _attention(sizes: Attention) -> Iterator[Op]:
    """Block attention, dense attention and the choice of blocks, and dense attention by the library's kernel."""
    heads, kv_heads, head_dim = sizes.heads
    whole = sizes.context // BLOCK
    keep = round(DENSITY * whole)
    position = 4 * kv_heads * head_dim
    """Bytes of keys and values of one position in 16 bits."""
    small = 4 * heads * head_dim * sizes.rows
    for name, kept in (("block_attention", keep * BLOCK), ("dense_attention", sizes.context)):
        positions = kept + sizes.rows + (sizes.context % BLOCK if kept != sizes.context else 0)

        def make(sparse: bool = name == "block_attention") -> Callable[[], object]:
            inputs = _inputs(sizes, keep if sparse else None)
            return lambda: _kernel("block_attention").attention(**inputs)

        read = sizes.batch * (position * positions + small)
        yield Op(
            name, sizes.text, read, 4 * sizes.batch * sizes.rows * heads * head_dim * positions, make, "block_attention"
        )

    def flash() -> Callable[[], object]:
        size = (sizes.batch, kv_heads, sizes.context, head_dim)
        keys, values = (_drawn(size) for _ in range(2))
        queries = _drawn((sizes.batch, kv_heads, heads // kv_heads * sizes.rows, head_dim))
        return lambda: prefix_attention(queries, keys, values)

    read = sizes.batch * (position * sizes.context + small)
    flops = 4 * sizes.batch * sizes.rows * heads * head_dim * sizes.context
    yield Op("flash_prefix", sizes.text, read, flops, flash)
    budget = AttentionBudget(topk=keep)

    def choose() -> Callable[[], object]:
        queries = _drawn((sizes.batch * sizes.rows, heads, head_dim))
        summaries = {"mean": _drawn((sizes.batch, kv_heads, head_dim, whole + 16))}
        weights = (torch.arange(sizes.batch * sizes.rows, device="cuda") % sizes.rows == 0).float()
        wanted = torch.full((sizes.batch,), keep, dtype=torch.int32, device="cuda")
        rest = {"keep": wanted, "most": keep, "weights": weights, **_where(sizes)}
        return lambda: _kernel("block_selection").select(queries, summaries, budget, **rest)

    read = 2 * sizes.batch * kv_heads * head_dim * whole
    yield Op("block_selection", f"{sizes.text}, {keep} of {whole}", read, 0.0, choose, "block_selection")


def _inputs(sizes: Attention, keep: int | None) -> dict[str, Any]:
    """Arguments of the attention kernel on random data, keys row-major behind a transposed view."""
    heads, kv_heads, head_dim = sizes.heads
    pages = -(-(sizes.context + sizes.rows) // PAGE)
    found: dict[str, Any] = {
        "queries": _drawn((sizes.batch * sizes.rows, heads, head_dim)) * head_dim**-0.5,
        "keys": _drawn((sizes.batch, pages, kv_heads, PAGE, head_dim)).transpose(-1, -2),
        "values": _drawn((sizes.batch, pages, kv_heads, PAGE, head_dim)),
        "most_rows": sizes.rows,
        "block_size": BLOCK,
        "longest": sizes.context + sizes.rows,
        **_where(sizes),
    }
    if keep is not None:
        drawn = torch.rand(sizes.batch, kv_heads, sizes.context // BLOCK, device="cuda").topk(keep, dim=-1).indices
        found["blocks"] = drawn.sort(dim=-1).values.to(torch.int32)
        found["kept"] = torch.full((sizes.batch, kv_heads), keep, dtype=torch.int32, device="cuda")
    return found


def _where(sizes: Attention) -> dict[str, Tensor]:
    offsets = torch.arange(sizes.batch + 1, dtype=torch.int32, device="cuda") * sizes.rows
    return {
        "offsets": offsets.to(torch.int32),
        "starts": torch.full((sizes.batch,), sizes.context, dtype=torch.int32, device="cuda"),
    }


def _ffn(arch: str, rows: int) -> Op:
    """Up and down of half the channels; the gate, a plain product, is left out."""
    hidden, width = int(SHAPES[arch]["hidden_size"]), int(SHAPES[arch]["intermediate_size"])
    kept = width // 2

    def make() -> Callable[[], object]:
        states, activations = _drawn((rows, hidden)), _drawn((rows, width))
        channels = _drawn((width, 2 * hidden))
        index = torch.randperm(width, device="cuda")[:kept]
        return lambda: _kernel("sparse_ffn").ffn(states, activations, channels, index)

    size = 2 * kept * hidden
    return Op("sparse_ffn", f"{arch}, rows {rows}, {kept} of {width}", 2 * size, 2 * rows * size, make, "sparse_ffn")


def _moe(arch: str, rows: int, union: int) -> Op:
    """A layer of experts in which ``union`` run."""
    shape = SHAPES[arch]
    hidden, width, experts = int(shape["hidden_size"]), int(shape["moe_intermediate_size"]), int(shape["num_experts"])
    top_k = int(shape["num_experts_per_tok"])

    def make() -> Callable[[], object]:
        states, gate_up = _drawn((rows, hidden)), _drawn((experts, 2 * width, hidden))
        down = _drawn((experts, hidden, width))
        allowed = torch.randperm(experts, device="cuda")[:union]
        scores = torch.zeros(rows, experts, device="cuda")
        scores[:, allowed] = torch.rand(rows, union, device="cuda") + 0.1
        combine = scores * (scores >= scores.topk(top_k, dim=1).values[:, -1:])
        place = torch.arange(union, device="cuda")
        combine[place % rows, allowed] += 0.1
        return lambda: _kernel("moe").moe(states, combine, gate_up, down, limit=union)

    size = 3 * union * width * hidden
    flops = 6 * rows * top_k * width * hidden
    return Op("moe", f"{arch}, rows {rows}, {union} of {experts}", 2 * size, flops, make, "moe")


def _drawn(size: tuple[int, ...]) -> Tensor:
    return torch.randn(size, device="cuda", dtype=torch.bfloat16)


def _kernel(op: str) -> Any:
    return importlib.import_module(f"sparse.ops.{op}.kernel")


def _row(op: Op, spread: Spread, place: Place, bandwidth: float) -> OpRow:
    return OpRow(
        arch=op.shape.partition(",")[0],
        dtype="bfloat16",
        engine="triton" if op.kernel else "library",
        op=op.name,
        shape=op.shape,
        median_ms=spread.median,
        p10_ms=spread.p10,
        p90_ms=spread.p90,
        limit_ms=1e3 * op.bytes / bandwidth,
        bytes=float(op.bytes),
        flops=float(op.flops),
        **asdict(place),
    )
