"""The command line of scripts.tune."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, get_args

from harness.fields import ConfigError
from scripts.tuning import space
from scripts.tuning.measure import Loss, Speed
from scripts.tuning.search import SAMPLERS, Effort

_SECONDS = {"s": 1, "m": 60, "h": 3600}
_OWN = {
    "task.limit": "--examples says how many are tuned on",
    "results_dir": "--results names the folder",
    "rerun": "a study goes on where it was; choose another --study",
}
_EPILOG = "The words are those of run.py: groups and keys that are set there are fixed and leave the space."


@dataclass(frozen=True, slots=True)
class Options:
    """What was typed, checked.

    Attributes:
        words: of the command line of run.py.
        limit: largest loss, None = that of the configuration as it was typed.
        validate: held-back examples, 0 = none.
        study: name, "" = after task, model and loss.
        out: folder of the experiment file.
    """

    words: tuple[str, ...]
    effort: Effort
    limit: float | None
    speed: Speed
    loss: Loss
    space: Path
    examples: int
    validate: int
    study: str
    results: Path
    out: Path
    dry_run: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists the options")


def read(argv: Sequence[str] | None, description: str, out: Path) -> Options:
    """The options; raises ConfigError, one line, for bad input."""
    given = _parser(description, out).parse_intermixed_args(argv)
    for name, least in (("trials", 1), ("examples", 2), ("validate", 0)):
        if getattr(given, name) < least:
            raise ConfigError(f"--{name}={getattr(given, name)}: must be {least} or more")
    if given.validate == 1:
        raise ConfigError("--validate=1: an interval needs at least 2 examples; 0 leaves validation out")
    if given.max_loss is not None and not given.max_loss >= 0:
        raise ConfigError(f"--max-loss={given.max_loss}: must be 0 or more, inf for no limit")
    if given.study and not re.fullmatch(r"[\w-][\w.-]*", given.study):
        raise ConfigError(f"--study={given.study}: must be a file name of letters, digits, _, - and .")
    for key in space.fixed_keys(given.words):
        if key in _OWN or key.split(".")[0] == "hydra":
            raise ConfigError(f"{key}: cannot be set here; {_OWN.get(key, 'leave it out')}")
    return Options(
        words=tuple(given.words),
        effort=Effort(given.trials, _seconds(given.budget), given.sampler, given.seed),
        limit=given.max_loss,
        speed=given.speed,
        loss=given.loss,
        space=given.space,
        examples=given.examples,
        validate=given.validate,
        study=given.study,
        results=given.results,
        out=given.out,
        dry_run=given.dry_run,
    )


def _parser(description: str, out: Path) -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m scripts.tune", description=description, epilog=_EPILOG)
    add = parser.add_argument
    add(
        "words",
        nargs="*",
        metavar="key=value",
        help="what is tuned, as run.py takes it: task=squad_long attn=block_topk",
    )
    add("--trials", type=int, default=40, help="settings that are measured or stopped early (default %(default)s)")
    add("--budget", default="", help="time for trials, as 90s, 30m or 2h, looked at between them (default: no limit)")
    add(
        "--max-loss", type=float, default=None, help="largest loss of the chosen setting (default: that of the default)"
    )
    add("--loss", choices=get_args(Loss), default="kl", help="what is kept small (default %(default)s)")
    add(
        "--speed",
        choices=get_args(Speed),
        default="ar",
        help="the arm that sparse is compared with (default %(default)s)",
    )
    add("--space", type=Path, default=space.DEFAULT, help="YAML file of what is varied (default: that of dense models)")
    add("--sampler", choices=SAMPLERS, default="tpe", help="who proposes settings (default %(default)s)")
    add("--seed", type=int, default=0, help="of the sampler (default %(default)s)")
    add("--examples", type=int, default=8, help="examples to tune on (default %(default)s)")
    add("--validate", type=int, default=12, help="examples held back for validation, 0 = none (default %(default)s)")
    add("--study", default="", help="name to store it under; the same name goes on (default <task>_<model>_<loss>)")
    add("--results", type=Path, default=Path("results"), help="folder of runs/ and tune/ (default %(default)s)")
    add("--out", type=Path, default=out, help="folder of the experiment file (default conf/experiment)")
    add("--dry-run", action="store_true", help="print the space and one sample, run nothing")
    return parser


def _seconds(text: str) -> float | None:
    """Seconds of a time such as 90s, 30m or 2h; None for no text."""
    if not text:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    seconds = float(found[1]) * _SECONDS[found[2]] if found else math.nan
    if not seconds > 0:
        raise ConfigError(f"--budget={text}: must be a time such as 90s, 30m or 2h")
    return seconds
