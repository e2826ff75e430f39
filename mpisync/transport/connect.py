"""The transports by which the root reaches each worker: the only module that knows which there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpisync.device.base import Array, Memory
from mpisync.transport import communicators
from mpisync.transport.base import RootLink, WorkerLink
from mpisync.transport.mapping import Run, share
from mpisync.transport.messages import MessageRootLink, MessageWorkerLink
from mpisync.transport.rendezvous import Meeting
from mpisync.transport.shared import SharedRootLink, SharedWorkerLink


@dataclass(frozen=True)
class Reached:
    """The outcome of trying a transport.

    Attributes:
        workers: Whom it reaches; the same on every rank.
        root_link: Makes the root's end; called there, if anybody is reached.
        worker_link: Makes a worker's end; called on those that are reached.
        memory: Where their gradients lie.
        why_not_all: What kept it from reaching others, or from the root's own memory, where that is worth telling.
    """

    workers: Sequence[int]
    root_link: Callable[[], RootLink]
    worker_link: Callable[[], WorkerLink]
    memory: Memory
    why_not_all: str = ""


def _by_shared_memory(run: Run, workers: Sequence[int]) -> Reached:
    meeting = run.meeting
    mapped = share(run, workers)

    def root_link() -> RootLink:
        assert mapped.board is not None  # else it reaches nobody
        return SharedRootLink(meeting.comm, meeting.incarnation, run.layout, mapped.board, mapped.slots, mapped.memory)

    def worker_link() -> WorkerLink:
        assert mapped.board is not None  # else it does not reach this worker
        slot = mapped.slots[meeting.comm.rank]
        return SharedWorkerLink(
            meeting.comm, meeting.root, run.layout, run.published, mapped.board, slot, mapped.memory, run.own
        )

    return Reached(mapped.workers, root_link, worker_link, mapped.memory, mapped.why_not)


def _by_messages(run: Run, workers: Sequence[int]) -> Reached:
    meeting = run.meeting

    def root_link() -> RootLink:
        return MessageRootLink(
            meeting.comm,
            workers,
            meeting.incarnation,
            run.layout,
            run.published,
            run.host,
            finish_old_versions=run.buffers > 1,
        )

    def worker_link() -> WorkerLink:
        return MessageWorkerLink(
            meeting.comm, meeting.root, meeting.incarnation, run.layout, run.published, run.host, run.own
        )

    return Reached(workers, root_link, worker_link, run.host)


# By the names that MPISYNC_TRANSPORT takes, in the order in which they are tried. Each is called on every rank with the
# workers that those before it did not reach; the last reaches everybody.
TRANSPORTS: dict[str, Callable[[Run, Sequence[int]], Reached]] = {
    "shared": _by_shared_memory,
    "messages": _by_messages,
}


@dataclass(frozen=True)
class Connection:
    """This rank's ends of its links.

    Attributes:
        links: The root's, which together reach every worker once; none on a worker.
        link: A worker's; None on the root.
        memory: Where gradients lie when they are reduced, and the root's parameters.
        home: Where the root keeps the parameters: in memory that workers read in place, or in its own; empty on a
            worker.
        reads_in_place: Whether this rank, a worker, may compute on the bytes that the root writes or sends.
        note: Tells on the root why some workers are not reached by the transport that was tried first; else "".
    """

    links: list[RootLink]
    link: WorkerLink | None
    memory: Memory
    home: Array
    reads_in_place: bool
    note: str


def connect(run: Run) -> Connection:
    """Connect the root with every worker. Collective.

    Args:
        run: Who met, by which transport the root wants to reach the others, and in which memory each computes.

    Raises:
        ValueError: There is no such transport; on every rank.
    """
    meeting = run.meeting
    memory: Memory = run.host
    links: list[RootLink] = []
    link: WorkerLink | None = None
    left, why_not = meeting.workers, ""
    missed: Sequence[int] | None = None
    for name in _to_try(meeting):
        reached = TRANSPORTS[name](run, left)
        memory = memory if reached.memory.is_host else reached.memory
        if meeting.is_root and reached.workers:
            links.append(reached.root_link())
        elif meeting.comm.rank in reached.workers:
            link = reached.worker_link()
        left = [worker for worker in left if worker not in reached.workers]
        missed = left if missed is None else missed
        why_not = why_not or reached.why_not_all
        if not left:
            break
    homes = [home for each in links if (home := each.home()) is not None]
    return Connection(
        links=links,
        link=link,
        memory=memory,
        home=homes[0] if homes else memory.allocate(run.published.size_bytes if meeting.is_root else 0),
        # With one buffer whoever still computes on what is overwritten is late; with several it is not, but messages
        # change parameters only while their worker waits.
        reads_in_place=link is not None and (run.buffers == 1 or not link.shares_parameters),
        note=_note(run, memory, missed or (), why_not) if meeting.is_root else "",
    )


def _note(run: Run, memory: Memory, missed: Sequence[int], why_not: str) -> str:
    """Say on which device gradients stay, and why some go another way than was tried first; "" for nothing to tell."""
    meeting, root = run.meeting, run.meeting.peers[run.meeting.root]
    if not memory.is_host:
        return f"gradients stay on {memory.name}, where workers put them by {memory.way}"
    far = [worker for worker in missed if meeting.peers[worker].boot != root.boot]
    near = [worker for worker in missed if worker not in far]
    texts = []
    if not run.own.is_host:
        why = f" ({why_not})" if why_not else ""
        texts.append(
            f"not all workers reach {run.own.name}, which is the root's{why}, so gradients come to host memory and are "
            "reduced there"
        )
    if far:
        hosts = ", ".join(dict.fromkeys(meeting.peers[worker].host for worker in far))
        texts.append(f"{_workers(far)} on {hosts}, not on the root's machine {root.host}: gradients travel by messages")
    if near:
        cure = (
            "free memory, or give a container a larger /dev/shm (docker run --shm-size=4g)"
            if "wanted" in why_not
            else "give containers the host's process ids or its /dev/shm (docker run --ipc=host --pid=host)"
        )
        texts.append(
            f"{_workers(near)} cannot share memory with the root ({why_not}), so gradients travel by messages, which "
            f"is slower: {cure}"
        )
    return "; ".join(texts)


def _workers(workers: Sequence[int]) -> str:
    return f"worker{'s' if len(workers) > 1 else ''} {', '.join(map(str, workers))}"


def _to_try(meeting: Meeting) -> list[str]:
    """Return the transports to try, in order: the one that was asked for, and the one that reaches everybody."""
    asked, last = meeting.transport, list(TRANSPORTS)[-1]
    if asked == "auto":
        return list(TRANSPORTS)
    if asked not in TRANSPORTS:
        communicators.give_back(meeting.comm)
        raise ValueError(f"MPISYNC_TRANSPORT={asked!r}: must be one of {', '.join(['auto', *TRANSPORTS])}")
    return list(dict.fromkeys([asked, last]))
