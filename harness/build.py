"""Composition root: from a configuration to the objects that run it. The only file that knows every concrete class."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

import tasks
from harness import budgets, drafters, models, schema
from harness.budgets import SPARSE_ARMS
from harness.calibration import Calibration
from harness.engine.decoding import Decoder, StopRule
from harness.engine.drafting.base import Drafter, NoDrafter
from harness.engine.drafting.oracle import OracleDrafter
from harness.engine.model import loading
from harness.engine.model.device_step import DeviceStep
from harness.engine.model.engines import make_step
from harness.engine.model.families import UnsupportedModel, adapt, check_supported, max_positions
from harness.engine.prefills import Prefills, PrefillStore
from harness.evidence.provenance import portable
from harness.schema import Config, ConfigError
from harness.timing import make_clock
from sparse.budget import Sparsity
from sparse.cost import ModelShape
from sparse.ops.decoder_layer import native as decoder_layer
from tasks.base import HubSource, Task, TaskSettings
from tasks.prompting import Prepared, prepare

DRAFTING_ARMS = ("dense", "sparse")
_MEMORY_SHARE = 0.9
_NOT_PREFILL = ("warmup", "batch_size", "wave", "threads")
"""Keys of the engine that leave a prefill as it is, or are compared as what they come to."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked run before anything expensive is loaded.

    Attributes:
        config: as resolved.
        task, prepared: what is graded, and the prompts in order.
        tokenizer: of the target model.
        model_config: the library's configuration of the target model.
        shape: sizes of the target model.
        dtype, device, threads: resolved, no ``auto`` left.
        capacity: positions that the longest prompt and its answer need.
        wave: examples that are prefilled together and decoded by one arm after the other.
        depth: tokens on a path of a draft at most.
        budgets: per arm, what may be skipped.
        required_paths: per arm, path counters that must not stay at zero.
    """

    config: Config
    task: Task
    prepared: list[Prepared]
    tokenizer: Any
    model_config: Any
    shape: ModelShape
    dtype: torch.dtype
    device: torch.device
    threads: int
    capacity: int
    wave: int
    depth: int
    budgets: dict[str, Sparsity]
    required_paths: dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class Engine:
    """A loaded model that decodes.

    Attributes:
        decoder: runs the examples of a wave.
        drafters: per arm, one for each row of the cache.
        prefills: prompts that the decoder keeps for later runs, or took from earlier ones.
        replays: drafters that must be told the greedy continuation of their row's prompt before.
    """

    decoder: Decoder
    drafters: dict[str, list[Drafter]]
    replays: list[list[OracleDrafter]]
    prefills: Prefills


def resolved(config: Config) -> dict[str, Any]:
    """The plain configuration with every ``auto`` replaced by what it means on this machine, and hashes of its files.

    Raises:
        ConfigError: the device is not present, or a file of the configuration cannot be read.
    """
    plain = schema.to_dict(config)
    try:
        device = loading.resolve_device(config.model.device)
        dtype = loading.resolve_dtype(config.model.dtype, device)
    except loading.ModelError as error:
        raise ConfigError(str(error)) from error
    plain["model"] |= {"device": device.type, "dtype": str(dtype).removeprefix("torch.")}
    plain["engine"]["threads"] = thread_count(config)
    hashed = {}
    if config.calibration is not None:
        hashed["calibration"] = models.file_sha256("calibration", Path(config.calibration))
    if isinstance(config.model, schema.CarvedModelConfig):
        hashed["carving"] = models.file_sha256("model.path", models.carving_file(config.model))
    hashed |= drafters.file_hashes(config)
    if config.engine.name == "compiled" and device.type == "cpu" and not decoder_layer.available(dtype):
        hashed["kernels"] = "none"  # torch operators run instead: other times, other roundings
    return plain | ({"file_hashes": hashed} if hashed else {})


def thread_count(config: Config) -> int:
    """CPU threads of the run: as configured, else every core this process may use."""
    return config.engine.threads or len(os.sched_getaffinity(0))


def plan(config: Config) -> Plan:
    """Check everything that can be checked without weights: model, data, prompts, lengths, budgets, memory.

    Raises:
        ConfigError: a key does not fit the model or the machine.
        tasks.base.TaskError: the data cannot be used.
    """
    torch.set_num_threads(thread_count(config))
    try:
        device = loading.resolve_device(config.model.device)
        model_config = models.library_config(config.model)
        check_supported(model_config)
        tokenizer = models.tokenizer(config.model)
        dtype = loading.resolve_dtype(config.model.dtype, device)
        shape = models.shape(config.model, model_config, dtype)
    except (loading.ModelError, UnsupportedModel) as error:
        raise ConfigError(str(error)) from error
    sparsity = _sparsity(config, shape)
    _check_engine(config, device, sparsity, experts=shape.experts > 0)
    prompt_limit = _prompt_limit(config, max_positions(model_config))
    task = _task(config)
    prepared = prepare(
        task,
        tokenizer,
        style=config.task.style,
        limit=config.task.limit,
        min_prompt_tokens=config.task.min_prompt_tokens,
        max_prompt_tokens=prompt_limit,
    )
    capacity = max(len(item.ids) for item in prepared) + config.task.max_new_tokens
    budgets.check_lengths(config, sparsity.attention, capacity)
    drafters.check(config, shape, tokenizer, capacity)
    if config.engine.batch_size > len(prepared):
        raise ConfigError(
            f"engine.batch_size={config.engine.batch_size}: there are {len(prepared)} examples (valid: up to that)"
        )
    wave = min(_wave(config), len(prepared))
    positions = wave * (capacity + drafters.room(config))
    _check_memory(config, shape, positions, device, drafters.memory(config, shape, dtype, positions))
    required = budgets.required_paths(sparsity)
    return Plan(
        config=config,
        task=task,
        prepared=prepared,
        tokenizer=tokenizer,
        model_config=model_config,
        shape=shape,
        dtype=dtype,
        device=device,
        threads=thread_count(config),
        capacity=capacity,
        wave=wave,
        depth=drafters.depth(config),
        budgets={arm: sparsity if arm in SPARSE_ARMS else Sparsity() for arm in config.arms},
        required_paths={arm: required for arm in config.arms if arm in SPARSE_ARMS},
    )


def load(plan: Plan) -> Engine:
    """Load the weights and put the decoder together.

    Raises:
        ConfigError: the weights cannot be read.
    """
    config = plan.config
    _PREFILLS.shrink(min(prefill_limit(plan), _spare(plan)))
    try:
        channels = any(not sparsity.ffn.is_dense for sparsity in plan.budgets.values())
        library = models.library_model(config.model, plan.model_config, plan.dtype, plan.device, config.seed)
        weights = adapt(library, packed=config.engine.packed, channels=channels)
    except (loading.ModelError, UnsupportedModel) as error:
        raise ConfigError(str(error)) from error
    step = make_step(weights, drafters.taps(config, plan.shape), engine=config.engine.name)
    clock = make_clock(plan.device.type)
    summarised = next((sparsity for sparsity in plan.budgets.values() if not sparsity.is_dense), Sparsity())
    capacity, more = plan.capacity + drafters.room(config), drafters.cache_budgets(config)
    cache = step.new_cache(capacity, summarised.attention, plan.wave, *more)
    prefills = _prefills(plan)
    decoder = Decoder(
        step,
        cache,
        stop=StopRule(
            models.end_ids(config.model, plan.model_config, plan.tokenizer), tuple(plan.task.stop), plan.tokenizer
        ),
        clock=clock,
        prefill_chunk=config.engine.prefill_chunk,
        rule=drafters.rule(config),
        batch=config.engine.batch_size,
        prefills=prefills,
    )
    usual = sorted(len(item.ids) for item in plan.prepared)[len(plan.prepared) // 2]
    drafting = drafters.Drafting(config, step, cache, usual, clock)
    drafters.load(config, drafting, plan.dtype, plan.device)
    made: dict[str, list[Drafter]] = {
        arm: drafting.of_arm(plan.budgets[arm]) if arm in DRAFTING_ARMS else [NoDrafter()] * plan.wave
        for arm in config.arms
    }
    rows = zip(*made.values(), strict=True)
    replays = [[drafter for drafter in row if isinstance(drafter, OracleDrafter)] for row in rows]
    return Engine(decoder, made, replays if any(replays) else [], prefills)


_PREFILLS = PrefillStore()
"""What the runs of this process have prefilled."""


def _prefills(plan: Plan) -> Prefills:
    """Prompts that earlier runs of this process prefilled with the same weights, run in the same way."""
    return Prefills(_PREFILLS, prefill_identity(plan))


def prefill_limit(plan: Plan) -> int:
    """Bytes of prefilled prompts that may be kept; on a GPU none."""
    return int(plan.config.prefill_memory_gb * 1e9) if plan.device.type == "cpu" else 0


def prefill_identity(plan: Plan) -> str:
    """What a prefill depends on beside the prompt."""
    config = plan.config
    engine = {key: value for key, value in schema.to_dict(config)["engine"].items() if key not in _NOT_PREFILL}
    plain = portable(resolved(config))
    same = [plain["model"], plain.get("file_hashes"), engine, plan.threads, config.seed]
    same += [drafters.taps(config, plan.shape), config.ffn.name == "dense"]
    return json.dumps(same)


def resource(device: torch.device) -> str:
    """What a run must have for itself to be timed: the CPU with its memory, or one GPU."""
    return "cpu" if device.type != "cuda" else f"gpu-{torch.cuda.get_device_properties(device).uuid}"


def _task(config: Config) -> Task:
    hub = getattr(config.task, "hub", None)
    settings = TaskSettings(
        source=config.task.source,
        data_files=tuple(config.task.data_files),
        offset=config.task.offset,
        style=config.task.style,
        shots=config.task.shots,
        stop=tuple(config.task.stop),
        seed=config.seed,
        hub=None if hub is None else HubSource(hub.path, hub.config, hub.split, hub.revision),
        options=schema.task_options(config.task),
    )
    return tasks.make(config.task.name, settings)


def _check_engine(config: Config, device: torch.device, sparsity: Sparsity, *, experts: bool) -> None:
    """Refuse what a captured step cannot do.

    Raises:
        ConfigError: engine=cuda_graph without a GPU, or with a mechanism that it does not run.
    """
    if config.engine.name != "cuda_graph":
        return
    if device.type != "cuda":
        raise ConfigError(f"engine=cuda_graph: the model runs on {device.type} (valid here: compiled, eager)")
    try:
        DeviceStep.check(sparsity, experts=experts)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _wave(config: Config) -> int:
    """Examples of a wave: as configured, else one, with batches two batches, so that rows leave and enter."""
    batch = config.engine.batch_size
    return config.engine.wave or (1 if batch == 1 else 2 * batch)


def _sparsity(config: Config, shape: ModelShape) -> Sparsity:
    """The budgets of the sparse arms."""
    calibration = None
    if config.calibration is not None:
        calibration = Calibration.load(config.calibration)
        calibration.check(models.identity(config.model, config.seed))
    return budgets.sparsity(config, shape, calibration)


def _prompt_limit(config: Config, positions: int) -> int:
    """Longest prompt that leaves room for the answer.

    Raises:
        ConfigError: the configured lengths do not fit the model.
    """
    room = positions - config.task.max_new_tokens
    if room < 1:
        raise ConfigError(
            f"task.max_new_tokens={config.task.max_new_tokens}: the model has {positions} positions (valid: below that)"
        )
    wanted = config.task.max_prompt_tokens
    if wanted is not None and wanted > room:
        raise ConfigError(
            f"task.max_prompt_tokens={wanted}: with task.max_new_tokens={config.task.max_new_tokens} the model's "
            f"{positions} positions leave {room} (valid: up to {room}, or null)"
        )
    if config.task.min_prompt_tokens > (wanted or room):
        raise ConfigError(
            f"task.min_prompt_tokens={config.task.min_prompt_tokens}: the longest prompt that fits has "
            f"{wanted or room} tokens (valid: up to {wanted or room})"
        )
    return wanted or room


def _spare(plan: Plan) -> int:
    """Bytes of memory that the run leaves for prefilled prompts, those that are kept already included."""
    if plan.device.type != "cpu":
        return 0
    taken = plan.shape.weight_bytes + plan.shape.kv_bytes_per_token * plan.wave * plan.capacity
    return max(0, int(_MEMORY_SHARE * (psutil.virtual_memory().available + _PREFILLS.nbytes)) - 2 * taken)


def _check_memory(config: Config, shape: ModelShape, positions: int, device: torch.device, drafting: int) -> None:
    """Refuse a model whose weights, their copies by channel, and cache cannot fit."""
    carved = isinstance(config.model, schema.CarvedModelConfig)
    copies = 6 * carved + 4 * (config.ffn.name != "dense")
    weights = shape.weight_bytes + shape.itemsize * shape.hidden * (shape.vocab + copies * shape.channels)
    cache = shape.kv_bytes_per_token * positions
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available + _PREFILLS.nbytes
    if weights + cache + drafting > _MEMORY_SHARE * free:
        raise ConfigError(
            f"model={config.model.name}: {weights / 1e9:.1f} GB of weights, {cache / 1e9:.1f} GB of cache and "
            f"{drafting / 1e9:.1f} GB for draft={config.draft.name} do not fit into {free / 1e9:.1f} GB of free memory "
            "(valid: a smaller model or dtype, shorter prompts, a smaller engine.wave)"
        )
