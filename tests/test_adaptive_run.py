"""Adaptive and the simulation against real runs, on a root and three workers that sleep."""

import statistics
import time

import numpy as np
import pytest

import mpisync
from mpisync.planning.calibration import costs_from_records
from mpisync.planning.simulation import simulate
from mpisync.policies import Adaptive, BackupWorkers, Replay

SLEEPS_S = (0.02, 0.02, 0.08)  # worker 2 straggles


def run(comm, policy, steps, sleep_s=lambda worker, sequence: SLEEPS_S[worker]):
    """The run's records, on every rank."""
    records = []
    with mpisync.PartialReduce(comm, like=np.zeros(8, np.float32), policy=policy) as reduction:
        if reduction.is_root:
            for step in reduction.serve(steps):
                records.append(step.publish(reduction.parameters))
        else:
            reduction.gradient[:] = 1.0 + comm.rank
            sequence = 0
            while reduction.pull(reduction.parameters):
                time.sleep(sleep_s(comm.rank, sequence))
                reduction.push()
                sequence += 1
    return comm.bcast(records, root=comm.size - 1)


@pytest.mark.parallel(4)
def test_adaptive_leaves_a_straggler_behind_and_tells_why(comm):
    records = run(comm, Adaptive(), 16)
    assert [record.target for record in records[:4]] == [3] * 4
    assert records[-1].target == 2
    assert sum(worker == 2 for record in records[-8:] for worker, *_ in record.accepted) <= 4
    assert any("N=2 instead of 3 saves" in (record.why or "") for record in records)
    for record in records[:4]:  # the gradients are 1, 2 and 3 in each of 8 elements
        assert record.norms == (pytest.approx(8 * 14), pytest.approx(8 * 4)), "measured since it wants them"
    again = run(comm, Replay(records), None, lambda worker, sequence: 0.002)
    assert [record.accepted for record in again] == [record.accepted for record in records]


@pytest.mark.parallel(4)
def test_a_simulation_takes_the_time_that_the_run_took(comm):
    """Medians, to 15 %: benchmarks/simulated.py compares means to 5 % on a machine of its own."""
    random = np.random.default_rng(0)
    table = 0.04 * random.lognormal(0.0, 0.3, (60, 3))

    def sleep_s(worker, sequence):
        return float(table[sequence % 60, worker])

    costs = costs_from_records(run(comm, BackupWorkers(0), 10, lambda worker, sequence: 0.02))
    records = run(comm, BackupWorkers(1), 40, sleep_s)
    simulated = list(simulate(BackupWorkers(1), sleep_s, workers=3, steps=40, costs=costs))
    real_s, simulated_s = (
        statistics.median(record.published_s - record.opened_s for record in each) for each in (records, simulated)
    )
    assert real_s == pytest.approx(simulated_s, rel=0.15)
