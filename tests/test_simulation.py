"""The simulation: by hand where a hand can count, by theory, and by what a record must be."""

import dataclasses
import doctest
import importlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from launch import ROOT

from mpisync.planning.calibration import costs_from_benchmark, costs_from_records
from mpisync.planning.costs import Costs
from mpisync.planning.learning import Descent, Logistic, Quadratic
from mpisync.planning.network import Network
from mpisync.planning.scale import arrival_times, backup_step_times
from mpisync.planning.simulation import Deadlock, simulate
from mpisync.policies import Adaptive, Async, BackupWorkers, Deadline, Replay, parse_policy
from mpisync.records import RecordWriter, RunHeader, read_record
from mpisync.records.schema import StepChecker

MB = 1_000_000


def times(steps, workers, seed=0, sigma=0.5):
    return np.random.default_rng(seed).lognormal(0.0, sigma, (steps, workers))


def played(policy, table, steps=None, **more):
    return list(simulate(policy, table, steps=len(table) if steps is None else steps, **more))


def alike(workers, seconds=1.0):
    return np.full((1, workers), seconds)


def closings(records):
    return [record.closed_s for record in records]


# -- theory, and the same by whole arrays ---------------------------------------------------------


@pytest.mark.parametrize("backup", [0, 1, 5])
def test_whole_arrays_and_events_agree_to_the_bit(backup):
    table = times(200, 9, sigma=1.0)
    records = played(BackupWorkers(backup), table)
    opened_s = np.array([record.opened_s for record in records])
    assert any(one.verdict == "late" for record in records for one in record.arrivals) == bool(backup)
    assert np.array_equal(backup_step_times(table, backup), np.array(closings(records)) - opened_s)


def test_blocks_of_steps_are_one_run_and_between_steps_nobody_computes():
    table = times(50, 7, sigma=1.0)
    whole = backup_step_times(table, 2, between_s=0.25)
    assert np.array_equal(backup_step_times(iter(np.split(table, 5)), 2, between_s=0.25), whole)
    costs = Costs(update_s=0.25)
    records = played(BackupWorkers(2), table, costs=costs)
    assert np.allclose([record.closed_s - record.opened_s for record in records], whole)


@pytest.mark.parametrize(("k", "workers"), [(1, 5), (4, 5), (5, 5), (28, 32)])
def test_the_kth_of_exponential_times_comes_when_theory_says(k, workers):
    """(H_P − H_{P−K})/μ of arXiv:1803.01113, within four standard errors of 20,000 steps."""
    table = np.random.default_rng(1).exponential(2.0, (20_000, workers))
    came_s = arrival_times(table, [k])[:, 0]
    expected_s = 2.0 * sum(1 / i for i in range(workers - k + 1, workers + 1))
    assert abs(came_s.mean() - expected_s) < 4 * came_s.std() / math.sqrt(len(came_s))


def test_late_workers_that_finish_what_they_began_make_steps_longer_than_interrupted_ones():
    table = np.random.default_rng(2).exponential(1.0, (8_000, 8))
    assert np.allclose(backup_step_times(table, 0), arrival_times(table, [8])[:, 0])
    assert backup_step_times(table, 2).mean() > 1.1 * arrival_times(table, [6]).mean()


@pytest.mark.parametrize("k", [1, 3])
def test_asynchronous_steps_take_k_over_p_of_a_mean_time_under_any_law(k):
    """K-batch-async of arXiv:1803.01113: k·E[X]/P; the standard error is that of the mean of all times."""
    table = times(2_000, 6, sigma=1.0)
    records = played(Async(k), table, steps=4_000)
    step_s = records[-1].closed_s / len(records)
    used = math.ceil(4_000 * k / 6) * 6
    assert abs(step_s / (k * table.mean() / 6) - 1) < 5 * table.std() / table.mean() / math.sqrt(used)


def test_a_few_and_many_counts_are_found_alike():
    table = times(20, 40)
    many = arrival_times(table, range(1, 41))
    assert np.array_equal(many, np.sort(table, axis=1))
    assert np.array_equal(arrival_times(table, [3, 40]), many[:, [2, 39]])


# -- what it costs, counted by hand ---------------------------------------------------------------


def test_on_one_node_waking_headers_folding_update_and_publication_add_up():
    costs = Costs(
        gradient_bytes=10 * MB, fold_bytes_per_s=1e9, wake_s=0.1, header_s=0.2, update_s=0.4, publish_s=0.8
    )
    first, second = played(BackupWorkers(0), alike(3), steps=2, costs=costs)
    # woken 0.1, computed 1.1, heard 1.2; three headers until 1.8; a pass over 3 + 1 arrays of 10 MB
    assert first.closed_s == pytest.approx(1.8)
    assert first.reduce_s == pytest.approx(0.04) and (first.update_s, first.publish_s) == (0.4, 0.8)
    assert first.published_s == pytest.approx(1.8 + 0.04 + 1.2) == second.opened_s
    assert [one.offset_s for one in first.arrivals] == pytest.approx([1.1] * 3), "stamped by the worker"
    assert second.closed_s - second.opened_s == pytest.approx(1.8)


def test_what_came_long_before_the_last_is_folded_by_then():
    costs = Costs(gradient_bytes=10 * MB, fold_bytes_per_s=1e8)
    (record,) = played(BackupWorkers(0), np.array([[1.0, 1.0, 9.0]]), costs=costs)
    assert record.reduce_s == pytest.approx(0.2), "one gradient and the sum, 10 MB each, at 100 MB/s"
    busy = played(BackupWorkers(0), np.array([[1.0, 1.0, 1.05]]), costs=costs)[0]
    # after a millisecond it begins a pass over three arrays, 0.3 s; only then it folds the last
    assert busy.published_s == pytest.approx(1.001 + 0.3 + 0.2)


def test_large_gradients_from_other_nodes_come_one_by_one_and_only_the_wanted():
    costs = Costs(nodes=4, gradient_bytes=100 * MB, bandwidth_bytes_per_s=1e9, latency_s=0.01)
    table = np.array([[1.0, 1.0, 1.0, 5.0]])  # three far, one near the root
    first, second = played(BackupWorkers(2), table, steps=2, costs=costs, seed=None)
    # begun at 0.01; header 1.02, asked 1.03, first payload on the link until 1.13; the second until 1.23
    assert first.closed_s == pytest.approx(1.24)
    assert [one.worker for one in first.arrivals if one.verdict == "accepted"] == [0, 1]
    late = [one for one in second.arrivals if one.verdict == "late"]
    assert [(one.worker, one.bytes) for one in late] == [(2, 0)], "nobody asked for it"
    # the late one was answered first when the step opened: its parameters go out first, 0.1 s each
    assert second.closed_s > first.published_s + 0.1 + 0.1 + 0.01 + 1.0


def test_no_payload_is_asked_for_that_the_step_does_not_lack(monkeypatch):
    asked, payload_s = [], Network.payload_s
    monkeypatch.setattr(Network, "payload_s", lambda self, *of: asked.append(of) or payload_s(self, *of))
    costs = Costs(shared=False, gradient_bytes=100 * MB, bandwidth_bytes_per_s=1e9)
    records = played(BackupWorkers(2), times(20, 6), costs=costs)
    assert len(asked) == sum(len(record.accepted) for record in records)


def test_small_gradients_ride_in_their_headers():
    costs = Costs(shared=False, gradient_bytes=10_000, bandwidth_bytes_per_s=1e5, latency_s=0.25)
    (record,) = played(BackupWorkers(0), alike(2), costs=costs)
    assert record.closed_s == pytest.approx(0.25 + 1.0 + 0.25 + 0.1)


def test_a_tree_sends_one_sum_a_node_and_the_parameters_back_one_after_another():
    costs = Costs("tree", nodes=3, gradient_bytes=100 * MB, bandwidth_bytes_per_s=1e9, latency_s=0.01)
    first, second = played(BackupWorkers(0), alike(6), steps=2, costs=costs)
    # the first headers come from other nodes' workers, who were told to begin at 0.01
    assert first.closed_s == pytest.approx(0.01 + 1.0 + 0.01)
    assert first.reduce_s == pytest.approx(2 * 0.01 + 2 * 0.1)
    # the second relay has the parameters after 0.2 + 0.01
    assert second.closed_s - second.opened_s == pytest.approx(0.21 + 1.0 + 0.01)


def test_sharded_every_link_carries_its_share_at_once():
    costs = Costs("sharded", nodes=4, gradient_bytes=100 * MB, bandwidth_bytes_per_s=1e9, update_s=0.4)
    (record,) = played(BackupWorkers(0), alike(4), costs=costs)
    assert record.reduce_s == pytest.approx(0.075) and record.publish_s == pytest.approx(0.075)
    assert record.update_s == pytest.approx(0.1)


def test_topologies_are_ordered_as_they_should_be_with_many_nodes():
    def step_s(topology):
        costs = Costs(topology, nodes=8, gradient_bytes=100 * MB, bandwidth_bytes_per_s=1e9, latency_s=1e-4)
        return played(BackupWorkers(4), times(30, 32), costs=costs)[-1].published_s / 30

    star, tree, sharded = map(step_s, ("star", "tree", "sharded"))
    assert star > 1.2 * tree and tree > 1.2 * sharded


@pytest.mark.parametrize("topology", ["star", "tree", "sharded"])
@pytest.mark.parametrize(
    "policy", ["backup:2", "deadline:1", "deadline:1,at_least=5,grace=0.3,mads=2", "async:3", "adaptive", "async:k=2,max_staleness=0", "async:k=4,max_staleness=2"]  # noqa: E501
)  # fmt: skip
def test_any_policy_under_any_costs_leaves_a_record_that_can_be_read_and_replayed(policy, topology, tmp_path):
    costs = Costs(
        topology, nodes=3, gradient_bytes=MB, bandwidth_bytes_per_s=1e7, latency_s=0.01, header_s=0.003,
        wake_s=0.01, fold_bytes_per_s=1e8, update_s=0.02, publish_s=0.01,
    )  # fmt: skip
    records = played(parse_policy(policy), times(40, 7, sigma=1.0), costs=costs)
    header = RunHeader(policy, 7, 0, 0.0, "1", ["a"] * 7)
    with RecordWriter(tmp_path / "record.jsonl") as writer:
        writer.header(header)
        for record in records:
            writer.step(record)
    assert read_record(tmp_path / "record.jsonl") == (header, records)
    for a, b in itertools.pairwise(records):
        assert a.opened_s <= a.closed_s <= a.published_s == b.opened_s
        assert a.reduce_s + a.update_s + a.publish_s == pytest.approx(a.published_s - a.closed_s)
    again = played(Replay(tmp_path / "record.jsonl"), times(40, 7, seed=5), costs=costs)
    assert [record.accepted for record in again] == [record.accepted for record in records]


# -- chance, deaths, bad input --------------------------------------------------------------------


def test_the_same_seed_gives_the_same_records_and_ties_are_drawn():
    runs = [played(BackupWorkers(1), alike(4), steps=50, seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    last = {record.accepted[-1][0] for record in runs[0]}
    assert last == set(range(4)), "no rank goes before another"
    assert all(one.tie for record in runs[0] for one in record.arrivals if one.verdict == "accepted")
    (alone,) = played(BackupWorkers(0), np.array([[1.0, 2.0, 1.0]]))
    assert [(one.worker, one.tie) for one in alone.arrivals if one.worker == 1] == [(1, False)]
    assert sum(one.tie for one in alone.arrivals) == 2


def test_a_row_of_times_is_that_of_the_version_or_of_the_number():
    table = np.array([[1.0, 9.0], [2.0, 9.0], [4.0, 4.0]])
    assert closings(played(BackupWorkers(1), table)) == [1.0, 3.0, 7.0]
    table[0, 0] = 3.0
    records = played(BackupWorkers(1), np.array([[1.0, 2.5], [1.0, 8.0], [1.0, 0.25]]))
    # worker 1's second computation begins in step 2, whose row it takes
    assert closings(records) == [1.0, 2.0, 2.75]
    assert closings(played(Async(1), np.array([[1.0, 1.5], [4.0, 4.0]]), steps=3)) == [1.0, 1.5, 5.0]


def test_many_gradients_may_wait_for_one():
    recorded = played(BackupWorkers(0), np.arange(600.0)[None, ::-1].copy())
    (record,) = played(Replay(recorded), np.arange(600.0)[None])
    assert [worker for worker, *_ in record.accepted] == list(range(599, -1, -1))


def test_a_death_shrinks_n_and_the_last_ends_it():
    records = simulate(BackupWorkers(0), alike(3), steps=9, deaths={0: 2.5, 1: 4.5, 2: 6.5})
    assert [(record.alive, record.target) for record in itertools.islice(records, 6)] == [
        (3, 3), (3, 3), (2, 2), (2, 2), (1, 1), (1, 1),
    ]  # fmt: skip
    with pytest.raises(Deadlock, match="step 6 of backup:0"):
        next(records)


@pytest.mark.parametrize(
    ("table", "more", "message"),
    [
        (np.ones((3, 2)), {"workers": 3}, r"array \(steps, workers\), here for 3 workers, but its shape is \(3, 2\)"),
        (np.ones(3), {}, "shape is"),
        (np.ones((0, 2)), {}, "shape is"),
        (np.array([[1.0, math.nan]]), {}, "finite and not negative"),
        (np.array([[1.0, -1.0]]), {}, "finite and not negative"),
        (lambda worker, sequence: 1.0, {}, "workers must be given"),
        (np.ones((3, 1)), {}, "backup must be less than the number of workers"),
    ],
)
def test_times_that_make_no_sense_are_refused(table, more, message):
    with pytest.raises(ValueError, match=message):
        simulate(BackupWorkers(1), table, steps=3, **more)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"topology": "ring"}, "topology must be star, tree, sharded, not 'ring'"),
        ({"nodes": 0}, "nodes must be at least 1"),
        ({"wake_s": -1.0}, "wake_s must be finite and not negative, not -1.0"),
        ({"bandwidth_bytes_per_s": 0.0}, "bandwidth_bytes_per_s must be greater than 0"),
        ({"topology": "tree", "shared": False}, "a tree needs workers that share memory"),
    ],
)
def test_costs_of_no_machine_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Costs(**values)


def test_bad_blocks_are_refused():
    for bad in (np.ones(3), np.array([[math.inf]]), np.ones((0, 3))):
        with pytest.raises(ValueError, match="leave out the steps with gaps"):
            backup_step_times(bad, 0)
    with pytest.raises(ValueError, match="backup must be from 0 to 2 with 3 workers, not 3"):
        backup_step_times(np.ones((1, 3)), 3)
    with pytest.raises(ValueError, match="counts must be from 1 to the 3 workers"):
        arrival_times(np.ones((1, 3)), [0])


# -- training inside ------------------------------------------------------------------------------


def test_synchronous_training_is_the_mean_gradient_at_the_newest_parameters():
    descent = Descent(Quadratic(dimension=5), rate=0.1, seed=3)
    records = played(BackupWorkers(1), times(20, 4), learner=descent)
    twin = Descent(Quadratic(dimension=5), rate=0.1, seed=3)
    for record in records:
        gradients = [twin.gradient(twin.parameters, worker, sequence) for worker, sequence, _ in record.accepted]
        twin.update(np.mean(gradients, axis=0))
    assert descent.errors == twin.errors and len(twin.errors) == 21
    assert records[3].arrivals[-1].loss == twin.errors[records[3].arrivals[-1].version]


def test_stale_gradients_are_those_of_the_parameters_they_were_computed_at():
    descent, twin = (Descent(Quadratic(dimension=5), rate=0.1, seed=3) for _ in range(2))
    history = [twin.parameters]
    records = played(Async(2), times(30, 4, sigma=1.0), learner=descent)
    assert max(record.step - version for record in records for *_, version in record.accepted) > 1
    for record in records:
        gradients = [twin.gradient(history[version], worker, sequence) for worker, sequence, version in record.accepted]
        twin.update(np.mean(gradients, axis=0))
        history.append(twin.parameters)
    assert descent.errors == twin.errors


def test_norms_are_there_when_they_are_wanted():
    records = played(Adaptive(), times(3, 4), learner=Descent(Quadratic(3, noise=0.0), rate=0.1))
    assert all(record.norms[0] == pytest.approx(3 * record.norms[1]) for record in records), "without noise"
    assert played(BackupWorkers(0), times(1, 4), learner=Descent(Quadratic(3), rate=0.1))[0].norms is None


def test_logistic_regression_comes_near_its_best_and_its_slope_is_that_of_its_loss():
    problem = Logistic(samples=300, features=6, batch=8)
    descent = Descent(problem, rate=lambda step: 1.0 / (1 + 0.02 * step))
    played(BackupWorkers(1), times(300, 8), learner=descent)
    assert problem.error(problem.best) < 1e-12 < descent.errors[-1] < 0.02 * descent.errors[0]
    whole = Logistic(samples=300, features=6, batch=300 * 200)  # many draws: nearly the whole data's gradient
    slope, theta, h = whole.gradient(whole.start, np.random.default_rng(0)), whole.start, 1e-5
    for i, unit in enumerate(np.eye(6)):
        numeric = (whole.error(theta + h * unit) - whole.error(theta - h * unit)) / (2 * h)
        assert slope[i] == pytest.approx(numeric, abs=5 * 0.5 / math.sqrt(300 * 200))


# -- costs from measurements ----------------------------------------------------------------------


def measured():
    path = Path(ROOT) / "benchmarks/results/collective-2cores.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("method", ["shared", "messages"])
def test_a_calibrated_simulation_takes_the_time_that_the_benchmark_took(method):
    seen = 0
    for result in measured():
        workers = result["settings"]["workers"]
        for size, found in result["sizes"].items():
            if (ours := found["ms"].get(f"mpisync {method}")) is None:
                continue
            costs = costs_from_benchmark(result, int(size), method)
            record = played(BackupWorkers(0), alike(workers, 0.0), steps=3, costs=costs)[-1]
            assert 1e3 * (record.published_s - record.opened_s) == pytest.approx(ours["p50"], rel=0.15)
            seen += 1
    assert seen >= 2


def test_a_method_that_was_not_measured_is_named():
    result = next(r for r in measured() if all("mpisync messages" not in s["ms"] for s in r["sizes"].values()))
    with pytest.raises(ValueError, match="must have measured mpisync messages"):
        costs_from_benchmark(result, int(next(iter(result["sizes"]))), "messages")


def test_costs_are_found_again_in_a_record():
    costs = Costs(gradient_bytes=4 * MB, wake_s=0.01, fold_bytes_per_s=1e8, update_s=0.03, publish_s=0.002)
    found = costs_from_records(played(BackupWorkers(1), times(40, 5), costs=costs))
    for name, value in dataclasses.asdict(costs).items():
        assert getattr(found, name) == (value if isinstance(value, str) else pytest.approx(value)), name


def test_a_record_without_compute_times_is_refused():
    with pytest.raises(ValueError, match="tell how long they were computed"):
        costs_from_records(played(BackupWorkers(0), alike(2), steps=1))


@pytest.mark.parametrize("name", "calibration costs learning scale simulation trials".split())
def test_the_examples_in_docstrings_run(name):
    results = doctest.testmod(importlib.import_module(f"mpisync.planning.{name}"))
    assert results.attempted and not results.failed


def test_deadlines_wake_the_root_in_virtual_time():
    records = played(Deadline(1.5), np.array([[1.0, 2.0], [0.25, 9.0]]), seed=None)
    assert closings(records) == [1.5, 3.0]
    for record in records:
        StepChecker(2).check(record)
