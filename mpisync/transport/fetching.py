"""Gradients that stay with their workers until the root asks for them, block by block.

Only a few blocks of a worker are in flight at a time, so that a sender that stalls pins those and not a whole buffer.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable

import numpy as np
from mpi4py import MPI

from mpisync.device.host import HostMemory
from mpisync.transport.backoff import Backoff
from mpisync.transport.base import GradientFetcher
from mpisync.transport.layout import BLOCK_BYTES, Block, Layout
from mpisync.transport.replies import ReplySender
from mpisync.transport.wire import Reply, ReplyKind, Tag

WINDOW = 4  # blocks in flight per worker and direction
STALLED_S = 0.5  # an asked-for gradient without a new block for so long is not waited for
GRADIENTS = 2  # whole gradients that the root can hold beside its sum


class BlockPool:
    """A pool of memory blocks to receive into, at most so many in use at a time.

    A block whose receive cannot be finished, because its sender hangs, is lent out until it does; the pool then makes
    another in its place, so that what hangs costs a few blocks and never a buffer.
    """

    def __init__(self, capacity: int, memory: HostMemory) -> None:
        self.capacity, self._memory = capacity, memory
        self.used = 0
        self._free: list[np.ndarray] = []

    def take(self, count: int) -> list[np.ndarray] | None:
        """Take `count` blocks; return None while there are not so many."""
        if self.used + count > self.capacity:
            return None
        self.used += count
        return [self._free.pop() if self._free else self._memory.allocate(BLOCK_BYTES) for _ in range(count)]

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


class BlockFetcher(GradientFetcher):
    """The root's fetcher, which asks for blocks by replies, and receives them.

    Args:
        comm: The run's communicator.
        workers: Whose gradients.
        incarnation: The run's.
        layout: Of a gradient.
        sender: Sends replies.
        backoff: The root's, to be reset when a block comes.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        workers: Iterable[int],
        incarnation: int,
        layout: Layout,
        sender: ReplySender,
        backoff: Backoff,
        memory: HostMemory,
    ) -> None:
        self._comm, self._incarnation, self._layout = comm, incarnation, layout
        self._sender, self._backoff = sender, backoff
        self._pool = BlockPool(GRADIENTS * len(layout.blocks), memory)
        self._sizes = [layout.block_bytes(block) for block in layout.blocks]
        self._places = {block: i for i, block in enumerate(layout.blocks)}
        self._incoming = {w: Incoming(w) for w in workers}
        self._drains: list[tuple[MPI.Request, np.ndarray]] = []  # what comes of gradients that nobody wants any more

    @property
    def is_busy(self) -> bool:
        """Whether blocks are on their way."""
        return any(incoming.receives for incoming in self._incoming.values())

    def take_inline(self, worker: int, gradient: np.ndarray) -> None:
        """Take a small gradient that came with its header."""
        self._incoming[worker].inline = gradient

    def want(self, worker: int) -> bool:
        """Ask for the first blocks of a gradient, if there is memory for them all."""
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
            request = self._comm.Irecv([buffer, MPI.BYTE], incoming.worker, Tag.GRADIENT_BLOCK)
            incoming.receives.append((request, incoming.blocks[index]))
        self._sender.send(
            incoming.worker, Reply(self._incarnation, ReplyKind.WANT, first=incoming.asked, blocks=count)
        )
        incoming.asked += count

    def progress(self) -> list[int]:
        """Receive blocks, and ask for as many further ones."""
        return [
            incoming.worker
            for incoming in self._incoming.values()
            if incoming.receives and self._receive(incoming)
        ]

    def _receive(self, incoming: Incoming) -> bool:
        done = 0
        while incoming.receives and incoming.receives[0][0].Test():
            incoming.receives.popleft()
            done += 1
        if done:
            self._backoff.reset()
            incoming.received += done
            incoming.moved_s = time.monotonic()
            self._ask(incoming, done)
        return self.is_whole(incoming.worker)

    def is_whole(self, worker: int) -> bool:
        """Say whether the gradient's last block is in."""
        incoming = self._incoming[worker]
        if incoming.inline is not None:
            return True
        return incoming.is_asked_for and incoming.received == len(self._sizes)

    def is_moving(self, worker: int, now_s: float) -> bool:
        """Say whether a block came in lately."""
        return self.is_whole(worker) or now_s - self._incoming[worker].moved_s < STALLED_S

    def block(self, worker: int, block: Block) -> np.ndarray:
        """Return the elements of a block where they were received."""
        incoming = self._incoming[worker]
        if incoming.inline is not None:
            inline: np.ndarray = self._layout.view(incoming.inline, block)
            return inline
        index = self._places[block]
        raw = incoming.blocks[index][: self._sizes[index]]
        return raw if block.segment < 0 else raw.view(self._layout.segments[block.segment].dtype.storage)

    def release(self, worker: int) -> None:
        """Give back a gradient's blocks; those that its sender still owes are received and thrown away."""
        incoming = self._incoming[worker]
        owed = [block for _, block in incoming.receives]
        self._drains += incoming.receives
        self._pool.abandon(owed)
        held = {id(block) for block in owed}
        self._pool.give(block for block in incoming.blocks if id(block) not in held)
        self._incoming[worker] = Incoming(worker)

    def drain(self) -> None:
        """Throw away the blocks that have come of gradients that nobody wants any more."""
        if self._drains:
            self._drains = [drain for drain in self._drains if not drain[0].Test()]

    def close(self) -> None:
        """Withdraw the receives that no one will answer."""
        for request, _ in self._drains:
            if not request.Test():
                request.Cancel()
        self._drains.clear()
