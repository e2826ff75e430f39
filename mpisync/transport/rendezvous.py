"""The rendezvous, by which the ranks of a communicator become one root and its workers.

They meet on a private duplicate of the user's communicator. What is exchanged is JSON; a problem that one rank has is
raised on all of them.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from mpisync import launchers, settings
from mpisync.transport import communicators
from mpisync.transport.collectives import exchange, poll
from mpisync.transport.peers import Peer


@dataclass(frozen=True)
class Proposal:
    """A rank's proposal to the meeting: everyone's must agree, and none may have a problem."""

    content: str  # compared with the root's by `differ`
    problem: str = ""


@dataclass
class Meeting:
    """The ranks that met, their numbers, and what the root said."""

    comm: MPI.Intracomm
    root: int
    incarnation: int
    peers: list[Peer]
    transport: str  # the root's setting, which holds for all

    @property
    def is_root(self) -> bool:
        """Whether this rank is the root."""
        return self.comm.rank == self.root

    @property
    def workers(self) -> list[int]:
        """The ranks that compute, in order; their positions are the workers' numbers."""
        return [rank for rank in range(self.comm.size) if rank != self.root]


def meet(
    comm: MPI.Intracomm, claim: Proposal, differ: Callable[[str, str], str | None]
) -> Meeting:
    """Bring all ranks of `comm` together; the last one is the root.

    Raises:
        RuntimeError: This process was started by the launcher of another MPI.
        ValueError: Ranks disagree, or one of them has a problem; raised on every rank.
    """
    check_launcher(comm)
    private = private_duplicate(comm)
    root = private.size - 1
    mine = {
        "peer": vars(Peer.here(private.rank)),
        "problem": claim.problem,
        "content": claim.content,
        "transport": settings.read("MPISYNC_TRANSPORT"),
        "incarnation": secrets.randbits(63) if private.rank == root else 0,
    }
    said = [json.loads(text) for text in exchange(private, json.dumps(mine), "its settings")]
    texts = [s["problem"] for s in said]
    if texts[0] and len(set(texts)) == 1:
        raise ValueError(texts[0])
    problems = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]
    if not problems:
        problems = [
            f"rank {rank}: {difference}"
            for rank, s in enumerate(said)
            if (difference := differ(said[root]["content"], s["content"]))
        ]
    if problems:
        raise ValueError("; ".join(problems))
    communicators.take(private)
    peers = [Peer.from_json(s["peer"]) for s in said]
    return Meeting(private, root, said[root]["incarnation"], peers, said[root]["transport"])


def check_launcher(comm: MPI.Intracomm) -> None:
    """Raise RuntimeError where each rank is alone although a launcher started several.

    Raises:
        RuntimeError: The launcher belongs to another MPI than the one mpi4py loaded.
    """
    expected = launchers.expected_size(os.environ)
    if expected is not None and MPI.COMM_WORLD.size == 1 and expected[0] > 1:
        size, launcher = expected
        library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
        raise RuntimeError(
            f"{launcher} started {size} ranks, but this one is rank 0 of 1: mpi4py loaded another MPI "
            f"({library}). Start with that MPI's own launcher, or with `mpisync run -n {size} ...`"
        )


def private_duplicate(comm: MPI.Intracomm) -> MPI.Intracomm:
    """Return a duplicate of `comm` that no run uses now, on any rank. Collective."""
    privates = communicators.known(comm)
    if privates:
        # on the first, whether it is free or not: a run has only messages of its own under way there
        free = np.array([communicators.is_free(private) for private in privates], np.int8)
        agreed = np.empty_like(free)
        poll(privates[0].Iallreduce(free, agreed, MPI.MIN), comm, "to reach the session")
        if agreed.any():
            return privates[int(agreed.argmax())]
    private, request = comm.Idup()
    poll(request, comm, "to reach the session")
    communicators.keep(comm, private)
    return private
