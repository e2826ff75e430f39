"""A rank's part in a run, once all have met: the root or a worker, connected to its other side."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from typing import Any

from mpi4py import MPI

from mpisync import settings
from mpisync.aggregation.late_work import LateWork
from mpisync.aggregation.root import Root
from mpisync.aggregation.worker import Worker
from mpisync.device.base import Memory
from mpisync.device.host import HostMemory
from mpisync.kernels.fold import warm
from mpisync.policies import Policy
from mpisync.transport.connect import connect
from mpisync.transport.layout import Layout
from mpisync.transport.mapping import Run
from mpisync.transport.rendezvous import Meeting

_MOST_THREADS = 8  # memory bandwidth is spent by then
_BUFFERS = 3  # of parameters, where a worker may still read an old version


def compile_at_root(comm: MPI.Intracomm, layout: Layout) -> None:
    """Compile the kernels for a layout at the root only, before the ranks meet: the others find them in the cache."""
    if comm.rank == comm.size - 1:
        _compile(layout)


def _compile(layout: Layout) -> None:
    warm([segment.dtype.name for segment in layout.segments])


def bytes_at_root(layout: Layout, published: Layout, workers: int, policy: Policy) -> int:
    """Return how much of its memory a run takes at the root: gradients, their sum, and versions of the parameters."""
    sums = sum(segment.count * segment.dtype.accumulator.itemsize for segment in layout.segments)
    return workers * layout.size_bytes + sums + (_versions(policy) + 1) * published.size_bytes


def _versions(policy: Policy) -> int:
    """Return how many versions of the parameters may be read at a time.

    A worker that is out of date may go on reading only where its gradient can still count.
    """
    return 1 if policy.staleness == 0 else _BUFFERS


@functools.cache
def _tell_once(note: str) -> None:
    """Tell how workers are reached, in the first of a process's runs that it holds for."""
    if note:
        print(f"mpisync: {note}", file=sys.stderr, flush=True)


class Participant:
    """A rank in a run. Collective: every rank of the meeting makes one with the same layouts.

    Args:
        meeting: Who met.
        layout: Of a gradient.
        published: Of the parameters.
        policy: The run's; the root's counts.
        own: The memory in which this rank computes; the host's, worked on by as many threads as pay, unless given.

    Attributes:
        memory: A worker's own; at the root where gradients are reduced: its own, if that reaches every worker, else
            the host's.
        parameters: Bytes in which the root keeps the parameters; none on a worker.

    Raises:
        ValueError: The transport that was asked for does not exist.
    """

    def __init__(
        self, meeting: Meeting, layout: Layout, published: Layout, policy: Policy, own: Memory | None = None
    ) -> None:
        self.meeting, self.layout, self.published, self.policy = meeting, layout, published, policy
        _compile(layout)
        host = own if isinstance(own, HostMemory) else HostMemory(self._threads())
        run = Run(meeting, layout, published, _versions(policy), host, host if own is None else own)
        self._connection = connect(run)
        self.parameters = self._connection.home
        self.memory = self._connection.memory if self.is_root or own is None else own
        _tell_once(self._connection.note)

    def _threads(self) -> int:
        cores = len(os.sched_getaffinity(0))
        return min(cores, _MOST_THREADS) if self.is_root else 1

    @property
    def is_root(self) -> bool:
        """Whether this rank is the root aggregator."""
        return self.meeting.is_root

    @property
    def reads_in_place(self) -> bool:
        """Whether this rank, a worker, may compute on the bytes that the root writes or sends."""
        return self._connection.reads_in_place

    def root(
        self, *, weighted: bool = False, late: LateWork | None = None, state: Mapping[str, Any] | None = None
    ) -> Root:
        """Become the root; `parameters` must be filled by now. See `Root`."""
        return Root(
            self.meeting.peers,
            self._connection.links,
            self.layout,
            self.parameters,
            self.policy,
            self.memory,
            weighted=weighted,
            late=late,
            state=state,
            stall_report_s=settings.seconds_of("MPISYNC_STALL_REPORT_S"),
        )

    def worker(self) -> Worker:
        """Become a worker."""
        link = self._connection.link
        assert link is not None  # else this is the root
        return Worker(
            self.meeting.peers,
            link,
            self.meeting.comm.rank,
            self.meeting.incarnation,
            stall_report_s=settings.seconds_of("MPISYNC_STALL_REPORT_S"),
        )
