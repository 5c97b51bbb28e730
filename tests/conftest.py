"""Shared by all tests: no network, no tracker, and a configuration composed as run.py composes it."""

import copy
import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["SPARSE_VERIFICATION_LOCKS"] = tempfile.mkdtemp(prefix="sparse-verification-tests-")

ROOT = Path(__file__).resolve().parents[1]


def _cores() -> list[int]:
    """Those that this process may use, none where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Workers of ``-n auto``: one a core, but each holds a gigabyte."""
    return max(1, min(8, len(_cores())))


def pytest_configure() -> None:
    """Give each worker cores of its own: on shared ones the threads of several workers mostly wait for each other."""
    worker, cores = os.environ.get("PYTEST_XDIST_WORKER"), _cores()
    if worker is not None and cores:
        workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        first = int(worker.removeprefix("gw")) % len(cores)
        os.sched_setaffinity(0, cores[first::workers])


@pytest.fixture(scope="session")
def compose() -> Callable[..., dict[str, Any]]:
    """compose(*overrides) -> the plain mapping that harness.schema.resolve takes."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    @functools.cache
    def once(*overrides: str) -> dict[str, Any]:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            raw = OmegaConf.to_container(hydra_compose("config", list(overrides)), resolve=True)
        assert isinstance(raw, dict)
        return {str(key): value for key, value in raw.items()}

    return lambda *overrides: copy.deepcopy(once(*overrides))
