"""Our arms against what a user would pick instead, decoding the same prompts in one process, arms alternating."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from harness import build, drafters, models, roofline, schema
from harness.engine.decoding import Decoded, Decoder, Prefix, StopRule
from harness.engine.drafting.base import Drafter, NoDrafter
from harness.engine.model import loading
from harness.engine.model.engines import make_step
from harness.engine.model.families import adapt
from harness.timing import make_clock
from scripts.bench import checks, records
from scripts.bench.measure import Clock, Spread, Times, ratio
from scripts.bench.rivals import Rival, installed
from sparse.budget import Sparsity

DRAFTS = ("lookup", "suffix", "eagle3", "joined")
_CONF = records.ROOT / "conf"
_PAUSE = 0.05
"""Seconds between arms, so that worker threads of the one before have gone to sleep."""


@dataclass(frozen=True, slots=True)
class Ours:
    """Our loop with one drafter and budget.

    Attributes:
        name: as tables show it.
        decoder, drafter, sparsity: what runs.
    """

    name: str
    decoder: Decoder
    drafter: Drafter
    sparsity: Sparsity

    def decode(self, prefix: Prefix, tokens: int) -> Decoded:
        """``tokens`` tokens after the prefix and its first token."""
        return self.decoder.decode(prefix, self.drafter, self.sparsity, tokens + 1)


@dataclass(slots=True)
class Decodes:
    """What one arm did with one prompt.

    Attributes:
        seconds: of each round, the warm-up first.
        output: token ids of the last round, after the first one, which all arms share.
        first: that token.
        steps: of the last round; 0 where the arm does not tell.
    """

    seconds: list[float] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    first: int = 0
    steps: int = 0

    def add(self, seconds: float, output: list[int], steps: int) -> None:
        """One more round."""
        self.seconds.append(seconds)
        self.output, self.steps = output, steps


def run(options: argparse.Namespace, screen: Console) -> dict[str, Any]:
    """Decode every prompt with every arm, check, and print tokens per second after the prefill.

    Returns:
        What the last line tells.

    Raises:
        checks.Red: our loops leave the library's on the same weights.
        ValueError, harness.fields.ConfigError, tasks.base.TaskError: bad input, one line.
    """
    if options.arch or options.carved:
        raise ValueError("--peers: compares on SmolLM2, whose file all peers read (leave --arch and --carved out)")
    engines = tuple(dict.fromkeys(options.engine.split(",")))
    config = configuration(options)
    plan = build.plan(config)
    prompts, tokens = [list(item.ids) for item in plan.prepared], options.tokens
    library = loading.load_model(str(loading.smollm2_folder()), plan.dtype, plan.device)
    arms = [arm for engine in engines for arm in _ours(plan, engine, len(engines) > 1)]
    rivals, missing = installed(library, lookup=6, context=plan.capacity + 64, threads=plan.threads)
    device = roofline.device_text(plan.device, plan.threads)
    screen.print(
        f"model        {config.model.name}, {str(plan.dtype).removeprefix('torch.')}; llama.cpp: its GGUF file"
    )
    screen.print(f"device       {device}, torch {torch.__version__}, sources {records.revision(records.ROOT)}")
    screen.print(f"prompts      {len(prompts)} of {min(map(len, prompts))} to {max(map(len, prompts))} tokens")
    screen.print(f"arms         {options.draft} drafts; sparse keeps {options.kept} positions per KV head")
    clock = make_clock(plan.device.type)
    try:
        found = [_prompt(prompt, arms, rivals, tokens, options.repeats, clock) for prompt in prompts]
    finally:
        for rival in rivals:
            rival.close()
    times: Times = {name: [one for part in found for one in part[name].seconds[1:]] for name in found[0]}
    outputs = {name: [part[name].output for part in found] for name in times}
    steps = {name: sum(part[name].steps for part in found) for name in times}
    equal = {name: _equal(own, outputs["transformers"]) for name, own in outputs.items()}
    red = [
        problem
        for arm in arms
        if arm.sparsity == Sparsity()
        for prompt, part in zip(prompts, found, strict=True)
        for problem in checks.check_output(library, [*prompt, part[arm.name].first], part[arm.name].output, arm.name)
    ]
    if red:
        raise checks.Red(red)
    told = _table(times, outputs, steps, equal, tokens, screen)
    for name, why in missing.items():
        screen.print(f"{name}: {why}")
    return {"peers": told, "missing": missing, "device": device, "draft": options.draft, "tokens": tokens}


def configuration(options: argparse.Namespace) -> schema.Config:
    """The run that our arms would be, from the same files that run.py composes.

    Raises:
        harness.fields.ConfigError: an option is out of range.
        ValueError: a file of prompts that is not there.
    """
    top = _yaml(_CONF / "config.yaml")
    groups: dict[str, str] = {}
    for line in top.pop("defaults"):
        if isinstance(line, dict):
            groups |= {key: value for key, value in line.items() if key in schema.GROUPS}
    top.pop("hydra")
    groups |= {"task": "needle", "draft": "combined" if options.draft == "joined" else options.draft, "track": "none"}
    changes: dict[str, dict[str, Any]] = {
        "task": {"limit": options.prompts, "max_new_tokens": options.tokens + 1},
        "model": {"dtype": options.dtype, "device": options.device},
        "attn": {"topk": options.kept // options.block_size, "block_size": options.block_size},
        "draft": _yaml(_CONF / "experiment" / "joined_fast.yaml")["draft"] if options.draft == "joined" else {},
    }
    if options.data_file is not None:
        if not options.data_file.is_file():
            raise ValueError(f"--data-file={options.data_file}: there is no such file")
        groups["task"] = "squad_long"
        changes["task"] |= {"source": "files", "data_files": [str(options.data_file)]}
    elif options.contexts is not None:
        context = int(options.contexts.split(",")[-1])
        changes["task"] |= {"context_tokens": context, "max_prompt_tokens": context}
    raw = {**top, **{group: _yaml(_CONF / group / f"{choice}.yaml") for group, choice in groups.items()}}
    for group, values in changes.items():
        raw[group] = _merged(raw[group], values)
    return schema.resolve({**raw, "arms": ["ar", "dense", "sparse"], "analysis": "none"})


def _yaml(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return found


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, key by key."""
    found = dict(below)
    for key, value in above.items():
        nested = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = _merged(found[key], value) if nested else value
    return found


def _ours(plan: build.Plan, engine: str, named: bool) -> Iterator[Ours]:
    """ar, dense and sparse on one engine; the end of a text does not end their answers."""
    config = plan.config
    library = models.library_model(config.model, plan.model_config, plan.dtype, plan.device, config.seed)
    taps = drafters.taps(config, plan.shape)
    step = make_step(adapt(library, packed=True), taps, engine=engine)
    capacity, more = plan.capacity + drafters.room(config), drafters.cache_budgets(config)
    cache, clock = step.new_cache(capacity, plan.budgets["sparse"].attention, 1, *more), make_clock(plan.device.type)
    decoder = Decoder(step, cache, stop=StopRule(), clock=clock, prefill_chunk=config.engine.prefill_chunk)
    drafting = drafters.Drafting(config, step, cache, plan.capacity, clock)
    drafters.load(config, drafting, plan.dtype, plan.device)
    for arm in config.arms:
        drafter = NoDrafter() if arm == "ar" else drafting.of_arm(plan.budgets[arm])[0]
        yield Ours(f"{arm} {engine}" if named else arm, decoder, drafter, plan.budgets[arm])


def _prompt(
    prompt: list[int], arms: list[Ours], rivals: list[Rival], tokens: int, repeats: int, clock: Clock
) -> dict[str, Decodes]:
    """What every arm did with one prompt; all go on from the same first token, and the first round warms up."""
    prefixes: dict[str, Prefix] = {}
    for arm in arms:
        known = [prefixes[other.name] for other in arms if other.decoder is arm.decoder and other.name in prefixes]
        prefixes[arm.name] = known[0] if known else arm.decoder.prefill(prompt)
    first = prefixes[arms[0].name].first
    for rival in rivals:
        rival.prefill(prompt, first)
    found = {name: Decodes() for name in (*prefixes, *(rival.name for rival in rivals))}

    def ours(arm: Ours) -> None:
        decoded = arm.decode(replace(prefixes[arm.name], first=first), tokens)
        found[arm.name].add(decoded.seconds, decoded.output[1:], len(decoded.step_seconds))
        found[arm.name].first = first

    def theirs(rival: Rival) -> None:
        rival.ready()
        start = clock()
        output = rival.decode(tokens)
        found[rival.name].add(clock() - start, output, 0)

    calls = [*(partial(ours, arm) for arm in arms), *(partial(theirs, rival) for rival in rivals)]
    for turn in range(1 + repeats):
        for call in calls if turn % 2 == 0 else calls[::-1]:
            time.sleep(_PAUSE)
            call()
    return found


def _equal(own: list[list[int]], other: list[list[int]]) -> float:
    """Share of tokens up to where two outputs first differ."""
    same = total = 0
    for one, two in zip(own, other, strict=True):
        total += len(one)
        same += next((at for at, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), len(one))
    return same / total


def _table(
    times: Times,
    outputs: dict[str, list[list[int]]],
    steps: dict[str, int],
    equal: dict[str, float],
    tokens: int,
    screen: Console,
) -> dict[str, Any]:
    """Rates of all arms, and ratios of ours over ours of the same engine and over the rivals."""
    table = Table(title="tokens per second after the prefill [p10, p90 over rounds]", title_justify="left")
    for column in ("arm", "tokens/s", "tokens a step", "equal tokens"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    told: dict[str, Any] = {}
    for name, seconds in times.items():
        rate = Spread.of([tokens / one for one in seconds])
        length = sum(len(output) for output in outputs[name]) / steps[name] if steps[name] else None
        table.add_row(name, rate.text(1), "" if length is None else f"{length:.2f}", f"{equal[name]:.0%}")
        told[name] = {
            "tokens_s": round(rate.median, 2),
            "equal": round(equal[name], 4),
            "tokens_a_step": None if length is None else round(length, 3),
        }
    screen.print(table)
    screen.print("equal tokens: up to the first that is not the library's; llama.cpp computes with quantised weights")
    ours = [name for name in times if steps[name]]
    for name in ours:
        for base in times:
            engine = name.partition(" ")[2]
            if base not in ours or (base in ours[: ours.index(name)] and base.partition(" ")[2] == engine):
                spread = ratio(times, base, name)
                screen.print(f"{name} / {base}: {spread.text()}")
                told[name][f"/ {base}"] = [round(one, 3) for one in (spread.median, spread.p10, spread.p90)]
    return told
