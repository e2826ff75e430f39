"""Transport by MPI messages in host memory: for workers that share no memory with the root.

A small gradient rides in its header's message. A large one stays with the worker until the root asks for it, block by
block with a few blocks in flight, so a late gradient costs no bandwidth and a sender that stalls pins a few blocks and
not a whole buffer. Parameters go the other way in the same manner, from a snapshot that outlives its sends.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable

import numpy as np
from mpi4py import MPI

from mpisync.transport import communicators
from mpisync.transport.base import End, RootLink, WorkerLink
from mpisync.transport.layout import BLOCK_BYTES, Block, Layout, aligned_bytes
from mpisync.transport.wire import HEADER_BYTES, REPLY_BYTES, Header, Kind, Reply, ReplyKind, Tag

INLINE_BYTES = 16 << 10
WINDOW = 4  # blocks in flight per worker and direction
STALLED_S = 0.5  # an asked-for gradient without a new block for so long is not waited for
GRADIENTS = 2  # whole gradients that the root can hold beside its sum
_PATIENT_S, _SHORTEST_S, _LONG_S, _LONGEST_S = 200e-6, 20e-6, 1e-3, 5e-3


def inline_bytes(layout: Layout) -> int:
    """Bytes of gradient that ride in the header's message."""
    return layout.size_bytes if layout.size_bytes <= INLINE_BYTES else 0


class BlockPool:
    """Blocks of memory to receive into, at most so many in use at a time.

    A block whose receive cannot be finished, because its sender hangs, is lent out until it does; the pool then makes
    another in its place, so that what hangs costs a few blocks and never a buffer.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._free: list[np.ndarray] = []

    def take(self, count: int) -> list[np.ndarray] | None:
        """Take `count` blocks, or None while there are not so many."""
        if self.used + count > self.capacity:
            return None
        self.used += count
        return [self._free.pop() if self._free else aligned_bytes(BLOCK_BYTES) for _ in range(count)]

    def give(self, blocks: Iterable[np.ndarray]) -> None:
        """Give blocks back."""
        for block in blocks:
            self.used -= 1
            self._free.append(block)

    def abandon(self, blocks: Iterable[np.ndarray]) -> None:
        """Stop counting blocks that a hanging receive still owns."""
        self.used -= sum(1 for _ in blocks)


class Incoming:
    """One worker's announced gradient on its way to the root."""

    def __init__(self, worker: int) -> None:
        self.worker = worker
        self.blocks: list[np.ndarray] = []
        self.inline: np.ndarray | None = None
        self.asked = self.received = 0
        self.moved_s = 0.0
        self.receives: deque[tuple[MPI.Request, np.ndarray]] = deque()

    @property
    def is_asked_for(self) -> bool:
        """Whether blocks were asked for."""
        return bool(self.blocks)


class Outgoing:
    """Parameter blocks on their way to one worker."""

    def __init__(self) -> None:
        self.version = -1  # what is being sent
        self.snapshot: list[np.ndarray] = []
        self.next = 0
        self.is_told = True  # that there is a newer version than the one it computes on
        self.sends: deque[tuple[MPI.Request, object]] = deque()
        self.replies: deque[tuple[MPI.Request, object]] = deque()


class MessageRootLink(RootLink):
    """The root's side for the workers that it reaches by messages only."""

    in_pieces = True

    def __init__(
        self,
        comm: MPI.Intracomm,
        workers: Iterable[int],
        incarnation: int,
        layout: Layout,
        published: Layout,
        *,
        finish_old_versions: bool,
    ) -> None:
        self.layout, self.published = layout, published
        self._inline = inline_bytes(layout)
        super().__init__(comm, workers, incarnation)
        self._finish_old_versions = finish_old_versions  # a version is sent to its end even when there is a newer one
        self._pool = BlockPool(GRADIENTS * len(layout.blocks))
        self._sizes = [layout.block_bytes(block) for block in layout.blocks]
        self._places = {block: i for i, block in enumerate(layout.blocks)}
        self._incoming = {w: Incoming(w) for w in self.workers}
        self._outgoing = {w: Outgoing() for w in self.workers}
        self._drains: list[tuple[MPI.Request, np.ndarray]] = []
        self._version, self._parameters = -1, np.empty(0, np.uint8)
        self._snapshot: list[np.ndarray] = []
        self._idle_s = _SHORTEST_S

    # -- gradients ---------------------------------------------------------------------------------

    def header_bytes(self) -> int:
        """Header and, when it is small, gradient."""
        return HEADER_BYTES + inline_bytes(self.layout)

    def headers(self) -> list[Header]:
        """Take in the headers that have arrived; who says goodbye listens to nothing more."""
        heard = super().headers()
        for header in heard:
            if header.kind == Kind.BYE:
                self._outgoing[header.worker].snapshot = []
        return heard

    def _received(self, worker: int, message: bytearray) -> None:
        self._idle_s = _SHORTEST_S
        self._outgoing[worker].is_told = True  # it waits for its reply: nothing to hurry
        if self._inline:
            buffer = aligned_bytes(self._inline)
            buffer[:] = np.frombuffer(message, np.uint8)[HEADER_BYTES:]
            self._incoming[worker].inline = buffer

    def want(self, worker: int) -> bool:
        """Ask for the first blocks, if there is memory for them all."""
        incoming = self._incoming[worker]
        if incoming.inline is not None or incoming.is_asked_for:
            return True
        blocks = self._pool.take(len(self._sizes))
        if blocks is None:
            return False
        incoming.blocks, incoming.asked, incoming.received = blocks, 0, 0
        incoming.moved_s = time.monotonic()
        self._ask(incoming, WINDOW)
        return True

    def _ask(self, incoming: Incoming, count: int) -> None:
        count = min(count, len(self._sizes) - incoming.asked)
        if count <= 0:
            return
        for index in range(incoming.asked, incoming.asked + count):
            buffer = incoming.blocks[index][: self._sizes[index]]
            request = self.comm.Irecv([buffer, MPI.BYTE], incoming.worker, Tag.GRADIENT_BLOCK)
            incoming.receives.append((request, incoming.blocks[index]))
        self._say(
            incoming.worker, Reply(self.incarnation, ReplyKind.WANT, first=incoming.asked, blocks=count)
        )
        incoming.asked += count

    def progress(self) -> list[int]:
        """Receive gradient blocks and send parameter blocks."""
        whole = []
        for incoming in self._incoming.values():
            if incoming.receives and self._receive(incoming):
                whole.append(incoming.worker)
        for worker, outgoing in self._outgoing.items():
            if outgoing.sends or outgoing.snapshot:
                self._send_blocks(worker, outgoing)
            while outgoing.replies and outgoing.replies[0][0].Test():
                outgoing.replies.popleft()
        self._drains = [drain for drain in self._drains if not drain[0].Test()]
        return whole

    def _receive(self, incoming: Incoming) -> bool:
        done = 0
        while incoming.receives and incoming.receives[0][0].Test():
            incoming.receives.popleft()
            done += 1
        if done:
            self._idle_s = _SHORTEST_S
            incoming.received += done
            incoming.moved_s = time.monotonic()
            self._ask(incoming, done)
        return self.is_whole(incoming.worker)

    def is_whole(self, worker: int) -> bool:
        """Whether the last block is in."""
        incoming = self._incoming[worker]
        if incoming.inline is not None:
            return True
        return incoming.is_asked_for and incoming.received == len(self._sizes)

    def is_moving(self, worker: int, now_s: float) -> bool:
        """Whether a block came in lately."""
        return self.is_whole(worker) or now_s - self._incoming[worker].moved_s < STALLED_S

    def gradient(self, worker: int, block: Block) -> np.ndarray:
        """The block's elements where they were received."""
        incoming = self._incoming[worker]
        if incoming.inline is not None:
            return self.layout.view(incoming.inline, block)
        index = self._places[block]
        raw = incoming.blocks[index][: self._sizes[index]]
        return raw if block.segment < 0 else raw.view(self._storage(block))

    def _storage(self, block: Block) -> np.dtype:
        return self.layout.segments[block.segment].dtype.storage

    def release(self, worker: int) -> None:
        """Give the blocks back; those that a sender still owes are received and thrown away."""
        incoming = self._incoming[worker]
        owed = [block for _, block in incoming.receives]
        self._drains += incoming.receives
        self._pool.abandon(owed)
        held = {id(block) for block in owed}
        self._pool.give(block for block in incoming.blocks if id(block) not in held)
        self._incoming[worker] = Incoming(worker)

    # -- replies and parameters --------------------------------------------------------------------

    def reply(self, worker: int, reply: Reply) -> None:
        """Answer a header."""
        self._say(worker, reply)

    def _say(self, worker: int, reply: Reply) -> None:
        buffer = bytearray(REPLY_BYTES)
        reply.pack_into(buffer)
        request = self.comm.Isend([buffer, MPI.BYTE], dest=worker, tag=Tag.REPLY)
        self._outgoing[worker].replies.append((request, buffer))

    def begin(self, version: int) -> None:
        """Nothing: what is being sent is a snapshot."""

    def publish(self, version: int, parameters: np.ndarray) -> None:
        """Remember what to send; workers still computing hear once that they are behind."""
        self._version, self._parameters, self._snapshot = version, parameters, []
        for worker, outgoing in self._outgoing.items():
            if outgoing.snapshot and not self._finish_old_versions:
                self.serve(worker)  # from the start: the version under way could only be late
            elif worker in self._open and not outgoing.is_told:
                outgoing.is_told = True
                self._say(worker, Reply(self.incarnation, ReplyKind.BEHIND, newest=version))

    def serve(self, worker: int) -> None:
        """Send the newest version, from a snapshot that lasts as long as its sends."""
        outgoing = self._outgoing[worker]
        outgoing.is_told = False
        if outgoing.version == self._version or worker not in self._open:
            return
        if not self._snapshot:
            views = (self.published.view(self._parameters, b) for b in self.published.blocks)
            self._snapshot = [view.view(np.uint8).copy() for view in views]
        outgoing.version, outgoing.snapshot, outgoing.next = self._version, self._snapshot, 0
        self._send_blocks(worker, outgoing)

    def _send_blocks(self, worker: int, outgoing: Outgoing) -> None:
        while outgoing.sends and outgoing.sends[0][0].Test():
            outgoing.sends.popleft()
            self._idle_s = _SHORTEST_S
        while outgoing.snapshot and len(outgoing.sends) < WINDOW:
            index, block = outgoing.next, outgoing.snapshot[outgoing.next]
            self._say(
                worker, Reply(self.incarnation, ReplyKind.BLOCK, newest=outgoing.version, first=index)
            )
            request = self.comm.Isend([block, MPI.BYTE], dest=worker, tag=Tag.PARAMETER_BLOCK)
            outgoing.sends.append((request, block))
            outgoing.next += 1
            if outgoing.next == len(outgoing.snapshot):
                self._say(worker, Reply(self.incarnation, ReplyKind.PUBLISHED, newest=outgoing.version))
                outgoing.snapshot = []

    def end(self, end: End) -> None:
        """Tell everyone."""
        for worker in self._open:
            self._say(
                worker, Reply(self.incarnation, ReplyKind.END, newest=end.version, text=end.failure)
            )

    def flush(self) -> None:
        """Messages wake their receivers themselves."""

    @property
    def busy(self) -> bool:
        """Whether blocks are on their way."""
        return any(i.receives for i in self._incoming.values()) or any(
            o.sends or o.snapshot for o in self._outgoing.values()
        )

    def wait(self, timeout_s: float, headers: int = 1) -> None:
        """Sleep a little, longer while nothing comes."""
        self._idle_s = backoff(self._idle_s, timeout_s, self.busy)

    def close(self) -> None:
        """Withdraw what no one will answer; large sends to a hung worker stay with MPI."""
        super().close()
        for request, _ in self._drains:
            if not request.Test():
                request.Cancel()
        self._drains.clear()


class MessageWorkerLink(WorkerLink):
    """A worker's side, wherever it runs."""

    shares_parameters = False

    def __init__(
        self, comm: MPI.Intracomm, root: int, incarnation: int, layout: Layout, published: Layout
    ) -> None:
        self.layout, self.published = layout, published
        self.gradient = aligned_bytes(layout.size_bytes)
        self.parameters = aligned_bytes(published.size_bytes)
        self._comm, self._root, self._incarnation = comm, root, incarnation
        self._blocks = [layout.view(self.gradient, block) for block in layout.blocks]
        self._targets = [
            published.view(self.parameters, block).view(np.uint8) for block in published.blocks
        ]
        self._inline = inline_bytes(layout)
        self._sends: deque[tuple[MPI.Request, object]] = deque()
        self._receives: deque[MPI.Request] = deque()
        self._replies: dict[int, Reply] = {}
        self._newest, self._coming, self._announced_version = -1, -1, -1
        self._end: End | None = None
        self._idle_s = _SHORTEST_S
        self._inbox = bytearray(REPLY_BYTES)
        self._listen = comm.Recv_init([self._inbox, MPI.BYTE], source=root, tag=Tag.REPLY)
        self._listen.Start()

    def send(self, header: Header) -> None:
        """Post the header, with the gradient behind it if that is small."""
        carries = self._inline if header.kind == Kind.GRADIENT else 0
        buffer = bytearray(HEADER_BYTES + carries)
        header.pack_into(buffer)
        if carries:
            buffer[HEADER_BYTES:] = self.gradient[:carries].tobytes()
        request = self._comm.Isend([buffer, MPI.BYTE], dest=self._root, tag=Tag.HEADER)
        self._sends.append((request, buffer))

    def _poll(self) -> None:
        while self._listen.Test():
            reply = Reply.unpack(self._inbox)
            self._listen.Start()
            self._idle_s = _SHORTEST_S
            self._hear(reply)
        while self._sends and self._sends[0][0].Test():
            self._sends.popleft()
        while self._receives and self._receives[0].Test():
            self._receives.popleft()
            self._idle_s = _SHORTEST_S
        if self._coming >= 0 and not self._receives:
            self._newest, self._coming = self._coming, -1

    def _hear(self, reply: Reply) -> None:
        if reply.incarnation != self._incarnation:
            raise RuntimeError(f"a reply of another run arrived: {reply}")
        if reply.say == ReplyKind.VERDICT:
            self._replies[reply.ordinal] = reply
        elif reply.say == ReplyKind.WANT:
            for block in self._blocks[reply.first : reply.first + reply.blocks]:
                request = self._comm.Isend(
                    [block.view(np.uint8), MPI.BYTE], dest=self._root, tag=Tag.GRADIENT_BLOCK
                )
                self._sends.append((request, block))
        elif reply.say == ReplyKind.BLOCK:
            target = self._targets[reply.first]
            self._receives.append(
                self._comm.Irecv([target, MPI.BYTE], source=self._root, tag=Tag.PARAMETER_BLOCK)
            )
            self._newest = self._coming = -1
        elif reply.say == ReplyKind.PUBLISHED:
            self._coming = reply.newest
        elif reply.say == ReplyKind.BEHIND:
            self._announced_version = reply.newest
        else:
            self._end = End(reply.newest, reply.text)

    def reply(self, ordinal: int) -> Reply | None:
        """The answer, once it has come."""
        self._poll()
        return self._replies.pop(ordinal, None)

    def newest(self) -> int:
        """The version that has been received whole."""
        self._poll()
        return self._newest

    def is_behind(self, version: int) -> bool:
        """Whether the root has said that there is a newer one."""
        self._poll()
        return self._end is not None or self._announced_version > version

    def has_unsent_version(self) -> bool:
        """Whether the root has said that there is a newer one than it has sent."""
        self._poll()
        return self._announced_version > max(self._newest, self._coming)

    def read(self, target: np.ndarray) -> int:
        """Copy what was received."""
        if self.newest() < 0:
            return -1
        np.copyto(target, self.parameters[: target.size])
        return self._newest

    def end(self) -> End | None:
        """How the training ended, once the root has said so."""
        self._poll()
        return self._end

    def wait(self, timeout_s: float) -> None:
        """Sleep a little, longer while nothing comes."""
        self._idle_s = backoff(self._idle_s, timeout_s, bool(self._sends or self._receives))

    def close(self) -> None:
        """Complete the sends; the root receives them all, wanted or not."""
        while self._sends or self._receives:
            self._poll()
            self.wait(_LONGEST_S)
        self._listen.Cancel()
        self._listen.Wait()
        self._listen.Free()
        communicators.give_back(self._comm)


def backoff(idle_s: float, timeout_s: float, busy: bool) -> float:
    """Sleep `idle_s`, and return how long to sleep next time: longer, and short while `busy`.

    The longest sleeps come only after about 50 ms, of which they are a small part.

    While blocks are on their way they move only inside MPI calls, so first the core is offered to others without
    sleeping.
    """
    if busy and idle_s < _PATIENT_S:
        os.sched_yield()
        return idle_s * 1.1
    time.sleep(min(idle_s, timeout_s))
    return min(idle_s * (2 if idle_s < _LONG_S else 1.1), _PATIENT_S if busy else _LONGEST_S)
