"""The root's replies, for transports whose replies are MPI messages."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from mpi4py import MPI

from mpisync.transport.wire import REPLY_BYTES, Reply, Tag


class ReplySender:
    """A sender of replies that does not wait for their arrival, and keeps each one's buffer as long as MPI needs it."""

    def __init__(self, comm: MPI.Intracomm, workers: Iterable[int]) -> None:
        self._comm = comm
        self._sends: dict[int, deque[tuple[MPI.Request, bytearray]]] = {worker: deque() for worker in workers}

    def send(self, worker: int, reply: Reply) -> None:
        """Send a reply behind those before it."""
        buffer = bytearray(REPLY_BYTES)
        reply.pack_into(buffer)
        request = self._comm.Isend([buffer, MPI.BYTE], dest=worker, tag=Tag.REPLY)
        self._sends[worker].append((request, buffer))

    def progress(self) -> None:
        """Let go of the buffers of replies that have arrived."""
        for sends in self._sends.values():
            while sends and sends[0][0].Test():
                sends.popleft()
