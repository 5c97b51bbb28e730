"""Whole steps under CUDA graphs: sparse verification against the better of two dense steps (METHOD section 7).

Weights are random, made on the device; the caches hold random keys and values, as a prefill would only cost time.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from harness.engine.cache import KVCache
from harness.engine.model import loading
from harness.engine.model.engines import make_step
from harness.engine.model.families import adapt
from harness.engine.model.step import Segment, Step
from harness.engine.model.verification import Verification
from scripts.bench import drafts
from scripts.bench.gpu_baseline import FlashStep
from scripts.bench.gpu_common import Deadline, Red, alternate_ms, captured
from scripts.bench.measure import Spread, ratio
from scripts.bench.records import Place, StepRow
from sparse.budget import AttentionBudget, MoeBudget, Sparsity
from sparse.cost import trace_bytes, trace_flops

BLOCK = 16
_TOLERANCE = {torch.bfloat16: 5e-2, torch.float32: 1e-4}
"""Of the logits of the median token: in bf16 a token's expert or block may change places, one of many."""
_REPEATS = 15
KERNELS, FLASH, SPARSE = "dense, our kernels", "dense, library's fused attention", "sparse"


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
    """

    arch: str
    batch: int
    context: int
    draft: str
    density: float | None
    union: float | None
    target: float | None
    seconds: float

    @property
    def name(self) -> str:
        """As tables and ``--cases`` have it."""
        told = f"{self.arch}, batch {self.batch}, context {self.context}, {self.draft} tokens"
        told += "" if self.density is None else f", {self.density:.0%} of the blocks"
        return told + ("" if self.union is None else f", {self.union:.0%} of the experts")

    def sparsity(self, experts: int) -> Sparsity:
        """What the sparse step may skip in a model with so many experts a layer."""
        blocks = self.context // BLOCK
        attention = AttentionBudget() if self.density is None else AttentionBudget(topk=round(self.density * blocks))
        moe = MoeBudget() if self.union is None else MoeBudget(union=max(1, round(self.union * experts)))
        return Sparsity(attention, moe=moe)


CASES = (
    Case("llama31_8b", 16, 8192, "7", 0.12, None, 1.6, 70),
    Case("llama31_8b", 1, 32768, "7", 0.12, None, 1.2, 60),
    Case("llama_7b", 8, 8192, "7", 0.12, None, 1.8, 70),
    Case("qwen3_30b_a3b", 1, 8192, "tree60", None, 0.25, 2.0, 100),
    Case("smollm2_135m", 1, 8000, "7", 0.06, None, None, 40),
)
TINY = Case("smollm2_135m", 2, 300, "tree5", 0.3, None, None, 20)
"""For the interpreter: checked, never timed."""


@dataclass(slots=True)
class Result:
    """What a case gave.

    Attributes:
        case: what was compared.
        layers, whole: decoder layers that ran, and that the model has.
        rows: for the CSV file.
        gain: of the sparse step over the better dense one; None where nothing was timed.
        limit: the same by bytes alone.
        dense: the better dense arm.
    """

    case: Case
    layers: int
    whole: int
    rows: list[StepRow] = field(default_factory=list)
    gain: Spread | None = None
    limit: float = 0.0
    dense: str = ""

    @property
    def text(self) -> str:
        """One line of the table of targets."""
        assert self.gain is not None
        wanted = "no target" if self.case.target is None else f"target {self.case.target}"
        met = "" if self.case.target is None else " met" if self.gain.median >= self.case.target else " missed"
        cut = "" if self.layers == self.whole else f", {self.layers} of {self.whole} layers"
        return f"{self.case.name}{cut}: {self.gain.text()} times faster (limit {self.limit:.2f}), {wanted}{met}"


def run(
    cases: tuple[Case, ...], layers: int | None, place: Place, bandwidth: float, deadline: Deadline
) -> list[Result]:
    """Check and time every case that time and memory allow; prints a line for each arm.

    Raises:
        Red: a step is off another one that computes the same.
    """
    found = []
    for case in cases:
        if not deadline.allows(case.name, case.seconds):
            continue
        try:
            found.append(_case(case, layers, torch.device("cuda"), torch.bfloat16, place, bandwidth))
        except torch.cuda.OutOfMemoryError:
            deadline.note(case.name, "out of memory (--layers N keeps fewer layers)")
        finally:
            torch.cuda.empty_cache()
    return found


def check(case: Case, layers: int, device: torch.device, dtype: torch.dtype) -> None:
    """Only the comparisons of a case, nothing timed: for the interpreter.

    Raises:
        Red: a step is off another one that computes the same.
    """
    _prepare(case, layers, device, dtype)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Checked steps over the same weights, keys and values."""

    calls: dict[str, Callable[[], object]]
    costs: dict[str, tuple[float, float]]
    kept: int
    layers: int
    whole: int


def _case(
    case: Case, layers: int | None, device: torch.device, dtype: torch.dtype, place: Place, bandwidth: float
) -> Result:
    made = _prepare(case, layers, device, dtype)
    times = alternate_ms(made.calls, _REPEATS)
    result = Result(case, made.layers, made.whole)
    shape = drafts.parse(case.draft)
    arch = case.arch if made.layers == made.whole else f"{case.arch}, {made.layers} of {made.whole} layers"
    for name, taken in times.items():
        spread, (read, flops) = Spread.of(taken), made.costs[SPARSE if name == SPARSE else KERNELS]
        limit = 1e3 * read / bandwidth
        print(f"{case.name}: {name}: {spread.text(3)} ms, limit {limit:.3f} ms, {limit / spread.median:.0%} of it")
        result.rows.append(
            StepRow(
                arch=arch,
                dtype=str(dtype).removeprefix("torch."),
                engine="library" if name == FLASH else "cuda_graph",
                context=case.context,
                batch=case.batch,
                rows=shape.rows,
                tree=shape.kind,
                kept=made.kept if name == SPARSE else 0,
                arm=name,
                median_ms=spread.median,
                p10_ms=spread.p10,
                p90_ms=spread.p90,
                limit_ms=limit,
                bytes=read,
                flops=flops,
                **asdict(place),
            )
        )
    result.dense = min((KERNELS, FLASH), key=lambda name: Spread.of(times[name]).median)
    result.gain = ratio(times, result.dense, SPARSE)
    result.limit = made.costs[KERNELS][0] / made.costs[SPARSE][0]
    print(result.text, flush=True)
    return result


@torch.inference_mode()
def _prepare(case: Case, layers: int | None, device: torch.device, dtype: torch.dtype) -> _Prepared:
    """Weights, caches and steps of a case, compared with each other."""
    shape = drafts.parse(case.draft)
    config = loading.shape_config(case.arch, layers)
    whole = loading.shape_config(case.arch, None).num_hidden_layers
    config.max_position_embeddings = max(config.max_position_embeddings, case.context + 128)
    model = loading.random_model(config, dtype, device, seed=0)
    flash = FlashStep(model, case.batch, case.context, shape.rows, shape.tree(device))
    weights = adapt(model, packed=False)
    del model
    step, sparsity = make_step(weights, engine="cuda_graph"), case.sparsity(weights.shape.experts)
    cache = step.new_cache(case.context + shape.rows, sparsity.attention, case.batch)
    _fill(cache, flash, case)
    drawn = random.Random(0)
    tokens = [[drawn.randrange(weights.shape.vocab) for _ in range(shape.rows)] for _ in range(case.batch)]
    segments = [Segment(row, own, shape.tree(device)) for row, own in enumerate(tokens)]
    flat = torch.tensor(tokens, device=device).flatten()

    def once(budgets: Sparsity) -> Tensor:
        logits, _ = _run(step, cache, segments, Verification(budgets))
        return logits

    eager, costs = Step(weights), {}
    for name, budgets in ((KERNELS, Sparsity()), (SPARSE, sparsity)):
        truth, run_of = _run(eager, cache, segments, Verification(budgets))
        _compare(f"{case.name}: {name}", once(budgets), truth)
        told = weights.shape, budgets.attention, run_of.trace
        costs[name] = trace_bytes(*told), trace_flops(*told)
        if name == KERNELS:
            _compare(f"{case.name}: {FLASH}", flash(flat), truth)
    flash_call: Callable[[], object] = captured(lambda: flash(flat)) if device.type == "cuda" else lambda: flash(flat)
    calls = {KERNELS: lambda: once(Sparsity()), FLASH: flash_call, SPARSE: lambda: once(sparsity)}
    kept = (sparsity.attention.topk or 0) * BLOCK
    return _Prepared(calls, costs, kept, weights.shape.layers, whole)


def _run(step: Step, cache: KVCache, segments: list[Segment], run_of: Verification) -> tuple[Tensor, Verification]:
    """Logits of one step; the cache is as before."""
    lengths = [cache.lengths[segment.row] for segment in segments]
    logits = step.run(segments, cache, run_of).logits
    for segment, length in zip(segments, lengths, strict=True):
        cache.truncate(segment.row, length)
    return logits, run_of


def _fill(cache: KVCache, flash: FlashStep, case: Case) -> None:
    """The same random keys and values in both caches."""
    for layer in range(flash.keys.shape[0]):
        flash.keys[layer].normal_()
        flash.values[layer].normal_()
        for row in range(case.batch):
            keys, values = (stored[layer, row].transpose(0, 1) for stored in (flash.keys, flash.values))
            cache.write(layer, row, 0, keys, values)
    for row in range(case.batch):
        cache.advance(row, case.context)
        cache.refresh_summaries(row)


def _compare(what: str, found: Tensor, truth: Tensor) -> None:
    """The median token's difference over the norm of its logits."""
    distance = (found.float() - truth.float()).norm(dim=-1) / truth.float().norm(dim=-1)
    middle, allowed = float(distance.median()), _TOLERANCE[truth.dtype]
    print(f"{what}: median token off by {middle:.1e} (allowed {allowed:.0e})", flush=True)
    if not middle < allowed:
        raise Red(f"{what}: the median token is off by {middle:.1e} of its norm, allowed are {allowed:.0e}")
