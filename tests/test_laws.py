"""Delay laws: what they draw, their order statistics against Monte Carlo, and their text forms."""

import doctest
import importlib
import math

import numpy as np
import pytest

from mpisync.planning.composite import Composite, chen2016
from mpisync.planning.empirical import Empirical, block_steps
from mpisync.planning.forms import parse_law
from mpisync.planning.laws import (
    Exponential,
    Independent,
    Lognormal,
    Pareto,
    ShiftedExponential,
    Weibull,
)
from mpisync.planning.theory import order_statistics

LAWS = [
    Exponential(2.0),
    ShiftedExponential(1.0, 0.3),
    Pareto(0.5, 3.5),
    Lognormal(1.45, 0.09),
    Lognormal(1.0, 0.8),
    Weibull(1.0, 0.7),
    Weibull(2.0, 5.0),
]
MODULES = (
    "advice", "bounds", "cells", "choices", "columns", "composite", "diagnosis", "documents", "efficiency", "empirical",
    "fitting", "forms", "laws", "observed", "regimes", "remedies", "rollout", "special", "theory",
)  # fmt: skip


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    results = doctest.testmod(importlib.import_module(f"mpisync.planning.{name}"))
    assert results.failed == 0 and results.attempted > 0


# Order statistics.


@pytest.mark.parametrize("workers, steps", [(4, 1_000_000), (10, 1_000_000), (100, 20_000)])
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_order_statistics_agree_with_monte_carlo_for_every_k(law, workers, steps):
    total, squares, done = np.zeros(workers), np.zeros(workers), 0
    draws = rng(workers)
    while done < steps:
        drawn = np.sort(law.sample(draws, min(100_000, steps - done), workers), axis=1)
        total, squares, done = total + drawn.sum(axis=0), squares + (drawn**2).sum(axis=0), done + len(drawn)
    mean = total / steps
    error = np.sqrt((squares / steps - mean**2) / steps)
    # Of some 800 comparisons in all, one in 200 such tests would see 4.5 standard errors by chance.
    assert (np.abs(law.order_statistics_s(workers) - mean) < 4.5 * error).all()


@pytest.mark.parametrize("law", [Exponential(2.0), ShiftedExponential(1.0, 0.3), Pareto(0.5, 3.5)], ids=str)
@pytest.mark.parametrize("workers", [1, 2, 37, 1500])
def test_the_quadrature_agrees_with_the_closed_forms(law, workers):
    by_quadrature = Independent.order_statistics_s(law, workers)
    assert by_quadrature == pytest.approx(law.order_statistics_s(workers), rel=1e-9)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_order_statistics_sum_to_as_many_means(law):
    for workers in (2, 50, 1200):
        means = law.order_statistics_s(workers)
        assert (np.diff(means) > 0).all()
        assert means.mean() == pytest.approx(law.expected_s(), rel=1e-9)


def test_weibull_of_shape_one_is_exponential_and_pareto_of_large_alpha_too():
    expected = Exponential(2.0).order_statistics_s(20)
    assert Weibull(2.0, 1.0).order_statistics_s(20) == pytest.approx(expected, rel=1e-9)
    # alpha·(Pareto(1, alpha) - 1) tends to an exponential.
    scaled = 1e6 * (Pareto(1.0, 1e6).order_statistics_s(20) - 1)
    assert scaled == pytest.approx(Exponential(1.0).order_statistics_s(20), rel=1e-5)


def test_the_tail_of_a_pareto_decides_which_means_are_infinite():
    means = Pareto(1.0, 0.5).order_statistics_s(5)  # P-K+1 must exceed 2
    assert np.isfinite(means[:3]).all() and np.isinf(means[3:]).all()


def test_a_lognormal_without_spread_is_one_time():
    assert Lognormal(0.3, 0.0).order_statistics_s(9) == pytest.approx(np.full(9, 0.3))


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_hazard_is_the_inverse_and_its_slope_the_density(law):
    hazards = np.geomspace(1e-3, 30, 60)
    times = law.at_hazard(hazards)
    assert law.hazard(times) == pytest.approx(hazards, rel=1e-9, abs=1e-12)
    step = 1e-6 * times
    slope = (law.hazard(times + step) - law.hazard(times - step)) / (2 * step)
    assert law.log_density(times) == pytest.approx(np.log(slope) - hazards, abs=1e-4)


@pytest.mark.parametrize("law", [*LAWS, chen2016(), Empirical(np.ones((7, 9)) * np.arange(1, 10))], ids=str)
def test_samples_have_the_shape_and_follow_from_the_seed(law):
    one = law.sample(rng(3), 5, 4)
    assert one.shape == (5, 4) and one.dtype == np.float64 and (one > 0).all()
    assert np.array_equal(one, law.sample(rng(3), 5, 4))
    assert not np.array_equal(one, law.sample(rng(4), 5, 4)) or law.__class__ is Empirical


@pytest.mark.parametrize(
    "law, values", [(Exponential, (0,)), (Pareto, (1, math.nan)), (Weibull, (-1, 1)), (Lognormal, (1, math.inf))]
)
def test_parameters_that_make_no_law_are_refused(law, values):
    with pytest.raises(ValueError, match=f"of the law {law.NAME} must be finite"):
        law(*values)


# The composite law.


def test_the_calibrated_law_reproduces_the_straggler_study():
    # From 40,000 steps the standard errors are 0.002.
    times = np.sort(chen2016().sample(rng(1), 40_000, 100), axis=1)
    assert (times[:, 97] < 2).mean() == pytest.approx(0.80, abs=0.01)
    assert (times[:, 99] < 2).mean() == pytest.approx(0.30, abs=0.01)
    means = times.mean(axis=0)
    assert 1.4 < means[49] and means[96] < 1.8  # "1.4 to 1.8 s but for the last few"
    assert means[99] > 3


def test_without_clusters_the_study_cannot_be_reproduced():
    # Events as frequent, but independent: what gives 30 % for the last gives 88 % for the 98th.
    independent = Composite(
        median_s=1.45, sigma=0.09, cap_s=2, event_a=0.012e6, event_b=0.988e6, event_scale_s=2, event_alpha=2.26
    )
    times = np.sort(independent.sample(rng(1), 20_000, 100), axis=1)
    assert (times[:, 99] < 2).mean() == pytest.approx(0.30, abs=0.02)
    assert (times[:, 97] < 2).mean() == pytest.approx(0.88, abs=0.02)


def test_the_number_of_events_in_a_step_is_beta_binomial():
    from scipy.stats import betabinom

    counts = (chen2016().sample(rng(2), 20_000, 100) >= 2).sum(axis=1)
    expected = betabinom(100, 3.098, 209.5)
    for k in range(6):  # within 4 standard errors
        p = expected.pmf(k)
        assert (counts == k).mean() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 20_000))


def test_each_factor_of_the_composite_does_what_it_says():
    def logs(**values):
        return np.log(Composite(median_s=1.0, **values).sample(rng(5), 3000, 40))

    steps = logs(step_sigma=0.2)
    assert np.ptp(steps, axis=1).max() == 0 and steps[:, 0].std() == pytest.approx(0.2, rel=0.05)
    ranks = logs(rank_sigma=0.2, rank_seed=4)
    assert np.ptp(ranks, axis=0).max() == 0 and 0.1 < ranks[0].std() < 0.3
    slow = logs(slow_workers=2, slow_factor=2.36)
    assert np.exp(slow[7]) == pytest.approx([2.36] * 2 + [1.0] * 38)
    data = np.exp(logs(data_cv=0.3))
    assert data.mean() == pytest.approx(1, rel=0.01) and data.std() == pytest.approx(0.3, rel=0.02)
    capped = np.exp(logs(sigma=0.5, cap_s=1.5))
    assert capped.max() <= 1.5 and (capped == 1.5).mean() < 0.01  # truncated, not piled up


def test_machines_stay_the_same_whatever_is_drawn_before():
    law = Composite(median_s=1.0, rank_sigma=0.3)
    few, more = law.sample(rng(1), 2, 5), law.sample(rng(9), 7, 8)
    assert few[0] == pytest.approx(more[3, :5])


@pytest.mark.parametrize(
    "values, said",
    [
        ({"median_s": 0}, "greater than 0"),
        ({"median_s": 1, "sigma": -1}, "must not be negative"),
        ({"median_s": 1, "cap_s": 0.5}, "below the median"),
        ({"median_s": 1, "event_a": 1}, "event_b, event_scale_s and event_alpha"),
        ({"median_s": 1, "slow_workers": 1.5}, "whole number"),
        ({"median_s": 1, "sigma": math.nan}, "must not be negative"),
    ],
)
def test_a_composite_that_makes_no_law_is_refused(values, said):
    with pytest.raises(ValueError, match=said):
        Composite(**values)


# Measured times drawn again.


def test_what_happened_in_a_step_stays_together():
    table = np.arange(1.0, 61).reshape(20, 3)
    drawn = Empirical(table).sample(rng(), 500, 3)
    assert {tuple(row) for row in drawn} == {tuple(row) for row in table}


def test_blocks_keep_consecutive_steps_together():
    table = np.arange(1.0, 65)[:, None]
    drawn = Empirical(table).sample(rng(), 400, 1)[:, 0]
    length = block_steps(64)
    follows = (drawn[1:] - drawn[:-1]) % 64 == 1
    assert length == 4 and follows.mean() > 1 - 1.2 / length
    counts = np.bincount(drawn.astype(int), minlength=65)[1:]
    assert counts.min() > 0  # the last steps are as likely as others


def test_fewer_workers_are_the_same_ones_in_all_steps_and_more_are_refused():
    law = Empirical(np.ones((5, 6)) * np.arange(1.0, 7), "run.csv")
    drawn = law.sample(rng(), 10, 3)
    assert np.ptp(drawn, axis=0).max() == 0 and len(set(drawn[0])) == 3
    with pytest.raises(ValueError, match="times of 6 workers, which say nothing of the slowest of 7"):
        law.sample(rng(), 1, 7)


@pytest.mark.parametrize("times", [[], [1.0], [[0.0]], [[math.nan, 1.0]], [[-1.0]]])
def test_times_that_are_none_are_refused(times):
    with pytest.raises(ValueError, match="times must be"):
        Empirical(times)


# Text forms.


@pytest.mark.parametrize("law", [*LAWS, chen2016(), Composite(0.1, slow_workers=1, slow_factor=2.36)], ids=str)
def test_a_law_is_made_again_from_its_text(law):
    assert parse_law(str(law)) == law


def test_forms_of_names():
    assert parse_law("chen2016") == chen2016()
    assert parse_law(" lognormal:sigma=0.5, median=2 ") == Lognormal(2.0, 0.5)


def test_an_empirical_law_reads_its_file(tmp_path):
    path = tmp_path / "times.csv"
    path.write_text("1,2\n3,4\n")
    assert parse_law(f"empirical:{path}").times_s.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    "text, said",
    [
        ("normal:mean=1", "must be one of exponential:mean=S"),
        ("", "must be one of"),
        ("exponential", "needs mean"),
        ("exponential:2", "has the values mean"),
        ("exponential:mean=1,mean=2", "each once"),
        ("exponential:mean=fast", "must be a number, not 'fast'"),
        ("pareto:scale=1", "needs alpha"),
        ("weibull:scale=1,shape=0", "shape of the law weibull must be finite and greater than 0"),
        ("chen2016:sigma=1", "must be one of"),
        ("composite:median=1,slow_workers=half", "must be a number"),
    ],
)
def test_texts_that_name_no_law(text, said):
    with pytest.raises(ValueError, match=said):
        parse_law(text)


def test_order_statistics_of_a_law_without_closed_form_are_sampled_with_their_error():
    means, errors = order_statistics(chen2016(), 100, steps=5000, seed=3)
    again, _ = order_statistics(chen2016(), 100, steps=5000, seed=4)
    assert (errors > 0).all() and (np.abs(means - again)[:98] < 5 * math.sqrt(2) * errors[:98]).all()
    exact, none = order_statistics(Lognormal(1.0, 0.1), 100)
    assert not none.any() and exact == pytest.approx(Lognormal(1.0, 0.1).order_statistics_s(100))
