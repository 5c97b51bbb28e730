"""Finds settings of sparse verification by search: `python -m scripts.tune task=squad_long --trials 40`.

Trials are ordinary runs, proposed by Optuna, stopped early where they are hopeless, and stored like any other, so the
same command goes on after a crash. Prints the Pareto front of speed-up and loss, writes the fastest setting that keeps
to the largest loss as conf/experiment/tuned_<task>_<model>.yaml, and measures it against the default on examples that
tuning never saw (docs/tuning.md). A JSON line comes last.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.text import Text

from harness import cli, manual, schema
from harness.evidence import fingerprint, provenance
from harness.evidence.store import write_text
from harness.fields import ConfigError
from harness.schema import Config
from scripts.common import ROOT

if TYPE_CHECKING:
    from harness.build import Plan
    from scripts.tuning.options import Options
    from scripts.tuning.search import Search, Trying
    from scripts.tuning.space import Space, Values
    from scripts.tuning.validation import HeldBack

CONF = ROOT / "conf"
EXPERIMENTS = CONF / "experiment"
MANUAL = ROOT / "docs" / "configuration.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Search, choose, validate and write; returns or exits with a code of harness.cli."""
    try:
        with cli.guard():
            if importlib.util.find_spec("optuna") is None:
                raise ConfigError("optuna is not installed; run make, or: pip install 'sparse-verification[tune]'")
            from scripts.tuning import options

            assert __doc__ is not None
            typed = options.read(argv, __doc__.partition("\n")[0], EXPERIMENTS)
            with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
                return _main(typed, ["tune.py", *(sys.argv[1:] if argv is None else argv)])
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        return cli.INTERRUPTED


def composed(words: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """(configuration, file of each group) of words of the command line; raises ConfigError, one line."""
    try:
        found: DictConfig = hydra.compose("config", list(words), return_hydra_config=True)
        choices = {str(group): str(choice) for group, choice in found.hydra.runtime.choices.items()}
        with open_dict(found):
            del found["hydra"]
        raw = OmegaConf.to_container(found, resolve=True)
    except Exception as error:
        if cli.exit_code(error) != cli.BAD_INPUT:
            raise
        raise ConfigError(cli.one_line(error)) from error
    assert isinstance(raw, dict)
    return {str(key): value for key, value in raw.items()}, choices


class Job:
    """What one command line asks for, checked before anything runs."""

    def __init__(self, typed: Options) -> None:
        from harness import build
        from scripts.tuning import space
        from scripts.tuning.measure import Measure

        self.typed = typed
        self.base = self.config(())
        self.space: Space = space.load(typed.space).without(space.fixed_keys(typed.words))
        self.values: Values = space.base_values(schema.to_dict(self.base))
        self._check()
        self.plan: Plan = build.plan(self.base)
        self.measure = Measure(typed.speed, typed.loss, self.plan.task.metrics[0])
        self.held: HeldBack | None = self._held_back() if typed.validate else None

    def words(self, setting: Sequence[str] = ()) -> list[str]:
        """The command line of run.py for a setting, without data and places."""
        given = {word.partition("=")[0] for word in self.typed.words}
        analysis = "none" if self.typed.loss == "quality" else "fidelity"
        own = {"track": "none", "analysis": analysis}
        return [*(f"{key}={value}" for key, value in own.items() if key not in given), *self.typed.words, *setting]

    def config(self, setting: Sequence[str], *, offset: int | None = None, limit: int | None = None) -> Config:
        """The checked configuration of a setting, on the tuning examples unless `offset` and `limit` say others."""
        words = [word for word in self.words(setting) if offset is None or not word.startswith("task.offset=")]
        words += [f"task.limit={limit or self.typed.examples}", f"results_dir={json.dumps(str(self.typed.results))}"]
        words += [] if offset is None else [f"task.offset={offset}"]
        return cli.checked(composed(words)[0])

    @property
    def name(self) -> str:
        """Of the study."""
        parts = (self.base.task.name, self.base.model.name, self.typed.loss)
        return self.typed.study or re.sub(r"[^\w.-]+", "_", "_".join(map(str, parts)))

    def identity(self, plain: Mapping[str, Any]) -> dict[str, str]:
        """What must be equal for trials of one study to be compared."""
        told = {
            "configuration": fingerprint(plain),
            "space": self.space.identity,
            "loss": self.typed.loss,
            "speed": self.typed.speed,
        }
        fresh = self.base.stale == "rerun"
        return told | ({"sources": provenance.sources_hash(ROOT)} if fresh else {})

    def _check(self) -> None:
        typed, base = self.typed, self.base
        missing = [arm for arm in {"dense", "sparse", typed.speed} if arm not in base.arms]
        if missing:
            raise ConfigError(f"arms=[{','.join(base.arms)}]: {sorted(missing)[0]} is needed; leave arms as they are")
        drafted = [key for key in self.space.keys if key.split(".")[0] == "draft"]
        if typed.speed == "dense" and drafted:
            raise ConfigError(
                f"--speed=dense: dense verification depends on {drafted[0]}, which the space varies; use --speed ar, "
                "or set it on the command line"
            )
        if typed.loss != "quality" and base.analysis == "none":
            raise ConfigError(f"analysis=none: --loss={typed.loss} needs analysis=fidelity")

    def _held_back(self) -> HeldBack:
        from harness import build
        from scripts.tuning.validation import held_back

        def ready(offset: int) -> list[Any]:
            plan = build.plan(self.config((), offset=offset, limit=self.typed.validate))
            return [item.example for item in plan.prepared]

        tuned = [item.example for item in self.plan.prepared]
        if len(tuned) < self.typed.examples:
            raise ConfigError(f"--examples={self.typed.examples}: the data has {len(tuned)}; choose less than that")
        start = self.base.task.offset
        return held_back(self.plan.task.examples(), tuned, ready, start, self.typed.validate)


def _main(typed: Options, argv: Sequence[str]) -> int:
    from harness import build, roofline, runner
    from scripts.tuning import study as stored
    from scripts.tuning.search import Search
    from scripts.tuning.trials import Bench

    job = Job(typed)
    screen = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    if typed.dry_run:
        return _dry_run(job, screen)
    device = roofline.device_text(job.plan.device, job.plan.threads)
    bench = Bench(job.config, build.resolved, runner.run, job.measure, typed.examples, typed.results)
    folder = typed.results / "tune"
    with stored.opened(folder / f"{job.name}.log", job.identity(build.resolved(job.base))) as study:
        search = Search(study, job.space, job.values, bench, typed.limit)
        ended = search.run(typed.effort, partial(_say, screen, job))
        document = _document(job, search, device, argv, ended)
        _finish(job, search, document, folder, screen)
    return 0


def _dry_run(job: Job, screen: Console) -> int:
    """Print the space, the trial that comes first and one sample."""
    import optuna

    from scripts.tuning import space

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for one in job.space.dimensions:
        screen.print(Text(f"{one.key}: {one.text()}"))
    within = job.space.within(job.values)
    screen.print(Text("first trial: " + " ".join(f"{key}={value}" for key, value in within.items())))
    study = optuna.create_study(
        directions=["maximize", "minimize"], sampler=optuna.samplers.RandomSampler(seed=job.typed.effort.seed)
    )
    words = space.overrides(job.space.sample(study.ask(), job.values), job.values)
    screen.print(Text(f"a sample: {' '.join(words)}"))
    if job.held is not None:
        screen.print(f"validation: {job.held.examples} examples from task.offset={job.held.offset} on")
    try:
        job.config(words)
    except ConfigError as error:
        screen.print(Text(f"which is impossible and would cost nothing: {error}"))
    return 0


def _say(screen: Console, job: Job, trying: Trying) -> None:
    from scripts.tuning import report

    wanted = job.typed.effort.trials
    screen.print(Text(report.line(trying.number, trying.costly, wanted, trying.outcome, job.values)), soft_wrap=True)


def _document(job: Job, search: Search, device: str, argv: Sequence[str], ended: str) -> dict[str, Any]:
    """Everything about the study, as <study>.json keeps it; no path of this machine."""
    from scripts.tuning import front, report
    from scripts.tuning import study as stored
    from scripts.tuning.measure import LOSSES

    found, default = stored.outcomes(search.study), stored.default_number(search.study)
    assert default is not None
    tables = search.tables()
    choice = front.choose(tables, default, job.typed.limit)
    start = found[default].loss
    assert start is not None
    trials = [
        {"number": number, **one.plain(), "setting": report.differences(one.words, job.values)}
        for number, one in found.items()
    ]
    limit = start.value if job.typed.limit is None else job.typed.limit
    return {
        "version": 1,
        "study": job.name,
        "task": job.base.task.name,
        "model": provenance.scrub(str(job.base.model.name)),
        "device": provenance.scrub(device),
        "speed": job.typed.speed,
        "loss": LOSSES[job.typed.loss],
        "limit": limit if limit < float("inf") else None,
        "limit_is_default": job.typed.limit is None,
        "examples": job.typed.examples,
        "sampler": job.typed.effort.sampler,
        "seed": job.typed.effort.seed,
        "ended": ended,
        "space": {one.key: one.text() for one in job.space.dimensions},
        "configuration": provenance.portable(schema.to_dict(job.base)),
        "argv": provenance.clean_argv(argv),
        "sources": provenance.sources_hash(ROOT),
        "date": provenance.now(),
        "default": default,
        "chosen": {"number": choice.number, "rule": choice.rule, "words": list(found[choice.number].words)},
        "front": search.front(),
        "trials": trials,
        "validation": None,
    }


def _finish(job: Job, search: Search, document: dict[str, Any], folder: Path, screen: Console) -> None:
    """Show the front, validate the choice, write all files and print the last line."""
    from scripts import tables
    from scripts.tuning import report

    screen.print(f"\nended by {document['ended']}")
    screen.print(tables.render(report.front_grid(document)))
    report.write(document, folder)
    if job.held is not None and document["chosen"]["number"] != document["default"]:
        document["validation"] = _validate(job, search, document["chosen"]["words"], job.held, screen)
        screen.print(tables.render(report.validation_grid(document)))
    for note in report.notes(document):
        screen.print(Text(note), soft_wrap=True)
    written = [*report.write(document, folder), _write_experiment(job, document)]
    for file in written:
        screen.print(Text(f"wrote {file}"), soft_wrap=True)
    print(json.dumps(_last_line(document), separators=(",", ":")))


def _validate(job: Job, search: Search, setting: Sequence[str], held: HeldBack, screen: Console) -> dict[str, Any]:
    """Run default and chosen setting on the held-back examples, and compare."""
    from scripts.tuning.trials import Outcome
    from scripts.tuning.validation import judge

    def config(words: Sequence[str]) -> Config:
        return job.config(words, offset=held.offset, limit=held.examples)

    bench = replace(search.bench, compose=config, examples=held.examples)
    sides: list[Outcome] = []
    for name, words in (("default", ()), ("tuned", tuple(setting))):
        screen.print(f"validating: {name}")
        outcome = bench.attempt(words, None, {})
        if outcome.state != "measured":
            raise ConfigError(f"validation of the {name} setting is {outcome.state}: {outcome.reason}")
        sides.append(outcome)
    verdict = judge(bench.table(sides[0].fingerprint), bench.table(sides[1].fingerprint))
    runs = {"default": sides[0].fingerprint, "tuned": sides[1].fingerprint}
    return {"offset": held.offset, "runs": runs, **verdict.plain()}


def _write_experiment(job: Job, document: Mapping[str, Any]) -> Path:
    """conf/experiment/tuned_<task>_<model>.yaml, and the list of experiments in docs/configuration.md."""
    from scripts.tuning import experiment

    name = experiment.name_of(str(job.base.task.name), str(job.base.model.name))
    day = document["date"].partition("T")[0]
    study = f"{document['study']}, {_costly(document)} trials of {document['examples']} examples"
    note = (
        f"{document['task']}, {document['loss']}: {document['chosen']['rule']}.\n"
        f"Made by scripts.tune: study {study}, {day}, "
        f"sources {document['sources']}."
    )
    file = job.typed.out / f"{name}.yaml"
    write_text(file, experiment.text(name, note, job.words(document["chosen"]["words"]), composed))
    if job.typed.out == EXPERIMENTS:
        write_text(MANUAL, manual.markdown())
    return file


def _costly(document: Mapping[str, Any]) -> int:
    """Trials that cost time."""
    from scripts.tuning.trials import COUNTED

    return sum(one["state"] in COUNTED for one in document["trials"])


def _last_line(document: Mapping[str, Any]) -> dict[str, Any]:
    chosen = next(one for one in document["trials"] if one["number"] == document["chosen"]["number"])
    found = document["validation"]
    return {
        "status": "ok",
        "study": document["study"],
        "trials": _costly(document),
        "front": document["front"],
        "chosen": chosen["number"],
        "speedup": round(chosen["speed"]["value"], 4),
        "loss": round(chosen["loss"]["value"], 6),
        "beats": None if found is None else found["beats"],
        "path": f"tune/{document['study']}.json",
    }


if __name__ == "__main__":
    sys.exit(main())
