"""From the configuration to the budgets of the sparse arms, and the checks that need the model's sizes. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from harness.calibration import Calibration
from harness.fields import ConfigError, show
from harness.schema import (
    AnchorReuse,
    BlockTopkAttention,
    Config,
    FloorMoe,
    MedianRatioMoe,
    QuantileFfn,
    SkipReuse,
    SparseFfn,
    SparseMoe,
    ThresholdFfn,
    TopkFfn,
    TopkMoe,
    ToppMoe,
)
from harness.schema_sparsity import CALIBRATE
from sparse.budget import AttentionBudget, FfnBudget, MoeBudget, ReuseBudget, Sparsity
from sparse.cost import ModelShape
from sparse.trace import DROPPED_PATH, LOW_HEADS_PATH, RESTRICTED_PATH

SPARSE_ARMS = ("sparse", "sparse_ar")
MOE_MODELS = "carved_moe, mixtral_8x7b, olmoe_1b_7b, qwen3_30b_a3b"


def sparsity(config: Config, shape: ModelShape, calibration: Calibration | None) -> Sparsity:
    """The budgets that the sparsity groups stand for on one model.

    Args:
        config: resolved.
        shape: sizes of the model that runs.
        calibration: of this model, already checked against its identity; None where ``config.calibration`` is null.

    Raises:
        ConfigError: a setting does not fit the model or the calibration, or would leave nothing out; one line.
    """
    found = _Calibrated(calibration, shape)
    attention = _attention(config, shape, found)
    return Sparsity(attention, _ffn(config, shape, found), _moe(config, shape, found), _reuse(config, shape, found))


def required_paths(sparsity: Sparsity) -> list[str]:
    """Prefixes of the path counters that must not stay at zero when an arm runs with these budgets."""
    reuse = sparsity.reuse
    found = [] if sparsity.attention.is_dense else ["block_attention"]
    found += [LOW_HEADS_PATH] if sparsity.attention.low_heads else []
    found += [] if sparsity.ffn.is_dense else ["sparse_ffn", DROPPED_PATH]
    found += [] if sparsity.moe.is_dense else ["moe.", RESTRICTED_PATH]
    found += [] if reuse.anchors is None else ["reuse.anchor"]
    return found + [f"reuse.skip_{what}" for what in reuse.skip if reuse.skip_layers]


def check_lengths(config: Config, budget: AttentionBudget, capacity: int) -> None:
    """Refuse a block budget that covers every context of a run with sparse arms: nothing would be skipped.

    Args:
        config: resolved.
        budget: of the sparse arms.
        capacity: positions of the longest prompt and its answer together.

    Raises:
        ConfigError: one line.
    """
    if budget.is_dense or not set(SPARSE_ARMS) & set(config.arms):
        return
    blocks = (capacity - 1) // budget.block_size
    if budget.skips(budget.dense_layers, blocks * budget.block_size):
        return
    if budget.topk is not None:
        raise ConfigError(
            f"attn.topk={budget.topk}: the longest sequence of this run fills {blocks} blocks of {budget.block_size}, "
            f"so nothing would be skipped (valid: below {blocks}, or longer prompts)"
        )
    whole = blocks * budget.block_size
    raise ConfigError(
        f"attn.l0={budget.l0}: the longest sequence of this run fills {blocks} blocks of {budget.block_size}, {whole} "
        f"tokens, so nothing would be skipped (valid: below {whole}, or longer prompts)"
    )


@dataclass(frozen=True, slots=True)
class _Calibrated:
    """A calibration that must be there when a setting asks for it, and of the model's size."""

    calibration: Calibration | None
    shape: ModelShape

    def of_blocks(self, setting: str, block_size: int) -> Calibration:
        """The same, for a setting that depends on the blocks it was measured with."""
        made = self.of(setting)
        if made.block_size != block_size:
            raise ConfigError(
                f"calibration={made.path}: {setting} was measured with blocks of {made.block_size}, this run has "
                f"attn.block_size={block_size}; make one with {CALIBRATE} --block-size {block_size}"
            )
        return made

    def of(self, setting: str) -> Calibration:
        """The calibration that ``setting`` reads; raises ConfigError."""
        made = self.calibration
        if made is None:
            raise ConfigError(f"calibration=null: {setting} needs one; make it with {CALIBRATE} and name its file")
        if (made.layers, made.kv_heads) != (self.shape.layers, self.shape.kv_heads):
            raise ConfigError(
                f"calibration={made.path}: made for {made.layers} layers of {made.kv_heads} KV heads, the model has "
                f"{self.shape.layers} of {self.shape.kv_heads}; make one with {CALIBRATE}"
            )
        return made


def _attention(config: Config, shape: ModelShape, found: _Calibrated) -> AttentionBudget:
    """METHOD section 2."""
    attn = config.attn
    if not isinstance(attn, BlockTopkAttention):
        return AttentionBudget()
    _check_dense_layers("attn", attn.dense_layers, shape)
    low: tuple[tuple[int, int], ...] = ()
    if attn.low_share > 0:
        heads = shape.layers * shape.kv_heads
        low = found.of_blocks(f"attn.low_share={attn.low_share}", attn.block_size).low_heads(
            attn.low_share, attn.dense_layers
        )
        if not low:
            raise ConfigError(
                f"attn.low_share={attn.low_share}: less than one of the model's {heads} KV heads "
                f"(valid: 0, or at least {1 / heads:.4f})"
            )
    fixed = attn.budget == "fixed"
    return AttentionBudget(
        topk=attn.topk if fixed else None,
        l0=None if fixed else attn.l0,
        rho=attn.rho,
        block_size=attn.block_size,
        sinks=attn.sinks,
        window=attn.window,
        dense_layers=attn.dense_layers,
        score=attn.score,
        query=attn.query,
        gqa=attn.gqa,
        heads=attn.heads,
        survival=attn.survival,
        low_heads=low,
    )


def _ffn(config: Config, shape: ModelShape, found: _Calibrated) -> FfnBudget:
    """METHOD section 3."""
    ffn = config.ffn
    if not isinstance(ffn, SparseFfn):
        return FfnBudget()
    _check_dense_layers("ffn", ffn.dense_layers, shape)
    keep, tau = 1.0, 0.0
    thresholds: tuple[float, ...] = ()
    if isinstance(ffn, TopkFfn):
        keep = ffn.keep
    elif isinstance(ffn, ThresholdFfn):
        tau = ffn.tau
    elif isinstance(ffn, QuantileFfn):
        made = found.of("ffn=quantile")
        thresholds = made.thresholds(ffn.sparsity)
        if not any(thresholds[ffn.dense_layers :]):
            raise ConfigError(
                f"calibration={made.path}: every threshold for ffn=quantile is 0, so no channel would be dropped; "
                "choose ffn=topk or threshold"
            )
    budget = FfnBudget(
        rule=ffn.name,
        keep=keep,
        tau=tau,
        thresholds=thresholds,
        mask=ffn.mask,
        survival=ffn.survival,
        dense_layers=ffn.dense_layers,
    )
    widths = _widths(shape)
    if ffn.name == "topk" and all(budget.channels(width) >= width for width in widths):
        raise ConfigError(
            f"ffn.keep={keep}: keeps all {max(widths)} channels of the model (valid: at most {1 - 1 / max(widths):.4f})"
        )
    return budget


def _moe(config: Config, shape: ModelShape, found: _Calibrated) -> MoeBudget:
    """METHOD section 4."""
    moe = config.moe
    if not isinstance(moe, SparseMoe):
        return MoeBudget()
    if not shape.moe_layers:
        raise ConfigError(f"moe={moe.name}: the model has no experts; choose moe=dense or one of model={MOE_MODELS}")
    if moe.union is not None and moe.union >= shape.experts:
        raise ConfigError(
            f"moe.union={moe.union}: a layer has {shape.experts} routed experts (valid: below that, or null)"
        )
    budget = MoeBudget(union=moe.union, outside=moe.outside, free_loaded=moe.free_loaded, survival=moe.survival)
    if isinstance(moe, MedianRatioMoe):
        _check_experts("moe.m_max", moe.m_max, shape)
        return replace(budget, rule="median_ratio", m_max=moe.m_max, betas=_betas(moe.m_max, found))
    if isinstance(moe, TopkMoe):
        _check_experts("moe.k", moe.k, shape)
        return replace(budget, rule="topk", k=moe.k)
    if isinstance(moe, ToppMoe):
        return replace(budget, rule="topp", p=moe.p)
    if isinstance(moe, FloorMoe):
        return replace(budget, rule="floor", weight_floor=moe.weight_floor)
    return budget


def _reuse(config: Config, shape: ModelShape, found: _Calibrated) -> ReuseBudget:
    """METHOD sections 2 and 5."""
    reuse = config.reuse
    if isinstance(reuse, SkipReuse):
        _check_layers("reuse.skip_layers", reuse.skip_layers, shape)
        if "channels" in reuse.skip and shape.moe_layers == shape.layers:
            raise ConfigError(
                f"reuse.skip={show(reuse.skip)}: experts remember no channels, and every FFN of the model is one; "
                "choose retrieval or ffn"
            )
        return ReuseBudget(skip=reuse.skip, skip_layers=reuse.skip_layers, refresh=reuse.refresh)
    if not isinstance(reuse, AnchorReuse) or not isinstance(config.attn, BlockTopkAttention):
        return ReuseBudget()
    first = config.attn.dense_layers
    if reuse.anchors == "list":
        setting = f"reuse.layers={show(reuse.layers)}"
        _check_layers("reuse.layers", reuse.layers, shape)
        anchors = reuse.layers
    elif reuse.anchors == "every":
        setting = f"reuse.every={reuse.every}"
        anchors = tuple(range(first, shape.layers, reuse.every))
    else:
        setting = f"reuse.theta={reuse.theta}"
        made = found.of_blocks(f"reuse.anchors={reuse.anchors}", config.attn.block_size)
        anchors = made.anchors(reuse.theta, reuse.anchors, first)
    if len(anchors) >= shape.layers - first:
        raise ConfigError(
            f"{setting}: every sparse layer from {first} to {shape.layers - 1} would be an anchor, so nothing would be "
            f"reused; choose fewer anchors{' (a lower reuse.theta)' if 'theta' in setting else ''} or reuse=none"
        )
    if not reuse.head_map:
        return ReuseBudget(anchors)
    return ReuseBudget(anchors, found.of_blocks("reuse.head_map=true", config.attn.block_size).heads(anchors))


def _betas(m_max: int, found: _Calibrated) -> tuple[tuple[float, ...], ...]:
    """The calibrated medians that ``moe=median_ratio`` compares with."""
    made = found.of("moe=median_ratio")
    if made.moe_beta is None:
        raise ConfigError(f"calibration={made.path}: holds no moe_beta for moe=median_ratio; make one with {CALIBRATE}")
    if m_max > (most := len(made.moe_beta[0])):
        raise ConfigError(f"moe.m_max={m_max}: calibration={made.path} holds medians up to {most} (valid: up to that)")
    return made.moe_beta


def _widths(shape: ModelShape) -> list[int]:
    """Channels of every kind of FFN in the model: dense layers, routed and shared experts."""
    dense = [shape.ffn] if shape.moe_layers < shape.layers else []
    experts = [shape.expert_ffn, shape.shared_ffn] if shape.moe_layers else []
    return [width for width in dense + experts if width]


def _check_dense_layers(group: str, dense_layers: int, shape: ModelShape) -> None:
    """At least one layer stays sparse."""
    if dense_layers >= shape.layers:
        raise ConfigError(
            f"{group}.dense_layers={dense_layers}: the model has {shape.layers} layers (valid: below that)"
        )


def _check_layers(key: str, layers: tuple[int, ...], shape: ModelShape) -> None:
    """Layers that the model has; ``layers`` ascends."""
    if layers[-1] >= shape.layers:
        raise ConfigError(f"{key}={show(layers)}: the model has layers 0 to {shape.layers - 1}; choose among these")


def _check_experts(key: str, value: int, shape: ModelShape) -> None:
    """Fewer than the router picks: a token keeps its strongest expert and leaves one out."""
    if value >= shape.top_k:
        raise ConfigError(f"{key}={value}: the router picks {shape.top_k} experts a token (valid: below {shape.top_k})")
