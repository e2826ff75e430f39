"""Which announced payloads the root asks for: first announced first, so many as the step still lacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpisync.aggregation.members import Member, State


class PayloadQueue:
    """Asks, and remembers whom it has still to ask.

    Args:
        members: All workers.

    Attributes:
        queue: Those whose payload was announced and not asked for yet, in order of arrival.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        self.queue: list[Member] = []

    def add(self, member: Member) -> None:
        """Let a worker stand in line, once."""
        if member.state is State.ANNOUNCED and member not in self.queue:
            self.queue.append(member)

    def drop(self, member: Member) -> None:
        """Ask a worker for nothing."""
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
