"""A root aggregator among scripted workers, in virtual time: no MPI, no processes, no sleeping.

`ScriptedLink` stands in for a transport. It keeps a gradient's memory full of NaN until its last byte
is in, and again after the root has given it back, so that whatever is read too early or too late
poisons the mean. `World.serve` holds every step that closes against what any step must be.
"""

import heapq
import itertools
import math
from dataclasses import dataclass, field

import numpy as np

from mpisync.aggregation.late_work import Discard, Requeue
from mpisync.aggregation.root import Root
from mpisync.device.host import HostMemory, aligned_bytes
from mpisync.transport.base import GradientFetcher, RootLink
from mpisync.transport.layout import Layout
from mpisync.transport.peers import Peer
from mpisync.transport.wire import GradientInfo, Header, Kind, Status

SIZE = 5
INCARNATION = 77
STALLED_S = 0.5
STUCK_S = 100.0


class Stuck(AssertionError):
    """Nothing will happen any more, and no step closes."""


class ScriptedPeer(Peer):
    """A process that dies when the script says so."""

    dead: set[int] = set()

    def state(self):
        return None if self.rank in self.dead else "S"


@dataclass
class ScriptedWorker:
    """What a worker does; times in virtual seconds."""

    number: int
    delay: object  # sequence -> seconds of computing
    transit: object = lambda sequence: 0.0  # sequence -> seconds from being asked to being whole
    samples: int = 1
    poisonous: object = lambda sequence: False
    last: float = math.inf  # it leaves instead of computing this sequence
    farewell: Kind = Kind.LEAVE  # what it says then
    link: RootLink | None = None
    sequence: int = 0
    ordinal: int = 0
    handed: int = 0
    loop: int = 0
    resume: int | None = None
    said: dict[int, Header] = field(default_factory=dict)  # gradients by ordinal
    verdicts: dict[int, object] = field(default_factory=dict)  # replies by sequence
    claims: dict[int, int] = field(default_factory=dict)  # the version that it claimed a batch for, by ordinal
    ended: bool = False
    computing: bool = False
    dead: bool = False
    gone: bool = False


def value_of(worker, sequence, size=SIZE):
    """A gradient in which the order of summation matters."""
    rng = np.random.default_rng((worker, sequence))
    return (rng.standard_normal(size) * 10.0 ** rng.integers(-4, 5, size)).astype(np.float32)


class ScriptedLink(RootLink):
    """A transport whose headers, payloads and stalls are the script's; with a fetcher, gradients come in pieces."""

    name = "scripted"

    def __init__(self, world, workers, *, in_pieces, capacity):
        self.workers, self.is_contiguous = tuple(workers), not in_pieces
        self.world, self.inbox, self.whole = world, [], set()
        self.memory = {w: aligned_bytes(world.layout.size_bytes) for w in workers}
        for worker in workers:
            self.poison(worker)
        self.fetcher = ScriptedFetcher(self, capacity) if in_pieces else None
        self.version, self.parameters = -1, None
        self.ends = []
        self.paused = False
        self.served = {}
        self.closed = False

    def poison(self, worker):
        self.whole.discard(worker)
        self.memory[worker][:] = 0xFF

    def fill(self, worker, sequence):
        target = self.world.layout.arrays(self.memory[worker])[0]
        target[:] = value_of(worker, sequence, target.size)
        if self.world.layout.extras_bytes:
            self.world.layout.extras(self.memory[worker])[:] = (worker, sequence)
        self.whole.add(worker)

    def home(self):
        return None

    def headers(self):
        heard, self.inbox = self.inbox, []
        return heard

    def gradient(self, worker, block):
        assert worker in self.whole, f"worker {worker}'s gradient is read before it is whole"
        return self.world.layout.view(self.memory[worker], block)

    def reply(self, worker, reply):
        if self.fetcher is None and reply.ordinal in self.world.workers[worker].said:
            self.poison(worker)  # the slot is its worker's again, who spoils it at once
        self.world.hear(self.world.workers[worker], reply)

    def begin(self, version):
        assert version == self.version + 1

    def publish(self, version, parameters):
        assert version == self.version + 1 or self.version < 0
        self.version, self.parameters = version, parameters.copy()

    def serve(self, worker):
        self.served[worker] = self.version
        self.world.go_on(self.world.workers[worker])
        self.world.notice_the_end(self.world.workers[worker])

    def pause(self, pause):
        assert pause.version == self.version
        self.paused = True

    def end(self, end):
        self.ends.append(end)

    def flush(self):
        if self.ends:
            for worker in self.workers:
                self.world.notice_the_end(self.world.workers[worker])

    def wait(self, timeout_s, headers=1):
        self.world.sleep(timeout_s)

    def close(self):
        self.closed = True


class ScriptedFetcher(GradientFetcher):
    """Has memory for `capacity` gradients, each of which comes when the script says so."""

    def __init__(self, link, capacity):
        self.link, self.world, self.capacity = link, link.world, capacity
        self.asked, self.arrived = {}, []
        self.most_asked = 0

    def want(self, worker):
        if worker in self.asked:
            return True
        if len(self.asked) >= self.capacity:
            return False
        now_s = self.world.now_s
        self.asked[worker] = now_s
        self.most_asked = max(self.most_asked, len(self.asked))
        its = self.world.workers[worker]
        sequence = its.sequence
        self.world.at(now_s + its.transit(sequence), lambda: self.come(worker, sequence, now_s))
        return True

    def come(self, worker, sequence, asked_s):
        its = self.world.workers[worker]
        if self.asked.get(worker) == asked_s and its.sequence == sequence and not its.dead:
            self.link.fill(worker, sequence)
            self.arrived.append(worker)

    def is_whole(self, worker):
        return worker in self.link.whole

    def is_moving(self, worker, now_s):
        return self.is_whole(worker) or now_s - self.asked[worker] < STALLED_S

    def progress(self):
        arrived, self.arrived = self.arrived, []
        return arrived

    def release(self, worker):
        self.asked.pop(worker, None)
        self.link.poison(worker)


class World:
    """Virtual time, workers and the root."""

    def __init__(
        self, workers, policy, *, pieces=(), capacity=2, extras=False, weighted=False, late=None, state=None, now_s=1e2
    ):
        self.now_s = self._last_event_s = now_s
        self._events, self._order = [], itertools.count()
        self.workers = workers
        self.layout = Layout.of([("float32", SIZE)], 2 if extras else 0)
        self.records, self.steps = [], []
        near = [w.number for w in workers if w.number not in pieces]
        self.links = [
            ScriptedLink(self, numbers, in_pieces=in_pieces, capacity=capacity)
            for numbers, in_pieces in ((near, False), (pieces, True))
            if numbers
        ]
        for link in self.links:
            for number in link.workers:
                workers[number].link = link
        peers = [ScriptedPeer(rank, "host", "boot", "pids", 1000 + rank, 0) for rank in range(len(workers) + 1)]
        self.dead = set()
        for peer in peers:
            object.__setattr__(peer, "dead", self.dead)
        self.parameters = aligned_bytes(self.layout.size_bytes)
        self.weighted, self.policy = weighted, policy
        self.late = Discard() if late is None else late
        self.pooled = isinstance(late, Requeue)
        self.root = Root(
            peers,
            self.links,
            self.layout,
            self.parameters,
            policy,
            HostMemory(),
            weighted=weighted,
            late=self.late,
            clock=lambda: self.now_s,
            stall_report_s=1e9,
            state=state,
        )
        for worker in workers:
            self.say(worker, Kind.READY)

    @property
    def open_step(self):
        return self.root.collector.player.step

    # -- time --------------------------------------------------------------------------------------

    def at(self, time_s, action):
        if time_s < math.inf:
            heapq.heappush(self._events, (time_s, next(self._order), action))

    def sleep(self, timeout_s):
        """Go on to the next thing that happens, at most `timeout_s` ahead."""
        self.check_accounts()
        if self.now_s > self._last_event_s + STUCK_S:
            raise Stuck(f"{self.open_step}: {[(m.worker, m.state) for m in self.root.roster.members]}")
        until_s = self.now_s + max(timeout_s, 1e-9)
        if not self._events or self._events[0][0] > until_s:
            self.now_s = until_s
            return
        self._last_event_s = self._events[0][0]
        self.now_s = max(self.now_s, self._events[0][0])
        while self._events and self._events[0][0] <= self.now_s:
            heapq.heappop(self._events)[2]()

    # -- workers -----------------------------------------------------------------------------------

    def say(self, worker, kind, *, samples=0, peak=0.0, version=0):
        worker.ordinal += 1
        header = Header(
            INCARNATION, kind, worker.number, worker.ordinal, worker.sequence, version, worker.handed, self.now_s,
            GradientInfo(
                samples, loss=0.5, peak=peak,
                batches=self.late.pool.batches if kind == Kind.CLAIM else int(kind == Kind.GRADIENT),
            ),
            loop=worker.loop,
        )  # fmt: skip
        if kind == Kind.GRADIENT:
            worker.said[worker.ordinal] = header
            if worker.link.fetcher is None:
                worker.link.fill(worker.number, worker.sequence)
        worker.link.inbox.append(header)

    def hear(self, worker, reply):
        if reply.ordinal in worker.said:
            sequence = worker.said[reply.ordinal].sequence
            assert sequence not in worker.verdicts, "a gradient gets one verdict"
            worker.verdicts[sequence] = reply
            worker.sequence = sequence + 1
        if reply.ordinal in worker.claims:
            self.dealt(worker, worker.claims.pop(reply.ordinal), reply.batch >= 0)
            return
        assert worker.resume is None or reply.status == Status.NOTED
        worker.resume = reply.resume
        self.go_on(worker)

    def go_on(self, worker):
        """Begin a computation, if the worker knows at which version and has it."""
        version = worker.link.served.get(worker.number, -1)
        stays = worker.dead or worker.ended or worker.link.ends or worker.link.paused
        if worker.resume is None or version < worker.resume or stays:
            return
        worker.resume = None
        if worker.sequence >= worker.last:
            worker.ended = True
            self.say(worker, worker.farewell)
        elif self.pooled:
            self.say(worker, Kind.CLAIM, version=version)
            worker.claims[worker.ordinal] = version
        else:
            self.compute(worker, version)

    def dealt(self, worker, version, has_batch):
        """Compute on a batch that was claimed; leave where there is none."""
        if has_batch:
            self.compute(worker, version)
        else:
            worker.ended = True
            self.say(worker, worker.farewell)
        self.notice_the_end(worker)

    def compute(self, worker, version):
        worker.computing = True
        delay_s, sequence = worker.delay(worker.sequence), worker.sequence
        self.at(self.now_s + delay_s, lambda: self.computed(worker, sequence, version))

    def computed(self, worker, sequence, version):
        if worker.dead:
            return
        worker.computing = False
        worker.handed += worker.samples
        value = value_of(worker.number, sequence)
        peak = math.inf if worker.poisonous(sequence) else float(np.abs(value).max())
        self.say(worker, Kind.GRADIENT, samples=worker.samples, peak=peak, version=version)

    def kill(self, number):
        self.workers[number].dead = True
        self.dead.add(number)

    def notice_the_end(self, worker):
        """Say goodbye once the verdict is there and the end was seen."""
        stays = worker.gone or worker.dead or worker.computing or worker.claims or not worker.link.ends
        if stays or len(worker.said) > len(worker.verdicts):
            return
        if worker.link.served.get(worker.number) == worker.link.version:
            worker.gone = worker.ended = True
            self.say(worker, Kind.BYE)

    # -- the root ----------------------------------------------------------------------------------

    def serve(self, steps, each=lambda closed, record: None, *, serving=None):
        """Serve, and hold each step against the invariants; the records."""
        for closed in self.root.serve(steps) if serving is None else serving:
            mean = closed.mean[0].copy()
            theta = self.layout.arrays(self.parameters)[0]
            theta -= np.float32(0.1) * mean
            record = closed.publish()
            self.records.append(record)
            self.steps.append((closed, mean))
            self.check_step(closed, mean, record)
            self.check_accounts()
            each(closed, record)
        return self.records

    def check_step(self, closed, mean, record):
        accepted = record.accepted
        assert [(w, s) for w, s, _ in accepted] == closed.accepted
        if self.policy.staleness == 0:
            assert len({w for w, *_ in accepted}) == len(accepted), "from distinct workers"
            assert all(v == closed.step for *_, v in accepted), "at the version being updated"
        np.testing.assert_array_equal(mean, self.fold(accepted))
        assert closed.finite
        if self.layout.extras_bytes:
            assert [tuple(e) for e in closed.extras] == [(w, s) for w, s, _ in accepted]
        assert np.array_equal(self.links[0].parameters, self.parameters)

    def fold(self, accepted):
        """The strict left fold of these gradients, divided."""
        total, divisor = None, 0
        for worker, sequence, _ in accepted:
            weight = self.workers[worker].samples if self.weighted else 1
            term = np.float32(weight) * value_of(worker, sequence)
            total, divisor = (term if total is None else total + term), divisor + weight
        return total / np.float32(divisor)

    def check_accounts(self):
        """I10, by what the workers said and what the records and verdicts say."""
        for member in self.root.roster.members:
            worker, account = self.workers[member.worker], self.root.collector.accounts[member.worker]
            samples = worker.samples
            used = [a for r in self.records for a in r.accepted if a[0] == member.worker]
            still = [a for a in self.open_step.accepted if a.worker == member.worker]
            known = {(a[0], a[1]) for a in used} | {(a.worker, a.sequence) for a in still}
            discarded = [
                sequence
                for sequence, reply in worker.verdicts.items()
                if reply.status != Status.ACCEPTED or (worker.number, sequence) not in known
            ]
            assert account.used == samples * len(used)
            waiting = self.root.collector.next_sequence(member.worker) - len(used) - len(discarded)
            left = samples * waiting - account.in_flight  # in its hands when it left or died
            assert account.discarded + account.requeued + account.lost == samples * len(discarded) + left
            assert account.in_flight >= 0 and (left == 0 or not member.is_alive)
            assert account.requeued == 0 or type(self.late) is not Discard
            assert account.lost == (0 if self.pooled else left)
