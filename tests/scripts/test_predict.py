"""Predictions against published sizes and hand counts, the check of stored steps, and bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.engine.model.families import model_shape
from harness.engine.model.loading import shape_config
from harness.engine.model.shapes import SHAPES
from scripts import predict

STEPS = "device,arch,dtype,engine,context,batch,rows,tree,kept,arm,median_ms,p10_ms,p90_ms,limit_ms,bytes,flops,threads"


def result(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The last line of a successful call."""
    assert predict.main(list(arguments)) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


@pytest.mark.parametrize("arch", SHAPES)
def test_shapes_are_those_of_the_library(arch: str) -> None:
    assert predict.public_shape(arch, 2) == model_shape(shape_config(arch, None), torch.bfloat16)
    assert predict.public_shape(arch, 4, 3) == model_shape(shape_config(arch, 3), torch.float32)


@pytest.mark.parametrize(
    "context, batch, gain", [(8192, 1, 1.06), (32768, 1, 1.26)], ids=("6% at 8k", "21% of the time at 32k")
)
def test_the_limits_of_the_method_section(
    capsys: pytest.CaptureFixture[str], context: int, batch: int, gain: float
) -> None:
    found = result(capsys, "--context", str(context), "--batch", str(batch), "--kept", "512", "--draft", "0",
                   "--acceptance", "1")  # fmt: skip
    assert found["axes"]["attention"]["verification_vs_dense"] == pytest.approx(gain, abs=0.02)


def test_each_axis_alone_and_together(capsys: pytest.CaptureFixture[str]) -> None:
    found = result(
        capsys,
        "--arch",
        "qwen3_30b_a3b",
        "--draft",
        "60",
        "--union",
        "0.25",
        "--ffn-keep",
        "0.36",
        "--context",
        "32768",
    )["axes"]
    assert list(found) == ["dense", "attention", "ffn", "experts", "all_together"]
    gains = [each["verification_vs_dense"] for each in found.values()]
    assert gains[0] == 1 and max(gains) == gains[-1] and all(gain > 1 for gain in gains[1:])
    assert gains[3] > 2, "the union of experts is the whole game"


def test_drafting_slows_decoding_and_not_verification(capsys: pytest.CaptureFixture[str]) -> None:
    plain, head, model = (
        result(capsys, "--drafter", name)["axes"]["attention"] for name in ("lookup", "eagle3", "smollm2_135m")
    )
    assert plain["verification_vs_dense"] == head["verification_vs_dense"] == model["verification_vs_dense"]
    assert plain["decoding_vs_dense"] == plain["verification_vs_dense"] > head["decoding_vs_dense"]
    assert plain["decoding_vs_ar"] > head["decoding_vs_ar"] and plain["decoding_vs_ar"] > model["decoding_vs_ar"]
    short = result(capsys, "--drafter", "eagle3", "--depth", "2")["draft_ms"]
    assert short < result(capsys, "--drafter", "eagle3", "--depth", "6")["draft_ms"]


def test_efficiency_scales_times_and_no_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    whole, half = (result(capsys, "--efficiency", share) for share in ("1", "0.5"))
    for name, each in whole["axes"].items():
        assert half["axes"][name]["step_ms"] == pytest.approx(2 * each["step_ms"], rel=1e-3)
        assert half["axes"][name]["decoding_vs_dense"] == each["decoding_vs_dense"]


def test_here_uses_measured_peaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def peaks(device: str, threads: int, dtype: torch.dtype, *, anew: bool) -> predict.Peaks:
        asked.append((dtype, anew))
        return predict.Peaks(1e9, 1e12)

    monkeypatch.setattr(predict.roofline, "peaks", peaks)
    options = ("--device", "here", "--arch", "smollm2_135m", "--kept", "0", "--dtype", "float32", "--context", "1")
    found = result(capsys, *options, "--draft", "0", "--acceptance", "1", "--measure")
    weights = predict.public_shape("smollm2_135m", 4).weight_bytes
    assert found["axes"]["dense"]["step_ms"] == pytest.approx((weights + 3 * 4 * 11520) / 1e6, rel=1e-5)
    assert asked == [(torch.float32, True)]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--arch", "gpt5"], ["--arch=gpt5", "llama31_8b"]),
        (["--layers", "33"], ["--layers=33", "32"]),
        (["--device", "tpu"], ["--device=tpu", "h200"]),
        (["--batch", "0"], ["--batch=0", "at least 1"]),
        (["--density", "1.5"], ["--density=1.5"]),
        (["--kept", "512", "--density", "0.5"], ["--density=0.5", "--kept=512"]),
        (["--union", "0.5"], ["--union=0.5", "no experts"]),
        (["--acceptance", "9"], ["--acceptance=9", "6 draft tokens"]),
        (["--depth", "7"], ["--depth=7", "--draft=6"]),
        (["--drafter", "magic"], ["--drafter=magic", "eagle3"]),
        (["--check", "nowhere.csv"], ["nowhere.csv"]),
    ],
)
def test_bad_input_ends_with_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    assert predict.main(arguments) == 2
    shown = capsys.readouterr()
    assert not shown.out and shown.err.count("\n") == 1 and all(word in shown.err for word in words)


def test_the_figure_is_written_twice(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "sub" / "axes.of.qwen"
    found = result(capsys, "--arch", "qwen3_30b_a3b", "--draft", "60", "--skew", "0.5", "--figure", str(file))
    assert found["figure"] == str(file) + ".png"
    assert Path(found["figure"]).read_bytes().startswith(b"\x89PNG")
    assert Path(str(file) + ".pdf").read_bytes().startswith(b"%PDF")


def test_stored_steps_stand_beside_their_predictions(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "steps.csv"
    shared = 'A CPU,"llama31_8b, 4 of 32 layers",bfloat16,eager,8192,1,7,chain'
    rows = [f"{shared},0,dense,80,1,1,40,4e9,1e9,2", f"{shared},1024,sparse,60,1,1,30,3e9,1e9,2"]
    rows += [
        f"{shared},1024,hybrid,50,1,1,30,3e9,1e9,2",
        "A CPU,unknown,bfloat16,eager,8192,1,7,chain,0,dense" + ",1" * 7,
    ]
    file.write_text("\n".join([STEPS, *rows]) + "\n")
    found = result(capsys, "--check", str(file))
    assert found["steps"] == 2, "neither the undescribed arm nor the unknown model"
    shape = predict.public_shape("llama31_8b", 2, 4)
    dense = shape.weight_bytes + (8192 + 14) * shape.kv_bytes_per_token
    share = next(value for name, value in found["of_limit"].items() if name.endswith("dense"))
    assert share == pytest.approx(1e3 * dense / 1e11 / 80, abs=1e-4), "at 4e9 bytes in 40 ms"
    (compared,) = found["ratios"].values()
    kept = shape.weight_bytes + (1024 + 14) * shape.kv_bytes_per_token + 4 * 512 * 1024 * 2
    assert compared == {"predicted": pytest.approx(kept / dense, abs=1e-4), "measured": 0.75}
    assert result(capsys, "--check", str(file), "--ffn-keep", "0.5")["steps"] == 3, "the hybrid is described now"


def test_results_of_earlier_versions_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    stored = [Path(predict.__file__).parents[1] / "results" / "bench" / name for name in
              ("smollm2_7300.json", "batches_2000.json")]  # fmt: skip
    found = result(capsys, "--check", *map(str, stored))
    assert found["steps"] == 6
    ratios = {name.rpartition(", ")[2]: each for name, each in found["ratios"].items()}
    assert ratios["7 tokens sparse 512"]["measured"] == pytest.approx(0.6359, abs=1e-3)
    assert ratios["7 tokens sparse 512"]["predicted"] == pytest.approx(8.673 / 13.372, abs=2e-3)


@pytest.mark.parametrize("name, content", [("a.csv", "a,b\n1,2\n"), ("a.json", "{}"), ("b.json", "no"), ("c.csv", "")])
def test_other_files_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert predict.main(["--check", str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
