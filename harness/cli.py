"""The command line's edges: one clear line and an exit code for every failure, and comments in `--cfg job`.

Exit codes: 0 done, 1 a run failed or is invalid, 2 bad input, 130 interrupted. Knows neither Hydra nor torch.
"""

import contextlib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import yaml

from harness import manual, sweeping
from harness.evidence import RunLocked, StoreError
from harness.schema import GROUPS, Config, ConfigError, explain_unknown, resolve
from tasks.base import TaskError

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
COMPOSERS = ("hydra", "omegaconf")


class Reported(Exception):
    """A failure that was printed already; raised in a sweep so that the launcher goes on with the other members."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def entry(main: Callable[[], Any], argv: Sequence[str]) -> NoReturn:
    """Runs the decorated main function under the exit codes of this module; answers --help and --cfg readably."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    shown, code = io.StringIO(), 0
    try:
        if {"-h", "--help"} & set(argv):
            print(manual.help_text())
        elif any(word in ("-c", "--cfg") or word.startswith("--cfg=") for word in argv):
            with guard(), contextlib.redirect_stdout(shown):
                main()
        else:
            with guard():
                main()
    except Reported as failure:
        code = failure.code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on at the first missing example", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    finally:
        sys.stdout.write(annotate(shown.getvalue()))
    with guard():
        code = sweeping.finish(code)
    raise SystemExit(code)


@contextlib.contextmanager
def guard(number: int | None = None, overrides: Sequence[str] = ()) -> Iterator[None]:
    """Turns a known failure inside into one line on stderr and its exit code; a bug keeps its traceback.

    number, overrides: of a sweep's member, its number from 0. A member that another process works on is left to it.
    Raises SystemExit, or Reported inside a member.
    """
    try:
        sweeping.enter()
        yield
    except Exception as error:
        if number is not None and isinstance(error, RunLocked):
            print(f"[{' '.join(overrides)}] is running in another process and left to it", file=sys.stderr)
            return
        code = exit_code(error)
        if code is None or isinstance(error, Reported):
            raise
        line = one_line(error)
        if number is None:
            print(line, file=sys.stderr)
            raise SystemExit(code) from None
        print(f"[{' '.join(overrides)}] {line}", file=sys.stderr)
        sweeping.failed(number, line, code)
        raise Reported(code) from None


def run(config: Config, number: int | None) -> float | None:
    """The objective of one run; `number` is that of a sweep's member, from 0. Imports torch."""
    objective: float | None = import_module("harness.runner").run(config, sweeping.arrive(config, number))
    return objective


def checked(raw: Any) -> Config:
    """The configuration of a composed mapping, with a results folder that can be written; raises ConfigError."""
    config = resolve(raw)
    folder = Path(config.results_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        problem = "" if os.access(folder, os.W_OK) else "permission denied"
    except OSError as error:
        problem = str(error.strerror).lower()
    if problem:
        raise ConfigError(f"results_dir={config.results_dir}: cannot be written ({problem}); choose another folder")
    return config


def exit_code(error: Exception) -> int | None:
    """The exit code that a failure stands for, None for a bug."""
    runner = sys.modules.get("harness.runner")
    if runner is not None and isinstance(error, runner.RunFailed):
        return FAILED
    if isinstance(error, Reported):
        return error.code
    known = ConfigError | TaskError | StoreError | yaml.YAMLError
    return BAD_INPUT if isinstance(error, known) or _composing(error) else None


def one_line(error: Exception) -> str:
    """What is wrong, on one line; errors of the composer name the key, the value and the valid choices."""
    text = str(error)
    override, missing = getattr(error, "override", None), getattr(error, "missing_cfg_file", None)
    options = getattr(error, "options", None)
    if override is not None:
        return f"{override}: cannot be read as key=value; quote texts with special characters, as in key='\"a=b\"'"
    if missing is not None and options:
        group, _, choice = str(missing).rpartition("/")
        return f"{group}={choice}: choose one of {', '.join(sorted(options))}"
    if several := re.search(r"Ambiguous value for argument '([^']*)'", text):
        return f"{several[1]}: several values are a sweep; add -m, or write a list as key=[a,b]"
    if unknown := re.search(r"Could not override '([^']*)'", text):
        if "defaults list" in text:
            return f"{unknown[1]} is not a group: choose one of {', '.join([*GROUPS, 'experiment'])}"
        return explain_unknown(unknown[1])
    if "Config group override must be" in text:
        return "a group cannot be null: choose one of its files, as in attn=dense (--help lists them)"
    return " ".join(text.split())


def annotate(text: str) -> str:
    """The YAML of a composed configuration with the comment of each key beside it; other text as it is."""
    header = re.match(r"# @package ([\w.]+)\n", text)
    content = yaml.safe_load(text)
    if not isinstance(content, Mapping):
        return text
    lines = manual.yaml_lines(content, header[1] if header else "")
    return (header[0] if header else "") + "\n".join(lines) + "\n"


def _composing(error: Exception) -> bool:
    """Whether the composer itself raised: all that it works on comes from the command line and conf/."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").split(".")[0] in COMPOSERS
