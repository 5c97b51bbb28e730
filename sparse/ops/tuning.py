"""Autotuning of Triton kernels, limited and cached: a handful of configurations, tried once per machine and key."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter on CPU tensors (TRITON_INTERPRET=1), for tests without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def tuned(configs: Sequence[Any], key: Sequence[str]) -> Callable[[Any], Any]:
    """Decorator over a ``triton.jit`` kernel: the best of ``configs`` per value of the arguments named in ``key``.

    Results are kept on disk beside Triton's compiled kernels. The interpreter has nothing to tune: there the first
    configuration is taken.

    Args:
        configs: ``triton.Config``, at most eight, the safest first.
        key: argument names; their values must come in few steps (powers of two, not lengths).

    Raises:
        ValueError: more than eight configurations.
    """
    import triton

    if len(configs) > 8:
        raise ValueError(f"{len(configs)} configurations to tune over: at most 8, or the first call takes minutes")
    chosen = list(configs[:1]) if interpreted() else list(configs)
    decorate: Callable[[Any], Any] = triton.autotune(configs=chosen, key=list(key), cache_results=True)
    return decorate
