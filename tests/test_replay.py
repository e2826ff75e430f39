"""Replay: any run can be played again, whatever the delays; what no run can record is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from playing import Deadlock, cycling, opened, play, recorded, steady

from mpisync.policies import Adaptive, Arrival, Async, BackupWorkers, Deadline, Decision, OpenStep, Replay
from mpisync.records import ArrivalRecord, RecordWriter, RunHeader, StepRecord

WORKERS = 4

delays = st.lists(
    st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=WORKERS, max_size=WORKERS
)


def replayed(records, table, **options):
    """The accepted lists of a replay with other delays."""
    policy = Replay(records)
    again = play(policy, cycling(table), workers=WORKERS, steps=policy.steps, **options)
    return [record.accepted for record in again]


recordable = st.one_of(
    st.builds(BackupWorkers, st.integers(0, WORKERS - 1)),
    st.builds(Async, st.integers(1, 6), st.sampled_from([None, 1, 2, 5])),
    st.builds(Async, st.integers(1, WORKERS), st.just(0)),
    st.builds(Deadline, st.integers(1, 9), st.integers(1, WORKERS), st.integers(0, 3)),
    st.builds(Deadline, st.integers(1, 9), mads=st.integers(0, 5)),
    st.builds(Adaptive, st.integers(1, WORKERS), noise_scale=st.sampled_from([None, 0.0, 3.0])),
)
poisoned = st.sets(st.tuples(st.integers(0, WORKERS - 1), st.integers(0, 8)), max_size=6)


@settings(max_examples=300, deadline=None)
@given(
    policy=recordable,
    first=delays,
    second=delays,
    rejected=poisoned,
    steps=st.integers(1, 20),
    eager=st.booleans(),
    bare=st.booleans(),
)
def test_a_replay_accepts_what_was_recorded_whatever_the_delays(
    policy, first, second, rejected, steps, eager, bare
):
    options = {"rejected": rejected, "eager": eager}
    records = play(policy, cycling(first), workers=WORKERS, steps=steps, **options)
    accepted = [record.accepted for record in records]
    if bare:  # as a simulation may leave it: without what did not count
        records = recorded(*accepted)
    assert replayed(records, second, **options) == accepted


@settings(max_examples=100, deadline=None)
@given(policy=recordable, first=delays, second=delays)
def test_a_replay_of_a_replay_is_the_replay(policy, first, second):
    records = play(policy, cycling(first), workers=WORKERS, steps=8)
    replay = Replay(records)
    again = play(replay, cycling(second), workers=WORKERS, steps=8)
    assert replayed(again, first) == [one.accepted for one in records]


def test_a_replay_tells_its_end_and_nothing_beyond():
    replay = Replay(recorded([(0, 0, 0)], [(1, 0, 0)]))
    assert replay.steps == 2
    for ask in (
        lambda step: replay.judge(Arrival(0, 1, 2, 0.0), step),
        lambda step: replay.closes(step, 0.0),
        replay.target,
    ):
        with pytest.raises(ValueError, match="steps 0 to 1, but step 2 .* end at version 2"):
            ask(opened(2, step=2))


def test_a_record_may_begin_at_a_later_step():
    steps = recorded([(0, 0, 0)], [(0, 1, 1)], [(1, 2, 2)])[1:]
    replay = Replay(steps)
    assert replay.steps == 3
    assert replay.judge(Arrival(0, 1, 1, 0.0), opened(2, step=1)) is Decision.ACCEPT
    with pytest.raises(ValueError, match="begin at version 1"):
        replay.target(opened(2, step=0))


def test_a_replay_has_the_recorded_n_of_each_step():
    replay = Replay(recorded([(0, 0, 0), (1, 0, 0)], [(0, 1, 1)]))
    assert [replay.target(opened(2, step=step)) for step in (0, 1)] == [2, 1]


def test_a_replayed_gradient_of_another_version_stops_the_run():
    replay = Replay(recorded([(0, 0, 0)], [(1, 0, 0)]))
    with pytest.raises(RuntimeError, match="worker 1's gradient 0 .* version 1, .* recorded at 0"):
        replay.judge(Arrival(1, 0, 1, 0.0), opened(2, step=1))


@pytest.mark.parametrize(
    ("lists", "staleness"),
    [
        ([[(0, 0, 0), (1, 0, 0)], [(0, 1, 1)]], 0),
        ([[(0, 0, 0)], [(1, 0, 0)], [(0, 1, 1)]], 1),
        ([[(0, 0, 0)], [(0, 1, 1)], [(1, 0, 0)]], 2),
        ([[(0, 0, 0), (0, 1, 0)]], 1),  # resumed before the step closed
    ],
)
def test_a_replay_is_as_stale_as_its_record(lists, staleness):
    assert Replay(recorded(*lists)).staleness == staleness


def test_a_replayed_worker_resumes_at_the_recorded_version():
    late = play(BackupWorkers(1), steady(1, 1, 3.5), workers=3, steps=8)
    replay = Replay(late)
    starts = {(one.worker, one.sequence): one.version for step in late for one in step.arrivals}
    for (worker, sequence), version in starts.items():
        assert replay.resumes_at(worker, sequence, newest=0) == version
    assert replay.resumes_at(0, 4, newest=9) == 4, "it counts: it is computed there, or nowhere"
    assert replay.resumes_at(2, 1, newest=5) == 5, "late: version 3 may be gone"


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([[(0, 0, 0)], [(0, 0, 0)]], "gets one verdict, but worker 0's gradient 0 .* in step 1"),
        ([[(0, 0, 0), (0, 0, 0)]], "gets one verdict"),
        ([[(0, 0, 1)]], "version must be from 0 to its step"),
        ([[(0, -1, 0)]], "sequence not negative"),
        ([[(-1, 0, 0)]], "workers are numbered 0 to"),
        ([[(0, 0, 0)], [(0, 1, 1)], [(0, 2, 0)]], "worker 0's gradient 2, computed at version 0"),
        (
            [[(1, 0, 0)], [(1, 1, 1)], [(0, 0, 0)], [(0, 1, 1)]],
            "worker 0's gradient 1, .* version 1",
        ),
        ([[(0, 1, 0), (0, 0, 0)]], "worker 0's gradient 1, .* before its earlier ones were done"),
        ([[(1, 0, 0)], [(0, 1, 0), (0, 0, 0)]], "follow one another"),
        ([], "must hold a step"),
    ],
)
def test_what_no_run_can_have_recorded_is_refused(lists, message):
    with pytest.raises(ValueError, match=message):
        Replay(recorded(*lists))


def test_a_worker_that_went_back_in_time_is_refused_though_it_was_late():
    steps = recorded([(1, 0, 0)], [(1, 1, 1)], [(0, 1, 0)])
    steps[1].arrivals.append(ArrivalRecord(0, 0, 1, "late", 0.0, late_by=1))
    with pytest.raises(ValueError, match="worker 0's gradient 1, computed at version 0"):
        Replay(steps)


def test_an_arrival_that_its_steps_list_has_at_another_version_is_refused():
    steps = recorded([(1, 0, 0)], [(0, 0, 0)])
    steps[1].arrivals.append(ArrivalRecord(0, 0, 1, "accepted", 0.0))
    with pytest.raises(ValueError, match="gradient 0 of version 1 is not in step 1's"):
        Replay(steps)


def test_what_no_step_accepted_is_late_when_its_version_is_past():
    """Worker 1 counts never again, and is told nevertheless."""
    replay = Replay(recorded([(1, 0, 0)], [(0, 0, 1)], [(0, 1, 2)]))
    arrival = Arrival(1, 1, 1, 0.0)
    assert replay.judge(arrival, opened(2, step=1)) is Decision.HOLD
    assert replay.judge(arrival, opened(2, step=2)) is Decision.LATE


def test_steps_that_are_not_consecutive_are_refused():
    steps = recorded([(0, 0, 0)], [(0, 1, 1)], [(0, 2, 2)])
    with pytest.raises(ValueError, match="step 2 comes where step 1 is due"):
        Replay([steps[0], steps[2]])


def test_the_player_sees_a_deadlock():
    """Else the tests above that rely on it would prove nothing."""
    steps = recorded([(0, 0, 0)], [(1, 0, 0)])
    with pytest.raises(Deadlock):
        play(Replay(steps), steady(1, 9), workers=2, steps=2, deaths={1: 5.0})


@pytest.mark.parametrize("on_late", ["carry", "discard"])
def test_where_late_gradients_are_carried_they_are_computed_where_they_were(on_late, tmp_path):
    path = tmp_path / "record.jsonl"
    with RecordWriter(path) as writer:
        writer.header(RunHeader("backup:1", 2, 0, 0.0, "1", ["a", "a"], {"on_late": on_late}))
        for step, accepted, late in ((0, (1, 0, 0), None), (1, (1, 1, 1), (0, 0, 0)), (2, (0, 1, 2), (1, 2, 2))):
            verdicts = [(accepted, "accepted")] + ([(late, "late")] if late else [])
            arrivals = [ArrivalRecord(*gradient, verdict, 0.1) for gradient, verdict in verdicts]
            writer.step(StepRecord(step, step, step + 0.5, step + 0.6, 1, 2, [accepted], arrivals))
    policy, carries = Replay(path), on_late == "carry"
    step = OpenStep(step=0, opened_s=0.0, workers=2, alive={0, 1}, accepted=[Arrival(1, 0, 0, 0.1)])
    assert policy.closes(step, 1.0) == (not carries), "a slow worker may not have begun it yet"
    step.held.append(Arrival(0, 0, 0, 0.2))
    assert policy.closes(step, 1.0)
    assert policy.resumes_at(0, 0, newest=5) == (0 if carries else 5)
