"""A transport that lives in tests only: root and workers are threads of one process, with plain queues between them.

It is added by putting `Queues.reach` into `connect.TRANSPORTS`. A worker's headers take as long to arrive as the script
says. Gradients are handed over as copies of which the root has one a worker, and each version is sent to whom it is
served as one array.
"""

import threading
import time
from collections import deque
from functools import partial

import numpy as np

from mpisync.transport.base import End, Pause, RootLink, WorkerLink
from mpisync.transport.connect import Reached
from mpisync.transport.peers import Peer
from mpisync.transport.rendezvous import Meeting
from mpisync.transport.wire import HEADER_BYTES, REPLY_BYTES, Header, Kind, Reply

INCARNATION = 7


class StandIn:
    """As much of a communicator as a meeting needs."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


def meeting_of(rank, size, name):
    """What `meet` would return on this rank."""
    here = vars(Peer.here(rank))
    # each thread has a pid of its own as far as the others are concerned: none of them can be looked after by its pid
    peers = [Peer(**{**here, "rank": other, "namespace": f"thread {other}"}) for other in range(size)]
    return Meeting(StandIn(rank, size), size - 1, INCARNATION, peers, name)


class Mailbox:
    """Messages in the order in which they are due."""

    def __init__(self):
        self._changed = threading.Condition()
        self._letters = deque()

    def put(self, letter, delay_s=0.0):
        with self._changed:
            self._letters.append((time.monotonic() + delay_s, letter))
            self._changed.notify_all()

    def take(self):
        """Everything that is due."""
        now_s = time.monotonic()
        with self._changed:
            due = [letter for at_s, letter in self._letters if at_s <= now_s]
            self._letters = deque(entry for entry in self._letters if entry[0] > now_s)
        return due

    def wait(self, timeout_s):
        with self._changed:
            next_s = min((at_s for at_s, _ in self._letters), default=float("inf")) - time.monotonic()
            if next_s > 0:
                self._changed.wait(min(timeout_s, next_s))

    def __len__(self):
        return len(self._letters)


class Queues:
    """One run's channels; `delay_s(worker, header)` tells how long a header takes."""

    def __init__(self, size, delay_s=lambda worker, header: 0.0):
        self.to_root, self.delay_s = Mailbox(), delay_s
        self.to_worker = [Mailbox() for _ in range(size - 1)]
        self.open = set()  # links that were not closed
        self.slots = {}

    def reach(self, run, workers):
        rank = run.meeting.comm.rank
        return Reached(
            workers,
            root_link=partial(QueueRootLink, self, tuple(workers), run.layout),
            worker_link=partial(QueueWorkerLink, self, rank, run.layout, run.published, run.host),
            memory=run.host,
        )

    def left(self):
        """What a run in good order leaves: nothing."""
        letters = [len(box) for box in (self.to_root, *self.to_worker)]
        return sum(letters), self.open


class QueueRootLink(RootLink):
    name = "queues"
    is_contiguous = True

    def __init__(self, queues, workers, layout):
        self.workers, self._queues, self._layout = workers, queues, layout
        self._slots = {}
        self._version, self._published, self._sent = -1, None, dict.fromkeys(workers, -1)
        queues.open.add(self)

    def home(self):
        return None

    def headers(self):
        heard = []
        for raw, gradient in self._queues.to_root.take():
            header = Header.unpack(raw)
            if gradient is not None:
                self._slots[header.worker] = gradient
            heard.append(header)
        return heard

    def gradient(self, worker, block):
        return self._layout.view(self._slots[worker], block)

    def reply(self, worker, reply):
        raw = bytearray(REPLY_BYTES)
        reply.pack_into(raw)
        self._queues.to_worker[worker].put(("reply", raw))

    def publish(self, version, parameters):
        self._version, self._published = version, parameters.copy()
        for worker in self.workers:
            self._queues.to_worker[worker].put(("behind", version))

    def serve(self, worker):
        if self._sent[worker] < self._version:
            self._sent[worker] = self._version
            self._queues.to_worker[worker].put(("version", (self._version, self._published)))

    def pause(self, pause):
        for worker in self.workers:
            self._queues.to_worker[worker].put(("pause", (pause.loops, pause.version, self._published)))

    def end(self, end):
        for worker in self.workers:
            self._queues.to_worker[worker].put(("end", (end.version, end.failure)))

    def wait(self, timeout_s, headers=1):
        self._queues.to_root.wait(timeout_s)

    def close(self):
        self._queues.open.remove(self)


class QueueWorkerLink(WorkerLink):
    shares_parameters = False

    def __init__(self, queues, worker, layout, published, memory):
        self.layout, self.published = layout, published
        self.gradient = memory.allocate(layout.size_bytes)
        self.parameters = memory.allocate(published.size_bytes)
        self._queues, self._worker = queues, worker
        self._newest, self._announced = -1, -1
        self._replies, self._end, self._pause, self._final = {}, None, Pause(0, -1), None
        queues.open.add(self)

    def send(self, header):
        raw = bytearray(HEADER_BYTES)
        header.pack_into(raw)
        gradient = self.gradient.copy() if header.kind == Kind.GRADIENT else None
        self._queues.to_root.put((raw, gradient), self._queues.delay_s(self._worker, header))

    def _poll(self):
        for kind, what in self._queues.to_worker[self._worker].take():
            if kind == "reply":
                reply = Reply.unpack(what)
                self._replies[reply.ordinal] = reply
            elif kind == "version":
                self._newest, values = what
                np.copyto(self.parameters, values)
            elif kind == "behind":
                self._announced = what
            elif kind == "pause":
                self._pause, self._final = Pause(*what[:2]), what[2]
            else:
                self._end = End(*what)

    def reply(self, ordinal):
        self._poll()
        return self._replies.pop(ordinal, None)

    def newest(self):
        self._poll()
        return self._newest

    def is_behind(self, version):
        self._poll()
        return self._end is not None or self._announced > version

    def has_unsent_version(self):
        self._poll()
        return self._announced > self._newest

    def read(self, target):
        if self.newest() >= 0:
            np.copyto(target, self.parameters[: target.size])
        return self._newest

    def end(self):
        self._poll()
        return self._end

    def loops(self):
        self._poll()
        return self._pause.loops

    def pause(self):
        return self._pause

    def take_final(self, target):
        np.copyto(target, self._final[: target.size])
        return self._pause.version

    def wait(self, timeout_s):
        self._queues.to_worker[self._worker].wait(timeout_s)

    def close(self):
        self._poll()
        self._queues.open.remove(self)
