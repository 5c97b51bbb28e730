"""The configuration of one run as typed, frozen settings, and `resolve`, which checks a composed mapping.

`resolve` refuses an unknown key, a wrong type, a value out of range and settings that contradict each other (DESIGN
section 7), each with a `ConfigError` of one line. Checks that need the model or the data are made when those are
loaded. Defaults live in conf/ alone, so every key is required here. No torch, no Hydra.
"""

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from harness.fields import ConfigError, fields_of, is_settings, join, parse, setting, show, to_plain, unknown_key
from harness.schema_drafts import (
    CombinedDraft,
    Eagle3Draft,
    GrowingDraft,
    LookupDraft,
    ModelDraft,
    NoDraft,
    OracleDraft,
    SelfSparseDraft,
    SuffixDraft,
    check_draft,
)
from harness.schema_groups import (
    CarvedModelConfig,
    CompiledEngine,
    CudaGraphEngine,
    EagerEngine,
    GreedyDecode,
    HfModelConfig,
    HubConfig,
    HubTaskConfig,
    ModelConfig,
    NeedleConfig,
    NoTrack,
    QmsumConfig,
    SampledDecode,
    ShapeModelConfig,
    SquadLongConfig,
    TaskConfig,
    TopkMatchDecode,
    TypicalDecode,
    Wandb,
    WandbOffline,
)
from harness.schema_sparsity import (
    AnchorReuse,
    BlockTopkAttention,
    DenseAttention,
    DenseFfn,
    DenseMoe,
    FloorMoe,
    MedianRatioMoe,
    NoReuse,
    QuantileFfn,
    SkipReuse,
    SparseFfn,
    SparseMoe,
    ThresholdFfn,
    TopkFfn,
    TopkMoe,
    ToppMoe,
    UnionMoe,
    check_sparsity,
    is_sparse,
)

__all__ = [
    "ARMS",
    "DOCS",
    "GROUPS",
    "AnchorReuse",
    "BlockTopkAttention",
    "CarvedModelConfig",
    "CombinedDraft",
    "CompiledEngine",
    "Config",
    "ConfigError",
    "CudaGraphEngine",
    "DenseAttention",
    "DenseFfn",
    "DenseMoe",
    "EagerEngine",
    "Eagle3Draft",
    "FloorMoe",
    "GreedyDecode",
    "GrowingDraft",
    "HfModelConfig",
    "HubConfig",
    "HubTaskConfig",
    "LookupDraft",
    "MedianRatioMoe",
    "ModelConfig",
    "ModelDraft",
    "NeedleConfig",
    "NoDraft",
    "NoReuse",
    "NoTrack",
    "OracleDraft",
    "QmsumConfig",
    "QuantileFfn",
    "SampledDecode",
    "SelfSparseDraft",
    "ShapeModelConfig",
    "SkipReuse",
    "SparseFfn",
    "SparseMoe",
    "SquadLongConfig",
    "SuffixDraft",
    "TaskConfig",
    "ThresholdFfn",
    "TopkFfn",
    "TopkMatchDecode",
    "TopkMoe",
    "ToppMoe",
    "TypicalDecode",
    "UnionMoe",
    "Wandb",
    "WandbOffline",
    "explain_unknown",
    "resolve",
    "task_options",
    "to_dict",
]

ARMS = ("ar", "dense", "sparse", "sparse_ar")
DRAFTED = ("dense", "sparse")
SPARSE = ("sparse", "sparse_ar")


@dataclass(frozen=True, slots=True)
class Config:
    """One run, checked. `resolve` makes it, `to_dict` turns it back."""

    task: TaskConfig = setting("what is decoded and graded")
    model: ModelConfig = setting("the target model")
    draft: NoDraft = setting("the drafter")
    attn: DenseAttention = setting("attention of the sparse arms")
    ffn: DenseFfn = setting("feed-forward layers of the sparse arms")
    moe: DenseMoe = setting("mixture-of-experts layers of the sparse arms")
    reuse: NoReuse = setting("reuse of selections in the sparse arms")
    decode: GreedyDecode = setting("how tokens are picked")
    engine: EagerEngine = setting("how steps are executed")
    track: NoTrack = setting("experiment tracking")
    arms: tuple[str, ...] = setting(
        "what is measured: ar = token by token, dense or sparse = drafts with dense or sparse verification, "
        "sparse_ar = sparse without drafts",
        choices=ARMS,
    )
    calibration: str | None = setting("file written by scripts.calibrate for this model, null = none")
    analysis: str = setting(
        "untimed passes after the timed arms: fidelity = agreement with dense on its output, and the log-probability "
        "of the reference answer; full = also overlap, similarity and recall of selections; none = neither",
        choices=("full", "fidelity", "none"),
    )
    seed: int = setting("seed of everything random: demonstrations, synthetic documents, random weights", minimum=0)
    exclusive: bool = setting(
        "wait until no other run computes on this machine (on a GPU: on this GPU); false = share it, for quality "
        "alone: timings are then marked shared"
    )
    prefill_memory_gb: float = setting(
        "CPU memory for prefilled prompts that later members of a sweep in the same process take over, 0 = none",
        minimum=0,
    )
    dry_run: bool = setting("check everything, say how long the run would take, and compute nothing")
    results_dir: str = setting("folder that runs, tables and figures are written to")
    rerun: bool = setting("run again even if this configuration is finished")
    stale: str = setting(
        "a stored run made by other sources: run it again or keep it as it is", choices=("rerun", "keep")
    )


GROUPS: Mapping[str, tuple[str, Mapping[str, type[Any]]]] = {
    "task": (
        "name",
        {
            "xsum": HubTaskConfig,
            "squad": HubTaskConfig,
            "math": HubTaskConfig,
            "gsm8k": HubTaskConfig,
            "needle": NeedleConfig,
            "squad_long": SquadLongConfig,
            "qmsum": QmsumConfig,
        },
    ),
    "model": (
        "kind",
        {"smollm2": ModelConfig, "hf": HfModelConfig, "shape": ShapeModelConfig, "carved_moe": CarvedModelConfig},
    ),
    "draft": (
        "name",
        {
            "none": NoDraft,
            "lookup": LookupDraft,
            "suffix": SuffixDraft,
            "model": ModelDraft,
            "selfsparse": SelfSparseDraft,
            "eagle3": Eagle3Draft,
            "oracle": OracleDraft,
            "combined": CombinedDraft,
        },
    ),
    "attn": ("name", {"dense": DenseAttention, "block_topk": BlockTopkAttention}),
    "ffn": ("name", {"dense": DenseFfn, "topk": TopkFfn, "threshold": ThresholdFfn, "quantile": QuantileFfn}),
    "moe": (
        "name",
        {
            "dense": DenseMoe,
            "union": UnionMoe,
            "median_ratio": MedianRatioMoe,
            "topk": TopkMoe,
            "topp": ToppMoe,
            "floor": FloorMoe,
        },
    ),
    "reuse": ("name", {"none": NoReuse, "anchors": AnchorReuse, "skips": SkipReuse}),
    "decode": (
        "name",
        {"greedy": GreedyDecode, "sample": SampledDecode, "typical": TypicalDecode, "topk_match": TopkMatchDecode},
    ),
    "engine": ("name", {"eager": EagerEngine, "compiled": CompiledEngine, "cuda_graph": CudaGraphEngine}),
    "track": ("name", {"none": NoTrack, "wandb_offline": WandbOffline, "wandb": Wandb}),
}
"""group -> (the key that picks the class, choice -> settings class)."""


def resolve(raw: Mapping[str, Any]) -> Config:
    """The checked configuration of one run from a plain nested mapping.

    Raises ConfigError, one line, for an unknown key, a wrong type or value, or settings that contradict each other.
    """
    groups = {group: _group(group, raw.get(group)) for group in GROUPS}
    config = parse(Config, {**raw, **groups}, "")
    for check in (_check_arms, _check_source, _check_lengths):
        check(config)
    check_draft(config.draft, config.decode.name)
    check_sparsity(config.attn, config.ffn, config.moe, config.reuse, config.calibration)
    _check_cache(config)
    _check_engine(config)
    return replace(config, model=_labelled(config.model))


def to_dict(config: Config) -> dict[str, Any]:
    """The plain nested mapping that `resolve` takes."""
    return {name: to_plain(getattr(config, name)) for name, _, _ in fields_of(Config)}


def task_options(task: TaskConfig) -> dict[str, Any]:
    """The keys that one task has beside those of every task and of the hub, as plain values."""
    common = {name for name, _, _ in fields_of(HubTaskConfig)}
    return {name: to_plain(getattr(task, name)) for name, _, _ in fields_of(type(task)) if name not in common}


def explain_unknown(key: str) -> str:
    """One line about a key that the composed configuration lacks: the choice that brings it, or the nearest key."""
    homes = [f"{group}={choice}" for group, choice, cls in _choices() if key in dict(_docs(cls, group))]
    if homes:
        return f"{key} is not a key of the chosen {key.split('.')[0]}: it belongs to {' and '.join(homes)}"
    group, parent = key.split(".")[0], key.rpartition(".")[0]
    siblings = [known for known in DOCS if known.rpartition(".")[0] == parent]
    cousins = [known for known in DOCS if known.startswith(f"{group}.")]
    return unknown_key(key, siblings or cousins or [known for known in DOCS if "." not in known])


def _group(group: str, raw: Any) -> Any:
    """The settings of one group, of the class that its first key picks."""
    key, classes = GROUPS[group]
    choice = raw.get(key) if isinstance(raw, Mapping) else raw
    if not isinstance(choice, str) or choice not in classes:
        raise ConfigError(f"{group}.{key}={show(choice)}: choose one of {', '.join(classes)}")
    return parse(classes[choice], raw, group)


def _check_arms(config: Config) -> None:
    """Arms that exist once each and that the drafter and the sparsity groups can feed."""
    arms = config.arms
    typed = f"arms={show(arms)}"
    if not arms or len(set(arms)) < len(arms):
        raise ConfigError(f"{typed}: name at least one of {', '.join(ARMS)}, each once")
    sparse = is_sparse(config.attn, config.ffn, config.moe, config.reuse)
    if not sparse and (idle := [arm for arm in arms if arm in SPARSE]):
        left = show([arm for arm in arms if arm not in SPARSE] or ["ar", "dense"])
        raise ConfigError(
            f"{typed}: {' and '.join(idle)} would be dense, as attn, ffn and moe are all dense; "
            f"choose attn=block_topk or arms={left}"
        )
    if config.draft.name == "none" and (idle := [arm for arm in arms if arm in DRAFTED]):
        raise ConfigError(f"{typed}: {' and '.join(idle)} need drafts; choose draft=lookup or arms=[ar,sparse_ar]")


def _check_cache(config: Config) -> None:
    """A block budget that is not above the longest context that the task allows."""
    attn, task = config.attn, config.task
    if not isinstance(attn, BlockTopkAttention) or task.max_prompt_tokens is None:
        return
    longest = task.max_prompt_tokens + task.max_new_tokens
    cache = f"the cache of {longest} (task.max_prompt_tokens + task.max_new_tokens)"
    if attn.budget == "fixed" and attn.topk * attn.block_size > longest:
        raise ConfigError(
            f"attn.topk={attn.topk}: blocks of {attn.block_size} make {attn.topk * attn.block_size} tokens, more than "
            f"{cache} holds; choose {max(longest // attn.block_size, 1)} or less"
        )
    if attn.budget == "piecewise" and attn.l0 >= longest:
        raise ConfigError(f"attn.l0={attn.l0}: {cache} never goes beyond it; choose less than {longest}")


def _check_engine(config: Config) -> None:
    """A wave that fills the batch, and weights packed for kernels that need it."""
    engine = config.engine
    if engine.name == "compiled" and not engine.packed:
        raise ConfigError("engine.packed=false: the kernels of engine=compiled read packed weights (valid: true)")
    if engine.wave is not None and engine.wave < engine.batch_size:
        raise ConfigError(
            f"engine.wave={engine.wave}: fewer examples than engine.batch_size={engine.batch_size}; choose at least "
            "that"
        )


def _check_source(config: Config) -> None:
    """A source that the task has, with files where files are read."""
    task = config.task
    if task.data_files and task.source != "files":
        raise ConfigError(
            f"task.data_files={show(task.data_files)}: not read with task.source={task.source}; set task.source=files"
        )
    if task.source == "files" and not task.data_files:
        raise ConfigError(
            "task.data_files=[]: task.source=files needs files; set task.data_files=<path>, or a list of paths"
        )
    if len(set(task.data_files)) < len(task.data_files):
        raise ConfigError(f"task.data_files={show(task.data_files)}: name each file once")
    if task.source == "hub" and not isinstance(task, HubTaskConfig):
        with_hub = [name for name, cls in GROUPS["task"][1].items() if issubclass(cls, HubTaskConfig)]
        raise ConfigError(
            f"task.source=hub: {task.name} has no data set on the hub; choose task.source=bundled or files "
            f"(the hub has {', '.join(with_hub)})"
        )


def _check_lengths(config: Config) -> None:
    """Prompt lengths that leave something to run."""
    task = config.task
    longest = task.max_prompt_tokens
    if longest is None:
        return
    if task.min_prompt_tokens > longest:
        raise ConfigError(
            f"task.min_prompt_tokens={task.min_prompt_tokens}: must be at most task.max_prompt_tokens={longest}"
        )
    if isinstance(task, NeedleConfig) and task.context_tokens > longest:
        raise ConfigError(
            f"task.context_tokens={task.context_tokens}: must be at most task.max_prompt_tokens={longest}, "
            "or the fact may be cut out"
        )


def _labelled(model: ModelConfig) -> ModelConfig:
    """The model with a label for tables; a checkpoint must name what to load."""
    if not isinstance(model, HfModelConfig):
        return replace(model, name=model.name or model.kind)
    if model.path is None:
        raise ConfigError(
            "model.path=null: model=hf needs a hub id, a folder or a .gguf file, model.path=<one of them>"
        )
    return replace(model, name=model.name or PurePath(model.path).name or model.path)


def _choices() -> Iterator[tuple[str, str, type[Any]]]:
    """(group, choice, settings class) of every group file."""
    for group, (_, classes) in GROUPS.items():
        for choice, cls in classes.items():
            yield group, choice, cls


def _docs(cls: type[Any], path: str) -> Iterator[tuple[str, str]]:
    """(key, comment) of every key of a settings class, nested ones included."""
    for name, hint, metadata in fields_of(cls):
        yield join(path, name), metadata["doc"]
        if is_settings(hint):
            yield from _docs(hint, join(path, name))


def _all_docs() -> dict[str, str]:
    """Key -> comment over the top level and every choice of every group, groups first."""
    docs = {name: metadata["doc"] for name, _, metadata in fields_of(Config)}
    for group, _, cls in _choices():
        docs.update(_docs(cls, group))
    return docs


DOCS: Mapping[str, str] = types.MappingProxyType(_all_docs())
"""Every key (dotted path) -> its one-line comment."""
