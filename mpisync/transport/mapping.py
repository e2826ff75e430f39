"""The mapping of one board and each worker's slot, by the root and the workers of its node."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from mpisync.transport.collectives import exchange
from mpisync.transport.layout import Layout
from mpisync.transport.memory import HostMemory
from mpisync.transport.rendezvous import Meeting
from mpisync.transport.shared import Board
from mpisync.transport.shared_memory import SharedMemory


@dataclass
class Memories:
    """The memory that this rank mapped: the board, and its own slot (the root: every mapped worker's)."""

    board: Board | None
    slots: dict[int, SharedMemory]
    mapped: Sequence[int] = ()  # workers that share memory with the root, as every rank knows them
    why_not: str = ""  # what kept ranks of the root's machine from sharing memory

    def all(self) -> list[SharedMemory]:
        """Return all memory that is mapped."""
        return [*([self.board.memory] if self.board else []), *self.slots.values()]

    def drop(self) -> None:
        """Give all mapped memory back."""
        for memory in self.all():
            memory.close()
        self.board, self.slots = None, {}


def share(
    meeting: Meeting, workers: Sequence[int], layout: Layout, published: Layout, buffers: int, memory: HostMemory
) -> Memories:
    """Map the board and slots among those of `workers` that can and the root. Collective, on every rank.

    A node is whoever manages to map its memory. Where another process's descriptors cannot be
    opened, a file is tried.
    """
    here = meeting.peers[meeting.root].boot
    near = sum(meeting.peers[worker].boot == here for worker in workers)
    memories = _share_once(meeting, workers, layout, published, buffers, memory, as_file=False)
    if len(memories.mapped) < near:
        memories.drop()
        memories = _share_once(meeting, workers, layout, published, buffers, memory, as_file=True)
    return memories


def _share_once(
    meeting: Meeting,
    workers: Sequence[int],
    layout: Layout,
    published: Layout,
    buffers: int,
    memory: HostMemory,
    *,
    as_file: bool,
) -> Memories:
    comm, root = meeting.comm, meeting.root
    mine, lines = Memories(None, {}), len(meeting.workers)

    def attempt(action: Callable[[], SharedMemory]) -> SharedMemory | None:
        try:
            return action()
        except OSError as error:
            mine.why_not = error.strerror or str(error)
            return None

    if meeting.is_root:
        size_bytes = Board.size_bytes(lines, published, buffers)
        made = attempt(lambda: memory.share(size_bytes, as_file=as_file))
        if made is not None:
            mine.board = Board(made, lines, published, buffers)
            mine.board.words[0] = -1  # no version yet
    boards = exchange(comm, mine.board.memory.address if mine.board else "", "where its memory is")
    if boards[root] and comm.rank in workers:
        seen = attempt(lambda: memory.attach(boards[root]))
        slot = attempt(lambda: memory.share(layout.size_bytes, as_file=as_file)) if seen is not None else None
        mine.board = Board(seen, lines, published, buffers) if seen is not None else None
        mine.slots = {comm.rank: slot} if slot is not None else {}
    offered = mine.slots.get(comm.rank)
    slots = exchange(comm, offered.address if offered else "", "where its memory is")
    if meeting.is_root:
        for worker in workers:
            address = slots[worker]
            taken = attempt(partial(memory.attach, address)) if address else None
            if taken is not None:
                mine.slots[worker] = taken
    said = exchange(comm, json.dumps([sorted(mine.slots), mine.why_not]), "what it mapped")
    mine.mapped = json.loads(said[root])[0]
    here = [text for peer, text in zip(meeting.peers, said, strict=True) if peer.boot == meeting.peers[root].boot]
    mine.why_not = next((why for text in here if (why := json.loads(text)[1])), "")
    if not mine.mapped or comm.rank not in (root, *mine.mapped):
        mine.drop()
    for shared in mine.all():
        shared.unlink()
    return mine
