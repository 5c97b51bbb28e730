"""What the kernels of decoder layers take, as types.h lays it out and explains it."""

from __future__ import annotations

import ctypes
from typing import Any

STAGES = ("linear", "select", "attention", "ffn")
"""Components whose seconds a call adds up, in the order of its array."""
SCORES = ("mean", "bound", "gaussian")
"""What blocks are judged by, numbered as in types.h."""
POINTER, SIZE, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def _structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


Matrix: Any = _structure(
    "Matrix", weights=POINTER, bias=POINTER, **dict.fromkeys(("inputs", "outputs", "groups", "stride", "pair"), SIZE)
)
Segment: Any = _structure(
    "Segment",
    **dict.fromkeys(("first", "count", "start", "before"), SIZE),
    **dict.fromkeys(("positions", "keys", "values", "visible", "blocks", "kept"), POINTER),
    **dict.fromkeys(("chosen", "tail"), SIZE),
    **dict.fromkeys(("summary", "second"), POINTER),
    **dict.fromkeys(("summary_stride", "whole", "sinks", "window"), SIZE),
    **dict.fromkeys(("shares", "queries"), POINTER),
)
"""The tokens of one sequence in a step; the fields are explained in types.h."""
Attention: Any = _structure(
    "Attention",
    **dict.fromkeys(("norm", "beside_norm", "qkv", "output", "query_norm", "key_norm", "cos", "sin"), POINTER),
    **dict.fromkeys(("hidden", "heads", "kv_heads", "head_dim"), SIZE),
    eps=FLOAT,
    scale=FLOAT,
)
FeedForward: Any = _structure("FeedForward", **dict.fromkeys(("norm", "gate_up", "down"), POINTER), eps=FLOAT)
SparseFeedForward: Any = _structure(
    "SparseFeedForward",
    **dict.fromkeys(("norm", "gate", "channels"), POINTER),
    **dict.fromkeys(("hidden", "width"), SIZE),
    eps=FLOAT,
)
Job: Any = _structure(
    "Job",
    **dict.fromkeys(("attention", "feed_forward", "sparse", "segments", "beside", "survival", "chosen"), POINTER),
    **dict.fromkeys(("number", "parts", "block_size", "score", "every_row", "reduce_max", "ranked", "keep"), SIZE),
    threshold=FLOAT,
)

RUN: Any = [ctypes.c_int, POINTER, SIZE, SIZE, POINTER, POINTER]
LINEAR: Any = [ctypes.c_int, POINTER, POINTER, FLOAT, POINTER, SIZE, POINTER]
"""Types of the arguments of the two functions."""


def segments(number: int) -> Any:
    """An array of ``number`` empty segments."""
    return (Segment * number)()


def stage_seconds() -> Any:
    """An array that calls add their seconds to, one number per stage of :data:`STAGES`."""
    return (ctypes.c_double * len(STAGES))()
