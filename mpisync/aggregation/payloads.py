"""Which announced payloads the root asks for: first announced first, so many as the step still lacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpisync.aggregation.members import Member, State


class PayloadQueue:
    """Asks, and remembers whom it has still to ask.

    Args:
        members: All workers, by number.

    Attributes:
        queue: Those whose payload was announced and not asked for yet, in order of arrival.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        self.queue: list[Member] = []

    def is_whole(self, worker: int) -> bool:
        """Whether every byte of a worker's gradient is in this process's reach."""
        return self._members[worker].link.is_whole(worker)

    def release(self, worker: int) -> None:
        """Forget a worker's gradient: it was folded, or nobody wants it."""
        self._members[worker].link.release(worker)

    def progress(self) -> list[int]:
        """Return the workers whose asked-for gradient has become whole."""
        links = {id(member.link): member.link for member in self._members}
        return [worker for link in links.values() for worker in link.progress()]

    def want(self, worker: int) -> None:
        """Let a worker stand in line, once."""
        member = self._members[worker]
        if member.state is State.ANNOUNCED and member not in self.queue:
            self.queue.append(member)

    def drop(self, worker: int) -> None:
        """Ask a worker for nothing."""
        member = self._members[worker]
        if member in self.queue:
            self.queue.remove(member)

    def ask(self, lacking: int, now_s: float, make_room: Callable[[], bool]) -> None:
        """Ask for payloads while fewer are on their way than the step lacks.

        One that stalls is not counted on: the next is asked for beside it, in its memory if there is no other.

        Args:
            lacking: How many the step lacks.
            now_s: The time.
            make_room: Gives back the memory of what is accepted already; False where that is none.
        """
        wanted = [member for member in self._members if member.state is State.WANTED]
        stalled = [m for m in wanted if not m.link.is_moving(m.worker, now_s)]
        lacking -= len(wanted) - len(stalled)
        while self.queue and lacking > 0:
            member = self.queue[0]
            if member.link.want(member.worker):
                self.queue.pop(0)
                member.state = State.WANTED
                lacking -= 1
            elif make_room():
                continue
            elif stalled:
                loser = stalled.pop()
                loser.link.release(loser.worker)
                loser.state = State.ANNOUNCED
                self.queue.append(loser)
            else:
                return
