"""python -m scripts.profile: each ablation against the library's model with the same part taken out."""

import json
import os

import numpy as np
import pytest
import torch
from torch.nn import functional

from harness.engine.model.families import adapt
from harness.engine.model.probe import Probe
from harness.engine.model.shapes import SHAPES
from harness.engine.model.step import Step
from scripts import profile, profile_figures
from sparse.budget import AttentionBudget
from tests.engine.tiny import library_model, repetitive_prompt

CONTEXT, ROWS = 203, 5
WINDOW = repetitive_prompt(CONTEXT + ROWS)
SHAPE = {
    "vocab_size": 257,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
EXPERTS = {
    "head_dim": 16,
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "moe_intermediate_size": 24,
}


def ablation(model, window=WINDOW):
    step = Step(adapt(model, packed=False, channels=True))
    return profile.Ablation(step, step.new_cache(len(window), AttentionBudget()), window, CONTEXT, 16)


def library_kl(hook):
    """KL between the library's own forwards without and with ``hook``, over the tokens of the step."""
    found = []
    for change in (None, hook):
        model = library_model("llama")
        if change is not None:
            change(model)
        with torch.inference_mode():
            found.append(model(torch.tensor([WINDOW])).logits[0, CONTEXT:].double().log_softmax(-1))
    return functional.kl_div(found[1], found[0], reduction="batchmean", log_target=True).item()


def nothing():
    return None


@pytest.fixture(scope="module")
def llama():
    return ablation(library_model("llama"))


@pytest.mark.parametrize(("layer", "head"), [(0, 5), (2, 1)])
def test_leaving_out_a_head_equals_zeroing_its_output_in_the_library(llama, layer, head):
    def hook(model):
        def zero(_, arguments):
            states = arguments[0].clone()
            states[:, CONTEXT:].unflatten(-1, (6, 8))[:, :, head] = 0
            return (states,)

        model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(zero)

    assert llama.kl(profile.WithoutHead(layer, head)) == pytest.approx(library_kl(hook), rel=1e-3)


def test_a_head_whose_output_is_zero_costs_nothing():
    model = library_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[8:] = 0
    found = profile.heads(ablation(model), adapt(library_model("llama"), packed=False).shape, nothing)
    assert (found["kl"][1, 3:] == 0).all()
    assert (found["kl"][1, :3] > 0).all() and (found["kl"][[0, 2]] > 0).all()
    assert found["far_mass"].shape == (3, 6) and 0 < found["far_mass"].min() < found["far_mass"].max() < 1


@pytest.mark.parametrize("group", [0, 2])
def test_leaving_out_channels_equals_zeroing_them_in_the_library(llama, group):
    def hook(model):
        mlp = model.model.layers[1].mlp

        def zero(_, arguments):
            gate = functional.silu(mlp.gate_proj(inputs[0]))[0, CONTEXT:]
            ranked = gate.abs().amax(0).argsort(descending=True)
            states = arguments[0].clone()
            states[:, CONTEXT:, ranked.tensor_split(3)[group]] = 0
            return (states,)

        inputs = []
        mlp.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
        mlp.down_proj.register_forward_pre_hook(zero)

    assert llama.kl(profile.WithoutChannels(1, group, 3)) == pytest.approx(library_kl(hook), rel=1e-3)


def test_leaving_out_blocks_equals_masking_them(llama):
    left_out = {layer: torch.tensor([[3, 7], [0, 5]]) + layer for layer in range(3)}
    kept = {
        layer: torch.stack([torch.tensor(sorted(set(range(12)) - set(row))) for row in blocks.tolist()])
        for layer, blocks in left_out.items()
    }

    def hook(model):
        for layer, module in enumerate(model.model.layers):
            bias = torch.full((len(WINDOW), len(WINDOW)), float("-inf")).triu(1).repeat(1, 6, 1, 1)
            for head in range(6):
                for block in left_out[layer][head // 3].tolist():
                    bias[:, head, CONTEXT:, block * 16 : block * 16 + 16] = float("-inf")
            module.self_attn.register_forward_pre_hook(
                lambda _, arguments, options, bias=bias: (arguments, {**options, "attention_mask": bias}),
                with_kwargs=True,
            )

    assert llama.kl(profile.WithoutBlocks(kept)) == pytest.approx(library_kl(hook), rel=1e-3)
    everything = dict.fromkeys(range(3), torch.arange(12).repeat(2, 1))
    assert llama.kl(profile.WithoutBlocks(everything)) < 1e-9
    assert llama.kl(Probe()) == 0


def test_block_statistics_follow_from_the_mass(llama):
    shape = adapt(library_model("llama"), packed=False).shape
    calls = []
    found = profile.blocks(llama, shape, lambda: calls.append(1))
    assert len(calls) == profile.DECILES
    for layer in range(3):
        mass = llama.watch.mass[layer].mean(1).numpy()
        assert found["on_blocks"][layer] == pytest.approx(mass.sum() / 2)
        ranked = np.sort(mass / mass.sum(1, keepdims=True), axis=1)[:, ::-1].cumsum(1)
        curve = [np.mean([np.interp(12 * share, range(13), [0, *row]) for row in ranked]) for share in profile.RANKS]
        assert found["by_rank"][layer].tolist() == pytest.approx(curve)
        fewest = [np.mean([1 + sum(value < held for value in row) for row in ranked]) / 12 for held in profile.HELD]
        assert found["holding"][layer].tolist() == pytest.approx(fewest)
        along = np.stack([np.interp(np.linspace(0, 12, 21), range(13), [0, *row.cumsum()]) for row in mass])
        placed = (np.diff(along) / mass.sum(1, keepdims=True)).mean(0)
        assert found["by_position"][layer].tolist() == pytest.approx(placed)
    assert float(found["decile_mass"].sum()) == pytest.approx(float(found["on_blocks"].mean()))
    assert found["decile_mass"][0] > found["decile_mass"][8] and (found["decile_kl"] > 0).all()


def test_leaving_out_an_expert_equals_zeroing_its_weights():
    intact, changed = library_model("qwen3_moe"), library_model("qwen3_moe")
    whole = ablation(intact)
    combine = whole.watch.combine[2]
    expert = int((combine != 0).sum(0).argmax())
    with torch.no_grad():
        changed.model.layers[2].mlp.experts.down_proj[expert] = 0
    other = Step(adapt(changed, packed=False))
    cache = whole._cache
    cache.truncate(0, CONTEXT)
    truth = other.verify(torch.tensor([WINDOW[CONTEXT:]]), cache)[0].double().log_softmax(-1)
    expected = functional.kl_div(truth, whole._intact, reduction="batchmean", log_target=True).item()
    pairs = torch.zeros_like(combine, dtype=torch.bool)
    pairs[:, expert] = True
    assert whole.kl(profile.WithoutExperts(2, pairs)) == pytest.approx(expected, rel=1e-3)
    shape = adapt(library_model("qwen3_moe"), packed=False).shape
    calls = []
    found = profile.experts(whole, shape, lambda: calls.append(1))
    assert len(calls) == 2 * (3 + 8)
    assert found["expert_kl"][1, expert] == pytest.approx(expected, rel=1e-3)
    assert ((found["expert_load"] == 0) == (found["expert_kl"] == 0)).all()
    assert found["expert_load"].sum(-1).tolist() == pytest.approx([3, 3])
    assert found["rank_weight"].sum(-1).tolist() == pytest.approx([1, 1])
    assert (found["rank_kl"] > 0).all() and (found["rank_weight"].diff(dim=-1) < 0).all()


def test_channels_of_routed_experts_are_left_out_too():
    whole = ablation(library_model("qwen3_moe"))
    shape = adapt(library_model("qwen3_moe"), packed=False).shape
    found = profile.channels(whole, shape, 4, nothing)
    assert (found["kl"] > 0).all() and (found["kl"][:, 0] > found["kl"][:, 3]).all()


@pytest.mark.parametrize("extra", [{"model_type": "llama"}, {"model_type": "qwen3_moe"} | EXPERTS])
def test_files_are_written_and_say_the_same(tmp_path, monkeypatch, capsys, extra):
    monkeypatch.setitem(SHAPES, "tiny", SHAPE | extra)
    folder = tmp_path / "out"
    arguments = ["--model=shape:tiny", "--contexts=320,170", "--windows=2", "--rows=3", "--groups=4", f"--out={folder}"]
    assert profile.main(arguments) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    stored = json.loads((folder / "profile.json").read_text())
    names = ["heads", "blocks", "channels"] + ["experts"] * (extra["model_type"] == "qwen3_moe")
    assert line["status"] == "ok" and line["contexts"] == ["170", "320"]
    assert sorted(os.listdir(folder)) == sorted(
        ["profile.json", "profile.md", *(f"{name}.{suffix}" for name in names for suffix in ("png", "pdf"))]
    )
    assert list(stored["contexts"]["170"]) == names
    assert np.shape(stored["contexts"]["170"]["heads"]["kl"]) == (2, 6)
    assert profile_figures.markdown(stored) == (folder / "profile.md").read_text()
    assert stored["windows"] == 2 and stored["identity"]["model"].startswith("tiny, all layers")


def test_means_over_windows_are_plain_numbers():
    parts = [{"heads": {"kl": torch.tensor([[1.0, 3.0]])}}, {"heads": {"kl": torch.tensor([[2.0, 4.123456]])}}]
    assert profile.mean_over(parts) == {"heads": {"kl": [[1.5, 3.5617]]}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts=1k"], "--contexts=1k: is not a list of whole numbers"),
        (["--contexts=159"], "--contexts=159: must be at least 160, 10 blocks"),
        (["--contexts=200,506"], "512 positions (valid: up to 505)"),
        (["--groups=89"], "--groups=89: the layers have 88 channels"),
        (["--windows=0"], "--windows=0: must be at least 1"),
        (["--text", "a.pdf"], "--text=a.pdf: is neither .txt nor .gz"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setitem(SHAPES, "tiny", SHAPE | {"model_type": "llama"})
    monkeypatch.chdir(tmp_path)
    assert profile.main(["--model=shape:tiny", "--contexts=200", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("profile: ") and message in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == []
