"""Every owner of state is taken apart in the middle of a run and put together, and the run goes on bit for bit."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from playing import play
from scripted import ScriptedWorker, World
from torch import nn

from mpisync.aggregation.account import Account
from mpisync.aggregation.late_work import Carry, Discard, Requeue, Retry
from mpisync.aggregation.sample_pool import SamplePool
from mpisync.aggregation.work import Part
from mpisync.model.scheduler import Schedule
from mpisync.model.update import Update
from mpisync.policies import Adaptive, Async, BackupWorkers, Deadline


def stored(state):
    """What comes back from a file."""
    return json.loads(json.dumps(state))


def delays(seed):
    table = np.random.default_rng(seed).exponential(1.0, (4, 13)) + 0.2
    return lambda worker, sequence: float(table[worker, sequence % 13])


# -- the whole of a root ---------------------------------------------------------------------------


class Trained:
    """What the root's side of a session owns beside the aggregator, on a parameter that it publishes."""

    def __init__(self, theta):
        self.parameter = nn.Parameter(torch.from_numpy(theta))
        self.optimizer = torch.optim.Adam([self.parameter], lr=0.1)
        self.average = self.parameter.detach().clone()
        scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 7, gamma=0.5)
        self.schedule = Schedule([scheduler], [self.optimizer])
        self.update = Update([self.parameter], [self.optimizer], [self.average], clip_norm=5.0, decay=0.9)

    def take(self, closed):
        self.parameter.grad = torch.from_numpy(closed.mean[0].copy())
        self.update.apply()
        self.schedule.advance(closed.loss)

    def state(self):
        return copy.deepcopy((self.optimizer.state_dict(), self.schedule.state(), self.update.state()))

    def load(self, state):
        optimizer, schedule, update = state
        self.optimizer.load_state_dict(optimizer)
        self.schedule.load(schedule)
        self.update.load(update)


def train(world, trained, steps):
    records = []
    for closed in world.root.serve(steps):
        trained.take(closed)
        records.append(closed.publish())
        world.records.append(records[-1])
        world.check_accounts()
    return records


def team(delay):
    poison = {(0, 3), (2, 9)}
    return [
        ScriptedWorker(
            number,
            lambda sequence, number=number: delay(number, sequence),
            samples=3,
            poisonous=lambda sequence, number=number: (number, sequence) in poison,
        )
        for number in range(4)
    ]


@pytest.mark.parametrize(
    "policy", [BackupWorkers(0), Deadline(9.0, mads=40), Adaptive(at_least=4), Async(k=4, max_staleness=0)]
)
@pytest.mark.parametrize("late", [Discard(), Retry(2)])
def test_a_root_goes_on_bit_for_bit(policy, late):
    whole = World(team(delays(5)), policy, late=copy.deepcopy(late))
    expected = Trained(whole.layout.arrays(whole.parameters)[0])
    records = train(whole, expected, 30)

    first = World(team(delays(5)), policy, late=copy.deepcopy(late))
    before = Trained(first.layout.arrays(first.parameters)[0])
    begun = train(first, before, 12)
    state, kept = stored(first.root.state()), before.state()

    workers = team(delays(5))
    for worker, before_it, sequence in zip(workers, first.workers, state["collector"]["sequences"], strict=True):
        worker.sequence, worker.handed, worker.verdicts = sequence, 3 * sequence, dict(before_it.verdicts)
    second = World(workers, policy, late=copy.deepcopy(late), state=state, now_s=first.now_s)
    second.records.extend(first.records)
    assert second.root.version == 12 and second.root.policy == first.root.policy
    second.layout.arrays(second.parameters)[0][:] = first.layout.arrays(first.parameters)[0]
    after = Trained(second.layout.arrays(second.parameters)[0])
    after.load(kept)
    rest = train(second, after, 30)

    assert torch.equal(after.parameter, expected.parameter) and torch.equal(after.average, expected.average)
    assert after.optimizer.param_groups[0]["lr"] == expected.optimizer.param_groups[0]["lr"] != 0.1
    assert [r.step for r in [*begun, *rest]] == list(range(30))
    for now, then in zip([*begun, *rest], records, strict=True):
        assert (now.accepted, now.counts, now.why, now.target) == (then.accepted, then.counts, then.why, then.target)
        assert now.closed_s == pytest.approx(then.closed_s, abs=1e-9)
    assert second.root.collector.accounts == whole.root.collector.accounts
    assert sum(account.rejected for account in second.root.collector.accounts) == 2


# -- policies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", [Adaptive(), Adaptive(noise_scale=20.0), Deadline(1.0, mads=2.0), BackupWorkers(1), Async(2)]
)
@pytest.mark.parametrize("shift_s", [0.0, 1000.0, -3.5])
def test_a_policy_goes_on_as_it_would_have(policy, shift_s):
    if policy.staleness != 0:
        assert policy.load(stored(policy.state())) == policy
        return
    records = play(policy, delays(1), workers=4, steps=60)
    learnt = policy
    for record in records[:30]:
        learnt = learnt.after(record)
    resumed = policy.load(stored(learnt.state()), shift_s)
    if shift_s == 0.0:
        assert resumed == learnt
    for record in records[30:]:
        moved = replace(
            record,
            opened_s=record.opened_s + shift_s,
            closed_s=record.closed_s + shift_s,
            published_s=record.published_s + shift_s,
        )
        learnt, resumed = learnt.after(record), resumed.after(moved)
        assert resumed.why == learnt.why
        if shift_s == 0.0:
            assert resumed == learnt
    fresh = policy
    for record in records[30:34]:
        fresh = fresh.after(record)
    assert policy.state() == {} or stored(fresh.state()) != stored(learnt.state()), "it remembers"


# -- late work -------------------------------------------------------------------------------------

FATES = st.sampled_from(["accepted", "late", "rejected", "passed"])
EVENTS = st.lists(st.tuples(st.integers(0, 2), FATES), max_size=40)


def act(late, accounts, worker, event, sequence):
    """One computation of a worker; what comes of it."""
    if isinstance(late, Requeue):
        late.claim(worker, (), late.pool.batches)
    account = accounts[worker]
    account.handed += 2
    part = Part(sequence, 2, 1, float(2 ** (sequence % 3)))
    if event == "passed":
        return late.pass_over(worker, account, part, may_return=True)
    work = late.announce(worker, account, part, carries=False)
    if event != "accepted":
        return late.reject(worker, account, work, event, may_return=event == "late")
    late.accept(worker, work)
    late.commit(worker, account, work)
    return work


@pytest.mark.parametrize("kind", [Discard, Retry, Carry, Requeue])
@given(before=EVENTS, after=EVENTS)
@settings(max_examples=40, deadline=None)
def test_late_work_goes_on_as_it_would_have(kind, before, after):
    late, accounts = kind(), [Account() for _ in range(3)]
    if kind is Requeue:
        late.pool = SamplePool(4)
    for number, (worker, event) in enumerate(before):
        act(late, accounts, worker, event, number)
    if kind is Carry:  # what is carried is in flight, and a run that goes on computes it anew
        for worker in range(3):
            late.announce(worker, accounts[worker], Part(0, 0, 0, float("nan")), carries=False)
    resumed, others = kind(), [Account(**stored(account.settled())) for account in accounts]
    if kind is Requeue:
        resumed.pool = SamplePool(4)
    resumed.load(stored(late.state()))
    assert others == accounts
    for number, (worker, event) in enumerate(after, len(before)):
        assert act(late, accounts, worker, event, number) == act(resumed, others, worker, event, number)
    assert others == accounts and resumed.by_cost == late.by_cost
    assert resumed.remaining == late.remaining and stored(resumed.state()) == stored(late.state())
