"""The number of threads that torch uses on a rank, so that the ranks of a node do not fight for its cores."""

from __future__ import annotations

import os

import torch

from mpisync.transport.rendezvous import Meeting


class Threads:
    """The number of torch threads, as set until `restore`."""

    def __init__(self, threads: int) -> None:
        self._before = torch.get_num_threads()
        if threads != self._before:  # torch may have begun with one: under a launcher it often does
            torch.set_num_threads(threads)

    def restore(self) -> None:
        """Set the number of threads that there was before."""
        if torch.get_num_threads() != self._before:
            torch.set_num_threads(self._before)


def torch_threads(meeting: Meeting) -> Threads:
    """Give a worker its share of the cores it may use; the root, which folds alone, all of them.

    Whoever set OMP_NUM_THREADS has decided otherwise.
    """
    cores = len(os.sched_getaffinity(0))
    me = meeting.peers[meeting.comm.rank]
    here = sum(peer.shares_kernel(me) for peer in meeting.peers)
    decided = "OMP_NUM_THREADS" in os.environ
    share = cores if meeting.is_root else max(1, cores // here)
    return Threads(torch.get_num_threads() if decided else share)
