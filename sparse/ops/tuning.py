"""Autotuning of Triton kernels, limited and cached: a handful of configurations, tried once per machine and key."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

SWITCH = "SPARSE_VERIFICATION_TUNE"
"""Environment variable: 0 takes the first configuration everywhere, for checks that need no speed."""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter on CPU tensors (TRITON_INTERPRET=1), for tests without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def tuned(
    configs: Sequence[Any], key: Sequence[str], prune: Callable[..., list[Any]] | None = None
) -> Callable[[Any], Any]:
    """Decorator over a ``triton.jit`` kernel: the best of ``configs`` per value of the arguments named in ``key``.

    Results are kept on disk beside Triton's compiled kernels. The interpreter has nothing to tune: there the first
    configuration is taken.

    Args:
        configs: ``triton.Config``, at most eight, the safest first.
        key: argument names; their values must come in few steps (powers of two, not lengths).
        prune: leaves out configurations that make no sense for a call's arguments; as Triton's ``early_config_prune``.

    Raises:
        ValueError: more than eight configurations.
    """
    import triton

    if len(configs) > 8:
        raise ValueError(f"{len(configs)} configurations to tune over: at most 8, or the first call takes minutes")
    chosen = list(configs[:1]) if interpreted() or os.environ.get(SWITCH) == "0" else list(configs)
    pruning = {} if prune is None or len(chosen) == 1 else {"prune_configs_by": {"early_config_prune": prune}}
    decorate: Callable[[Any], Any] = triton.autotune(configs=chosen, key=list(key), cache_results=True, **pruning)
    return decorate
