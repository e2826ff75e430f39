"""What the root knows of each worker: its state, and where its samples went.

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
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from mpisync.aggregation.work import Work
from mpisync.policies import Arrival
from mpisync.transport.base import RootLink
from mpisync.transport.peers import Peer
from mpisync.transport.wire import Header


class State(enum.Enum):
    """Where a worker stands; see the module's text."""

    COMPUTING = "computing"
    ANNOUNCED = "announced"
    WANTED = "wanted"
    ACCEPTED = "accepted"
    LEFT = "left"
    GONE = "gone"
    LOST = "lost"


Outcome = Literal["accepted", "late", "rejected"]
Fate = Literal["used", "discarded", "requeued"]


@dataclass
class Account:
    """A worker's samples: handed = used + discarded + requeued + lost + in_flight, at any time."""

    handed: int = 0
    used: int = 0
    discarded: int = 0
    requeued: int = 0
    lost: int = 0
    accepted: int = 0  # gradients
    late: int = 0
    rejected: int = 0
    batches: int = 0  # whose samples have met their fate

    @property
    def in_flight(self) -> int:
        """Samples handed to the loop that have met no fate yet."""
        return self.handed - self.used - self.discarded - self.requeued - self.lost

    def judge(self, outcome: Outcome) -> None:
        """Count a gradient."""
        setattr(self, outcome, getattr(self, outcome) + 1)

    def tally(self, fate: Fate, samples: int) -> None:
        """Enter what became of so many samples."""
        setattr(self, fate, getattr(self, fate) + samples)


@dataclass
class Member:
    """One worker."""

    worker: int
    peer: Peer
    link: RootLink
    state: State = State.COMPUTING
    header: Header | None = None  # of the gradient on which no verdict has been given
    arrival: Arrival | None = None
    work: Work | None = None  # what it was computed from
    is_tie: bool = False
    next_sequence: int = 0
    waits_for: int = -1  # version it needs next; -1: has it, or has not asked
    served: int = -1  # the newest version that it was let have
    since_s: float = 0.0  # when its computation could begin
    peak_rss_bytes: int = 0  # as it said when it left
    account: Account = field(default_factory=Account)
    compute_s: deque[float] = field(default_factory=lambda: deque(maxlen=32))

    @property
    def is_alive(self) -> bool:
        """Whether a gradient may still come from it."""
        return self.state not in (State.LEFT, State.GONE, State.LOST)

    @property
    def said(self) -> Header:
        """The header that awaits its verdict."""
        assert self.header is not None
        return self.header

    @property
    def done(self) -> Work:
        """What the gradient that awaits its verdict was computed from."""
        assert self.work is not None
        return self.work

    @property
    def came(self) -> Arrival:
        """The arrival that awaits its verdict."""
        assert self.arrival is not None
        return self.arrival
