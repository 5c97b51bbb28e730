"""python -m scripts.bench.gpu_check: its checks in the interpreter, its baseline, its bookkeeping without a GPU."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest
import torch

from harness.engine.model.shapes import SHAPES
from harness.engine.model.step import Step
from scripts.bench import (
    gpu_attention,
    gpu_cases,
    gpu_check,
    gpu_common,
    gpu_kernels,
    gpu_layers,
    gpu_ops,
    gpu_parts,
    gpu_steps,
)
from scripts.bench.gpu_common import Red
from scripts.bench.gpu_report import Deadline, Report
from scripts.bench.measure import Spread
from scripts.bench.records import ROOT
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


@pytest.fixture
def report():
    return Report(Deadline(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_kernel_passes_its_checks(dtype, report, capsys):
    with interpreting():
        found = gpu_kernels.here(CPU, (dtype,), report)
    kernels = {"block_attention", "block_selection", "sparse_ffn", "channels", "moe", "routing"}
    assert {one.kernel for one in found} == kernels and any("chosen 2 blocks before" in one.name for one in found)
    assert not report.problems and all(one.error < one.allowed for one in found)
    assert len(capsys.readouterr().out.splitlines()) == len(found)


def test_a_wrong_reference_turns_the_check_red(monkeypatch, report):
    right = moe_naive.moe
    monkeypatch.setattr(moe_naive, "moe", lambda *args: right(*args) * 1.01)
    check = gpu_kernels._experts(3, 4, 16, 32)
    with interpreting():
        found = gpu_kernels.outcome(check, CPU, torch.float16, 0)
    gpu_kernels.note(found, report)
    assert found.red and report.red == {"moe"} and report.problems[0].startswith("RED: experts, rows 3")


@pytest.mark.parametrize(
    ("case", "change"),
    [
        (gpu_attention.AttentionCase(64, 1, 1, (64,), (1,), False, 16, 2), {"blocks": None, "kept": None}),
        (gpu_attention.AttentionCase(64, 1, 1, (64,), (1,), False, 16, 2, behind=1), {"tails": None}),
    ],
)
def test_reading_elsewhere_than_the_selection_is_seen(monkeypatch, case, change):
    with interpreting():
        kernel = gpu_attention.importlib.import_module("sparse.ops.block_attention.kernel")
        right = kernel.attention
        assert gpu_attention.attention(case, CPU, torch.float16, torch.Generator())[0] < 2e-3
        monkeypatch.setattr(kernel, "attention", lambda *args, **options: right(*args, **{**options, **change}))
        error, _ = gpu_attention.attention(case, CPU, torch.float16, torch.Generator())
    assert error > 0.1


def test_a_selection_without_its_fixed_blocks_is_red(monkeypatch):
    with interpreting():
        kernel = gpu_layers.importlib.import_module("sparse.ops.block_selection.kernel")
        right = kernel.select

        def shifted(*args, **options):
            blocks, kept = right(*args, **options)
            return blocks + 1, kept

        monkeypatch.setattr(kernel, "select", shifted)
        with pytest.raises(Red, match="is not a selection"):
            gpu_layers.selection(AttentionBudget(topk=5), True, CPU, torch.float16, torch.Generator())


def test_a_wrong_choice_of_channels_or_experts_is_seen(monkeypatch):
    with interpreting():
        ffn = gpu_layers.importlib.import_module("sparse.ops.sparse_ffn.kernel")
        moe = gpu_layers.importlib.import_module("sparse.ops.moe.kernel")
        chooses, routes = ffn.choose, moe.route
        monkeypatch.setattr(ffn, "choose", lambda *args: chooses(*args).roll(1))
        monkeypatch.setattr(moe, "route", lambda shares, **how: routes(shares, **{**how, "survival": None}))
        for call in (
            lambda generator: gpu_layers.channels_of(3, 40, CPU, torch.float16, generator),
            lambda generator: gpu_layers.routes(6, 10, 4, CPU, torch.float16, generator),
        ):
            error, allowed = call(torch.Generator())
            assert error > allowed


def test_dense_attention_agrees_with_other_kernels(monkeypatch, report):
    with interpreting():
        assert gpu_attention.cross_check("SDPA", 150, CPU, torch.float16, torch.Generator())[0] < 1e-3
        monkeypatch.setattr(gpu_attention.importlib.util, "find_spec", lambda name: None)
        found = gpu_kernels.outcome(gpu_kernels._crosses("flashinfer", 20), CPU, torch.float16, 0)
        monkeypatch.setitem(gpu_attention.LIBRARIES, "flashinfer", lambda queries, *_: 2 * queries)
        wrong = gpu_kernels.outcome(gpu_kernels._crosses("flashinfer", 20), CPU, torch.float16, 0)
    gpu_kernels.note(wrong, report)
    assert found.problem == "not installed" and wrong.error > wrong.allowed and not report.problems


def test_every_check_of_a_gpu_is_listed_once_and_few_of_them_in_fp16():
    listed = gpu_kernels.checks(False)
    assert len({(check.name, dtype) for check, dtype in listed}) == len(listed)
    steps = gpu_kernels.exact_checks(("llama31_8b", "smollm2_135m"))
    assert [check.kernel for check, _ in steps] == ["smollm2_135m", "llama31_8b", "llama31_8b"]
    assert 2 <= sum(dtype == torch.float16 for _, dtype in listed) <= 3


def scripted(monkeypatch, tmp_path, lines):
    """A child process that prints ``lines`` for every --first that it is started with, and exits as they say."""
    script = tmp_path / "child.py"
    script.write_text(f"import sys\nfor one in {lines!r}[sys.argv[1]]:\n    print(one)\nsys.exit({lines!r}['exit'])\n")
    started = []
    right = subprocess.Popen

    def popen(command, **options):
        started.append(options["env"]["SPARSE_VERIFICATION_TUNE"])
        return right([sys.executable, str(script), command[3]], **options)

    monkeypatch.setattr(gpu_kernels.subprocess, "Popen", popen)
    return started


def told_by(number, **values):
    given = {"name": f"check {number}", "kernel": "moe", "judged": True, "error": 1e-3, "allowed": 1e-2, **values}
    return json.dumps({"begun": number, "outcome": given})


def test_checks_go_on_after_a_crash_of_their_process(monkeypatch, tmp_path, report):
    last = len(gpu_kernels.checks(False)) - 1
    lines = {
        "--first=0": [json.dumps({"begun": 0}), told_by(0, error=1.0, red=True), "a warning", json.dumps({"begun": 1})],
        "--first=2": [json.dumps({"begun": 2}), told_by(2), json.dumps({"begun": last})],
        "exit": 3,
    }
    started = scripted(monkeypatch, tmp_path, lines)
    found = gpu_kernels.apart(report, 30)
    assert started == ["0", "0"] and [one.name for one in found] == ["check 0", "check 2"] and report.red == {"moe"}
    assert [text.partition(":")[0] for text in report.problems[:1]] == ["RED"] and len(report.problems) == 3
    assert all("its process ended with 3" in text for text in report.problems[1:])


def test_a_process_that_does_not_start_ends_the_checks(monkeypatch, tmp_path, report):
    scripted(monkeypatch, tmp_path, {"--first=0": [], "exit": 1})
    assert gpu_kernels.apart(report, 30) == []
    assert report.problems == ["checks: their process ended with 1 before the first one"]


def test_captured_steps_pass_their_checks_in_the_interpreter(monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "tiny", {**TINY, "model_type": "llama", "num_attention_heads": 4})
    case = gpu_cases.Case("tiny", 2, 200, "tree5", 0.4, None, None, 1, channels=0.5)
    with interpreting():
        gpu_steps.check(case, 1, CPU, torch.float32)
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.fixture
def eager(monkeypatch):
    """The plain step in place of the captured one, which needs a GPU or minutes in the interpreter."""
    monkeypatch.setitem(SHAPES, "tiny_moe", TINY)
    monkeypatch.setattr(gpu_steps, "make_step", lambda weights, engine: Step(weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("draft", ["5", "tree20"])
def test_the_baseline_computes_what_the_step_computes(eager, draft, dtype, capsys):
    case = gpu_cases.Case("tiny_moe", 2, 300, draft, 0.3, 0.5, None, 1)
    gpu_steps.check(case, 2, CPU, dtype)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 3 and all(("worst" if dtype == torch.float32 else "median") in line for line in told)


def test_a_wrong_baseline_is_red(eager, monkeypatch):
    right = gpu_steps.FlashStep._attend
    monkeypatch.setattr(gpu_steps.FlashStep, "_attend", lambda *args: right(*args) * 1.1)
    case = dataclasses.replace(gpu_cases.TINY[0], arch="tiny_moe")
    for dtype, which in ((torch.float32, "worst"), (torch.bfloat16, "median")):
        with pytest.raises(Red, match=f"library's fused attention: the {which} token is off"):
            gpu_steps.check(case, 2, CPU, dtype)


def test_steps_go_on_after_what_fails_and_leave_out_what_is_red(monkeypatch, tmp_path, report, capsys):
    def check(case, *_):
        if case.arch == "llama_7b":
            raise RuntimeError("no kernel\nfits")
        if case.batch == 16:
            raise Red("off")

    spread = Spread(2.0, 1.0, 3.0)
    monkeypatch.setattr(gpu_steps, "check", check)
    monkeypatch.setattr(gpu_steps, "_timed", lambda case, *_: gpu_cases.Result(case, 1, 2, spread, spread, 3.0, "x"))
    report.red.add("moe")
    report.deadline = Deadline(60)
    found = list(gpu_steps.run(gpu_cases.CASES, None, None, 1.0, tmp_path / "steps.csv", report))
    assert [one.case.name for one in found] == [gpu_cases.CASES[1].name, gpu_cases.CASES[4].name]
    assert report.problems == ["RED: off", f"{gpu_cases.CASES[2].name}: RuntimeError: no kernel fits"]
    assert report.deadline.skipped == [f"{gpu_cases.CASES[3].name}: red: moe"]
    partial = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert partial[0] == {"partial": {"steps": {found[0].case.name: [2.0, 3.0, 2.0, 1.2]}}} and len(partial) == 2
    assert "1 of 2 layers" in found[0].text and "target 1.2 met" in found[0].text


def test_the_union_budget_of_a_case_is_a_share_of_the_experts():
    case = gpu_cases.CASES[3]
    assert case.sparsity(128).moe.union == 32 and case.sparsity(128).attention.is_dense
    assert gpu_cases.CASES[0].sparsity(0).attention.topk == round(0.12 * 512)
    assert gpu_cases.EXACT[0].suspects == {"smollm2_135m", "block_attention", "block_selection", "sparse_ffn"}


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
    assert {op.kernel for op in found.values()} == {"block_attention", "block_selection", "moe", "sparse_ffn", ""}


def test_short_work_and_work_in_the_cache_have_no_share_of_a_limit():
    assert gpu_ops.judged(0.01, 60e6, 50e6)
    assert not gpu_ops.judged(0.009, 60e6, 50e6) and not gpu_ops.judged(0.01, 50e6, 50e6)


def test_parts_that_do_not_fit_are_left_out_with_a_note(capsys):
    deadline = Deadline(1)
    assert deadline.allows("short", 10) and not deadline.allows("long", 100)
    assert len(deadline.skipped) == 1 and "left out: long: needs about 100 s" in capsys.readouterr().out
    assert Deadline(1, time.monotonic() - 50, spare=5).left() < 5.1
    assert gpu_kernels.here(CPU, (torch.float16,), Report(Deadline(0))) == []


def test_memory_that_is_short_is_no_problem(report):
    with gpu_common.surviving(report, "large"):
        raise torch.cuda.OutOfMemoryError("out")
    assert not report.problems and report.deadline.skipped[0].startswith("large: out of memory")


def test_a_call_whose_time_is_over_ends_with_what_is_known(tmp_path):
    file = tmp_path / "gpu" / "check.json"
    code = (
        "import pathlib, sys, time; from scripts.bench.gpu_report import *\n"
        "report = Report(Deadline(1), pathlib.Path(sys.argv[1]))\n"
        "report.stops.append(lambda: print('children end')); report.case('steps', 'one', [1.5])\n"
        "watchdog(report, 0.2); time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], cwd=ROOT, capture_output=True, text=True, timeout=50)
    *before, last = done.stdout.splitlines()
    assert done.returncode == 1 and before == ['{"partial":{"steps":{"one":[1.5]}}}', "children end"]
    assert json.loads(last) == {"status": "stopped", "problems": [], "steps": {"one": [1.5]}, "left_out": []}
    assert file.read_text() == last + "\n"


@without_gpu
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no CUDA device is present"),
        (["--parts=kernels,speed"], "--parts=speed: is not one of"),
        (["--interpret", "--cases=llama9"], "--cases=llama9: valid are llama31_8b"),
    ],
)
def test_bad_places_and_input_are_one_line_and_exit_code_2(monkeypatch, capsys, arguments, message):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert gpu_check.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("gpu-check: ") and message in error and error.count("\n") == 1


def test_a_library_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "_LIBRARIES", ("torch", "a_library_of_no_name"))
    assert gpu_check.main([]) == 2
    assert "cannot import a_library_of_no_name: ModuleNotFoundError" in capsys.readouterr().err


@without_gpu
@pytest.mark.parametrize(
    ("error", "status", "problem"),
    [(None, "failed", "RED: attention is off"), (KeyError("x"), "incomplete", "KeyError: 'x'")],
)
def test_the_last_line_tells_what_was_known_whatever_failed(monkeypatch, capsys, error, status, problem):
    def interpreted(_options, report):
        report.add(checks=3)
        if error is not None:
            raise error
        report.fail("attention is off", "block_attention")

    monkeypatch.setattr(gpu_parts, "interpreted", interpreted)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu_check.main(["--interpret"]) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == {"status": status, "problems": [problem], "checks": 3, "left_out": []}
