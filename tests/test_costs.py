"""What waiting and running for long may cost: cores and memory."""

import os
import time

import numpy as np
import pytest

import mpisync

PAGE = os.sysconf("SC_PAGE_SIZE")
TRANSPORTS = pytest.mark.parametrize("transport", ["shared", "messages"])


def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * PAGE


def run(comm, size, steps, policy, *, at_root=lambda step: None, at_worker=lambda version: None):
    theta = np.zeros(size, np.float32)
    with mpisync.PartialReduce(comm, like=theta, policy=policy) as reduction:
        if reduction.is_root:
            for step in reduction.serve(steps):
                at_root(step)
                step.publish(theta)
        else:
            reduction.gradient[:] = 1.0
            version = 0
            while reduction.pull(reduction.parameters):
                at_worker(version)
                version += 1
                reduction.push()


@pytest.mark.parallel(3)
@TRANSPORTS
def test_a_rank_that_waits_a_second_uses_under_five_percent_of_a_core(comm, monkeypatch, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    spent = {}

    def note(number, slow):
        """Between the notes of `number` and the next this rank only waits, if `slow` does its part."""
        spent[number] = time.monotonic(), time.process_time()
        if slow == number:
            time.sleep(1.0)

    slow = {0: 9, 2: 4}.get(comm.rank)  # worker 0 before its tenth gradient, the root before version 5
    run(
        comm,
        256,
        12,
        mpisync.BackupWorkers(0),
        at_root=lambda step: note(step.step, slow),
        at_worker=lambda version: note(version, slow),
    )
    waits = {0: [4], 1: [4, 9], 2: [8]}[comm.rank]
    shares = []
    for number in waits:
        (began_s, cpu_s), (ended_s, cpu_end_s) = spent[number], spent[number + 1]
        assert ended_s - began_s > 0.9
        shares.append((cpu_end_s - cpu_s) / (ended_s - began_s))
    shares = comm.allgather(max(shares))
    assert max(shares) < 0.05, shares


@pytest.mark.parallel(3)
@pytest.mark.timeout(110)
@TRANSPORTS
def test_memory_is_flat_over_many_steps(comm, monkeypatch, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    steps, sizes = (20_000 if transport == "shared" else 5_000), {}

    def look(number):
        if number in (steps // 5, steps - 10):
            sizes[number] = resident_bytes()

    run(comm, 256, steps, mpisync.BackupWorkers(1), at_root=lambda step: look(step.step), at_worker=look)
    grown = max(sizes.values()) - min(sizes.values()) if len(sizes) == 2 else 0
    assert max(comm.allgather(grown)) < 1 << 20, comm.allgather(sizes)


@pytest.mark.parallel(6)
def test_the_root_holds_two_gradients_by_messages_and_not_one_a_worker(comm, monkeypatch):
    monkeypatch.setenv("MPISYNC_TRANSPORT", "messages")
    size, seen = 8_000_000, []  # 32 MB
    run(comm, 10_000, 3, mpisync.BackupWorkers(0))  # what libraries take at their first use is not ours
    before = resident_bytes()
    run(comm, size, 6, mpisync.BackupWorkers(0), at_root=lambda step: seen.append(resident_bytes()))
    if comm.rank == comm.size - 1:
        # the user's array; the published parameters, their snapshot, and one still being sent; the sum; two gradients
        assert max(seen) - before < (1 + 3 + 1 + 2 + 0.5) * 4 * size
