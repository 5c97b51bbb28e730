"""From settings to budgets: every choice, every refusal that needs the model, and what must have run."""

import dataclasses
import itertools
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness import schema_sparsity
from harness.budgets import check_lengths, required_paths, sparsity
from harness.calibration import Calibration
from harness.engine.model.carving import CarvingPlan
from harness.fields import ConfigError, fields_of
from harness.schema import GROUPS, CarvedModelConfig, Config, resolve
from sparse import budget as known
from sparse.budget import AttentionBudget, FfnBudget, MoeBudget, ReuseBudget, Sparsity
from sparse.cost import ModelShape

Compose = Callable[..., dict[str, Any]]
ROOT = Path(__file__).resolve().parents[2]
LAYERS, HEADS, FFN = 6, 2, 96
SMOLLM2 = ModelShape(30, 576, 9, 3, 64, 1536, 49152, 2)
DENSE = ModelShape(LAYERS, 64, 4, HEADS, 16, FFN, 256, 2)
MOE = dataclasses.replace(DENSE, experts=16, top_k=4, expert_ffn=12, shared_ffn=24, moe_layers=LAYERS)
DEFAULT = AttentionBudget(topk=16)
QUANTILES = {"0.25": (0.25,) * LAYERS, "0.75": (0.75, 1.25, 1.75, 2.25, 2.75, 3.25)}
SIMILAR = tuple(tuple(1.0 if a // 2 == b // 2 else 0.4 for b in range(LAYERS)) for a in range(LAYERS))
RECOVERED = tuple(tuple(1.0 if a // 3 == b // 3 else 0.4 for b in range(LAYERS)) for a in range(LAYERS))
SWAPPED = (1, 0)
CALIBRATION = Calibration(
    identity={"model": "tiny"},
    text_sha256="",
    tokens=1,
    layers=LAYERS,
    kv_heads=HEADS,
    block_size=16,
    topk=4,
    jaccard=SIMILAR,
    recovered_mass=RECOVERED,
    head_map=((SWAPPED,) * LAYERS,) * LAYERS,
    head_contribution=tuple((float(layer), 0.5) for layer in range(LAYERS)),
    ffn_quantiles=QUANTILES,
    moe_beta=((0.1, 0.2, 0.3),) * LAYERS,
    path="tiny.json",
)
THRESHOLDS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
BETAS = ((0.1, 0.2, 0.3),) * LAYERS


def budgets(compose: Compose, *overrides: str, shape: ModelShape = DENSE) -> Sparsity:
    return sparsity(resolve(compose("calibration=tiny.json", *overrides)), shape, CALIBRATION)


def anchored(*anchors: int, heads: tuple[tuple[int, ...], ...] = ()) -> Sparsity:
    return Sparsity(DEFAULT, reuse=ReuseBudget(anchors, heads))


def ffn(**changes: Any) -> Sparsity:
    return Sparsity(ffn=FfnBudget(**changes))


def moe(**changes: Any) -> Sparsity:
    return Sparsity(moe=MoeBudget(**changes))


CHOICES: list[tuple[str, Sparsity]] = [
    ("attn=block_topk", Sparsity(DEFAULT)),
    ("attn.budget=piecewise attn.l0=64 attn.rho=0.5", Sparsity(AttentionBudget(l0=64, rho=0.5))),
    (
        "attn.topk=9 attn.block_size=32 attn.sinks=2 attn.window=3 attn.dense_layers=1 attn.score=bound "
        "attn.query=weighted attn.survival=0.5 attn.gqa=max attn.heads=pooled",
        Sparsity(
            AttentionBudget(
                topk=9,
                block_size=32,
                sinks=2,
                window=3,
                dense_layers=1,
                score="bound",
                query="weighted",
                survival=0.5,
                gqa="max",
                heads="pooled",
            )
        ),
    ),
    ("attn.score=oracle", Sparsity(AttentionBudget(topk=16, score="oracle"))),
    ("attn.low_share=0.25", Sparsity(AttentionBudget(topk=16, low_heads=((0, 0), (0, 1), (1, 1))))),
    ("attn=dense ffn=topk ffn.keep=0.25", ffn(rule="topk", keep=0.25)),
    (
        "attn=dense ffn=topk ffn.keep=0.5 ffn.mask=weighted ffn.survival=0.9 ffn.dense_layers=5",
        ffn(rule="topk", keep=0.5, mask="weighted", survival=0.9, dense_layers=5),
    ),
    ("attn=dense ffn=threshold ffn.tau=0.1 ffn.mask=token", ffn(rule="threshold", tau=0.1, mask="token")),
    (
        "attn=dense ffn=quantile ffn.sparsity=0.5 ffn.mask=root",
        ffn(rule="quantile", thresholds=THRESHOLDS, mask="root"),
    ),
    ("attn=dense moe=union moe.union=7 moe.outside=drop", moe(union=7, outside="drop")),
    (
        "attn=dense moe=median_ratio moe.m_max=2 moe.free_loaded=true moe.survival=0.4",
        moe(rule="median_ratio", m_max=2, betas=BETAS, free_loaded=True, survival=0.4),
    ),
    ("attn=dense moe=topk moe.k=3 moe.union=9", moe(rule="topk", k=3, union=9)),
    ("attn=dense moe=topp moe.p=0.8", moe(rule="topp", p=0.8)),
    ("attn=dense moe=floor moe.weight_floor=0.1", moe(rule="floor", weight_floor=0.1)),
    ("reuse=anchors reuse.every=4", anchored(0, 4)),
    ("reuse=anchors reuse.every=40", anchored(0)),
    ("reuse=anchors reuse.anchors=list reuse.layers=[0,5]", anchored(0, 5)),
    ("reuse=anchors reuse.anchors=jaccard", anchored(0, 2, 4)),
    ("reuse=anchors reuse.anchors=jaccard reuse.theta=0.3", anchored(0)),
    (
        "reuse=anchors reuse.anchors=mass reuse.head_map=true",
        anchored(0, 3, heads=((0, 1), SWAPPED, SWAPPED, (0, 1), SWAPPED, SWAPPED)),
    ),
    (
        "reuse=anchors reuse.every=3 attn.dense_layers=2",
        Sparsity(AttentionBudget(topk=16, dense_layers=2), reuse=ReuseBudget((2, 5))),
    ),
    (
        "reuse=skips reuse.skip_layers=[1,5] reuse.refresh=7",
        Sparsity(DEFAULT, reuse=ReuseBudget(skip=("retrieval",), skip_layers=(1, 5), refresh=7)),
    ),
    (
        "attn=dense reuse=skips reuse.skip=[ffn] reuse.skip_layers=[2]",
        Sparsity(reuse=ReuseBudget(skip=("ffn",), skip_layers=(2,))),
    ),
]


@pytest.mark.parametrize(("overrides", "wanted"), CHOICES, ids=lambda value: value if isinstance(value, str) else "")
def test_every_choice_becomes_its_budget(compose: Compose, overrides: str, wanted: Sparsity) -> None:
    found = budgets(compose, *overrides.split(), shape=MOE if "moe=" in overrides else DENSE)
    assert found == wanted and not found.is_dense and required_paths(found)


def test_the_list_above_names_every_choice() -> None:
    for group in ("attn", "ffn", "moe", "reuse"):
        choices = set(GROUPS[group][1]) - {"dense", "none"}
        assert choices == {choice for choice in choices if any(f"{group}={choice}" in row for row, _ in CHOICES)}


def test_dense_groups_are_the_no_op(compose: Compose) -> None:
    for shape in (DENSE, MOE):
        found = sparsity(resolve(compose("attn=dense", "arms=[ar,dense]")), shape, None)
        assert found == Sparsity() and found.is_dense and required_paths(found) == []


def test_settings_know_the_values_that_budgets_know() -> None:
    values = {
        (cls.__name__, name): metadata["choices"]
        for cls in vars(schema_sparsity).values()
        if isinstance(cls, type) and dataclasses.is_dataclass(cls)
        for name, _, metadata in fields_of(cls)
    }
    pairs = {
        ("BlockTopkAttention", "block_size"): known.BLOCK_SIZES,
        ("BlockTopkAttention", "score"): known.SCORES,
        ("BlockTopkAttention", "query"): known.QUERIES,
        ("BlockTopkAttention", "gqa"): known.REDUCTIONS,
        ("BlockTopkAttention", "heads"): known.HEAD_BUDGETS,
        ("SparseFfn", "mask"): known.FFN_MASKS,
        ("SparseMoe", "outside"): known.OUTSIDE,
        ("SkipReuse", "skip"): known.SKIPS,
    }
    for place, theirs in pairs.items():
        assert set(typing.cast(tuple[Any, ...], values[place])) == set(theirs), place
    assert set(GROUPS["ffn"][1]) == set(known.FFN_RULES)
    assert set(GROUPS["moe"][1]) - {"union"} == set(known.MOE_RULES)


BAD: list[tuple[str, ModelShape, list[str]]] = [
    ("attn.dense_layers=6", DENSE, ["attn.dense_layers=6", "6 layers"]),
    ("attn.low_share=0.08", DENSE, ["attn.low_share=0.08", "12 KV heads", "0.0833"]),
    ("attn.low_share=0.5 attn.block_size=32", DENSE, ["calibration=tiny.json", "blocks of 16", "attn.block_size=32"]),
    ("reuse=anchors reuse.head_map=true attn.block_size=64", DENSE, ["blocks of 16", "--block-size 64"]),
    ("ffn=topk ffn.dense_layers=7", DENSE, ["ffn.dense_layers=7", "6 layers"]),
    ("ffn=topk ffn.keep=0.995", DENSE, ["ffn.keep=0.995", "all 96 channels", "at most 0.9896"]),
    ("ffn=topk ffn.keep=0.98", MOE, ["ffn.keep=0.98", "all 24 channels"]),
    ("ffn=quantile ffn.sparsity=0.8", DENSE, ["ffn.sparsity=0.8", "calibration=tiny.json", "0.25 to 0.75"]),
    ("moe=union", DENSE, ["moe=union", "no experts", "moe=dense", "carved_moe, mixtral_8x7b"]),
    ("moe=median_ratio", DENSE, ["moe=median_ratio", "no experts"]),
    ("moe=topk moe.k=1", DENSE, ["moe=topk", "no experts"]),
    ("moe=union moe.union=16", MOE, ["moe.union=16", "16 routed experts"]),
    ("moe=topp moe.union=17", MOE, ["moe.union=17", "16 routed experts"]),
    ("moe=topk moe.k=4", MOE, ["moe.k=4", "picks 4 experts", "below 4"]),
    ("moe=median_ratio moe.m_max=4", MOE, ["moe.m_max=4", "picks 4 experts", "below 4"]),
    (
        "moe=median_ratio moe.m_max=4",
        dataclasses.replace(MOE, top_k=8),
        ["moe.m_max=4", "calibration=tiny.json", "up to 3"],
    ),
    ("reuse=anchors reuse.anchors=list reuse.layers=[0,6]", DENSE, ["reuse.layers=[0,6]", "layers 0 to 5"]),
    ("reuse=anchors reuse.anchors=list reuse.layers=[0,1,2,3,4,5]", DENSE, ["reuse.layers=[0,1,2,3,4,5]", "nothing"]),
    ("reuse=anchors reuse.anchors=jaccard reuse.theta=1 attn.dense_layers=5", DENSE, ["reuse.theta=1.0", "lower"]),
    ("reuse=anchors attn.dense_layers=5", DENSE, ["reuse.every=2", "every sparse layer from 5 to 5"]),
    ("reuse=skips reuse.skip_layers=[2,6]", DENSE, ["reuse.skip_layers=[2,6]", "layers 0 to 5"]),
    ("reuse=skips reuse.skip=[channels] reuse.skip_layers=[2] ffn=topk", MOE, ["reuse.skip=[channels]", "experts"]),
    ("ffn=quantile", dataclasses.replace(DENSE, layers=7), ["calibration=tiny.json", "6 layers", "has 7 of 2"]),
    ("attn.low_share=0.5", dataclasses.replace(DENSE, kv_heads=4), ["calibration=tiny.json", "has 6 of 4"]),
]


@pytest.mark.parametrize(
    ("overrides", "shape", "words"), BAD, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_does_not_fit_the_model_is_refused(
    compose: Compose, overrides: str, shape: ModelShape, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        budgets(compose, *overrides.split(), shape=shape)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_a_calibration_is_needed_where_it_is_read(compose: Compose) -> None:
    readers = ["attn.low_share=0.5", "ffn=quantile", "moe=median_ratio", "reuse.anchors=mass", "reuse.head_map=true"]
    for reader in readers:
        overrides = ["reuse=anchors", reader] if reader.startswith("reuse.") else [reader]
        config = resolve(compose("calibration=tiny.json", *overrides))
        with pytest.raises(ConfigError, match=r"^calibration=null: .* needs one; .*python -m scripts.calibrate"):
            sparsity(config, MOE, None)
    zeros = dataclasses.replace(CALIBRATION, ffn_quantiles={"0.1": (1.0, *(0.0,) * 5), "0.9": (1.0, *(0.0,) * 5)})
    quantile = ["calibration=tiny.json", "ffn=quantile"]
    assert sparsity(resolve(compose(*quantile)), DENSE, zeros).ffn.threshold(0) == 1.0
    with pytest.raises(ConfigError, match=r"^calibration=tiny.json: every threshold for ffn=quantile is 0"):
        sparsity(resolve(compose(*quantile, "ffn.dense_layers=1")), DENSE, zeros)
    bare = dataclasses.replace(CALIBRATION, moe_beta=None)
    with pytest.raises(ConfigError, match=r"^calibration=tiny.json: holds no moe_beta"):
        sparsity(resolve(compose("calibration=tiny.json", "moe=median_ratio")), MOE, bare)


def test_the_edges_of_what_fits(compose: Compose) -> None:
    assert budgets(compose, "attn.dense_layers=5").attention.dense_layers == 5
    assert budgets(compose, "ffn=topk", "ffn.keep=0.99").ffn.channels(FFN) == FFN - 1
    assert budgets(compose, "moe=union", "moe.union=15", shape=MOE).moe.union == 15
    assert budgets(compose, "reuse=skips", "reuse.skip_layers=[5]").reuse.skip_layers == (5,)
    mixed = dataclasses.replace(MOE, moe_layers=LAYERS - 1)
    overrides = ["ffn=topk", "reuse=skips", "reuse.skip=[channels]", "reuse.skip_layers=[0]"]
    assert budgets(compose, *overrides, shape=mixed).reuse.skips("channels", 0)
    assert budgets(compose, "ffn=topk", "ffn.keep=0.98", shape=mixed).ffn.channels(FFN) == 94, "dense layers drop some"


def test_experiments_fit_their_model(compose: Compose) -> None:
    carving, carved = CarvingPlan(), dataclasses.replace(SMOLLM2, moe_layers=30)
    carved = dataclasses.replace(carved, experts=carving.experts - carving.shared, top_k=carving.active, expert_ffn=96)
    for file in sorted((ROOT / "conf" / "experiment").glob("*.yaml")):
        params = yaml.safe_load(file.read_text()).get("hydra", {}).get("sweeper", {}).get("params", {})
        swept = [[f"{key}={value}" for value in str(values).split(",")] for key, values in params.items()]
        for member in itertools.product(*swept):
            config = resolve(compose(f"experiment={file.stem}", *member))
            on_experts = isinstance(config.model, CarvedModelConfig)
            assert not on_experts or config.model.active == carving.active
            assert not sparsity(config, carved if on_experts else SMOLLM2, None).is_dense, member


def test_required_paths_name_every_mechanism() -> None:
    everything = Sparsity(
        DEFAULT,
        FfnBudget(rule="topk", keep=0.5),
        MoeBudget(union=2),
        ReuseBudget(skip=("retrieval", "channels"), skip_layers=(1,)),
    )
    assert required_paths(everything) == [
        "block_attention",
        "sparse_ffn",
        "ffn.channels_dropped",
        "moe.",
        "experts.restricted",
        "reuse.skip_retrieval",
        "reuse.skip_channels",
    ]
    low = Sparsity(AttentionBudget(topk=16, low_heads=((0, 0),)))
    assert required_paths(low) == ["block_attention", "select.low_heads"]
    assert required_paths(anchored(0, 2)) == ["block_attention", "reuse.anchor"]
    assert required_paths(Sparsity(reuse=ReuseBudget(skip=("ffn",), skip_layers=(1,)))) == ["reuse.skip_ffn"]
    assert required_paths(Sparsity(reuse=ReuseBudget(skip=("ffn",)))) == []


def lengths(config: Config, budget: AttentionBudget, capacity: int) -> str:
    """The refusal of a capacity, empty where it is taken."""
    try:
        check_lengths(config, budget, capacity)
    except ConfigError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


def test_budgets_that_cover_every_context_are_refused(compose: Compose) -> None:
    config, fixed, piecewise = resolve(compose()), AttentionBudget(topk=4), AttentionBudget(l0=64, rho=0.9)
    assert "attn.topk=4" in lengths(config, fixed, 80) and "fills 4 blocks of 16" in lengths(config, fixed, 80)
    assert lengths(config, fixed, 81) == "", "the last step may begin after 80 positions, 5 whole blocks"
    assert "attn.l0=64" in lengths(config, piecewise, 80) and "valid: below 64" in lengths(config, piecewise, 80)
    assert lengths(config, piecewise, 81) == ""
    assert lengths(config, AttentionBudget(), 5) == ""
    assert "attn.topk=4" in lengths(config, AttentionBudget(topk=4, dense_layers=3), 1)
    without = resolve(compose("arms=[ar,dense]"))
    assert lengths(without, fixed, 80) == "" and lengths(without, piecewise, 1) == ""


@pytest.mark.parametrize("budget", [AttentionBudget(topk=3, block_size=32), AttentionBudget(l0=50, rho=0.7)], ids=str)
def test_lengths_are_refused_where_no_step_skips(compose: Compose, budget: AttentionBudget) -> None:
    config = resolve(compose())
    for capacity in range(1, 200):
        skips = any(budget.skips(0, start) for start in range(capacity))
        assert (lengths(config, budget, capacity) == "") == skips, capacity
