"""The root aggregator against invariants I1-I5 and I10, with scripted workers and virtual time.

Every step of every test here is also held against `scripted.World.check_step`: its mean is, bit for
bit, the strict left fold of the gradients that its record lists, divided by their number.
"""

import math
from collections import Counter

import numpy as np
import pytest
from playing import cycling
from scripted import ScriptedWorker, Stuck, World, value_of

from mpisync.aggregation.errors import PeerFailed
from mpisync.aggregation.loops import serve_loop
from mpisync.aggregation.members import State
from mpisync.aggregation.shutdown import ENDED, farewell
from mpisync.policies import Async, BackupWorkers, Deadline, Replay
from mpisync.transport.wire import Kind, Status


def workers(*delays, **options):
    """Workers that take so many seconds each, or cycle through a list of them."""
    table = [delay if isinstance(delay, list) else [delay] for delay in delays]
    delay = cycling(table)
    return [
        ScriptedWorker(number, lambda sequence, number=number: delay(number, sequence), **options)
        for number in range(len(table))
    ]


def random_delays(seed, count, low=0.5, high=2.0):
    rng = np.random.default_rng(seed)
    return [rng.uniform(low, high, 17).tolist() for _ in range(count)]


TRANSPORTS = {"slots": (), "pieces": (0, 1, 2, 3), "both": (1, 3)}


@pytest.fixture(params=TRANSPORTS.values(), ids=TRANSPORTS)
def pieces(request):
    return request.param


# -- I1, I2, I5: what an update is -----------------------------------------------------------------


@pytest.mark.parametrize("backup", [0, 1, 3])
def test_an_update_is_the_mean_of_n_gradients_of_its_version(backup, pieces):
    world = World(workers(*random_delays(1, 4)), BackupWorkers(backup), pieces=pieces, extras=True)
    records = world.serve(50)
    assert len(records) == 50
    for record in records:
        assert len(record.accepted) == record.target == 4 - backup
        assert record.alive == 4
    late = [a for r in records for a in r.arrivals if a.verdict == "late"]
    assert bool(late) == (backup > 0)
    assert all(a.late_by >= 1 for a in late)
    orders = {tuple(w for w, *_ in r.accepted) for r in records}
    assert len(orders) > 1, "the order must have mattered"


def test_gradients_are_weighted_by_samples_where_that_is_asked_for():
    many = workers(1.0, 1.5, 2.0)
    for worker, samples in zip(many, (1, 5, 7), strict=True):
        worker.samples = samples
    world = World(many, BackupWorkers(1), weighted=True)
    records = world.serve(10)
    assert {r.samples_used for r in records} == {6}


def test_the_fold_follows_acceptance_bit_for_bit():
    reversed_delays = workers(3.0, 2.0, 1.0)
    world = World(reversed_delays, BackupWorkers(0))
    (record,) = world.serve(1)
    assert [w for w, *_ in record.accepted] == [2, 1, 0]
    values = [value_of(w, 0) for w in (0, 1, 2)]
    in_rank_order = ((values[0] + values[1]) + values[2]) / np.float32(3)
    assert not np.array_equal(world.steps[0][1], in_rank_order)


def test_folding_early_changes_no_bit():
    # so far apart that each gradient is folded by itself, and so close that none is
    apart = World(workers(1.0, 2.0, 3.0, 4.0), BackupWorkers(0))
    close = World(workers(1.0, 1.0 + 1e-9, 1.0 + 2e-9, 1.0 + 3e-9), BackupWorkers(0))
    for world in (apart, close):
        world.serve(3)
    for (_, a), (_, b) in zip(apart.steps, close.steps, strict=True):
        np.testing.assert_array_equal(a, b)


# -- I3: verdicts ----------------------------------------------------------------------------------


def test_every_gradient_gets_one_verdict_and_the_record_agrees(pieces):
    world = World(workers(*random_delays(2, 4)), BackupWorkers(2), pieces=pieces)
    records = world.serve(60)
    recorded = {(a.worker, a.sequence): a for r in records for a in r.arrivals}
    assert len(recorded) == sum(len(r.arrivals) for r in records)
    told = {(w.number, s): reply for w in world.workers for s, reply in w.verdicts.items()}
    last = {key for key in told if key not in recorded}
    assert all(told[key].step == 60 for key in last), "judged in a step that never closed"
    for key, arrival in recorded.items():
        reply = told[key]
        assert Status(reply.status).name.lower() == arrival.verdict
        assert reply.late_by == arrival.late_by
        if arrival.verdict == "late":
            assert reply.late_by == reply.step - arrival.version


def test_late_is_judged_before_not_finite():
    many = workers(1.0, 1.0, 1.5)
    many[2].poisonous = lambda sequence: True
    world = World(many, BackupWorkers(1))
    world.serve(6)
    verdicts = list(world.workers[2].verdicts.values())
    assert {v.status for v in verdicts} == {Status.LATE}


def test_a_gradient_with_nan_is_rejected_and_training_goes_on():
    many = workers(1.0, 1.0, 0.5)
    many[2].poisonous = lambda sequence: sequence % 2 == 0
    world = World(many, BackupWorkers(0))
    records = world.serve(6)
    rejected = [a for r in records for a in r.arrivals if a.verdict == "rejected"]
    assert len(rejected) == 6 and all("NaN" in a.reason for a in rejected)
    assert all(len(r.accepted) == 3 for r in records)


def test_rejections_only_end_in_a_failure_that_reaches_everyone():
    world = World(workers(1.0, 2.0, poisonous=lambda sequence: True), BackupWorkers(0))
    with pytest.raises(PeerFailed, match="the last 40 gradients all had NaN or Inf.*version 0"):
        world.serve(5)
    told = sum(len(w.verdicts) for w in world.workers)
    assert told == 40
    assert all("NaN" in link.ends[0].failure for link in world.links)


def test_one_accepted_gradient_forgives_the_rejected_ones():
    many = workers(0.1, 3.0)
    many[0].poisonous = lambda sequence: sequence % 30 != 29
    world = World(many, BackupWorkers(0))
    assert len(world.serve(4)) == 4


# -- I4: first means first -------------------------------------------------------------------------


def test_a_header_only_reserves_a_stalled_sender_is_replaced():
    many = workers(1.0, 1.1, 1.2, 1.3)
    many[0].transit = lambda sequence: math.inf
    many[1].transit = many[2].transit = many[3].transit = lambda sequence: 0.1
    world = World(many, BackupWorkers(2), pieces=(0, 1, 2, 3))
    records = world.serve(3)
    assert [w for w, *_ in records[0].accepted] == [1, 2]
    assert records[0].closed_s - records[0].opened_s < 2.0


def test_with_memory_for_two_both_of_which_stall_the_next_ones_count():
    many = workers(1.0, 1.1, 1.2, 1.3)
    many[0].transit = many[1].transit = lambda sequence: math.inf
    many[2].transit = many[3].transit = lambda sequence: 0.1
    world = World(many, BackupWorkers(2), pieces=(0, 1, 2, 3), capacity=2)
    records = world.serve(3)
    assert [{w for w, *_ in r.accepted} for r in records[:1]] == [{2, 3}]
    assert records[0].closed_s - records[0].opened_s < 1.3 + 0.5 + 0.5
    assert world.links[0].fetcher.most_asked <= 2


def test_a_stalled_sender_that_comes_back_counts_when_it_is_whole():
    many = workers(1.0, 5.0, 1.2)
    many[0].transit = lambda sequence: 3.0
    many[2].transit = lambda sequence: 0.2
    world = World(many, BackupWorkers(1), pieces=(0, 1, 2))
    (record,) = world.serve(1)
    assert [w for w, *_ in record.accepted] == [2, 0]
    arrival = next(a for a in record.arrivals if a.worker == 0)
    assert arrival.offset_s == pytest.approx(4.0, abs=0.3), "when it was whole, not its header's time"


def test_a_sender_that_dies_in_mid_payload_gives_its_memory_back():
    many = workers(1.0, 1.1, 1.2, 1.3)
    for worker in many:
        worker.transit = lambda sequence: 0.3
    world = World(many, BackupWorkers(2), pieces=(0, 1, 2, 3), capacity=2)
    world.at(101.2, lambda: world.kill(0))
    world.at(101.2, lambda: world.kill(1))
    records = world.serve(4)
    assert all({w for w, *_ in r.accepted} == {2, 3} for r in records)


def test_dead_senders_that_were_accepted_give_their_memory_back():
    many = workers(1.0, 1.1, 3.0, 3.1)
    world = World(many, BackupWorkers(1), pieces=(0, 1, 2, 3), capacity=2)
    world.at(101.5, lambda: world.kill(0))
    world.at(101.5, lambda: world.kill(1))
    records = world.serve(4)
    assert [w for w, *_ in records[0].accepted] == [0, 1, 2], "what was accepted is used"
    assert not world.links[0].fetcher.asked.keys() & {0, 1}


def test_order_is_by_time_of_completion_not_by_rank():
    # the root sleeps so long that it sees all headers in one poll
    world = World(workers(1.3, 1.1, 1.4, 1.2), BackupWorkers(0))
    world.sleep = _oversleeping(world)
    (record,) = world.serve(1)
    assert [w for w, *_ in record.accepted] == [1, 3, 0, 2]
    assert not any(a.tie for a in record.arrivals)


def _oversleeping(world):
    """Sleeps that end only when everything planned has happened."""
    sleep = world.sleep

    def sleep_long(timeout_s):
        sleep(timeout_s)
        while world._events:
            sleep(10.0)

    return sleep_long


def test_equal_times_are_decided_by_lot_and_recorded_as_ties():
    world = World(workers(1.0, 1.0, 1.0), BackupWorkers(1))
    wins = Counter()
    for record in world.serve(400):
        assert all(a.tie for a in record.arrivals if a.verdict == "accepted")
        wins.update(w for w, *_ in record.accepted)
    assert sum(wins.values()) == 800
    # the loser of a step is late by one and sits out the next, which the other two share
    assert all(abs(count - 800 / 3) < 60 for count in wins.values()), wins


def test_payloads_that_become_whole_together_are_decided_by_lot():
    world = World(workers(1.0, 1.1, 1.2, 1.3), BackupWorkers(0), pieces=(0, 1, 2, 3), capacity=4)
    world.sleep = _oversleeping(world)
    firsts = Counter(r.accepted[0][0] for r in world.serve(400))
    assert all(abs(firsts[worker] - 100) < 40 for worker in range(4)), firsts
    assert all(a.tie for r in world.records for a in r.arrivals)


def test_those_who_wait_for_the_next_step_are_taken_by_time_then_by_lot():
    # all four become whole at once: one is taken, and three wait, each step taking one of them
    world = World(workers(1.0, 1.0, 1.0, 1.0), Async(1), pieces=(0, 1, 2, 3), capacity=4)
    order = [r.accepted[0][0] for r in world.serve(400)]
    rounds = [order[i : i + 4] for i in range(0, 400, 4)]
    assert all(sorted(one) == [0, 1, 2, 3] for one in rounds)
    rising = sum(second < third for _, second, third, _ in rounds)
    assert 25 < rising < 75


def test_a_slow_worker_delays_nothing():
    world = World(workers(1.0, 1.0, 50.0), BackupWorkers(1))
    records = world.serve(20)
    assert records[-1].published_s - records[0].opened_s == pytest.approx(20.0, abs=0.1)
    assert all(2 not in {w for w, *_ in r.accepted} for r in records)


# -- I10: samples ----------------------------------------------------------------------------------


def check_all_settled(world):
    world.check_accounts()
    for member in world.root.roster.members:
        assert world.root.collector.accounts[member.worker].in_flight == 0, member


def say_farewell(world, **options):
    left = farewell(world.root, **{"grace_s": 30.0, "stopped_grace_s": 3.0, **options})
    world.root.roster.close()
    return left


@pytest.mark.parametrize("policy", [BackupWorkers(1), Async(3), Deadline(1.4)])
@pytest.mark.parametrize("stops", [False, True])
def test_samples_are_accounted_for_to_the_last(policy, pieces, stops):
    world = World(workers(*random_delays(3, 4), samples=3), policy, pieces=pieces)
    if stops:
        world.at(110.3, world.root.stop)
    world.serve(None if stops else 25)
    assert say_farewell(world) == []
    check_all_settled(world)
    assert all(m.state is State.GONE for m in world.root.roster.members)


def test_a_lost_workers_accepted_samples_are_used_not_lost():
    many = workers(1.0, 2.0, 3.0, samples=5)
    world = World(many, BackupWorkers(1))
    world.at(101.1, lambda: world.kill(0))
    world.serve(3)
    account = world.root.collector.accounts[0]
    assert (account.handed, account.used, account.lost, account.in_flight) == (5, 5, 0, 0)


def test_a_worker_lost_with_its_gradient_under_way_loses_those_samples():
    many = workers(1.0, 2.0, 3.0, samples=5)
    many[0].transit = lambda sequence: math.inf
    world = World(many, BackupWorkers(1), pieces=(0,))
    world.at(101.3, lambda: world.kill(0))
    world.serve(3)
    account = world.root.collector.accounts[0]
    assert (account.handed, account.used, account.lost, account.in_flight) == (5, 0, 5, 0)


def test_the_death_of_the_last_worker_is_an_error():
    world = World(workers(1.0, 1.0), BackupWorkers(1))
    world.at(103.5, lambda: world.kill(0))
    world.at(103.5, lambda: world.kill(1))
    with pytest.raises(PeerFailed, match="no worker is left"):
        world.serve(50)


def test_n_shrinks_to_the_living():
    world = World(workers(1.0, 1.1, 1.2, 1.3), BackupWorkers(1))
    world.at(103.0, lambda: world.kill(0))
    world.at(103.0, lambda: world.kill(1))
    records = world.serve(10)
    assert [r.target for r in records[:2]] == [3, 3]
    assert records[-1].target == records[-1].alive == 2


# -- workers that leave, stop or fail --------------------------------------------------------------


def test_a_worker_that_left_shrinks_n():
    many = workers(1.0, 1.1, 1.2)
    many[2].last = 3
    world = World(many, BackupWorkers(0))
    records = world.serve(8)
    assert [len(r.accepted) for r in records] == [3, 3, 3, 2, 2, 2, 2, 2]
    assert say_farewell(world) == []


def test_training_ends_when_all_have_left():
    world = World(workers(1.0, 1.1, last=4), BackupWorkers(0))
    assert len(world.serve(None)) == 4
    assert say_farewell(world) == []


def test_a_worker_can_stop_the_training_and_so_can_the_root():
    many = workers(1.0, 1.1, 1.2)
    many[0].last, many[0].farewell = 3, Kind.STOP
    by_worker = World(many, BackupWorkers(0))
    assert len(by_worker.serve(None)) == 3
    by_root = World(workers(1.0, 1.1), BackupWorkers(0))
    stop = {4: by_root.root.stop}
    assert len(by_root.serve(None, lambda c, r: stop.get(c.step, int)())) == 5
    for world in (by_worker, by_root):
        assert say_farewell(world) == []
        check_all_settled(world)


def test_a_worker_that_fails_fails_everyone_and_its_goodbye_is_not_lost():
    world = World(workers(1.0, 1.1), BackupWorkers(0))

    def fail():
        world.workers[0].dead = True  # it sends nothing more
        world.say(world.workers[0], Kind.FAIL)
        world.say(world.workers[0], Kind.BYE)

    world.at(102.5, fail)
    with pytest.raises(PeerFailed, match="rank 0"):
        world.serve(9)
    began_s = world.now_s
    assert say_farewell(world, failure="rank 0 failed") == []
    assert world.now_s - began_s < 3.0


def test_a_worker_that_says_goodbye_in_mid_payload_is_out_of_the_way():
    many = workers(1.0, 1.1, 1.2)
    many[0].transit = lambda sequence: 5.0
    world = World(many, BackupWorkers(0), pieces=(0, 1, 2), capacity=2)

    def leave():
        many[0].dead = True  # it sends nothing more
        world.say(many[0], Kind.BYE)

    world.at(101.3, leave)
    records = world.serve(5)
    assert all({w for w, *_ in r.accepted} == {1, 2} for r in records)
    assert world.root.roster.members[0].state is State.GONE


# -- the end ---------------------------------------------------------------------------------------


def test_farewell_gives_each_worker_a_verdict_the_parameters_and_its_leave():
    # at the end 0 was accepted, 1 computes, 2 is on its way, 3 is announced, 4 has left
    many = workers(1.0, 9.0, 1.1, 1.2, 0.1, samples=2)
    many[2].transit = many[3].transit = lambda sequence: 60.0
    many[4].last = 0
    world = World(many, BackupWorkers(0), pieces=(2, 3), capacity=1)
    world.at(101.5, world.root.stop)
    world.serve(None)
    states = [m.state for m in world.root.roster.members]
    assert states == [
        State.ACCEPTED, State.COMPUTING, State.WANTED, State.ANNOUNCED, State.LEFT,
    ]  # fmt: skip
    assert say_farewell(world) == []
    for worker in (0, 1, 2, 3):
        (verdict,) = many[worker].verdicts.values()
        assert verdict.status == Status.LATE and verdict.text == ENDED
    assert all(m.state is State.GONE for m in world.root.roster.members)
    assert all(link.closed and len(link.ends) == 1 for link in world.links)
    check_all_settled(world)


def test_farewell_names_those_who_never_come_and_counts_the_dead():
    world = World(workers(1.0, 50.0, math.inf, samples=2), BackupWorkers(2))
    world.serve(5)
    world.at(world.now_s + 1.0, lambda: world.kill(1))
    began_s = world.now_s
    left = say_farewell(world, grace_s=10.0)
    assert [m.worker for m in left] == [2]
    assert world.now_s - began_s == pytest.approx(10.0, abs=2.0)
    assert world.root.roster.members[1].state is State.LOST
    check_all_settled(world)


def test_a_worker_that_computes_past_the_end_is_waited_for():
    world = World(workers(1.0, 1.0, 8.0), BackupWorkers(1))
    world.serve(3)
    assert say_farewell(world) == []
    (verdict,) = world.workers[2].verdicts.values()
    assert verdict.late_by == 3 and verdict.status == Status.LATE


def test_serving_needs_every_step_published_once():
    world = World(workers(1.0, 1.0), BackupWorkers(0))
    serving = world.root.serve(3)
    closed = next(serving)
    with pytest.raises(RuntimeError, match="step 0 was closed but not published"):
        next(serving)
    closed.publish()
    with pytest.raises(RuntimeError, match="published already"):
        closed.publish()


# -- other policies --------------------------------------------------------------------------------


def test_deadline_takes_all_in_time_and_waits_for_its_quorum_and_grace():
    in_time = World(workers(0.5, 0.8, 3.0), Deadline(1.0))
    for record in in_time.serve(5):
        assert record.closed_s - record.opened_s == pytest.approx(1.0, abs=0.01)
        assert {w for w, *_ in record.accepted} == {0, 1}
    quorum = World(workers(0.5, 2.0, 2.2, 9.0), Deadline(1.0, at_least=2, grace=0.3))
    record = quorum.serve(1)[0]
    assert [w for w, *_ in record.accepted] == [0, 1, 2]
    assert record.closed_s - record.opened_s == pytest.approx(2.3, abs=0.01)
    everyone = World(workers(0.2, 0.3, 0.4), Deadline(1.0))
    assert everyone.serve(1)[0].closed_s == pytest.approx(100.4, abs=0.01)


def test_async_answers_at_once_and_a_fast_worker_gives_several():
    world = World(workers(0.3, 1.0), Async(4))
    records = world.serve(6)
    assert all(len(r.accepted) == 4 for r in records)
    assert max(Counter(w for w, *_ in r.accepted)[0] for r in records) >= 3
    assert any(v < r.step for r in records for *_, v in r.accepted), "stale ones count"


def test_async_answers_at_once_also_when_memory_was_short():
    world = World(workers(1.0, 1.0, 1.0), Async(9), pieces=(0, 1, 2), capacity=2)
    (record,) = world.serve(1)
    assert Counter(w for w, *_ in record.accepted) == {0: 3, 1: 3, 2: 3}


def test_async_refuses_what_is_too_old():
    world = World(workers(0.4, 0.4, 5.0), Async(1, max_staleness=2))
    records = world.serve(30)
    assert all(r.step - v <= 2 for r in records for *_, v in r.accepted)
    late = [a for r in records for a in r.arrivals if a.verdict == "late"]
    assert late and all(a.worker == 2 and a.late_by > 2 for a in late)


@pytest.mark.parametrize("policy", [BackupWorkers(1), Async(3), Async(1, max_staleness=2), Deadline(1.2)], ids=str)
def test_a_replay_accepts_the_same_lists_and_makes_the_same_parameters(policy, pieces):
    first = World(workers(*random_delays(4, 4)), policy, pieces=pieces)
    first.serve(30)
    again = World(workers(*random_delays(5, 4)), Replay(first.records), pieces=pieces)
    again.serve(None)
    assert [r.accepted for r in again.records] == [r.accepted for r in first.records]
    np.testing.assert_array_equal(again.parameters, first.parameters)
    assert say_farewell(again) == []


def test_a_world_that_cannot_go_on_says_so():
    world = World(workers(1.0, math.inf), BackupWorkers(0))
    with pytest.raises(Stuck):
        world.serve(1)


# -- several loops ---------------------------------------------------------------------------------


def test_a_gradient_of_a_loop_that_is_over_is_late_and_its_worker_is_sent_nothing(pieces):
    """Else it would take the newest version for the one at which its loop ended."""
    world = World(workers(1.0, 1.0, 4.5), BackupWorkers(1), pieces=[number for number in pieces if number < 3])
    slow = world.workers[2]
    world.serve(None, serving=serve_loop(world.root, 3))
    assert world.now_s == 103.0 and not slow.verdicts
    for worker in world.workers[:2]:
        worker.loop, worker.link.paused = 1, False
        world.say(worker, Kind.READY)
    world.serve(None, serving=serve_loop(world.root, 6))
    (verdict,) = slow.verdicts.values()
    assert verdict.text == "the loop has ended" and verdict.late_by == 4 and slow.link.served[2] == 0
    assert world.root.version == 6


def test_who_has_left_a_loop_counts_in_the_next_where_it_asks_for_it():
    world = World(workers(*[[1.0] * 9] * 2), BackupWorkers(0))
    one, other = world.workers
    world.serve(None, serving=serve_loop(world.root, 2))
    other.loop = one.loop = 1
    world.links[0].paused = False
    world.say(one, Kind.READY)
    world.say(other, Kind.READY)

    def leave(closed, record):
        if closed.step == 2:
            other.loop, other.ended = 2, True  # by `break`, and it comes to the next loop already
            world.say(other, Kind.READY)

    world.serve(None, leave, serving=serve_loop(world.root, 4))
    assert world.root.version == 4 and world.root.roster.living == {0}
    world.root.go_on()
    assert world.root.roster.living == {0, 1}
