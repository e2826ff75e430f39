"""Collectives that every rank of a run must come to: polled with sleeps, so that a rank that never comes is named.

MPI's own would wait for it in silence, and on a core of its own.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable

import numpy as np
from mpi4py import MPI

from mpisync import settings, siblings

MOST_BYTES = 1 << 30  # that one call receives: MPI counts in 32 bits


def poll(request: MPI.Request, comm: MPI.Intracomm, what: str) -> None:
    """Wait for a collective with sleeps, naming the ranks that keep it waiting.

    Raises:
        RuntimeError: A rank has ended, or did not come within MPISYNC_START_TIMEOUT_S.
    """
    began_s, idle_s = time.monotonic(), 20e-6
    limit_s = settings.seconds_of("MPISYNC_START_TIMEOUT_S")
    look_s, report_s = 1.0, settings.seconds_of("MPISYNC_STALL_REPORT_S")
    with siblings.marked(siblings.WAITS):
        while not request.Test():
            time.sleep(idle_s)
            idle_s = min(idle_s * 2, 5e-3)
            waited_s = time.monotonic() - began_s
            if waited_s < look_s:
                continue
            look_s = waited_s + 1.0
            waiting, absent, ended = _roll_call(comm)
            if ended:
                raise RuntimeError(
                    f"{_names(ended)} ended while the other ranks wait for it {what}: every rank of "
                    "the communicator must come by here"
                )
            if waited_s > limit_s:
                raise RuntimeError(
                    f"after {waited_s:.0f} s not all {comm.size} ranks have come {what}; "
                    f"{_names(absent) or 'a rank of another node'} is missing: every rank "
                    "of the communicator must come by here (MPISYNC_START_TIMEOUT_S sets the limit)"
                )
            if waited_s > report_s:
                report_s = 2 * waited_s
                if not waiting or waiting[0].pid == os.getpid():  # one speaks for all of a node
                    print(
                        f"mpisync: rank {comm.rank} waits for {waited_s:.0f} s for "
                        f"{_names(absent) or 'a rank of another node'} {what}",
                        file=sys.stderr,
                        flush=True,
                    )


def _roll_call(comm: MPI.Intracomm) -> tuple[list[siblings.Sibling], ...]:
    """Return the ranks of `comm` on this node: those that wait as this one does, those that do not, the ended ones."""
    members = set(comm.group.Translate_ranks(None, MPI.COMM_WORLD.group))
    ours = [s for s in siblings.find() if s.rank in members]
    ended = [s for s in ours if s.mark == siblings.ENDED]
    firsts = siblings.first_of_each(ours, siblings.WAITS)
    waiting = [s for s in firsts if s.mark == siblings.WAITS]
    return waiting, [s for s in firsts if s not in waiting], ended


def _names(found: list[siblings.Sibling]) -> str:
    return ", ".join(str(sibling) for sibling in found)


def exchange(comm: MPI.Intracomm, text: str, what: str) -> list[str]:
    """Send this rank's text to all, and return everyone's."""
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = np.zeros(comm.size, np.int64)
    poll(comm.Iallgather(np.array([data.size], np.int64), sizes), comm, f"to say {what}")
    share = max(1, MOST_BYTES // comm.size)  # of a rank, in one call
    said = [bytearray() for _ in sizes]
    for start in range(0, int(sizes.max()), share):
        counts = np.clip(sizes - start, 0, share)
        places = np.cumsum(counts) - counts
        came = np.zeros(int(counts.sum()), np.uint8)
        target = [came, (counts.tolist(), places.tolist()), MPI.BYTE]
        poll(comm.Iallgatherv([data[start : start + share], MPI.BYTE], target), comm, f"to say {what}")
        for of_rank, place, count in zip(said, places, counts, strict=True):
            of_rank += came[place : place + count].tobytes()
    return [of_rank.decode() for of_rank in said]


def broadcast(blocks: Iterable[np.ndarray], comm: MPI.Intracomm, root: int, what: str) -> None:
    """Broadcast block after block, each taken from `blocks` when those before it are everywhere.

    Args:
        blocks: Bytes; as many, and as large, on every rank, none larger than a call takes.
        comm: Among whom.
        root: Who has them.
        what: What for, in the words of a report on who keeps it waiting.
    """
    for block in blocks:
        poll(comm.Ibcast([block, MPI.BYTE], root=root), comm, what)
