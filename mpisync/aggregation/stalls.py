"""Reports of a step that does not close: whom it waits for, and what they seem to do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from mpisync.aggregation.members import Member, State
from mpisync.policies import OpenStep
from mpisync.transport.peers import Peer

_DOING = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a disk",
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
}


class StallReport:
    """The reports of a step that stays open: after `after_s`, then each time it has waited twice as long."""

    def __init__(
        self,
        after_s: float,
        me: Peer,
        say: Callable[[str], object] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        self._after_s, self._me, self._say = after_s, me, say
        self._next_s = after_s

    def look(self, now_s: float, step: OpenStep, members: Sequence[Member], target: int) -> None:
        """Report the step if a report is due."""
        waited_s = now_s - step.opened_s
        if waited_s < self._next_s:
            self._next_s = self._after_s if waited_s < self._after_s else self._next_s
            return
        self._next_s = 2 * waited_s
        lacking = [m for m in members if m.is_alive and m.state is not State.ACCEPTED]
        self._say(
            f"mpisync: step {step.step} is open for {waited_s:.0f} s with "
            f"{len(step.accepted)} of {target} gradients; it waits for "
            + "; ".join(self._describe(member, now_s) for member in lacking)
            + ". If a rank's own code calls an MPI collective inside the loop, it waits for the root, "
            "which is not in it: move that call out of the loop"
        )

    def _describe(self, member: Member, now_s: float) -> str:
        what = f"{member.peer} {member.state.value} since {now_s - member.since_s:.0f} s"
        if not self._me.sees(member.peer):
            return what
        state = member.peer.state()
        return f"{what} ({_DOING.get(state, state) if state else 'its process has ended'})"
