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
