"""The Optuna study on disk: one process at a time, and what kill -9 leaves behind is mended when it is opened."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState

from harness.fields import ConfigError
from scripts.tuning.trials import Outcome

ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


@contextmanager
def opened(file: Path, identity: Mapping[str, str]) -> Iterator[optuna.Study]:
    """The study of a journal file, made where there is none, held by one process.

    Trials that a killed process left running are queued again with the same setting.

    Raises:
        ConfigError: another process holds it, or it is of another configuration, space, measure or of other sources.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file.parent.mkdir(parents=True, exist_ok=True)
    with (file.parent / f".{file.stem}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"--study={file.stem}: in use by another process; wait or choose another name") from None
        _mend(file)
        storage = JournalStorage(JournalFileBackend(str(file), JournalFileOpenLock(str(file))))
        study = optuna.create_study(
            storage=storage, study_name=file.stem, directions=["maximize", "minimize"], load_if_exists=True
        )
        _check_identity(study, identity)
        _queue_again(study)
        yield study


def outcomes(study: optuna.Study) -> dict[int, Outcome]:
    """Number -> outcome of every trial that ended."""
    ended = study.get_trials(deepcopy=False, states=ENDED)
    return {trial.number: Outcome.of(trial.user_attrs["outcome"]) for trial in ended}


def has_default(study: optuna.Study) -> bool:
    """Whether the configuration as it was typed was tried, or waits to be."""
    trials = study.get_trials(deepcopy=False, states=(*ENDED, TrialState.WAITING))
    return any(trial.user_attrs.get("default") for trial in trials)


def default_number(study: optuna.Study) -> int | None:
    """The trial of the configuration as it was typed, once it ended."""
    ended = study.get_trials(deepcopy=False, states=ENDED)
    return next((trial.number for trial in ended if trial.user_attrs.get("default")), None)


def _mend(file: Path) -> None:
    """Take away what a killed process left: a torn last line, and the lock that it held while writing."""
    Path(f"{file}.lock").unlink(missing_ok=True)
    if file.exists():
        content = file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with file.open("r+b") as stream:
                stream.truncate(whole)


def _check_identity(study: optuna.Study, identity: Mapping[str, str]) -> None:
    stored = study.user_attrs.get("identity")
    if stored is None:
        study.set_user_attr("identity", dict(identity))
        return
    if changed := [name for name, value in identity.items() if stored.get(name) != value]:
        raise ConfigError(
            f"--study={study.study_name}: stored with {' and '.join(f'another {name}' for name in changed)}; its "
            "trials cannot be compared with new ones, choose another name"
        )


def _queue_again(study: optuna.Study) -> None:
    """Queue the settings of trials that were running when their process died, then mark these as failed."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        kept = {"default": True} if trial.user_attrs.get("default") else {}
        study.enqueue_trial(dict(trial.params), user_attrs=kept)
        study.tell(trial.number, state=TrialState.FAIL)
