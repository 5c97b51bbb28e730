"""What a benchmark works on: the model under every engine, filled caches, the arms and their draft shapes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch

import tasks
from harness import roofline
from harness.engine.cache import KVCache
from harness.engine.model import healing, loading
from harness.engine.model.byte_tokenizer import ByteTokenizer
from harness.engine.model.engines import ENGINES, make_step
from harness.engine.model.families import ModelWeights, adapt
from harness.engine.model.step import Segment, Step
from harness.engine.model.verification import Verification
from harness.timing import Clock, make_clock
from scripts.bench import drafts, records
from scripts.bench.drafts import DraftShape
from sparse.budget import AttentionBudget, FfnBudget, MoeBudget, ReuseBudget, Sparsity
from tasks.base import TaskSettings

REFERENCE = "eager"
"""The engine that the others are compared with before a time is printed."""
_CHUNK = 1024
_MEMORY_SHARE = 0.9
_ROW_SHIFT = 31
"""Between the tokens of the sequences of a batch, so that they differ."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is timed, on what.

    Attributes:
        arch: the model, with its number of layers where that was cut.
        cut: whether layers are missing, so that no step is a whole step.
        library: the library's own model, the same weights; None for random weights.
        tokenizer: of the model.
        steps: by engine; those of ``timed`` and the reference.
        timed: engines that are timed.
        contexts, batches: of the steps, ascending.
        shapes: draft shapes.
        tokens: prompt of the longest context and what follows it.
        budget: attention budget of the sparse arms.
        axes: what each arm may skip.
        clock: the only clock.
        bandwidth: measured, bytes per second.
        place: of the CSV rows.
    """

    arch: str
    cut: bool
    library: Any
    tokenizer: Any
    steps: dict[str, Step]
    timed: tuple[str, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    shapes: tuple[DraftShape, ...]
    tokens: list[int]
    budget: AttentionBudget
    axes: dict[str, Sparsity]
    clock: Clock
    bandwidth: float
    place: records.Place

    @property
    def weights(self) -> ModelWeights:
        """Of the reference."""
        return self.steps[REFERENCE].weights

    @property
    def random(self) -> bool:
        """Whether the weights are random."""
        return isinstance(self.tokenizer, ByteTokenizer)

    @property
    def dtype(self) -> str:
        """Of weights and cache, as torch names it."""
        return str(self.weights.dtype).removeprefix("torch.")

    def segments(self, context: int, batch: int, shape: DraftShape) -> list[Segment]:
        """The tokens of one step: those that follow each sequence's context."""
        tree, found = shape.tree(self.weights.device), []
        for row in range(batch):
            start = context + _ROW_SHIFT * row
            own = [self.tokens[(start + place) % len(self.tokens)] for place in range(shape.rows)]
            found.append(Segment(row, own, tree))
        return found

    def run(self, engine: str, cache: KVCache, segments: list[Segment], run: Verification) -> torch.Tensor:
        """Logits [tokens, vocab] of one step; the cache is as before."""
        lengths = [cache.lengths[segment.row] for segment in segments]
        logits = self.steps[engine].run(segments, cache, run).logits
        for segment, length in zip(segments, lengths, strict=True):
            cache.truncate(segment.row, length)
        return logits


def prepare(options: argparse.Namespace) -> Setting:
    """Check the options, load the model once for every engine and build its steps.

    Raises:
        harness.engine.model.loading.ModelError, ValueError: bad input, one line.
    """
    contexts, batches = whole_numbers("contexts", options.contexts), whole_numbers("batches", options.batches)
    shapes = tuple(drafts.parse(text) for text in options.drafts.split(","))
    _check(options, contexts)
    device = loading.resolve_device(options.device)
    dtype = loading.resolve_dtype(options.dtype, device)
    budget = AttentionBudget(topk=options.kept // options.block_size, block_size=options.block_size)
    names = tuple(dict.fromkeys(options.engine.split(",")))
    library, steps, tokenizer, arch = _load(options, names, device, dtype)
    weights = steps[REFERENCE].weights
    room = max(shape.rows for shape in shapes) + options.tokens + 1
    if max(contexts) + room > weights.positions:
        raise ValueError(
            f"--contexts={max(contexts)}: with {room} tokens after it this is beyond the {weights.positions} positions "
            f"of {arch} (valid: up to {weights.positions - room})"
        )
    _check_memory(weights, (max(contexts) + room) * (max(batches) * len(steps) + 1), device, arch)
    threads = torch.get_num_threads()
    return Setting(
        arch=arch,
        cut=options.layers is not None,
        library=library,
        tokenizer=tokenizer,
        steps=steps,
        timed=names,
        contexts=contexts,
        batches=batches,
        shapes=shapes,
        tokens=prompt_tokens(tokenizer, max(contexts) + room, weights.shape.vocab),
        budget=budget,
        axes=_axes(options, weights, budget),
        clock=make_clock(device.type),
        bandwidth=roofline.bandwidth(device.type, threads, anew=True),
        place=records.place(roofline.device_text(device, threads), threads, torch.__version__),
    )


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """A comma-separated list of whole numbers above zero, ascending, each once.

    Raises:
        ValueError: another text.
    """
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--{option}={text}: is not a list of whole numbers above 0")
    return tuple(sorted({int(part) for part in parts}))


def _check(options: argparse.Namespace, contexts: Sequence[int]) -> None:
    """Refuse options that contradict each other, before anything is loaded."""
    if min(options.repeats, options.kept, options.union, options.anchors) < 1 or options.tokens < 2:
        raise ValueError("--repeats, --kept, --union and --anchors must be at least 1, --tokens 2")
    if options.carved and options.arch:
        raise ValueError(f"--arch={options.arch}: --carved times SmolLM2 cut into experts (valid: one of them)")
    for name in ("layers", "positions"):
        if getattr(options, name) is not None and not options.arch:
            raise ValueError(f"--{name}={getattr(options, name)}: SmolLM2 is as it is (valid with --arch)")
    if not 0 < options.ffn_keep < 1:
        raise ValueError(f"--ffn-keep={options.ffn_keep}: must be above 0 and below 1")
    if min(contexts) < options.kept + options.block_size:
        raise ValueError(f"--kept={options.kept}: covers --contexts={min(contexts)}, so nothing would be skipped")
    for name in options.engine.split(","):
        if name not in ENGINES:
            raise ValueError(f"--engine={name}: is not one of {', '.join(ENGINES)}")


def _load(
    options: argparse.Namespace, names: Sequence[str], device: torch.device, dtype: torch.dtype
) -> tuple[Any, dict[str, Step], Any, str]:
    """The library's model, a step for every engine, the tokenizer, and what the model is called."""
    folder = "" if options.arch else str(loading.smollm2_folder())

    def model() -> Any:
        if options.arch:
            config = loading.shape_config(options.arch, options.layers)
            if options.positions is not None:
                config.max_position_embeddings = options.positions
            return loading.random_model(config, dtype, device, seed=0)
        if options.carved:
            return healing.load_carved(None, 8, dtype, device, folder)
        return loading.load_model(folder, dtype, device)

    library = None if options.arch or options.carved else model()
    weights = adapt(model(), packed=True, channels=True)
    steps = {name: make_step(weights, engine=name) for name in dict.fromkeys((REFERENCE, *names))}
    if not options.arch:
        name = "SmolLM2-135M-Instruct" + (", carved into experts" if options.carved else "")
        return library, steps, loading.load_tokenizer(folder), name
    whole = loading.shape_config(options.arch, None).num_hidden_layers
    name = options.arch if options.layers is None else f"{options.arch}, {options.layers} of {whole} layers"
    return library, steps, ByteTokenizer(), name


def _check_memory(weights: ModelWeights, positions: int, device: torch.device, arch: str) -> None:
    """Refuse caches that do not fit beside the weights, which are loaded."""
    needed = weights.shape.kv_bytes_per_token * positions
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    if needed > _MEMORY_SHARE * free:
        raise ValueError(
            f"--contexts, --batches: caches of {needed / 1e9:.1f} GB for {arch} do not fit into {free / 1e9:.1f} GB of "
            "free memory (valid: shorter, fewer, or --layers with --arch)"
        )


def _axes(options: argparse.Namespace, weights: ModelWeights, budget: AttentionBudget) -> dict[str, Sparsity]:
    """Dense and sparse steps; every axis that the model has, alone and together."""
    shape = weights.shape
    reuse = ReuseBudget(anchors=tuple(range(0, shape.layers, options.anchors)))
    axes = {"dense": Sparsity(), "sparse": Sparsity(budget)}
    if shape.layers > options.anchors:
        axes["anchors"] = Sparsity(budget, reuse=reuse)
    if shape.experts:
        if options.union >= shape.experts:
            raise ValueError(f"--union={options.union}: a layer has {shape.experts} routed experts (valid: below that)")
        axes["experts"] = Sparsity(moe=MoeBudget(union=options.union))
        axes["hybrid"] = Sparsity(budget, moe=MoeBudget(union=options.union))
    else:
        axes["ffn"] = Sparsity(ffn=FfnBudget(rule="topk", keep=options.ffn_keep))
        axes["hybrid"] = Sparsity(budget, FfnBudget(rule="topk", keep=options.ffn_keep))
    wanted = options.arms.split(",")
    if unknown := [name for name in wanted if name not in ("all", *axes)]:
        raise ValueError(f"--arms={unknown[0]}: is not one of all, {', '.join(axes)}")
    return axes if "all" in wanted else {name: axes[name] for name in axes if name in wanted}


def prompt_tokens(tokenizer: Any, tokens: int, vocab: int | None = None) -> list[int]:
    """Synthetic prose of exactly ``tokens`` tokens; random tokens for random weights, so that experts are spread.

    Args:
        tokenizer: of the model.
        tokens: wanted.
        vocab: of the model; needed for random weights only.
    """
    if vocab is not None and isinstance(tokenizer, ByteTokenizer):
        drawn: list[int] = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
        return drawn
    settings = TaskSettings("bundled", (), 0, "plain", 0, (), 0, None, {"context_tokens": 2 * tokens, "depth": None})
    task = tasks.make("needle", settings)
    ids: list[int] = tokenizer.encode(task.prompt(next(iter(task.examples()))).document)
    return (ids * -(-tokens // len(ids)))[:tokens]


def cells(setting: Setting) -> Iterator[tuple[int, int, dict[str, KVCache]]]:
    """(context, batch, caches by engine) of every combination; the caches hold exactly the context in every row."""
    source = prefilled(setting)
    for batch in setting.batches:
        lengths = [max(setting.contexts)] * batch
        caches = {name: filled(setting, name, lengths, source) for name in setting.steps}
        for context in reversed(setting.contexts):
            for cache in caches.values():
                for row in range(batch):
                    cache.truncate(row, context)
            yield context, batch, caches


def prefilled(setting: Setting) -> KVCache:
    """One row with the longest context; random weights get random keys and values, their prefill would say nothing."""
    step, longest, weights = setting.steps[REFERENCE], max(setting.contexts), setting.weights
    cache = step.new_cache(longest, setting.budget)
    if not setting.random:
        step.prefill(torch.tensor(setting.tokens[:longest], device=weights.device), cache, _CHUNK)
        return cache
    for layer in range(weights.shape.layers):
        size = (2, longest, weights.shape.kv_heads, weights.shape.head_dim)
        keys, values = torch.randn(size, device=weights.device).to(weights.dtype)
        cache.write(layer, 0, 0, keys, values)
    cache.advance(0, longest)
    return cache


def filled(setting: Setting, engine: str, lengths: Sequence[int], source: KVCache) -> KVCache:
    """A cache with one row for each length, with room for a step.

    Args:
        setting: the model.
        engine: whose step makes the cache.
        lengths: positions of each row.
        source: what the rows begin with.
    """
    room = len(setting.tokens) - max(setting.contexts)
    cache = setting.steps[engine].new_cache(max(lengths) + room, setting.budget, len(lengths))
    for row, length in enumerate(lengths):
        for layer in range(setting.weights.shape.layers):
            keys, values = (part.transpose(0, 1) for part in source.prefix(layer, 0, length))
            cache.write(layer, row, 0, keys, values)
        cache.advance(row, length)
        cache.refresh_summaries(row)
    return cache
