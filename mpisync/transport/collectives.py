"""Collectives that every rank of a run must come to: polled with sleeps, so that a rank that never comes is named.

MPI's own would wait for it in silence, and on a core of its own.
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np
from mpi4py import MPI

from mpisync import settings, siblings


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
    counts = np.zeros(comm.size, np.int64)
    poll(comm.Iallgather(np.array([data.size], np.int64), counts), comm, f"to say {what}")
    everything = np.zeros(int(counts.sum()), np.uint8)
    places = np.concatenate([[0], np.cumsum(counts)[:-1]])
    target = [everything, (counts.tolist(), places.tolist()), MPI.BYTE]
    poll(comm.Iallgatherv([data, MPI.BYTE], target), comm, f"to say {what}")
    return [
        everything[p : p + c].tobytes().decode() for p, c in zip(places, counts, strict=True)
    ]
