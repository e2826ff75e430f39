"""The pool of batches: each is used once an epoch, whatever workers do with what they claim."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpisync.aggregation.sample_pool import BatchId, ReplayedPool, SamplePool


def drain(pool, worker=0):
    """Claim and use what is left; what that was."""
    lots = []
    while (lot := pool.claim(worker)) is not None:
        taken = pool.take(worker, 1)
        if not pool.is_used(taken):
            pool.use(taken)
            lots.append(lot)
    return lots


def resumed(batches, epochs, pool):
    """Another pool, which goes on where `pool` is."""
    other = SamplePool(batches, epochs)
    other.load(json.loads(json.dumps(pool.state())))
    return other


def test_a_lone_worker_gets_every_batch_of_every_epoch_in_order():
    pool = SamplePool(batches=3, epochs=2)
    assert pool.remaining == 6
    assert drain(pool) == [BatchId(epoch, batch) for epoch in range(2) for batch in range(3)]
    assert pool.remaining == 0


def test_without_a_number_of_epochs_there_is_no_end():
    pool = SamplePool(batches=2)
    assert [pool.claim(0) for _ in range(5)][-1] == BatchId(2, 0)
    assert pool.remaining is None


def test_what_is_given_back_is_claimed_before_anything_fresh():
    pool = SamplePool(batches=4, epochs=1)
    pool.claim(0)
    pool.give_back(0, pool.take(0, 1))
    assert pool.claim(1) == BatchId(0, 0)
    assert pool.remaining == 4


def test_a_worker_that_is_behind_has_its_batch_given_to_one_other():
    pool = SamplePool(batches=9, epochs=1)
    slow = [pool.claim(0), pool.claim(0)]  # the second was fetched ahead
    assert pool.claim(1, behind=[0]) == slow[0]
    assert pool.claim(2, behind=[0]) == BatchId(0, 2), "once is enough, and what it has not begun stays its own"
    pool.use(pool.take(1, 1))
    assert pool.is_used(pool.take(0, 1)), "the slow one's gradient counts no more"
    assert pool.claim(1, behind=[0]) == slow[1], "now it computes on that"
    assert pool.claim(0, behind=[0]) == BatchId(0, 3), "nobody takes over from itself"


def test_at_the_end_whoever_is_idle_gets_what_others_have_and_the_first_counts():
    pool = SamplePool(batches=2, epochs=1)
    assert [pool.claim(0), pool.claim(1)] == [BatchId(0, 0), BatchId(0, 1)]
    assert pool.claim(2) == BatchId(0, 0)
    assert pool.claim(3) == BatchId(0, 1), "the one that fewer have"
    first = pool.take(3, 1)
    pool.use(first)
    assert pool.is_used(pool.take(1, 1)) and not pool.is_used(pool.take(0, 1))
    assert pool.claim(0) is None, "its own is the only one left: it would wait for itself"


def test_what_one_of_two_gives_back_stays_with_the_other():
    pool = SamplePool(batches=1, epochs=1)
    pool.claim(0)
    pool.claim(1)
    pool.give_back(0, pool.take(0, 1))
    assert pool.state() == {"batches": 1, "fresh": [1, 0], "returned": [[0, 0]]}
    pool.leave(1)
    assert drain(pool) == [BatchId(0, 0)]


def test_what_is_given_up_does_not_come_back():
    pool = SamplePool(batches=2, epochs=1)
    pool.claim(0)
    pool.give_up(0, pool.take(0, 1))
    assert drain(pool) == [BatchId(0, 1)] and pool.remaining == 0


def test_a_checkpoint_has_what_was_accepted_into_a_step_that_is_still_open():
    pool = SamplePool(batches=1, epochs=1)
    pool.claim(0)
    lots = pool.take(0, 1)
    pool.use(lots)
    assert pool.remaining == 0 and resumed(1, 1, pool).remaining == 1, "its step may never close"
    pool.settle(lots)
    assert resumed(1, 1, pool).remaining == 0


def test_the_place_in_other_batches_is_refused():
    with pytest.raises(ValueError, match="had 4 batches an epoch and this one has 2"):
        resumed(2, 1, SamplePool(4, 1))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(2, 4), st.data())
def test_every_batch_is_used_once_whatever_happens_and_from_any_state(batches, epochs, workers, data):
    pool, used, held = SamplePool(batches, epochs), [], {w: [] for w in range(workers)}
    for _ in range(data.draw(st.integers(0, 60), "events")):
        worker = data.draw(st.integers(0, workers - 1), "worker")
        what = data.draw(st.sampled_from(["claim", "claim", "use", "late", "leave", "restart"]), "what")
        if what == "claim":
            behind = data.draw(st.lists(st.integers(0, workers - 1), unique=True), "behind")
            lot = pool.claim(worker, behind)
            held[worker] += [] if lot is None else [lot]
        elif what in ("use", "late") and held[worker]:
            count = data.draw(st.integers(1, len(held[worker])), "count")
            lots = pool.take(worker, count)
            assert lots == held[worker][:count]
            del held[worker][:count]
            if what == "use" and not pool.is_used(lots):
                pool.use(lots)
                pool.settle(lots)
                used += lots
            else:
                pool.give_back(worker, lots)
        elif what == "leave":
            pool.leave(worker)
            held[worker].clear()
        elif what == "restart":
            pool = resumed(batches, epochs, pool)
            held = {w: [] for w in range(workers)}
        assert pool.remaining == batches * epochs - len(used)
    for worker in range(workers):
        pool.leave(worker)
    used += drain(pool)
    assert sorted(used) == [BatchId(epoch, batch) for epoch in range(epochs) for batch in range(batches)]


def test_a_record_is_dealt_again_and_a_loop_that_draws_otherwise_is_refused():
    script = ReplayedPool(4, [[[BatchId(0, 2), BatchId(0, 0)], [BatchId(1, 1)]], []])
    assert [script.claim(0) for _ in range(4)] == [BatchId(0, 2), BatchId(0, 0), BatchId(1, 1), None]
    assert script.take(0, 2) == [BatchId(0, 2), BatchId(0, 0)]
    with pytest.raises(RuntimeError, match=r"comes from 2 batches and is recorded\s+with 1"):
        script.take(0, 2)
