"""python -m scripts.bench: suites at tiny shapes, checks that turn red, input that is refused."""

import csv
import json
from dataclasses import replace

import pytest
import torch

from harness.engine.model.shapes import SHAPES
from harness.engine.model.step import Step
from scripts.bench import checks, cli, growth, records, setting, steps
from scripts.bench.records import StepRow
from sparse.ops.block_attention import eager

TINY = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
EXPERTS = {
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "moe_intermediate_size": 24,
}
BASE = ["--arch=tiny", "--kept=64", "--repeats=2", "--dtype=float32", "--device=cpu"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setitem(SHAPES, "tiny_moe", TINY | EXPERTS)


def run(tmp_path, capsys, *arguments):
    """Exit code, the last line, and everything printed."""
    code = cli.main([*BASE, f"--results={tmp_path}", *arguments])
    printed = capsys.readouterr()
    return code, json.loads(printed.out.splitlines()[-1]) if printed.out else None, printed


def rows_of(file):
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_cell_is_timed_and_stored(tmp_path, capsys):
    code, line, printed = run(
        tmp_path, capsys, "--suite=steps", "--contexts=200,130", "--batches=1,2", "--drafts=1,7,tree11"
    )
    assert code == 0 and line["status"] == "ok"
    found = records.read(tmp_path / "bench" / "steps.csv", StepRow)
    cells = {(row.context, row.batch, row.rows, row.tree, row.arm) for row in found}
    for context in (130, 200):
        for batch in (1, 2):
            for rows, tree in ((1, "chain"), (7, "chain"), (11, "tree of depth 1")):
                assert {(context, batch, rows, tree, arm) for arm in ("dense", "sparse")} <= cells
            assert {row.arm for row in found if (row.context, row.batch) == (context, batch) and row.rows == 7} == {
                "dense", "sparse", "anchors", "ffn", "hybrid"
            }  # fmt: skip
    assert all(0 < row.p10_ms <= row.median_ms <= row.p90_ms and row.bytes > 0 for row in found)
    by_arm = {(row.context, row.batch, row.rows, row.arm): row for row in found if row.tree == "chain"}
    dense, sparse = by_arm[200, 1, 7, "dense"], by_arm[200, 1, 7, "sparse"]
    assert dense.kept == 0 and sparse.kept == 64 and sparse.bytes < dense.bytes
    assert by_arm[200, 2, 7, "dense"].bytes < 2 * dense.bytes < 2.2 * by_arm[130, 1, 7, "dense"].bytes
    assert list(line["ratios"]) == [
        "context 200, batch 1", "context 130, batch 1", "context 200, batch 2", "context 130, batch 2"
    ]  # fmt: skip
    middle, low, high, limit = line["ratios"]["context 200, batch 1"]["sparse 7 compiled / dense 7 compiled"]
    assert low <= middle <= high and limit == pytest.approx(sparse.bytes / dense.bytes, abs=1e-4)
    assert "model        tiny, float32" in printed.out


def test_a_cut_model_never_shows_its_step_as_the_whole_one(tmp_path, capsys):
    code, line, printed = run(tmp_path, capsys, "--suite=steps", "--contexts=150", "--drafts=3", "--layers=2")
    assert code == 0 and line["model"] == "tiny, 2 of 4 layers"
    assert "not the model's" in printed.out and "ms per layer" in printed.out
    assert {row["arch"] for row in rows_of(tmp_path / "bench" / "steps.csv")} == {"tiny, 2 of 4 layers"}


def test_operators_and_parts_of_a_model_with_experts(tmp_path, capsys):
    code, line, _ = run(
        tmp_path, capsys, "--suite=ops", "--arch=tiny_moe", "--contexts=150", "--drafts=1,5", "--union=3"
    )
    assert code == 0 and line["status"] == "ok"
    found = rows_of(tmp_path / "bench" / "ops.csv")
    names = {row["op"] for row in found}
    assert {"dense_attention", "block_attention", "block_selection", "projections", "head", "dense_moe"} <= names
    assert {"union_moe", "step.attention", "step.moe", "step.linear"} <= names
    union = next(row for row in found if row["op"] == "union_moe" and row["shape"].startswith("rows 5"))
    assert union["shape"] == "rows 5, 3 experts" and float(union["bytes"]) == 3 * 3 * 24 * 48 * 4
    attention = next(row for row in found if row["op"] == "dense_attention" and row["shape"] == "rows 5, context 150")
    assert float(attention["bytes"]) == 2 * 150 * 2 * 16 * 4


def test_growth_is_measured_and_drawn_from_its_file_alone(tmp_path, capsys):
    code, line, _ = run(tmp_path, capsys, "--suite=growth", "--contexts=100,200,300", "--drafts=1,5")
    assert code == 0
    assert set(line["growth"]) == {"dense 1 compiled", "sparse 1 compiled", "dense 5 compiled", "sparse 5 compiled"}
    found = records.read(tmp_path / "bench" / growth.FILE, StepRow)
    assert len(found) == 12
    dense = {row.context: row.bytes for row in found if (row.arm, row.rows) == ("dense", 5)}
    sparse = {row.context: row.bytes for row in found if (row.arm, row.rows) == ("sparse", 5)}
    assert line["growth"]["dense 5 compiled"][3] == pytest.approx(dense[300] / dense[100], abs=1e-4)
    assert sparse[300] - sparse[100] < 0.2 * (dense[300] - dense[100])
    figure = tmp_path / "figures" / "growth.png"
    figure.unlink()
    assert cli.main([f"--results={tmp_path}", "--suite=growth", "--redraw"]) == 0
    assert figure.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts=500"], "--contexts=500: with 85 tokens after it this is beyond the 512 positions of tiny"),
        (["--contexts=ten"], "--contexts=ten: is not a list of whole numbers"),
        (["--contexts=70"], "--kept=64: covers --contexts=70"),
        (["--contexts=200", "--engine=fast"], "--engine=fast: is not one of eager"),
        (["--contexts=200", "--drafts=tree99"], "--drafts=tree99"),
        (["--contexts=200", "--arms=none"], "--arms=none: is not one of all, dense, sparse"),
        (["--contexts=200", "--suite=all"], "--suite=all: is not one of"),
        (["--contexts=200", "--suite=growth,ops"], "growth runs alone"),
        (["--contexts=200", "--suite=growth"], "needs two contexts"),
        (["--contexts=200", "--layers=9"], "tiny has 4 layers"),
        (["--peers"], "leave --arch and --carved out"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, arguments, message):
    assert cli.main([*BASE, f"--results={tmp_path}", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench: ") and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_operator_turns_the_check_red_before_any_time(tmp_path, capsys, monkeypatch):
    right = eager.block_attention
    monkeypatch.setattr(eager, "block_attention", lambda *args, **options: right(*args, **options) * 1.001)
    code, line, printed = run(tmp_path, capsys, "--suite=steps", "--contexts=150", "--drafts=3")
    assert code == 1 and line["status"] == "failed" and "block attention" in line["problems"][0]
    assert "median ms" not in printed.out and not (tmp_path / "bench").exists()


def options_of(*arguments):
    options = cli.parser().parse_args([*BASE, *arguments])
    options.contexts = "150"
    return options


class Wrong(Step):
    """Confuses neighbouring tokens of the vocabulary in steps of several tokens."""

    def run(self, segments, cache, run=None, last=None):
        found = super().run(segments, cache, run, last)
        return found if found.logits.shape[0] == 1 else replace(found, logits=found.logits.roll(1, -1))


def test_engines_alternate_and_are_compared_with_the_reference(tmp_path, capsys):
    code, line, _ = run(
        tmp_path, capsys, "--suite=steps", "--contexts=150", "--drafts=1,5", "--engine=eager,compiled", "--batches=2"
    )
    assert code == 0
    found = rows_of(tmp_path / "bench" / "steps.csv")
    assert [row["engine"] for row in found] == ["eager", "compiled"] * (len(found) // 2)
    assert "dense 5 compiled / dense 5 eager" in line["ratios"]["context 150, batch 2"]


def test_an_engine_that_differs_from_the_reference_is_red():
    made = setting.prepare(options_of("--drafts=1,5", "--engine=compiled"))
    context, batch, caches = next(setting.cells(made))
    checks.check_cell(made, context, batch, caches)
    made.steps["compiled"] = Wrong(made.weights)
    with pytest.raises(checks.Red, match="dense 5 compiled: the median token is off"):
        checks.check_cell(made, context, batch, caches)


def test_caches_hold_the_context_and_come_back_after_a_step():
    made = setting.prepare(options_of("--drafts=5", "--batches=2"))
    context, batch, caches = next(setting.cells(made))
    cache = caches["eager"]
    assert cache.lengths == [150, 150]
    arm = steps.timed(made, "sparse", made.axes["sparse"], made.shapes[0], "eager", context, batch, caches)
    before = cache.prefix(1, 1, 150)[0].clone()
    steps.call(made, arm, context, batch, cache)()
    assert cache.lengths == [150, 150] and torch.equal(cache.prefix(1, 1, 150)[0], before)


def test_prompts_of_random_weights_spread_over_the_vocabulary():
    made = setting.prepare(options_of())
    assert len(set(made.tokens)) > 100 and max(made.tokens) < 257 and len(made.tokens) == 150 + 60 + 25
