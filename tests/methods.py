"""The one list of methods: every mechanism and every value of its switches, with its no-op.

The generic tests in tests/engine/test_methods.py run over it, and tests/harness/test_methods_list.py checks that no
choice of the configuration is missing here. A new method is one more entry (docs/add_a_method.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparse.budget import AttentionBudget, FfnBudget, MoeBudget, ReuseBudget, Sparsity

LAYERS = 3
EXPERTS = {"mixtral": 6, "qwen3_moe": 8, "olmoe": 7}
TOP_K = {"mixtral": 2, "qwen3_moe": 3, "olmoe": 3}
DENSE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
MOE_FAMILIES = tuple(EXPERTS)
_EVERYTHING = 1000
"""Blocks, more than any test fills."""


@dataclass(frozen=True, slots=True)
class Method:
    """One mechanism with its switches.

    Attributes:
        name: what a failing test shows.
        active: budgets under which it must run and change the logits of the tiny models.
        no_op: the same mechanism with nothing left out; None where only leaving it out is a no-op.
        paths: counters that must not stay at zero under ``active``.
        families: tiny models that it runs on.
        reads_all: it may read what it does not use (simulated methods).
    """

    name: str
    active: Sparsity
    no_op: Sparsity | None
    paths: tuple[str, ...]
    families: tuple[str, ...] = ("llama", "qwen3_moe")
    reads_all: bool = False


def _attention(name: str, **values: object) -> Method:
    sizes = {"topk": 4} if "l0" not in values else {}
    wide = {"l0": _EVERYTHING * 16} if "l0" in values else {"topk": _EVERYTHING}
    return Method(
        f"attention {name}",
        Sparsity(AttentionBudget(**{**sizes, **values})),  # type: ignore[arg-type]
        Sparsity(AttentionBudget(**{**values, **wide})),  # type: ignore[arg-type]
        ("select.oracle" if values.get("score") == "oracle" else "select.blocks", "block_attention.torch"),
        reads_all=values.get("score") == "oracle",
    )


def _ffn(name: str, *, budget: FfnBudget, no_op: FfnBudget) -> Method:
    path = "sparse_ffn.simulated" if budget.mask == "token" else "sparse_ffn."
    paths = (path, "ffn.channels_dropped")
    return Method(f"ffn {name}", Sparsity(ffn=budget), Sparsity(ffn=no_op), paths, reads_all=budget.mask == "token")


def _moe(name: str, budget: MoeBudget, no_op: MoeBudget) -> Method:
    return Method(
        f"moe {name}", Sparsity(moe=budget), Sparsity(moe=no_op), ("moe.", "experts.restricted"), MOE_FAMILIES
    )


_BLOCKS = AttentionBudget(topk=4)
_TOPK = FfnBudget(rule="topk", keep=0.5)
_BETAS = ((0.9,) * 2,) * LAYERS

METHODS: tuple[Method, ...] = (
    _attention("fixed budget"),
    _attention("piecewise budget", l0=64, rho=0.1),
    _attention("bound score", score="bound"),
    _attention("gaussian score", score="gaussian"),
    _attention("oracle score", score="oracle"),
    _attention("mean query", query="mean"),
    _attention("max query", query="max"),
    _attention("weighted query", query="weighted", survival=0.5),
    _attention("max over grouped heads", gqa="max"),
    _attention("pooled head budgets", heads="pooled"),
    replace(
        _attention("low heads", low_heads=((0, 1), (2, 0))),
        paths=("select.low_heads", "select.blocks", "block_attention.torch"),
    ),
    _attention("blocks of 32", block_size=32),
    _attention("blocks of 64 without sink and window", block_size=64, topk=1, sinks=0, window=0),
    _attention("dense first layer", dense_layers=1),
    *(
        _ffn(
            f"top-k, {mask}",
            budget=FfnBudget(rule="topk", keep=0.5, mask=mask),
            no_op=FfnBudget(rule="topk", keep=0.9999, mask=mask),
        )
        for mask in ("union", "root", "weighted", "token")
    ),
    _ffn(
        "top-k, dense first layer, steep weights",
        budget=FfnBudget(rule="topk", keep=0.5, mask="weighted", survival=0.3, dense_layers=1),
        no_op=FfnBudget(rule="topk", keep=0.5, dense_layers=LAYERS),
    ),
    _ffn("threshold", budget=FfnBudget(rule="threshold", tau=0.5), no_op=FfnBudget(rule="threshold")),
    _ffn(
        "quantile",
        budget=FfnBudget(rule="quantile", thresholds=(0.3, 0.5, 0.7)),
        no_op=FfnBudget(rule="quantile", thresholds=(0.0,) * LAYERS),
    ),
    _moe("union, substitute", MoeBudget(union=2), MoeBudget(union=8)),
    _moe("union, drop", MoeBudget(union=2, outside="drop", survival=0.3), MoeBudget(union=8, outside="drop")),
    _moe("smaller k", MoeBudget(rule="topk", k=1), MoeBudget(rule="topk", k=3)),
    Method(
        "one expert less",
        Sparsity(moe=MoeBudget(rule="topk", k=2)),
        Sparsity(moe=MoeBudget(rule="topk", k=3)),
        ("moe.",),
        ("qwen3_moe", "olmoe"),
    ),
    _moe("top-p", MoeBudget(rule="topp", p=0.3), MoeBudget(rule="topp", p=1.0)),
    _moe("weight floor", MoeBudget(rule="floor", weight_floor=0.6), MoeBudget(rule="floor")),
    _moe(
        "median ratio",
        MoeBudget(rule="median_ratio", m_max=1, betas=_BETAS),
        MoeBudget(rule="median_ratio", m_max=1, betas=((0.0,),) * LAYERS),
    ),
    _moe(
        "loaded anyway is free",
        MoeBudget(rule="topk", k=1, free_loaded=True, union=2),
        MoeBudget(rule="topk", k=3, free_loaded=True, union=8),
    ),
    Method(
        "reuse anchors",
        Sparsity(_BLOCKS, reuse=ReuseBudget(anchors=(0, 2))),
        Sparsity(AttentionBudget(topk=_EVERYTHING), reuse=ReuseBudget(anchors=(0, 2))),
        ("reuse.anchor", "block_attention.torch"),
    ),
    Method(
        "reuse anchors, mapped heads",
        Sparsity(_BLOCKS, reuse=ReuseBudget(anchors=(0,), head_map=((0, 1), (1, 0), (1, 1)))),
        Sparsity(AttentionBudget(topk=_EVERYTHING), reuse=ReuseBudget(anchors=(0,), head_map=((1, 0),) * LAYERS)),
        ("reuse.anchor", "block_attention.torch"),
    ),
    Method(
        "skipped retrieval",
        Sparsity(_BLOCKS, reuse=ReuseBudget(skip=("retrieval",), skip_layers=(1, 2), refresh=3)),
        None,
        ("reuse.skip_retrieval", "block_attention.torch"),
    ),
    Method(
        "skipped choice of channels",
        Sparsity(ffn=_TOPK, reuse=ReuseBudget(skip=("channels",), skip_layers=(0, 1), refresh=3)),
        None,
        ("reuse.skip_channels", "sparse_ffn."),
        ("llama", "qwen3_moe"),
    ),
    Method(
        "skipped ffn",
        Sparsity(reuse=ReuseBudget(skip=("ffn",), skip_layers=(1,))),
        None,
        ("reuse.skip_ffn",),
    ),
    Method(
        "hybrid",
        Sparsity(_BLOCKS, _TOPK, reuse=ReuseBudget(anchors=(0, 2))),
        Sparsity(AttentionBudget(topk=_EVERYTHING), FfnBudget(rule="topk", keep=0.9999)),
        ("block_attention.torch", "sparse_ffn.", "reuse.anchor"),
        DENSE_FAMILIES + MOE_FAMILIES,
    ),
    Method(
        "hybrid with experts",
        Sparsity(_BLOCKS, _TOPK, MoeBudget(union=2), ReuseBudget(anchors=(0, 2))),
        Sparsity(AttentionBudget(topk=_EVERYTHING), FfnBudget(rule="topk", keep=0.9999), MoeBudget(union=8)),
        ("block_attention.torch", "sparse_ffn.", "moe.", "reuse.anchor"),
        MOE_FAMILIES,
    ),
)
