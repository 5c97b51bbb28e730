"""Experiment tracking beside the local files, which stay the truth. W&B is imported only when it is switched on.

W&B keeps its files below <results_dir>/wandb, the staged tables too; that folder is local to the machine (its own
format holds absolute paths) and is not for committing. Host, user, program, git and system metrics are not recorded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Protocol

from harness.evidence.provenance import portable

Mode = Literal["none", "offline", "online"]


class TrackingError(RuntimeError):
    """The tracking service cannot be used; one line that says what to choose instead."""


class Tracker(Protocol):
    """What a run tells about itself while it goes on: one start, any number of examples, one finish."""

    def start(self, config: Mapping[str, Any], run_dir: Path, name: str, group: str | None) -> None:
        """Open one tracked run. `name` is shown, `group` joins the members of a sweep."""

    def log_example(self, row: Mapping[str, Any]) -> None:
        """Log one example: plain numbers and texts, the same keys for every example."""

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Store the summary (None: the run broke) and close. Closing what is not open does nothing."""


class NullTracker:
    """Tracks nothing."""

    def start(self, config: Mapping[str, Any], run_dir: Path, name: str, group: str | None) -> None:
        """Do nothing."""

    def log_example(self, row: Mapping[str, Any]) -> None:
        """Do nothing."""

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Do nothing."""


class WandbTracker:
    """One W&B run per measured run, so one per sweep member."""

    def __init__(
        self, results_dir: Path | str, *, project: str, entity: str | None = None, mode: Literal["offline", "online"]
    ) -> None:
        self.folder = Path(results_dir).resolve() / "wandb"
        self.project, self.entity, self.mode = project, entity, mode
        self._run: Any = None
        self._rows: list[dict[str, Any]] = []

    def start(self, config: Mapping[str, Any], run_dir: Path, name: str, group: str | None) -> None:
        """Open the W&B run; `run_dir` is named by its fingerprint in the configuration.

        Raises:
            TrackingError: online without a login or a connection.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._rows = []
        with _local_folders(self.folder):
            import wandb

            try:
                self._run = wandb.init(
                    mode=self.mode,
                    project=self.project,
                    entity=self.entity if self.mode == "online" else None,
                    group=group,
                    name=name,
                    dir=str(self.folder.parent),
                    config={**portable(config), "fingerprint": run_dir.name},
                    reinit="finish_previous",
                    settings=_settings(),
                )
            except (wandb.errors.Error, OSError) as error:
                line = " ".join(str(error).split())
                raise TrackingError(f"W&B cannot start ({line}); choose track=wandb_offline or track=none") from None

    def log_example(self, row: Mapping[str, Any]) -> None:
        """Numbers go to the history as example/<key>; every value goes to the table per_example that `finish` logs."""
        if self._run is None:
            return
        self._rows.append(dict(row))
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        with _local_folders(self.folder):
            self._run.log({f"example/{key}": value for key, value in numbers.items()})

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Log the table and the summary, then close the W&B run, with exit code 1 where there is no good summary."""
        run, self._run = self._run, None
        if run is None:
            return
        failed = summary is None or summary.get("status") == "failed"
        with _local_folders(self.folder):
            try:
                if self._rows:
                    run.log({"per_example": _table(self._rows)})
                if summary is not None:
                    run.summary.update(dict(summary))
            finally:
                run.finish(exit_code=1 if failed else 0)


def make(
    mode: Mode,
    *,
    results_dir: Path | str = "results",
    project: str = "sparse-verification",
    entity: str | None = None,
) -> Tracker:
    """The tracker for a mode."""
    if mode == "none":
        return NullTracker()
    return WandbTracker(results_dir, project=project, entity=entity, mode=mode)


def _table(rows: list[dict[str, Any]]) -> Any:
    """A W&B table with the union of the rows' keys as columns."""
    import wandb

    columns: list[str | int] = list(dict.fromkeys(key for row in rows for key in row))
    return wandb.Table(columns=columns, data=[[row.get(str(key)) for key in columns] for row in rows])


def _settings() -> Any:
    """Quiet, and nothing about host, user, program, repository or system."""
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        host="",
        username="",
        email="",
        program="",
        program_relpath="",
        disable_git=True,
        disable_code=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )


@contextmanager
def _local_folders(folder: Path) -> Iterator[None]:
    """Keep W&B's staging and cache below `folder` instead of the home folder, unless the user has set them."""
    wanted = {
        "WANDB_DATA_DIR": str(folder / "data"),
        "WANDB_CACHE_DIR": str(folder / "cache"),
        "WANDB_ERROR_REPORTING": "false",
    }
    added = [key for key in wanted if key not in os.environ]
    os.environ.update({key: wanted[key] for key in added})
    try:
        yield
    finally:
        for key in added:
            with suppress(KeyError):
                del os.environ[key]
