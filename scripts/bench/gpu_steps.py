"""Whole steps under CUDA graphs: sparse verification against the better of two dense steps (METHOD section 7).

Weights are random, made on the device; the caches hold random keys and values, as a prefill would only cost time.
Steps of two layers decide what is right. In deep random models a block or an expert that changes places by rounding
changes all that follows, so at full depth the difference is printed and not judged.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.engine.cache import KVCache
from harness.engine.model import loading
from harness.engine.model.device_step import DeviceStep
from harness.engine.model.engines import make_step
from harness.engine.model.families import ModelWeights, adapt
from harness.engine.model.step import Segment, Step
from harness.engine.model.verification import Verification
from scripts.bench import drafts, records
from scripts.bench.gpu_baseline import FlashStep
from scripts.bench.gpu_cases import BLOCK, Case, Result
from scripts.bench.gpu_common import Red, alternate_ms, captured, clock, surviving
from scripts.bench.gpu_report import Report
from scripts.bench.measure import Arm, Spread, alternate, ratio
from scripts.bench.records import Place, StepRow
from sparse.budget import Sparsity
from sparse.cost import trace_bytes, trace_flops

KERNELS, FLASH, SPARSE = "dense, our kernels", "dense, library's fused attention", "sparse"
WALL = ", by the host's clock"
BASELINE = (
    f'"{FLASH}": the library\'s kernels are the attention to the prefix and the matrix products; its norms, rotary '
    "embedding, attention among the step's own tokens, the merge of the two, activations, and routing with all experts "
    "on all rows are separate operators of torch in one CUDA graph"
)
_CHECKED_LAYERS = 2
EXACT = 1e-3
"""In fp32: the worst token's difference over the norm of its logits."""
_SURE, _FEW = 0.75, 1000
"""With more positions than this, two of the many blocks can score alike up to rounding even in fp32, and a sequence
that chooses the other one is off; then so many tokens are compared."""
_FACTOR, _SLACK = 2.0, 5e-3
"""In bf16 the median token may be off the truth this often as far as the eager step in bf16 is, and this much more."""
_REPEATS = 15


def run(
    cases: tuple[Case, ...], layers: int | None, place: Place, bandwidth: float, file: Path, report: Report
) -> Iterator[Result]:
    """Check and time every case that time and memory allow; rows go to ``file`` as soon as a case is done.

    Raises:
        Lost: the device is; what was given by then stands.
    """
    print(BASELINE, flush=True)
    device = torch.device("cuda")
    for case in cases:
        if red := sorted(case.suspects & report.red):
            report.deadline.note(case.name, f"red: {', '.join(red)}")
        elif report.deadline.allows(case.name, case.seconds):
            result = None
            with surviving(report, case.name):
                check(case, _CHECKED_LAYERS, device, torch.bfloat16)
                result = _timed(case, layers, device, torch.bfloat16, place, bandwidth)
                told = [result.gain.median, result.limit, result.wall.median]
                report.case("steps", case.name, [*(round(one, 3) for one in told), case.target])
                records.append(file, list(result.rows))
            if result is not None:
                yield result


@torch.inference_mode()
def check(case: Case, layers: int, device: torch.device, dtype: torch.dtype) -> float:
    """Compare the steps of a case at few layers with the eager step in fp32 over the same weights, keys and values.

    Returns:
        The largest difference.

    Raises:
        Red: one of them is off it, by more than rounding in fp32, or by more than the eager step is in ``dtype``.
    """
    model = loading.random_model(_config(case, layers), dtype, device, seed=0)
    exact = dtype == torch.float32
    upcast = None if exact else copy.deepcopy(model).float()
    made = _made(case, model, device)
    eager, reference = Step(made.weights), made
    truth_step = eager
    if upcast is not None:
        weights = adapt(upcast, packed=False, channels=case.channels is not None)
        truth_step = Step(weights)
        reference = _over(case, weights, truth_step, made.flash, device)
    found = list[float]()
    what = f"{case.name}, {layers} layers"
    for name, budgets in ((KERNELS, Sparsity()), (SPARSE, made.sparsity)):
        truth, _ = reference.run(truth_step, budgets)
        eager_off = 0.0 if exact else _median(made.run(eager, budgets)[0], truth)
        share = 0.5 if not exact else _SURE if name == SPARSE and case.context > _FEW else 1.0
        found.append(_judge(f"{what}: {name}", made.logits(budgets), truth, eager_off, share))
        if name == KERNELS:
            found.append(_judge(f"{what}: {FLASH}", made.flash(made.flat), truth, eager_off, share))
    return max(found)


@dataclass(frozen=True, slots=True)
class _Made:
    """Steps over the same weights, keys and values.

    Attributes:
        step: as the engine makes it, over ``weights``.
        flash: the dense baseline, which holds the keys and values that ``cache`` was filled with.
        flat: the tokens of all segments, [tokens], int64.
    """

    weights: ModelWeights
    step: Step
    flash: FlashStep
    cache: KVCache
    segments: list[Segment]
    flat: Tensor
    sparsity: Sparsity

    def run(self, step: Step, budgets: Sparsity) -> tuple[Tensor, Verification]:
        """Logits of one step, and what it counted; the cache is as before."""
        run_of = Verification(budgets)
        lengths = [self.cache.lengths[segment.row] for segment in self.segments]
        logits = step.run(self.segments, self.cache, run_of).logits
        for segment, length in zip(self.segments, lengths, strict=True):
            self.cache.truncate(segment.row, length)
        return logits, run_of

    def logits(self, budgets: Sparsity) -> Tensor:
        """Logits [tokens, vocab] of one step of the engine."""
        return self.run(self.step, budgets)[0]


def _config(case: Case, layers: int | None) -> Any:
    config = loading.shape_config(case.arch, layers)
    config.max_position_embeddings = max(config.max_position_embeddings, case.context + 128)
    return config


def _made(case: Case, model: Any, device: torch.device) -> _Made:
    """Everything over the tensors of ``model``, which is given up."""
    shape = drafts.parse(case.draft)
    flash = FlashStep(model, case.batch, case.context, shape.rows, shape.tree(device))
    for layer in range(flash.keys.shape[0]):
        flash.keys[layer].normal_()
        flash.values[layer].normal_()
    weights = adapt(model, packed=False, channels=case.channels is not None)
    return _over(case, weights, make_step(weights, engine="cuda_graph"), flash, device)


def _over(case: Case, weights: ModelWeights, step: Step, flash: FlashStep, device: torch.device) -> _Made:
    """A cache of ``step`` with the keys and values of ``flash``, and tokens, the same in every call."""
    shape, sparsity = drafts.parse(case.draft), case.sparsity(weights.shape.experts)
    cache = step.new_cache(case.context + shape.rows, sparsity.attention, case.batch)
    for row in range(case.batch):
        for layer in range(flash.keys.shape[0]):
            keys, values = (stored[layer, row].transpose(0, 1) for stored in (flash.keys, flash.values))
            cache.write(layer, row, 0, keys, values)
        cache.advance(row, case.context)
        cache.refresh_summaries(row)
    drawn = random.Random(0)
    tokens = [[drawn.randrange(weights.shape.vocab) for _ in range(shape.rows)] for _ in range(case.batch)]
    segments = [Segment(row, own, shape.tree(device)) for row, own in enumerate(tokens)]
    return _Made(weights, step, flash, cache, segments, torch.tensor(tokens, device=device).flatten(), sparsity)


def _off(found: Tensor, truth: Tensor) -> Tensor:
    """[tokens]: the difference over the norm of each token's logits; infinite where there is a NaN."""
    off: Tensor = (found.float() - truth.float()).norm(dim=-1) / truth.float().norm(dim=-1)
    return off.nan_to_num(nan=float("inf"))


def _median(found: Tensor, truth: Tensor) -> float:
    return float(_off(found, truth).median())


def _judge(what: str, found: Tensor, truth: Tensor, eager_off: float, share: float) -> float:
    """How far the tokens are off, but for the worst beyond ``share`` of them.

    Raises:
        Red: it is more than rounding, or ``eager_off``, the eager step's own, excuses.
    """
    off = _off(found, truth)
    worst = float(off.kthvalue(max(1, int(share * off.numel()))).values)
    allowed = EXACT if found.dtype == torch.float32 else _FACTOR * eager_off + _SLACK
    which = {0.5: "median", 1.0: "worst"}.get(share, f"{share:.0%} quantile")
    print(f"{what}: {which} token off by {worst:.1e} (allowed {allowed:.1e})", flush=True)
    if not worst < allowed:
        raise Red(f"{what}: the {which} token is off by {worst:.1e} of its norm, allowed are {allowed:.1e}")
    return worst


@torch.inference_mode()
def _timed(
    case: Case, layers: int | None, device: torch.device, dtype: torch.dtype, place: Place, bandwidth: float
) -> Result:
    """Times of a case at all its layers, on the device alone and by the host's clock."""
    made = _made(case, loading.random_model(_config(case, layers), dtype, device, seed=0), device)
    eager, costs = Step(made.weights), dict[str, tuple[float, float]]()
    arms: dict[str, Callable[[], Tensor]] = {}
    for name, budgets in ((KERNELS, Sparsity()), (SPARSE, made.sparsity)):
        truth, run_of = made.run(eager, budgets)
        counted = made.weights.shape, budgets.attention, run_of.trace
        costs[name] = trace_bytes(*counted), trace_flops(*counted)
        arms[name] = partial(made.logits, budgets)
        off = _median(arms[name](), truth)
        print(f"{case.name}, all layers: {name}: median token {off:.1e} off the eager step", flush=True)
        if name == KERNELS:
            off = _median(made.flash(made.flat), truth)
            print(f"{case.name}, all layers: {FLASH}: median token {off:.1e} off the eager step", flush=True)
        del truth
    replays = {
        KERNELS: _replay(made, arms[KERNELS]),
        FLASH: captured(lambda: made.flash(made.flat)),
        SPARSE: _replay(made, arms[SPARSE]),
    }
    times = alternate_ms(replays, _REPEATS)
    walls = alternate(arms, clock, _REPEATS)
    taken = times | {name + WALL: [1e3 * one for one in seconds] for name, seconds in walls.items()}
    dense = min((KERNELS, FLASH), key=lambda name: Spread.of(times[name]).median)
    whole = loading.shape_config(case.arch, None).num_hidden_layers
    result = Result(
        case,
        made.weights.shape.layers,
        whole,
        gain=ratio(times, dense, SPARSE),
        wall=ratio(walls, KERNELS, SPARSE),
        limit=costs[KERNELS][0] / costs[SPARSE][0],
        dense=dense,
    )
    result.rows = [
        _row(result, name, Spread.of(one), costs[SPARSE if name.startswith(SPARSE) else KERNELS], bandwidth, place)
        for name, one in taken.items()
    ]
    print(result.text, flush=True)
    return result


def _replay(made: _Made, arm: Callable[[], Tensor]) -> Arm:
    """The graph of ``arm`` alone, on the inputs that its last step has filled."""
    step = made.step
    assert isinstance(step, DeviceStep)
    arm()
    kept, pool = step._prepared(made.cache, step.forms(made.cache)[-1]), step._pool

    def recorded() -> Any:
        raise AssertionError("the graph of this step was captured before")

    return lambda: kept.run(recorded, pool)


def _row(
    result: Result, name: str, spread: Spread, cost: tuple[float, float], bandwidth: float, place: Place
) -> StepRow:
    """The row of one arm; prints it."""
    case, shape = result.case, drafts.parse(result.case.draft)
    limit = 1e3 * cost[0] / bandwidth
    print(
        f"{case.name}: {name}: {spread.text(3)} ms, limit {limit:.3f} ms, {limit / spread.median:.0%} of it", flush=True
    )
    cut = "" if result.layers == result.whole else f", {result.layers} of {result.whole} layers"
    return StepRow(
        arch=case.arch + cut,
        dtype="bfloat16",
        engine="library" if name == FLASH else "cuda_graph",
        context=case.context,
        batch=case.batch,
        rows=shape.rows,
        tree=shape.kind,
        kept=(case.sparsity(0).attention.topk or 0) * BLOCK if name.startswith(SPARSE) else 0,
        arm=name,
        median_ms=spread.median,
        p10_ms=spread.p10,
        p90_ms=spread.p90,
        limit_ms=limit,
        bytes=cost[0],
        flops=cost[1],
        **asdict(place),
    )
