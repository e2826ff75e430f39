"""How a rank takes its place in a run: it meets the others, maps what they share, and becomes root or worker."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

from mpisync import settings
from mpisync.aggregation.late_work import Discard
from mpisync.aggregation.root import Root
from mpisync.aggregation.worker import Worker
from mpisync.kernels.fold import Reducer, warm
from mpisync.policies import Policy
from mpisync.transport.layout import Layout, aligned_bytes
from mpisync.transport.rendezvous import (
    Meeting,
    Memories,
    Proposal,
    meet,
    root_links,
    share,
    worker_link,
)

_MOST_THREADS = 8  # memory bandwidth is spent by then
_BUFFERS = 3  # of parameters, where a worker may still read an old version


class Participant:
    """A rank's place. Collective: every rank of `comm` makes one with the same layouts.

    Args:
        comm: The user's communicator; a private duplicate is used.
        claim: What this rank brings; everyone's must agree.
        differ: Says how two claims' contents differ, or None.
        layout: Of a gradient.
        published: Of the parameters.
        policy: The run's; the root's counts.

    Raises:
        ValueError: The ranks do not agree, or one of them has a problem.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        claim: Proposal,
        differ: Callable[[str, str], str | None],
        layout: Layout,
        published: Layout,
        policy: Policy,
    ) -> None:
        self.layout, self.published, self.policy = layout, published, policy
        dtypes = [segment.dtype.name for segment in layout.segments]
        if comm.rank == comm.size - 1:
            warm(dtypes)  # compiled once, before anyone waits for a step; the others find it cached
        self.meeting: Meeting = meet(comm, claim, differ)
        warm(dtypes)
        self.reducer = Reducer(self._threads())
        # a worker that is out of date may go on reading only where its gradient can still count
        self._buffers = 1 if policy.staleness == 0 else _BUFFERS
        self._memories: Memories = share(self.meeting, layout, published, self._buffers)
        self._links = (
            root_links(
                self.meeting, layout, published, self._memories, self._buffers, self.reducer
            )
            if self.is_root
            else []
        )
        self.parameters = self._home()
        if self.is_root and self._memories.why_not:
            far = [link.workers for link in self._links if not link.is_contiguous]
            print(f"mpisync: workers {far} use messages: {self._memories.why_not}", flush=True)

    def _threads(self) -> int:
        cores = len(os.sched_getaffinity(0))
        return min(cores, _MOST_THREADS) if self.is_root else 1

    @property
    def is_root(self) -> bool:
        """Whether this rank is the root aggregator."""
        return self.meeting.is_root

    @property
    def reads_in_place(self) -> bool:
        """Whether a worker may compute on the bytes that the root writes or sends.

        With messages they change only while the worker waits. In shared memory they are updated in
        place, and whoever still computes on them is late; where late gradients count they are not.
        """
        return self._buffers == 1 or self._memories.board is None

    def _home(self) -> np.ndarray:
        """Where the root keeps the parameters: in the shared memory if they may be read in place."""
        homes = [home for link in self._links if (home := link.home()) is not None]
        return homes[0] if homes else aligned_bytes(self.published.size_bytes if self.is_root else 0)

    def root(self, *, weighted: bool = False, norms: bool = False, late: Discard | None = None) -> Root:
        """Become the root; `parameters` must be filled by now."""
        return Root(
            self.meeting.peers,
            self._links,
            self.layout,
            self.parameters,
            self.policy,
            self.reducer,
            weighted=weighted,
            norms=norms,
            late=late,
            stall_report_s=settings.seconds_of("MPISYNC_STALL_REPORT_S"),
        )

    def worker(self) -> Worker:
        """Become a worker."""
        link = worker_link(
            self.meeting, self.layout, self.published, self._memories, self._buffers
        )
        return Worker(
            self.meeting.peers,
            link,
            self.meeting.comm.rank,
            self.meeting.incarnation,
            stall_report_s=settings.seconds_of("MPISYNC_STALL_REPORT_S"),
        )
