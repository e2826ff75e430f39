"""Transport through memory shared on a node: only the header travels, as an MPI message.

The root owns the *board*: parameters, versions and replies. Each worker owns its *slot*: one gradient. Words of the
board that one side polls are written with release and read with acquire; the pairs are

    SEQUENCES[r]  root: `begin`, `publish`     worker: `newest`, `is_behind`, `read`   (a seqlock around buffer r)
    NEWEST        root: `publish`              worker: `newest`
    STATE         root: `end`                  worker: `end`
    LOOPS         root: `pause`                worker: `pause`
    KEPT          root: `keep`                 worker: `take_final`
    taken         worker: `take_final`         root: `keep`
    answered      root: `reply`                worker: `reply`
    BELL          worker: `send`, an atomic add for every header        root: `headers`, `wait`
    WAKE_AT       root: `wait`, the ring to be woken at                 worker: `send`
    WAKE          worker: `send` (an atomic add, then a futex wake)     root: `wait`
    NEWS          root: every write above      worker: `wait`

and the slot is handed over by the header itself.

The root sleeps on WAKE, and no header waits for it in vain: a worker rings, then looks at WAKE_AT and whether it is
late; the root writes WAKE_AT or publishes, then looks at BELL; a fence lies between on both sides, so one of them
sees the other.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection

import numpy as np
from mpi4py import MPI

from mpisync.device.base import Array, Memory, Shared, aligned
from mpisync.kernels.atomics import fence, fetch_add, load_acquire, store_release
from mpisync.transport import communicators
from mpisync.transport.base import End, Pause, RootLink, WorkerLink
from mpisync.transport.futex import Futex
from mpisync.transport.headers import HeaderReceiver
from mpisync.transport.layout import Block, Layout
from mpisync.transport.wire import HEADER_BYTES, REPLY_BYTES, Header, Kind, Reply, Tag

_PAGE = 4096
_NEWEST, _STATE, _FINAL, _SEQUENCES = 0, 8, 16, 24  # int64 words, on cache lines of their own
_LOOPS, _PAUSED, _KEPT = 32, 33, 34  # int64 words, rarely written
_ADDRESS, _ADDRESS_BYTES = 2304, 512  # of the memory that keeps a loop's last version
_BELL, _NEWS, _WAKE, _WAKE_AT = 512, 528, 544, 560  # uint32 words, likewise
_FAILURE, _FAILURE_BYTES = 3072, 1024
_LINE_BYTES = 64 + aligned(REPLY_BYTES)
_RUNNING, _ENDED = 0, 1
_MASK = 0xFFFFFFFF
_SPIN_S, _PATIENT_S, _LONGEST_S = 20e-6, 1e-3, 5e-3


class Board:
    """The root's shared memory as both sides see it."""

    def __init__(self, memory: Shared, versions: Shared, workers: int, published: Layout, buffers: int) -> None:
        raw = memory.bytes
        self.memory, self.versions = memory, versions
        self.buffers = buffers
        self.words = raw[:_PAGE].view(np.int64)
        self.bells = raw[:_PAGE].view(np.uint32)
        self.failure = raw[_FAILURE : _FAILURE + _FAILURE_BYTES]
        self.lines = raw[_PAGE : _PAGE + workers * _LINE_BYTES].reshape(workers, _LINE_BYTES)
        self.answered, self.taken = self.lines.view(np.int64)[:, 0], self.lines.view(np.int64)[:, 1]
        self.address = raw[_ADDRESS : _ADDRESS + _ADDRESS_BYTES]
        stride = aligned(published.size_bytes, _PAGE)
        self.parameters = [versions.bytes[i * stride : i * stride + published.size_bytes] for i in range(buffers)]

    @staticmethod
    def size_bytes(workers: int) -> int:
        """Return how many bytes of the host's memory a board takes, beside the parameters."""
        return _PAGE + workers * _LINE_BYTES

    @staticmethod
    def versions_bytes(published: Layout, buffers: int) -> int:
        """Return how many bytes the versions of the parameters take."""
        return buffers * aligned(published.size_bytes, _PAGE)

    def protect(self) -> None:
        """Make the parameters read-only for this process, a worker, which writes nothing but the bell."""
        self.versions.protect(0)

    def news(self) -> Futex:
        """Return the futex that workers sleep on."""
        return Futex(self.bells, _NEWS)

    def wake(self) -> Futex:
        """Return the futex that the root sleeps on."""
        return Futex(self.bells, _WAKE)


class SharedRootLink(RootLink):
    """The root's side for the workers that share its memory."""

    is_contiguous = True

    def __init__(
        self,
        comm: MPI.Intracomm,
        incarnation: int,
        layout: Layout,
        board: Board,
        slots: dict[int, Shared],
        memory: Memory,
    ) -> None:
        self.name, self.workers = memory.way, tuple(slots)
        self.layout = layout
        self.board = board
        self._receiver = HeaderReceiver(comm, self.workers, incarnation, memory)
        self._slots = slots
        self._memory = memory
        self._news, self._wake = board.news(), board.wake()
        self._heard = 0
        self._woken = 0  # WAKE when it was last read
        self._is_due = True  # to hear all that have rung, however few
        self._missed = -1  # the ring after which MPI was looked into and showed too few headers
        self._idle_s = _SPIN_S
        self._told = True
        self._version = -1
        self._pause: Pause | None = None  # since the last `keep`
        self._kept: Shared | None = None

    def home(self) -> Array | None:
        """Return the board's parameters where they are kept once; else None."""
        return self.board.parameters[0] if self.board.buffers == 1 else None

    def _rung(self) -> int:
        """Return how many rings there were whose headers were not taken in."""
        return (load_acquire(self.board.bells, _BELL) - self._heard) & _MASK

    def headers(self) -> list[Header]:
        """Take in the headers that have arrived; without a ring there is none to look for."""
        rung = self._rung()
        if not rung:
            return []
        heard = self._receiver.take(rung)
        self._heard = (self._heard + len(heard)) & _MASK
        if heard:
            self._missed = -1
        return heard

    def gradient(self, worker: int, block: Block) -> Array:
        """Return a view of the worker's slot."""
        return self.layout.view(self._slots[worker].bytes, block)

    def reply(self, worker: int, reply: Reply) -> None:
        """Write the worker's line of the board."""
        reply.pack_into(self.board.lines[worker].data, 64)
        store_release(self.board.answered, worker, reply.ordinal)
        self._told = False

    def begin(self, version: int) -> None:
        """Make the buffer that will hold `version` unreadable until `publish`."""
        index = version % self.board.buffers
        store_release(self.board.words, _SEQUENCES + index, 2 * version - 1)
        fence()

    def publish(self, version: int, parameters: Array) -> None:
        """Copy the parameters to the board, unless they live there, and turn the version."""
        index, memory = version % self.board.buffers, self._memory
        target = self.board.parameters[index]
        if memory.address(target) != memory.address(parameters):
            memory.copy(parameters, target)
        memory.finish()
        store_release(self.board.words, _SEQUENCES + index, 2 * version)
        store_release(self.board.words, _NEWEST, version)
        self._version = version
        self._told = False
        self._is_due = True  # who rang before may be late now, and could not know

    def pause(self, pause: Pause) -> None:
        """Write at which version, then how many loops are over: workers read that version where it is."""
        self._pause = pause
        self.board.words[_PAUSED] = pause.version
        store_release(self.board.words, _LOOPS, pause.loops)
        self._told = False

    def has_unsent(self, worker: int) -> bool:
        """Say whether `worker` has not copied the version of the pause yet."""
        return self._pause is not None and load_acquire(self.board.taken, worker) < self._pause.loops

    def keep(self, living: Collection[int]) -> None:
        """Copy the version of the last pause to memory of its own, if anyone still needs it; else drop the one before.

        KEPT tells of which pause it is; negative where there is none, for want of memory or of need. Whoever is late
        then gets a newer version.
        """
        if self._pause is None:
            return
        late = [worker for worker in self.workers if worker in living and self.has_unsent(worker)]
        loops, self._pause, source = self._pause.loops, None, self.board.parameters[self._version % self.board.buffers]
        store_release(self.board.words, _KEPT, -loops)
        if self._kept is not None:
            self._kept.close()
            self._kept = None
        if not late or self.board.memory.is_file:  # a file would outlive this process, if that were killed
            return
        try:
            self._kept = self._memory.share(source.nbytes)
        except OSError:
            return
        self._memory.copy(source, self._kept.bytes)
        self._memory.finish()
        text = self._kept.address.encode()
        self.board.address[:] = 0
        self.board.address[: len(text)] = np.frombuffer(text, np.uint8)
        store_release(self.board.words, _KEPT, loops)

    def end(self, end: End) -> None:
        """Write why the training ended, then the state."""
        text = end.failure.encode()[: _FAILURE_BYTES - 1]
        self.board.failure[: len(text)] = np.frombuffer(text, np.uint8)
        self.board.words[_FINAL] = end.version
        store_release(self.board.words, _STATE, _ENDED)
        self._told = False

    def flush(self) -> None:
        """Wake the workers once for all that was written."""
        if not self._told:
            fetch_add(self.board.bells, _NEWS, 1)
            self._news.wake()
            self._told = True

    def wait(self, timeout_s: float, headers: int = 1) -> None:
        """Sleep until `headers` workers have rung, or one that cannot wait."""
        woken = load_acquire(self.board.bells, _WAKE)
        store_release(self.board.bells, _WAKE_AT, (self._heard + headers) & _MASK)
        fence()  # pairs with the worker's in `send`
        rung = self._rung()
        self._is_due = rung > 0 and (self._is_due or woken != self._woken)
        self._woken = woken
        ring = (self._heard + rung) & _MASK
        if rung < headers and not self._is_due:
            self._wake.wait(woken, timeout_s)
        elif ring == self._missed:  # longer and longer: who rang may be stopped before its header is out
            time.sleep(min(self._idle_s, timeout_s))
            self._idle_s = min(2 * self._idle_s, _LONGEST_S)
        else:  # MPI may show a header only to the second look after its coming: look before a sleep
            self._missed, self._idle_s = ring, _SPIN_S

    def close(self) -> None:
        """Give back the receives and the memory."""
        self._receiver.close()
        kept = [self._kept] if self._kept else []
        for shared in (self.board.memory, self.board.versions, *self._slots.values(), *kept):
            shared.close()
        # pages go with the last array that looks into them, and others may know this link for longer
        del self.board, self._slots, self._news, self._wake


class SharedWorkerLink(WorkerLink):
    """A worker's side, on the root's node."""

    shares_parameters = True

    def __init__(
        self,
        comm: MPI.Intracomm,
        root: int,
        layout: Layout,
        published: Layout,
        board: Board,
        slot: Shared,
        memory: Memory,
        own: Memory,
    ) -> None:
        self.layout, self.published = layout, published
        self.memory, self._own = memory, own
        self.gradient = slot.bytes
        self.parameters = board.parameters[0]
        self._comm, self._root, self._worker = comm, root, comm.rank
        self._board, self._slot = board, slot
        host = (slot.bytes, board.versions.bytes) if memory.is_host else ()
        self._unpin = [own.pin(array) for array in host]  # for copies from and to a device
        self._news, self._wake = board.news(), board.wake()
        self._seen = 0
        self._unfinished: list[tuple[MPI.Prequest, bytearray]] = []
        self._prepare()
        # with a core to spare a short look costs less than the sleep and wake that it saves
        self._spin_s = _SPIN_S if len(os.sched_getaffinity(0)) > comm.size else 0.0

    def _prepare(self) -> None:
        self._header = bytearray(HEADER_BYTES)
        self._send = self._comm.Send_init([self._header, MPI.BYTE], self._root, Tag.HEADER)

    def send(self, header: Header) -> None:
        """Post the header, then ring."""
        if not self._send.Test():  # its buffer is MPI's still: this one takes another
            self._unfinished.append((self._send, self._header))
            self._prepare()
        header.pack_into(self._header)
        if header.kind == Kind.GRADIENT:
            self._own.finish()  # every byte of it is there
        elif header.kind == Kind.BYE and not self.memory.is_host:
            self._let_go()  # the root gives a device's memory back when it has heard this
        bells = self._board.bells
        # first the ring: a header that is heard before its ring would leave the root one ring behind for good, if
        # this process were stopped between the two
        ring = fetch_add(bells, _BELL, 1) + 1
        self._send.Start()
        fence()  # pairs with the root's in `wait`
        is_due = (ring - load_acquire(bells, _WAKE_AT)) & _MASK <= _MASK >> 1
        if is_due or header.kind != Kind.GRADIENT or header.info.peak == math.inf or self.is_behind(header.version):
            fetch_add(bells, _WAKE, 1)
            self._wake.wake()

    def protect(self) -> bool:
        """Make the parameters read-only: a write to them is a segmentation fault."""
        self._board.protect()
        return True

    def reply(self, ordinal: int) -> Reply | None:
        """Read this worker's line."""
        if load_acquire(self._board.answered, self._worker) < ordinal:
            return None
        return Reply.unpack(self._board.lines[self._worker].data, 64)

    def newest(self) -> int:
        """Read the newest version and the lock of its buffer."""
        words = self._board.words
        version = load_acquire(words, _NEWEST)
        lock = load_acquire(words, _SEQUENCES + version % self._board.buffers)
        return version if lock == 2 * version else -1

    def is_behind(self, version: int) -> bool:
        """Say whether `version` is superseded, by one read: of the only buffer's lock, else of the newest version."""
        if self._board.buffers == 1:
            return load_acquire(self._board.words, _SEQUENCES) != 2 * version
        return load_acquire(self._board.words, _NEWEST) > version

    def read(self, target: Array) -> int:
        """Copy the newest parameters, then make sure that they were not overwritten meanwhile."""
        version = self.newest()
        if version < 0:
            return -1
        index = version % self._board.buffers
        self._own.copy(self._board.parameters[index][: target.size], target)
        self._own.finish()
        fence()
        return version if self._board.words[_SEQUENCES + index] == 2 * version else -1

    def end(self) -> End | None:
        """Read the state, then why the training ended."""
        if load_acquire(self._board.words, _STATE) == _RUNNING:
            return None
        text = self._board.failure.tobytes().split(b"\0", 1)[0].decode(errors="replace")
        return End(int(self._board.words[_FINAL]), text)

    def loops(self) -> int:
        """Read how many loops are over."""
        return load_acquire(self._board.words, _LOOPS)

    def pause(self) -> Pause:
        """Read how many loops are over, and at which version the last of them was."""
        while True:
            pause = Pause(self.loops(), int(self._board.words[_PAUSED]))
            fence()
            if self.loops() == pause.loops:
                return pause

    def take_final(self, target: Array) -> int:
        """Copy the version from where it was published, or from where it is kept since."""
        pause = self.pause()
        version = self.read(target)
        if version != pause.version:
            kept = load_acquire(self._board.words, _KEPT)
            if kept == pause.loops:
                version = pause.version if self._read_kept(target, kept) else -1
            elif kept != -pause.loops:  # it is about to be
                version = -1
        if version >= 0:
            store_release(self._board.taken, self._worker, pause.loops)
        return version

    def _read_kept(self, target: Array, kept: int) -> bool:
        address = self._board.address.tobytes().split(b"\0", 1)[0].decode()
        try:
            shared = self.memory.attach(address)
        except OSError:  # another pause has come
            return False
        self._own.copy(shared.bytes[: target.size], target)
        self._own.finish()
        shared.close()
        fence()
        return load_acquire(self._board.words, _KEPT) == kept

    def wait(self, timeout_s: float) -> None:
        """Sleep until the root has written something since the last look."""
        if not self._send.Test():  # it moves only inside MPI calls
            timeout_s = min(timeout_s, _PATIENT_S)
        give_up = time.monotonic() + self._spin_s
        while load_acquire(self._board.bells, _NEWS) == self._seen:
            if time.monotonic() >= give_up:
                self._news.wait(self._seen, timeout_s)
                break
        self._seen = load_acquire(self._board.bells, _NEWS)

    def close(self) -> None:
        """Complete the sends and unmap."""
        for send, _ in [*self._unfinished, (self._send, self._header)]:
            send.Wait()
            send.Free()
        communicators.give_back(self._comm)
        self._let_go()
        self._board.memory.close()

    def _let_go(self) -> None:
        """Let go of the gradient's and the parameters' memory."""
        for unpin in self._unpin:
            unpin()
        self._unpin = []
        self.gradient = self.parameters = np.empty(0, np.uint8)
        self._board.parameters = []
        self._slot.close()
        self._board.versions.close()
