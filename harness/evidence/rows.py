"""One row per stored run, with the labels and numbers that tables, figures and summary.csv share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.evidence.store import StoredRun, folder_lock, load_runs, write_table

COUNTED = ("ok", "partial")
TIMES = "\u00d7"
Interval = tuple[float, float]

_ORDER = ("xsum", "squad", "math", "gsm8k", "squad_long", "needle", "qmsum")
_TASK_LABELS = {"bucket": "{}", "context_tokens": "{} tok", "depth": "depth {}"}
_NOT_SETTING = ("track", "results_dir", "rerun", "stale", "hydra", "arms")
_SHOWN_ELSEWHERE = (
    *("task.name", "task.source", "task.data_files", "task.data_sha256", "task.bucket", "task.context_tokens"),
    *("task.depth", "model.name", "attn.name", "attn.topk", "attn.block_size"),
)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95% interval; either may be missing."""

    value: float | None = None
    ci: Interval | None = None


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
    delta: Estimate
    divergence: Mapping[str, Any] | None
    noise_floor: Mapping[str, Any] | None
    config: Mapping[str, Any] = field(repr=False)

    @property
    def counted(self) -> bool:
        """Whether numbers of this run may be shown."""
        return self.status in COUNTED

    @property
    def marks(self) -> tuple[str, ...]:
        """What a reader must know before using the row: its status unless ok, and stale."""
        return tuple(
            mark for mark in (self.status if self.status != "ok" else "", "stale" if self.stale else "") if mark
        )


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
    runs = [run for run in runs if not tasks or _name(run.config, "task") in tasks]
    labels = setting_labels([run.config for run in runs])
    rows = [row_of(run, label, run.stale(sources)) for run, label in zip(runs, labels, strict=True)]
    return sorted(rows, key=_place)


def _place(row: Row) -> tuple[int, str, str, str, int, str, str]:
    order = _ORDER.index(row.task_name) if row.task_name in _ORDER else len(_ORDER)
    return order, row.task, row.model, row.data, row.kept_tokens or 0, row.setting, row.start


def _belongs(run: StoredRun, experiment: str) -> bool:
    chosen = [str(argument).lstrip("+") for argument in run.provenance.get("argv") or ()]
    return run.provenance.get("experiment") == experiment or f"experiment={experiment}" in chosen


def row_of(run: StoredRun, setting: str, stale: bool) -> Row:
    """One run as a row; `run.summary` is not None."""
    summary: Mapping[str, Any] = run.summary or {}
    status = str(summary.get("status"))
    shown = summary if status in COUNTED else {}
    arms, compare = shown.get("arms") or {}, shown.get("compare") or {}
    deltas = compare.get("quality_delta") or {}
    metric = str((summary.get("metrics") or list(deltas) or [""])[0])
    fidelity = compare.get("fidelity") or {}
    delta = deltas.get(metric) or {}
    return Row(
        fingerprint=run.fingerprint,
        start=str(run.provenance.get("start")),
        status=status,
        stale=stale,
        reason=summary.get("reason"),
        notes=tuple(summary.get("notes") or ()),
        task=task_label(run.config),
        task_name=_name(run.config, "task"),
        data=data_label(run.config),
        model=str(summary.get("model")),
        device=str(summary.get("device")),
        setting=setting,
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
        delta=_estimate(delta, "delta"),
        divergence=fidelity.get("first_divergence"),
        noise_floor=fidelity.get("noise_floor"),
        config=run.config,
    )


def _estimate(block: Mapping[str, Any] | None, key: str) -> Estimate:
    if not block:
        return Estimate()
    bounds = block.get("ci95")
    return Estimate(block.get(key), (bounds[0], bounds[1]) if bounds else None)


def _name(config: Mapping[str, Any], group: str) -> str:
    value = config.get(group)
    return str(value.get("name")) if isinstance(value, Mapping) else str(value)


def task_label(config: Mapping[str, Any]) -> str:
    """Task with what changes its length: "squad_long 8k"."""
    task = config.get("task") or {}
    parts = [_name(config, "task")]
    for key, text in _TASK_LABELS.items():
        if task.get(key) is not None:
            parts.append(text.format(task[key]))
    return ", ".join([" ".join(parts[:2]), *parts[2:]])


def data_label(config: Mapping[str, Any]) -> str:
    """Where the examples come from: "bundled", file names, or the hub's data set."""
    task = config.get("task") or {}
    if task.get("source") == "files":
        return ", ".join(str(name) for name in task.get("data_files") or ())
    if task.get("source") == "hub":
        return str((task.get("hub") or {}).get("path"))
    return "synthetic" if _name(config, "task") == "needle" else str(task.get("source"))


def kept_tokens(config: Mapping[str, Any]) -> int | None:
    """Context tokens kept per KV head by block top-k attention, or None where attention is dense."""
    attn = config.get("attn") or {}
    if not isinstance(attn, Mapping) or attn.get("topk") is None:
        return None
    return int(attn["topk"]) * int(attn.get("block_size") or 1)


def setting_labels(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A short name for each run's setting: its attention budget, then every key that varies within task and model."""
    flat = [_flatten({key: value for key, value in config.items() if key not in _NOT_SETTING}) for config in configs]
    places = [(task_label(config), data_label(config), _name(config, "model")) for config in configs]
    labels = []
    for config, own, place in zip(configs, flat, places, strict=True):
        peers = [other for other, there in zip(flat, places, strict=True) if there == place]
        varying = [key for key in own if any(peer.get(key) != own[key] for peer in peers)]
        extra = [f"{key}={own[key]}" for key in varying if key not in _SHOWN_ELSEWHERE]
        labels.append(", ".join([_attention_label(config), *extra]))
    return labels


def _attention_label(config: Mapping[str, Any]) -> str:
    attn = config.get("attn") or {}
    if kept_tokens(config) is None:
        return _name(config, "attn")
    return f"topk {attn['topk']}{TIMES}{attn.get('block_size')}"


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        flat |= _flatten(item, f"{name}.") if isinstance(item, Mapping) else {name: item}
    return flat


def write_overview(results_dir: Path | str, *, sources: str) -> Path:
    """Rewrite <results_dir>/summary.csv from all ended runs, under a lock, and return its path.

    Raises:
        StoreError: a run's file is unreadable.
    """
    folder = Path(results_dir)
    with folder_lock(folder / "runs", ".summary.lock"):
        file = folder / "summary.csv"
        write_table(file, [_overview(row) for row in collect(folder, sources=sources)])
    return file


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
        "kept_tokens": row.kept_tokens,
        "draft": _name(row.config, "draft"),
        "draft_k": (row.config.get("draft") or {}).get("k"),
        "examples": row.examples,
        "prompt_tokens_median": row.prompt_tokens,
        "acceptance_length": row.acceptance,
        "metric": row.metric,
    }
    for arm in ("ar", "dense", "sparse"):
        flat[f"{arm}_tokens_per_second"] = row.tokens_per_second.get(arm)
        flat[f"{arm}_quality"] = row.quality.get(arm)
    for name in ("dense_vs_ar", "sparse_vs_ar", "sparse_vs_dense", "delta"):
        estimate: Estimate = getattr(row, name)
        low, high = estimate.ci or (None, None)
        flat |= {name: estimate.value, f"{name}_low": low, f"{name}_high": high}
    flat["limit_sparse_vs_dense"] = row.limit
    return {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in flat.items()}
