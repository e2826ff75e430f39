"""The contract of a transport, and what both of its implementations share.

A worker sends headers by nonblocking MPI messages over either transport; they differ in how the gradient, the reply and
the parameters travel. Who may write what:

    worker → root   header            an MPI message; the worker keeps its buffer until the send has completed
                    gradient          the worker's, from `pull` until `send`; the root's until it has replied
    root → worker   reply             the root's; one per header, quoting its ordinal
                    parameters        the root's; a worker reads them after `newest()` says so
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from mpisync.transport import communicators
from mpisync.transport.layout import Block, Layout
from mpisync.transport.wire import HEADER_BYTES, Header, Kind, Reply, Tag

_KINDS = frozenset(Kind)


@dataclass(frozen=True)
class End:
    """The training is over: at which version, and why if it failed."""

    version: int
    failure: str = ""


class RootLink(abc.ABC):
    """The root's side: one object serves all workers that it reaches the same way."""

    in_pieces: bool  # whether a gradient lies in memory block by block

    def __init__(self, comm: MPI.Intracomm, workers: Iterable[int], incarnation: int) -> None:
        self.workers = tuple(workers)
        self.comm = comm
        self.incarnation = incarnation
        self._buffers = [bytearray(self.header_bytes()) for _ in self.workers]
        self._receives = [
            comm.Recv_init([buffer, MPI.BYTE], source=worker, tag=Tag.HEADER)
            for worker, buffer in zip(self.workers, self._buffers, strict=True)
        ]
        self._open = set(self.workers)
        MPI.Prequest.Startall(self._receives)

    def header_bytes(self) -> int:
        """Bytes of a header message; a transport may append a small gradient."""
        return HEADER_BYTES

    def headers(self) -> list[Header]:
        """Take in the headers that have arrived, in no order that means anything.

        Raises:
            RuntimeError: A header does not fit this run.
        """
        return self._take_in(math.inf)

    def _take_in(self, most: float) -> list[Header]:
        """Take in headers until there are none, or so many that no further one is expected."""
        heard: list[Header] = []
        # Open MPI looks first and moves messages then: what it moved, only a second look shows
        looks = 1 if math.isinf(most) else 2
        while len(heard) < most and self._open and looks:
            ready = MPI.Request.Testsome(self._receives)
            if not ready:
                looks -= 1
                continue
            for index in ready:
                worker = self.workers[index]
                header = Header.unpack(self._buffers[index])
                self._check(worker, header)
                self._received(worker, self._buffers[index])
                heard.append(header)
                if header.kind == Kind.BYE:
                    self._open.discard(worker)
                else:
                    self._receives[index].Start()
        return heard

    def _check(self, worker: int, header: Header) -> None:
        known = header.kind in _KINDS
        if header.incarnation != self.incarnation or header.worker != worker or not known:
            raise RuntimeError(
                f"a header from rank {worker} does not fit this run: {header}; "
                "are two runs mixed on one communicator?"
            )

    def _received(self, worker: int, message: bytearray) -> None:  # noqa: B027 (nothing, by default)
        """Take what else a header message carries."""

    @property
    def unfinished(self) -> list[int]:
        """Workers that have not said their last word."""
        return sorted(self._open)

    @abc.abstractmethod
    def progress(self) -> list[int]:
        """Move what is under way; workers whose asked-for gradient has become whole."""

    @abc.abstractmethod
    def want(self, worker: int) -> bool:
        """Ask for the announced gradient; False while there is no memory for it."""

    @abc.abstractmethod
    def is_whole(self, worker: int) -> bool:
        """Whether every byte of the announced gradient is in this process's reach."""

    @abc.abstractmethod
    def is_moving(self, worker: int, now_s: float) -> bool:
        """Whether the asked-for gradient still makes progress; a stalled one is not waited for."""

    @abc.abstractmethod
    def gradient(self, worker: int, block: Block) -> np.ndarray:
        """The elements of one block of a whole gradient."""

    @abc.abstractmethod
    def release(self, worker: int) -> None:
        """Forget the announced gradient: it was folded, or nobody wants it."""

    @abc.abstractmethod
    def reply(self, worker: int, reply: Reply) -> None:
        """Answer a header."""

    @abc.abstractmethod
    def begin(self, version: int) -> None:
        """Say that the parameters are about to be overwritten by those of `version`."""

    @abc.abstractmethod
    def publish(self, version: int, parameters: np.ndarray) -> None:
        """Make `version` the newest; `parameters` do not change until the next `begin`."""

    @abc.abstractmethod
    def serve(self, worker: int) -> None:
        """Let `worker` have the newest version, unless it has been sent to it already."""

    @abc.abstractmethod
    def end(self, end: End) -> None:
        """Say that the training is over."""

    @abc.abstractmethod
    def flush(self) -> None:
        """Wake whoever waits for what was said since the last flush."""

    @property
    @abc.abstractmethod
    def busy(self) -> bool:
        """Whether something is on its way that only moves inside MPI calls."""

    @abc.abstractmethod
    def wait(self, timeout_s: float, headers: int = 1) -> None:
        """Sleep until a header may have come, at most `timeout_s`.

        Args:
            timeout_s: The longest sleep.
            headers: How many gradients are worth waking for. What cannot wait for others, any other header
                or a gradient that is late or not finite, wakes all the same.
        """

    def close(self) -> None:
        """Withdraw the receives of workers that never said goodbye."""
        for worker, request in zip(self.workers, self._receives, strict=True):
            if worker in self._open:
                request.Cancel()
                request.Wait()
            request.Free()
        self._receives, self._open = [], set()
        communicators.give_back(self.comm)


class WorkerLink(abc.ABC):
    """A worker's side."""

    layout: Layout  # of the gradient
    published: Layout  # of the parameters
    gradient: np.ndarray  # uint8, this worker's to fill between a reply and the next `send`
    parameters: np.ndarray  # uint8, the newest parameters
    shares_parameters: bool  # whether the root writes there while this worker computes

    @abc.abstractmethod
    def send(self, header: Header) -> None:
        """Post a header; the gradient, if it announces one, is the root's until the reply."""

    @abc.abstractmethod
    def reply(self, ordinal: int) -> Reply | None:
        """The answer to message `ordinal`, once it is there."""

    @abc.abstractmethod
    def newest(self) -> int:
        """Newest version that can be read whole now; -1 while it is being overwritten."""

    @abc.abstractmethod
    def is_behind(self, version: int) -> bool:
        """Whether `version` is known to be superseded; costs one memory read where it can."""

    @abc.abstractmethod
    def has_unsent_version(self) -> bool:
        """Whether there is a newer version that comes only to a worker that asks for it."""

    @abc.abstractmethod
    def read(self, target: np.ndarray) -> int:
        """Copy the newest parameters, `target.size` bytes; the version, or -1: try again."""

    @abc.abstractmethod
    def end(self) -> End | None:
        """How the training ended, once it has."""

    @abc.abstractmethod
    def wait(self, timeout_s: float) -> None:
        """Sleep until there may be news, and keep sends moving."""

    @abc.abstractmethod
    def close(self) -> None:
        """Complete every send and give back the memory."""
