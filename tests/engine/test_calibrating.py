"""The calibration tables against slow direct computations from the recorded queries, keys and library modules."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from harness.engine.cache import PAGE
from harness.engine.calibrating import EVERY_CHANNEL, SHARES, Calibrator, Sample, calibrate
from harness.engine.model.families import adapt, model_shape
from harness.engine.model.probe import AttentionView, Probe
from harness.engine.model.step import Step
from harness.engine.model.verification import Verification
from sparse.budget import AttentionBudget, Sparsity
from sparse.scoring import summarise_blocks
from tests.engine.tiny import library_model, repetitive_prompt

BUDGET = AttentionBudget(topk=4, block_size=16)
CONTEXT, ROWS, STEPS = 203, 5, 3
WINDOWS = [repetitive_prompt(CONTEXT + ROWS * STEPS, seed) for seed in (1, 2)]


class Recorder(Probe):
    """Queries and plain keys of every step and layer."""

    def __init__(self):
        self.seen = []

    def selection(self, layer, view, selection):
        plain = view.keys.permute(1, 0, 3, 2).reshape(view.keys.shape[1], -1, view.keys.shape[2])[:, : view.length]
        self.seen.append((layer, view.queries.double(), plain.double(), view.start, view.groups))
        return selection


def steps_of(family, **changes):
    step = Step(adapt(library_model(family, **changes), packed=False, channels=True))
    return step, step.new_cache(CONTEXT + ROWS * STEPS, BUDGET)


def recorded(step, cache):
    """Per step a list over layers of (chosen sets per head, mass [kv_heads, blocks], mass in blocks and outside)."""
    recorder = Recorder()
    for window in WINDOWS:
        tokens = torch.tensor(window)
        cache.truncate(0, 0)
        step.prefill(tokens[:CONTEXT], cache, 64)
        run = Verification(probe=recorder)
        for part in torch.split(tokens[CONTEXT:], ROWS):
            step.verify(part[None], cache, run)
    layers = step.weights.shape.layers
    return [
        [_layer(*seen[1:]) for seen in recorder.seen[at : at + layers]] for at in range(0, len(recorder.seen), layers)
    ]


def _layer(queries, keys, start, groups):
    heads, size, whole = keys.shape[0], BUDGET.block_size, start // BUDGET.block_size
    sets, mass = [], np.zeros((heads, whole))
    for head in range(heads):
        root = queries[head, :groups]
        scores = [
            np.mean([float(q @ keys[head, b * size : (b + 1) * size].mean(0)) for q in root]) for b in range(whole)
        ]
        free = sorted(range(1, whole - 1), key=lambda b: -scores[b])
        sets.append({0, whole - 1, *free[: BUDGET.topk - 2]})
        for number, query in enumerate(queries[head]):
            weights = (keys[head, : start + number // groups + 1] @ query).softmax(0)
            for block in range(whole):
                mass[head, block] += float(weights[block * size : (block + 1) * size].sum()) / len(queries[head])
    return sets, mass


def sees(mass, head, chosen):
    return 1 - mass[head].sum() + sum(mass[head][block] for block in chosen)


@pytest.fixture(scope="module")
def llama():
    step, cache = steps_of("llama")
    return calibrate(step, cache, WINDOWS, BUDGET, context=CONTEXT, rows=ROWS, chunk=64), recorded(step, cache)


def test_jaccard_is_the_mean_over_steps_and_heads_of_the_root_selections(llama):
    tables, steps = llama
    assert len(steps) == len(WINDOWS) * STEPS
    for first in range(3):
        for second in range(3):
            shares = [len(a & b) / len(a | b) for s in steps for a, b in zip(s[first][0], s[second][0], strict=True)]
            assert tables.jaccard[first][second] == pytest.approx(np.mean(shares), abs=1e-12)
    assert 0 < tables.jaccard[0][2] < 1 and tables.jaccard[1][1] == 1


def test_recovered_mass_and_head_map_follow_from_the_naive_softmax(llama):
    tables, steps = llama
    for layer in range(3):
        own = sum(sees(s[layer][1], head, s[layer][0][head]) for s in steps for head in range(2))
        for anchor in range(3):
            taken = sum(sees(s[layer][1], head, s[anchor][0][head]) for s in steps for head in range(2))
            assert tables.recovered_mass[anchor][layer] == pytest.approx(taken / own, rel=1e-5)
            for head in range(2):
                totals = [sum(sees(s[layer][1], head, s[anchor][0][other]) for s in steps) for other in range(2)]
                assert tables.head_map[layer][anchor][head] == int(np.argmax(totals))
    assert tables.recovered_mass[0][2] != pytest.approx(tables.recovered_mass[2][0], rel=1e-3)


def test_head_contribution_is_the_mass_between_sink_and_window(llama):
    tables, steps = llama
    for layer in range(3):
        for head in range(2):
            expected = np.mean([s[layer][1][head][1:-1].sum() for s in steps])
            assert tables.head_contribution[layer][head] == pytest.approx(expected, rel=1e-5)


def test_gate_quantiles_equal_those_of_the_library_modules(llama):
    library, found = library_model("llama"), {}
    for number, layer in enumerate(library.model.layers):
        layer.mlp.gate_proj.register_forward_hook(
            lambda _, __, output, number=number: found.setdefault(number, []).append(output[0, CONTEXT:])
        )
    with torch.inference_mode():
        for window in WINDOWS:
            library(torch.tensor([window]))
    for number in range(3):
        magnitudes = functional.silu(torch.cat(found[number])).abs().double().numpy()
        expected = np.quantile(magnitudes, SHARES)
        assert [llama[0].ffn_quantiles[str(share)][number] for share in SHARES] == pytest.approx(expected, rel=2e-3)
    assert llama[0].moe_beta is None


def test_betas_are_medians_of_the_lowest_routing_weights_and_zero_in_dense_layers():
    step, cache = steps_of("qwen3_moe")
    tables = calibrate(step, cache, WINDOWS, BUDGET, context=CONTEXT, rows=ROWS, chunk=64)
    library, inputs = library_model("qwen3_moe"), {0: [], 2: []}
    for number, kept in inputs.items():
        library.model.layers[number].mlp.register_forward_pre_hook(
            lambda _, arguments, kept=kept: kept.append(arguments[0].view(-1, 48)[CONTEXT:])
        )
    with torch.inference_mode():
        for window in WINDOWS:
            library(torch.tensor([window]))
    for number, kept in inputs.items():
        logits = torch.cat(kept) @ library.model.layers[number].mlp.gate.weight.T
        shares = {1: [], 2: []}
        for row in logits.double().softmax(-1).tolist():
            lowest = sorted(sorted(row)[-3:])
            for m in shares:
                shares[m].append(sum(lowest[:m]) / sum(lowest))
        expected = [np.median(shares[1]), np.median(shares[2])]
        assert tables.moe_beta[number] == pytest.approx(expected, rel=2e-3)
    assert tables.moe_beta[1] == (0, 0)
    assert all(tables.ffn_quantiles["0.5"][layer] > 0 for layer in range(3))


def test_running_every_channel_changes_nothing_and_shows_each_experts_gates():
    class Count(Probe):
        offered = 0

        def gated(self, layer, activations):
            self.offered += activations.numel() if layer == 0 else 0
            return activations

    step, cache = steps_of("qwen3_moe")
    tokens, count = torch.tensor(WINDOWS[0]), Count()
    step.prefill(tokens[:CONTEXT], cache, 64)
    dense = step.verify(tokens[None, CONTEXT : CONTEXT + ROWS], cache)
    cache.truncate(0, CONTEXT)
    run = Verification(Sparsity(ffn=EVERY_CHANNEL), probe=count)
    same = step.verify(tokens[None, CONTEXT : CONTEXT + ROWS], cache, run)
    assert (dense - same).abs().max() < 1e-4 * dense.abs().max()
    assert count.offered == ROWS * 3 * 20


def planted_view(queries, keys):
    """A view of one step after 160 positions; keys [kv_heads, positions, head_dim]."""
    paged = torch.zeros(1, keys.shape[0], keys.shape[2], PAGE)
    paged[0, :, :, : keys.shape[1]] = keys.transpose(1, 2)
    means = summarise_blocks(paged[0, :, :, :160], 16, "mean")
    return AttentionView(queries, paged, paged.transpose(2, 3), 160, keys.shape[1], 3, {"mean": means})


def test_equal_selections_and_swapped_heads_are_found():
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 6, 16), torch.randn(2, 11, 16).repeat_interleave(16, 1)[:, :162]
    probe = Calibrator(model_shape(library_model("llama").config, torch.float32), BUDGET, 0)
    views = [(queries, keys), (queries, keys), (queries.flip(0), keys.flip(0))]
    for layer, view in enumerate(views):
        assert probe.selection(layer, planted_view(*view), None) is None
    tables = probe.tables()
    assert tables.jaccard[0][1] == 1 and tables.recovered_mass[0][1] == pytest.approx(1, abs=1e-12)
    assert tables.jaccard[0][2] < 1 and tables.recovered_mass[0][2] < 1
    assert tables.head_map[1][0] == (0, 1) and tables.head_map[2][0] == (1, 0)
    assert probe.steps == 1


def test_tables_need_a_step_and_a_budget_that_leaves_something_out():
    with pytest.raises(ValueError, match="at least one step"):
        Calibrator(model_shape(library_model("llama").config, torch.float32), BUDGET, 0).tables()
    step, cache = steps_of("llama")
    with pytest.raises(ValueError, match="leave nothing out"):
        calibrate(step, cache, WINDOWS, BUDGET, context=70, rows=ROWS)


def test_a_sample_is_exact_while_it_fits_and_unbiased_beyond():
    values = torch.rand(1000, generator=torch.Generator().manual_seed(3))
    exact = Sample(1000, torch.Generator().manual_seed(0))
    for part in values.split(77):
        exact.add(part)
    assert exact.quantiles([0.1, 0.5]) == pytest.approx(np.quantile(values.double().numpy(), [0.1, 0.5]), rel=1e-6)
    small = Sample(2000, torch.Generator().manual_seed(0))
    for part in torch.linspace(0, 1, 100_001).split(999):
        small.add(part)
    assert small.quantiles([0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.04)
    assert small._values.shape == (2000,)
    assert Sample(5, torch.Generator()).quantiles([0.5]) == [0.0]
