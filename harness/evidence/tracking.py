"""Experiment tracking beside the local files, which stay the truth. W&B is imported only when it is switched on.

W&B keeps its files below <results_dir>/wandb, the staged copies of artifacts too; that folder is for this machine alone
(an offline run names the staged copies by their absolute paths, which are read and not sent when it is uploaded) and is
not for committing. Host, user, program, git and system metrics are not recorded, nor the texts of the evaluation data
unless `texts` is set. What is logged under which key: `harness.evidence.tracked`.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Protocol

from harness.evidence import tracked
from harness.evidence.provenance import portable
from harness.evidence.records import Record

Mode = Literal["none", "offline", "online"]
JOB, REPORT_JOB = "run", "report"
RUN_FILES = ("config.yaml", "provenance.json")
RESULT_FILES = (("tables", (".md", ".csv", ".tex")), ("figures", (".png",)))
"""Folders of a results folder and the files of them that belong to the report."""


class TrackingError(RuntimeError):
    """The tracking service cannot be used; one line that says what to choose instead."""


class Tracker(Protocol):
    """What a run tells about itself while it goes on: one start, any number of examples, one finish.

    `start` alone may raise: what breaks later costs a line on standard error and never the measurement.
    """

    def start(self, config: Mapping[str, Any], run_dir: Path, name: str, group: str | None) -> None:
        """Open one tracked run. `name` is shown, `group` joins the members of a sweep."""

    def log_example(self, record: Record) -> None:
        """Log one example of one arm."""

    def finish(self, summary: Mapping[str, Any] | None, records: Sequence[Record] = ()) -> None:
        """Store the summary (None: the run broke) and what is made of all records, then close.

        Closing what is not open does nothing.
        """


class NullTracker:
    """Tracks nothing."""

    def start(self, config: Mapping[str, Any], run_dir: Path, name: str, group: str | None) -> None:
        """Do nothing."""

    def log_example(self, record: Record) -> None:
        """Do nothing."""

    def finish(self, summary: Mapping[str, Any] | None, records: Sequence[Record] = ()) -> None:
        """Do nothing."""


class WandbTracker:
    """One W&B run per measured run, so one per sweep member."""

    def __init__(
        self,
        results_dir: Path | str,
        *,
        project: str,
        entity: str | None = None,
        mode: Literal["offline", "online"],
        texts: bool = False,
    ) -> None:
        self.results = Path(results_dir).resolve()
        self.folder = self.results / "wandb"
        self.project, self.entity, self.mode, self.texts = project, entity, mode, texts
        self._run: Any = None
        self._run_dir = self.results
        self._numbers: dict[str, int] = {}
        self._lost: set[str] = set()

    def start(self, config: Mapping[str, Any], run_dir: Path, name: str, group: str | None) -> None:
        """Open the W&B run; `run_dir` is named by its fingerprint in the configuration.

        Raises:
            TrackingError: online without a login or a connection, or W&B refuses a name.
        """
        self._run_dir, self._numbers, self._lost = run_dir, {}, set()
        with _local_folders(self.folder):
            self._run = self._open(
                job_type=JOB,
                name=name,
                group=group,
                tags=tracked.tags(config),
                config={**portable(config), "fingerprint": run_dir.name},
            )
            with self._spared("axes of the plots"):
                self._run.define_metric(tracked.NUMBER, hidden=True)
                self._run.define_metric("example/*", step_metric=tracked.NUMBER)

    def log_example(self, record: Record) -> None:
        """Numbers go to the history as example/<arm>/<name>, over the example's place in the run."""
        if self._run is None:
            return
        with _local_folders(self.folder), self._spared("example"):
            number = self._numbers.setdefault(record.example_id, len(self._numbers) + 1)
            row = tracked.example_row(record, texts=False)
            numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
            shown = {f"example/{record.arm}/{key}": value for key, value in numbers.items()}
            self._run.log({tracked.NUMBER: number, **shown})

    def finish(self, summary: Mapping[str, Any] | None, records: Sequence[Record] = ()) -> None:
        """Log tables, histograms, summary and the run's files; close with exit code 1 where there is no good summary.

        records.jsonl is not among the files: it holds the outputs.
        """
        run, self._run = self._run, None
        if run is None:
            return
        failed = summary is None or summary.get("status") == "failed"
        with _local_folders(self.folder):
            if records:
                with self._spared("table of examples"):
                    rows = [tracked.example_row(record, texts=self.texts) for record in records]
                    run.log({tracked.EXAMPLES: _table(rows)})
            if summary is not None:
                with self._spared("arms"):
                    run.log(_shown(summary, records))
                with self._spared("summary"):
                    run.summary.update(tracked.shown_summary(summary))
                with self._spared("files of the run"):
                    run.log_artifact(self._files(summary))
            with self._spared("end of the run"):
                run.finish(exit_code=1 if failed else 0)
            if self.mode == "offline":
                with suppress(Exception):
                    _forget_logs(run, self.folder)

    def report(self, group: str | None, name: str) -> int:
        """Log the tables and figures of the results folder as a run of its own and return how many files there were.

        Raises:
            TrackingError: there are none, W&B cannot start, or it cannot take them.
        """
        files = result_files(self.results)
        if not files:
            raise TrackingError(f"no tables or figures below {self.results.name}/; run `make tables` first")
        with _local_folders(self.folder):
            import wandb

            run = self._open(job_type=REPORT_JOB, name=name, group=group, tags=[REPORT_JOB], config={})
            try:
                artifact = wandb.Artifact(f"results-{_plain(name)}", type="results")
                for file in files:
                    artifact.add_file(str(file), name=file.relative_to(self.results).as_posix())
                run.log_artifact(artifact)
                run.log({f"figures/{file.stem}": wandb.Image(str(file)) for file in files if file.suffix == ".png"})
                run.log({f"tables/{file.stem}": _csv_table(file) for file in files if file.suffix == ".csv"})
                run.finish()
            except (wandb.errors.Error, OSError, ValueError) as error:
                with suppress(Exception):
                    run.finish(exit_code=1)
                raise TrackingError(f"W&B cannot take the tables and figures ({_line(error)})") from None
            if self.mode == "offline":
                with suppress(Exception):
                    _forget_logs(run, self.folder)
        return len(files)

    @contextmanager
    def _spared(self, what: str) -> Iterator[None]:
        """Turn whatever breaks inside into one line on standard error, once a run: the measurement must go on."""
        try:
            yield
        except Exception as error:
            if what not in self._lost:
                print(f"W&B did not take the {what} ({_line(error)}); the run goes on", file=sys.stderr, flush=True)
            self._lost.add(what)

    def _open(self, **facts: Any) -> Any:
        """A W&B run; needs `_local_folders`."""
        import wandb

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return wandb.init(
                mode=self.mode,
                project=self.project,
                entity=self.entity if self.mode == "online" else None,
                dir=str(self.results),
                reinit="finish_previous",
                settings=_settings(),
                **facts,
            )
        except (wandb.errors.Error, OSError, ValueError) as error:
            other = "track=wandb_offline or track=none" if self.mode == "online" else "track=none"
            raise TrackingError(f"W&B cannot start ({_line(error)}); choose {other}") from None

    def _files(self, summary: Mapping[str, Any]) -> Any:
        """An artifact of the run's configuration, provenance and summary."""
        import wandb

        artifact = wandb.Artifact(f"run-{self._run_dir.name}", type="run")
        with artifact.new_file("summary.json") as stream:
            stream.write(json.dumps(summary, indent=1, ensure_ascii=False))
        for name in RUN_FILES:
            if (self._run_dir / name).exists():
                artifact.add_file(str(self._run_dir / name), name=name)
        return artifact


def make(
    mode: Mode,
    *,
    results_dir: Path | str = "results",
    project: str = "sparse-verification",
    entity: str | None = None,
    texts: bool = False,
) -> Tracker:
    """The tracker for a mode. `texts` puts the outputs of the examples into their table."""
    if mode == "none":
        return NullTracker()
    return WandbTracker(results_dir, project=project, entity=entity, mode=mode, texts=texts)


def result_files(results_dir: Path | str) -> list[Path]:
    """Tables and figures of a results folder, as far as they go into the report."""
    folders = [(Path(results_dir) / name, kinds) for name, kinds in RESULT_FILES]
    return [file for folder, kinds in folders for file in sorted(folder.glob("*")) if file.suffix in kinds]


def log_results(
    results_dir: Path | str,
    mode: Mode,
    *,
    project: str = "sparse-verification",
    entity: str | None = None,
    group: str | None = None,
    name: str = "report",
) -> int:
    """Log <results_dir>/tables and figures: one artifact, the figures as images and the CSV files as tables.

    The run has the job type `report` and the name and group given; texts of examples are in none of these files.

    Returns:
        How many files were logged; 0 with mode "none".

    Raises:
        TrackingError: there are no tables or figures, or W&B cannot take them.
    """
    if mode == "none":
        return 0
    return WandbTracker(results_dir, project=project, entity=entity, mode=mode).report(group, name)


def require_login() -> None:
    """Check for credentials of W&B, and that its server takes them where W&B asks it.

    Raises:
        TrackingError: there are none, or the server refuses them or does not answer.
    """
    with _environment({}, without=("WANDB_MODE",)):
        import wandb

        try:
            if wandb.login():
                return
        except wandb.errors.UsageError:
            pass
        except (wandb.errors.Error, OSError, ValueError) as error:
            raise TrackingError(f"W&B: {_line(error)}; check the connection, or run `wandb login` again") from None
    raise TrackingError("W&B: not logged in; run `wandb login` or set WANDB_API_KEY")


def default_entity() -> str:
    """The user or team that the login writes to.

    Raises:
        TrackingError: W&B cannot be asked.
    """
    require_login()
    import wandb

    try:
        return str(wandb.Api().default_entity)
    except (wandb.errors.Error, OSError, ValueError) as error:
        raise TrackingError(f"W&B does not answer ({_line(error)}); name a user or team with --entity") from None


def _shown(summary: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    """Headline numbers, the tables of arms and of accepted tokens, and the histograms."""
    import wandb

    bins = {
        tracked.accepted_key(arm): tracked.whole_bins(counts) for arm, counts in tracked.histograms(summary).items()
    }
    bins |= {tracked.step_key(arm): found for arm, found in tracked.step_bins(records).items()}
    tables = {tracked.ARMS: tracked.arm_rows(summary), tracked.ACCEPTED: tracked.accepted_rows(summary)}
    shown: dict[str, Any] = dict(tracked.headline(summary))
    shown |= {key: wandb.Histogram(np_histogram=found) for key, found in bins.items()}
    return shown | {key: _table(rows) for key, rows in tables.items() if rows}


def _table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A W&B table with the union of the rows' keys as columns."""
    import wandb

    columns: list[str | int] = list(dict.fromkeys(key for row in rows for key in row))
    return wandb.Table(columns=columns, data=[[row.get(str(key)) for key in columns] for row in rows])


def _csv_table(file: Path) -> Any:
    """A CSV file as a W&B table of texts."""
    with file.open(encoding="utf-8", newline="") as stream:
        return _table(list(csv.DictReader(stream)))


def _plain(name: str) -> str:
    """A name as an artifact may bear it."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _forget_logs(run: Any, folder: Path) -> None:
    """Remove W&B's debugging logs of an ended offline run: they name folders of this machine."""
    for logs in (Path(run.dir).parent / "logs", folder / "cache" / "wandb" / "logs"):
        shutil.rmtree(logs, ignore_errors=True)


def _settings() -> Any:
    """Quiet, and nothing about host, user, program, repository or system."""
    import wandb

    return wandb.Settings(
        silent=True,
        symlink=False,
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
    with _environment({key: value for key, value in wanted.items() if key not in os.environ}):
        yield


@contextmanager
def _environment(values: Mapping[str, str], without: Sequence[str] = ()) -> Iterator[None]:
    """Set and unset variables of this process for a while."""
    before = {key: os.environ.get(key) for key in (*values, *without)}
    for key in without:
        os.environ.pop(key, None)
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
