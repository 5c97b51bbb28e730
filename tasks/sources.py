"""Rows of a data set: bundled with the project, from files, or from the hub.

Files are read by `datasets` into a cache of their own that is removed after reading, so a changed file is always seen
and nothing is written beside the project. Every problem ends as a TaskError of one line.
"""

import gzip
import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tasks.base import Example, HubSource, TaskError, TaskSettings

DATA = Path(__file__).resolve().parent / "data"
_LOADERS = {".jsonl": "json", ".jsonl.gz": "json", ".json": "json", ".parquet": "parquet"}
_CONNECT_SECONDS = 5.0
_OFFLINE = "without a network use task.source=files task.data_files=[<file>] or task.source=bundled"

Row = Mapping[str, Any]


def read_rows(
    settings: TaskSettings, bundled: str, fields: tuple[str, ...], parse: Callable[[Row], Iterable[Example]]
) -> Iterator[Example]:
    """Yield the examples in the rows of the settings' source.

    Args:
        settings: says which source; `data_files` for files, `hub` for the hub.
        bundled: stem of the bundled file under tasks/data.
        fields: names that each row must have; `a|b` stands for at least one of the two.
        parse: makes examples of one row.

    Raises:
        TaskError: for a missing, empty or malformed file, a missing field, or a hub that cannot be reached.
    """
    for where, rows in _open(settings, bundled, fields):
        number = 0
        for number, row in enumerate(rows, start=1):
            try:
                _check(row, fields)
                yield from parse(row)
            except TaskError as error:
                raise TaskError(f"{where}: row {number}: {error}") from error
        if number == 0:
            raise TaskError(f"{where}: no rows, expected {_listed(fields)} in each")


def _open(settings: TaskSettings, bundled: str, fields: tuple[str, ...]) -> Iterator[tuple[str, Iterator[Row]]]:
    """Name and rows of each part of the source."""
    if settings.source == "bundled":
        yield f"bundled sample {bundled}", read_bundled(bundled)
    elif settings.source == "files":
        if not settings.data_files:
            raise TaskError(
                "task.data_files=[]: task.source=files needs at least one .jsonl, .jsonl.gz or .parquet file"
            )
        for name in settings.data_files:
            yield f"task.data_files={name}", _file_rows(name, fields)
    else:
        if settings.hub is None:
            raise TaskError("task.source=hub: this task has no hub version, choose task.source=files")
        yield f"task.hub.path={settings.hub.path}", _hub_rows(settings.hub)


def read_bundled(stem: str) -> Iterator[Row]:
    """Rows of tasks/data/<stem>.jsonl."""
    with open(DATA / f"{stem}.jsonl", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def text_of(row: Row, key: str) -> str:
    """The field as text without blanks around it; raises TaskError when it is not text."""
    value = row.get(key)
    if not isinstance(value, str):
        raise TaskError(f"field {key!r} is {type(value).__name__}, expected text")
    return value.strip()


def texts_of(row: Row, key: str) -> tuple[str, ...]:
    """The field as several texts; raises TaskError when it is not a list of texts."""
    value = row.get(key)
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise TaskError(f"field {key!r} is {type(value).__name__}, expected a list of texts")
    return tuple(value)


def _check(row: Row, fields: tuple[str, ...]) -> None:
    for field in fields:
        if all(row.get(name) is None for name in field.split("|")):
            raise TaskError(f"no field {field.replace('|', ' or ')!r}, expected {_listed(fields)}")


def _file_rows(name: str, fields: tuple[str, ...]) -> Iterator[Row]:
    path = Path(name).expanduser()
    kind = next((loader for suffix, loader in _LOADERS.items() if path.name.endswith(suffix)), None)
    if not path.is_file():
        raise TaskError(f"task.data_files={name}: no such file, expected a .jsonl, .jsonl.gz or .parquet file")
    if kind is None:
        raise TaskError(f"task.data_files={name}: unknown kind of file, expected .jsonl, .jsonl.gz or .parquet")
    if path.stat().st_size == 0:
        raise TaskError(f"task.data_files={name}: the file is empty, expected rows with {_listed(fields)}")
    with tempfile.TemporaryDirectory(prefix="task-data-", ignore_cleanup_errors=True) as cache:
        try:
            rows = _load(kind, data_files=str(path.resolve()), split="train", cache_dir=cache)
        except Exception as error:
            problem = _diagnose(path) if kind == "json" else f"not a parquet file ({type(error).__name__})"
            raise TaskError(f"task.data_files={name}: {problem}, expected rows with {_listed(fields)}") from error
        yield from rows


def _hub_rows(hub: HubSource) -> Iterator[Row]:
    if not _hub_in_reach():
        raise TaskError(f"task.source=hub: no connection to {_hub_host()} for {hub.path}; {_OFFLINE}")
    try:
        rows = _load(hub.path, hub.config, split=hub.split, revision=hub.revision)
    except Exception as error:
        place = f"task.source=hub: {hub.path} at revision {hub.revision} split {hub.split}"
        raise TaskError(f"{place} could not be loaded ({type(error).__name__}); {_OFFLINE}") from error
    yield from rows


def _hub_host() -> str:
    return urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or "huggingface.co"


def _hub_in_reach() -> bool:
    """Whether to ask the hub at all: its client tries a host that does not answer for half a minute.

    True as well where the client was told to work from its local copy, and behind a proxy.
    """
    offline = any(os.environ.get(name) for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
    if offline or any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        socket.create_connection((_hub_host(), 443), timeout=_CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _load(*names: str | None, **options: Any) -> Iterable[Row]:
    """`datasets.load_dataset` without its progress bars and log lines; the settings from before are restored."""
    import datasets

    shown, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        rows: Iterable[Row] = datasets.load_dataset(*names, **options)
        return rows
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


def _diagnose(path: Path) -> str:
    """Why the loader refused a file of JSON lines."""
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"line {number} is not a JSON object"
    except json.JSONDecodeError:
        return f"line {number} is not JSON"
    except (OSError, EOFError, UnicodeDecodeError) as error:
        return f"cannot be read after line {number} ({type(error).__name__})"
    return "rows differ in their fields or types" if number else "the file is empty"


def _listed(fields: tuple[str, ...]) -> str:
    return ", ".join(field.replace("|", " or ") for field in fields)
