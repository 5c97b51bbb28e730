from dataclasses import replace

import pytest

from harness.evidence import metrics
from tests.evidence_samples import ARMS, example, record

ARM_KEYS = (
    "tokens seconds tokens_per_second steps ttft_seconds acceptance_length histogram quality step_ms components_ms "
    "draft bytes_per_step flops_per_step density trace roofline_fraction roofline_bound peak_memory_bytes"
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


def test_examples_of_one_wave_are_resampled_together():
    """Their times are shares of the same steps; a single wave has no interval."""
    rows = {
        arm: [record(name, arm, seconds=seconds, wave="a") for name in "ab"] for arm, seconds in (("x", 1), ("y", 2))
    }
    assert metrics.speedup(rows["x"], rows["y"], resamples=200) == {"speedup": pytest.approx(2), "ci95": None}
    alone = {arm: [replace(row, wave="") for row in several] for arm, several in rows.items()}
    assert metrics.speedup(alone["x"], alone["y"], resamples=200)["ci95"] is not None


def test_waves_and_clusters_link_what_was_timed_together():
    rows = [
        record(name, wave=wave, cluster=cluster) for name, wave, cluster in ("ap-", "bpx", "cqx", "dq-", "er-", "f-y")
    ]
    rows = [replace(row, wave=row.wave.strip("-"), cluster=row.cluster.strip("-")) for row in rows]
    labels = metrics.timed_together(rows)
    # a and b shared wave p, b and c article x, c and d wave q; e was alone in its wave, f in none
    assert len(set(labels[:4])) == 1 and len(set(labels)) == 3
    assert metrics.timed_together([replace(row, wave="") for row in rows]) == ["a", "x", "x", "d", "e", "y"]


def test_unknown_costs_stay_null():
    block = metrics.arm_block([record(bytes_per_step=None, flops_per_step=None, step_ms=())], ("rougeL",))
    assert block["bytes_per_step"] is block["flops_per_step"] is block["roofline_fraction"] is None
    assert block["roofline_bound"] is None
    assert block["step_ms"] == {"p50": None, "p90": None}


def test_speedup_is_the_ratio_of_pooled_throughputs():
    fast = [
        record("a", "dense", histogram=(0, 0, 5), seconds=1.0),
        record("b", "dense", histogram=(0, 10), seconds=4.0),
    ]
    slow = [record("a", "ar", histogram=(0, 10), seconds=2.0), record("b", "ar", histogram=(0, 10), seconds=6.0)]
    block = metrics.speedup(fast, slow, resamples=200)
    assert block["speedup"] == pytest.approx((20 / 5) / (20 / 8))
    low, high = block["ci95"]
    assert low <= block["speedup"] <= high


def test_intervals_need_two_clusters():
    rows = [record("a", "dense", cluster="x"), record("b", "dense", cluster="x")]
    assert metrics.speedup(rows, rows)["ci95"] is None
    assert metrics.quality_delta(rows, rows, "rougeL") == {"delta": 0.0, "ci95": None}


def test_clusters_widen_the_interval():
    changed = [(index % 10 // 5) * 10.0 + index % 3 for index in range(40)]
    base = [record(f"e{i}", "dense") for i in range(40)]
    alone = [record(f"e{i}", "sparse", grade={"rougeL": 20.0 + value}) for i, value in enumerate(changed)]
    joined = [record(f"e{i}", "sparse", grade=row.grade, cluster=str(i // 5)) for i, row in enumerate(alone)]
    widths = []
    for rows in (alone, joined):
        low, high = metrics.quality_delta(rows, base, "rougeL", resamples=2000)["ci95"]
        widths.append(high - low)
    assert widths[1] > 1.3 * widths[0]


def test_a_constant_difference_has_an_interval_of_no_width():
    base = [record(f"e{i}", "dense") for i in range(5)]
    rows = [record(f"e{i}", "sparse", grade={"rougeL": 19.0}) for i in range(5)]
    assert metrics.quality_delta(rows, base, "rougeL") == {"delta": -1.0, "ci95": [-1.0, -1.0]}


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
        "fidelity",
    ]
    assert set(result["compare"]["sparse_vs_ar"]) == {"speedup", "ci95"}
    assert set(result["compare"]["quality_delta"]["rougeL"]) == {"delta", "ci95"}
    assert result["paths"]["block_attention.torch"] == sum(row.steps * 30 for row in rows if row.arm == "sparse")
    assert result["ceiling"] == {"sparse_vs_dense": pytest.approx(4.4 / 3.0)}
    assert result["prompt_tokens"] == {"median": 1000, "max": 1000}


def test_arms_that_were_not_run_leave_nulls():
    rows = [row for index in range(3) for row in example(f"e{index}", ("ar", "sparse_ar"))]
    compare = summary(rows, arms=("ar", "sparse_ar"))["compare"]
    assert compare["sparse_vs_ar"] is compare["sparse_vs_dense"] is compare["dense_vs_ar"] is None
    assert compare["sparse_ar_vs_ar"]["speedup"] > 1
    assert compare["quality_delta"] == {"rougeL": {"delta": None, "ci95": None}}
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
