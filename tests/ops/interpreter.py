"""Triton kernels under test: compiled where there is a GPU, in Triton's interpreter on CPU tensors elsewhere.

A test module takes its kernels from here, ``attention = kernel("block_attention", "attention")``, and never imports a
``kernel.py`` by itself: Triton decides while it is imported whether its functions are interpreted, and torch may have
imported it long before. The environment variable behind that is set only while a kernel is imported or called, so
that neither the rest of the suite nor the processes it starts are switched over. The interpreter keeps bf16 as bits in
integers: it multiplies those bits in products and cuts fp32 off where a GPU rounds. Both are put right here.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def interpreting() -> Iterator[None]:
    """Within it ``sparse.ops.tuning.interpreted()`` holds where there is no GPU; with a GPU nothing changes.

    The module or test is skipped where Triton is not installed.
    """
    if DEVICE == "cuda":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        _import_interpreted()
        builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
        patch.setattr(builder, "create_dot", _widening(builder.create_dot))
        patch.setattr(builder, "cast_impl", _rounding(builder.cast_impl))
        yield


def _import_interpreted() -> None:
    """Import Triton anew if it was imported for compilation; its extension module cannot be loaded twice and stays."""
    standard = sys.modules.get("triton.language.standard")
    if standard is None or type(standard.sum).__name__ != "InterpretedFunction":
        for name in [name for name in sys.modules if f"{name}.".startswith("triton.")]:
            if not f"{name}.".startswith("triton._C."):
                del sys.modules[name]
        pytest.importorskip("triton")


def _widening(create_dot: Callable[..., Any]) -> Callable[..., Any]:
    """Products of bf16 in fp32, which holds each product of two of them exactly."""
    import triton.language as tl

    def create(self: Any, left: Any, right: Any, *rest: Any) -> Any:
        left, right = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (left, right))
        return create_dot(self, left, right, *rest)

    return create


def _rounding(cast_impl: Callable[..., Any]) -> Callable[..., Any]:
    """From fp32 to bf16 to the nearest, ties to even."""
    import triton.language as tl

    def cast(self: Any, source: Any, target: Any) -> Any:
        result = cast_impl(self, source, target)
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.tensor(source.data).to(torch.bfloat16).view(torch.int16).numpy()
            result.data = rounded.view(result.data.dtype).reshape(result.data.shape)
        return result

    return cast


def kernel(op: str, name: str) -> Callable[..., Any]:
    """A public function of ``sparse/ops/<op>/kernel.py``, ready to be called on tensors on ``DEVICE``.

    Args:
        op: the folder, as in ``block_attention``.
        name: of the function.
    """
    with interpreting():
        function = getattr(importlib.import_module(f"sparse.ops.{op}.kernel"), name)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with interpreting():
            return function(*args, **kwargs)

    return call
