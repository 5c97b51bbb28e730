"""The settings of the four sparsity groups and the checks between them (METHOD sections 2 to 5).

What needs the model's sizes or the calibration's content is checked by `harness.budgets`. No torch.
"""

from dataclasses import dataclass

from harness.fields import ConfigError, setting, show

CALIBRATE = "python -m scripts.calibrate"


@dataclass(frozen=True, slots=True)
class DenseAttention:
    """Attention over the whole cache (a no-op)."""

    name: str = setting("how a sparse step attends to the cache")


@dataclass(frozen=True, slots=True)
class BlockTopkAttention(DenseAttention):
    """Attention to the best cache blocks per KV head (METHOD section 2)."""

    budget: str = setting(
        "how much is kept: fixed = attn.topk blocks, piecewise = all of short contexts, a share of longer ones",
        choices=("fixed", "piecewise"),
    )
    topk: int = setting(
        "whole cache blocks kept per KV head, attn.sinks and attn.window included (attn.budget=fixed)", minimum=1
    )
    l0: int = setting("tokens of context up to which all are kept (attn.budget=piecewise)", minimum=1)
    rho: float = setting(
        "share of the tokens beyond attn.l0 that is kept per KV head (attn.budget=piecewise)", minimum=0, below=1
    )
    block_size: int = setting("cache positions per block", choices=(16, 32, 64))
    sinks: int = setting("first blocks that always stay", minimum=0)
    window: int = setting("last whole blocks that always stay", minimum=0)
    dense_layers: int = setting("first layers that attend to the whole cache", minimum=0)
    score: str = setting(
        "block score: mean key times query, upper bound from per-channel extremes, gaussian = attention mass estimated "
        "from means and variances, oracle = the mass itself, which reads every key (simulated)",
        choices=("mean", "bound", "gaussian", "oracle"),
    )
    query: str = setting(
        "query that picks the blocks: first token of the step, mean or max over its tokens, or their mean weighted by "
        "attn.survival",
        choices=("first", "mean", "max", "weighted"),
    )
    gqa: str = setting("how scores of the query heads that share a KV head are joined", choices=("mean", "max"))
    heads: str = setting(
        "per_head = as many blocks for every KV head, pooled = the heads of a layer compete for their blocks",
        choices=("per_head", "pooled"),
    )
    survival: float = setting("chance that one more draft token is accepted (attn.query=weighted)", above=0, maximum=1)
    low_share: float = setting(
        "share of the KV heads, those of the lowest calibrated contribution, that keep sinks and window only",
        minimum=0,
        below=1,
    )


@dataclass(frozen=True, slots=True)
class DenseFfn:
    """The whole feed-forward layer (a no-op)."""

    name: str = setting("how a sparse step computes the feed-forward layers")


@dataclass(frozen=True, slots=True)
class SparseFfn(DenseFfn):
    """What every rule shares: gates are computed in full, channels of small magnitude dropped (METHOD section 3)."""

    mask: str = setting(
        "channels kept: one set per step, judged by union = the maximum over its tokens, root = its first token, "
        "weighted = their mean by ffn.survival; or token = each token its own set (simulated, saves no bytes)",
        choices=("union", "root", "weighted", "token"),
    )
    survival: float = setting("chance that one more draft token is accepted (ffn.mask=weighted)", above=0, maximum=1)
    dense_layers: int = setting("first layers whose feed-forward part stays whole", minimum=0)


@dataclass(frozen=True, slots=True)
class TopkFfn(SparseFfn):
    """A fixed number of channels, those of the largest magnitude."""

    keep: float = setting("share of the channels that is kept", above=0, below=1)


@dataclass(frozen=True, slots=True)
class ThresholdFfn(SparseFfn):
    """Channels above one absolute threshold."""

    tau: float = setting("smallest magnitude of a gate that is kept", above=0)


@dataclass(frozen=True, slots=True)
class QuantileFfn(SparseFfn):
    """Channels above a threshold per layer, calibrated on text."""

    sparsity: float = setting("share of the channels below the calibrated threshold of their layer", above=0, below=1)


@dataclass(frozen=True, slots=True)
class DenseMoe:
    """All experts that the router picks (a no-op)."""

    name: str = setting("how a sparse step computes mixture-of-experts layers")


@dataclass(frozen=True, slots=True)
class SparseMoe(DenseMoe):
    """What every rule shares: a limit on the experts that the tokens of a step need together (METHOD section 4)."""

    union: int | None = setting(
        "distinct routed experts that a layer runs for all tokens of a step at most, null = no limit", minimum=1
    )
    outside: str = setting(
        "a token's experts beyond moe.union: substitute its next best ones inside, or drop them",
        choices=("substitute", "drop"),
    )
    free_loaded: bool = setting("experts that a token skips run after all where another token of the step needs them")
    survival: float = setting(
        "chance that one more draft token is accepted; ranks experts for moe.union", above=0, maximum=1
    )


@dataclass(frozen=True, slots=True)
class UnionMoe(SparseMoe):
    """The limit on the union alone."""

    union: int = setting(
        "distinct routed experts that a layer runs for all tokens of a step at most, null = no limit", minimum=1
    )


@dataclass(frozen=True, slots=True)
class MedianRatioMoe(SparseMoe):
    """Skips a token's weakest experts where their share of its weight is below the calibrated median."""

    m_max: int = setting("experts skipped per token at most", minimum=1)


@dataclass(frozen=True, slots=True)
class TopkMoe(SparseMoe):
    """Fewer experts per token than the router picks."""

    k: int = setting("routed experts kept per token", minimum=1)


@dataclass(frozen=True, slots=True)
class ToppMoe(SparseMoe):
    """A token's strongest experts up to a share of its routing weight."""

    p: float = setting("share of a token's routing weight that its kept experts reach", above=0, below=1)


@dataclass(frozen=True, slots=True)
class FloorMoe(SparseMoe):
    """A token's experts of at least some share of its routing weight."""

    weight_floor: float = setting(
        "smallest share of a token's routing weight that an expert is kept for", above=0, below=1
    )


@dataclass(frozen=True, slots=True)
class NoReuse:
    """Every layer makes its own selection (a no-op)."""

    name: str = setting("what layers and steps take over from each other")


@dataclass(frozen=True, slots=True)
class AnchorReuse(NoReuse):
    """Blocks are retrieved in anchor layers, the others take those of the nearest anchor before (METHOD section 2)."""

    anchors: str = setting(
        "layers that retrieve: list = reuse.layers, every = each reuse.every-th, jaccard = by calibrated similarity of "
        "selections, mass = by calibrated attention mass recovered",
        choices=("list", "every", "jaccard", "mass"),
    )
    layers: tuple[int, ...] = setting("anchor layers, ascending (reuse.anchors=list)", minimum=0)
    every: int = setting("distance between anchor layers (reuse.anchors=every)", minimum=2)
    theta: float = setting(
        "similarity to the current anchor below which a layer becomes the next one (reuse.anchors=jaccard or mass)",
        above=0,
        maximum=1,
    )
    head_map: bool = setting("KV heads take the blocks of the anchor's head that calibration found nearest")


@dataclass(frozen=True, slots=True)
class SkipReuse(NoReuse):
    """Experimental: some layers keep what an earlier step selected, or leave their FFN out (METHOD section 5)."""

    skip: tuple[str, ...] = setting(
        "what reuse.skip_layers leave out: retrieval or channels = selecting, as an earlier step did it; ffn = the FFN",
        choices=("retrieval", "channels", "ffn"),
    )
    skip_layers: tuple[int, ...] = setting("layers that skip, ascending", minimum=0)
    refresh: int = setting("steps after which a selection taken from an earlier step is made anew", minimum=2)


def is_sparse(attn: DenseAttention, ffn: DenseFfn, moe: DenseMoe, reuse: NoReuse) -> bool:
    """Whether these groups leave anything out; reuse alone does so only where it skips FFNs."""
    skips_ffn = isinstance(reuse, SkipReuse) and "ffn" in reuse.skip
    return skips_ffn or {attn.name, ffn.name, moe.name} != {"dense"}


def check_sparsity(attn: DenseAttention, ffn: DenseFfn, moe: DenseMoe, reuse: NoReuse, calibration: str | None) -> None:
    """Refuses sparsity groups that contradict each other or lack their calibration; raises ConfigError, one line."""
    if isinstance(attn, BlockTopkAttention):
        _check_blocks(attn)
    if isinstance(reuse, AnchorReuse):
        _check_anchors(reuse, attn)
    if isinstance(reuse, SkipReuse):
        _check_skips(reuse, attn, ffn)
    if calibration is None and (needing := _calibrated(attn, ffn, moe, reuse)):
        verb = "needs" if len(needing) == 1 else "need"
        raise ConfigError(
            f"calibration=null: {' and '.join(needing)} {verb} one; make it with {CALIBRATE} and name its file"
        )


def _calibrated(attn: DenseAttention, ffn: DenseFfn, moe: DenseMoe, reuse: NoReuse) -> list[str]:
    """The settings that read a calibration, as they are typed."""
    found = []
    if isinstance(attn, BlockTopkAttention) and attn.low_share > 0:
        found.append(f"attn.low_share={attn.low_share}")
    if isinstance(ffn, QuantileFfn):
        found.append("ffn=quantile")
    if isinstance(moe, MedianRatioMoe):
        found.append("moe=median_ratio")
    if isinstance(reuse, AnchorReuse):
        if reuse.anchors in ("jaccard", "mass"):
            found.append(f"reuse.anchors={reuse.anchors}")
        if reuse.head_map:
            found.append("reuse.head_map=true")
    return found


def _check_blocks(attn: BlockTopkAttention) -> None:
    """A budget that holds the blocks that always stay."""
    fixed = attn.sinks + attn.window
    if attn.budget == "fixed" and attn.topk < fixed:
        raise ConfigError(
            f"attn.topk={attn.topk}: must be at least attn.sinks + attn.window = {fixed}, as it counts these blocks too"
        )
    least = max(1, fixed) * attn.block_size
    if attn.budget == "piecewise" and attn.l0 < least:
        raise ConfigError(
            f"attn.l0={attn.l0}: must be at least {least} tokens, the blocks of attn.sinks and attn.window "
            f"(or one block) of attn.block_size={attn.block_size}"
        )


def _check_anchors(reuse: AnchorReuse, attn: DenseAttention) -> None:
    """Anchors that have selections to pass on, and a list where one is asked for."""
    if not isinstance(attn, BlockTopkAttention):
        raise ConfigError("reuse=anchors: attn=dense selects no blocks to reuse; choose attn=block_topk or reuse=none")
    if attn.low_share > 0:
        raise ConfigError(
            f"attn.low_share={attn.low_share}: budgets per head cannot be passed on between layers; choose "
            "attn.low_share=0 or reuse=none"
        )
    typed = f"reuse.layers={show(reuse.layers)}"
    if reuse.anchors != "list":
        if reuse.layers:
            raise ConfigError(
                f"{typed}: not read with reuse.anchors={reuse.anchors}; set reuse.anchors=list or leave it []"
            )
        return
    _check_ascending("reuse.layers", reuse.layers)
    if reuse.layers[0] != attn.dense_layers:
        raise ConfigError(
            f"{typed}: must begin with {attn.dense_layers}, the first sparse layer "
            f"(attn.dense_layers={attn.dense_layers}), as it has no anchor before it"
        )


def _check_skips(reuse: SkipReuse, attn: DenseAttention, ffn: DenseFfn) -> None:
    """Something to skip, in layers that would otherwise compute it."""
    typed = f"reuse.skip={show(reuse.skip)}"
    if not reuse.skip or len(set(reuse.skip)) < len(reuse.skip):
        raise ConfigError(f"{typed}: name at least one of retrieval, channels, ffn, each once")
    _check_ascending("reuse.skip_layers", reuse.skip_layers)
    if "retrieval" in reuse.skip:
        if not isinstance(attn, BlockTopkAttention):
            raise ConfigError(f"{typed}: attn=dense has no retrieval to skip; choose attn=block_topk")
        _check_deep(reuse, "attn.dense_layers", attn.dense_layers)
    if "channels" in reuse.skip:
        if "ffn" in reuse.skip:
            raise ConfigError(f"{typed}: layers without their ffn select no channels; name one of channels, ffn")
        if not isinstance(ffn, SparseFfn):
            raise ConfigError(f"{typed}: ffn=dense selects no channels; choose ffn=topk, threshold or quantile")
        if ffn.mask == "token":
            raise ConfigError(
                f"{typed}: ffn.mask=token has no set of channels to keep; choose ffn.mask=union, root or weighted"
            )
        _check_deep(reuse, "ffn.dense_layers", ffn.dense_layers)


def _check_deep(reuse: SkipReuse, key: str, dense_layers: int) -> None:
    """At least one of the layers that skip is not a dense one anyway."""
    if reuse.skip_layers[-1] < dense_layers:
        raise ConfigError(
            f"reuse.skip_layers={show(reuse.skip_layers)}: {key}={dense_layers} makes all of them dense; "
            f"name a layer from {dense_layers} on"
        )


def _check_ascending(key: str, layers: tuple[int, ...]) -> None:
    """Layers that are named, once each and in order."""
    if not layers or list(layers) != sorted(set(layers)):
        raise ConfigError(f"{key}={show(layers)}: must be ascending layer numbers, at least one, as in [0,4,8]")
