"""The root with a pool of batches, among scripted workers in virtual time: each is used once, and none is waited for.

Every step is held against `scripted.World.check_step` too, and every sleep of the root against the accounts.
"""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scripted import ScriptedWorker, World

from mpisync.aggregation.collector import TAKEN_OVER
from mpisync.aggregation.late_work import Requeue, Retry
from mpisync.aggregation.sample_pool import BatchId, SamplePool
from mpisync.aggregation.shutdown import farewell
from mpisync.policies import Adaptive, Async, BackupWorkers, Deadline
from mpisync.transport.wire import Status


def workers(delays, **options):
    return [
        ScriptedWorker(number, lambda sequence, own=own: own[sequence % len(own)], **options)
        for number, own in enumerate(delays)
    ]


def world_of(many, policy, *, batches=7, epochs=2, **options):
    late = Requeue()
    late.pool = SamplePool(batches, epochs)
    return World(many, policy, late=late, **options)


def used(world):
    accepted = {(w, s) for record in world.records for w, s, _ in record.accepted}
    arrivals = [a for record in world.records for a in record.arrivals]
    assert all((a.worker, a.sequence) in accepted for a in arrivals if a.verdict == "accepted")
    return Counter(BatchId(*lot) for a in arrivals if a.verdict == "accepted" for lot in a.lots)


def all_of(batches, epochs):
    return dict.fromkeys((BatchId(epoch, batch) for epoch in range(epochs) for batch in range(batches)), 1)


def finish(world):
    world.serve(None)
    assert used(world) == all_of(world.late.pool.batches, 2)
    farewell(world.root, grace_s=50.0, stopped_grace_s=3.0)
    world.check_accounts()
    world.root.roster.close()


POLICIES = [
    BackupWorkers(0), BackupWorkers(1), BackupWorkers(2), Deadline(1.5, at_least=2), Deadline(0.1), Async(),
    Async(k=3), Async(k=2, max_staleness=1), Async(k=3, max_staleness=0), Adaptive(),
]  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("pieces", [(), (0, 1, 2, 3), (1, 3)], ids=["slots", "pieces", "both"])
@pytest.mark.parametrize("batches", [1, 2, 7, 16])
def test_a_run_ends_when_every_batch_is_used_once(policy, pieces, batches):
    delays = np.random.default_rng(5).uniform(0.5, 2.0, (4, 13)).tolist()
    finish(world_of(workers(delays, samples=3), policy, batches=batches, pieces=pieces))


@pytest.mark.parametrize("policy", POLICIES[1:], ids=str)
def test_one_worker_that_hangs_keeps_no_batch(policy):
    delays = [[1.0], [1.1], [1.3], [1.0, 0.9, math.inf]]
    world = world_of(workers(delays), policy, batches=16)
    finish(world)
    assert world.now_s < 100.0 + 90.0


def test_a_batch_is_given_to_another_once_its_holder_will_be_late_for_sure():
    delays = [[1.0], [1.0], [1.0], [15.0]]
    world = world_of(workers(delays), BackupWorkers(1), batches=30)
    finish(world)
    slow = next(a for r in world.records for a in r.arrivals if a.worker == 3)
    (lot,) = slow.lots
    steps = {tuple(x): r.step for r in world.records for a in r.arrivals if a.verdict == "accepted" for x in a.lots}
    assert slow.verdict == "late" and steps[tuple(lot)] <= 4, "long before the slow one was done"


def test_at_the_end_a_step_takes_what_there_is():
    world = world_of(workers([[1.0], [1.1], [1.2], [1.3]]), BackupWorkers(0), batches=3)
    finish(world)
    assert [len(r.accepted) for r in world.records] == [4, 2]
    assert world.records[-1].target == 2


def test_whoever_computes_what_another_has_used_is_told_so():
    told = []
    for times in itertools.permutations([1.0, 1.2, 1.5, 9.0]):  # two have the one batch and two the other, by chance
        world = world_of(workers([[time] for time in times]), BackupWorkers(0), batches=1)
        finish(world)
        told += [r for w in world.workers for r in w.verdicts.values() if r.text == TAKEN_OVER.reason]
    assert told and all(reply.status == Status.LATE and reply.late_by == 0 for reply in told)


@pytest.mark.parametrize(("pieces", "at_s"), [((), 103.7), ((2, 3), 101.5)], ids=["computing", "on its way"])
def test_a_worker_that_is_killed_leaves_its_batch_to_others_at_once(pieces, at_s):
    many = workers([[1.0], [1.1], [1.2], [1.3]])
    many[2].transit = lambda sequence: math.inf if pieces else 0.0
    world = world_of(many, BackupWorkers(1), batches=10, epochs=None, pieces=pieces)
    held = []

    def kill():
        held.extend(lot for lot, holders in world.late.pool._out.items() if 2 in holders)
        world.kill(2)

    world.at(at_s, kill)
    world.serve(12)
    assert len(held) == 1 and used(world)[held[0]] == 1
    assert world.root.collector.accounts[2].lost == 0


def test_poison_is_given_up_and_not_handed_round():
    many = workers([[1.0], [1.1], [1.2], [1.3]])
    many[1].poisonous = lambda sequence: sequence == 1
    world = world_of(many, BackupWorkers(1), batches=10)
    world.serve(None)
    assert sum(used(world).values()) == 19 and max(used(world).values()) == 1
    assert world.late.pool.remaining == 0


def test_what_was_accepted_into_a_step_that_never_closed_is_in_the_pool_again():
    world = world_of(workers([[1.0], [1.0], [50.0], [50.0]]), BackupWorkers(0), batches=10)
    world.at(102.0, world.root.stop)
    world.serve(None)
    farewell(world.root, grace_s=100.0, stopped_grace_s=3.0)
    world.check_accounts()
    assert Counter(map(tuple, world.late.pool.state()["returned"])) == {(0, batch): 1 for batch in range(4)}


DELAYS = st.lists(st.lists(st.floats(0.1, 5.0), min_size=1, max_size=6), min_size=2, max_size=5)


@settings(max_examples=150, deadline=None)
@given(DELAYS, st.integers(1, 12), st.sampled_from(POLICIES[:2] + POLICIES[3:]), st.data())
@example([[1.0], [1.0]], 1, BackupWorkers(1), None)
def test_whatever_the_times_every_batch_is_used_once(delays, batches, policy, data):
    many = workers(delays, samples=2)
    for worker in many[1:]:
        if data is not None and data.draw(st.booleans(), "leaves"):
            worker.last = data.draw(st.integers(0, 5), "last")
    try:
        policy.check(len(many))
    except ValueError:
        policy = BackupWorkers(0)
    pieces = () if data is None else tuple(range(data.draw(st.integers(0, len(many)), "pieces")))
    finish(world_of(many, policy, batches=batches, pieces=pieces))


# -- the accounts of retries -----------------------------------------------------------------------


def test_retries_are_requeued_so_often_and_then_discarded():
    delays = [[1.0], [1.0], [7.5]]
    world = World(workers(delays, samples=4), BackupWorkers(1), late=Retry(2))
    world.serve(46)
    account = world.root.collector.accounts[2]
    assert account.late == 6 and account.requeued == 4 * 4 and account.discarded == 4 * 2


def test_what_is_late_after_the_end_is_not_tried_again():
    world = World(workers([[1.0], [1.0], [7.5]], samples=4), BackupWorkers(1), late=Retry(2))
    world.serve(5)
    farewell(world.root, grace_s=50.0, stopped_grace_s=3.0)
    account = world.root.collector.accounts[2]
    assert (account.late, account.requeued, account.discarded) == (1, 0, 4)
