"""The contract of the policies, played in virtual time (see playing.py), and each policy's own."""

import doctest
import importlib
import math
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from playing import cycling, opened, play, recorded, steady

from mpisync.policies import (
    Adaptive,
    Arrival,
    Async,
    BackupWorkers,
    Deadline,
    Decision,
    Replay,
    parse_policy,
)

ACCEPT, HOLD, LATE = Decision.ACCEPT, Decision.HOLD, Decision.LATE


def closings(records):
    return [(record.closed_s, record.accepted) for record in records]


# when steps close and what they accept: policy, delays, [(closed at, accepted)]
SCRIPTS = {
    "full synchronous: all of them, in order of arrival": (
        BackupWorkers(0),
        steady(1.0, 3.0, 2.0),
        [(3.0, [(0, 0, 0), (2, 0, 0), (1, 0, 0)]), (6.0, [(0, 1, 1), (2, 1, 1), (1, 1, 1)])],
    ),
    "backup: the first N by time, whatever their rank": (
        BackupWorkers(1),
        steady(9.0, 2.0, 1.0),
        [(2.0, [(2, 0, 0), (1, 0, 0)]), (4.0, [(2, 1, 1), (1, 1, 1)])],
    ),
    "backup: who was late joins in at the newest version": (
        BackupWorkers(1),
        cycling([[2.0], [4.0], [5.0, 0.5]]),
        [
            (4.0, [(0, 0, 0), (1, 0, 0)]),
            # worker 2's first, of version 0, comes at 5.0 and is late; its second begins at once
            (6.0, [(2, 1, 1), (0, 1, 1)]),
        ],
    ),
    "deadline: those in time": (
        Deadline(2.0),
        steady(1.0, 3.0, 1.5),
        [(2.0, [(0, 0, 0), (2, 0, 0)]), (4.0, [(0, 1, 1), (2, 1, 1)])],
    ),
    "deadline: one that comes on time counts": (
        Deadline(2.0),
        steady(2.0, 3.0, 9.0),
        [(2.0, [(0, 0, 0)])],
    ),
    "deadline: closes early when all are in": (
        Deadline(2.0),
        steady(1.0, 1.25, 1.5),
        [(1.5, [(0, 0, 0), (1, 0, 0), (2, 0, 0)])],
    ),
    "deadline: waits for the quorum": (
        Deadline(2.0, at_least=2),
        steady(1.0, 4.0, 9.0),
        [(4.0, [(0, 0, 0), (1, 0, 0)])],
    ),
    "deadline: gives grace after a late quorum": (
        Deadline(2.0, at_least=2, grace=1.0),
        steady(1.0, 4.0, 9.0),
        [(5.0, [(0, 0, 0), (1, 0, 0)])],
    ),
    "deadline: the last comes within the grace": (
        Deadline(2.0, at_least=2, grace=1.0),
        steady(1.0, 4.0, 4.5),
        [(4.5, [(0, 0, 0), (1, 0, 0), (2, 0, 0)])],
    ),
    "deadline: grace counts from the quorum, not from the last": (
        Deadline(2.0, at_least=1, grace=1.0),
        steady(3.0, 3.5, 9.0),
        [(4.0, [(0, 0, 0), (1, 0, 0)])],
    ),
    "deadline: grace shortens nothing": (
        Deadline(2.0, at_least=1, grace=0.25),
        steady(1.0, 1.75, 9.0),
        [(2.0, [(0, 0, 0), (1, 0, 0)])],
    ),
    "async: one by one": (
        Async(1),
        steady(2.0, 3.0, 7.0),
        [
            (2.0, [(0, 0, 0)]),
            (3.0, [(1, 0, 0)]),
            (4.0, [(0, 1, 1)]),
            (6.0, [(1, 1, 2)]),
            (6.0, [(0, 2, 3)]),
            (7.0, [(2, 0, 0)]),
        ],
    ),
    "softsync: a fast worker gives several, also at one version": (
        Async(3),
        steady(1.0, 5.0, 5.5),
        [(3.0, [(0, 0, 0), (0, 1, 0), (0, 2, 0)]), (5.0, [(0, 3, 1), (1, 0, 0), (0, 4, 1)])],
    ),
    "softsync: k may exceed the number of workers": (
        Async(5),
        steady(1.0, 1.5, 9.0),
        [(3.0, [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 2, 0)])],
    ),
    "async: what passed the cut-off is late": (
        Async(1, max_staleness=1),
        steady(2.0, 5.0, 9.0),
        [
            (2.0, [(0, 0, 0)]),
            (4.0, [(0, 1, 1)]),
            # worker 1's, of version 0, comes at 5.0
            (6.0, [(0, 2, 2)]),
            (8.0, [(0, 3, 3)]),
            # worker 2's, of version 0, comes at 9.0; worker 1's second, of version 2, comes first
            (10.0, [(0, 4, 4)]),
        ],
    ),
    "async: what is at the cut-off counts": (
        Async(1, max_staleness=2),
        steady(2.0, 5.0, 9.0),
        [(2.0, [(0, 0, 0)]), (4.0, [(0, 1, 1)]), (5.0, [(1, 0, 0)])],
    ),
    "async without staleness: one of each worker": (
        Async(2, max_staleness=0),
        steady(1.0, 5.0, 9.0),
        [(5.0, [(0, 0, 0), (1, 0, 0)]), (10.0, [(0, 1, 1), (1, 1, 1)])],
    ),
    "replay: the recorded order, whoever comes first": (
        Replay(recorded([(2, 0, 0), (1, 0, 0)], [(0, 1, 1), (2, 1, 1)])),
        steady(1.0, 2.0, 4.0),
        [(4.0, [(2, 0, 0), (1, 0, 0)]), (8.0, [(0, 1, 1), (2, 1, 1)])],
    ),
    "replay: a step stays open for what a later one needs of its version": (
        Replay(recorded([(0, 0, 0)], [(0, 1, 1)], [(1, 0, 0)])),
        steady(1.0, 5.0, 9.0),
        [(5.0, [(0, 0, 0)]), (6.0, [(0, 1, 1)]), (6.0, [(1, 0, 0)])],
    ),
    "replay: what comes early is held, over steps": (
        Replay(recorded([(0, 0, 0)], [(0, 1, 1)], [(1, 0, 0)])),
        steady(3.0, 1.0, 9.0),
        [(3.0, [(0, 0, 0)]), (6.0, [(0, 1, 1)]), (6.0, [(1, 0, 0)])],
    ),
    "replay: a worker begins at the recorded version, not at an older one": (
        Replay(recorded([(0, 0, 0)], [(0, 1, 1)], [(1, 1, 2)])),
        steady(3.0, 1.0, 9.0),
        # worker 1's first is late at 3.0, its second waits for version 2
        [(3.0, [(0, 0, 0)]), (6.0, [(0, 1, 1)]), (7.0, [(1, 1, 2)])],
    ),
    "replay: late computations hold nobody up": (
        Replay(recorded([(0, 0, 0)], [(0, 1, 1)], [(0, 2, 2)], [(1, 3, 3)])),
        steady(1.0, 4.0, 9.0),
        # worker 1's first three are late at 4.0, 8.0 and 12.0
        [(1.0, [(0, 0, 0)]), (2.0, [(0, 1, 1)]), (3.0, [(0, 2, 2)]), (16.0, [(1, 3, 3)])],
    ),
}


@pytest.mark.parametrize(("policy", "delay", "expected"), SCRIPTS.values(), ids=SCRIPTS.keys())
def test_steps_close_when_they_should_with_what_they_should(policy, delay, expected):
    assert closings(play(policy, delay, workers=3, steps=len(expected))) == expected


# The contract: every policy, any delays.
WORKERS, STEPS = 4, 12
MIXED = cycling([[3, 1, 2], [2, 5], [4, 1, 1, 9], [7, 2]])
SYNC_RECORD = play(BackupWorkers(1), MIXED, workers=WORKERS, steps=STEPS)
ASYNC_RECORD = play(Async(2, max_staleness=3), MIXED, workers=WORKERS, steps=STEPS)

POLICIES = [
    BackupWorkers(0),
    BackupWorkers(2),
    Deadline(2.5),
    Deadline(0.5, at_least=3, grace=1.0),
    Deadline(3.0, at_least=2, mads=1.0),
    Adaptive(),
    Adaptive(at_least=1, at_most=3, noise_scale=2.5),
    Async(1),
    Async(3),
    Async(6, max_staleness=2),
    Async(2, max_staleness=0),
    Replay(SYNC_RECORD),
    Replay(ASYNC_RECORD),
]
every_policy = pytest.mark.parametrize("policy", POLICIES, ids=str)
delays = st.lists(
    st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=WORKERS, max_size=WORKERS
)


@every_policy
@settings(max_examples=25, deadline=None)
@given(table=delays)
def test_contract(policy, table):
    """Each step closes (or play raises Deadlock), on what its policy's invariant allows."""
    records = play(policy, cycling(table), workers=WORKERS, steps=STEPS)
    for step in records:
        workers = [worker for worker, _, _ in step.accepted]
        lags = [step.step - version for _, _, version in step.accepted]
        assert step.accepted, "no update without a gradient"
        assert min(lags) >= 0, "nothing counts before its version"
        if policy.staleness is not None:
            assert max(lags) <= policy.staleness
        if policy.staleness == 0:
            assert len(set(workers)) == len(workers), "one of each worker"
        if isinstance(policy, Deadline):
            assert policy.at_least <= len(workers) <= step.target
        else:
            assert len(workers) == step.target, "exactly N"
        verdicts = {(one.worker, one.sequence): one.verdict for one in step.arrivals}
        assert {one[:2] for one in step.accepted} <= {
            gradient for gradient, verdict in verdicts.items() if verdict == "accepted"
        }
        if not isinstance(policy, Replay):  # there a worker may be behind its record
            assert all(one.late_by > 0 for one in step.arrivals if one.verdict == "late")


class Fickle(BackupWorkers):
    """Breaks what a policy owes its root, in one way."""

    how = ""
    asked = 0

    def judge(self, arrival, step):
        decision = super().judge(arrival, step)
        if self.how == "remembers":
            type(self).asked += 1
            return ACCEPT if self.asked % 2 else HOLD
        if self.how == "writes":
            step.held.append(arrival)
        return HOLD if self.how == "forgives" and step.step > arrival.version + 1 else decision

    def wakes_at(self, step):
        return step.opened_s + 0.5 if self.how == "sleeps on" else math.inf

    def after(self, record):
        return BackupWorkers(record.step % 2) if self.how == "changes its form" else self


@pytest.mark.parametrize("how", ["remembers", "writes", "forgives", "sleeps on", "changes its form"])
def test_the_player_sees_what_a_policy_must_not_do(how):
    kind = type("Fickle", (Fickle,), {"how": how})
    with pytest.raises(AssertionError):
        play(kind(1), steady(1.0, 1.0, 1.5), workers=3, steps=12)


def test_the_records_replayed_here_have_what_they_are_for():
    late = {one.worker for step in SYNC_RECORD for one in step.arrivals if one.verdict == "late"}
    assert late & {worker for step in SYNC_RECORD[6:] for worker, _, _ in step.accepted}
    assert Replay(ASYNC_RECORD).staleness > 1


@every_policy
def test_a_gradient_is_late_only_when_its_version_is_past(policy):
    for worker in range(WORKERS):
        for version in (3, 4):  # of the open step, and newer: never late
            arrival = Arrival(worker, 10**6, version, 0.0)  # a computation that no record has
            assert policy.judge(arrival, opened(WORKERS, step=3)) is not LATE


@every_policy
def test_nothing_newer_than_the_open_step_counts(policy):
    for arrival in (Arrival(worker, 0, 0, 0.0) for worker in range(WORKERS)):
        newer = Arrival(arrival.worker, 10**6, 1, 0.0)
        assert policy.judge(newer, opened(WORKERS, step=0)) is HOLD


@every_policy
def test_a_step_without_gradients_does_not_close(policy):
    step = opened(WORKERS, step=0)
    assert not policy.closes(step, now_s=10.0**9)
    assert policy.wakes_at(step) == math.inf
    assert not policy.closes(opened(WORKERS, step=0, alive=set()), now_s=10.0**9)


@every_policy
def test_no_step_closes_with_less_than_it_lacks(policy):
    step = opened(WORKERS, step=0)
    lacks = policy.lacks(step)
    assert lacks >= 1
    for worker in range(lacks - 1):
        step.accepted.append(Arrival(worker, 0, 0, 0.0))
        assert not policy.closes(step, now_s=10.0**9)
        assert policy.lacks(step) == lacks - 1 - worker


def test_a_step_lacks_what_its_dead_can_still_not_give():
    step = opened(4, step=0, accepted=[(0, 0, 0, 0.1)])
    assert BackupWorkers(1).lacks(step) == 2
    step.alive = {0, 1}
    assert BackupWorkers(1).lacks(step) == 1


@every_policy
def test_policies_are_values(policy):
    with pytest.raises(FrozenInstanceError):
        policy.backup = 3
    if not isinstance(policy, Replay):
        assert parse_policy(str(policy)) == policy
        assert len({policy, parse_policy(str(policy))}) == 1


@every_policy
def test_without_an_opinion_workers_go_on_at_the_newest(policy):
    assert policy.resumes_at(worker=1, sequence=10**6, newest=7) == 7


@every_policy
def test_only_a_replay_ends_the_run(policy):
    assert policy.steps == (STEPS if isinstance(policy, Replay) else None)


# Each policy's own.


@pytest.mark.parametrize("policy", [BackupWorkers(1), Deadline(2.0), Async(2, max_staleness=0)])
def test_a_worker_counts_once_in_a_step(policy):
    step = opened(step=5, accepted=[(1, 8, 5, 0.5)])
    assert policy.judge(Arrival(1, 9, 5, 0.75), step) is HOLD
    assert policy.judge(Arrival(2, 9, 5, 0.75), step) is ACCEPT


@pytest.mark.parametrize("policy", [BackupWorkers(1), Async(2), Async(2, max_staleness=0)])
def test_no_more_than_n_count_though_the_root_was_slow_to_close(policy):
    step = opened(step=5, accepted=[(0, 8, 5, 0.5), (1, 8, 5, 0.5)])
    assert policy.closes(step, now_s=0.5)
    assert policy.judge(Arrival(2, 8, 5, 0.5), step) is HOLD


def test_deadline_judges_by_the_time_of_arrival_not_by_when_the_root_looks():
    step = opened(step=5, accepted=[(0, 8, 5, 0.5)])
    assert Deadline(2.0).judge(Arrival(1, 8, 5, 2.0), step) is ACCEPT
    assert Deadline(2.0).judge(Arrival(1, 8, 5, 2.25), step) is HOLD
    assert Deadline(2.0, at_least=2).judge(Arrival(1, 8, 5, 2.25), step) is ACCEPT


def test_a_slow_worker_is_late_by_as_many_versions_as_it_missed():
    slow = play(BackupWorkers(1), steady(1, 1, 3.5), workers=3, steps=4)[3].arrivals[0]
    assert (slow.worker, slow.version, slow.verdict, slow.late_by) == (2, 0, "late", 3)


DEATHS = {
    "the backups shrink first": (
        BackupWorkers(1),
        {2: 0.5},
        [(2.0, [(0, 0, 0), (1, 0, 0)]), (4.0, [(0, 1, 1), (1, 1, 1)])],
    ),
    "then N, and a death may close the step": (
        BackupWorkers(0),
        {2: 2.5},
        [(2.5, [(0, 0, 0), (1, 0, 0)]), (4.5, [(0, 1, 1), (1, 1, 1)])],
    ),
    "what the dead had sent counts, and the living are still waited for": (
        BackupWorkers(0),
        {0: 1.5},
        [(9.0, [(0, 0, 0), (1, 0, 0), (2, 0, 0)]), (18.0, [(1, 1, 1), (2, 1, 1)])],
    ),
    "a deadline's step closes when all that live are in": (
        Deadline(5.0),
        {2: 2.5},
        [(2.5, [(0, 0, 0), (1, 0, 0)]), (4.5, [(0, 1, 1), (1, 1, 1)])],
    ),
    "and needs no more than live": (
        Deadline(1.5, at_least=3),
        {1: 0.5, 2: 0.5},
        [(1.0, [(0, 0, 0)]), (2.0, [(0, 1, 1)])],
    ),
    "nor does asynchronous without staleness": (
        Async(3, max_staleness=0),
        {2: 2.5},
        [(2.5, [(0, 0, 0), (1, 0, 0)])],
    ),
    "softsync goes on with who is left": (
        Async(2),
        {1: 0.5, 2: 0.5},
        [(2.0, [(0, 0, 0), (0, 1, 0)]), (4.0, [(0, 2, 1), (0, 3, 1)])],
    ),
}


@pytest.mark.parametrize(("policy", "deaths", "expected"), DEATHS.values(), ids=DEATHS.keys())
def test_deaths(policy, deaths, expected):
    records = play(policy, steady(1.0, 2.0, 9.0), workers=3, steps=len(expected), deaths=deaths)
    assert closings(records) == expected


@pytest.mark.parametrize("policy", [BackupWorkers(0), Deadline(2.0), Async(3, max_staleness=0)])
def test_n_counts_the_dead_only_if_they_are_in(policy):
    assert policy.target(opened(alive={1, 2})) == 2
    assert policy.target(opened(alive={1, 2}, accepted=[(0, 8, 5, 0.5)])) == 3


def test_a_dead_workers_gradient_keeps_its_place_in_a_deadlines_quorum():
    step = opened(step=5, alive={1, 2}, accepted=[(0, 8, 5, 0.5)])
    assert Deadline(2.0, at_least=3).wakes_at(step) == math.inf
    assert not Deadline(2.0, at_least=3).closes(step, now_s=99.0)


POLICIES_IN = "base backup deadline adaptive asynchronous replay forms".split()
MODULES = [*(f"policies.{name}" for name in POLICIES_IN), "records.schema", "records.files", "records.turnarounds"]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_run(name):
    results = doctest.testmod(importlib.import_module(f"mpisync.{name}"))
    assert results.attempted and not results.failed


def test_every_policy_states_its_invariant_and_its_source():
    for kind in {type(policy) for policy in POLICIES}:
        assert "Invariant: every update is the mean of " in " ".join(kind.__doc__.split())
        assert "Revisiting Distributed Synchronous SGD" in " ".join(kind.__doc__.split())
