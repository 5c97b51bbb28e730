"""Carving a dense model into experts, and healing what was carved."""

import copy
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harness.engine.model import carving as module
from harness.engine.model.carving import Carving, CarvingPlan, OracleMlp, apply_carving, balanced_assignment
from harness.engine.model.healing import (
    HealedMlp,
    Healing,
    HealingPlan,
    batch_of,
    distillation_loss,
    file_sha256,
    heal,
    load_carved,
)
from harness.engine.model.loading import ModelError
from tests.engine.tiny import VOCAB, library_model

PLAN = CarvingPlan(experts=11, shared=3, active=5, rounds=2)
SIZE = 8


def sequences(count=6, length=29, seed=3):
    return torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


def small_model():
    """Activations in the range of a trained model, so that losses are smooth."""
    model = library_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for part in layer.mlp.parameters():
                part.mul_(0.3)
        model.lm_head.weight.mul_(0.2)
    return model


def carved(model, plan=PLAN, **info):
    inputs = module.collect_inputs(model, sequences())
    parts = [
        module.carve_layer(layer.mlp, hidden, plan) for layer, hidden in zip(model.model.layers, inputs, strict=True)
    ]
    stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    return Carving(**stacked, info={"base": "tiny", "base_mark": module.weights_mark(model), **info})


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def carving(model):
    return carved(model)


def test_every_channel_has_one_place_and_experts_are_equal(model, carving):
    assert carving.shared.shape == (3, 3 * SIZE) and carving.experts.shape == (3, 8, SIZE)
    for shared, experts in zip(carving.shared, carving.experts, strict=True):
        assert torch.cat([shared, experts.flatten()]).sort().values.tolist() == list(range(88))
    again = carved(model)
    assert torch.equal(carving.experts, again.experts) and torch.equal(carving.router_weight, again.router_weight)


def test_the_strongest_channels_are_shared(model, carving):
    inputs = module.collect_inputs(model, sequences())
    for layer, hidden, shared in zip(model.model.layers, inputs, carving.shared, strict=True):
        mlp = layer.mlp
        added = (F.silu(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)).unsqueeze(-1) * mlp.down_proj.weight.T
        energy = added.double().square().sum(-1).mean(0)
        idle = torch.ones(88, dtype=torch.bool)
        idle[shared] = False
        assert energy[shared].min() >= energy[idle].max() * (1 - 1e-6)


def test_inputs_are_those_of_each_ffn(model):
    inputs = module.collect_inputs(model, sequences(), batch=4)
    hidden = model.model(sequences(), output_hidden_states=True).hidden_states
    assert [part.shape for part in inputs] == [(6 * 29, 48)] * 3
    layer = model.model.layers[0]
    position = model.model.rotary_emb(hidden[0], torch.arange(29)[None])
    attended = hidden[0] + layer.self_attn(layer.input_layernorm(hidden[0]), position, None)[0]
    expected = layer.post_attention_layernorm(attended)
    torch.testing.assert_close(inputs[0], expected.flatten(0, 1), rtol=1e-4, atol=1e-4)
    assert not any(layer.mlp._forward_pre_hooks for layer in model.model.layers)


@pytest.mark.parametrize("rows, columns, capacity", [(12, 3, 4), (13, 5, 3), (7, 1, 7)])
def test_assignment_keeps_capacities_and_takes_the_best_pair_first(rows, columns, capacity):
    scores = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    owner = balanced_assignment(scores, capacity)
    expected, room = {}, [capacity] * columns
    while len(expected) < rows:
        pairs = [
            (scores[r, c].item(), r, c) for r in range(rows) if r not in expected for c in range(columns) if room[c]
        ]
        _, row, column = max(pairs)
        expected[row] = column
        room[column] -= 1
    assert owner.tolist() == [expected[row] for row in range(rows)]


@pytest.mark.parametrize("kind", [module.CarvedMlp, OracleMlp])
def test_all_experts_active_is_the_dense_model(model, carving, kind):
    ids = sequences(2, seed=9)
    dense = model(ids).logits
    with torch.inference_mode():
        whole = apply_carving(copy.deepcopy(model), carving, 8, kind)(ids).logits
        part = apply_carving(copy.deepcopy(model), carving, 5, kind)(ids).logits
    torch.testing.assert_close(whole, dense, rtol=1e-5, atol=1e-5)
    assert (part - dense).abs().max() > 1e-2


@pytest.mark.parametrize("active", [1, 5, 7])
def test_idle_experts_and_only_those_are_dropped(model, carving, active):
    dense = model.model.layers[1].mlp
    mlp = apply_carving(copy.deepcopy(model), carving, active).model.layers[1].mlp
    hidden = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(active))
    found = mlp(hidden)
    for row, output in zip(hidden.flatten(0, 1), found.flatten(0, 1), strict=True):
        logits = carving.router_weight[1] @ row + carving.router_bias[1]
        best = sorted(range(8), key=lambda expert: -logits[expert].item())[:active]
        kept = torch.cat([carving.shared[1], *(carving.experts[1, expert] for expert in best)])
        gate, up = F.linear(row, dense.gate_proj.weight[kept]), F.linear(row, dense.up_proj.weight[kept])
        expected = F.linear(F.silu(gate) * up, dense.down_proj.weight[:, kept])
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_the_oracle_ranks_by_what_the_experts_add(model, carving):
    mlp = apply_carving(copy.deepcopy(model), carving, 2, OracleMlp).model.layers[0].mlp
    hidden = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))
    activations = F.silu(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)
    for row, ranks in zip(activations, mlp.rank(hidden, activations), strict=True):
        for expert, found in zip(carving.experts[0], ranks, strict=True):
            added = mlp.down_proj.weight[:, expert] * row[expert]
            torch.testing.assert_close(found, added.square().sum(), rtol=1e-4, atol=1e-6)


def planted(groups=5, size=6, tokens=600):
    """An FFN in which tokens of one cluster fire the channels of one group, channels in random order."""
    generator = torch.Generator().manual_seed(5)
    centres = torch.eye(groups) * 4
    cluster = torch.randint(0, groups, (tokens,), generator=generator)
    hidden = centres[cluster] + torch.randn(tokens, groups, generator=generator) * 0.3
    group = torch.arange(groups).repeat_interleave(size)[torch.randperm(groups * size, generator=generator)]
    mlp = SimpleNamespace(
        *[], **{name: nn.Linear(groups, groups * size, bias=False) for name in ("gate_proj", "up_proj")}
    )
    mlp.down_proj = nn.Linear(groups * size, groups, bias=False)
    with torch.no_grad():
        for part in (mlp.gate_proj, mlp.up_proj):
            part.weight.copy_(F.one_hot(group, groups) * (0.5 + torch.rand(groups * size, 1, generator=generator)))
        mlp.down_proj.weight.copy_(torch.randn(groups, groups * size, generator=generator))
    return mlp, hidden, cluster, group


@pytest.mark.parametrize("rounds", [0, 3])
def test_a_planted_structure_is_found(rounds):
    mlp, hidden, cluster, group = planted()
    parts = module.carve_layer(mlp, hidden[:400], CarvingPlan(experts=5, shared=0, active=1, rounds=rounds))
    assert parts["shared"].shape == (0,)
    owners = [set(group[expert].tolist()) for expert in parts["experts"]]
    assert all(len(owner) == 1 for owner in owners) and set.union(*owners) == set(range(5))
    routed = (hidden[400:] @ parts["router_weight"].T + parts["router_bias"]).argmax(-1)
    right = [owners[expert] == {wanted} for expert, wanted in zip(routed.tolist(), cluster[400:].tolist(), strict=True)]
    assert sum(right) / len(right) > 0.95


def test_a_carving_goes_to_disk_and_back(carving, tmp_path):
    path = tmp_path / "new" / "carving.safetensors"
    carving.save(path)
    again = Carving.load(path)
    for field in dataclasses.fields(Carving)[:-1]:
        stored, kept = getattr(again, field.name), getattr(carving, field.name)
        assert stored.dtype == kept.dtype and torch.equal(stored, kept)
    assert again.info == {"version": 1, "kind": "carving", **carving.info}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def refused(call, *words):
    with pytest.raises(ModelError) as raised:
        call()
    text = str(raised.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_missing_and_damaged_files_are_refused(carving, tmp_path):
    path = tmp_path / "carving.safetensors"
    load = lambda: Carving.load(path)  # noqa: E731
    refused(load, str(path), "no such file", "python -m scripts.carve_moe")
    carving.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    refused(load, str(path), "cannot be read", "python -m scripts.carve_moe")
    path.write_bytes(b"")
    refused(load, "cannot be read")
    dataclasses.replace(carving, info={"version": 99}).save(path)
    refused(load, "version 99")
    module.write_tensors(path, {"shared": carving.shared}, {"kind": "carving"})
    refused(load, "missing or damaged", "python -m scripts.carve_moe")
    twice = carving.experts.clone()
    twice[2, 0, 0] = twice[2, 1, 0]
    dataclasses.replace(carving, experts=twice).save(path)
    refused(load, "no partition")
    dataclasses.replace(carving, router_bias=carving.router_bias[:, :-1]).save(path)
    refused(load, "no partition")
    refused(lambda: Healing.load(path), "healing", "carving")


def test_a_carving_fits_its_own_weights_alone(model, carving):
    refused(lambda: apply_carving(library_model("llama", num_hidden_layers=2), carving, 5), "layers", "(2, 88, 48)")
    refused(lambda: apply_carving(library_model("llama", seed=1), carving, 5), "other weights", "tiny")
    for active in (0, 9):
        refused(lambda active=active: apply_carving(copy.deepcopy(model), carving, active), f"active={active}")
    for dtype in (torch.bfloat16, torch.float16):
        found = apply_carving(copy.deepcopy(model).to(dtype), carving, 5)
        assert found.model.layers[0].mlp.router.weight.dtype == dtype


@pytest.mark.parametrize(
    "change, word", [({"experts": 7}, "--exp"), ({"shared": 11}, "--sha"), ({"active": 9}, "--act")]
)
def test_sizes_that_do_not_fit_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        dataclasses.replace(PLAN, **change).check(88)


HEALING = HealingPlan(steps=8, lr=5e-3, rank=3, batch=2, save_every=3)


def run_healing(model, carving, state, plan=HEALING, stop=None, identity="tiny"):
    """A healing on random text; a break after ``stop`` steps."""
    losses = []

    def report(done, loss):
        losses.append(loss)
        if done == stop:
            raise KeyboardInterrupt

    student = apply_carving(copy.deepcopy(model), carving, 5)
    return student, heal(student, model, sequences(5), plan, state, identity, report), losses


def test_healing_lowers_the_loss_and_merges_exactly(model, carving, tmp_path):
    before = distillation_loss(apply_carving(copy.deepcopy(model), carving, 5), model, sequences(5)).item()
    plan = dataclasses.replace(HEALING, steps=40)
    student, adapters, losses = run_healing(model, carving, tmp_path / "state.pt", plan)
    with torch.inference_mode():
        after = distillation_loss(student, model, sequences(5)).item()
        merged = adapters.merge(apply_carving(copy.deepcopy(model), carving, 5))
        assert all(type(layer.mlp) is module.CarvedMlp for layer in merged.model.layers)
        torch.testing.assert_close(merged(sequences(2)).logits, student(sequences(2)).logits, rtol=1e-4, atol=1e-4)
    assert after < 0.7 * before and len(losses) == 40
    assert (adapters.tensors["router_weight"] != carving.router_weight).any(-1).all()
    assert (adapters.tensors["scales"] != 1).all()


def test_healing_starts_as_a_no_op_and_reaches_idle_experts(model, carving):
    mlp = apply_carving(copy.deepcopy(model), carving, 5).model.layers[1].mlp.requires_grad_(False)
    trained = HealedMlp(mlp, 3, torch.Generator().manual_seed(0))
    hidden = torch.randn(4, 48, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(trained(hidden), mlp(hidden), rtol=1e-6, atol=1e-6)
    trained(hidden[:1]).square().sum().backward()
    assert (trained.router_bias.grad != 0).all() and mlp.gate_proj.weight.grad is None
    idle = trained.mlp.rank(hidden[:1], hidden).topk(3, largest=False).indices
    assert (trained.scales.grad[idle] == 0).all()


def test_an_interrupted_healing_ends_where_one_without_a_break_ends(model, carving, tmp_path):
    _, whole, losses = run_healing(model, carving, tmp_path / "whole.pt")
    state = tmp_path / "broken.pt"
    with pytest.raises(KeyboardInterrupt):
        run_healing(model, carving, state, stop=5)
    _, resumed, later = run_healing(model, carving, state)
    assert len(later) == 5 and later == losses[3:]
    assert all(torch.equal(resumed.tensors[name], whole.tensors[name]) for name in whole.tensors)
    _, finished, none = run_healing(model, carving, state)
    assert none == [] and finished.info == whole.info
    assert torch.equal(finished.tensors["up_b"], whole.tensors["up_b"])


def test_a_state_of_something_else_is_refused(model, carving, tmp_path):
    state = tmp_path / "state.pt"
    short = dataclasses.replace(HEALING, steps=1)
    run_healing(model, carving, state, short)
    refused(lambda: run_healing(model, carving, state, dataclasses.replace(short, rank=2)), str(state), "remove it")
    refused(lambda: run_healing(model, carving, state, short, identity="other"), "remove it")
    state.write_bytes(b"no state")
    refused(lambda: run_healing(model, carving, state, short), "cannot be read")


def test_batches_pass_through_the_text_in_changing_orders():
    plan = dataclasses.replace(HEALING, batch=3)
    order = torch.cat([batch_of(step, 7, plan) for step in range(14)]).view(6, 7)
    assert all(sorted(row.tolist()) == list(range(7)) for row in order)
    assert len({tuple(row.tolist()) for row in order}) > 1
    assert torch.equal(batch_of(4, 7, plan), batch_of(4, 7, plan))


def test_loading_takes_carvings_and_healed_files(model, carving, tmp_path, monkeypatch):
    base, path, healed = tmp_path / "base", tmp_path / "carving.safetensors", tmp_path / "healed.safetensors"
    model.save_pretrained(base)
    carving.save(path)

    def load(path, active=5):
        return load_carved(path, active, torch.float32, torch.device("cpu"), str(base))

    _, adapters, _ = run_healing(model, carving, tmp_path / "state.pt")
    adapters.info.update(carving=path.name, carving_sha256=file_sha256(path))
    adapters.save(healed)
    ids = sequences(2, seed=4)
    with torch.inference_mode():
        plain = apply_carving(copy.deepcopy(model), carving, 5)
        assert torch.equal(load(str(path))(ids).logits, plain(ids).logits)
        assert torch.equal(load(str(healed))(ids).logits, adapters.merge(plain)(ids).logits)
    monkeypatch.setenv("SPARSE_VERIFICATION_CACHE", str(tmp_path / "cache"))
    refused(lambda: load(None), "carved_moe", "no such file")
    carving.save(module.default_path())
    assert load(None, 2).model.layers[0].mlp.top_k == 2
    dataclasses.replace(carving, info={**carving.info, "text": "another"}).save(path)
    refused(lambda: load(str(healed)), "has changed", "--heal")
    path.unlink()
    refused(lambda: load(str(healed)), "no such file")


def test_info_is_json(carving):
    assert json.loads(json.dumps(carving.info)) == carving.info
