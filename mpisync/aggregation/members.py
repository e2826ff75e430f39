"""The root's knowledge of each worker: its state, and what it waits for.

    COMPUTING   nothing heard since its last reply
    ANNOUNCED   its header is in; its gradient stays with it (or is held until its turn comes)
    WANTED      its gradient was asked for and is on its way
    ACCEPTED    its gradient is part of the open step
    LEFT        it contributes nothing more, and stays for the final parameters
    GONE        it has said goodbye
    LOST        its process has ended without

Only the root's event loop moves a member from one state to another:
COMPUTING → ANNOUNCED → WANTED → ACCEPTED → COMPUTING, with a verdict leading back to COMPUTING from anywhere; any state
but GONE and LOST → LEFT → GONE; any → LOST.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from mpisync.transport.base import RootLink
from mpisync.transport.peers import Peer
from mpisync.transport.wire import Header


class State(enum.Enum):
    """The states of a worker; see the module's text."""

    COMPUTING = "computing"
    ANNOUNCED = "announced"
    WANTED = "wanted"
    ACCEPTED = "accepted"
    LEFT = "left"
    GONE = "gone"
    LOST = "lost"


@dataclass
class Member:
    """One worker, as the root knows it."""

    worker: int
    peer: Peer
    link: RootLink
    state: State = State.COMPUTING
    pending_header: Header | None = None  # of the gradient on which no verdict has been given
    waits_for: int = -1  # version it needs next; -1: has it, or has not asked
    served: int = -1  # the newest version that it was let have
    since_s: float = 0.0  # when its computation could begin
    peak_rss_bytes: int = 0  # as it said when it left
    returns: bool = False  # whether it has left this loop only, and takes part in the next

    @property
    def is_alive(self) -> bool:
        """Whether a gradient may still come from this worker."""
        return self.state not in (State.LEFT, State.GONE, State.LOST)
