from dataclasses import replace

import numpy as np
import pytest

from harness.evidence import differences
from tests.evidence_samples import record


def test_examples_of_one_wave_are_resampled_together():
    """Their times are shares of the same steps; a single wave has no interval."""
    rows = {
        arm: [record(name, arm, seconds=seconds, wave="a") for name in "ab"] for arm, seconds in (("x", 1), ("y", 2))
    }
    block = differences.speedup(rows["x"], rows["y"], resamples=200)
    assert block["speedup"] == pytest.approx(2) and block["ci95"] is block["steps_per_second"]["ci95"] is None
    alone = {arm: [replace(row, wave="") for row in several] for arm, several in rows.items()}
    assert differences.speedup(alone["x"], alone["y"], resamples=200)["ci95"] is not None


def test_waves_and_clusters_link_what_was_timed_together():
    rows = [
        record(name, wave=wave, cluster=cluster) for name, wave, cluster in ("ap-", "bpx", "cqx", "dq-", "er-", "f-y")
    ]
    rows = [replace(row, wave=row.wave.strip("-"), cluster=row.cluster.strip("-")) for row in rows]
    labels = differences.timed_together(rows)
    # a and b shared wave p, b and c article x, c and d wave q; e was alone in its wave, f in none
    assert len(set(labels[:4])) == 1 and len(set(labels)) == 3
    assert differences.timed_together([replace(row, wave="") for row in rows]) == ["a", "x", "x", "d", "e", "y"]


def test_speedup_is_the_ratio_of_pooled_throughputs():
    fast = [
        record("a", "dense", histogram=(0, 0, 5), seconds=1.0),
        record("b", "dense", histogram=(0, 10), seconds=4.0),
    ]
    slow = [record("a", "ar", histogram=(0, 10), seconds=2.0), record("b", "ar", histogram=(0, 10), seconds=6.0)]
    block = differences.speedup(fast, slow, resamples=200)
    assert block["speedup"] == pytest.approx((20 / 5) / (20 / 8))
    low, high = block["ci95"]
    assert low <= block["speedup"] <= high


def test_intervals_need_two_clusters():
    rows = [record("a", "dense", cluster="x"), record("b", "dense", cluster="x")]
    assert differences.speedup(rows, rows)["ci95"] is None
    assert differences.quality_delta(rows, rows, "rougeL") == dict.fromkeys(differences.KEYS) | {
        "delta": 0.0,
        "clusters": 1,
        "changed": 0,
    }


def test_clusters_widen_the_interval():
    changed = [(index % 10 // 5) * 10.0 + index % 3 for index in range(40)]
    base = [record(f"e{i}", "dense") for i in range(40)]
    alone = [record(f"e{i}", "sparse", grade={"rougeL": 20.0 + value}) for i, value in enumerate(changed)]
    joined = [record(f"e{i}", "sparse", grade=row.grade, cluster=str(i // 5)) for i, row in enumerate(alone)]
    widths = []
    for rows in (alone, joined):
        low, high = differences.quality_delta(rows, base, "rougeL", resamples=2000)["ci95"]
        widths.append(high - low)
    assert widths[1] > 1.3 * widths[0]


def test_a_constant_difference_has_an_interval_of_no_width():
    base = [record(f"e{i}", "dense") for i in range(5)]
    rows = [record(f"e{i}", "sparse", grade={"rougeL": 19.0}) for i in range(5)]
    block = differences.quality_delta(rows, base, "rougeL")
    assert (block["delta"], block["ci95"], block["se"]) == (-1.0, [-1.0, -1.0], 0.0)


def test_a_speedup_is_the_product_of_its_factors():
    """By hand: 20 tokens in 9 steps of 5 s against 20 in 20 steps of 8 s."""
    fast = [record("a", histogram=(0, 1, 1, 3), seconds=2.0), record("b", histogram=(0, 0, 4), seconds=3.0)]
    slow = [record("a", histogram=(0, 12), seconds=5.0), record("b", histogram=(0, 8), seconds=3.0)]
    block = differences.speedup(fast, slow, resamples=200)
    tokens, steps = block["tokens_per_step"], block["steps_per_second"]
    assert tokens["ratio"] == pytest.approx((20 / 9) / 1) and steps["ratio"] == pytest.approx((9 / 5) / (20 / 8))
    assert tokens["ratio"] * steps["ratio"] == pytest.approx(block["speedup"])
    assert all(low <= part["ratio"] <= high for part in (tokens, steps) for low, high in [part["ci95"]])


def scored(name, logprob, tokens=10, **changes):
    return record(name, reference={"tokens": tokens, "logprob": logprob}, **changes)


def test_log_probabilities_are_pooled_over_tokens():
    sparse = [scored("a", -30.0), scored("b", -10.0, 30), record("c")]
    dense = [scored("a", -28.0), scored("b", -9.0, 30), record("c")]
    assert differences.reference_block(sparse) == {"logprob": pytest.approx(-1.0), "tokens": 40}
    assert differences.reference_block([record("c")]) is None
    block = differences.reference_delta(sparse, dense)
    assert block["delta"] == pytest.approx(-3 / 40) and (block["clusters"], block["changed"]) == (2, 2)
    # residuals of the ratio estimator: -2 + 3/40 * 10 and -1 + 3/40 * 30, twice their squares over 40 tokens
    assert block["se"] == pytest.approx((2 * (1.25**2 + 1.25**2)) ** 0.5 / 40)
    assert differences.reference_delta([record("c")], [record("c")]) == dict.fromkeys(differences.KEYS)
    with pytest.raises(ValueError, match=r"'a'.*different lengths"):
        differences.reference_delta([scored("a", -30.0)], [scored("a", -30.0, 11)])


def test_clusters_count_once_in_standard_errors():
    """Four questions on each of ten articles, the same change on all four: the error is that of ten examples."""
    base = [record(f"e{i}", cluster=str(i // 4)) for i in range(40)]
    rows = [replace(row, grade={"rougeL": 20.0 + i // 4}) for i, row in enumerate(base)]
    joined = differences.quality_delta(rows, base, "rougeL", resamples=200)
    ten = differences.quality_delta(rows[::4], base[::4], "rougeL", resamples=200)
    assert joined["clusters"] == 10 and joined["changed"] == 9
    assert joined["se"] == pytest.approx(ten["se"]) and joined["mdd"] == pytest.approx(ten["mdd"])


def test_no_change_in_few_examples_excludes_little():
    rows = [record(f"e{i}") for i in range(24)]
    block = differences.quality_delta(rows, rows, "rougeL")
    assert block["delta"] == block["se"] == block["changed"] == 0
    assert block["mdd"] == pytest.approx(100 * (1 - 0.05 ** (1 / 24)))
    scores = [scored(f"e{i}", -3.0) for i in range(24)]
    assert differences.reference_delta(scores, scores)["mdd"] is None


def changes(rng, count, effect):
    """Of outputs' scores: two in five do not change, the others do with a long tail of losses."""
    return effect + (2.0 - rng.gamma(4.0, 0.5, size=count)) * (rng.random(count) < 0.6)


@pytest.mark.slow
@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize("count", [24, 48])
def test_intervals_of_differences_cover_a_known_effect(count, together):
    """Also where up to four questions share an article, which moves them alike."""
    rng = np.random.default_rng(13)
    hits = 0
    for trial in range(1000):
        sizes = rng.integers(1, together + 1, size=count)
        names = [str(name) for name in np.repeat(np.arange(count), sizes)]
        values = (np.repeat(changes(rng, count, -0.4), sizes) + changes(rng, len(names), -0.4)) / 2
        columns = [[value, 1.0] for value in values.tolist()]
        low, high = differences.difference(columns, names, bounded=True, resamples=1000, seed=trial)["ci95"]
        hits += low <= -0.4 <= high
    print(f"\n{count} clusters of up to {together}: covered in {hits / 1000:.3f}")
    assert 0.93 <= hits / 1000 <= 0.97
