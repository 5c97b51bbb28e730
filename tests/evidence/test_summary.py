import json

import pytest

from harness.evidence import build_summary, last_line
from harness.evidence.summary import problems
from tests.evidence_samples import ARMS, example, record


def built(records, arms=ARMS, **options):
    facts = {"fingerprint": "f" * 16, "task": "xsum", "model": "SmolLM2", "device": "CPU"}
    return build_summary(**facts, records=records, arms=arms, metrics=("rougeL", "rouge1"), resamples=100, **options)


def examples(count=4, arms=ARMS):
    return [row for index in range(count) for row in example(f"e{index}", arms)]


def test_the_summary_has_the_keys_of_the_design():
    summary = built(examples(), notes=["first"])
    assert list(summary) == [
        *("version", "fingerprint", "status", "reason", "task", "model", "device", "exclusive", "examples"),
        *("metrics", "arms", "compare", "paths", "ceiling", "prompt_tokens", "notes"),
    ]
    assert (summary["version"], summary["status"], summary["reason"], summary["examples"]) == (1, "ok", None, 4)
    json.dumps(summary, allow_nan=False)


def test_the_last_line_is_compact_json():
    summary = built(examples())
    line = last_line(summary, "results/runs/x")
    row = json.loads(line)
    assert "\n" not in line and " " not in line
    assert list(row) == [
        *("fingerprint", "status", "speedup_vs_ar", "speedup_vs_dense"),
        *("acceptance_length", "quality_delta", "path"),
    ]
    assert row["speedup_vs_ar"] == pytest.approx(summary["compare"]["sparse_vs_ar"]["speedup"], abs=1e-6)
    assert row["acceptance_length"] == pytest.approx(summary["arms"]["sparse"]["acceptance_length"]["pooled"], abs=1e-6)
    assert row["quality_delta"] == pytest.approx(summary["compare"]["quality_delta"]["rougeL"]["delta"], abs=1e-6)
    assert row["path"] == "results/runs/x"


@pytest.mark.parametrize("arms", [("ar",), ("ar", "dense")])
def test_the_last_line_has_nulls_for_arms_that_were_not_run(arms):
    row = json.loads(last_line(built(examples(arms=arms), arms=arms)))
    assert [row[key] for key in ("speedup_vs_ar", "acceptance_length", "quality_delta")] == [None] * 3
    assert row["status"] == "ok" and row["path"] == "runs/" + "f" * 16


def test_a_failed_run_claims_nothing():
    summary = built(examples(), status="failed", reason="no memory at /home/someone/models/x.safetensors")
    assert (summary["arms"], summary["examples"]) == ({}, 0)
    assert summary["reason"] == "no memory at x.safetensors"
    assert json.loads(last_line(summary))["speedup_vs_ar"] is None


def test_an_invalid_run_compares_nothing():
    summary = built(examples(), required_paths={"sparse": ["block_attention."], "dense": ["sparse_ffn."]})
    assert (summary["status"], summary["reason"]) == ("invalid", "dense: sparse_ffn. is switched on but never ran")
    assert summary["compare"]["sparse_vs_ar"] is None and summary["arms"]["ar"]["tokens"] > 0


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ({"output_ids": (), "histogram": (), "steps": 0}, "the output is empty"),
        ({"seconds": -0.1}, "a clock went backwards"),
        ({"seconds": 0.0}, "a clock went backwards"),
        ({"step_ms": (1.0, -1.0, 1.0)}, "a clock went backwards"),
        ({"steps": 7}, "do not add up"),
        ({"output_ids": (1, 2)}, "do not add up"),
    ],
)
def test_measurements_that_cannot_be_true_are_found(spoil, said):
    values = {"histogram": (0, 3)} | spoil
    rows = [record("a", "ar"), record("a", "sparse", **values)]
    (line, *_) = problems(rows, arms=("ar", "sparse"))
    assert said in line and "sparse" in line


def test_an_arm_without_any_text_is_found():
    rows = [record(name, arm, text="" if arm == "sparse" else "x") for name in "ab" for arm in ("ar", "sparse")]
    assert problems(rows, arms=("ar", "sparse")) == ["sparse: every output text is empty"]
    rows[1] = record("a", "sparse")
    assert problems(rows, arms=("ar", "sparse")) == []


def test_a_run_that_ended_with_the_prefill_needs_no_path():
    rows = [record("a", "sparse", histogram=(), seconds=0.0, paths={})]
    assert problems(rows, arms=("sparse",), required_paths={"sparse": ["block_attention."]}) == []


def test_no_finished_example_is_invalid_and_unknown_states_are_refused():
    assert built([])["reason"] == "no example was finished by every arm"
    with pytest.raises(ValueError, match="ok, failed, invalid, partial"):
        built(examples(), status="fine")
