"""The mapping of one board and each worker's slot, by the root and the workers of its node.

The board is the host's memory; the versions of the parameters and the slots lie in the memory where the root reduces.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from mpisync.device.base import Memory, Shared
from mpisync.device.host import HostMemory
from mpisync.transport.collectives import exchange
from mpisync.transport.layout import Layout
from mpisync.transport.rendezvous import Meeting
from mpisync.transport.shared import Board


@dataclass(frozen=True)
class Run:
    """The properties that all links of a run have in common.

    Attributes:
        meeting: Who met.
        layout: Of a gradient.
        published: Of the parameters.
        buffers: How many versions of the parameters may be read at a time.
        host: The host's memory.
        own: The memory in which this rank computes: a worker's gradients, the root's sum and parameters.
    """

    meeting: Meeting
    layout: Layout
    published: Layout
    buffers: int
    host: HostMemory
    own: Memory


@dataclass
class Mapped:
    """What this rank mapped: the board, and its own slot (the root: every mapped worker's)."""

    memory: Memory  # of versions and slots
    board: Board | None = None
    slots: dict[int, Shared] = field(default_factory=dict)
    workers: Sequence[int] = ()  # who shares memory with the root, as every rank knows them
    why_not: str = ""  # what kept ranks of the root's machine from sharing memory

    def all(self) -> list[Shared]:
        """Return all memory that is mapped."""
        return [*([self.board.memory, self.board.versions] if self.board else []), *self.slots.values()]

    def drop(self) -> None:
        """Give all mapped memory back."""
        for shared in self.all():
            shared.close()
        self.board, self.slots = None, {}

    def attempt(self, action: Callable[[], Shared]) -> Shared | None:
        """Return what `action` does, or None where it cannot be had, and remember why."""
        try:
            return action()
        except OSError as error:
            self.why_not = error.strerror or str(error)
            return None


def share(run: Run, workers: Sequence[int]) -> Mapped:
    """Map the board and slots among those of `workers` that can and the root. Collective, on every rank.

    A node is whoever manages to map its memory. The root's own memory is tried first, and taken if it reaches all
    workers; then the host's, and where another process's descriptors cannot be opened, a file.
    """
    meeting = run.meeting
    here = meeting.peers[meeting.root].boot
    near = sum(meeting.peers[worker].boot == here for worker in workers)
    mapped, why_not = _share_once(run, workers, run.own, as_file=False), ""
    if not mapped.memory.is_host and len(mapped.workers) < len(meeting.workers):
        mapped.drop()
        why_not = mapped.why_not
        mapped = _share_once(run, workers, run.host, as_file=False)
    if mapped.memory.is_host and len(mapped.workers) < near:
        mapped.drop()
        mapped = _share_once(run, workers, run.host, as_file=True)
    mapped.why_not = why_not or mapped.why_not
    return mapped


def _share_once(run: Run, workers: Sequence[int], memory: Memory, *, as_file: bool) -> Mapped:
    """Try to share a memory; `memory` is what the root offers, which the others learn."""
    meeting, mine = run.meeting, Mapped(memory)
    comm, root = meeting.comm, meeting.root
    lines, versions_bytes = len(meeting.workers), Board.versions_bytes(run.published, run.buffers)

    def board_of(made: Shared | None, versions: Shared | None) -> Board | None:
        if made is not None and versions is not None:
            return Board(made, versions, lines, run.published, run.buffers)
        for shared in (made, versions):
            if shared is not None:
                shared.close()
        return None

    def make(size_bytes: int) -> Shared | None:
        return mine.attempt(lambda: memory.share(size_bytes, as_file=as_file))

    if meeting.is_root:
        made = mine.attempt(lambda: run.host.share(Board.size_bytes(lines), as_file=as_file))
        mine.board = board_of(made, make(versions_bytes) if made is not None else None)
        if mine.board is not None:
            mine.board.words[0] = -1  # no version yet
            if memory.is_owned_by_root:
                mine.slots = {worker: slot for worker in workers if (slot := make(run.layout.size_bytes)) is not None}
    slots = {worker: slot.address for worker, slot in mine.slots.items()}
    offer = [mine.board.memory.address, mine.board.versions.address, slots] if mine.board is not None else []
    said = exchange(comm, json.dumps([memory.is_host, offer]), "where its memory is")
    is_host, offered = json.loads(said[root])
    mine.memory = memory = run.host if is_host else run.own
    answer = ""
    if offered and comm.rank in workers and memory.is_host == is_host:
        board, versions, slots = offered
        seen = mine.attempt(lambda: run.host.attach(board))
        mine.board = board_of(seen, mine.attempt(lambda: memory.attach(versions)) if seen is not None else None)
        theirs, slot = slots.get(str(comm.rank)), None
        if mine.board is not None and theirs is not None:
            slot = mine.attempt(lambda: memory.attach(theirs))
        elif mine.board is not None and not memory.is_owned_by_root:
            slot = make(run.layout.size_bytes)
        if slot is not None:
            mine.slots, answer = {comm.rank: slot}, slot.address
    answers = exchange(comm, answer, "where its memory is")
    if meeting.is_root:
        mine.slots = _taken(mine, workers, answers)
    said = exchange(comm, json.dumps([sorted(mine.slots), mine.why_not]), "what it mapped")
    mine.workers = json.loads(said[root])[0]
    here = [text for peer, text in zip(meeting.peers, said, strict=True) if peer.boot == meeting.peers[root].boot]
    mine.why_not = next((why for text in here if (why := json.loads(text)[1])), "")
    if not mine.workers or comm.rank not in (root, *mine.workers):
        mine.drop()
    for shared in mine.all():
        shared.unlink()
    return mine


def _taken(mine: Mapped, workers: Sequence[int], answers: Sequence[str]) -> dict[int, Shared]:
    """Return the slots that both the root and their workers have."""
    slots: dict[int, Shared] = {}
    for worker in workers:
        own = mine.slots.get(worker)
        if own is not None and not answers[worker]:
            own.close()  # its worker cannot reach it
        elif own is not None:
            slots[worker] = own
        elif answers[worker]:
            taken = mine.attempt(partial(mine.memory.attach, answers[worker]))
            if taken is not None:
                slots[worker] = taken
    return slots
