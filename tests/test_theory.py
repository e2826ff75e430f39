"""Run times, bounds and efficiency: each formula against what it claims to be the mean of."""

import heapq
import math

import numpy as np
import pytest

from mpisync.planning import bounds, theory
from mpisync.planning.choices import candidates, choices, needed_steps
from mpisync.planning.efficiency import Efficiency, fit_iterations, iterations_to_loss, noise_from_steps
from mpisync.planning.laws import Exponential, Lognormal, Pareto, ShiftedExponential, Weibull
from mpisync.planning.rollout import deadline_step_times
from mpisync.planning.scale import backup_step_times
from mpisync.records import ArrivalRecord, StepRecord

CASES = [(1, 2), (3, 4), (4, 4), (9, 10), (25, 30)]


def rng(seed=0):
    return np.random.default_rng(seed)


def simulated(law, k, workers, *, updates, batch, async_, seed=0):
    """Play one of Dutta's four schemes event by event; return the mean time of an update and its error."""
    draws = iter(law.sample(rng(seed), updates * (k + workers) * 3, 1)[:, 0])
    events = [(next(draws), w) for w in range(workers)]
    heapq.heapify(events)
    now, closed, times, waiting = 0.0, 0, [], []
    since = 0.0
    while closed < 2 * updates:
        now, worker = heapq.heappop(events)
        waiting.append(worker)
        if batch:
            heapq.heappush(events, (now + next(draws), worker))
        if len(waiting) < k:
            continue
        if closed >= updates:
            times.append(now - since)
        since, closed = now, closed + 1
        if not async_:  # all start afresh
            events = [(now + next(draws), w) for w in range(workers)]
            heapq.heapify(events)
        elif not batch:
            for one in waiting:
                heapq.heappush(events, (now + next(draws), one))
        waiting = []
    # Consecutive updates of the asynchronous schemes depend on one another: errors from 40 batches.
    means = [part.mean() for part in np.array_split(np.array(times), 40)]
    return np.mean(times), np.std(means) / math.sqrt(40)


SCHEMES = {
    theory.k_sync: (False, False),
    theory.k_batch_sync: (True, False),
    theory.k_async: (False, True),
    theory.k_batch_async: (True, True),
}


@pytest.mark.parametrize("law", [Exponential(2.0), Weibull(1.0, 3.0), ShiftedExponential(1.0, 0.5)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda f: f.__name__)
def test_run_times_agree_with_an_event_by_event_simulation(scheme, law):
    batch, async_ = SCHEMES[scheme]
    for k, workers in [(1, 2), (3, 4), (9, 10)]:
        found = scheme(law, k, workers)
        mean, error = simulated(law, k, workers, updates=4000, batch=batch, async_=async_)
        assert abs(found.mean_s - mean) < 4.5 * math.hypot(error, found.error_s) + 1e-12, (k, workers)


@pytest.mark.parametrize("k, workers", CASES)
def test_run_times_of_exponential_workers(k, workers):
    law = Exponential(2.0)
    harmonic = sum(2.0 / i for i in range(workers - k + 1, workers + 1))  # (H_P - H_{P-K})/μ
    assert theory.k_sync(law, k, workers).mean_s == pytest.approx(harmonic)
    assert theory.k_async(law, k, workers).mean_s == pytest.approx(harmonic)
    assert theory.k_batch_sync(law, k, workers).mean_s == pytest.approx(2.0 * k / workers)
    assert theory.k_batch_async(law, k, workers).mean_s == pytest.approx(2.0 * k / workers)


@pytest.mark.parametrize("k, workers", [(1, 2), (3, 4), (9, 10)])
def test_sampled_run_times_agree_with_the_exponential_closed_forms(k, workers):
    sampled = ShiftedExponential(0.0, 2.0)  # the same law, which takes the general way
    for scheme in (theory.k_batch_sync, theory.k_async):
        found, exact = scheme(sampled, k, workers), scheme(Exponential(2.0), k, workers)
        assert exact.error_s == 0 < found.error_s < 0.01 * exact.mean_s
        assert abs(found.mean_s - exact.mean_s) < 4 * found.error_s


def test_k_async_is_no_slower_than_k_sync_for_new_longer_than_used_times():
    for law in (Weibull(1.0, 3.0), ShiftedExponential(1.0, 0.5), Lognormal(1.0, 0.3)):
        for k, workers in [(1, 4), (3, 4), (8, 10)]:
            found, sync = theory.k_async(law, k, workers), theory.k_sync(law, k, workers)
            assert found.mean_s < sync.mean_s + 4 * found.error_s


def test_k_batch_async_is_the_renewal_rate_for_a_heavy_tail_too():
    assert theory.k_batch_async(Pareto(1.0, 2.5), 7, 10).mean_s == pytest.approx(7 * (2.5 / 1.5) / 10)
    assert theory.k_batch_async(Exponential(1.0), 25, 10).mean_s == 2.5  # k may exceed the workers


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda f: f.__name__)
def test_k_that_no_step_can_have_is_refused(scheme):
    with pytest.raises(ValueError, match="k must be from 1"):
        scheme(Exponential(1.0), 0, 4)
    if not SCHEMES[scheme][0]:
        with pytest.raises(ValueError, match="but k is 5 with 4"):
            scheme(Exponential(1.0), 5, 4)


def test_speedup_per_machine_is_that_of_the_tensorflow_paper():
    # 50 + b machines for N = 50 there; of one number of machines here: T_P/T_N · N/P.
    step_s = np.array([1.0, 1.05, 1.2, 2.0])
    assert theory.speedup_per_machine(step_s) == pytest.approx([2.0 / 4, 2 / 1.05 * 2 / 4, 2 / 1.2 * 3 / 4, 1.0])


# Error bounds.


def gradient_descent(*, rate, k, curvature, variance, start, updates, runs, stale=0):
    """SGD on F(w) = curvature·w²/2 with Gaussian noise, all gradients `stale` versions old."""
    draws = rng(1)
    w = [np.full(runs, start)] * (stale + 1)
    for _ in range(updates):
        gradient = curvature * w[0] + math.sqrt(variance / k) * draws.standard_normal(runs)
        w = [*w[1:], w[-1] - rate * gradient]
    return (curvature * w[-1] ** 2 / 2).mean()


@pytest.mark.parametrize("updates", [0, 1, 5, 20, 200])
@pytest.mark.parametrize("k", [1, 8])
def test_the_bound_of_k_sync_holds_and_is_of_the_right_size(updates, k):
    problem = {"rate": 0.1, "variance": 4.0}
    bound = bounds.k_sync_error(updates, k, smoothness=2, convexity=2, batch=1, gap=9.0, **problem)
    error = gradient_descent(k=k, curvature=2, start=3.0, updates=updates, runs=20_000, **problem)
    assert 0.3 * bound < error < 1.02 * bound or updates in (5, 20) and error < bound


def test_the_floor_of_the_bound_falls_as_one_over_k_and_m():
    values = {"rate": 0.1, "smoothness": 2, "convexity": 1, "variance": 4.0, "gap": 1.0}
    floors = [bounds.k_sync_error(1e6, k, batch=m, **values) for k, m in [(1, 1), (4, 1), (4, 8)]]
    # ηLσ²/(2cKm) = 0.1·2·4/(2·1·K·m)
    assert floors == pytest.approx([0.4, 0.1, 0.0125])


def test_the_bound_of_k_async_is_that_of_sync_with_less_convexity():
    values = {"rate": 0.1, "smoothness": 2, "variance": 4.0, "batch": 2, "gap": 5.0}
    found = bounds.k_async_error(30, 4, convexity=1, gamma=0.5, fresh=0.2, **values)
    assert found == pytest.approx(bounds.k_sync_error(30, 4, convexity=0.6, **values))
    assert bounds.k_async_error(30, 4, convexity=1, gamma=1.0, fresh=0.0, **values) == math.inf


def test_the_bound_of_k_async_holds_for_stale_gradients():
    problem = {"rate": 0.05, "variance": 1.0}
    for updates in (5, 50, 500):
        # On this quadratic, w_j - w_{j-2} = 2 steps: γ = (2ηc/(1-ηc)²)² roughly; 0.5 is more than enough.
        bound = bounds.k_async_error(
            updates, 4, smoothness=2, convexity=2, batch=1, gap=9.0, gamma=0.5, fresh=0.0, **problem
        )
        assert gradient_descent(k=4, curvature=2, start=3.0, updates=updates, runs=5000, stale=2, **problem) < bound


def test_rates_beyond_the_theorems_are_refused():
    values = {"smoothness": 2, "convexity": 1, "variance": 1.0, "batch": 1, "gap": 1.0}
    with pytest.raises(ValueError, match="up to 1/L = 0.5, not 0.6"):
        bounds.k_sync_error(1, 1, rate=0.6, **values)
    with pytest.raises(ValueError, match=r"up to 1/\(2L\) = 0.25, not 0.3"):
        bounds.k_async_error(1, 1, rate=0.3, gamma=0.1, fresh=0.1, **values)
    with pytest.raises(ValueError, match="gamma and fresh must be from 0 to 1"):
        bounds.k_async_error(1, 1, rate=0.1, gamma=1.1, fresh=0.1, **values)


# Selection.


@pytest.mark.parametrize("backup, workers", [(1, 4), (2, 32), (10, 20)])
def test_the_bias_of_selection_is_bounded_and_the_bound_is_reached(backup, workers):
    # The gradient's one direction is whether it is accepted: nothing can be more biased.
    times = rng().random((20_000, workers))
    accepted = np.argsort(np.argsort(times, axis=1), axis=1) < workers - backup
    gradient = accepted - (workers - backup) / workers
    bias = gradient[accepted].mean() / gradient.std()
    assert bias == pytest.approx(bounds.selection_bias(backup, workers), rel=1e-6)
    # One that grows with time is biased less; one that does not depend on it, not at all.
    grows = (times - 0.5)[accepted].mean() / times.std()
    assert 0 < -grows < bounds.selection_bias(backup, workers)
    free = rng(1).standard_normal(times.shape)[accepted].mean()
    assert abs(free) < 4 / math.sqrt(accepted.sum())


def test_who_bears_the_discarding():
    times = rng().lognormal(0, 0.1, (500, 10)) * ([1.0] * 9 + [2.0])
    assert bounds.drop_rates(times, 1) == pytest.approx([0.0] * 9 + [1.0])
    rates = bounds.drop_rates(times, 3)
    assert rates.sum() == pytest.approx(3) and rates[9] == 1
    by_cost = bounds.drop_rates_by_cost(times, 3)
    assert by_cost.mean() == pytest.approx(0.3) and (np.diff(by_cost) > 0).all()
    assert bounds.drop_rates(times, 0).max() == bounds.discarded_work(times, 0) == 0


def test_a_number_of_backups_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="one less than 4 workers, not 4"):
        bounds.selection_bias(4, 4)


# Iterations as a function of N.


def test_iterations_of_the_paper():
    efficiency = fit_iterations([(50, 137.5e3), (100, 76.2e3)])
    assert efficiency.iterations([50, 100]) == pytest.approx([137.5e3, 76.2e3])
    assert efficiency.noise == pytest.approx(411, abs=1) and efficiency.floor == pytest.approx(14.9e3, rel=0.01)


def test_iterations_at_more_n_are_fitted_by_relative_error():
    n = np.array([4, 8, 16, 32, 64])
    j = 1000 * (1 + 20 / n) * [1.01, 0.99, 1.0, 1.01, 0.99]
    efficiency = fit_iterations(zip(n, j, strict=True))
    assert efficiency.noise == pytest.approx(20, rel=0.1) and efficiency.floor == pytest.approx(1000, rel=0.03)


def test_iterations_that_fall_faster_than_one_over_n_are_all_noise():
    assert fit_iterations([(1, 100), (10, 5)]).noise == math.inf


@pytest.mark.parametrize(
    "pairs, said",
    [
        ([], "at two different N at least"),
        ([(4, 100), (4, 110)], "at two different N at least"),
        ([(4, 100), (8, 120)], "should take fewer steps"),
        ([(4, 100), (8, 0)], "must be greater than 0"),
        ([(-4, 100), (8, 10)], "must be greater than 0"),
    ],
)
def test_pairs_that_tell_no_j(pairs, said):
    with pytest.raises(ValueError, match=said):
        fit_iterations(pairs)


def step_of(number, gradients):
    """A step's record with the norms of these gradients, (k, dimensions)."""
    k = len(gradients)
    norms = (float((gradients**2).sum()), float((gradients.mean(axis=0) ** 2).sum()))
    accepted = [(w, number, number) for w in range(k)]
    return StepRecord(number, number, number + 0.5, number + 0.6, k, k, accepted, [], norms=norms)


@pytest.mark.parametrize("k", [2, 8])
def test_the_noise_scale_is_measured_without_bias(k):
    # |∇F|² = 1, tr Σ = 30: N_c = 30. Within its own 95 % band, and the band is not wide.
    draws, mean = rng(k), np.full(100, 0.1)
    steps = [step_of(i, mean + math.sqrt(0.3) * draws.standard_normal((k, 100))) for i in range(3000)]
    found = noise_from_steps(steps)
    assert found.low < 30 < found.high and found.high / found.low < 1.8
    assert found.noise == pytest.approx(30, rel=0.15)
    assert found.source == "gradient norms of 3000 steps" and found.floor is None


def test_noise_that_drowns_the_gradient_is_infinite_and_without_norms_unknown():
    draws = rng()
    steps = [step_of(i, draws.standard_normal((4, 50))) for i in range(50)]
    found = noise_from_steps(steps)
    assert found.low > 40 and found.high == math.inf  # of 4 gradients a step
    assert noise_from_steps([StepRecord(0, 0, 1, 1, 1, 1, [(0, 0, 0)], [])]) is None
    assert noise_from_steps([step_of(0, np.ones((1, 3)))]) is None
    nothing = step_of(0, np.zeros((3, 3)))
    assert noise_from_steps([nothing]) is None


def test_iterations_to_a_loss_take_more_than_a_lucky_batch():
    def step(i, loss):
        arrivals = [ArrivalRecord(0, i, i, "accepted", 0.1, loss=loss), ArrivalRecord(1, i, i, "late", 0.1, 1, loss=9)]
        return StepRecord(i, i, i, i, 1, 2, [(0, i, i)], arrivals)

    steps = [step(i, 0.0 if i == 3 else max(1.0 - 0.01 * i, 0.2)) for i in range(200)]
    assert iterations_to_loss(steps, 0.2, smooth=1) == 4
    assert iterations_to_loss(steps, 0.2 + 1e-9, smooth=20) == 100
    assert iterations_to_loss(steps, 0.1, smooth=20) is None


def test_infinite_noise_counts_samples_and_none_counts_steps():
    n = np.array([5.0, 10.0])
    assert Efficiency(math.inf).relative(n)[0] == 2 * Efficiency(math.inf).relative(n)[1]
    assert (Efficiency(0.0).relative(n) == 1).all()
    with pytest.raises(ValueError, match="needs J_∞"):
        Efficiency(5.0).iterations(n)
    with pytest.raises(ValueError, match="must not be negative"):
        Efficiency(-1.0)


# Choices.


def test_late_workers_finish_before_they_begin_again():
    # Worker 2's first takes 5.5 s: it misses steps 0 and 1, and joins in half a second into step 2.
    times = np.array([[2, 3, 5.5], [2, 1, 9], [4, 2.5, 0.5], [1, 1, 1]], float)
    assert backup_step_times(times, 1).tolist() == [3, 2, 2.5, 1]
    assert backup_step_times(times, 0).tolist() == [5.5, 9, 4, 1]


def test_time_between_steps_lets_late_workers_catch_up():
    times = np.array([[1, 1, 1.5], [1, 2, 0.2]], float)
    assert backup_step_times(times, 1)[1] == pytest.approx(1.0)  # begins at 1.5, done at 1.7; the first at 2
    assert backup_step_times(times, 1, between_s=0.5)[1] == pytest.approx(1.0)
    times[1, 0] = 1.9
    assert backup_step_times(times, 1)[1] == pytest.approx(1.9)
    assert backup_step_times(times, 2, between_s=0.5)[1] == pytest.approx(0.2)
    assert backup_step_times(times, 2)[1] == pytest.approx(0.7)


def test_a_deadline_closes_in_time_or_with_its_quorum_or_when_all_are_in():
    times = np.array([[1, 2, 3], [1, 1, 1]], float)
    assert [x.tolist() for x in deadline_step_times(times, 10.0)] == [[3, 1], [3, 3]]
    assert [x.tolist() for x in deadline_step_times(times, 1.5, 2)] == [[2, 1.5], [2, 2]]


def test_choices_on_independent_times_agree_with_theory_if_late_work_is_stopped():
    law = Lognormal(1.0, 0.3)
    times = law.sample(rng(), 4000, 8)
    made = choices(times, Efficiency(4.0), late_stop=True, overhead_s=0.1)
    exact = law.order_statistics_s(8) + 0.1
    for one in made.options:
        n = one.accepted
        assert one.step_s == pytest.approx(exact[n - 1], rel=0.01)
        gain = exact[7] * (1 + 4 / 8) / (exact[n - 1] * (1 + 4 / n))
        assert one.gain == pytest.approx(gain, rel=0.01) and one.low - 0.01 < gain < one.high + 0.01
        assert one.per_sample == pytest.approx(one.per_step * n / 8)
        assert min(one.per_sample, one.per_step) <= one.gain <= max(one.per_sample, one.per_step) + 1e-12
    assert choices(times, Efficiency(4.0), stopped_s=exact - 0.1, overhead_s=0.1).options[3].stopped_s == exact[4]


def test_what_pays_below_a_noise_scale_pays_just_below_it_and_not_above():
    times = Lognormal(1.0, 0.15).sample(rng(), 500, 8)
    one = choices(times, Efficiency(0.0)).options[2]
    assert 0 < one.pays_below < math.inf
    for factor, pays in [(0.99, True), (1.01, False)]:
        again = choices(times, Efficiency(one.pays_below * factor)).options[2]
        assert (again.gain > 1) == pays


def test_bands_cover_the_truth_as_often_as_they_say():
    law, hits = Lognormal(1.0, 0.4), 0
    exact = law.order_statistics_s(6)
    truth = (exact[5] / 6) / (exact[4] / 5)
    for seed in range(100):
        one = choices(law.sample(rng(seed), 60, 6), Efficiency(math.inf), late_stop=True).options[1]
        hits += one.low <= truth <= one.high
    assert 85 <= hits <= 99  # nominally 95; the bootstrap's bands are a little narrow at 60 steps


def test_many_workers_are_looked_at_ever_more_coarsely():
    assert candidates(1) == [0] and candidates(40) == list(range(40))
    some = candidates(5000)
    assert some[:8] == list(range(8)) and len(some) < 70 and some == sorted(set(some)) and some[-1] < 5000


def test_needed_steps_grow_with_the_square_of_the_doubt():
    assert needed_steps(50, 1.2, 1.15, 1.25) == 50
    assert needed_steps(50, 1.04, 0.98, 1.10) == 450
