import numpy as np
import pytest

from harness.evidence import bootstrap


def difference_totals(rng, count, effect):
    values = effect + rng.gamma(2.0, 2.0, size=count) - 4.0
    return np.stack([values, np.ones(count)], axis=1)


def ratio_totals(rng, count, effect):
    """Paired timings: both arms share the length of the example, noise is multiplicative."""
    tokens = rng.integers(20, 120, size=count).astype(float)
    base = tokens * 0.02 * rng.lognormal(0.0, 0.15, size=count)
    fast = tokens * 0.02 / effect * rng.lognormal(0.0, 0.15, size=count)
    return np.stack([tokens, fast, tokens, base], axis=1)


def in_clusters(rng, count, make, effect):
    """One to six examples in each of `count` clusters, which share half of what tells them from the others."""
    sizes = rng.integers(1, 7, size=count)
    names = [str(name) for name in np.repeat(np.arange(count), sizes)]
    shared = np.repeat(make(rng, count, effect), sizes, axis=0)
    own = make(rng, len(names), effect)
    return bootstrap.cluster_totals((shared + own) / 2, names)


def clustered_differences(rng, count, effect):
    return in_clusters(rng, count, difference_totals, effect)


def clustered_ratios(rng, count, effect):
    return in_clusters(rng, count, ratio_totals, effect)


def covered(make, statistic, effect, *, count, trials, resamples):
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(trials):
        low, high = bootstrap.interval(make(rng, count, effect), statistic, resamples=resamples, seed=trial)
        hits += low <= effect <= high
    return hits / trials


@pytest.mark.parametrize(
    ("make", "statistic", "effect"),
    [(difference_totals, bootstrap.mean_difference, 0.7), (ratio_totals, bootstrap.ratio_of_rates, 1.4)],
)
@pytest.mark.parametrize("count", [12, 30])
def test_intervals_cover_a_known_effect(make, statistic, effect, count):
    assert covered(make, statistic, effect, count=count, trials=250, resamples=1000) >= 0.90


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "statistic", "effect"),
    [
        (difference_totals, bootstrap.mean_difference, 0.7),
        (clustered_differences, bootstrap.mean_difference, 0.7),
        (ratio_totals, bootstrap.ratio_of_rates, 1.4),
        (clustered_ratios, bootstrap.ratio_of_rates, 1.4),
    ],
)
@pytest.mark.parametrize("count", [24, 48])
def test_intervals_cover_a_known_effect_in_many_trials(make, statistic, effect, count):
    share = covered(make, statistic, effect, count=count, trials=1000, resamples=1000)
    print(f"\n{make.__name__} {count}: covered in {share:.3f}")
    assert 0.93 <= share <= 0.97


def test_the_same_seed_gives_the_same_interval():
    totals = difference_totals(np.random.default_rng(0), 20, 0.0)
    first = bootstrap.interval(totals, bootstrap.mean_difference, seed=3)
    assert first == bootstrap.interval(totals, bootstrap.mean_difference, seed=3)
    assert first != bootstrap.interval(totals, bootstrap.mean_difference, seed=4)


def test_skewed_data_move_the_interval_towards_the_tail():
    values = np.concatenate([np.zeros(25), [10.0, 30.0, 60.0]])
    totals = np.stack([values, np.ones_like(values)], axis=1)
    low, high = bootstrap.interval(totals, bootstrap.mean_difference)
    assert high - values.mean() > values.mean() - low


def test_undefined_statistics_have_no_interval():
    assert bootstrap.interval(np.ones((1, 2)), bootstrap.mean_difference) is None
    assert bootstrap.interval(np.zeros((5, 4)), bootstrap.ratio_of_rates) is None


def test_degenerate_corrections_fall_back_to_percentiles():
    totals = np.stack([np.full(6, 2.5), np.ones(6)], axis=1)
    assert bootstrap.interval(totals, bootstrap.mean_difference) == (2.5, 2.5)


def test_clusters_are_summed():
    totals = bootstrap.cluster_totals(np.array([[1.0, 1], [2, 1], [5, 1]]), ["x", "y", "x"])
    assert totals.tolist() == [[6.0, 2.0], [2.0, 1.0]]


def test_unequal_clusters_count_as_fewer():
    assert bootstrap.effective(np.full(24, 3.0)) == 24
    assert bootstrap.effective(np.array([10.0, *[1.0] * 10])) == 4  # 20^2 / 110
    assert bootstrap.effective(np.array([1.0, 0.0])) == bootstrap.effective(np.zeros(2)) == 2


def test_quantiles_of_student_t():
    # two-sided 95% points of the usual tables
    for degrees, point in ((1, 12.706), (4, 2.776), (29, 2.045), (499, 1.965)):
        assert bootstrap.t_quantile(0.975, degrees) == pytest.approx(point, rel=1e-3)
