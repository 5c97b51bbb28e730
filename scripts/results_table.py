"""What each run measured: its speed-ups with their factors, and its quality with what could have been detected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from harness.evidence import inference
from harness.evidence.inference import Quantity, Verdict
from harness.evidence.labels import TIMES
from harness.evidence.rows import SPEEDUPS, Row
from scripts import cells
from scripts.cells import ARROW, NOTHING, Column, Grid, grids_of, lines, number

SPEED = ": speed"
QUALITY = ": quality"
LEGEND = (
    "Ratios are decoding throughputs (prefill left out) with 95% intervals over examples (BCa bootstrap, by cluster); "
    f"after the equals sign new tokens per step {TIMES} steps per second, whose product they are. "
    "limit: the most sparse/dense could be, bytes of a dense step over bytes of a sparse step. "
    "of peak: least time of a step on this machine's measured peaks over its time, dense above sparse; c where "
    "arithmetic sets that limit instead of memory traffic. "
    "AL: new tokens per verification of the sparse arm. Differences are sparse less dense, paired by example, with "
    "intervals that are at least those of Student's t; detects: the smallest true difference that this many examples "
    "show with 80% power. "
    "log p: mean log-probability of the reference answer, nats per token. floor: dense less AR, what rounding alone "
    "changes. "
    "same: outputs identical to dense and median token where they part; in brackets the noise floor, dense against AR. "
    f"Verdict: loss; no loss > {inference.MARGINS['quality']:g} point, or {inference.MARGINS['reference']:g} nats of "
    "log p, where so large a loss was excluded by a test of its own (non-inferiority); both at 5%, corrected (Holm) "
    "over the settings of a task, model and machine; undecided otherwise, whatever the difference."
)
Verdicts = Mapping[Quantity, Mapping[str, Verdict]]


def _speedup(name: str, title: str, *, optional: bool = False) -> Column:
    return Column(title, lambda row: cells.speedup(row, name), optional=optional)


_DENSE, _SPARSE, _GAIN = (
    _speedup("dense_vs_ar", "dense\n/ AR"),
    _speedup("sparse_vs_ar", "sparse\n/ AR"),
    _speedup("sparse_vs_dense", "sparse\n/ dense"),
)
_DATA = Column("task\ndata", lambda row: lines(row.task, f"({row.data})"), right=False)
_SETTING = Column("setting", lambda row: lines(row.setting, _kept(row)), right=False)
_RUN = Column("task\nsetting", lambda row: lines(row.task, row.setting, *row.marks), right=False)
_COUNT = Column("n", lambda row: str(row.examples))
_MARK = Column("mark", lambda row: "\n".join(row.marks), right=False, optional=True)
_POINTS = Column(
    f"quality\ndense\n{ARROW} sparse", lambda row: cells.quality(row).replace(f" {ARROW}", f"\n{ARROW}"), right=False
)
_DIFFERENCE = Column("quality\ndifference", lambda row: cells.difference(row.delta))

_SPEEDS = (
    _DATA,
    _SETTING,
    _COUNT,
    Column("prompt\ntokens", lambda row: number(row.prompt_tokens, 0)),
    Column("AL", lambda row: number(row.acceptance)),
    Column("AR\ntok/s", lambda row: number(row.tokens_per_second.get("ar"), 1)),
    _DENSE,
    _SPARSE,
    _GAIN,
    Column("limit", lambda row: number(row.limit)),
    Column("of\npeak", lambda row: lines(*(_of_peak(row, arm) for arm in ("dense", "sparse"))), optional=True),
    _speedup("sparse_ar_vs_ar", "sparse AR\n/ AR", optional=True),
    _DIFFERENCE,
    _MARK,
)
_SPEEDS_COMPACT = (
    _RUN,
    Column("n\nprompt\nAL", lambda row: lines(str(row.examples), number(row.prompt_tokens, 0), number(row.acceptance))),
    _DENSE,
    _SPARSE,
    Column("sparse\n/ dense\nlimit", lambda row: _gain_and_limit(row)),
    _DIFFERENCE,
)


def _qualities(told: Verdicts) -> tuple[Column, ...]:
    return (
        _DATA,
        _SETTING,
        _COUNT,
        _POINTS,
        _DIFFERENCE,
        Column("its floor", lambda row: cells.estimate(row.floor, 1, sign=True)),
        Column(f"log p\ndense\n{ARROW} sparse", _log_probability, optional=True),
        Column("log p\ndifference", lambda row: cells.difference(row.reference_delta, 3), optional=True),
        Column("its floor\n(log p)", lambda row: cells.estimate(row.reference_floor, 3, sign=True), optional=True),
        Column("same\n(floor)", cells.same, right=False),
        _verdict(told),
        _MARK,
    )


def _qualities_compact(told: Verdicts) -> tuple[Column, ...]:
    return (
        _RUN,
        _POINTS,
        Column("difference\nand floor", lambda row: _with_floor(row, "quality")),
        Column("log p\ndifference\nand floor", lambda row: _with_floor(row, "reference"), optional=True),
        _verdict(told),
    )


def _verdict(told: Verdicts) -> Column:
    def cell(row: Row) -> str:
        found = [verdicts.get(row.fingerprint) for verdicts in told.values()]
        texts = [NOTHING if verdict is None else str(verdict) for verdict in found]
        return NOTHING if set(texts) == {NOTHING} else lines(*texts)

    return Column("verdict:\nquality,\nlog p", cell, right=False)


def grids(rows: Sequence[Row], *, compact: bool = False) -> list[Grid]:
    """Two tables for each model and device, of speed and of quality, a row for each task and setting."""
    told = verdicts(rows)
    speeds = grids_of(rows, _SPEEDS_COMPACT if compact else _SPEEDS, SPEED)
    qualities = grids_of(rows, _qualities_compact(told) if compact else _qualities(told), QUALITY)
    return list(chain.from_iterable(zip(speeds, qualities, strict=True)))


def verdicts(rows: Sequence[Row]) -> Verdicts:
    """What may be claimed of quality and of the reference's log-probability, by fingerprint; families are of `rows`."""
    return {quantity: inference.verdicts(rows, quantity) for quantity in inference.MARGINS}


def _kept(row: Row) -> str:
    return f"({row.kept_tokens} tokens)" if row.kept_tokens is not None else ""


def _of_peak(row: Row, arm: str) -> str:
    fraction = row.roofline(arm)
    if fraction is None:
        return ""
    return f"{100 * fraction:.0f}%" + (" c" if row.bound(arm) == "compute" else "")


def _gain_and_limit(row: Row) -> str:
    text = cells.speedup(row, "sparse_vs_dense")
    return text if row.limit is None else f"{text}\nlimit {number(row.limit)}"


def _log_probability(row: Row) -> str:
    return cells.change(row.reference("dense"), row.reference("sparse"), 3)


def _with_floor(row: Row, quantity: Quantity) -> str:
    digits = 1 if quantity == "quality" else 3
    found, floor = (row.delta, row.floor) if quantity == "quality" else (row.reference_delta, row.reference_floor)
    text, below = cells.difference(found, digits), cells.estimate(floor, digits, sign=True)
    return text if below == NOTHING else f"{text}\nfloor {below}"


def table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The same as plain numbers, a mapping for each run."""
    told = verdicts(rows)
    return [cells.plain(_values(row, told)) for row in rows]


def _values(row: Row, told: Verdicts) -> dict[str, Any]:
    flat: dict[str, Any] = {
        **cells.described(row),
        "examples": row.examples,
        "prompt_tokens_median": row.prompt_tokens,
        "acceptance_length": row.acceptance,
    }
    for arm in ("ar", "dense", "sparse"):
        flat[f"{arm}_tokens_per_second"] = row.tokens_per_second.get(arm)
    for name in SPEEDUPS:
        flat |= cells.bounds(name, getattr(row, name))
        factors = row.split.get(name)
        if factors is not None:
            flat |= cells.bounds(f"{name}_tokens_per_step", factors.tokens_per_step)
            flat |= cells.bounds(f"{name}_steps_per_second", factors.steps_per_second)
    flat |= {"limit_sparse_vs_dense": row.limit, "metric": row.metric}
    for arm in ("ar", "dense", "sparse"):
        flat |= {f"{arm}_quality": row.quality.get(arm), f"{arm}_reference_logprob": row.reference(arm)}
    flat |= cells.detectable("quality_difference", row.delta)
    flat |= cells.detectable("quality_floor", row.floor)
    flat |= cells.detectable("reference_difference", row.reference_delta)
    flat |= cells.detectable("reference_floor", row.reference_floor)
    for quantity, found in told.items():
        verdict = found.get(row.fingerprint)
        flat |= {
            f"{quantity}_verdict": verdict.kind if verdict else None,
            f"{quantity}_margin": verdict.margin if verdict else None,
            f"{quantity}_p_loss": verdict.p_loss if verdict else None,
            f"{quantity}_p_margin": verdict.p_margin if verdict else None,
        }
    return flat
