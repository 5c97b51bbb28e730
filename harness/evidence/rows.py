"""One row per stored run, with the labels and numbers that tables, figures and summary.csv share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.evidence.labels import (
    FORCED,
    SHARED,
    SIMULATED,
    Drafting,
    axes_on,
    data_label,
    drafting_labels,
    is_carved,
    is_forced,
    is_simulated,
    kept_tokens,
    name_of,
    natural,
    setting_labels,
    task_label,
)
from harness.evidence.store import StoredRun, folder_lock, load_runs, remove_leftovers, write_table

COUNTED = ("ok", "partial")
TAKEN_OVER = ("reuse.anchor", "reuse.skip_retrieval")
Interval = tuple[float, float]

SPEEDUPS = ("dense_vs_ar", "sparse_vs_ar", "sparse_vs_dense", "sparse_ar_vs_ar")
"""Fields of a row, and names in summary.json, that compare two arms' throughputs; keys of `Row.split`."""

LEAST_SAVING = 0.01
"""Share of a dense step's bytes that must be saved before the realised share of it means anything."""

_ORDER = ("xsum", "squad", "math", "gsm8k", "squad_long", "needle", "qmsum")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95% interval; either may be missing."""

    value: float | None = None
    ci: Interval | None = None


@dataclass(frozen=True, slots=True)
class Difference(Estimate):
    """A paired difference of two arms, with what it could have shown; None where a run of an earlier version lacks it.

    `se` is its cluster-robust standard error over `clusters`, of which `changed` differ at all, and `mdd` the smallest
    true difference that would have been detected (see `inference.detectable`).
    """

    se: float | None = None
    clusters: int | None = None
    changed: int | None = None
    mdd: float | None = None


@dataclass(frozen=True, slots=True)
class Split:
    """The two factors of a speed-up; their product is the speed-up."""

    tokens_per_step: Estimate = Estimate()
    steps_per_second: Estimate = Estimate()


@dataclass(frozen=True, slots=True)
class Row:
    """A run as it is shown. Numbers are None where the status forbids them or the arm was not run."""

    fingerprint: str
    start: str
    status: str
    stale: bool
    reason: str | None
    notes: tuple[str, ...]
    task: str
    task_name: str
    data: str
    model: str
    device: str
    setting: str
    drafting: Drafting
    kept_tokens: int | None
    examples: int
    prompt_tokens: float | None
    acceptance: float | None
    tokens_per_second: Mapping[str, float | None]
    dense_vs_ar: Estimate
    sparse_vs_ar: Estimate
    sparse_vs_dense: Estimate
    sparse_ar_vs_ar: Estimate
    limit: float | None
    metric: str
    quality: Mapping[str, float | None]
    delta: Difference
    floor: Difference
    reference_delta: Difference
    reference_floor: Difference
    split: Mapping[str, Split]
    exclusive: bool
    divergence: Mapping[str, Any] | None
    noise_floor: Mapping[str, Any] | None
    axes: tuple[str, ...]
    simulated: bool
    forced: bool
    carved: bool
    agreement: Estimate
    kl: float | None
    accept_flips: float | None
    retrieving: float | None
    arms: Mapping[str, Any] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)

    @property
    def counted(self) -> bool:
        """Whether numbers of this run may be shown."""
        return self.status in COUNTED

    @property
    def marks(self) -> tuple[str, ...]:
        """What a reader must know first: status unless ok, stale, simulated, forced oracle, shared cores."""
        states = {self.status: self.status != "ok", "stale": self.stale, SIMULATED: self.simulated, FORCED: self.forced}
        states[SHARED] = not self.exclusive
        return tuple(mark for mark, holds in states.items() if holds)

    def reference(self, arm: str) -> float | None:
        """Mean log-probability of the reference under an arm, in nats per token; None where it was not measured."""
        return _number(self._arm(arm, "reference").get("logprob"))

    def acceptance_length(self, arm: str) -> float | None:
        """New tokens per step, bonus token included, pooled over steps."""
        return _number(self._arm(arm, "acceptance_length").get("pooled"))

    def request_acceptance_length(self, arm: str) -> float | None:
        """Mean over requests of their own new tokens per step (METHOD section 8)."""
        return _number(self._arm(arm, "acceptance_length").get("per_request"))

    def histogram(self, arm: str) -> tuple[int, ...]:
        """Steps by their new tokens: entry i counts those that yielded i, the bonus token included."""
        return tuple((self.arms.get(arm) or {}).get("histogram") or ())

    def drafted(self, name: str, arm: str) -> float | None:
        """An entry of an arm's draft block (see `metrics.arm_block`); None in runs that have none."""
        return _number(self._arm(arm, "draft").get(name))

    def density(self, axis: str) -> float | None:
        """What the sparse arm read of what dense execution reads on one axis."""
        return _number(self._arm("sparse", "density").get(axis))

    def trace(self, name: str) -> Any:
        """An entry of the sparse arm's trace block; None in runs that have none."""
        return self._arm("sparse", "trace").get(name)

    def step_ms(self, arm: str) -> float | None:
        """Median step in milliseconds, drafting and acceptance included."""
        return _number(self._arm(arm, "step_ms").get("p50"))

    def mean_step_ms(self, arm: str) -> float | None:
        """Mean step in milliseconds."""
        block = self.arms.get(arm) or {}
        return 1e3 * float(block["seconds"]) / block["steps"] if block.get("steps") else None

    def components_ms(self, arm: str) -> dict[str, float]:
        """Mean milliseconds per step of every component that was timed."""
        return {name: float(value) for name, value in self._arm(arm, "components_ms").items() if value is not None}

    def roofline(self, arm: str) -> float | None:
        """Least time of an arm's mean step over the time it took (METHOD section 7)."""
        return _number((self.arms.get(arm) or {}).get("roofline_fraction"))

    def bound(self, arm: str) -> str | None:
        """Which side sets that limit, `bandwidth` or `compute`; None in runs of earlier versions: bandwidth."""
        return (self.arms.get(arm) or {}).get("roofline_bound")

    @property
    def time_ratio(self) -> float | None:
        """Median step of the sparse arm over that of the dense arm."""
        return _quotient(self.step_ms("sparse"), self.step_ms("dense"))

    @property
    def byte_ratio(self) -> float | None:
        """Bytes of a sparse step over bytes of a dense step: the least that the time ratio could be (METHOD 7)."""
        return _quotient(1.0, self.limit)

    @property
    def realised(self) -> float | None:
        """Share of the saved bytes that shows in step time; None where hardly any are saved, or only on paper."""
        time, read = self.time_ratio, self.byte_ratio
        if time is None or read is None or self.simulated or 1 - read < LEAST_SAVING:
            return None
        return (1 - time) / (1 - read)

    def _arm(self, arm: str, block: str) -> Mapping[str, Any]:
        return (self.arms.get(arm) or {}).get(block) or {}


def collect(
    results_dir: Path | str, *, sources: str, tasks: Sequence[str] = (), experiment: str | None = None
) -> list[Row]:
    """Rows of the ended runs below `results_dir`, sorted by task, model, data and kept tokens.

    Args:
        sources: hash of the present sources; runs of others are marked stale.
        tasks: names to keep; all when empty.
        experiment: keep the runs whose provenance names this experiment or whose command line chose it.
    Raises:
        StoreError: a run's file is unreadable.
    """
    runs = [run for run in load_runs(results_dir) if run.summary is not None]
    if experiment is not None:
        runs = [run for run in runs if _belongs(run, experiment)]
    runs = [run for run in runs if not tasks or name_of(run.config, "task") in tasks]
    configs = [run.config for run in runs]
    labels = zip(runs, setting_labels(configs), drafting_labels(configs), strict=True)
    rows = [row_of(run, setting, drafting, run.stale(sources)) for run, setting, drafting in labels]
    return sorted(rows, key=_place)


def _place(row: Row) -> tuple[Any, ...]:
    order = _ORDER.index(row.task_name) if row.task_name in _ORDER else len(_ORDER)
    return order, row.task, row.model, row.data, row.kept_tokens or 0, natural(row.setting), row.start


def _belongs(run: StoredRun, experiment: str) -> bool:
    chosen = [str(argument).lstrip("+") for argument in run.provenance.get("argv") or ()]
    return run.provenance.get("experiment") == experiment or f"experiment={experiment}" in chosen


def row_of(run: StoredRun, setting: str, drafting: Drafting, stale: bool) -> Row:
    """One run as a row; `run.summary` is not None."""
    summary: Mapping[str, Any] = run.summary or {}
    status = str(summary.get("status"))
    shown = summary if status in COUNTED else {}
    arms, compare = shown.get("arms") or {}, shown.get("compare") or {}
    deltas = compare.get("quality_delta") or {}
    metric = str((summary.get("metrics") or list(deltas) or [""])[0])
    fidelity = compare.get("fidelity") or {}
    floor = compare.get("noise_floor") or {}
    return Row(
        fingerprint=run.fingerprint,
        start=str(run.provenance.get("start")),
        status=status,
        stale=stale,
        reason=summary.get("reason"),
        notes=tuple(summary.get("notes") or ()),
        task=task_label(run.config),
        task_name=name_of(run.config, "task"),
        data=data_label(run.config),
        model=str(summary.get("model")),
        device=str(summary.get("device")),
        setting=setting,
        drafting=drafting,
        kept_tokens=kept_tokens(run.config),
        examples=int(summary.get("examples") or 0),
        prompt_tokens=(shown.get("prompt_tokens") or {}).get("median"),
        acceptance=((arms.get("sparse") or {}).get("acceptance_length") or {}).get("pooled"),
        tokens_per_second={arm: block.get("tokens_per_second") for arm, block in arms.items()},
        dense_vs_ar=_estimate(compare.get("dense_vs_ar"), "speedup"),
        sparse_vs_ar=_estimate(compare.get("sparse_vs_ar"), "speedup"),
        sparse_vs_dense=_estimate(compare.get("sparse_vs_dense"), "speedup"),
        sparse_ar_vs_ar=_estimate(compare.get("sparse_ar_vs_ar"), "speedup"),
        limit=(shown.get("ceiling") or {}).get("sparse_vs_dense"),
        metric=metric,
        quality={arm: (block.get("quality") or {}).get(metric) for arm, block in arms.items()},
        delta=_difference(deltas.get(metric)),
        floor=_difference((floor.get("quality") or {}).get(metric)),
        reference_delta=_difference(compare.get("reference_delta")),
        reference_floor=_difference(floor.get("reference")),
        split={name: _split(compare.get(name)) for name in SPEEDUPS},
        exclusive=summary.get("exclusive") is not False,
        divergence=fidelity.get("first_divergence"),
        noise_floor=fidelity.get("noise_floor"),
        axes=axes_on(run.config),
        simulated=is_simulated(run.config) or any(".simulated" in path for path in shown.get("paths") or {}),
        forced=is_forced(run.config),
        carved=is_carved(run.config),
        agreement=_estimate(fidelity, "agreement", "agreement_ci95"),
        kl=fidelity.get("kl"),
        accept_flips=fidelity.get("accept_flips"),
        retrieving=_retrieving(shown.get("paths") or {}),
        arms=arms,
        config=run.config,
    )


def _estimate(block: Mapping[str, Any] | None, key: str, interval: str = "ci95") -> Estimate:
    if not block:
        return Estimate()
    bounds = block.get(interval)
    return Estimate(block.get(key), (bounds[0], bounds[1]) if bounds else None)


def _difference(block: Mapping[str, Any] | None) -> Difference:
    known = _estimate(block, "delta")
    rest = {name: (block or {}).get(name) for name in ("se", "clusters", "changed", "mdd")}
    return Difference(known.value, known.ci, **rest)


def _split(block: Mapping[str, Any] | None) -> Split:
    return Split(*(_estimate((block or {}).get(name), "ratio") for name in ("tokens_per_step", "steps_per_second")))


def _retrieving(paths: Mapping[str, int]) -> float | None:
    """Share of the block selections that a layer made itself instead of taking them over (METHOD section 5)."""
    made = sum(count for path, count in paths.items() if path.startswith("select."))
    taken = sum(paths.get(path, 0) for path in TAKEN_OVER)
    return _quotient(made, made + taken)


def _quotient(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def write_overview(results_dir: Path | str, *, sources: str) -> Path:
    """Rewrite <results_dir>/summary.csv from all ended runs, under a lock, and return its path.

    Raises:
        StoreError: a run's file is unreadable.
    """
    folder = Path(results_dir)
    with folder_lock(folder / "runs", ".summary.lock"):
        file = folder / "summary.csv"
        remove_leftovers(folder, file.name)
        write_table(file, [_overview(row) for row in collect(folder, sources=sources)])
    return file


def _draft_depth(config: Mapping[str, Any]) -> Any:
    """Draft tokens on a path at most; runs of earlier versions name them k."""
    draft = config.get("draft") or {}
    return draft.get("depth", draft.get("k"))


def _overview(row: Row) -> dict[str, Any]:
    flat: dict[str, Any] = {
        "fingerprint": row.fingerprint,
        "start": row.start,
        "status": row.status,
        "stale": row.stale,
        "task": row.task,
        "data": row.data,
        "model": row.model,
        "device": row.device,
        "setting": row.setting,
        "simulated": row.simulated,
        "kept_tokens": row.kept_tokens,
        "draft": name_of(row.config, "draft"),
        "draft_depth": _draft_depth(row.config),
        "examples": row.examples,
        "prompt_tokens_median": row.prompt_tokens,
        "acceptance_length": row.acceptance,
        "metric": row.metric,
    }
    for arm in ("ar", "dense", "sparse"):
        flat[f"{arm}_tokens_per_second"] = row.tokens_per_second.get(arm)
        flat[f"{arm}_quality"] = row.quality.get(arm)
    for name in ("dense_vs_ar", "sparse_vs_ar", "sparse_vs_dense", "delta", "reference_delta"):
        estimate: Estimate = getattr(row, name)
        low, high = estimate.ci or (None, None)
        flat |= {name: estimate.value, f"{name}_low": low, f"{name}_high": high}
    flat |= {"delta_mdd": row.delta.mdd, "reference_delta_mdd": row.reference_delta.mdd, "exclusive": row.exclusive}
    flat["limit_sparse_vs_dense"] = row.limit
    for arm in ("ar", "dense", "sparse"):
        flat[f"{arm}_roofline_fraction"], flat[f"{arm}_roofline_bound"] = row.roofline(arm), row.bound(arm)
    return {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in flat.items()}
