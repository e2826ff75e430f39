"""One set of checks that every transport passes: the package's two, and one that lives in tests/queues.py only.

Each check runs a root and three workers, as processes or as threads, and asserts on what all of them saw.
"""

import json
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
from queues import Queues, meeting_of

from mpisync.aggregation.participant import Participant
from mpisync.aggregation.shutdown import leave_root, leave_worker
from mpisync.device.host import HostMemory
from mpisync.policies import Async, BackupWorkers
from mpisync.transport import communicators, connect
from mpisync.transport.layout import Layout
from mpisync.transport.rendezvous import Proposal, meet
from mpisync.transport.wire import GradientInfo

RANKS = 4
SIZES = pytest.mark.parametrize("size", [10, 1_200_000])  # a message's header carries it; it takes two blocks
PROCESSES = pytest.mark.parallel(RANKS)
TRANSPORTS = [pytest.param("shared", marks=PROCESSES), pytest.param("messages", marks=PROCESSES), "queues"]


@pytest.fixture(params=TRANSPORTS)
def run(request, monkeypatch):
    """Call a function with a Participant on every rank; what it returned on each, the root's last."""
    if request.param == "queues":
        yield as_threads(monkeypatch)
        return
    comm = request.getfixturevalue("comm")
    monkeypatch.setenv("MPISYNC_TRANSPORT", request.param)

    def run(main, layout, policy, memory=HostMemory):
        meeting = meet(comm, Proposal("contract"), lambda a, b: None)
        seen = main(Participant(meeting, layout, layout, policy, memory()))
        everyone = comm.allgather(seen)
        assert not any(private.Iprobe() for private in communicators.known(comm)), "a message is left"
        assert all(communicators.is_free(private) for private in communicators.known(comm))
        return everyone

    yield run


def as_threads(monkeypatch, **script):
    def run(main, layout, policy, memory=HostMemory):
        queues, seen, errors = Queues(RANKS, **script), [None] * RANKS, []
        monkeypatch.setitem(connect.TRANSPORTS, "queues", queues.reach)

        def live(rank):
            try:
                seen[rank] = main(
                    Participant(meeting_of(rank, RANKS, "queues"), layout, layout, policy, memory())
                )
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=live, args=(rank,), daemon=True) for rank in range(RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60.0)
        if errors:
            raise errors[0]
        assert not any(thread.is_alive() for thread in threads), "a rank hangs"
        assert queues.left() == (0, set()), "a message or a link is left"
        return seen

    return run


@dataclass
class Seen:
    """What one rank saw of a run."""

    final: float  # the one value of all parameters, at the end
    verdicts: dict = field(default_factory=dict)  # (worker, sequence) -> verdict, late by; the root's, or the worker's
    steps: list = field(default_factory=list)  # on the root: of each (worker, sequence, version) of the accepted
    versions: list = field(default_factory=list)  # on a worker: those that it computed on
    transports: list = field(default_factory=list)  # on the root


def gradient_of(worker, sequence, size):
    """Small whole numbers and halves: exact in every order of summation."""
    return ((np.arange(size) + 3 * worker + sequence) % 8 / 2).astype(np.float32)


def value_of(array):
    assert (array == array[0]).all(), "two versions are mixed"
    return float(array[0])


def train(steps, *, pauses_s=(0.0, 0.0, 0.0), leaves_after=None, stops_at=None, kept=None, look=lambda *_: None):
    """A rank's part of a run in which version v of the parameters is v everywhere; `kept` holds the ranks' states."""
    kept = {} if kept is None else kept

    def main(participant):
        if participant.is_root:
            return lead(participant, steps, kept, look)
        rank = participant.meeting.comm.rank
        leaves, stops = (leaves_after or {}).get(rank), (stops_at or {}).get(rank)
        return work(participant, rank, pauses_s[rank], leaves, stops, kept, look)

    return main


def lead(participant, steps, kept, look):
    state, seen = kept.get("root"), Seen(0.0)
    participant.layout.arrays(participant.parameters)[0][:] = state["collector"]["player"]["version"] if state else 0
    root = participant.root(state=state)
    look(participant, [participant.parameters, *root.mean])
    seen.transports = [member.link.name for member in root.roster.members]
    theta, records, error = participant.layout.arrays(participant.parameters)[0], [], None
    try:
        for closed in root.serve(steps):
            total = sum(gradient_of(w, s, theta.size).astype(np.float64) for w, s in closed.accepted)
            mean = total.astype(np.float32) / np.float32(len(closed.accepted))
            np.testing.assert_array_equal(closed.mean[0], mean)
            theta[:] = closed.step + 1
            records.append(closed.publish())
            seen.steps.append(records[-1].accepted)
        seen.final = value_of(theta.copy())
    except BaseException as failed:
        error = failed
        raise
    finally:
        leave_root(root, error)
    kept["root"] = json.loads(json.dumps(root.state()))  # the last verdicts are given by now
    arrivals = [*(a for record in records for a in record.arrivals), *root.collector.player.arrivals]
    seen.verdicts = {(a.worker, a.sequence): (a.verdict, a.late_by) for a in arrivals}
    assert len(seen.verdicts) == len(arrivals), "a gradient has one verdict"
    return seen


def work(participant, rank, pause_s, leaves_after, stops_at, kept, look):
    worker, seen, error = participant.worker(), Seen(0.0), None
    if rank in kept:
        worker.load(kept[rank])
    link, layout = worker.link, participant.layout
    look(participant, [link.gradient, link.parameters])
    slot, copy = layout.arrays(link.gradient)[0], np.zeros(layout.size_bytes, np.uint8)
    try:
        while worker.sequence != leaves_after and worker.pull() is not None:
            worker.read(copy)
            assert value_of(layout.arrays(copy)[0]) == worker.version, "parameters arrive whole"
            seen.versions.append(worker.version)
            time.sleep(pause_s)
            if worker.sequence == stops_at:
                worker.stop()
                stops_at = None
                continue
            slot[:] = gradient_of(rank, worker.sequence, slot.size)
            sequence = worker.sequence
            verdict = worker.push(GradientInfo(1, peak=4.0))
            seen.verdicts[rank, sequence] = ("accepted" if verdict.accepted else "late", verdict.late_by)
        worker.finish()
        worker.read(copy)
        kept[rank] = worker.state()
        seen.final = value_of(layout.arrays(copy)[0])
    except BaseException as failed:
        error = failed
        raise
    finally:
        del slot
        leave_worker(worker, error)
    return seen


def check(seen, version):
    """What must be true of any run."""
    root, workers = seen[-1], seen[:-1]
    told = {}
    for worker in workers:
        told |= worker.verdicts
    assert root.verdicts == told, "what the root records is what it told"
    counted = [(worker, sequence) for accepted in root.steps for worker, sequence, _ in accepted]
    assert len(counted) == len(set(counted))
    assert set(counted) <= {key for key, (verdict, _) in told.items() if verdict == "accepted"}
    assert [one.final for one in seen] == [version] * len(seen), "everyone has the final parameters"


def layout_of(size):
    return Layout.of([("float32", size)])


@SIZES
def test_every_gradient_counts_once_and_parameters_arrive_whole(run, size, request):
    seen = run(train(8), layout_of(size), BackupWorkers(0))
    check(seen, 8)
    assert all(len(accepted) == 3 for accepted in seen[-1].steps)
    assert all(worker.versions == list(range(8)) for worker in seen[:-1])
    named = {"shared": "shared memory"}
    asked = request.node.callspec.params["run"]
    assert seen[-1].transports == [named.get(asked, asked)] * 3


@SIZES
def test_late_is_told_by_how_many_versions(run, size):
    seen = run(train(10, pauses_s=(0.3, 0.03, 0.03)), layout_of(size), BackupWorkers(1))
    check(seen, 10)
    assert all(len(accepted) == 2 for accepted in seen[-1].steps)
    assert any(late_by > 0 for _, late_by in seen[0].verdicts.values())
    for worker in seen[:-1]:
        for verdict, late_by in worker.verdicts.values():
            assert (verdict == "late") == (late_by > 0)


@SIZES
def test_stale_gradients_count_where_the_policy_has_it_so(run, size):
    seen = run(train(15, pauses_s=(0.02, 0.003, 0.004)), layout_of(size), Async(2))
    check(seen, 15)
    assert all(len(accepted) == 2 for accepted in seen[-1].steps)
    assert any(version < step for step, accepted in enumerate(seen[-1].steps) for *_, version in accepted)


@SIZES
def test_who_leaves_early_gets_the_final_parameters(run, size):
    seen = run(train(7, leaves_after={1: 2}), layout_of(size), BackupWorkers(0))
    check(seen, 7)
    assert [len(accepted) for accepted in seen[-1].steps] == [3, 3, 2, 2, 2, 2, 2]


def test_a_worker_can_end_the_training(run):
    seen = run(train(None, stops_at={2: 4}), layout_of(10), BackupWorkers(0))
    check(seen, 4)


def test_the_training_ends_when_all_have_left(run):
    seen = run(train(None, leaves_after={0: 1, 1: 2, 2: 3}), layout_of(10), BackupWorkers(0))
    check(seen, 3)
    assert [len(accepted) for accepted in seen[-1].steps] == [3, 2, 1]


def test_a_header_that_takes_long_is_late_whenever_its_gradient_was_complete(monkeypatch):
    """Delays are the script's: worker 0 computes as fast as the others, and is heard last."""

    def delay_s(worker, header):
        return 0.5 if worker == 0 and header.sequence > 0 else 0.0

    run = as_threads(monkeypatch, delay_s=delay_s)
    seen = run(train(10, pauses_s=(0.0, 0.02, 0.02)), layout_of(10), BackupWorkers(1))
    check(seen, 10)
    verdicts = [verdict for (_, sequence), (verdict, _) in seen[0].verdicts.items() if sequence > 0]
    assert verdicts and set(verdicts) == {"late"}


@SIZES
@pytest.mark.parametrize("policy", [BackupWorkers(0), Async(2)])
def test_a_run_goes_on_from_the_version_where_another_ended(run, size, policy):
    kept = {}
    check(run(train(5, kept=kept), layout_of(size), policy), 5)
    seen = run(train(9, kept=kept), layout_of(size), policy)
    check(seen, 9)
    assert len(seen[-1].steps) == 4
    assert min(version for worker in seen[:-1] for version in worker.versions) == 5
    if policy.staleness == 0:
        assert [sorted(accepted) for accepted in seen[-1].steps] == [[(w, s, s) for w in range(3)] for s in range(5, 9)]


class Lent(HostMemory):
    """A stand-in for the host's memory that knows what it has lent."""

    def __init__(self):
        super().__init__()
        self.lent = []

    def allocate(self, size_bytes):
        self.lent.append(super().allocate(size_bytes))
        return self.lent[-1]

    def share(self, size_bytes, *, as_file):
        shared = super().share(size_bytes, as_file=as_file)
        self.lent.append(shared.bytes)
        return shared

    def attach(self, address):
        shared = super().attach(address)
        self.lent.append(shared.bytes)
        return shared


@SIZES
def test_gradients_sums_and_parameters_lie_in_the_memory_that_is_given(run, size):
    """So a device's can stand in for the host's without a change to the protocol."""

    def look(participant, arrays):
        for array in arrays:
            assert any(np.shares_memory(array, own) for own in participant.memory.lent)
        participant.memory.lent.clear()  # else mapped memory would outlive the run

    check(run(train(4, look=look), layout_of(size), BackupWorkers(0), Lent), 4)
