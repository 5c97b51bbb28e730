from dataclasses import replace

import numpy as np
import pytest

from harness.evidence import bootstrap, inference
from harness.evidence.differences import difference
from harness.evidence.rows import Difference, collect
from tests.evidence_samples import config, stored_run


def measured(values, *, bounded=True, clusters=None, resamples=400, seed=0):
    """A row's difference from one value for each example."""
    columns = [[float(value), 1.0] for value in values]
    groups = [str(index) for index in range(len(columns))] if clusters is None else clusters
    block = difference(columns, groups, resamples=resamples, seed=seed, bounded=bounded)
    return Difference(block["delta"], tuple(block["ci95"]), *(block[k] for k in ("se", "clusters", "changed", "mdd")))


def rare(count, losers, points=100.0):
    return measured([-points] * losers + [0.0] * (count - losers))


def test_the_detectable_difference_by_hand():
    # t_0.975 + t_0.80 with 9 degrees, from the usual tables: 2.262 + 0.883
    assert inference.detectable(2.0, 10, 10, bounded=True) == pytest.approx(2 * 3.145, rel=1e-3)
    assert inference.detectable(0.0, 24, 0, bounded=True) == pytest.approx(100 * (1 - 0.05 ** (1 / 24)))
    assert inference.detectable(0.0, 24, 0, bounded=False) is inference.detectable(None, 1, 0, bounded=True) is None
    few = inference.detectable(2.0, 10, 10, bounded=True, effective=3)
    assert few == pytest.approx(2 * (4.303 + 1.061), rel=1e-3), "unequal clusters count as fewer"
    one = inference.detectable(0.4, 24, 1, bounded=True)
    assert (1 - one / 100) ** 24 + 24 * one / 100 * (1 - one / 100) ** 23 == pytest.approx(0.05)


def test_holm_by_hand():
    assert inference.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert inference.holm([0.9, 0.6]) == [1.0, 1.0] and inference.holm([]) == []


def test_tests_agree_with_the_interval():
    rng = np.random.default_rng(3)
    for trial in range(60):
        found = measured(rng.gamma(1.0, 2.0, size=20) * rng.choice([-1, 1]) + rng.normal(0, 1), seed=trial)
        assert (inference.p_loss(found) <= 0.05) == (found.ci[1] < 0)
        assert (inference.p_of(found, 1.0) <= 0.05) == (found.ci[0] > -1.0)


def test_no_change_is_no_proof():
    """299 examples are needed before none that changed excludes a loss of a point; one that did needs more."""
    assert inference.p_loss(rare(24, 0)) == inference.p_loss(rare(24, 1)) == 1.0
    assert inference.p_of(rare(24, 0), 1.0) == pytest.approx(0.99**24)
    for losers, enough in ((0, 299), (1, 473)):
        for count in (enough - 1, enough):
            found = rare(count, losers)
            assert (inference.p_of(found, 1.0) <= 0.05) == (found.mdd <= 1.0) == (count == enough)
    assert inference.p_of(measured([0.0] * 400, bounded=False), 0.02) == 1.0
    assert inference.p_of(measured([-0.5] * 24), 1.0) > 0.8, "the same loss in all examples has no spread either"


def test_rare_large_losses_are_not_excluded_by_a_small_standard_error():
    found = rare(500, 2)
    assert (1.0 + found.value) / found.se > 2.1, "a t test would claim it"
    assert inference.p_of(found, 1.0) > 0.05


def test_the_tail_of_student_t():
    assert bootstrap.t_tail(2.776, 4) == pytest.approx(0.025, rel=1e-3)
    assert bootstrap.t_tail(-2.045, 29) == pytest.approx(0.975, rel=1e-3)
    assert bootstrap.t_tail(0.0, 7) == 0.5


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Two settings of one task and one of another."""
    folder = tmp_path_factory.mktemp("verdicts")
    for settings in (config(topk=8), config(topk=16), config("squad"), config() | {"attn": {"name": "dense"}}):
        stored_run(folder, settings)
    stored_run(folder, config(topk=32), traces=False)
    return collect(folder, sources="abc")


def test_verdicts_name_what_was_shown(families):
    told = inference.verdicts(families, "quality")
    sparse = [row for row in families if row.axes and row.delta.clusters]
    assert set(told) == {row.fingerprint for row in sparse} and len(sparse) == 3
    changed = []
    for row, values in zip(sparse, ([-4, -5, -4, -6] * 6, [0.1, -0.1, 0.2, -0.2] * 6, [9, -9, 5, -6] * 6), strict=True):
        changed.append(replace(row, delta=measured(values)))
    told = inference.verdicts(changed, "quality")
    assert [str(told[row.fingerprint]) for row in changed] == ["loss", "no loss > 1", "undecided"]
    small = replace(changed[0], delta=measured([-0.1, -0.2, -0.3] * 8))
    verdict = inference.verdicts([small], "quality")[small.fingerprint]
    assert (verdict.kind, verdict.within, str(verdict)) == ("loss", True, "loss < 1")
    assert str(inference.verdicts([small], "quality", margin=0.1)[small.fingerprint]) == "loss"
    assert inference.verdicts([replace(small, forced=True)], "quality") == {}
    stopped = replace(small, status="partial")
    assert inference.verdicts([stopped], "quality") == {}, "a search stops those that look bad: that is no sample"


def test_more_settings_make_every_claim_harder(families):
    row = next(row for row in families if row.axes and row.delta.clusters)
    values = np.array([-1.0, -2.0, 0.5, 2.0, -1.5, 2.0] * 4)
    alone = replace(row, delta=measured(values))
    margin = 2.5 * alone.delta.se
    among = [alone, *(replace(row, fingerprint=str(n), delta=measured(values * 9)) for n in range(9))]
    first, corrected = (inference.verdicts(rows, "quality", margin)[row.fingerprint] for rows in ([alone], among))
    assert first.kind == "no loss" and corrected.kind == "undecided"
    assert corrected.p_margin == pytest.approx(10 * first.p_margin)
    elsewhere = [alone, *(replace(other, task="another") for other in among[1:])]
    assert inference.verdicts(elsewhere, "quality", margin)[row.fingerprint] == first


SETTINGS = 10


def symmetric(rng, count, loss):
    """Most outputs stay, the others change a lot either way."""
    return -loss + 3 * rng.standard_normal(count) * (rng.random(count) < 0.6)


def skewed(rng, count, loss):
    """Many small gains and a long tail of losses."""
    return -loss + 2.0 - rng.gamma(4.0, 0.5, size=count)


def matched(rng, count, loss):
    """Exact match: an example in a hundred is won, and one and some more are lost."""
    return 100.0 * (rng.random(count) < 0.01) - 100.0 * (rng.random(count) < 0.01 + loss / 100)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "count", "trials"), [(symmetric, 24, 1000), (symmetric, 48, 1000), (skewed, 24, 1000), (matched, 200, 300)]
)
def test_false_claims_are_rare(make, count, trials):
    """No effect is called one, and a loss of the margin is called none, in at most 7% of trials and of families."""
    rng = np.random.default_rng(7)
    excluded = lossy = within = harmless = 0
    for trial in range(trials):
        seeds = range(trial * SETTINGS, (trial + 1) * SETTINGS)
        none = [measured(make(rng, count, 0.0), seed=seed) for seed in seeds]
        excluded += sum(found.ci[0] > 0 or found.ci[1] < 0 for found in none)
        lossy += min(inference.holm([inference.p_loss(found) for found in none])) <= 0.05
        margins = [inference.p_of(measured(make(rng, count, 1.0), seed=seed), 1.0) for seed in seeds]
        within += sum(value <= 0.05 for value in margins)
        harmless += min(inference.holm(margins)) <= 0.05
    rates = [excluded / trials / SETTINGS, lossy / trials, within / trials / SETTINGS, harmless / trials]
    print(f"\n{make.__name__} {count}: excludes 0, loss, within margin, no loss:", rates)
    assert max(rates) <= 0.07


@pytest.mark.slow
def test_the_detectable_difference_is_found_four_times_in_five():
    rng = np.random.default_rng(11)
    true = 3.0 / 24**0.5 * (bootstrap.t_quantile(0.975, 23) + bootstrap.t_quantile(0.8, 23))
    found = [measured(3.0 * rng.standard_normal(24) - true, seed=trial) for trial in range(1000)]
    assert np.mean([item.mdd for item in found]) == pytest.approx(true, rel=0.03)
    assert 0.77 <= np.mean([item.ci[1] < 0 for item in found]) <= 0.83
