import pytest

from harness.evidence import differences, metrics
from tests.evidence_samples import ARMS, example, record

ARM_KEYS = (
    "tokens seconds tokens_per_second steps ttft_seconds acceptance_length histogram quality reference step_ms "
    "components_ms draft bytes_per_step flops_per_step density trace roofline_fraction roofline_bound peak_memory_bytes"
)


def summary(rows, arms=ARMS, **options):
    return metrics.summarise(rows, arms=arms, metrics=("rougeL",), resamples=200, **options)


def test_acceptance_length_by_hand():
    rows = [record("a", histogram=(0, 2, 1)), record("b", histogram=(0, 0, 0, 4)), record("c", histogram=())]
    # a: 4 tokens in 3 steps; b: 12 tokens in 4 steps; c ended with its first token and took no step
    assert metrics.acceptance_length(rows) == {
        "pooled": pytest.approx(16 / 7),
        "per_request": pytest.approx((4 / 3 + 12 / 4) / 2),
    }
    assert metrics.pooled_histogram(rows) == [0, 2, 1, 4]


def test_the_arm_block_by_hand():
    rows = [
        record("a", histogram=(0, 2, 1), seconds=2.0, ttft_seconds=1.0, step_ms=(1.0, 2.0, 3.0), bytes_per_step=30.0),
        record("b", histogram=(0, 1), seconds=1.0, ttft_seconds=3.0, step_ms=(4.0,), bytes_per_step=10.0),
    ]
    block = metrics.arm_block(rows, ("rougeL",), bandwidth=1e4, peak_memory=99)
    assert list(block) == ARM_KEYS.split()
    assert (block["tokens"], block["steps"], block["seconds"]) == (5, 4, 3.0)
    assert block["tokens_per_second"] == pytest.approx(5 / 3)
    assert block["ttft_seconds"] == 2.0
    assert block["step_ms"] == {"p50": 2.5, "p90": pytest.approx(3.7)}
    assert block["bytes_per_step"] == pytest.approx((3 * 30 + 10) / 4)
    assert block["roofline_fraction"] == pytest.approx((25.0 / 1e4) / (3.0 / 4)), "of the whole step"
    assert block["roofline_bound"] == "bandwidth"
    computing = metrics.arm_block(rows, ("rougeL",), bandwidth=1e4, rate=2e9)
    assert computing["roofline_fraction"] == pytest.approx((1e9 / 2e9) / (3.0 / 4))
    assert computing["roofline_bound"] == "compute"
    assert block["components_ms"]["draft"] == pytest.approx(1.0)
    assert block["components_ms"]["accept"] == pytest.approx(0.5)
    assert block["components_ms"]["attention"] is None
    assert set(block["components_ms"]) == set(metrics.COMPONENTS)
    assert block["density"] == {"attention": 1.0, "ffn": None, "experts": None}
    assert block["peak_memory_bytes"] == 99


def test_drafting_by_hand():
    rows = [
        record("a", histogram=(0, 2, 1), seconds=2.0, drafted=6, draft_seconds=0.5),
        record("b", histogram=(0, 0, 0, 4), seconds=2.0, drafted=10, draft_seconds=0.1),
    ]
    found = metrics.arm_block(rows, ("rougeL",))["draft"]
    # 16 new tokens in 7 steps: 9 of them were drafted
    assert found == {
        "tokens_per_step": pytest.approx(16 / 7),
        "accepted": pytest.approx(9 / 16),
        "time_share": pytest.approx(0.15),
    }
    assert metrics.arm_block([record(histogram=(0, 3), drafted=0)], ("rougeL",))["draft"]["accepted"] is None


def test_unknown_costs_stay_null():
    block = metrics.arm_block([record(bytes_per_step=None, flops_per_step=None, step_ms=())], ("rougeL",))
    assert block["bytes_per_step"] is block["flops_per_step"] is block["roofline_fraction"] is None
    assert block["roofline_bound"] is None
    assert block["step_ms"] == {"p50": None, "p90": None}


def test_divergence_is_told_with_its_noise_floor():
    def arm(name, *outputs):
        return [record(f"e{i}", name, output_ids=ids) for i, ids in enumerate(outputs)]

    ar = arm("ar", (1, 2, 3), (1, 2, 3), (1, 2))
    dense = arm("dense", (1, 2, 3), (1, 2, 9), (1, 2))
    sparse = arm("sparse", (1, 5, 3), (1, 2, 9), (1, 2, 4))
    fidelity = metrics.compare_block({"ar": ar, "dense": dense, "sparse": sparse}, ("rougeL",))["fidelity"]
    assert fidelity["first_divergence"] == {"sparse": 1.5, "identical": pytest.approx(1 / 3)}
    assert fidelity["noise_floor"] == {"dense": 2, "identical": pytest.approx(2 / 3)}
    assert fidelity["agreement"] is fidelity["kl"] is fidelity["accept_flips"] is None
    assert metrics.divergence(ar, ar, "ar") == {"ar": None, "identical": 1.0}


def test_the_whole_block_has_the_shape_of_the_design():
    rows = [row for index in range(4) for row in example(f"e{index}")]
    result = summary(rows, bandwidth=2e10, peak_memory={"ar": 5})
    assert list(result["arms"]) == list(ARMS)
    assert list(result["compare"]) == [
        "sparse_vs_ar",
        "sparse_vs_dense",
        "dense_vs_ar",
        "quality_delta",
        "reference_delta",
        "noise_floor",
        "fidelity",
    ]
    assert set(result["compare"]["sparse_vs_ar"]) == {"speedup", "ci95", "tokens_per_step", "steps_per_second"}
    floor = result["compare"]["noise_floor"]
    for block in (result["compare"]["quality_delta"]["rougeL"], floor["quality"]["rougeL"], floor["reference"]):
        assert set(block) == set(differences.KEYS) and None not in block.values()
    assert result["paths"]["block_attention.torch"] == sum(row.steps * 30 for row in rows if row.arm == "sparse")
    assert result["ceiling"] == {"sparse_vs_dense": pytest.approx(4.4 / 3.0)}
    assert result["prompt_tokens"] == {"median": 1000, "max": 1000}


def test_arms_that_were_not_run_leave_nulls():
    rows = [row for index in range(3) for row in example(f"e{index}", ("ar", "sparse_ar"))]
    compare = summary(rows, arms=("ar", "sparse_ar"))["compare"]
    assert compare["sparse_vs_ar"] is compare["sparse_vs_dense"] is compare["dense_vs_ar"] is None
    assert compare["sparse_ar_vs_ar"]["speedup"] > 1
    assert compare["quality_delta"] == {"rougeL": dict.fromkeys(differences.KEYS)}
    assert compare["fidelity"]["first_divergence"] is compare["fidelity"]["noise_floor"] is None


def test_incomplete_examples_do_not_count():
    rows = [*example("a"), record("b", "ar")]
    assert summary(rows)["examples"] == 1
    assert summary([])["arms"] == {}


def test_unpaired_prompts_are_refused():
    rows = [record("a", "ar"), record("a", "dense", prompt_sha="other")]
    with pytest.raises(ValueError, match=r"'a'.*different prompts"):
        summary(rows, arms=("ar", "dense"))


def test_the_order_of_records_changes_nothing():
    rows = [row for index in range(5) for row in example(f"e{index}")]
    interleaved = sorted(rows, key=lambda row: (row.arm, row.example_id))
    assert summary(rows) == summary(interleaved)
