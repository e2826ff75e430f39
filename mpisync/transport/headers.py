"""The root's receives of headers, for transports whose headers are MPI messages."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from mpi4py import MPI

from mpisync.device.base import Memory
from mpisync.transport import communicators
from mpisync.transport.wire import HEADER_BYTES, Header, Kind, Tag

_KINDS = frozenset(Kind)


class HeaderReceiver:
    """The receiver of headers, by one persistent receive a worker.

    Args:
        comm: The run's communicator, given back by `close`.
        workers: Who sends.
        incarnation: The run's.
        memory: Where gradients lie.
        gradient_bytes: Of the gradient that a header which announces one has behind it; 0 where it comes another way.

    Attributes:
        open: Workers that have not said their last word.
        gradients: Those that came with headers, by worker.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        workers: Sequence[int],
        incarnation: int,
        memory: Memory,
        *,
        gradient_bytes: int = 0,
    ) -> None:
        self.open = set(workers)
        self.gradients: dict[int, np.ndarray] = {}
        self._comm, self._workers, self._incarnation = comm, workers, incarnation
        self._memory, self._gradient_bytes = memory, gradient_bytes
        self._buffers = [bytearray(HEADER_BYTES + gradient_bytes) for _ in workers]
        self._receives = [
            comm.Recv_init([buffer, MPI.BYTE], source=worker, tag=Tag.HEADER)
            for worker, buffer in zip(workers, self._buffers, strict=True)
        ]
        MPI.Prequest.Startall(self._receives)

    def take(self, most: float = math.inf) -> list[Header]:
        """Take in headers until there are none, or so many that no further one is expected.

        Raises:
            RuntimeError: A header does not fit this run.
        """
        heard: list[Header] = []
        # Open MPI looks first and moves messages then: what it moved, only a second look shows
        looks = 1 if math.isinf(most) else 2
        while len(heard) < most and self.open and looks:
            ready = MPI.Request.Testsome(self._receives)
            if not ready:
                looks -= 1
                continue
            for index in ready:
                worker = self._workers[index]
                header = Header.unpack(self._buffers[index])
                self._check(worker, header)
                if self._gradient_bytes and header.kind == Kind.GRADIENT:
                    self.gradients[worker] = self._memory.allocate(self._gradient_bytes)
                    self.gradients[worker][:] = np.frombuffer(self._buffers[index], np.uint8)[HEADER_BYTES:]
                heard.append(header)
                if header.kind == Kind.BYE:
                    self.open.discard(worker)
                else:
                    self._receives[index].Start()
        return heard

    def _check(self, worker: int, header: Header) -> None:
        known = header.kind in _KINDS
        if header.incarnation != self._incarnation or header.worker != worker or not known:
            raise RuntimeError(
                f"a header from rank {worker} does not fit this run: {header}; "
                "are two runs mixed on one communicator?"
            )

    def close(self) -> None:
        """Withdraw the receives of workers that never said goodbye, and give back the communicator."""
        for worker, request in zip(self._workers, self._receives, strict=True):
            if worker in self.open:
                request.Cancel()
                request.Wait()
            request.Free()
        self._workers, self._receives, self.open = (), [], set()
        communicators.give_back(self._comm)
