"""What a study varies: a YAML file of configuration keys, and its sampling by Optuna.

Each line is `key: {choices: [...]}` or `key: {low: .., high: .., log: true, step: ..}`, with `when: {other: value}`
where the key counts only if an earlier key has that value, or one of a list of them. A key is a group (`reuse`) or a
dotted key of the groups TUNABLE. `attn.kept_tokens` stands for attn.topk times attn.block_size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from harness.fields import ConfigError, show
from harness.schema import DOCS, GROUPS, explain_unknown

DEFAULT = Path(__file__).with_name("dense.yaml")
TUNABLE = ("draft", "attn", "ffn", "moe", "reuse")
"""Groups that leave the autoregressive baseline, the data and the model as they are, so that trials can be compared."""

KEPT, TOPK, BLOCK = "attn.kept_tokens", "attn.topk", "attn.block_size"
_FIELDS = ("choices", "low", "high", "log", "step", "when")

Value = bool | int | float | str | None
Values = Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Dimension:
    """One key: its distribution, and the (key, values) of which each must hold for it to count."""

    key: str
    distribution: BaseDistribution
    when: tuple[tuple[str, tuple[Value, ...]], ...] = ()

    def suggest(self, trial: Trial) -> Value:
        """The trial's value of this key."""
        drawn = self.distribution
        if isinstance(drawn, CategoricalDistribution):
            return trial.suggest_categorical(self.key, drawn.choices)
        if isinstance(drawn, IntDistribution):
            return trial.suggest_int(self.key, drawn.low, drawn.high, step=drawn.step, log=drawn.log)
        assert isinstance(drawn, FloatDistribution)
        return round(trial.suggest_float(self.key, drawn.low, drawn.high, step=drawn.step, log=drawn.log), 6)

    def holds(self, value: Value) -> bool:
        """Whether the distribution can yield the value."""
        drawn = self.distribution
        if isinstance(drawn, CategoricalDistribution):
            return any(value == choice and type(value) is type(choice) for choice in drawn.choices)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and bool(drawn._contains(drawn.to_internal_repr(value)))

    def text(self) -> str:
        """The range or the choices, and the condition, in words."""
        drawn = self.distribution
        if isinstance(drawn, CategoricalDistribution):
            words = ", ".join(show(choice) for choice in drawn.choices)
        else:
            assert isinstance(drawn, IntDistribution | FloatDistribution)
            step = f", step {drawn.step:g}" if drawn.step is not None and drawn.step != 1 else ""
            words = f"{drawn.low:g} to {drawn.high:g}{', log' if drawn.log else ''}{step}"
        conditions = [f"{key}={'|'.join(show(value) for value in values)}" for key, values in self.when]
        return words + (f"  if {' and '.join(conditions)}" if conditions else "")


@dataclass(frozen=True, slots=True)
class Space:
    """The dimensions in the order of the file, a condition's key before those that it governs."""

    dimensions: tuple[Dimension, ...]

    @property
    def identity(self) -> str:
        """A hash of everything that is sampled."""
        told = [[one.key, repr(one.distribution), one.when] for one in self.dimensions]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    @property
    def keys(self) -> tuple[str, ...]:
        """What is varied."""
        return tuple(one.key for one in self.dimensions)

    def without(self, fixed: Sequence[str]) -> Space:
        """The space without the keys that a command line sets, and without those of a group that it chooses.

        Raises:
            ConfigError: nothing is left to vary.
        """
        kept = tuple(one for one in self.dimensions if not any(_covers(key, one.key) for key in fixed))
        if not kept:
            raise ConfigError("--space: the command line fixes every key of the space; leave one of them out")
        return Space(kept)

    def sample(self, trial: Trial, base: Values) -> dict[str, Value]:
        """Draw the keys that count, in order; `base` are the values of the configuration that is varied."""
        values: dict[str, Value] = {}
        for one in self._active(values, base):
            values[one.key] = one.suggest(trial)
        return values

    def repeat(self, trial: Trial, base: Values) -> None:
        """Tell the trial, which `within(base)` was queued for, that it has these values."""
        known = self.within(base)
        for one in self.dimensions:
            if one.key in known:
                one.suggest(trial)

    def within(self, base: Values) -> dict[str, Value]:
        """The part of a configuration's values that the space can express."""
        values: dict[str, Value] = {}
        for one in self._active(values, base):
            values[one.key] = base.get(one.key)
        held = {one.key for one in self.dimensions if one.holds(values.get(one.key))}
        return {key: value for key, value in values.items() if key in held}

    def _active(self, values: Values, base: Values) -> Iterator[Dimension]:
        """The dimensions whose conditions hold, judged while the caller fills `values`."""
        keys = set(self.keys)
        for one in self.dimensions:
            now = {key: values.get(key) if key in keys else base.get(key) for key, _ in one.when}
            if all(key in values or key not in keys for key, _ in one.when) and all(
                now[key] in wanted for key, wanted in one.when
            ):
                yield one


def load(file: Path) -> Space:
    """The space of a file.

    Raises:
        ConfigError: it cannot be read, or a line is no key of TUNABLE with a valid range; one line.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--space={file.name}: cannot be read ({type(error).__name__}); name a YAML file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--space={file.name}: not YAML ({' '.join(str(error).split())})") from error
    return parse(content)


def parse(content: Any) -> Space:
    """The space of a file's content. Raises ConfigError."""
    if not isinstance(content, Mapping) or not content:
        raise ConfigError("--space: must be a mapping of keys, as in attn.block_size: {choices: [16, 32]}")
    found: list[Dimension] = []
    for key, line in content.items():
        found.append(_dimension(str(key), line, [one.key for one in found]))
    if {KEPT, TOPK} <= set(content):
        raise ConfigError(f"--space: {KEPT} sets {TOPK}; keep one of them")
    return Space(tuple(found))


def overrides(values: Values, base: Values) -> list[str]:
    """The values as words of the command line, groups first; attn.kept_tokens becomes attn.topk."""
    plain = dict(values)
    if KEPT in plain:
        block, kept = plain.get(BLOCK, base.get(BLOCK)), plain.pop(KEPT)
        assert isinstance(block, int) and isinstance(kept, int | float)
        plain[TOPK] = max(round(kept / block), 1)
    ordered = sorted(plain, key=lambda key: key not in GROUPS)
    return [f"{key}={show(plain[key])}" for key in ordered]


def base_values(plain: Mapping[str, Any]) -> dict[str, Value]:
    """Group -> choice and dotted key -> value of a resolved configuration's groups, attn.kept_tokens among them."""
    values: dict[str, Value] = {}
    for group, (discriminator, _) in GROUPS.items():
        values[group] = plain[group][discriminator]
        values |= _flat(plain[group], group)
    topk, block = values.get(TOPK), values.get(BLOCK)
    if isinstance(topk, int) and isinstance(block, int):
        values[KEPT] = topk * block
    return values


def fixed_keys(words: Sequence[str]) -> list[str]:
    """The keys that words of the command line set."""
    return [word.partition("=")[0].lstrip("+~") for word in words]


def _flat(content: Mapping[str, Any], path: str) -> dict[str, Value]:
    flat: dict[str, Value] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{path}.{name}")
        elif not isinstance(value, list | tuple):
            flat[f"{path}.{name}"] = value
    return flat


def _covers(fixed: str, key: str) -> bool:
    """Whether setting `fixed` leaves nothing to vary in `key`."""
    return key == fixed or key.startswith(f"{fixed}.") or (fixed == TOPK and key == KEPT)


def _dimension(key: str, line: Any, before: Sequence[str]) -> Dimension:
    _check_key(key)
    if not isinstance(line, Mapping):
        raise ConfigError(f"--space: {key}: must be {{choices: [...]}} or {{low: .., high: ..}}")
    if unknown := [name for name in line if name not in _FIELDS]:
        raise ConfigError(f"--space: {key}: {unknown[0]} is unknown; choose from {', '.join(_FIELDS)}")
    if ("choices" in line) == ("low" in line or "high" in line):
        raise ConfigError(f"--space: {key}: give either choices, or low and high")
    drawn = _categorical(key, line) if "choices" in line else _range(key, line)
    return Dimension(key, drawn, _when(key, line.get("when") or {}, before))


def _check_key(key: str) -> None:
    """Refuse a key that does not exist or that would make trials incomparable."""
    if key != KEPT and key not in DOCS and key not in GROUPS:
        raise ConfigError(f"--space: {explain_unknown(key)}")
    if key.split(".")[0] not in TUNABLE or key in [f"{group}.{GROUPS[group][0]}" for group in TUNABLE]:
        raise ConfigError(f"--space: {key} cannot be tuned; choose a group or a key of {', '.join(TUNABLE)}")


def _categorical(key: str, line: Mapping[str, Any]) -> CategoricalDistribution:
    choices = line["choices"]
    plain = isinstance(choices, list) and all(isinstance(item, bool | int | float | str | None) for item in choices)
    if not plain or not choices or "log" in line or "step" in line:
        raise ConfigError(f"--space: {key}: choices must be a list of values, without log or step")
    if key in GROUPS and (wrong := [item for item in choices if item not in GROUPS[key][1]]):
        raise ConfigError(f"--space: {key}={show(wrong[0])}: choose from {', '.join(GROUPS[key][1])}")
    return CategoricalDistribution(choices)


def _range(key: str, line: Mapping[str, Any]) -> IntDistribution | FloatDistribution:
    low, high, log, step = line.get("low"), line.get("high"), line.get("log", False), line.get("step")
    bounds = [value for value in (low, high) if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(bounds) < 2 or bounds[0] > bounds[1] or key in GROUPS:
        raise ConfigError(f"--space: {key}: low={show(low)} and high={show(high)} must be numbers, low first")
    whole = all(isinstance(value, int) for value in bounds)
    stepped = isinstance(step, int if whole else int | float) and not isinstance(step, bool)
    if not isinstance(log, bool) or (step is not None and (not stepped or step <= 0 or log)):
        raise ConfigError(f"--space: {key}: step must be a positive number of the kind of low, and log true or false")
    if log and bounds[0] <= 0:
        raise ConfigError(f"--space: {key}: low={show(low)} must be above 0 with log: true")
    if whole:
        return IntDistribution(int(bounds[0]), int(bounds[1]), log=log, step=step or 1)
    return FloatDistribution(float(bounds[0]), float(bounds[1]), log=log, step=step)


def _when(key: str, given: Any, before: Sequence[str]) -> tuple[tuple[str, tuple[Value, ...]], ...]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"--space: {key}: when must be a mapping, as in when: {{reuse: anchors}}")
    if late := [name for name in given if name not in before]:
        raise ConfigError(f"--space: {key}: when names {late[0]}, which must be a key of an earlier line")
    return tuple((str(name), tuple(value if isinstance(value, list) else [value])) for name, value in given.items())
