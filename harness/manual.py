"""The configuration described from its own sources: comments of harness/schema*.py, defaults and choices of conf/.

`python -m harness.manual > docs/configuration.md` brings the written form up to date.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from harness.fields import join
from harness.schema import DOCS, GROUPS

CONF = Path(__file__).resolve().parents[1] / "conf"

USAGE = """\
Speculative decoding with sparse verification: measures autoregressive, dense and sparse verification on real tasks.

  python run.py attn.topk=32 task=squad                one run
  python run.py -m attn.topk=8,16,32 task=xsum,squad   a sweep over every combination
  python run.py experiment=hybrid                      a named experiment: all of the method on a dense model
  python run.py moe=union model=carved_moe attn=dense  one mechanism alone
  python run.py --cfg job attn=dense                   the composed configuration, nothing runs
  python run.py --help                                 this text; --hydra-help for Hydra's own flags

Exit codes: 0 done, 1 a run failed or is invalid, 2 bad input, 130 interrupted (the same command resumes)."""


def help_text() -> str:
    """Every group with its choices (the default marked *) and every key with its default and its comment."""
    defaults = _defaults()
    lines = [USAGE, "", "Groups (group=choice; * is the default)"]
    for group in [*GROUPS, "experiment"]:
        marked = [f"*{choice}" if choice == defaults[group] else choice for choice in _files(group)]
        lines.append(f"  {group}: {', '.join(marked)}")
    lines += ["", "Keys (key=value)"]
    for key, value, choice in every_key():
        only = f" [{choice}]" if choice else ""
        lines.append(f"  {key}={scalar(value)}{only}  # {DOCS[key]}")
    return "\n".join(lines)


def markdown() -> str:
    """docs/configuration.md."""
    defaults = _defaults()
    lines = [
        "# Configuration",
        "",
        "Written by `python -m harness.manual`: comments from `harness/schema*.py`, defaults from `conf/`.",
        "`group=choice` changes a group, `key=value` a key; with `-m`, comma-separated values are a sweep.",
        "",
        "| group | choices (default in bold) |",
        "|---|---|",
    ]
    for group in [*GROUPS, "experiment"]:
        marked = [f"**{choice}**" if choice == defaults[group] else choice for choice in _files(group)]
        lines.append(f"| `{group}` | {', '.join(marked)} |")
    lines += ["", "| key | default | only with | meaning |", "|---|---|---|---|"]
    for key, value, choice in every_key():
        only = f"`{choice}`" if choice else ""
        lines.append(f"| `{key}` | `{scalar(value)}` | {only} | {DOCS[key]} |")
    return "\n".join(lines) + "\n"


def every_key() -> Iterator[tuple[str, Any, str]]:
    """(key, default, the choices that bring it where the default choice does not) of every key."""
    top = _load(CONF / "config.yaml")
    yield from ((key, value, "") for key, value in top.items() if key not in ("defaults", "hydra"))
    defaults = _defaults()
    for group, (discriminator, _) in GROUPS.items():
        found: dict[str, tuple[Any, list[str]]] = {}
        for choice in sorted(_files(group), key=lambda name: name != defaults[group]):
            content = _load(CONF / group / f"{choice}.yaml")
            bringing = "" if choice == defaults[group] else str(content[discriminator])
            for key, value in _flat(content, group):
                choices = found.setdefault(key, (value, []))[1]
                choices += [bringing] if bringing not in choices else []
        for key, (value, choices) in found.items():
            yield key, value, "" if "" in choices else f"{group}={' or '.join(choices)}"


def yaml_lines(content: Mapping[str, Any], path: str = "", indent: int = 0) -> Iterator[str]:
    """The lines of a mapping as YAML, each key with its comment."""
    for name, value in content.items():
        key = join(path, name)
        comment = f"  # {DOCS[key]}" if key in DOCS else ""
        if isinstance(value, Mapping) and value:
            yield f"{' ' * indent}{name}:{comment}"
            yield from yaml_lines(value, key, indent + 2)
        else:
            yield f"{' ' * indent}{name}: {scalar(value)}{comment}"


def scalar(value: Any) -> str:
    """A scalar, list or empty mapping as YAML on one line; texts are quoted only where YAML needs it."""
    if isinstance(value, list):
        return "[" + ", ".join(scalar(item) for item in value) + "]"
    if isinstance(value, str):
        plain = value.isprintable() and not set(value) & set(",[]{}#'\"\\") and ": " not in value
        return value if plain and yaml.safe_load(value) == value else json.dumps(value)
    return json.dumps(value)


def _defaults() -> dict[str, str | None]:
    """group -> the choice that the default list of conf/config.yaml names."""
    return {
        key: choice
        for item in _load(CONF / "config.yaml")["defaults"]
        if item != "_self_"
        for key, choice in item.items()
    }


def _files(group: str) -> list[str]:
    """The choices of a group."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def _load(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content


def _flat(content: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """(key, value) of the leaves of a nested mapping."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, join(path, name))
        else:
            yield join(path, name), value


if __name__ == "__main__":
    print(markdown(), end="")
