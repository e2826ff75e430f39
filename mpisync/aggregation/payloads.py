"""The places of gradients: with their workers until the root asks for them, on their way, or whole in its reach.

First announced are first asked for, so many as the step still lacks. Nothing else in this package knows that some links
have gradients fetched and others do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpisync.aggregation.members import Member, State


class PayloadQueue:
    """The queue of workers whose payloads the root has still to ask for.

    Args:
        members: All workers, by number.

    Attributes:
        queue: Those whose payload was announced and not asked for yet, in order of arrival.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        fetchers = (member.link.fetcher for member in members)
        self._fetchers = [fetcher for fetcher in dict.fromkeys(fetchers) if fetcher is not None]
        self.queue: list[Member] = []

    def is_whole(self, worker: int) -> bool:
        """Say whether every byte of an announced payload is in this process's reach."""
        fetcher = self._members[worker].link.fetcher
        return fetcher is None or fetcher.is_whole(worker)

    def progress(self) -> list[int]:
        """Move the payloads that were asked for, and return the workers whose payload has become whole."""
        return [worker for fetcher in self._fetchers for worker in fetcher.progress()]

    def release(self, worker: int) -> None:
        """Forget a payload: it was folded, or nobody wants it."""
        fetcher = self._members[worker].link.fetcher
        if fetcher is not None:
            fetcher.release(worker)

    def want(self, worker: int) -> None:
        """Put a worker in line, once."""
        member = self._members[worker]
        if member.state is State.ANNOUNCED and member not in self.queue:
            self.queue.append(member)

    def drop(self, worker: int) -> None:
        """Ask a worker for nothing."""
        if self.queue:
            self.queue[:] = [member for member in self.queue if member.worker != worker]

    def ask(self, lacking: int, now_s: float, make_room: Callable[[], bool]) -> None:
        """Ask for payloads while fewer are on their way than the step lacks.

        One that stalls is not counted on: the next is asked for beside it, in its memory if there is no other.

        Args:
            lacking: How many the step lacks.
            now_s: The time.
            make_room: Gives back the memory of what is accepted already; False where that is none.
        """
        wanted = [member for member in self._members if member.state is State.WANTED]
        stalled = [member for member in wanted if not self._is_moving(member, now_s)]
        lacking -= len(wanted) - len(stalled)
        while self.queue and lacking > 0:
            member = self.queue[0]
            if self._is_asked(member):
                self.queue.pop(0)
                member.state = State.WANTED
                lacking -= 1
            elif make_room():
                continue
            elif stalled:
                loser = stalled.pop()
                self.release(loser.worker)
                loser.state = State.ANNOUNCED
                self.queue.append(loser)
            else:
                return

    def _is_moving(self, member: Member, now_s: float) -> bool:
        fetcher = member.link.fetcher
        return fetcher is None or fetcher.is_moving(member.worker, now_s)

    def _is_asked(self, member: Member) -> bool:
        fetcher = member.link.fetcher
        return fetcher is None or fetcher.want(member.worker)
