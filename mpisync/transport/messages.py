"""Transport by MPI messages in host memory: for workers that share no memory with the root.

A small gradient rides in its header's message. A large one stays with the worker until the root asks for it, block by
block with a few blocks in flight, so a late gradient costs no bandwidth and a sender that stalls pins a few blocks and
not a whole buffer. Parameters go the other way in the same manner, from a snapshot that outlives its sends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np
from mpi4py import MPI

from mpisync.device.base import Array, Memory
from mpisync.device.host import HostMemory
from mpisync.transport import communicators
from mpisync.transport.backoff import LONGEST_S, Backoff
from mpisync.transport.base import End, Pause, RootLink, WorkerLink
from mpisync.transport.fetching import WINDOW, BlockFetcher
from mpisync.transport.headers import HeaderReceiver
from mpisync.transport.layout import Block, Layout
from mpisync.transport.replies import ReplySender
from mpisync.transport.wire import HEADER_BYTES, REPLY_BYTES, Header, Kind, Reply, ReplyKind, Tag

INLINE_BYTES = 16 << 10


def inline_bytes(layout: Layout) -> int:
    """Return how many bytes of gradient ride in the header's message."""
    return layout.size_bytes if layout.size_bytes <= INLINE_BYTES else 0


class Outgoing:
    """Parameter blocks on their way to one worker."""

    def __init__(self) -> None:
        self.version = -1  # what is being sent
        self.snapshot: list[np.ndarray] = []
        self.next = 0
        self.is_told = True  # that there is a newer version than the one it computes on
        self.is_final = False  # whether it is the last version of a loop, sent unasked
        self.sends: deque[tuple[MPI.Request, object]] = deque()


class MessageRootLink(RootLink):
    """The root's side for the workers that it reaches by messages only."""

    name = "messages"
    is_contiguous = False

    def __init__(
        self,
        comm: MPI.Intracomm,
        workers: Iterable[int],
        incarnation: int,
        layout: Layout,
        published: Layout,
        memory: HostMemory,
        *,
        finish_old_versions: bool,
    ) -> None:
        self.workers = tuple(workers)
        self._comm, self._incarnation, self._published = comm, incarnation, published
        self._finish_old_versions = finish_old_versions  # a version is sent to its end even when there is a newer one
        self._outgoing = {w: Outgoing() for w in self.workers}
        self._version, self._parameters = -1, np.empty(0, np.uint8)
        self._snapshot: list[np.ndarray] = []
        self._backoff = Backoff()
        self._inline = inline_bytes(layout)
        self._sender = ReplySender(comm, self.workers)
        self._receiver = HeaderReceiver(comm, self.workers, incarnation, memory, gradient_bytes=self._inline)
        self.fetcher: BlockFetcher = BlockFetcher(
            comm, self.workers, incarnation, layout, self._sender, self._backoff, memory
        )

    def home(self) -> None:
        """Return None: workers have copies of their own."""

    # -- headers and gradients ---------------------------------------------------------------------

    def headers(self) -> list[Header]:
        """Take in the headers that have arrived, and move what is being sent."""
        heard = self._receiver.take()
        for header in heard:
            self._backoff.reset()
            outgoing = self._outgoing[header.worker]
            outgoing.is_told = True  # it waits for its reply: nothing to hurry
            if header.kind == Kind.GRADIENT and self._inline:
                self.fetcher.take_inline(header.worker, self._receiver.gradients.pop(header.worker))
            elif header.kind == Kind.BYE:
                outgoing.snapshot = []  # it listens to nothing more
        for worker, outgoing in self._outgoing.items():
            if outgoing.sends or outgoing.snapshot:
                self._send_blocks(worker, outgoing)
        self._sender.progress()
        self.fetcher.drain()
        return heard

    def gradient(self, worker: int, block: Block) -> np.ndarray:
        """Return the block's elements where they were received."""
        return self.fetcher.block(worker, block)

    # -- replies and parameters --------------------------------------------------------------------

    def reply(self, worker: int, reply: Reply) -> None:
        """Answer a header."""
        self._sender.send(worker, reply)

    def publish(self, version: int, parameters: np.ndarray) -> None:
        """Remember what to send; workers still computing hear once that they are behind."""
        self._version, self._parameters, self._snapshot = version, parameters, []
        for worker, outgoing in self._outgoing.items():
            if outgoing.snapshot and not self._finish_old_versions:
                self.serve(worker)  # from the start: the version under way could only be late
            elif worker in self._receiver.open and not outgoing.is_told:
                outgoing.is_told = True
                self._sender.send(worker, Reply(self._incarnation, ReplyKind.BEHIND, newest=version))

    def serve(self, worker: int) -> None:
        """Send the newest version, from a snapshot that lasts as long as its sends."""
        outgoing = self._outgoing[worker]
        outgoing.is_told = False
        if outgoing.version == self._version or worker not in self._receiver.open:
            return
        if not self._snapshot:
            views = (self._published.view(self._parameters, b) for b in self._published.blocks)
            self._snapshot = [view.view(np.uint8).copy() for view in views]
        outgoing.version, outgoing.snapshot, outgoing.next = self._version, self._snapshot, 0
        outgoing.is_final = False
        self._send_blocks(worker, outgoing)

    def _send_blocks(self, worker: int, outgoing: Outgoing, window: int = WINDOW) -> None:
        while outgoing.sends and outgoing.sends[0][0].Test():
            outgoing.sends.popleft()
            self._backoff.reset()
        while outgoing.snapshot and len(outgoing.sends) < window:
            index, block = outgoing.next, outgoing.snapshot[outgoing.next]
            self._sender.send(
                worker, Reply(self._incarnation, ReplyKind.BLOCK, newest=outgoing.version, first=index)
            )
            request = self._comm.Isend([block, MPI.BYTE], dest=worker, tag=Tag.PARAMETER_BLOCK)
            outgoing.sends.append((request, block))
            outgoing.next += 1
            if outgoing.next == len(outgoing.snapshot):
                self._sender.send(worker, Reply(self._incarnation, ReplyKind.PUBLISHED, newest=outgoing.version))
                outgoing.snapshot = []

    def pause(self, pause: Pause) -> None:
        """Send everyone the last version of the loop, unasked: the root may not come by here again for long."""
        for worker in list(self._receiver.open):
            outgoing = self._outgoing[worker]
            self._send_blocks(worker, outgoing)
            if not (outgoing.is_final and outgoing.sends):  # else it is more than a loop late, and has one to come
                self.serve(worker)
                self._send_blocks(worker, outgoing, window=len(outgoing.sends) + len(outgoing.snapshot))
                outgoing.is_final = True
            self._sender.send(
                worker, Reply(self._incarnation, ReplyKind.PAUSE, newest=pause.version, first=pause.loops)
            )

    def has_unsent(self, worker: int) -> bool:
        """Say whether parts of a version are still on their way."""
        outgoing = self._outgoing[worker]
        return bool(outgoing.sends or outgoing.snapshot)

    def end(self, end: End) -> None:
        """Tell every worker that the training is over."""
        for worker in self._receiver.open:
            self._sender.send(
                worker, Reply(self._incarnation, ReplyKind.END, newest=end.version, text=end.failure)
            )

    def wait(self, timeout_s: float, headers: int = 1) -> None:
        """Sleep a little, longer while nothing comes."""
        is_busy = self.fetcher.is_busy or any(o.sends or o.snapshot for o in self._outgoing.values())
        self._backoff.sleep(timeout_s, busy=is_busy)

    def close(self) -> None:
        """Withdraw the receives that no one will answer; large sends to a hung worker stay with MPI."""
        self._receiver.close()
        self.fetcher.close()


class MessageWorkerLink(WorkerLink):
    """A worker's side, wherever it runs."""

    shares_parameters = False

    def __init__(
        self,
        comm: MPI.Intracomm,
        root: int,
        incarnation: int,
        layout: Layout,
        published: Layout,
        memory: HostMemory,
        own: Memory,
    ) -> None:
        self.layout, self.published = layout, published
        self.memory, self._own = memory, own
        self.gradient = memory.allocate(layout.size_bytes)
        self.parameters = memory.allocate(published.size_bytes)
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
        self._held: deque[Reply] = deque()  # of a version that was sent unasked, until the worker wants it
        self._end: End | None = None
        self._pause = Pause(0, -1)
        self._backoff = Backoff()
        self._inbox = bytearray(REPLY_BYTES)
        self._listen = comm.Recv_init([self._inbox, MPI.BYTE], source=root, tag=Tag.REPLY)
        self._listen.Start()

    def send(self, header: Header) -> None:
        """Post the header, with the gradient behind it if that is small."""
        carries = 0
        if header.kind == Kind.GRADIENT:
            carries = self._inline
            self._own.finish()  # what was copied there is there
        buffer = bytearray(HEADER_BYTES + carries)
        header.pack_into(buffer)
        if carries:
            buffer[HEADER_BYTES:] = self.gradient[:carries].tobytes()
        request = self._comm.Isend([buffer, MPI.BYTE], dest=self._root, tag=Tag.HEADER)
        self._sends.append((request, buffer))

    def _poll(self, *, receives: bool = False) -> None:
        """Hear what the root has said.

        Args:
            receives: Whether the parameters may be overwritten by a version that is coming.
        """
        while receives and self._held:
            self._take(self._held.popleft())
        while self._listen.Test():
            reply = Reply.unpack(self._inbox)
            self._listen.Start()
            self._backoff.reset()
            if reply.kind not in (ReplyKind.BLOCK, ReplyKind.PUBLISHED):
                self._hear(reply)
            elif receives:
                self._take(reply)
            else:
                self._held.append(reply)
        while self._sends and self._sends[0][0].Test():
            self._sends.popleft()
        while self._receives and self._receives[0].Test():
            self._receives.popleft()
            self._backoff.reset()
        if self._coming >= 0 and not self._receives:
            self._newest, self._coming = self._coming, -1

    def _hear(self, reply: Reply) -> None:
        if reply.incarnation != self._incarnation:
            raise RuntimeError(f"a reply of another run arrived: {reply}")
        if reply.kind == ReplyKind.VERDICT:
            self._replies[reply.ordinal] = reply
        elif reply.kind == ReplyKind.WANT:
            for block in self._blocks[reply.first : reply.first + reply.blocks]:
                request = self._comm.Isend(
                    [block.view(np.uint8), MPI.BYTE], dest=self._root, tag=Tag.GRADIENT_BLOCK
                )
                self._sends.append((request, block))
        elif reply.kind == ReplyKind.BEHIND:
            self._announced_version = reply.newest
        elif reply.kind == ReplyKind.PAUSE:
            self._pause = Pause(reply.first, reply.newest)
        else:
            self._end = End(reply.newest, reply.text)

    def _take(self, reply: Reply) -> None:
        """Receive a block of a version, or take note that there are no more."""
        if reply.kind == ReplyKind.PUBLISHED:
            self._coming = reply.newest
            return
        target = self._targets[reply.first]
        self._receives.append(self._comm.Irecv([target, MPI.BYTE], source=self._root, tag=Tag.PARAMETER_BLOCK))
        self._newest = self._coming = -1

    def reply(self, ordinal: int) -> Reply | None:
        """Return the answer, once it has come."""
        self._poll()
        reply = self._replies.pop(ordinal, None)
        if reply is not None:
            self._replies.clear()  # answers to earlier headers, which nobody waited for
        return reply

    def newest(self) -> int:
        """Return the version that has been received whole."""
        self._poll(receives=True)
        return self._newest

    def is_behind(self, version: int) -> bool:
        """Say whether the root has told of a newer version."""
        self._poll()
        return self._end is not None or self._announced_version > version

    def has_unsent_version(self) -> bool:
        """Say whether the root has told of a newer version than it has sent."""
        self._poll()
        return self._announced_version > max(self._newest, self._coming)

    def read(self, target: Array) -> int:
        """Copy the parameters that were received."""
        if self.newest() < 0:
            return -1
        self._own.copy(self.parameters[: target.size], target)
        self._own.finish()
        return self._newest

    def end(self) -> End | None:
        """Return how the training ended, once the root has said so."""
        self._poll()
        return self._end

    def loops(self) -> int:
        """Return how many loops are over, as far as the root has told."""
        self._poll()
        return self._pause.loops

    def pause(self) -> Pause:
        """Return the newest end of a loop that the root has told of."""
        return self._pause

    def take_final(self, target: Array) -> int:
        """Copy the version that was sent before the pause was told."""
        return self.read(target)

    def wait(self, timeout_s: float) -> None:
        """Sleep a little, longer while nothing comes."""
        self._backoff.sleep(timeout_s, busy=bool(self._sends or self._receives))

    def close(self) -> None:
        """Complete the sends; the root receives them all, wanted or not, and so does this side what was sent unasked.

        What was left would be taken for a message of the next run on this communicator.
        """
        self._poll(receives=True)
        while self._sends or self._receives:
            self.wait(LONGEST_S)
            self._poll(receives=True)
        self._listen.Cancel()
        self._listen.Wait()
        self._listen.Free()
        communicators.give_back(self._comm)
