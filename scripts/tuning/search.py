"""The loop that asks a study for settings, runs them and tells it how they ended."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import Trial, TrialState

from harness.fields import ConfigError
from scripts.tuning import space as spaces
from scripts.tuning import study as stored
from scripts.tuning.front import pareto
from scripts.tuning.measure import Table
from scripts.tuning.pruning import Bar
from scripts.tuning.space import Space, Value, Values
from scripts.tuning.trials import COUNTED, Bench, Outcome

SAMPLERS = ("tpe", "nsga2", "random")
PATIENCE = 30
"""Trials in a row that cost nothing (repeated or impossible) after which the space counts as exhausted."""

_POPULATION = 12
"""Of NSGA-II; its usual 50 would make a study of 40 trials a random search."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to search: trials that cost time, and their seconds, of all calls together; None = no limit."""

    trials: int
    budget: float | None
    sampler: str
    seed: int


@dataclass(frozen=True, slots=True)
class Trying:
    """What is told after a trial: its number, how it ended, what was sampled, and how many trials cost time so far."""

    number: int
    outcome: Outcome
    values: Mapping[str, Value]
    costly: int


@dataclass(slots=True)
class Search:
    """A study, what it varies and where its trials run.

    Attributes:
        base: values of the configuration as it was typed, the first trial.
        limit: largest loss that may be chosen, None = that of the first trial.
    """

    study: optuna.Study
    space: Space
    base: Values
    bench: Bench
    limit: float | None
    _tables: dict[str, Table] = field(default_factory=dict)

    def run(self, effort: Effort, say: Callable[[Trying], None]) -> str:
        """Try settings until one of the limits is reached, and return which one, in words.

        What a trial is proposed depends on the seed and on the trials before it alone, so a killed study goes on as if
        it had not been.

        Raises:
            ConfigError: the first trial cannot be measured.
        """
        if not stored.has_default(self.study):
            self.study.enqueue_trial(dict(self.space.within(self.base)), user_attrs={"default": True})
        idle = 0
        while True:
            found = stored.outcomes(self.study)
            costly = [one for one in found.values() if one.state in COUNTED]
            if len(costly) >= effort.trials:
                return f"{effort.trials} trials"
            if effort.budget is not None and sum(one.seconds for one in costly) >= effort.budget:
                return f"the budget, after {len(costly)} trials"
            if idle >= PATIENCE:
                return f"{idle} proposals in a row that were known or impossible, after {len(costly)} trials"
            self.study.sampler = _sampler(effort, len(found), idle)
            number, outcome, values = self._try()
            idle = 0 if outcome.state in COUNTED else idle + 1
            say(Trying(number, outcome, values, len(costly) + (outcome.state in COUNTED)))

    def tables(self) -> dict[int, Table]:
        """Number -> what each whole trial measured."""
        found = stored.outcomes(self.study)
        return {number: self._table(one.fingerprint) for number, one in found.items() if one.state == "measured"}

    def front(self) -> list[int]:
        """The Pareto front of the whole trials, fastest first."""
        points = {
            number: (one.speed.value, one.loss.value)
            for number, one in stored.outcomes(self.study).items()
            if one.state == "measured" and one.speed is not None and one.loss is not None
        }
        return pareto(points)

    def _try(self) -> tuple[int, Outcome, dict[str, Value]]:
        """Ask for one setting, run it and tell how it ended."""
        trial = self.study.ask()
        first = bool(trial.user_attrs.get("default"))
        values: dict[str, Value] = {}
        if first:
            self.space.repeat(trial, self.base)
        else:
            values = self.space.sample(trial, self.base)
        trial.set_user_attr("values", values)
        found = stored.outcomes(self.study)
        known = {one.fingerprint: number for number, one in found.items() if one.state in COUNTED}
        outcome = self.bench.attempt(spaces.overrides(values, self.base), self._bar(found), known)
        if first and outcome.state != "measured":
            raise ConfigError(f"the configuration to start from is {outcome.state}: {outcome.reason}")
        self._tell(trial, outcome, found)
        return trial.number, outcome, values

    def _bar(self, found: Mapping[int, Outcome]) -> Bar | None:
        """What the next trial is held against; nothing before there is a first one."""
        default = stored.default_number(self.study)
        if default is None:
            return None
        rivals = {number: self._table(found[number].fingerprint) for number in self.front()}
        return Bar(rivals, self._table(found[default].fingerprint), self.limit)

    def _table(self, name: str) -> Table:
        """What a whole run measured, read once."""
        if name not in self._tables:
            self._tables[name] = self.bench.table(name)
        return self._tables[name]

    def _tell(self, trial: Trial, outcome: Outcome, found: Mapping[int, Outcome]) -> None:
        """Store the outcome; a repeated trial ends as the one that it repeats, for the sampler to learn from."""
        trial.set_user_attr("outcome", outcome.plain())
        seen = found[int(outcome.reason)] if outcome.state == "repeated" else outcome
        most = self._most(found)
        if seen.loss is not None and most is not None:
            trial.set_constraint("loss", seen.loss.value - most)
        if seen.state in ("impossible", "failed"):
            trial.set_constraint("possible", 1.0)
        if seen.state == "measured" and seen.speed is not None and seen.loss is not None:
            self.study.tell(trial, [seen.speed.value, seen.loss.value])
        else:
            self.study.tell(trial, state=TrialState.PRUNED)

    def _most(self, found: Mapping[int, Outcome]) -> float | None:
        """The loss above which the sampler need not look; None where there is no such limit (yet)."""
        if self.limit is not None:
            return self.limit if math.isfinite(self.limit) else None
        default = stored.default_number(self.study)
        loss = None if default is None else found[default].loss
        return None if loss is None else loss.value


def _sampler(effort: Effort, ended: int, idle: int) -> BaseSampler:
    """A sampler whose chance depends on the seed and the count of ended trials; random after many useless proposals."""
    seed = random.Random(f"{effort.seed}/{ended}").getrandbits(31)
    if effort.sampler == "random" or idle > PATIENCE // 3:
        return RandomSampler(seed=seed)
    return TPESampler(seed=seed) if effort.sampler == "tpe" else NSGAIISampler(seed=seed, population_size=_POPULATION)
