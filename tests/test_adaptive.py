"""Policies that learn from records: what they measure, what they decide, and how that serves."""

import dataclasses
import math
import statistics

import numpy as np
import pytest
from playing import cycling, opened, play, steady

from mpisync.planning.costs import Costs
from mpisync.planning.learning import Descent, Quadratic
from mpisync.planning.scale import backup_step_times
from mpisync.planning.simulation import simulate
from mpisync.policies import Adaptive, BackupWorkers, Deadline, Replay, parse_policy
from mpisync.policies.adaptive import noise_scale_of
from mpisync.records import ArrivalRecord, StepRecord
from mpisync.records.turnarounds import Turnarounds, changed_at, time_per_step

ALL_NOISE = math.inf


def played(policy, table, **more):
    return list(simulate(policy, table, steps=len(table), **more))


def chosen(records):
    return [record.target for record in records]


def decisions(records):
    return [record for record in records if record.why]


# -- what is measured -----------------------------------------------------------------------------


def test_every_gradient_that_came_tells_its_time_late_ones_too():
    table = np.random.default_rng(0).lognormal(0.0, 1.0, (60, 5))
    for policy in (BackupWorkers(2), Deadline(1.0, at_least=2)):
        records = played(policy, table)
        for window in (records, records[20:]):
            turnarounds = Turnarounds(window, 5)
            known = {(w, v): s for w, of_one in enumerate(turnarounds.seconds) for v, s in of_one.items()}
            assert known == {(w, v): pytest.approx(table[v, w]) for w, v in known}
            came = {
                (one.worker, one.version)
                for record in window
                for one in record.arrivals
                if one.version >= window[0].step
            }
            assert set(known) == came
            assert any(one.verdict == "late" for record in window for one in record.arrivals)
            now_s = window[-1].published_s
            for worker, (version, so_far_s) in enumerate(turnarounds.pending):
                assert 0 <= so_far_s <= now_s and (version == window[-1].step + 1) >= (so_far_s == 0)
                assert so_far_s < table[version % 60, worker] or so_far_s == 0, "a lower bound"


def test_what_was_begun_before_the_window_is_left_out():
    records = played(BackupWorkers(1), np.array([[1.0, 1.0, 3.5]] * 6))
    turnarounds = Turnarounds(records[2:], 3)  # at 2.0; worker 2's first comes at 3.5
    assert turnarounds.seconds[2] == {}
    assert turnarounds.pending[2] == (3, pytest.approx(2.5))


def test_a_rejected_gradients_worker_goes_on_at_once():
    records = play(BackupWorkers(0), cycling([[1.0], [0.25, 0.5]]), workers=2, steps=1, rejected={(1, 0)})
    turnarounds = Turnarounds(records, 2)
    assert turnarounds.seconds[1] == {0: 0.5}, "the last one of a version counts"


def test_gaps_take_a_workers_own_times_in_turn_and_who_hangs_is_slow():
    records = played(BackupWorkers(1), np.array([[1.0, 1.0, 2.5]] * 5 + [[1.0, 1.0, 99.0]] * 20))
    table = Turnarounds(records[:20], 3).table(1, 19)
    assert [len(row) for row in table] == [3] * 19
    assert {row[0] for row in table} == {1.0}
    slow_s = sorted({round(row[2], 6) for row in table})
    assert len(slow_s) == 2 and slow_s[0] == 2.5 and 12 < slow_s[1] < 20, "as long as it has taken so far"


def test_playing_turnarounds_is_what_whole_arrays_give():
    table = np.random.default_rng(1).lognormal(0.0, 1.0, (40, 6))
    for n in range(1, 7):
        assert time_per_step(table.tolist(), n) == backup_step_times(table, 6 - n).tolist()


def test_the_noise_scale_is_found():
    """V/‖∇F‖² of a quadratic at fixed parameters; each step's norms have a few percent of error."""
    problem, random = Quadratic(dimension=400, noise=3.0), np.random.default_rng(0)
    square = float(np.sum((problem.curvature * problem.start) ** 2))
    records = []
    for step in range(64):
        gradients = [problem.gradient(problem.start, random) for _ in range(8)]
        mean = np.mean(gradients, axis=0)
        norms = (sum(float(g @ g) for g in gradients), float(mean @ mean))
        records.append(StepRecord(step, 0, 1, 1, 8, 8, [(w, step, step) for w in range(8)], [], norms=norms))
    assert noise_scale_of(records) == pytest.approx(9.0 / square, rel=0.05)


def test_without_norms_of_two_gradients_all_is_noise():
    one = StepRecord(0, 0, 1, 1, 1, 2, [(0, 0, 0)], [], norms=(4.0, 4.0))
    bare = StepRecord(0, 0, 1, 1, 2, 2, [(0, 0, 0), (1, 0, 0)], [])
    broken = dataclasses.replace(bare, norms=(math.nan, math.inf))
    drowned = dataclasses.replace(bare, norms=(10.0, 1.0))  # V̂/k is 4, more than the mean's square
    for record in (one, bare, broken, drowned):
        assert noise_scale_of([record]) == math.inf
    assert noise_scale_of([one, dataclasses.replace(bare, norms=(20.0, 7.0))]) == 1.5


# -- what Adaptive decides ------------------------------------------------------------------------


def test_persistent_stragglers_are_left_behind_after_four_steps_and_it_is_told_why():
    records = play(Adaptive(noise_scale=ALL_NOISE), steady(1.0, 1.0, 1.01, 1.02, 3.0, 3.1), workers=6, steps=30)
    assert chosen(records) == [5] * 4 + [4] * 26
    assert records[4].why == "N=4 instead of 5 saves 58%: 1.02 s a step for 3 s, noise scale inf"
    assert [record.step for record in decisions(records)] == [4, 8, 12, 16, 20, 24, 28]
    assert all("stays" in record.why for record in decisions(records)[1:])


def test_who_was_late_from_the_start_is_seen_though_it_came_once_or_never():
    for slow_s in (1.5, 3.0, 99.0):
        records = play(Adaptive(noise_scale=ALL_NOISE), steady(1.0, 1.01, 1.02, slow_s), workers=4, steps=30)
        assert chosen(records) == [3] * 30


def test_where_all_are_alike_nobody_is_left_out():
    table = np.random.default_rng(0).lognormal(0.0, 0.01, (200, 8))
    for noise_scale in (20.0, ALL_NOISE):
        assert chosen(played(Adaptive(noise_scale=noise_scale), table)) == [7] * 4 + [8] * 196


def test_little_noise_wants_more_updates_and_much_noise_more_gradients():
    table = np.random.default_rng(0).lognormal(0.0, 0.3, (300, 12))
    few, some, many = (
        statistics.median(chosen(played(Adaptive(at_least=1, noise_scale=scale), table))) for scale in (0.0, 10.0, 1e6)
    )
    assert few == 1 < some < many


@pytest.mark.parametrize(("least", "most"), [(None, None), (5, 6), (8, 8), (1, 3), (2, 99)])
def test_n_stays_within_its_bounds(least, most):
    table = np.random.default_rng(0).lognormal(0.0, 1.0, (60, 8))
    for noise_scale in (0.0, ALL_NOISE):
        found = chosen(played(Adaptive(least, most, noise_scale), table))
        assert set(found) <= set(range(4 if least is None else least, min(most or 8, 8) + 1))
        assert found[0] == min(max(least or 4, min(most or 8, 8) - 1), most or 8)


def test_it_does_not_oscillate():
    """In each stationary regime N changes seldom, and less and less between values far apart."""
    for table in (light(0, 400), persistent(0, 400), heavy(0, 400)):
        found = chosen(played(Adaptive(noise_scale=50.0), table))
        assert np.count_nonzero(np.diff(found)) <= 8, "100 decisions"
        assert np.ptp(found[100:]) <= 2


def test_the_dead_are_not_waited_for_and_not_counted_on():
    records = play(
        Adaptive(noise_scale=ALL_NOISE), steady(1.0, 1.0, 1.0, 1.0, 1.0), workers=5, steps=40, deaths={4: 12.5, 3: 20.5}
    )
    assert chosen(records)[11:14] == [5, 4, 4] and chosen(records)[-1] == 3
    weighed = [(int(record.why[2]), records[record.step - 1].alive) for record in decisions(records)]
    assert all(n <= alive for n, alive in weighed) and weighed[-1] == (3, 3)


def test_a_worker_that_comes_back_is_taken_back():
    table = np.random.default_rng(0).uniform(0.99, 1.01, (120, 4))
    table[10:60, 3] *= 4.0
    found = chosen(played(Adaptive(noise_scale=ALL_NOISE), table))
    assert found[30] == 3 and found[-1] == 4


def test_a_change_is_noticed_after_four_steps_whatever_was_before():
    table = np.random.default_rng(0).uniform(0.98, 1.02, (140, 5))
    table[100:, 4] *= 2.36
    assert chosen(played(Adaptive(noise_scale=10.0), table))[99:] == [5] * 5 + [4] * 36
    table[:100, 4] *= 2.36
    table[100:, 4] /= 2.36
    found = chosen(played(Adaptive(noise_scale=ALL_NOISE), table))
    assert found[99] == 4 and found[110] == 5


@pytest.mark.parametrize(("known", "slow"), [(12, 4), (21, 3), (45, 3)])
def test_the_more_is_known_of_a_worker_the_fewer_gradients_tell_a_change(known, slow):
    before = np.random.default_rng(0).uniform(0.98, 1.02, known).tolist()
    assert changed_at([*before, *[2.0] * slow]) == known == changed_at([*before, *[0.5] * slow])
    assert changed_at([*before, *[2.0] * (slow - 1)]) == 0


def test_what_a_step_takes_beyond_waiting_counts():
    table = np.ones((40, 6)) * [1, 1, 1, 1, 1, 2.36]
    assert chosen(played(Adaptive(noise_scale=ALL_NOISE), table))[-1] == 5
    costly = played(Adaptive(noise_scale=ALL_NOISE), table, costs=Costs(publish_s=20.0))
    assert chosen(costly)[-1] == 6, "22.36 s for six gradients, 21 s for five"


def test_decisions_cost_no_more_than_their_share_of_short_steps():
    table = np.full((2000, 8), 1e-4)
    records = played(Adaptive(noise_scale=1.0), table)
    apart_s = np.diff([record.opened_s for record in decisions(records)[1:]])
    assert len(decisions(records)) > 2 and apart_s.min() > 10e-3, "a decision takes half a millisecond"


def test_a_thousand_workers_are_weighed_at_a_few_n():
    policy = Adaptive(at_least=1, noise_scale=1.0)
    for record in played(BackupWorkers(0), np.random.default_rng(0).lognormal(0.0, 0.3, (3, 1000))):
        policy = policy.after(record)
    weighed = policy._candidates()
    assert weighed[0] == 1 and weighed[-3:] == [998, 999, 1000] and len(weighed) < 22


def test_what_was_learned_does_not_show_in_the_form():
    policy = Adaptive(at_least=2)
    for record in play(BackupWorkers(1), steady(1.0, 1.0, 5.0), workers=3, steps=12):
        policy = policy.after(record)
    assert policy != Adaptive(at_least=2) and str(policy) == "adaptive:at_least=2"
    assert policy.target(opened(3)) == 2 and hash(policy)


# -- how it serves --------------------------------------------------------------------------------


def light(seed, steps, workers=16):
    """Max over mean 1.26 with 32 workers, as in the trace of sequence imbalance."""
    return 6.0 * np.random.default_rng(seed).lognormal(0.0, 0.12, (steps, workers))


def persistent(seed, steps, workers=12):
    table = np.random.default_rng(seed).lognormal(0.0, 0.03, (steps, workers))
    table[:, 1] *= 2.36
    return table


def none(seed, steps, workers=12):
    return np.random.default_rng(seed).lognormal(0.0, 0.01, (steps, workers))


def heavy(seed, steps, workers=12):
    """The clustered heavy tails that fit the straggler study of arXiv:1604.00981."""
    random = np.random.default_rng(seed)
    slow = random.beta(3.098, 209.5, (steps, 1))
    body = np.minimum(1.45 * random.lognormal(0.0, 0.09, (steps, workers)), 2.0)
    return np.where(random.random(body.shape) < slow, 2.0 * (1 + random.pareto(2.26, body.shape)), body)


def progress(accepted, took_s, noise_scale):
    """Progress a second, where N gradients are worth N/(N + noise scale)."""
    accepted = np.asarray(accepted, float)
    return (accepted if math.isinf(noise_scale) else accepted / (accepted + noise_scale)).sum() / took_s


def against_static(table, noise_scale):
    """Adaptive's progress over that of the best number of backup workers, of all within its bounds."""
    workers = table.shape[1]
    static = [
        progress([workers - b] * len(table), backup_step_times(table, b).sum(), noise_scale)
        for b in range(workers // 2 + 1)
    ]
    records = played(Adaptive(noise_scale=noise_scale), table)
    return progress(chosen(records), records[-1].published_s, noise_scale) / max(static)


@pytest.mark.parametrize("regime", [light, persistent, none, heavy])
@pytest.mark.parametrize("noise_scale", [10.0, 411.0, ALL_NOISE])
def test_it_is_within_five_percent_of_the_best_static_number(regime, noise_scale):
    assert against_static(regime(0, 400), noise_scale) > 0.95


@pytest.mark.parametrize(("first", "second"), [(none, persistent), (persistent, none), (none, heavy)])
def test_it_beats_every_static_number_when_the_regime_changes_half_way(first, second):
    table = np.concatenate([first(0, 250) * (1.45 if second is heavy else 1.0), second(1, 250)])
    assert against_static(table, ALL_NOISE) > 1.0


def test_measuring_the_noise_serves_as_well_as_knowing_it():
    """Time to a fiftieth of the first error of a noisy quadratic, the median of seeds."""

    def median_s(policy, table):
        took_s = []
        for seed in range(5):
            descent = Descent(Quadratic(dimension=30, noise=2.0), rate=0.1, seed=seed)
            records = simulate(policy, table, steps=1000, learner=descent)
            took_s.append(next(record.published_s for record in records if descent.errors[-1] < 0.02))
        return statistics.median(took_s)

    table = persistent(0, 300)
    assert median_s(Adaptive(), table) < 1.1 * median_s(BackupWorkers(1), table)
    assert median_s(Adaptive(), table) < 0.7 * median_s(BackupWorkers(0), table)


def test_an_adaptive_run_can_be_replayed_with_other_times():
    records = played(Adaptive(noise_scale=5.0), heavy(0, 60))
    assert len(set(chosen(records))) > 1
    again = played(Replay(records), light(3, 60, workers=12))
    assert [record.accepted for record in again] == [record.accepted for record in records]


# -- a deadline that follows the workers ----------------------------------------------------------


def test_the_limit_is_the_median_and_so_many_deviations():
    policy = Deadline(60.0, mads=2.0)
    records = play(policy, steady(1.0, 2.0, 3.0, 4.0, 30.0), workers=5, steps=9)
    # all are in until the limit is set: each step takes 30 s
    assert [record.closed_s - record.opened_s for record in records[:4]] == [30.0] * 4
    # median 3, deviations 2, 1, 0, 1, 27: their median is 1
    assert [record.closed_s - record.opened_s for record in records[4:6]] == [5.0] * 2
    assert records[4].why == "limit 5 s: median 3 s, median deviation 1 s"
    assert [len(record.accepted) for record in records[4:]] == [4] * 5


def test_workers_alike_are_all_in_time():
    table = np.ones((40, 6)) * [1, 1, 1, 1, 1.005, 1.01]  # the median deviation is 0
    records = played(Deadline(5.0, mads=3.0), table)
    assert all(len(record.accepted) == 6 for record in records)


def test_the_limit_grows_when_all_become_slower_and_shrinks_again():
    table = np.random.default_rng(0).uniform(0.9, 1.1, (120, 6))
    table[40:80] *= 3
    records = played(Deadline(5.0, mads=6.0), table)
    in_time = [len(record.accepted) for record in records]
    assert sum(in_time[60:80]) > 110 and sum(in_time[-20:]) > 110
    took_s = [record.closed_s - record.opened_s for record in records]
    assert max(took_s[-20:]) < 2.0


def test_a_straggler_moves_the_limit_of_others_by_nothing():
    """Its late gradients are among those that set the limit, and a median does not mind."""
    table = np.random.default_rng(0).uniform(0.9, 1.1, (60, 7))
    table[:, 0] *= 50
    records = played(Deadline(1.2, mads=6.0), table)
    assert all(len(record.accepted) == 6 for record in records[8:])
    assert max(record.closed_s - record.opened_s for record in records) < 1.6


# -- forms, refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "policy", "form"),
    [
        ("adaptive", Adaptive(), "adaptive"),
        ("adaptive:3", Adaptive(3), "adaptive:at_least=3"),
        ("adaptive:3,at_most=7,noise_scale=411", Adaptive(3, 7, 411), "adaptive:at_least=3,at_most=7,noise_scale=411"),
        ("adaptive:noise_scale=inf", Adaptive(noise_scale=math.inf), "adaptive:noise_scale=inf"),
        ("deadline:0.5,mads=4", Deadline(0.5, mads=4), "deadline:0.5,mads=4"),
        (
            "deadline:2,mads=2.5,grace=0.1,at_least=3",
            Deadline(2, 3, 0.1, 2.5),
            "deadline:2,at_least=3,grace=0.1,mads=2.5",
        ),
    ],
)
def test_command_line_forms(text, policy, form):
    assert parse_policy(text) == policy == parse_policy(form)
    assert str(policy) == form


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Adaptive(0), ValueError, "at_least must be at least 1, not 0"),
        (lambda: Adaptive(at_most=1.5), TypeError, "at_most must be a whole number"),
        (lambda: Adaptive(4, 3), ValueError, "at_least is 4 and at_most 3: use at_least=3 or less"),
        (lambda: Adaptive(noise_scale=-1), ValueError, "noise_scale must not be negative, not -1"),
        (lambda: Adaptive(noise_scale=math.nan), ValueError, "not nan: leave it out"),
        (lambda: Adaptive(4).check(3), ValueError, "at_least is 4 with 3 workers: use at_least=3 or less"),
        (lambda: Adaptive().check(0), ValueError, "or start more ranks"),
        (lambda: Deadline(1, mads=-1), ValueError, "mads must be finite and not negative, not -1"),
        (lambda: Deadline(1, mads=math.inf), ValueError, "not inf: leave it out"),
    ],
)
def test_what_makes_no_sense_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_what_is_just_possible_is_not_refused():
    Adaptive(3, 3).check(3)
    Adaptive(1, 99, 0).check(1)
    records = play(Adaptive(), steady(1.0), workers=1, steps=9)
    assert chosen(records) == [1] * 9
    assert Adaptive().target(opened(2)) == 2, "two gradients at least tell the noise"


def test_records_without_a_reason_are_read_as_before():
    assert StepRecord(0, 0, 1, 1, 1, 1, [(0, 0, 0)], [ArrivalRecord(0, 0, 0, "accepted", 1.0)]).why is None
