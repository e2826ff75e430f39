"""How the ranks of a communicator become one root and its workers.

They meet on a private duplicate of the user's communicator. What is exchanged is JSON; a problem that one rank has is
raised on all of them.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from mpi4py import MPI

from mpisync import launchers, settings
from mpisync.kernels.fold import Reducer
from mpisync.transport import communicators
from mpisync.transport.base import RootLink, WorkerLink
from mpisync.transport.collectives import exchange, poll
from mpisync.transport.layout import Layout
from mpisync.transport.messages import MessageRootLink, MessageWorkerLink
from mpisync.transport.peers import Peer
from mpisync.transport.shared import Board, SharedRootLink, SharedWorkerLink
from mpisync.transport.shared_memory import SharedMemory


@dataclass(frozen=True)
class Proposal:
    """What a rank brings to the meeting: everyone's must agree, and none may have a problem."""

    content: str  # compared with the root's by `differ`
    problem: str = ""


@dataclass
class Meeting:
    """Who met, under which number, and what the root said."""

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
    """Notice that each rank is alone although a launcher started several.

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


@dataclass
class Memories:
    """What this rank mapped: the board, and its own slot (the root: every mapped worker's)."""

    board: SharedMemory | None
    slots: dict[int, SharedMemory]
    why_not: str = ""  # what kept the ranks of this node from sharing memory

    def drop(self) -> None:
        """Give everything back."""
        for memory in (self.board, *self.slots.values()):
            if memory is not None:
                memory.close()
        self.board, self.slots = None, {}


def share(meeting: Meeting, layout: Layout, published: Layout, buffers: int) -> Memories:
    """Map the board and slots among the ranks that can; the rest use messages. Collective.

    A node is whoever manages to map its memory. Where another process's descriptors cannot be
    opened, a file is tried.
    """
    if meeting.transport == "messages":
        return Memories(None, {})
    here = meeting.peers[meeting.root].boot
    near = sum(meeting.peers[worker].boot == here for worker in meeting.workers)
    memories, mapped = _share_once(meeting, layout, published, buffers, as_file=False)
    if mapped < near:
        memories.drop()
        memories, mapped = _share_once(meeting, layout, published, buffers, as_file=True)
    return memories


def _share_once(
    meeting: Meeting, layout: Layout, published: Layout, buffers: int, *, as_file: bool
) -> tuple[Memories, int]:
    comm, root, workers = meeting.comm, meeting.root, len(meeting.workers)
    mine = Memories(None, {})

    def attempt(action: Callable[[], SharedMemory]) -> SharedMemory | None:
        try:
            return action()
        except OSError as error:
            mine.why_not = str(error)
            return None

    if meeting.is_root:
        size_bytes = Board.size_bytes(workers, published, buffers)
        mine.board = attempt(lambda: SharedMemory.create(size_bytes, as_file=as_file))
        if mine.board is not None:
            Board(mine.board, workers, published, buffers).words[0] = -1  # no version yet
    boards = exchange(comm, mine.board.address if mine.board else "", "where its memory is")
    if boards[root] and not meeting.is_root:
        mine.board = attempt(lambda: SharedMemory.attach(boards[root]))
    if mine.board is not None and not meeting.is_root:
        slot = attempt(lambda: SharedMemory.create(layout.size_bytes, as_file=as_file))
        mine.slots = {comm.rank: slot} if slot is not None else {}
    offered = mine.slots.get(comm.rank)
    slots = exchange(comm, offered.address if offered else "", "where its memory is")
    if meeting.is_root:
        for worker in meeting.workers:
            address = slots[worker]
            memory = attempt(partial(SharedMemory.attach, address)) if address else None
            if memory is not None:
                mine.slots[worker] = memory
    said = exchange(comm, json.dumps([sorted(mine.slots), mine.why_not]), "what it mapped")
    mapped = json.loads(said[root])[0]
    mine.why_not = next((why for text in said if (why := json.loads(text)[1])), "")
    if not meeting.is_root and comm.rank not in mapped:
        mine.drop()
    for memory in (mine.board, *mine.slots.values()):
        if memory is not None:
            memory.unlink()
    return mine, len(mapped)


def root_links(
    meeting: Meeting, layout: Layout, published: Layout, memories: Memories, buffers: int, reducer: Reducer
) -> list[RootLink]:
    """The root's side of every worker."""
    links: list[RootLink] = []
    if memories.board is not None and memories.slots:
        board = Board(memories.board, len(meeting.workers), published, buffers)
        links.append(
            SharedRootLink(meeting.comm, meeting.incarnation, layout, board, memories.slots, reducer)
        )
    far = [worker for worker in meeting.workers if worker not in memories.slots]
    if far:
        links.append(
            MessageRootLink(
                meeting.comm, far, meeting.incarnation, layout, published, finish_old_versions=buffers > 1
            )
        )
    return links


def worker_link(
    meeting: Meeting, layout: Layout, published: Layout, memories: Memories, buffers: int
) -> WorkerLink:
    """This worker's side."""
    comm, root = meeting.comm, meeting.root
    if memories.board is None:
        return MessageWorkerLink(comm, root, meeting.incarnation, layout, published)
    board = Board(memories.board, len(meeting.workers), published, buffers)
    return SharedWorkerLink(comm, root, layout, published, board, memories.slots[comm.rank])
