"""The workers: who is alive, and what each of them is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpisync.aggregation.members import Member, State
from mpisync.aggregation.sample_pool import BatchId
from mpisync.transport.base import End, Pause, RootLink
from mpisync.transport.peers import Peer
from mpisync.transport.wire import Header, Reply, ReplyKind, Status


class Roster:
    """All workers, and the links by which the root reaches them.

    Args:
        peers: The processes of all ranks; the last is this one.
        links: Together they reach every worker once.
        clock: Monotonic seconds.

    Attributes:
        members: By worker.
        me: This process.
        version: The newest version of the parameters; -1 before there is one.
        last: The version at which the loop ends; -1 where nobody knows yet.
    """

    def __init__(self, peers: Sequence[Peer], links: Sequence[RootLink], clock: Callable[[], float]) -> None:
        self._links, self.me, self.version, self._clock = list(links), peers[-1], -1, clock
        self.last = -1
        reached = [(worker, link) for link in self._links for worker in link.workers]
        reached.sort(key=lambda pair: pair[0])
        self.members = [Member(worker, peers[worker], link, since_s=clock()) for worker, link in reached]

    # -- who is there ------------------------------------------------------------------------------

    @property
    def living(self) -> set[int]:
        """The workers of whom a gradient may still come."""
        return {member.worker for member in self.members if member.is_alive}

    def ended(self) -> list[Member]:
        """Return the workers whose processes have ended without a goodbye, as far as can be seen from here."""
        return [
            member
            for member in self.members
            if member.state not in (State.LOST, State.GONE)
            and self.me.sees(member.peer)
            and member.peer.state() is None
        ]

    def is_stopped(self, member: Member) -> bool:
        """Say whether a worker's process is stopped by a signal, as far as can be seen from here."""
        return self.me.sees(member.peer) and member.peer.state() in ("T", "t")

    # -- what one worker is told -------------------------------------------------------------------

    def reply(self, member: Member, header: Header, status: Status, step: int, resume: int, **more: Any) -> None:  # noqa: ANN401
        """Answer a header.

        Args:
            member: Whose it is.
            header: Every header has one answer.
            status: The verdict.
            step: The open step.
            resume: The version at which the worker's next computation begins.
            more: Other fields of a `Reply`.
        """
        member.link.reply(
            member.worker,
            Reply(
                header.incarnation, ReplyKind.VERDICT, status, member.worker, header.ordinal,
                step=step, newest=self.version, resume=resume, last=self.last, **more,
            ),
        )  # fmt: skip

    def acknowledge(
        self,
        member: Member,
        header: Header,
        step: int,
        resume: int,
        *,
        batch: BatchId | None = None,
        again: bool = False,
    ) -> None:
        """Answer a header on which there is no verdict; one that claims a batch, with the batch."""
        epoch, number = (-1, -1) if batch is None else batch
        self.reply(member, header, Status.NOTED, step, resume, epoch=epoch, batch=number, again=int(again))

    def resume(self, member: Member, version: int) -> None:
        """Let a worker have `version`, now or once it is published."""
        member.waits_for = version
        if version <= self.version:
            self.serve_parameters(member)

    def serve_parameters(self, member: Member) -> None:
        """Let a worker that waits for the newest parameters have them."""
        member.waits_for, member.served, member.since_s = -1, self.version, self._clock()
        member.link.serve(member.worker)

    # -- what all are told -------------------------------------------------------------------------

    def begin(self, version: int) -> None:
        """Tell everyone that the parameters are about to change."""
        for link in self._links:
            link.begin(version)

    def publish(self, version: int, parameters: np.ndarray) -> None:
        """Let everyone know of a new version."""
        self.version = version
        for link in self._links:
            link.publish(version, parameters)

    def serve_waiting(self) -> None:
        """Let everyone who waits for the newest version have it."""
        for member in self.members:
            if 0 <= member.waits_for <= self.version:
                self.serve_parameters(member)

    def pause(self, loops: int) -> None:
        """Tell everyone that a loop, by now `loops` of them, has ended at the newest version."""
        for link in self._links:
            link.pause(Pause(loops, self.version))

    def go_on(self) -> None:
        """Keep the version of the last pause for those who have not taken it, and expect all who take part again."""
        for link in self._links:
            link.keep(self.living)
        for member in self.members:
            if member.returns and member.state is State.LEFT:
                member.state, member.returns = State.COMPUTING, False

    def end(self, failure: str) -> None:
        """Tell everyone that the training has ended at the newest version, and why if it failed."""
        for link in self._links:
            link.end(End(self.version, failure))

    def flush(self) -> None:
        """Wake whoever waits for what was said since the last flush."""
        for link in self._links:
            link.flush()

    def wait(self, timeout_s: float, headers: int = 1) -> None:
        """Sleep until a header may have come.

        Only memory can wake a sleeper: with messages too, theirs, the last link, is the one that sleeps, and never
        long.
        """
        self._links[-1].wait(max(0.0, timeout_s), headers)

    def close(self) -> None:
        """Give back the links' receives and memory."""
        for link in self._links:
            link.close()
