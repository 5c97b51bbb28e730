"""python -m scripts.bench.gpu_check: its checks in the interpreter, its baseline, its bookkeeping without a GPU."""

import dataclasses
import json

import pytest
import torch

from harness.engine.model.shapes import SHAPES
from harness.engine.model.step import Step
from scripts.bench import gpu_check, gpu_kernels, gpu_ops, gpu_steps
from scripts.bench.gpu_common import Deadline, Red
from sparse.budget import AttentionBudget
from sparse.ops.moe import naive as moe_naive
from tests.ops.interpreter import interpreting

CPU = torch.device("cpu")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
TINY = {
    "model_type": "qwen3_moe",
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_kernel_passes_its_checks(dtype, capsys):
    with interpreting():
        found = gpu_kernels.run(CPU, (dtype,), True, Deadline(5))
    names = {name.partition(",")[0] for name, _, _ in found}
    assert names == {"attention", "selection", "sparse FFN", "experts"}
    assert all(error < tolerance for _, error, tolerance in found)
    assert len(capsys.readouterr().out.splitlines()) == len(found)


def test_a_wrong_reference_turns_the_check_red(monkeypatch):
    right = moe_naive.moe
    monkeypatch.setattr(moe_naive, "moe", lambda *args: right(*args) * 1.01)
    with interpreting():
        error, tolerance = gpu_kernels.experts_of(3, 4, 16, 32, CPU, torch.float16, torch.Generator())
    assert error > tolerance


def test_reading_a_position_outside_the_selection_is_seen(monkeypatch):
    case = gpu_kernels.AttentionCase(64, 1, 1, (64,), (1,), False, 16, 2)
    with interpreting():
        kernel = gpu_kernels.importlib.import_module("sparse.ops.block_attention.kernel")
        right = kernel.attention

        def everything(*args, **options):
            return right(*args, **{**options, "blocks": None, "kept": None})

        monkeypatch.setattr(kernel, "attention", everything)
        error, _ = gpu_kernels.attention(case, CPU, torch.float16, torch.Generator())
    assert error == float("inf")


def test_a_selection_without_its_fixed_blocks_is_red(monkeypatch):
    with interpreting():
        kernel = gpu_kernels.importlib.import_module("sparse.ops.block_selection.kernel")
        right = kernel.select

        def shifted(*args, **options):
            blocks, kept = right(*args, **options)
            return blocks + 1, kept

        monkeypatch.setattr(kernel, "select", shifted)
        with pytest.raises(Red, match="is not a selection"):
            gpu_kernels.selection(AttentionBudget(topk=5), True, CPU, torch.float16, torch.Generator())


def test_dense_attention_agrees_with_other_kernels():
    with interpreting():
        found = gpu_kernels.cross_checks(CPU, torch.float16, start=150)
    assert list(found) == ["SDPA", "flex_attention", "flashinfer"] and found["SDPA"] < 1e-3


def test_captured_steps_pass_their_checks_in_the_interpreter(monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "tiny", {**TINY, "model_type": "llama", "num_attention_heads": 4})
    case = gpu_steps.Case("tiny", 2, 200, "tree5", 0.4, None, None, 1)
    with interpreting():
        gpu_steps.check(case, 1, CPU, torch.float32)
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.fixture
def eager(monkeypatch):
    """The plain step in place of the captured one, which needs a GPU or minutes in the interpreter."""
    monkeypatch.setitem(SHAPES, "tiny_moe", TINY)
    monkeypatch.setattr(gpu_steps, "make_step", lambda weights, engine: Step(weights))


@pytest.mark.parametrize("draft", ["5", "tree20"])
def test_the_baseline_computes_what_the_step_computes(eager, draft, capsys):
    case = gpu_steps.Case("tiny_moe", 2, 300, draft, 0.3, 0.5, None, 1)
    gpu_steps.check(case, 2, CPU, torch.float32)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_wrong_baseline_is_red(eager, monkeypatch):
    right = gpu_steps.FlashStep._attend
    monkeypatch.setattr(gpu_steps.FlashStep, "_attend", lambda *args: right(*args) * 1.01)
    with pytest.raises(Red, match="library's fused attention: the median token is off"):
        gpu_steps.check(dataclasses.replace(gpu_steps.TINY, arch="tiny_moe"), 2, CPU, torch.float32)


def test_the_union_budget_of_a_case_is_a_share_of_the_experts():
    case = gpu_steps.CASES[3]
    assert case.sparsity(128).moe.union == 32 and case.sparsity(128).attention.is_dense
    assert gpu_steps.CASES[0].sparsity(0).attention.topk == round(0.12 * 512)


def test_operators_count_their_least_traffic():
    found = {(op.name, op.shape): op for op in gpu_ops.operators()}
    dense = found["dense_attention", "llama31_8b, batch 16, context 8192, rows 7"]
    assert dense.bytes == 16 * (8199 * 2 * 8 * 128 * 2 + 2 * 7 * 32 * 128 * 2)
    sparse = found["block_attention", "llama31_8b, batch 16, context 8192, rows 7"]
    assert sparse.bytes == 16 * ((61 * 16 + 7) * 2 * 8 * 128 * 2 + 2 * 7 * 32 * 128 * 2)
    moe = found["moe", "qwen3_30b_a3b, rows 60, 32 of 128"]
    assert moe.bytes == 32 * 3 * 768 * 2048 * 2 and moe.flops == 60 * 8 * 3 * 768 * 2048 * 2
    ffn = found["sparse_ffn", "llama31_8b, rows 7, 7168 of 14336"]
    assert ffn.bytes == 7168 * 2 * 4096 * 2


def test_parts_that_do_not_fit_are_left_out_with_a_note(capsys):
    deadline = Deadline(1)
    assert deadline.allows("short", 10) and not deadline.allows("long", 100)
    assert len(deadline.skipped) == 1 and "left out: long: needs about 100 s" in capsys.readouterr().out
    assert gpu_kernels.run(CPU, (torch.float16,), True, Deadline(0)) == []


@without_gpu
@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "no CUDA device is present"), (["--parts=kernels,speed"], "--parts=speed: is not one of")],
)
def test_bad_places_and_input_are_one_line_and_exit_code_2(capsys, arguments, message):
    assert gpu_check.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("gpu-check: ") and message in error and error.count("\n") == 1


@without_gpu
def test_a_red_check_ends_the_call(monkeypatch, capsys):
    def red(*_):
        raise Red("attention is off")

    monkeypatch.setattr(gpu_kernels, "run", red)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu_check.main(["--interpret"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"status": "failed", "problems": ["attention is off"]}
    assert printed.err == "attention is off\n"
