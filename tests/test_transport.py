"""Both transports against their contract: what is pushed, folded, published and pulled, and left."""

import argparse
import errno
import gc
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from launch import ROOT
from mpi4py import MPI

from mpisync import siblings
from mpisync.aggregation import participant
from mpisync.commands import run
from mpisync.device import shared_memory as memory_module
from mpisync.device.shared_memory import SharedMemory
from mpisync.policies import Async, BackupWorkers, Deadline, Replay
from mpisync.session.options import chosen_policy
from mpisync.session.partial_reduce import PartialReduce
from mpisync.transport import communicators, connect, shared
from mpisync.transport.futex import Futex
from mpisync.transport.layout import Layout
from mpisync.transport.wire import Reply, ReplyKind, Status

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.fixture(params=["shared", "messages"])
def transport(request, monkeypatch):
    monkeypatch.setenv("MPISYNC_TRANSPORT", request.param)
    return request.param


def gradient_of(worker, sequence, like):
    """Small whole numbers and halves: exact in every dtype, and in every order of summation."""
    first = (3 * worker + sequence) % 7
    return ((np.arange(like.size) + first) % 8 / 2).astype(like.dtype).reshape(like.shape)


def mean_of(accepted, like):
    total = sum(gradient_of(w, s, like).astype(np.float64) for w, s in accepted)
    wide = np.float64 if like.dtype == np.float64 else np.float32
    return (total.astype(wide) / wide(len(accepted))).reshape(like.shape)


def work(reduction, theta, *, check=None, slow_s=0.0, steps=None):
    """A worker's loop; its verdicts."""
    verdicts = []
    while reduction.pull(theta):
        if check is not None:
            check(theta)
        time.sleep(slow_s)
        verdicts.append(reduction.push(gradient_of(reduction_rank(reduction), len(verdicts), theta)))
        if steps is not None and len(verdicts) == steps:
            break
    return verdicts


def reduction_rank(reduction):
    return reduction._worker._me.rank


def lead(reduction, theta, steps=None, each=lambda step, record: None):
    """The root's loop: every parameter counts versions; the records."""
    records = []
    for step in reduction.serve(steps):
        np.testing.assert_array_equal(step.mean, mean_of(step.accepted, theta))
        theta[...] = step.step + 1
        records.append(step.publish(theta))
        each(step, records[-1])
    return records


def is_uniform(theta):
    assert (theta == theta.flat[0]).all(), "two versions are mixed"


def assert_nothing_left(comm):
    """No message waits on the duplicate that sessions on `comm` use."""
    comm.Barrier()
    assert communicators.known(comm)
    assert not any(private.Iprobe() for private in communicators.known(comm))
    comm.Barrier()


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parallel(3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 1000, 3_000_000])
def test_means_and_parameters_arrive_whole(comm, transport, dtype, size):
    theta = np.zeros(size, dtype)
    steps = 4 if size > 1000 else 12
    with PartialReduce(comm, like=theta, policy=BackupWorkers(0)) as reduction:
        if reduction.is_root:
            records = lead(reduction, theta, steps)
            assert [r.step for r in records] == list(range(steps))
            assert records[-1].counts == {"accepted": 2 * steps, "late": 0, "rejected": 0}
        else:
            verdicts = work(reduction, theta, check=is_uniform)
            assert [v.accepted for v in verdicts] == [True] * steps
            assert [v.step for v in verdicts] == list(range(steps))
    assert (theta == steps).all(), "everyone has the final parameters"
    assert_nothing_left(comm)


@pytest.mark.parallel(3)
def test_shapes_are_kept_and_nothing_need_be_copied(comm, transport):
    theta = np.zeros((3, 5), np.float32)
    with PartialReduce(comm, like=theta, policy=BackupWorkers(0), parameters=theta + 7) as reduction:
        if reduction.is_root:
            for step in reduction.serve(3):
                assert step.mean.shape == (3, 5)
                reduction.parameters[...] += step.mean
                step.publish(reduction.parameters)
        else:
            expected = 7.0
            while reduction.pull(theta):
                assert (theta == expected).all()
                reduction.gradient[...] = 2.0
                expected += 2 * reduction.push().accepted
            assert (theta == 13.0).all()
    assert_nothing_left(comm)


@pytest.mark.parallel(4)
@pytest.mark.parametrize("size", [100, 3_000_000])
def test_a_late_gradient_is_told_by_how_many_versions(comm, transport, size):
    theta = np.zeros(size, np.float32)
    team, begun = comm.Split(comm.rank == comm.size - 1, comm.rank), []

    def check(theta):
        if not begun:  # the slow one takes part from the start, however slow its process came up
            team.Barrier()
            begun.append(True)
        is_uniform(theta)

    with PartialReduce(comm, like=theta, policy=BackupWorkers(1)) as reduction:
        if reduction.is_root:
            records = lead(reduction, theta, 10)
            assert all(len(r.accepted) == 2 for r in records)
            late = [a for r in records for a in r.arrivals if a.verdict == "late"]
            assert all(a.bytes == 0 for a in late) or transport == "shared" or size == 100
        else:
            slow = comm.rank == 0
            verdicts = work(reduction, theta, check=check, slow_s=0.5 if slow else 0.0)
            for verdict in verdicts:
                assert (verdict.late_by > 0) == (not verdict.accepted)
            if slow:
                assert any(v.late_by > 0 and v.reason for v in verdicts)
    team.Free()
    assert (theta == 10).all()
    assert_nothing_left(comm)


@pytest.mark.parallel(4)
@pytest.mark.parametrize("size", [100, 3_000_000])
def test_stale_gradients_count_under_async(comm, transport, size):
    theta = np.zeros(size, np.float32)
    with PartialReduce(comm, like=theta, policy=Async(2)) as reduction:
        if reduction.is_root:
            records = lead(reduction, theta, 20)
            lags = [r.step - v for r in records for *_, v in r.accepted]
            assert all(len(r.accepted) == 2 for r in records) and max(lags) > 0
        else:
            work(reduction, theta, check=is_uniform, slow_s=0.003 * (comm.rank + 1))
    assert (theta == 20).all()
    assert_nothing_left(comm)


@pytest.mark.parallel(3)
def test_a_deadline_closes_without_the_slow(comm, transport):
    theta = np.zeros(10, np.float32)
    with PartialReduce(comm, like=theta, policy=Deadline(0.1)) as reduction:
        if reduction.is_root:
            records = lead(reduction, theta, 5)
            assert all([w for w, *_ in r.accepted] == [1] for r in records)
        else:
            work(reduction, theta, slow_s=1.0 if comm.rank == 0 else 0.0)
    assert_nothing_left(comm)


@pytest.mark.parallel(4)
@pytest.mark.parametrize("size", [100, 2_000_000])
def test_a_replay_is_bit_equal(comm, transport, size):
    rng = np.random.default_rng(comm.rank)
    steps = 12

    def run(policy, pauses_s):
        theta = np.zeros(size, np.float32)
        with PartialReduce(comm, like=theta, policy=policy) as reduction:
            if reduction.is_root:
                records = []
                for step in reduction.serve(steps):
                    theta -= np.float32(0.1) * step.mean
                    records.append(step.publish(theta))
                return theta, records
            sequence = 0
            while reduction.pull(theta):
                noise = np.random.default_rng((comm.rank, sequence)).standard_normal(size)
                time.sleep(pauses_s[sequence % 8])
                reduction.push((noise * 0.1 + theta).astype(np.float32))
                sequence += 1
            return theta, None

    theta, records = run(Async(2), rng.uniform(0, 0.02, 8))
    recorded = comm.bcast(records, root=comm.size - 1)
    again, replayed = run(Replay(recorded), rng.uniform(0, 0.02, 8))
    np.testing.assert_array_equal(theta, again)
    if replayed is not None:
        assert [r.accepted for r in replayed] == [r.accepted for r in records]
    assert_nothing_left(comm)


@pytest.mark.parallel(3)
def test_a_gradient_with_nan_is_rejected(comm, transport):
    theta = np.zeros(50, np.float32)
    with PartialReduce(comm, like=theta, policy=BackupWorkers(0)) as reduction:
        if reduction.is_root:
            (*_, last) = lead_any(reduction, theta, 6)
            assert last.counts == {"accepted": 12, "late": 0, "rejected": 1}
        else:
            sequence = 0
            while reduction.pull(theta):
                gradient = np.ones(50, np.float32)
                if comm.rank == 0 and sequence == 3:
                    gradient[17] = np.nan
                verdict = reduction.push(gradient)
                assert verdict.accepted or (sequence == 3 and "NaN" in verdict.reason)
                sequence += 1
    assert_nothing_left(comm)


def lead_any(reduction, theta, steps):
    records = []
    for step in reduction.serve(steps):
        assert step.finite
        records.append(step.publish(theta))
    return records


@pytest.mark.parallel(3)
def test_stale_says_that_a_version_is_superseded(comm, transport):
    theta = np.zeros(20, np.float32)
    with PartialReduce(comm, like=theta, policy=BackupWorkers(1)) as reduction:
        if reduction.is_root:
            lead_any(reduction, theta, 5)
        elif comm.rank == 1:
            work(reduction, theta, slow_s=0.02)
        else:
            assert reduction.pull(theta)
            give_up_s = time.monotonic() + 5.0
            while not reduction.stale():
                assert time.monotonic() < give_up_s
                time.sleep(1e-3)
            assert not reduction.push(theta).accepted
            while reduction.pull(theta):
                reduction.push(theta)
    assert_nothing_left(comm)


@pytest.mark.parallel(4)
@pytest.mark.parametrize("why", ["late", "NaN"])
def test_who_cannot_count_has_its_verdict_at_once(comm, transport, why):
    """Though the root lets the three gradients that a small step lacks come before it looks."""
    theta = np.zeros(20, np.float32)
    step_s, late_s = 0.6, 0.65
    with PartialReduce(comm, like=theta, policy=BackupWorkers(1 if why == "late" else 0)) as reduction:
        if reduction.is_root:
            lead_any(reduction, theta, 3)
        elif comm.rank > 0:
            while reduction.pull(theta):
                time.sleep(step_s)
                reduction.push(theta)
        else:
            assert reduction.pull(theta)
            if why == "late":
                time.sleep(late_s)
            verdict = reduction.push(theta if why == "late" else np.full_like(theta, np.nan))
            assert not verdict.accepted and verdict.waited_s < 0.1, verdict
            while reduction.pull(theta):
                reduction.push(theta)
    assert_nothing_left(comm)


@pytest.mark.parallel(3)
def test_a_worker_that_sleeps_between_its_ring_and_its_header_delays_nobody(comm, monkeypatch):
    """Neither while it sleeps nor afterwards: the root must hear as many headers as have rung."""
    theta, rings, original = np.zeros(20, np.float32), [], shared.fetch_add

    def fetch_add(words, index, value):
        sleeps = comm.rank == 0 and index == shared._BELL and len(rings) == 10
        time.sleep(1.0 if sleeps else 0.0)
        old = original(words, index, value)
        if index == shared._BELL:
            rings.append(old)
            time.sleep(1.0 if sleeps else 0.0)
        return old

    monkeypatch.setattr(shared, "fetch_add", fetch_add)
    with PartialReduce(comm, like=theta, policy=BackupWorkers(1)) as reduction:
        if reduction.is_root:
            records = lead_any(reduction, theta, 300)
            waits_s = [record.closed_s - record.opened_s for record in records[1:]]
            assert max(waits_s) < 0.5 and np.median(waits_s[200:]) < 0.05, max(waits_s)
        else:
            work(reduction, theta, slow_s=0.01)
    assert_nothing_left(comm)


@pytest.mark.parallel(3)
def test_the_end_of_the_loops_is_the_end_for_everyone(comm, transport):
    theta = np.zeros(20, np.float32)
    reduction = PartialReduce(comm, like=theta, policy=BackupWorkers(0))
    if reduction.is_root:
        lead(reduction, theta, 3)
        with pytest.raises(RuntimeError, match="push is a worker's"):
            reduction.push(theta)
    else:
        work(reduction, theta)
        assert not reduction.pull(theta) and (theta == 3).all()
        with pytest.raises(RuntimeError, match="push comes too late"):
            reduction.push(theta)
    comm.Barrier()  # behind the loops and before free(): the root waits for nobody by now
    reduction.free()
    assert (reduction.parameters == 3).all()
    assert_nothing_left(comm)


@pytest.mark.parallel(3)
@pytest.mark.parametrize("policy", [BackupWorkers(0), Async()], ids=str)
def test_parameters_are_kept_once_where_all_can_read_them_in_place(comm, transport, policy):
    theta = np.zeros(100, np.float32)
    is_home = transport == "shared" and policy.staleness == 0
    with PartialReduce(comm, like=theta, policy=policy) as reduction:
        if reduction.is_root:
            home = reduction._root.roster._links[0].home()
            assert (home is not None) == is_home
            assert not is_home or np.shares_memory(home, reduction.parameters)
            lead(reduction, theta, 2)
        else:
            assert reduction._participant.reads_in_place == (is_home or transport == "messages")
            work(reduction, theta)
    assert_nothing_left(comm)


# -- sessions --------------------------------------------------------------------------------------


@pytest.mark.parallel(4)
@pytest.mark.parametrize("size", [10, 2_000_000])
def test_sessions_follow_one_another_also_on_a_part_of_the_ranks(comm, transport, size):
    for _ in range(3):
        short(comm, size)
    part = comm.Split(color=comm.rank % 2, key=-comm.rank)
    short(part, size)
    assert_nothing_left(part)
    part.Free()
    short(comm, size)
    assert_nothing_left(comm)


def short(comm, size, steps=3):
    theta = np.zeros(size, np.float32)
    reduction = PartialReduce(comm, like=theta, policy=BackupWorkers(0))
    if reduction.is_root:
        lead(reduction, theta, steps)
    else:
        work(reduction, theta)
    reduction.free()
    reduction.free()
    assert (theta == steps).all()


@pytest.mark.parallel(3)
def test_two_at_a_time_on_one_communicator_do_not_meet(comm, transport):
    theta, other = np.zeros(20, np.float32), np.zeros(30, np.float64)
    for _ in range(2):  # the second pair has the duplicates of the first
        theta[:], other[:] = 0, 0
        with (
            PartialReduce(comm, like=theta, policy=BackupWorkers(0)) as one,
            PartialReduce(comm, like=other, policy=BackupWorkers(0)) as two,
        ):
            if one.is_root:
                others = two.serve(5)
                for step in one.serve(5):
                    step.publish(theta + step.step + 1)
                    step = next(others)
                    step.publish(other + 10 * (step.step + 1))
            else:
                while one.pull(theta):
                    one.push(theta)
                    two.pull(other)
                    two.push(other)
                    assert one.gradient.shape == (20,) and two.gradient.shape == (30,)
        assert (one.parameters == 5).all() and (two.parameters == 50).all()
        assert len(communicators.known(comm)) == 2
        assert_nothing_left(comm)


@pytest.mark.parallel(3)
@pytest.mark.parametrize("who", [0, 2])
def test_stop_ends_everywhere(comm, transport, who):
    theta = np.zeros(100, np.float32)
    with PartialReduce(comm, like=theta, policy=BackupWorkers(0)) as reduction:
        if reduction.is_root:
            stops = {4: reduction.stop} if who == comm.rank else {}
            records = lead(reduction, theta, None, lambda s, r: stops.get(s.step, int)())
            assert len(records) == 5
        else:
            accepted = 0
            while reduction.pull(theta):
                if comm.rank == who and accepted == 5:
                    reduction.stop()
                    continue
                accepted += reduction.push(gradient_of(comm.rank, accepted, theta)).accepted
            assert accepted == 5
    assert (theta == 5).all()
    assert_nothing_left(comm)


@pytest.mark.parallel(4)
@pytest.mark.parametrize("size", [100, 3_000_000])
def test_a_worker_that_leaves_early_gets_the_final_parameters(comm, transport, size):
    theta = np.zeros(size, np.float32)
    reduction = PartialReduce(comm, like=theta, policy=BackupWorkers(0))
    if reduction.is_root:
        records = lead(reduction, theta, 9)
        assert [len(r.accepted) for r in records] == [3] * 3 + [2] * 6
    else:
        work(reduction, theta, steps=3 if comm.rank == 1 else None)
    reduction.free()
    assert (reduction.parameters == 9).all(), "the final parameters are its own now"
    assert_nothing_left(comm)


@pytest.mark.parallel(3)
def test_the_root_waits_for_a_worker_that_computes_past_the_end(comm, transport):
    theta = np.zeros(2_000_000, np.float32)
    with PartialReduce(comm, like=theta, policy=BackupWorkers(1)) as reduction:
        if reduction.is_root:
            lead(reduction, theta, 3)
        else:
            verdicts = work(reduction, theta, slow_s=1.0 if comm.rank == 0 else 0.0)
            assert comm.rank == 1 or not verdicts[-1].accepted
    assert (theta == 3).all()
    assert_nothing_left(comm)


# -- what is refused -------------------------------------------------------------------------------


def refused(comm, match, like=None, **options):
    like = np.zeros(4, np.float32) if like is None else like
    began_s = time.monotonic()
    with pytest.raises(ValueError, match=match):
        PartialReduce(comm, like=like, **options)
    assert time.monotonic() - began_s < 5.0


@pytest.mark.parallel(3)
def test_what_differs_between_ranks_is_refused_on_all_of_them(comm):
    one = comm.rank == 1
    refused(comm, r"rank 1: shape is \[5\] here and \[4\]", np.zeros(5 if one else 4, np.float32))
    dtype = np.float64 if one else np.float32
    refused(comm, "rank 1: dtype is float64 here and float32 on the root", np.zeros(4, dtype))
    policy = BackupWorkers(int(one))
    refused(comm, "rank 1: policy is backup:1 here and backup:0 on the root", policy=policy)
    refused(comm, "backup is 2 with 2 workers", policy=BackupWorkers(2))
    refused(comm, "backup is 9 with 2 workers", policy=BackupWorkers(9 if one else 1))
    wrong = np.zeros(9 if comm.rank == 2 else 4, np.float32)
    refused(comm, r"the parameters must be \[4\] float32", parameters=wrong)
    short(comm, 4)
    assert_nothing_left(comm)


@pytest.mark.parallel(3)
def test_what_does_not_fit_is_refused_and_the_session_goes_on(comm):
    theta = np.zeros(4, np.float32)
    with PartialReduce(comm, like=theta, policy=BackupWorkers(0)) as reduction:
        if reduction.is_root:
            lead(reduction, theta, 2)
            with pytest.raises(RuntimeError, match="pull is a worker's"):
                reduction.pull(theta)
        else:
            with pytest.raises(RuntimeError, match="serve is the root's"):
                next(reduction.serve())
            assert reduction.pull(theta)
            with pytest.raises(ValueError, match=r"\[4\] float32 as `like` is.*\[5\] float32"):
                reduction.push(np.zeros(5, np.float32))
            work(reduction, theta)


@pytest.mark.parallel(3)
def test_a_transport_that_does_not_exist_is_refused_on_every_rank_and_the_root_decides(comm, monkeypatch):
    monkeypatch.setenv("MPISYNC_TRANSPORT", "fast" if comm.rank == comm.size - 1 else "shared")
    for _ in range(2):
        refused(comm, "MPISYNC_TRANSPORT='fast': must be one of auto, shared, messages")
    assert len(communicators.known(comm)) == 1, "who is refused gives the duplicate back"
    monkeypatch.setenv("MPISYNC_TRANSPORT", "shared" if comm.rank == comm.size - 1 else "fast")
    short(comm, 4)
    assert_nothing_left(comm)


def test_users_are_told_of_every_transport():
    row = next(line for line in (ROOT / "README.md").read_text().splitlines() if "`MPISYNC_TRANSPORT`" in line)
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    for name in connect.TRANSPORTS:
        assert f"`{name}`" in row and name in parser.format_help()


# -- without shared memory -------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused_by_name(monkeypatch):
    theta = np.zeros(3, np.float32)
    with pytest.raises(TypeError, match="comm must be an intracommunicator such as MPI.COMM_WORLD, not None"):
        PartialReduce(None, like=theta)
    for null in (MPI.COMM_NULL, MPI.Intracomm()):
        with pytest.raises(TypeError, match="that this rank is in, not MPI.COMM_NULL: a rank that a Split"):
            PartialReduce(null, like=theta)
    with pytest.raises(ValueError, match="has one rank: start the script with"):
        PartialReduce(MPI.COMM_SELF, like=theta)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "5")
    if MPI.COMM_WORLD.size == 1:  # as it is for every rank whose mpi4py loaded another MPI than the launcher's
        with pytest.raises(RuntimeError, match="started 5 ranks, but this one is rank 0 of 1"):
            PartialReduce(MPI.COMM_WORLD, like=theta)


def test_a_policy_in_text_is_told_how_to_become_one():
    with pytest.raises(TypeError, match=r"write mpisync.policies.parse_policy\('backup:1'\)"):
        chosen_policy("backup:1")


@pytest.mark.parallel(3)
def test_where_no_descriptor_can_be_opened_a_file_is_shared(comm, monkeypatch):
    create = SharedMemory.create
    made = []

    def as_file_only(size_bytes, *, as_file=False):
        if not as_file:
            raise OSError(errno.EACCES, "no descriptor of another process can be opened")
        made.append(create(size_bytes, as_file=True))
        return made[-1]

    monkeypatch.setattr(SharedMemory, "create", as_file_only)
    short(comm, 1000)
    assert made and made[0].address.startswith("/dev/shm/mpisync-")
    assert not [m for m in made if os.path.exists(m.address.split("?")[0])]


@pytest.mark.parallel(3)
@pytest.mark.parametrize("asked", ["auto", "shared"])
def test_where_memory_is_short_messages_are_used_and_it_is_said(comm, monkeypatch, capfd, asked):
    monkeypatch.setenv("MPISYNC_TRANSPORT", asked)
    participant._tell_once.cache_clear()
    if comm.rank == 0:

        def full(fd, offset, size):
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(memory_module.os, "posix_fallocate", full)
    short(comm, 1000)
    if comm.rank == comm.size - 1:
        said = capfd.readouterr().err
        assert "worker 0 cannot share memory with the root (" in said and "No space left on device), so gr" in said
        assert "[Errno" not in said and "larger /dev/shm (docker run --shm-size=4g)" in said


@pytest.mark.parallel(3)
def test_nothing_is_left_open(comm, transport):
    def opened():
        found = []
        for fd in os.listdir("/proc/self/fd"):
            try:
                found.append(os.readlink(f"/proc/self/fd/{fd}"))
            except OSError:
                pass
        return sum(path.startswith(("/memfd:mpisync", "/dev/shm/mpisync")) for path in found)

    def mapped():
        with open("/proc/self/maps") as maps:
            return sum("memfd:mpisync" in line or "/dev/shm/mpisync" in line for line in maps)

    gc.collect()  # what earlier tests' loops still hold, is theirs
    opened_before, before = opened(), mapped()
    for _ in range(3):
        short(comm, 100_000)
    comm.Barrier()
    assert opened() <= opened_before
    assert mapped() <= before + 5, "earlier sessions' memory is gone"
    comm.Barrier()
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("mpisync-")]


# -- memory, alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("as_file", [False, True])
def test_memory_is_shared_zeroed_and_gone_afterwards(as_file):
    made = SharedMemory.create(10_000, as_file=as_file)
    seen = SharedMemory.attach(made.address)
    assert seen.bytes.size == made.bytes.size == 10_000 and not made.bytes.any()
    made.bytes[9_999] = 7
    assert seen.bytes[9_999] == 7
    where = made.address.split("?")[0]
    made.unlink()
    assert os.path.exists(where) is not as_file
    seen.close()
    made.close()
    with pytest.raises(OSError):
        SharedMemory.attach(made.address)


@pytest.mark.parametrize("as_file", [False, True])
def test_another_memory_is_not_taken_for_ours(as_file):
    made = SharedMemory.create(4096, as_file=as_file)
    where, nonce, size = made.address.split("?")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="is another memory than"):
        SharedMemory.attach(f"{where}?{'00' * 16}?{size}")
    with pytest.raises(OSError, match="is another memory than"):
        SharedMemory.attach(f"{where}?{nonce}?{int(size) + 1}")
    assert len(os.listdir("/proc/self/fd")) == len(before)
    made.close()


def test_memory_that_cannot_be_had_is_an_error_that_says_how_much(monkeypatch):
    def full(fd, offset, size):
        raise OSError(errno.ENOSPC, "full")

    before = os.listdir("/proc/self/fd"), os.listdir("/dev/shm")
    monkeypatch.setattr(memory_module.os, "posix_fallocate", full)
    for as_file in (False, True):
        with pytest.raises(OSError, match=r"5.0 MB of shared memory wanted, and No space left"):
            SharedMemory.create(5_000_000, as_file=as_file)
    assert len(os.listdir("/proc/self/fd")) == len(before[0])
    assert os.listdir("/dev/shm") == before[1]


# -- processes -------------------------------------------------------------------------------------


def test_the_kernel_is_asked_for_a_process_by_one_function():
    def ticks():
        return time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")

    before = ticks()
    # a name with a bracket and a space, as the text has it: "PID (a) b) S PPID ..."
    with subprocess.Popen([sys.executable, "-c", "open('/proc/self/comm', 'w').write('a) b'); input()"],
                          stdin=subprocess.PIPE) as child:  # fmt: skip
        give_up_s = time.monotonic() + 20.0
        while Path(f"/proc/{child.pid}/comm").read_text() != "a) b\n":
            assert time.monotonic() < give_up_s
            time.sleep(0.01)
        now = siblings.stat(child.pid)
        assert now.state in "RSD" and now.parent == os.getpid() and before - 2 <= now.started <= ticks() + 2
        child.communicate(b"\n")
    assert siblings.stat(child.pid) is None


# -- futex -----------------------------------------------------------------------------------------


def test_a_futex_wakes_another_process():
    made = SharedMemory.create(4096)
    words = made.bytes[:64].view(np.uint32)
    bell = Futex(words, 3)
    pid = os.fork()
    if pid == 0:
        began_s = time.monotonic()
        while words[3] == 0:
            bell.wait(0, 10.0)
        os._exit(0 if time.monotonic() - began_s < 5.0 else 1)
    time.sleep(0.2)
    words[3] = 1
    bell.wake()
    began_s = time.monotonic()
    assert os.waitpid(pid, 0)[1] == 0
    assert time.monotonic() - began_s < 1.0
    made.close()


def test_a_futex_waits_no_longer_than_asked_and_not_at_all_for_old_news():
    bell = Futex(np.zeros(1, np.uint32), 0)
    began_s = time.monotonic()
    bell.wait(0, 0.1)
    slept_s = time.monotonic() - began_s
    assert 0.09 <= slept_s < 0.5
    bell.wait(1, 5.0)  # the word is another already
    assert time.monotonic() - began_s < slept_s + 0.5


def test_a_board_tells_sixteen_workers_apart():
    """The words that say what was answered once ran into the first reply, where over eight workers share memory."""
    layout = Layout.of([("float32", 4)])
    board = shared.Board(SharedMemory.create(shared.Board.size_bytes(16)), SharedMemory.create(4096), 16, layout, 1)
    root = SimpleNamespace(board=board, _told=True)
    replies = [
        Reply(7, ReplyKind.VERDICT, Status.ACCEPTED, worker, 1000 + worker, step=3, newest=4, resume=5, text="x")
        for worker in range(16)
    ]
    for reply in replies:
        shared.SharedRootLink.reply(root, reply.worker, reply)
    for reply in replies:
        link = SimpleNamespace(_board=board, _worker=reply.worker)
        assert shared.SharedWorkerLink.reply(link, reply.ordinal) == reply
        assert shared.SharedWorkerLink.reply(link, reply.ordinal + 1) is None
        assert board.taken[reply.worker] == 0
    board.memory.close()
