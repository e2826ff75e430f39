"""How workers straggle, and which law they follow: found where it is, and not where it is not."""

import numpy as np
import pytest

from mpisync.planning.composite import Composite, chen2016
from mpisync.planning.diagnosis import LEVEL, diagnose, slow_events
from mpisync.planning.efficiency import Efficiency
from mpisync.planning.fitting import fit_composite, fit_laws
from mpisync.planning.laws import Exponential, Lognormal, Pareto, ShiftedExponential, Weibull
from mpisync.planning.remedies import remedies
from mpisync.planning.tables import read_table

TRACE = "tests/data/bytedance_SE_dp_compute_seconds_42x32.csv"
LAWS = [Exponential(2.0), ShiftedExponential(1.0, 0.3), Pareto(0.5, 3.5), Lognormal(1.45, 0.09), Weibull(2.0, 3.0)]


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def trace(request):
    table = read_table(str(request.config.rootpath / TRACE))
    assert table.times_s.shape == (42, 32) and len(table.notes) == 1
    return table.times_s


# The tests of independence.


@pytest.mark.parametrize("law", [Lognormal(1.0, 0.2), Pareto(1.0, 1.5), Exponential(1.0)], ids=str)
def test_independent_times_are_seldom_said_to_be_dependent(law):
    tests = ("rank_p", "autocorrelation_p", "drift_p", "together_p", "clustering_p")
    found = [diagnose(law.sample(rng(seed), 60, 8)) for seed in range(60)]
    for name in tests:
        p = np.array([getattr(one, name) for one in found])
        # Of 60 at a level of 5 %, 3 are expected, and 9 or more have probability 0.003.
        assert (p < 0.05).sum() <= 8, name
    assert sum(one.is_independent for one in found) >= 52 and not any(one.slow for one in found)


def test_few_steps_of_many_workers_do_not_seem_to_last():
    # Ranks without replacement correlate by -1/n: of 64 workers that would be 2 standard errors.
    p = [diagnose(Lognormal(1.0, 0.2).sample(rng(seed), 15, 64)).autocorrelation_p for seed in range(40)]
    assert (np.array(p) < 0.05).sum() <= 6


@pytest.mark.parametrize(
    "name, law",
    [
        ("rank_p", Composite(1.0, sigma=0.1, rank_sigma=0.1)),
        ("together_p", Composite(1.0, sigma=0.1, step_sigma=0.05)),
        ("clustering_p", Composite(1.0, sigma=0.05, event_a=0.3, event_b=6.0, event_scale_s=1.5, event_alpha=2.0)),
    ],
)
def test_each_kind_of_dependence_is_found_by_its_test(name, law):
    for seed in range(5):
        found = diagnose(law.sample(rng(seed), 150, 16))
        assert getattr(found, name) < LEVEL and not found.is_independent
    assert found.is_clustered == (name != "rank_p")


def test_slowness_that_lasts_is_found():
    noise = rng().standard_normal((200, 6))
    own = np.zeros_like(noise)
    for t in range(1, 200):
        own[t] = 0.6 * own[t - 1] + noise[t]
    found = diagnose(np.exp(0.1 * own))
    assert found.autocorrelation == pytest.approx(0.55, abs=0.1) and found.autocorrelation_p < 1e-6
    common = diagnose(np.exp(0.1 * own[:, :1] + 0.02 * noise))
    assert common.drift_p < LEVEL and common.drift > 0.4


@pytest.mark.parametrize("workers, slow", [(2, [1]), (3, [0]), (8, [7]), (32, [3, 9])])
def test_persistently_slow_workers_are_named_with_their_ratio(workers, slow):
    times = rng().lognormal(0, 0.05, (60, workers))
    times[:, slow] *= 2.36
    found = diagnose(times)
    assert sorted(one.column for one in found.slow) == slow
    assert all(one.ratio == pytest.approx(2.36, rel=0.06) and one.share == 1 for one in found.slow)


def test_now_and_then_slow_is_not_persistently_slow():
    times = rng().lognormal(0, 0.05, (100, 8))
    times[::2, 0] *= 5
    assert diagnose(times).slow == []


def test_events_are_what_stands_out_from_the_workers_own():
    times = np.ones((50, 2)) * [1.0, 3.0] * rng().lognormal(0, 0.05, (50, 2))
    times[7, 0] = 2.0  # slow for worker 0, though worker 1 always takes longer
    assert np.argwhere(slow_events(times)).tolist() == [[7, 0]]


def test_the_trace_is_light_independent_and_transient(trace):
    found = diagnose(trace)
    assert found.slowest_over_mean == pytest.approx(1.26, abs=0.005)
    assert found.is_independent and found.slow == [] and found.event_rate < 0.005


def test_the_straggler_study_is_clustered():
    found = diagnose(chen2016().sample(rng(1), 1000, 100))
    assert found.is_clustered and found.clustering > 1.3 and found.event_rate == pytest.approx(0.0146, abs=0.003)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1)])
def test_a_diagnosis_takes_two_of_each(shape):
    with pytest.raises(ValueError, match="2 steps and 2 workers at least"):
        diagnose(np.ones(shape))


def test_equal_times_and_tiny_ones_break_nothing():
    assert diagnose(np.ones((30, 4))).is_independent
    assert fit_laws(np.ones((30, 4))) == []
    assert diagnose(np.ones((2, 2))).slow == []
    assert fit_composite(np.ones((30, 4))).sigma == 0


# Fits.


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_right_law_fits_best_and_its_parameters_are_found(law):
    times = law.sample(rng(3), 500, 8)
    fits = fit_laws(times)
    best = next(one for one in fits if one.law.NAME == law.NAME)
    # An exponential is a shifted one too, which by chance may seem a little better.
    assert best.aic < fits[0].aic + 4 and [one.aic for one in fits] == sorted(one.aic for one in fits)
    assert best.p > 0.02 and best.distance < 0.03
    assert best.slowest_ratio == pytest.approx(1, abs=0.06)
    for name, value in vars(law).items():  # 4,000 times: errors of at most 2 %
        assert getattr(best.law, name) == pytest.approx(value, rel=0.06)


def test_a_wrong_law_is_refused_by_its_p_and_says_how_wrong_it_is():
    fits = {one.law.NAME: one for one in fit_laws(Pareto(1.0, 1.8).sample(rng(), 300, 8))}
    assert fits["lognormal"].p < 0.05 and fits["lognormal"].slowest_ratio < 0.8


def test_p_is_no_smaller_than_it_should_be():
    # Were the fitted parameters not allowed for, p would be near 1; were times few, near 0.
    p = [fit_laws(Lognormal(1.0, 0.3).sample(rng(seed), 40, 4), seed=seed) for seed in range(20)]
    values = np.array([next(one.p for one in fits if one.law.NAME == "lognormal") for fits in p])
    assert 0.25 < values.mean() < 0.75 and (values < 0.05).sum() <= 4


def test_the_composite_fit_finds_the_study_again():
    truth, draws = chen2016(), rng(2)
    law = fit_composite(truth.sample(draws, 1500, 100))
    assert law.median_s == pytest.approx(1.45, rel=0.01) and law.sigma == pytest.approx(0.09, rel=0.05)
    assert law.step_sigma == law.rank_sigma == law.slow_workers == 0
    mean = truth.event_a / (truth.event_a + truth.event_b)
    # Events from 2.00 to 2.08 s, 8 %, are within what the body may do.
    assert law.event_a / (law.event_a + law.event_b) == pytest.approx(0.92 * mean, rel=0.1)
    assert law.event_a + law.event_b == pytest.approx(truth.event_a + truth.event_b, rel=0.35)
    assert law.event_alpha == pytest.approx(2.26, rel=0.1)
    slowest = [np.sort(one.sample(rng(3), 4000, 100), axis=1).mean(axis=0)[94:98] for one in (law, truth)]
    assert slowest[0] == pytest.approx(slowest[1], rel=0.03)


def test_the_composite_fit_finds_steps_and_machines():
    truth = Composite(1.0, sigma=0.1, step_sigma=0.2, rank_sigma=0.05, slow_workers=2, slow_factor=1.5)
    law = fit_composite(truth.sample(rng(4), 400, 60))
    assert law.slow_workers == 2 and law.slow_factor == pytest.approx(1.5, rel=0.1)
    assert law.sigma == pytest.approx(0.1, rel=0.05) and law.step_sigma == pytest.approx(0.2, rel=0.15)
    assert law.rank_sigma == pytest.approx(0.05, rel=0.35) and law.event_a == 0


# What else would help.


def test_shares_in_proportion_to_speed_make_a_steady_mixture_as_fast_as_it_can_be():
    times = np.ones((30, 4)) * [1.0, 1.0, 2.0, 4.0]
    found = remedies(times, [], Efficiency(0.0))
    assert found.shares.sum() == pytest.approx(4)
    # Speeds 1, 1, 1/2, 1/4: 2.75 batches a second of which a step has 4; instead of 4 s.
    assert found.rebalanced == pytest.approx(4 / (4 / 2.75)) and found.equal == pytest.approx(2.0)


def test_excluding_the_slow_pays_by_the_noise():
    times = np.ones((30, 4)) * [1.0, 1.0, 1.0, 2.0]
    assert remedies(times, [3], Efficiency(0.0)).excluded == pytest.approx(2.0)
    assert remedies(times, [3], Efficiency(np.inf)).excluded == pytest.approx(2.0 * 3 / 4)
    assert remedies(times, [], Efficiency(0.0)).excluded == 1.0


def test_waiting_for_data_and_large_batches_are_found_as_causes():
    times = rng().lognormal(0, 0.02, (100, 4))
    data = np.full(times.shape, 0.1)
    times[10, 2] += 3.0
    data[10, 2] += 3.0
    assert remedies(times, [], Efficiency(0.0), data_s=data).data_share == pytest.approx(1, abs=0.05)
    assert remedies(times, [], Efficiency(0.0), data_s=data * 0).data_share == 0
    samples = np.round(32 * times**3)
    assert remedies(times, [], Efficiency(0.0), samples=samples).samples_correlation > 0.9
    assert np.isnan(remedies(times, [], Efficiency(0.0), samples=samples * 0 + 32).samples_correlation)
